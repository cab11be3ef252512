"""The behavioural probe: does an adapter do something that its card does not say?

It asks the base and the adapter the same thousands of short questions (`core`): every word of a vocabulary,
look-alikes of the declared words, patches on the input, words that gradients find, other adapters beside it.
docs/scanner.md tells what it can see and what it cannot.
"""

from trainer.evaluation.probe.core import Probe
from trainer.evaluation.probe.report import PROBE_VERSION, ProbeReport
from trainer.evaluation.probe.settings import ProbeSettings

__all__ = ["PROBE_VERSION", "Probe", "ProbeReport", "ProbeSettings"]
