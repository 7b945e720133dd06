"""The example back end, on the settings of its process, with a worker of the same broker."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import dramatiq
import pytest
from starlette.testclient import TestClient

import lifelogger.broker
import lifelogger.runtime
from lifelogger.runtime import Runtime
from tests.web.people import connect, recorded

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_backend.py"


@pytest.fixture
def backend(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The example as uvicorn loads it; it makes its own runtime and broker from the settings."""
    monkeypatch.setenv("BACKEND_TOKEN", "mine")
    monkeypatch.delitem(vars(lifelogger.broker), "broker", raising=False)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    lifelogger.runtime.runtime.cache_clear()
    spec = importlib.util.spec_from_file_location("fastapi_backend", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield TestClient(module.app, headers={"authorization": "Bearer mine"})
    lifelogger.runtime.runtime().close()
    lifelogger.runtime.runtime.cache_clear()
    vars(lifelogger.broker).pop("broker", None)


def test_it_reads_the_runs_of_the_week(backend: TestClient, runtime: Runtime) -> None:
    connection = connect(runtime, "ann")
    recorded(runtime, connection, "1", title="Morning", distance_m=5000.0)
    recorded(runtime, connection, "2", type="ride")
    recorded(runtime, connection, "3", ordered_at=runtime.clock() - timedelta(days=8))
    (run,) = backend.get("/users/ann/runs-of-the-week").json()
    assert (run["title"], run["distance_m"], run["moving_s"]) == ("Morning", 5000.0, None)


def test_it_asks_a_worker_that_runs_beside_it(backend: TestClient, runtime: Runtime) -> None:
    connect(runtime, "ann")
    assert backend.post("/users/ann/sync").json()["connections"] == 1
    broker, seen = lifelogger.broker.broker, []

    @dramatiq.actor(broker=broker, queue_name="now")
    def sync_user_now(user_id: str, trigger: str = "asked") -> None:
        seen.append((user_id, trigger))

    worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=50)
    worker.start()
    try:
        broker.join("now")
        worker.join()
    finally:
        worker.stop()
    assert seen == [("ann", "asked")]


@pytest.mark.parametrize("headers", [{"authorization": ""}, {"authorization": "Bearer other"}])
def test_it_shows_nothing_to_strangers(
    backend: TestClient, runtime: Runtime, headers: dict[str, str]
) -> None:
    connect(runtime, "ann")
    assert backend.get("/users/ann/runs-of-the-week", headers=headers).status_code in (401, 403)
    assert backend.post("/users/ann/sync", headers=headers).status_code in (401, 403)


def test_it_never_imports_the_actors(request: pytest.FixtureRequest) -> None:
    source: Callable[[], str] = EXAMPLE.read_text
    assert "import actors" not in source()
    assert "from actors" not in source()


def test_it_sends_whoever_is_signed_in_to_a_provider(backend: TestClient) -> None:
    there = TestClient(backend.app, base_url="http://127.0.0.1:8001", follow_redirects=False)

    assert there.get("/accounts/strava").status_code == 401
    assert there.get("/accounts/strava", auth=("ann", "other")).status_code == 401
    address = there.get("/accounts/strava", auth=("ann", "mine")).headers["location"]
    assert "redirect_uri=http%3A%2F%2F127.0.0.1%3A8001%2Faccounts%2Fcallback" in address
