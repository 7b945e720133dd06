"""What every test can ask for: real servers, an empty database of each kind, settings in a folder of its own.

A server that is not installed skips its tests on a laptop and fails them in CI, where nobody reads skips.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
import sqlalchemy
import typer.main

from lifelogger.budget import Budget
from lifelogger.runtime import Runtime, build
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.server import Sandbox
from lifelogger.settings import PREFIX, Settings, get_settings, load_settings
from lifelogger.store import Store
from lifelogger.store.models import Base
from tests.sandbox.control import Control
from tests.servers import Missing, PostgresServer, RedisServer, keep, kept

_folder = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep away from the developer's own settings and `var/`, even while modules are imported."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    hypothesis.settings.register_profile(
        "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("busy machine")
    config.stash[_folder] = folder = Path(tempfile.mkdtemp(prefix="lifelogger-tests-"))
    (folder / "settings.toml").touch()
    os.environ["LIFELOGGER_SETTINGS"] = str(folder / "settings.toml")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays: the garbage collector need not look through it each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5000)  # nor through all that a test made: most of it goes without being looked for
        gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_folder], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _made_once() -> Iterator[None]:
    """What a process makes once, all tests of this one share.

    Each test has an engine of its own; what SQL statements are compiled to goes by the dialect, so they share
    that as well: of each kind the first one that was connected. The tree of the commands is as it is, and so
    is what our settings.toml says.
    """
    compiled: dict[Any, Any] = {}
    dialects: dict[str, sqlalchemy.Dialect] = {}
    parsed = cache(tomllib.loads)

    def create_engine(url: Any, **options: Any) -> sqlalchemy.Engine:
        engine = sqlalchemy.create_engine(url, **options)
        own = engine.dialect
        sqlalchemy.event.listen(engine, "first_connect", lambda *_: dialects.setdefault(own.name, own))
        engine.dialect = dialects.get(own.name, own)
        engine.update_execution_options(compiled_cache=compiled)
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lifelogger.store.engine.create_engine", create_engine)
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        patch.setattr(tomllib, "loads", lambda text: copy.deepcopy(parsed(text)))
        yield


def unavailable(error: Exception) -> NoReturn:
    if os.environ.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip(str(error))
    pytest.fail(f"{error}, and in CI every server must be there")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real Redis of this session alone, which tests may stop and restart."""
    try:
        server = RedisServer()
    except Missing as error:
        unavailable(error)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of a real, empty Redis."""
    redis_server.flush()
    return redis_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL of this session alone."""
    try:
        server = PostgresServer()
    except Missing as error:
        unavailable(error)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of that server's maintenance database."""
    return postgres_server.url


BOTH = ["sqlite", "postgresql"]
FIRST_SQLITE = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]
"""Both as well; PostgreSQL's turn comes with the slower tests."""


def database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh, empty database."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.emptied("test")


@pytest.fixture(params=FIRST_SQLITE)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh, empty database: the test runs once on SQLite and once on PostgreSQL."""
    return database(request.param, request, tmp_path)


@pytest.fixture
def settings_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Settings]]:
    """Put settings into the environment, for this process and its children, with `var/` in `tmp_path`.

    `settings_env(redis={"url": url}, providers={"strava": {"api_url": base}})` returns what they come to.
    """
    file = tmp_path / "settings.toml"
    file.touch()
    monkeypatch.setenv("LIFELOGGER_SETTINGS", str(file))

    def put(table: dict[str, Any], prefix: str) -> None:
        for key, value in table.items():
            name = f"{prefix}{key.upper()}"
            if isinstance(value, dict):
                put(value, f"{name}__")
            else:
                monkeypatch.setenv(
                    name, json.dumps(value) if isinstance(value, (list, tuple)) else str(value)
                )

    def make(**sections: dict[str, Any]) -> Settings:
        put(sections, PREFIX)
        get_settings.cache_clear()
        return load_settings()

    yield make
    get_settings.cache_clear()


def make_tables(store: Store) -> None:
    """All tables at once, as the models have them: test_migrations.py shows that it is the same."""
    if store.is_sqlite:
        with open(store.url.database or "", "xb") as file:
            file.write(sqlite_with_tables())
    else:
        with store.write() as db:
            if kept(db):
                for each in Base.metadata.sorted_tables:
                    each.dispatch.after_create(each, db)  # the rows it has from the start
            else:
                Base.metadata.create_all(db)
            keep(db)


@cache
def sqlite_with_tables() -> bytes:
    """The file of a database in which nobody has written yet: made once, copied for each test."""
    with tempfile.TemporaryDirectory(prefix="lifelogger-tables-") as folder:
        file = Path(folder) / "test.db"
        store = Store(f"sqlite:///{file}")
        with store.write() as db:
            Base.metadata.create_all(db)
        store.close()
        return file.read_bytes()


@pytest.fixture
def runtime(database_url: str, redis_url: str, settings_env: Callable[..., Settings]) -> Iterator[Runtime]:
    """What the engine works with, on both databases with all tables, and on a real, empty Redis."""
    built = build(settings_env(database={"url": database_url}, redis={"url": redis_url}))
    make_tables(built.store)
    yield built
    built.close()


# The sandbox -----------------------------------------------------------------------------------------

CLOCK = Clock()
"""The sandbox's: what runs in this process reads it without asking."""

NOON = datetime(2026, 11, 24, 12, 2, tzinfo=UTC)


def world(people: int = 5, history_days: int = 90, **options: Any) -> Sandbox:
    """A sandbox that began the day after `NOON`: its people have lived as long, whatever the day is today."""
    CLOCK.freeze((NOON + timedelta(days=1)).timestamp())
    return Sandbox(people=people, seed=7, history_days=history_days, clock=CLOCK, **options)


@pytest.fixture(scope="session")
def sandbox_server() -> Iterator[Sandbox]:
    """The simulated clouds of this session alone, with five people: alice and others."""
    with world() as server:
        yield server


@pytest.fixture
def sandbox(sandbox_server: Sandbox) -> Iterator[Control]:
    """The sandbox as if it had just begun, in real time."""
    control = Control(sandbox_server.url)
    control.reset()
    control.follow_real_time()
    yield control
    control.reset()
    control.close()


def pointed_at(sandbox: Control) -> dict[str, Any]:
    """Settings of providers that are the sandbox."""
    strava = f"{sandbox.url}/strava"
    return {
        "strava": {
            "client_id": "sandbox",
            "client_secret": "sandbox",
            "api_url": f"{strava}/api/v3",
            "authorize_url": f"{strava}/oauth/authorize",
            "token_url": f"{strava}/api/v3/oauth/token",
            "revoke_url": f"{strava}/oauth/revoke",
        },
        "fitbit": {
            "client_id": "sandbox",
            "client_secret": "sandbox",
            "api_url": f"{sandbox.url}/fitbit",
            "authorize_url": f"{sandbox.url}/fitbit/o/oauth2/v2/auth",
            "token_url": f"{sandbox.url}/fitbit/token",
            "revoke_url": f"{sandbox.url}/fitbit/revoke",
        },
        "oura": {
            "client_id": "sandbox",
            "client_secret": "sandbox",
            "api_url": f"{sandbox.url}/oura",
            "authorize_url": f"{sandbox.url}/oura/oauth/authorize",
            "token_url": f"{sandbox.url}/oura/oauth/token",
            "revoke_url": f"{sandbox.url}/oura/oauth/revoke",
        },
    }


@pytest.fixture
def endpoints(sandbox: Control) -> dict[str, Any]:
    """Where providers are: a test file that brings one of its own says so here."""
    return pointed_at(sandbox)


@pytest.fixture
def live(
    database_url: str,
    redis_url: str,
    settings_env: Callable[..., Settings],
    sandbox: Control,
    endpoints: dict[str, Any],
) -> Iterator[Runtime]:
    """A runtime that speaks to the sandbox, both with a clock that stands at noon: `sandbox.step(900)`."""
    sandbox.freeze(NOON)
    built = build(settings_env(database={"url": database_url}, redis={"url": redis_url}, providers=endpoints))
    make_tables(built.store)
    clocked = dataclasses.replace(
        built,
        clock=lambda: datetime.fromtimestamp(CLOCK.now(), UTC),
        budget=Budget(redis_url, prefix=built.settings.redis.prefix, clock=CLOCK.now),
    )
    yield clocked
    clocked.close()
