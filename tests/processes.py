"""Real commands for the tests: `dramatiq` workers and `periodiq` schedulers, each a group of processes.

with worker("tests.lock_actors", processes=2) as command:
    command.wait_until(lambda: ..., "what is awaited")
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType

from tests.servers import DEADLINE_SECONDS, wait_until

ROOT = Path(__file__).parent.parent


class Command:
    """A command that runs from the root of the checkout while the `with` block does, then is killed.

    `environ` comes on top of this process's own. It is ready when its log has `ready` in it so many `times`;
    whatever is awaited of it has `seconds`.
    """

    def __init__(
        self,
        name: str,
        *arguments: str,
        ready: str,
        times: int = 1,
        environ: Mapping[str, str] = MappingProxyType({}),
        seconds: float = DEADLINE_SECONDS,
    ):
        self.arguments = [str(Path(sys.executable).with_name(name)), *arguments]
        self.ready = ready
        self.times = times
        self.seconds = seconds
        self.environ = {**os.environ, "PYTHONUNBUFFERED": "1", **environ}
        self.process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="command-", suffix=".log")  # noqa: SIM115 - closed in close

    def __enter__(self) -> Command:
        if self.process is None:
            self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it and do not wait: several boot faster side by side."""
        self.process = subprocess.Popen(
            self.arguments,
            cwd=ROOT,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # a group of its own, so that its children can be killed with it
        )

    def wait_until_ready(self) -> None:
        self.wait_until(lambda: self.log().count(self.ready) >= self.times, f"{self.ready!r}")

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Return once `condition()` is true; fail with the end of the log if that is not in time."""

        def met() -> object:
            if condition():
                return True
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}")
            return False

        try:
            wait_until(met, what, self.seconds)
        except AssertionError as failure:
            command = " ".join([Path(self.arguments[0]).name, *self.arguments[1:]])
            raise AssertionError(f"{command}: {failure}\n{self.log()[-4000:]}") from None

    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def stop(self) -> int:
        """Ask it to end (SIGTERM), wait, and return its status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(DEADLINE_SECONDS)

    def kill(self) -> None:
        """End the whole group at once, as a power cut would (SIGKILL)."""
        if self.process is not None:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        self.kill()
        self._log.close()


def worker(
    *modules: str,
    processes: int = 1,
    threads: int = 2,
    queues: Iterable[str] = (),
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Command:
    """`dramatiq MODULES`, ready when each of its processes is."""
    arguments = [*modules, "-p", str(processes), "-t", str(threads)]
    if queues:
        arguments += ["-Q", *queues]
    ready = "Worker process is ready for action"
    return Command("dramatiq", *arguments, ready=ready, times=processes, environ=environ)


def scheduler(*modules: str, environ: Mapping[str, str] = MappingProxyType({})) -> Command:
    """`periodiq MODULES`, ready when it has read its timetable."""
    return Command("periodiq", *modules, ready="Registered periodic actors", environ=environ)
