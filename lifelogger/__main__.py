"""`lifelogger` and `python -m lifelogger`: Ctrl-C ends them quietly, even while the rest is imported."""

from __future__ import annotations

import contextlib
import gc
import sys


def main() -> None:
    """Run the command line."""
    try:
        gc.disable()  # while much is imported and nothing is garbage: a fifth of the time
        if sys.argv[1:] == ["worker"]:
            _worker()
        from lifelogger.cli import main as command

        gc.enable()
        command()
    except KeyboardInterrupt:
        sys.exit(130)


def _worker() -> None:
    """`lifelogger worker` without what only other commands need: it would be kept in memory all the time.

    Returns if it cannot run: the command line says why.
    """
    from lifelogger import worker
    from lifelogger.errors import LifeloggerError

    with contextlib.suppress(LifeloggerError):
        sys.exit(worker.run())


if __name__ == "__main__":
    main()
