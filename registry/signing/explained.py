"""tuf's errors in the registry's words: what happened to the trust metadata, and what to do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from registry.errors import BadSignature, DigestMismatch, NetworkError, StaleTrust
from registry.signing.trust import NAMES, ExpiredTrust


class Withheld(StaleTrust):
    """A metadata file is missing; worth another look, because publishing removes superseded files."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns tuf's errors into the registry's."""
    from tuf.api import exceptions

    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise expired_error(str(error)) from error
    except exceptions.BadVersionNumberError as error:
        raise StaleTrust(
            f"the store shows older trust metadata than this machine has already seen ({error})",
            mend="do not use this store until its owner explains; nothing was loaded",
        ) from error
    except exceptions.UnsignedMetadataError as error:
        raise BadSignature(
            f"trust metadata is not signed by the keys that may sign it ({error})",
            mend="the store may have been tampered with; nothing was loaded",
        ) from error
    except exceptions.DownloadLengthMismatchError as error:
        raise changed_error(str(error)) from error
    except exceptions.DownloadError as error:
        if isinstance(error.__cause__, NetworkError):
            raise error.__cause__ from error
        raise withheld_error(error) from error
    except exceptions.RepositoryError as error:
        raise changed_error(str(error)) from error


def expired_error(what: str) -> ExpiredTrust:
    """Metadata whose time is over; `what` begins with its role, as tuf says it."""
    role = what.removeprefix("New ").removeprefix("Final ").split(".")[0].split(" ")[0]
    names = "push an adapter again, or run `registry trust renew`, where the publisher key is kept"
    mends = {
        "root": "the root's owner must sign a new root: `registry trust renew`",
        "targets": "promote an alias again (`registry promote`) or run `registry trust renew` where the "
        "approver key is kept",
        NAMES: names,
    }
    mend = names if role.startswith("versions-") else mends.get(role)
    return ExpiredTrust(
        f"the trust metadata of the store has expired ({what})",
        mend=(mend or "run any `registry` command where the online key is kept, which renews it")
        + "; if it was renewed, the store is withholding the newer one",
    )


def changed_error(what: str) -> DigestMismatch:
    """Metadata that is not what was signed."""
    return DigestMismatch(
        f"the trust metadata in the store was changed ({what})",
        mend="the store may have been tampered with; nothing was loaded",
    )


def withheld_error(error: Exception) -> Withheld:
    """Metadata that should be there."""
    return Withheld(
        f"the store withholds trust metadata ({error})",
        mend="check that the store is complete and the right one; nothing was loaded",
    )
