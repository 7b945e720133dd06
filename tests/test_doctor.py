"""What `lifelogger doctor` finds: a sentence for each check, and the next step with each fault."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
import redis
from alembic import command
from cryptography.fernet import Fernet
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import insert

from lifelogger import webhooks
from lifelogger.broker import WORKER_NAME
from lifelogger.crypto import Vault
from lifelogger.doctor import Finding, examine
from lifelogger.runtime import Runtime
from lifelogger.store import Store
from lifelogger.store.migrate import downgrade, run
from lifelogger.store.models import Tick
from tests.live import change, connect, tuned
from tests.sandbox.control import Control

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def live(live: Runtime) -> Runtime:
    """With the note of their version that tables have when migrations made them."""
    run(live.store, lambda config: command.stamp(config, "head"))
    return live


def found(rt: Runtime, part: str) -> list[Finding]:
    return [each for each in examine(rt) if each.part == part]


def faults(rt: Runtime) -> list[Finding]:
    return [each for each in examine(rt) if each.ok is False]


def test_all_is_well(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    now = live.clock()
    with live.store.write() as db:
        db.execute(insert(Tick).values(name="sync_active_users", due_at=now, fired_at=now, planned=1))
    worker = redis.Redis.from_url(live.settings.redis.url, client_name=f"{WORKER_NAME}:here:1")
    worker.ping()

    assert not faults(live)
    sentences = [each.sentence for each in examine(live)]
    assert "The stored tokens can be decrypted." in sentences
    assert "Strava has an application of its own." in sentences
    assert f"The last tick fired at {now:%H:%M} UTC." in sentences
    assert any(sentence.startswith("1 worker process") for sentence in sentences)
    assert all(sentence.endswith(".") for sentence in sentences)


def test_nothing_runs(live: Runtime) -> None:
    assert [each.sentence for each in found(live, "work")] == [
        "No worker is running: `make worker`.",
        "No tick has fired ever: `make periodiq`.",
    ]


def test_the_last_tick_is_long_ago(live: Runtime) -> None:
    then = live.clock() - timedelta(hours=2)
    with live.store.write() as db:
        db.execute(insert(Tick).values(name="sync_active_users", due_at=then, fired_at=then, planned=1))

    assert f"No tick has fired since {then:%H:%M} UTC: `make periodiq`." in [
        each.sentence for each in found(live, "work")
    ]


def test_no_tables(live: Runtime) -> None:
    downgrade(live.store, "base")

    broken = faults(live)

    assert {each.part for each in broken} >= {"database", "security", "work"}
    assert all("`lifelogger migrate`" in each.sentence for each in broken)


def test_no_database(live: Runtime) -> None:
    away = dataclasses.replace(live, store=Store("postgresql://me:hush@127.0.0.1:1/x"))

    broken = faults(away)

    assert broken
    assert all("Connection refused. Is database.url right?" in each.sentence for each in broken)
    assert "hush" not in repr(list(examine(away)))
    away.store.close()


def test_no_redis(live: Runtime) -> None:
    nobody = redis.Redis(port=1, retry=Retry(NoBackoff(), 0))

    broken = faults(dataclasses.replace(live, redis=nobody))

    assert {each.part for each in broken} == {"redis", "work"}
    assert all(each.sentence.endswith("Connection refused. Is redis.url right?") for each in broken)


def test_another_key(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    stranger = dataclasses.replace(live, vault=Vault([Fernet.generate_key()]))

    assert [each.part for each in faults(stranger)] == ["security"]


def test_no_client_secret(live: Runtime) -> None:
    strava = live.settings.providers["strava"].model_copy(update={"client_secret": SecretStr("")})
    settings = live.settings.model_copy(update={"providers": {"strava": strava}})

    [fault] = faults(dataclasses.replace(live, settings=settings))

    assert fault.sentence.startswith("providers.strava.client_secret is not set")


def test_no_provider(live: Runtime) -> None:
    strava = live.settings.providers["strava"].model_copy(update={"enabled": False})
    settings = live.settings.model_copy(update={"providers": {"strava": strava}})

    [fault] = faults(dataclasses.replace(live, settings=settings))

    assert fault.sentence == "No provider is enabled: set providers.<name>.enabled."


def test_people_who_have_to_sign_in_again(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    change(live, "alice", status="needs_reauth", status_reason="ended", next_sync_at=None)

    assert any("sign in again" in each.sentence for each in found(live, "work"))
    assert not faults(live)


def test_webhooks_that_could_not_be_checked(live: Runtime) -> None:
    here = tuned(live, web={"public_url": "https://life.example"})
    webhooks.note_fault(here, "strava", "Strava refused it (403)")

    [fault] = faults(here)

    assert (fault.part, fault.ok) == ("strava", False)
    assert fault.sentence == (
        "The last check of its webhooks failed: Strava refused it (403). "
        "`lifelogger webhooks subscribe strava` tries again."
    )
    assert not faults(live), "without an address there are none to be had, and none to mend"


@pytest.mark.parametrize(("policy", "told"), [("allkeys-lru", True), ("noeviction", False)])
def test_a_redis_that_evicts(live: Runtime, policy: str, told: bool) -> None:
    live.redis.config_set("maxmemory-policy", policy)
    try:
        assert any("set noeviction" in each.sentence for each in found(live, "redis")) is told
    finally:
        live.redis.config_set("maxmemory-policy", "noeviction")
