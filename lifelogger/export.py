"""All that is kept about one user, for them to take along: an archive, or plain objects one by one.

    parts ─▶ archive: a ZIP with a file for each part, as a stream of bytes
          └▶ objects: the same, one after the other (`--format jsonl`)

Nothing is held but a batch of rows, and no transaction is open while somebody writes or sends one. So an
export is no snapshot, but says what it has: the rows that were there when it began, each as it was at that
moment or later. What changed since comes from the change feed behind `changes_after` of the manifest. Who
leaves while it is made ends it: an archive without its end cannot be opened, so nobody takes it for whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, Table, func, select

from lifelogger import __version__
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.status import CONNECTION, as_json
from lifelogger.store import feed
from lifelogger.store.models import Connection, Quarantined, Record, Stream, SyncRun, User

BATCH = 200
FORMAT = 1
_HIDDEN = {"id", "connection_id", "digest", "change"}
_TABLES: dict[str, Table] = {
    kind: cast(Table, model.__table__)
    for kind, model in {
        "stream": Stream,
        "record": Record,
        "quarantined": Quarantined,
        "sync_run": SyncRun,
    }.items()
}
"""What hangs on a connection, by the `object` it is exported as."""
_ABOUT = {
    "user.json": "The user.",
    "connections.jsonl": "The accounts that are connected, their state and what was granted; no tokens.",
    "streams.jsonl": "How far each kind of data has been read.",
    "records/": "The records of one kind of data of one provider. `raw` is what the provider sent; what was "
    "deleted there is empty and says when.",
    "quarantine.jsonl": "What the providers sent and could not be understood, with the reason.",
    "journal.jsonl": "Each sync: when, why, what it brought and what it cost.",
}
"""What a file of an archive has, by its name or its folder."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of what is kept, as a file of the archive has it."""

    name: str
    object: str
    """What each of its rows is, where rows of all kinds stand together."""
    rows: Iterator[dict[str, Any]]
    """Plain values, from the store as they are asked for."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What there is when an export begins."""

    at: datetime
    change: int
    """The newest change: all up to it is in the export."""
    user: dict[str, Any]
    connections: list[Any]
    last: dict[str, int]
    """The id of the newest row of each of `_TABLES`."""


def size(rt: Runtime, user_id: str) -> int:
    """How many objects an export has, about. Raises `LifeloggerError` when there is no such user."""
    with rt.store.read() as db:
        if db.scalar(select(User.id).where(User.id == user_id)) is None:
            raise _unknown(user_id)
        connections = select(Connection.id).where(Connection.user_id == user_id)
        counts = [
            db.scalar(select(func.count()).select_from(table).where(table.c.connection_id.in_(connections)))
            for table in _TABLES.values()
        ]
        return (
            1
            + (db.scalar(select(func.count()).select_from(connections.subquery())) or 0)
            + sum(count or 0 for count in counts)
        )


def objects(rt: Runtime, user_id: str) -> Iterator[dict[str, Any]]:
    """All of it, each with what it is in `object`. (Not in `type`: a record has one of its own, as `run`.)

    Raises `LifeloggerError` when there is no such user, or they leave before it is whole.
    """
    begun = _begin(rt, user_id)
    for part in _parts(rt, begun):
        for row in part.rows:
            yield {"object": part.object, **row}
    _still_there(rt, begun)


def archive(
    rt: Runtime, user_id: str, *, told: Callable[[int], object] = lambda count: None
) -> Iterator[bytes]:
    """All of it as the bytes of a ZIP: JSON Lines by kind, a README and a manifest with sums.

    `told` is called with how many objects were written since the last time. Raises as `objects`.
    """
    begun, out, files = _begin(rt, user_id), _Pipe(), list[dict[str, Any]]()
    with zipfile.ZipFile(cast(Any, out), "w", zipfile.ZIP_DEFLATED) as zipped:

        def written(name: str, about: str, lines: Iterator[str]) -> Iterator[bytes]:
            """One file, a batch of lines at a time, and its place in the manifest."""
            total, length, digest = 0, 0, hashlib.sha256()
            with zipped.open(_entry(name, begun.at), "w", force_zip64=True) as file:
                for batch in _batched(lines):
                    text = "".join(batch).encode()
                    file.write(text)
                    digest.update(text)
                    total, length = total + len(batch), length + len(text)
                    yield out.taken()
                    told(len(batch))
            entry = {"name": name, "what": about, "objects": total, "bytes": length}
            files.append({**entry, "sha256": digest.hexdigest()})
            yield out.taken()

        with zipped.open(_entry("README.txt", begun.at), "w") as readme:
            readme.write(_readme(begun).encode())
        for part in _parts(rt, begun):
            about = _ABOUT[part.name.partition("/")[0] + "/" if "/" in part.name else part.name]
            yield from written(part.name, about, (json.dumps(row) + "\n" for row in part.rows))
        manifest = {
            "format": FORMAT,
            "made_by": f"lifelogger {__version__}",
            "made_at": begun.at.isoformat(),
            "user": begun.user["id"],
            "changes_after": str(begun.change),
            "files": files,
        }
        with zipped.open(_entry("manifest.json", begun.at), "w") as file:
            file.write(json.dumps(manifest, indent=1).encode())
        _still_there(rt, begun)  # before its end goes out
    yield out.taken()


def file_name(user_id: str) -> str:
    """What an archive is called: the user's id, with what file systems and headers take."""
    return f"lifelogger-{re.sub(r'[^A-Za-z0-9._-]+', '_', user_id)[:100]}.zip"


def _begin(rt: Runtime, user_id: str) -> Begun:
    with rt.store.read() as db:
        user = db.execute(select(User.__table__).where(User.id == user_id)).one_or_none()
        if user is None:
            raise _unknown(user_id)
        change = feed.newest(db)  # first: what has a number up to it is seen by what follows
        last = {kind: db.scalar(select(func.max(table.c.id))) or 0 for kind, table in _TABLES.items()}
        connections = db.execute(
            select(*CONNECTION).where(Connection.user_id == user_id).order_by(Connection.id)
        ).all()
    return Begun(rt.clock(), change, dict(user._mapping), list(connections), last)


def _unknown(user_id: str) -> LifeloggerError:
    return LifeloggerError(f"There is no user {user_id!r}: `lifelogger user list` shows all")


def _parts(rt: Runtime, begun: Begun) -> Iterator[Part]:
    yield Part("user.json", "user", iter([as_json(begun.user)]))
    yield Part("connections.jsonl", "connection", (_shown(each._mapping) for each in begun.connections))
    yield Part("streams.jsonl", "stream", _of_all(rt, begun, "stream"))
    for connection in begun.connections:
        for name in _streams(rt, connection.id):
            rows = _rows(rt, begun, "record", connection, Record.stream == name)
            yield Part(f"records/{connection.provider}-{name}.jsonl", "record", rows)
    yield Part("quarantine.jsonl", "quarantined", _of_all(rt, begun, "quarantined"))
    yield Part("journal.jsonl", "sync_run", _of_all(rt, begun, "sync_run"))


def _streams(rt: Runtime, connection_id: int) -> list[str]:
    """The streams of which there are records, by name."""
    query = select(Record.stream).where(Record.connection_id == connection_id).distinct()
    with rt.store.read() as db:
        return sorted(db.scalars(query))


def _of_all(rt: Runtime, begun: Begun, kind: str) -> Iterator[dict[str, Any]]:
    for connection in begun.connections:
        yield from _rows(rt, begun, kind, connection)


def _rows(
    rt: Runtime, begun: Begun, kind: str, connection: Any, *which: ColumnElement[bool]
) -> Iterator[dict[str, Any]]:
    """A connection's rows in batches, in the order in which they came."""
    table, last = _TABLES[kind], 0
    while True:
        query = (
            select(table)
            .where(table.c.connection_id == connection.id, table.c.id > last, table.c.id <= begun.last[kind])
            .where(*which)
            .order_by(table.c.id)
            .limit(BATCH)
        )
        with rt.store.read() as db:
            rows = [dict(row._mapping) for row in db.execute(query)]
        for row in rows:
            yield {"provider": connection.provider, **_shown(row)}
        if len(rows) < BATCH:
            return
        last = rows[-1]["id"]


def _shown(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: as_json(value) for name, value in row.items() if name not in _HIDDEN}


def _still_there(rt: Runtime, begun: Begun) -> None:
    """Raise `LifeloggerError` if somebody has left since: what was read last may have been half of it."""
    query = select(Connection.id, Connection.created_at).where(Connection.user_id == begun.user["id"])
    with rt.store.read() as db:
        now = set(map(tuple, db.execute(query)))
        there = db.scalar(select(User.created_at).where(User.id == begun.user["id"]))
    # A number alone is no identity: SQLite gives that of its newest row again when it is gone.
    if there != begun.user["created_at"] or not now.issuperset(
        (each.id, each.created_at) for each in begun.connections
    ):
        raise LifeloggerError("The export is not whole: its user, or an account, was removed meanwhile")


# The archive's form ----------------------------------------------------------------------------------


class _Pipe:
    """What a ZIP is written into: it goes one way, and what came is taken away again and again."""

    def __init__(self) -> None:
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        self._held += data
        return len(data)

    def flush(self) -> None:
        """There is nothing below."""

    def taken(self) -> bytes:
        data = bytes(self._held)
        self._held.clear()
        return data


def _batched(lines: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _entry(name: str, at: datetime) -> zipfile.ZipInfo:
    """A file as it stands in the archive, for nobody else to read once it is unpacked."""
    entry = zipfile.ZipInfo(name, at.timetuple()[:6])
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o600 << 16
    return entry


def _readme(begun: Begun) -> str:
    files = "".join(
        f"{name + '*.jsonl' if name.endswith('/') else name}\n    {about}\n" for name, about in _ABOUT.items()
    )
    return (
        f"All that lifelogger keeps about the user {json.dumps(begun.user['id'])}, as of "
        f"{begun.at:%Y-%m-%d %H:%M:%S} UTC.\n\n"
        f"{files}manifest.json\n"
        "    How many objects each file has, its length and its SHA-256.\n\n"
        "A .jsonl file has a JSON object on each line. Times are ISO 8601 with an offset; the unit of a\n"
        "value is the end of its name: _s seconds, _m metres, _j joules, _kg kilograms, _bpm beats in a\n"
        "minute, _pct per cent. What a provider did not say is null. Rows that came while this was made\n"
        "are not in it; those that were changed meanwhile may be in their newer state.\n"
    )
