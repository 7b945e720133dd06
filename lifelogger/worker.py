"""The `dramatiq` command, with what its processes need imported before they are forked.

    python -m lifelogger.worker actors scheduler --processes 2 --threads 8

So it is read once and kept once, not once for each of them: they are ready sooner, and a further one costs
less memory. Nothing is connected here: a socket must not be shared.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from dramatiq import cli
from sqlalchemy.engine import make_url

# What actors/ and scheduler.py import.
from lifelogger import leaving, notices, notify, planner, sync, ticks, tokens, webhooks  # noqa: F401
from lifelogger.runtime import database_url
from lifelogger.settings import get_settings
from lifelogger.store import counts, journal  # noqa: F401


def main(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; returns its exit status."""
    make_url(database_url(get_settings())).get_dialect().import_dbapi()
    gc.freeze()  # a collection would write to what is shared, and so copy it
    sys.argv = ["dramatiq", *arguments]
    return int(cli.main() or 0)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
