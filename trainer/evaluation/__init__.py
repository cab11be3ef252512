"""Evaluation: metrics with intervals, the portraits suite, gates, and reports that people look at."""

from trainer.evaluation.report import EvaluationReport
from trainer.evaluation.suite import REPORT_NAME, Judges, evaluate

__all__ = ["REPORT_NAME", "EvaluationReport", "Judges", "evaluate"]
