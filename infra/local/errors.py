"""Every error of the local platform, in one tree.

PlatformError                  1   anything else
 ├─ NotRunning                 1   nothing was started here, or it was stopped
 ├─ CannotStart                1   a service does not come up; says where its log is
 ├─ PortTaken                  1   a port that the settings name belongs to somebody else
 ├─ WrongFolder                1   the folder cannot be used: not ours, unwritable, full, moved
 └─ Missing                    1   a program or a package that the platform needs is not installed

Each says what happened (``message``) and what to do about it (``mend``).
"""

from __future__ import annotations

from registry.errors import Explained


class PlatformError(Explained):
    """Base of all errors of the local platform."""


class NotRunning(PlatformError):
    """Nothing was started here."""


class CannotStart(PlatformError):
    """A service does not come up."""


class PortTaken(PlatformError):
    """A port that the settings name is taken."""


class WrongFolder(PlatformError):
    """The platform's folder cannot be used."""


class Missing(PlatformError):
    """A program or a package is not installed."""
