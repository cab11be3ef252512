"""What a flow leaves for people in Prefect's user interface."""

from __future__ import annotations

from typing import Any

from trainer.stage import StageResult


def show_evaluation(evaluated: StageResult) -> None:
    """Put the figures of an evaluation and the way to its report into Prefect's user interface."""
    from prefect.artifacts import create_link_artifact, create_table_artifact

    rows = [{"metric": name, "value": value} for name, value in evaluated.facts.items()]
    create_table_artifact(rows, key="evaluation", description="Held-out people, edited and judged.")
    create_link_artifact((evaluated.folder / "report.html").as_uri(), key="evaluation-report")


def show_summary(summary: dict[str, Any], key: str, title: str) -> None:
    """Put what was done, and where everything lies, into Prefect's user interface."""
    from prefect.artifacts import create_markdown_artifact

    lines = [f"# {title}", "", "| stage | seconds | reused | what came out |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['stage']} | {row['seconds']} | {row['reused']} | {row['facts']} |"
        for row in summary["stages"]
    ]
    create_markdown_artifact("\n".join([*lines, "", f"Everything lies in `{summary['folder']}`."]), key=key)
