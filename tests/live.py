"""What tests of the engine share: people connected, clocks and settings turned, what is stored read back."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from dramatiq import Broker
from sqlalchemy import delete, select, update

from lifelogger import sync
from lifelogger.connections import import_lines
from lifelogger.runtime import Runtime
from lifelogger.sandbox.server import listen, url_of
from lifelogger.store.models import Connection, Quarantined, Record, Stream, SyncRun, User
from lifelogger.web.app import create_app
from tests.sandbox.control import Control
from tests.servers import wait_until

LIST = "GET /athlete/activities"
TOKEN = "POST /oauth/token"
NOON = datetime(2026, 11, 24, 12, 2, tzinfo=UTC)
"""Where the clock of `live` stands at first."""


# People ----------------------------------------------------------------------------------------------


def connect(live: Runtime, sandbox: Control, *people: str, **grant: Any) -> list[dict[str, Any]]:
    """These people connect, for the first time or again; returns the lines that were imported."""
    lines = sandbox.connect(*people, **grant)
    import_lines(live, [json.dumps(line) for line in lines])
    return lines


def truth(sandbox: Control, person: str) -> dict[str, Any]:
    """Every item of a person at the provider, by id."""
    return {str(item["id"]): item for item in sandbox.truth(person)}


def asked(sandbox: Control, person: str | None = None) -> list[dict[str, str]]:
    """The queries of all list requests that were answered, oldest first."""
    filters = {"route": LIST, **({"person": person} if person else {})}
    return [dict(parse_qsl(entry["query"])) for entry in sandbox.ledger(**filters)]


def ticked(live: Runtime, user_id: str) -> list[sync.Run]:
    """What a tick does for one user whom the budgets can serve: what is due is claimed, then synced."""
    now = live.clock()
    due = (Connection.user_id == user_id, Connection.status == "active", Connection.next_sync_at <= now)
    with live.store.write() as db:
        db.execute(
            update(Connection).where(*due).values(claimed_at=now, next_sync_at=now + timedelta(minutes=10))
        )
    return sync.run(user_id, "tick", runtime=live)


# What is stored --------------------------------------------------------------------------------------


def stored(live: Runtime, user_id: str) -> dict[str, Any]:
    """The payload of every record that is there, by external id."""
    return {
        row.external_id: row.raw for row in rows(live, Record.__table__, user_id) if row.deleted_at is None
    }


def quarantined(live: Runtime, user_id: str) -> list[Any]:
    return rows(live, Quarantined.__table__, user_id)


def journal(live: Runtime, user_id: str) -> list[Any]:
    """The sync runs of a user, oldest first."""
    return rows(live, SyncRun.__table__, user_id)


def stream(live: Runtime, user_id: str) -> Any:
    """The row of a user's only stream."""
    (row,) = rows(live, Stream.__table__, user_id)
    return row


def rows(live: Runtime, table: Any, user_id: str) -> list[Any]:
    """What belongs to a user's connections in one table, in the order it was written."""
    mine = select(Connection.id).where(Connection.user_id == user_id)
    with live.store.read() as db:
        return list(db.execute(select(table).where(table.c.connection_id.in_(mine)).order_by(table.c.id)))


def connection(live: Runtime, user_id: str) -> Any:
    """The row of a user's only connection."""
    with live.store.read() as db:
        return db.execute(select(Connection.__table__).where(Connection.user_id == user_id)).one()


def change(live: Runtime, user_id: str, **values: Any) -> None:
    """Write into a user's connections."""
    with live.store.write() as db:
        db.execute(update(Connection).where(Connection.user_id == user_id).values(values))


def wipe(live: Runtime) -> None:
    """Forget everybody, and all that Redis knows."""
    with live.store.write() as db:
        db.execute(delete(User))
    live.redis.flushdb()


def begin_rounds(live: Runtime, user_id: str) -> None:
    """What is older than the look-back is due to be read again, in all streams of a user."""
    mine = select(Connection.id).where(Connection.user_id == user_id)
    with live.store.write() as db:
        db.execute(update(Stream).where(Stream.connection_id.in_(mine)).values(recheck_at=live.clock()))


# Circumstances ---------------------------------------------------------------------------------------


def tuned(live: Runtime, **sections: dict[str, Any]) -> Runtime:
    """The same runtime with other settings: `tuned(live, http={"max_bytes": 1000})`."""
    changed = {
        name: getattr(live.settings, name).model_copy(update=values) for name, values in sections.items()
    }
    return dataclasses.replace(live, settings=live.settings.model_copy(update=changed))


def in_background(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Start work in a thread of its own; `.result(20)` has what became of it."""
    with_one = ThreadPoolExecutor(1)
    future = with_one.submit(work, *args, **kwargs)
    with_one.shutdown(wait=False)
    return future


@contextmanager
def web_server(live: Runtime, broker: Broker) -> Iterator[Runtime]:
    """Our web server in a thread, and a runtime that knows its address."""
    listener = listen()
    rt = tuned(live, web={"public_url": url_of(listener)})
    config = uvicorn.Config(create_app(rt, broker), log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the web server")
    yield rt
    server.should_exit = True
    thread.join()
