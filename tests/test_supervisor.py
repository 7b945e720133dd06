"""The supervised tree: parts that start, die, are started again and end together. Small commands here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lifelogger import supervisor
from lifelogger.supervisor import Part, PartFailed, Tree, refuse_occupied
from tests.processes import ROOT
from tests.servers import wait_until
from tests.test_embedded import is_alive

STAY = "print('up', flush=True)\nimport signal\nsignal.pause()"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STAY
PARENT = (
    "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
    "print('child', child.pid, flush=True)\n" + STAY
)


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Callable[..., Part]]:
    made: list[Part] = []

    def make(code: str, name: str = "part") -> Part:
        made.append(
            Part(
                name, [sys.executable, "-c", code], lambda log: "up" in log, "here", tmp_path / f"{name}.log"
            )
        )
        return made[-1]

    yield make
    for each in made:
        assert each.process is None or each.process.poll() is not None, "left behind"


def bring_up(*parts: Part) -> None:
    """Start parts, wait until they are up, and end them."""
    with Tree(print).running() as tree:
        for each in parts:
            tree.start(each)
        tree.wait_until_ready()


def watch_for_ever(part: Part) -> None:
    with Tree(print).running() as tree:
        tree.start(part)
        wait_until(lambda: tree.watch(), "never")


def pid(part: Part) -> int:
    assert part.process is not None
    return part.process.pid


def test_parts_are_told_when_they_are_up_and_end_with_the_block(part: Callable[..., Part]) -> None:
    said: list[str] = []
    first, second = part(STAY, "first"), part(STAY, "second")

    with Tree(said.append).running() as tree:
        tree.start(first)
        tree.start(second)
        tree.wait_until_ready()
        assert said == ["first      here", "second     here"]
        assert is_alive(pid(first))

    assert not is_alive(pid(first))
    assert not is_alive(pid(second))


def test_a_part_that_ends_while_it_starts(part: Callable[..., Part]) -> None:
    with pytest.raises(PartFailed, match=r"part ended with status 3 while it started:\n  no luck$"):
        bring_up(part("print('no luck'); raise SystemExit(3)"))


def test_a_part_that_is_never_up(part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "READY_SECONDS", 0.3)

    with pytest.raises(PartFailed, match=r"part is not up after 0\.3 s: see .*part\.log"):
        bring_up(part("import signal; signal.pause()"))


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    missing = Part("web", ["/nowhere/uvicorn"], lambda log: True, "", tmp_path / "log")

    with pytest.raises(PartFailed, match=r"web cannot be started: No such file or directory \(/nowhere/uvi"):
        bring_up(missing)


def test_a_part_that_dies_is_told_of_and_started_again(part: Callable[..., Part]) -> None:
    said: list[str] = []
    one = part(STAY)

    with Tree(said.append).running() as tree:
        tree.start(one)
        tree.wait_until_ready()
        before = pid(one)
        os.kill(before, signal.SIGKILL)

        def again() -> bool:
            tree.watch()
            return pid(one) != before and one.ready(one.written())

        wait_until(again, "the part's return")

    assert said[1].startswith("part was ended by SIGKILL: starting it again in 0.5 s (see ")
    assert said[1].endswith("part.log)\n  up")  # the last that it wrote


def test_a_part_that_always_dies_is_given_up(
    part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MOST_DEATHS", 2)
    one = part("print('up'); raise SystemExit('Redis is away')")

    with pytest.raises(PartFailed, match=r"part ended with status 1, 2 times in a row:(.|\n)*Redis is away"):
        watch_for_ever(one)


def test_one_that_lived_long_is_not_given_up(
    part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Periodiq dies at each tick while Redis is away: at most once a minute, for as long as it takes."""
    assert supervisor.STEADY_SECONDS < 59
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "MOST_DEATHS", 2)
    one = part(STAY)
    said: list[str] = []

    with Tree(said.append).running() as tree:
        tree.start(one)
        tree.wait_until_ready()
        for _ in range(3):
            before = pid(one)
            os.kill(before, signal.SIGKILL)
            wait_until(lambda before=before: tree.watch() or pid(one) != before, "its return")  # type: ignore[misc]

    assert [line.partition(":")[0] for line in said[1:]] == ["part was ended by SIGKILL"] * 3


def test_a_stubborn_part_is_killed(part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)
    said: list[str] = []
    one = part(STUBBORN)

    with Tree(said.append).running() as tree:
        tree.start(one)
        tree.wait_until_ready()

    assert said[-1] == "part did not end in 0.2 s: killed"
    assert not is_alive(pid(one))


def test_the_children_of_a_part_end_with_it(part: Callable[..., Part]) -> None:
    one = part(PARENT)

    with Tree(print).running() as tree:
        tree.start(one)
        tree.wait_until_ready()
        child = int(one.written().split()[1])
        assert is_alive(child)

    wait_until(lambda: not is_alive(child), "the child's end")


def test_the_children_of_a_killed_part_end_before_it_starts_again(part: Callable[..., Part]) -> None:
    """Or a worker whose main process was killed would go on beside the new one."""
    one = part(PARENT)

    with Tree(print).running() as tree:
        tree.start(one)
        tree.wait_until_ready()
        child = int(one.written().split()[1])
        os.kill(pid(one), signal.SIGKILL)
        wait_until(one.status, "its death")
        tree.watch()
        wait_until(lambda: not is_alive(child), "the child's end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_block(part: Callable[..., Part], number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)

    with Tree(said.append).running() as tree:
        tree.start(part(STAY))
        tree.wait_until_ready()
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        wait_until(lambda: tree.watch(), "the signal")

    assert said[-1] == "Stopping."
    assert signal.getsignal(number) is before


def test_a_signal_while_a_part_starts_leaves_nothing_behind(
    part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = part(STAY)
    popen = subprocess.Popen

    def interrupted(*args: object, **kwargs: object) -> object:
        process = popen(*args, **kwargs)  # type: ignore[call-overload]
        os.kill(os.getpid(), signal.SIGINT)  # comes before anybody knows the process
        return process

    with Tree(print).running() as tree:
        monkeypatch.setattr(subprocess, "Popen", interrupted)
        tree.start(one)
        pytest.fail("the signal was lost")

    assert one.process is not None
    assert not is_alive(pid(one))


ORPHANS = """
import sys, time
from pathlib import Path
from lifelogger.supervisor import Part, Tree
part = Part("part", [sys.executable, "-c", sys.argv[2]], lambda log: "up" in log, "", Path(sys.argv[1]))
with Tree(lambda line: None).running() as tree:
    tree.start(part)
    tree.wait_until_ready()
    print(part.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel does this")
def test_a_killed_supervisor_leaves_no_part_behind(tmp_path: Path) -> None:
    """The kernel ends its parts."""
    killed = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(tmp_path / "log"), STAY], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert killed.stdout is not None
    with killed.stdout:
        orphan = int(killed.stdout.readline())
    assert is_alive(orphan)

    killed.kill()
    killed.wait()

    wait_until(lambda: not is_alive(orphan), "the orphan's end")


def test_a_log_does_not_grow_for_ever(part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MOST_LOG_BYTES", 100)
    one = part(STAY)
    aside = one.log.with_name("part.log.1")
    one.log.write_text("short\n")

    for before in ("short\n", "long\n" * 100):
        one.log.write_text(before)
        bring_up(one)

    assert aside.read_text() == "long\n" * 100
    assert one.log.read_text() == "up\n"


def test_what_was_written_before_is_not_taken_for_readiness(part: Callable[..., Part]) -> None:
    one = part("raise SystemExit(0)")
    one.log.write_text("up\n")

    with pytest.raises(PartFailed, match="ended with status 0 while it started"):
        bring_up(one)


def test_an_occupied_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PartFailed) as refusal:
            refuse_occupied("127.0.0.1", port, "web")

    assert str(refusal.value) == (
        f"web cannot listen on 127.0.0.1 port {port}: Address already in use. End what uses it, or choose "
        "another port (web.port in the settings, or LIFELOGGER_WEB__PORT)"
    )
    refuse_occupied("127.0.0.1", port, "web")  # free again


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_raises_nothing_where_it_arrives() -> None:
    """In a destructor, say, Python would print the exception and forget it."""
    said: list[str] = []

    class Doomed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with Tree(said.append).running() as tree:
        Doomed()
        said.append("goes on to its next step")
        tree.watch()
        said.append("went on")

    assert said == ["goes on to its next step", "Stopping."]
