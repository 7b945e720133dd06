"""`python -m lifelogger.sandbox`: the sandbox as a process of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lifelogger.sandbox.server import HOST, listen, serve, url_of
from lifelogger.sandbox.state import StateError
from lifelogger.sandbox.world import World


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lifelogger.sandbox", description="A simulated Strava.")
    parser.add_argument("--host", default=HOST, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8790, help="port; 0 takes a free one (%(default)s)")
    parser.add_argument("--people", type=int, default=36, help="how many people there are (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed, the same people (%(default)s)")
    parser.add_argument(
        "--history-days", type=int, default=1825, help="how long they have been recording (%(default)s)"
    )
    parser.add_argument("--state", type=Path, help="file to remember everything in (default: memory)")
    options = parser.parse_args(arguments)
    try:
        world = World(options.people, options.seed, options.history_days, options.state)
    except (StateError, ValueError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    try:
        listener = listen(options.host, options.port)
    except (OSError, OverflowError) as error:
        world.close()
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"sandbox: cannot listen on {options.host} port {options.port}: {reason}", file=sys.stderr)
        return 1
    print(f"sandbox listening on {url_of(listener)}", flush=True)
    try:
        serve(world, listener)
    finally:
        world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
