"""Evaluation: edits of people that training has never seen, judged by judges that did not label the data."""

from trainer.evaluation.bench import Bench
from trainer.evaluation.evaluating import REPORT_NAME, Wanted, evaluate, evaluate_recipe
from trainer.evaluation.judges import Judges
from trainer.evaluation.report import EvaluationReport

__all__ = ["REPORT_NAME", "Bench", "EvaluationReport", "Judges", "Wanted", "evaluate", "evaluate_recipe"]
