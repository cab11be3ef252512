"""Keeps the model libraries quiet, so that stderr has what we say ourselves."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Keep the progress bars and the chatter of the model libraries off stderr, for this whole process."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that nothing here uses
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)  # about arguments of theirs, nothing a user could mend
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
