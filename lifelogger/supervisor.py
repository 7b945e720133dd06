"""A supervised tree of processes: started, watched, started again when one dies, ended together.

It knows commands, not what they do; `lifelogger.local` says which parts a whole lifelogger has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lifelogger.errors import LifeloggerError

READY_SECONDS = 60.0
POLL_SECONDS = 0.05
LOOK_EVERY_SECONDS = 0.5
STOP_SECONDS = 15.0
"""How long a part may take to end before it is killed."""
MOST_DEATHS = 5
STEADY_SECONDS = 30.0
"""A part that died `MOST_DEATHS` times, never having lived this long, is given up. Less than a minute:
periodiq dies at each tick while Redis is away, and that may be every minute."""
TAIL_LINES = 8
TAIL_BYTES = 65_536
MOST_LOG_BYTES = 20_000_000
"""A log that is longer is put aside when its part starts; the one put aside before goes."""


class PartFailed(LifeloggerError):
    """A part of the tree cannot be kept running; the message says which and why."""


@dataclass
class Part:
    """One process of the tree."""

    name: str
    command: Sequence[str]
    ready: Callable[[str], bool]
    """Whether it is up, given what it has written since it was started."""
    address: str
    """Where it is reached, for the line that tells of it."""
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    deaths: int = 0
    log_start: int = 0

    def start(self) -> None:
        """Start it. Raises `PartFailed` when there is no such command."""
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > MOST_LOG_BYTES:
            self.log.replace(self.log.with_name(f"{self.log.name}.1"))
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            try:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environ},
                    start_new_session=True,  # Ctrl-C is for us; we end our parts in order
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                raise PartFailed(
                    f"{self.name} cannot be started: {error.strerror} ({self.command[0]})"
                ) from None
        self.started_at = time.monotonic()

    def written(self) -> str:
        """What it has written since it was started."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of what it has written since it was started, indented; a line before says whose it is."""
        with self.log.open("rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join(f"\n  {line}" for line in said[-lines:])

    def status(self) -> str | None:
        """How it ended, in words; None while it runs."""
        code = self.process.poll() if self.process else None
        if code is None:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def clear(self) -> None:
        """Kill whoever is left of its group: the children of a part that was killed live on."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Tree:
    """The parts, in the order in which they start; they end in the opposite one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.parts: list[Part] = []
        self.say = say
        self.stopping = False
        self._again: dict[str, float] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[Tree]:
        """Ends all parts at the end of the block; SIGTERM, SIGINT and SIGHUP end it at its next step.

        Steps are `start`, `wait_until_ready`, `watch` and `heed`.
        """
        before = {number: signal.signal(number, self._interrupt) for number in _SIGNALS}
        try:
            yield self
        except _Interrupted:
            self.say("Stopping.")
        finally:
            # A second Ctrl-C must not leave processes behind; the parts are killed after a while anyway.
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # No more than a note: an exception raised here comes up wherever the program just is. In a finalizer
        # it would be printed and lost, and a process just started would be ended by nobody.
        self.stopping = True

    def start(self, part: Part) -> None:
        """Start a part; see `wait_until_ready`."""
        self.parts.append(part)
        part.start()
        self.heed()

    def heed(self) -> None:
        """End the block if a signal has asked for it; to be called between steps that take a while."""
        if self.stopping:
            raise _Interrupted

    def wait_until_ready(self) -> None:
        """Return when all parts are up. Raises `PartFailed` when one ends before, or does not get there."""
        for part in self.parts:
            deadline = time.monotonic() + READY_SECONDS
            while not part.ready(part.written()):
                self.heed()
                if (status := part.status()) is not None:
                    raise PartFailed(f"{part.name} {status} while it started:{part.tail()}")
                if time.monotonic() > deadline:
                    raise PartFailed(
                        f"{part.name} is not up after {READY_SECONDS:g} s: see {part.log}{part.tail()}"
                    )
                time.sleep(POLL_SECONDS)
            self.say(f"{part.name:<10} {part.address}")

    def watch(self) -> None:
        """Start again what has died, a little later each time. Raises `PartFailed` when that is hopeless."""
        self.heed()
        now = time.monotonic()
        for part in self.parts:
            status = part.status()
            if status is None:
                continue
            if part.name in self._again:
                if now >= self._again[part.name]:
                    del self._again[part.name]
                    part.start()
                continue
            if now - part.started_at > STEADY_SECONDS:
                part.deaths = 0
            part.deaths += 1
            part.clear()
            if part.deaths >= MOST_DEATHS:
                raise PartFailed(f"{part.name} {status}, {part.deaths} times in a row:{part.tail()}")
            pause = 2.0 ** (part.deaths - 1) / 2
            self.say(f"{part.name} {status}: starting it again in {pause:g} s (see {part.log}){part.tail(1)}")
            self._again[part.name] = now + pause

    def stop(self) -> None:
        """End all parts in turn, the last started first: what it needs is there until it has ended."""
        self.stopping = True
        deadline = time.monotonic() + STOP_SECONDS
        for part in reversed(self.parts):
            if part.process is None:
                continue
            if part.process.poll() is None:
                part.process.terminate()  # its main process alone: that one ends its own children in order
            try:
                part.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"{part.name} did not end in {STOP_SECONDS:g} s: killed")
            part.clear()
            part.process.wait()


class _Interrupted(BaseException):
    """A signal asked for the end."""


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    """On Linux, the kernel ends a part whose supervisor was killed; elsewhere it would be left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def refuse_occupied(host: str, port: int, part: str) -> None:
    """Raise `PartFailed` with a clear sentence when somebody else listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            variable = f"LIFELOGGER_{part.upper()}__PORT"
            raise PartFailed(
                f"{part} cannot listen on {host} port {port}: {error.strerror}. "
                f"End what uses it, or choose another port ({part}.port in the settings, or {variable})"
            ) from None


def main(name: str, log: str, ready: str, address: str, *command: str) -> int:
    """Keep one command running: it is up when its log says `ready`. Returns the exit status.

    In a process that imports next to nothing: the supervisor of a small part should not be larger than it.
    """

    def say(line: str) -> None:
        print(line, flush=True)

    part = Part(name, command, lambda written: ready in written, address, Path(log))
    try:
        with Tree(say).running() as tree:
            tree.start(part)
            tree.wait_until_ready()
            while True:
                tree.watch()
                time.sleep(LOOK_EVERY_SECONDS)
    except LifeloggerError as trouble:
        print(trouble, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
