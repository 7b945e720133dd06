"""Every error of the library: one root, and branches by what the caller does next.

    LifeloggerError
    ├── Wait              again later, not before `until`
    │   ├── BudgetSpent   the provider's request budget is spent, or kept for somebody else
    │   └── Unavailable   a part we need (Redis, the provider) does not answer now
    ├── SignInAgain       only the person can mend it: the authorisation is gone
    ├── Refused           the provider says no and will say no again: give this up
    │   ├── NotThere        it has no such thing, or none for us
    │   └── AccountRefused  it says so of the whole account: ask nothing else of it
    ├── Forged            what came to a webhook is not from the provider, or not of now: change nothing
    ├── BadRecord         one item cannot be understood: quarantine it, go on
    ├── LockLost          somebody else owns this work now: stop before the next write
    └── SettingsError     the configuration is wrong: refuse to start

No message carries a token, a query string or a provider's text unshortened, and none carries a
cause from below: Dramatiq writes tracebacks to Redis, where the dashboard shows them.
"""

from __future__ import annotations

from datetime import datetime


class LifeloggerError(Exception):
    """The root: catching it catches whatever this library raises on purpose."""


class Wait(LifeloggerError):
    """Try again, but not before `until` (UTC); None: whoever retries chooses, with a back-off.

    `reason` is one sentence for the person.
    """

    def __init__(self, reason: str, until: datetime | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.until = until


class BudgetSpent(Wait):
    """No request may be sent now: the provider's limit, or a reserve held for others.

    `a_day` is how many requests a whole window has, of one that is a day long or longer; else None.
    """

    def __init__(self, reason: str, until: datetime | None = None, a_day: int | None = None) -> None:
        super().__init__(reason, until)
        self.a_day = a_day


class Unavailable(Wait):
    """Something that is normally there did not answer: a server error, a time-out, Redis away."""


class SignInAgain(LifeloggerError):
    """The provider no longer accepts this authorisation, and no retry will change that."""


class Refused(LifeloggerError):
    """The provider refused this one thing for good (scope missing, no such resource)."""


class NotThere(Refused):
    """The provider has no such resource (404, 410)."""


class AccountRefused(Refused):
    """The provider refused this account, whatever is asked of it, until the person changes something."""


class Forged(LifeloggerError):
    """What came to a webhook is not the provider's, or comes again after its time: nothing is done for it."""


class BadRecord(LifeloggerError):
    """One item of a page cannot be normalised; the message says which field and why."""


class LockLost(LifeloggerError):
    """This worker no longer owns what it works on, so it must not write."""


class SettingsError(LifeloggerError):
    """The settings are wrong; the message lists every fault at once."""
