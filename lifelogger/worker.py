"""The `dramatiq` command, with what its processes need imported before they are forked.

    python -m lifelogger.worker actors scheduler --processes 2 --threads 8

So it is read once and kept once, not once for each of them: they are ready sooner, and a further one costs
less memory. Nothing is connected here: a socket must not be shared.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence


def run() -> int:
    """`lifelogger worker`: as large as `[worker]` in the settings says. Returns the exit status.

    Raises `LifeloggerError` before anything is started, if it cannot be.
    """
    from lifelogger import local
    from lifelogger.checks import checked
    from lifelogger.settings import get_settings

    return main(local.worker_arguments(checked(get_settings())))


def main(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; returns its exit status."""
    gc.disable()  # while much is imported nothing is garbage: looking for some is a seventh of the time
    _import()
    from dramatiq import cli

    gc.freeze()  # a collection would write to what is shared, and so copy it
    gc.enable()
    sys.argv = ["dramatiq", *arguments]
    return int(cli.main() or 0)  # type: ignore[no-untyped-call]


def _import() -> None:
    """Import what actors/ and scheduler.py do, and what is else imported when it is first used."""
    from sqlalchemy.engine import make_url

    from lifelogger import broker, leaving, notices, notify, planner, sync, ticks, tokens, webhooks  # noqa: F401
    from lifelogger.providers import registry
    from lifelogger.runtime import database_url
    from lifelogger.settings import get_settings
    from lifelogger.store import counts, journal  # noqa: F401

    registry()
    make_url(database_url(get_settings())).get_dialect().import_dbapi()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
