"""Asking paid APIs: each answer is paid once and kept, each attempt is counted, and nothing exceeds a budget.

`Paid.ask` is the one door. It knows neither vendors nor pictures: what is asked is a `Request` of JSON
values, what asks is a function that returns a `Reply` or raises `Failed`. `trainer.apis.gemini` and
`trainer.apis.openai` make the clients of the vendors' SDKs and translate their errors.
"""

from trainer.apis.paid import Paid, run_of
from trainer.apis.rate import before_request
from trainer.apis.request import Answer, Failed, Reply, Request, Usage

__all__ = ["Answer", "Failed", "Paid", "Reply", "Request", "Usage", "before_request", "run_of"]
