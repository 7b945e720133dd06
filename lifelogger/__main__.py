"""`lifelogger` and `python -m lifelogger`: Ctrl-C ends them quietly, even while the rest is imported."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line."""
    try:
        gc.disable()  # while much is imported and nothing is garbage: a fifth of the time
        from lifelogger.cli import main as command

        gc.enable()
        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
