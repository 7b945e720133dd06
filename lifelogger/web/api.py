"""What programs read, in the words of `lifelogger.status`. The schema: /api/openapi.json."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import AfterValidator, AwareDatetime
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from lifelogger import client, export, status
from lifelogger.progress import Import
from lifelogger.web.access import EVERYBODY, OneOrAll, needs, needs_too
from lifelogger.web.render import Json
from lifelogger.web.users import (
    Parts,
    Rt,
    Text,
    ask_for_sync,
    end_connection,
    erase_user,
    find,
    find_receipt,
)
from lifelogger.web.waiting import Watch


def utc(instant: datetime) -> datetime:
    """The instant in UTC, which the first and the last day of the calendar may not have."""
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise ValueError("out of range") from None


Instant = Annotated[AwareDatetime, AfterValidator(utc)]
Limit = Annotated[int, Query(ge=1, le=client.MOST)]

MOST_WAIT_SECONDS = 30


def of_watch(request: Request) -> Watch:
    watch: Watch = request.app.state.watch
    return watch


router = APIRouter(default_response_class=Json)


@router.get("/healthz")
def healthz(health: Parts) -> Response:
    """Whether the database and Redis answer; the only thing told without login."""
    failing = health.failing()
    return Json({"ok": False, "failing": failing}, 503) if failing else Json({"ok": True})


@router.get("/api/status", dependencies=[needs("read:status"), EVERYBODY])
def overview(rt: Rt, health: Parts) -> Any:
    """Totals, the last tick, and each provider with its budget and what waits."""
    return Json(status.overview(rt, budgets=health.redis()))


@router.get("/api/users", dependencies=[needs("read:status"), EVERYBODY])
def users(rt: Rt, after: Text = "", search: Text = "", limit: Limit = 50) -> Any:
    """Users by id, those behind `after`, with their connections; `search` is the beginning of an id."""
    return Json(status.users(rt, after=after, limit=limit, search=search))


@router.get("/api/users/{user_id:user}", dependencies=[needs("read:status")])
def user(rt: Rt, user_id: str) -> Any:
    """Everything about one user: connections, streams, what they hold, and their last runs."""
    return Json(find(rt, user_id))


@router.get("/api/users/{user_id:user}/records", dependencies=[needs("read:records")])
def records(
    request: Request,
    rt: Rt,
    user_id: str,
    kind: Text | None = None,
    since: Instant | None = None,
    until: Instant | None = None,
    after: Text = "",
    limit: Limit = 100,
) -> Any:
    """A user's records that started in [since, until), the newest first.

    Where there are older ones, the header `Link` has the address of the next page, `rel="next"`.
    """
    find(rt, user_id)
    page = client.record_page(
        user_id, kind=kind, since=since, until=until, after=after, limit=limit, runtime=rt
    )
    there = request.url.include_query_params(after=page.next).components
    link = {"link": f'<{there.path}?{there.query}>; rel="next"'} if page.next else {}
    return Json(page.records, headers=link)


@router.get(
    "/api/users/{user_id:user}/export",
    dependencies=[needs("export")],
    response_class=Response,
    responses={
        200: {
            "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
            "description": "A ZIP: JSON Lines by kind, a README and a manifest with counts and SHA-256 sums. "
            "One that broke off has no end, and cannot be opened.",
        }
    },
)
def export_user(rt: Rt, user_id: str) -> Any:
    """All that is kept about a user as one archive, for them to take along; no token is in it."""
    find(rt, user_id)
    name = f'attachment; filename="{export.file_name(user_id)}"'
    content = export.archive(rt, user_id)
    return StreamingResponse(content, media_type="application/zip", headers={"content-disposition": name})


@router.get("/api/users/{user_id:user}/latest", dependencies=[needs("read:records")])
def latest(rt: Rt, user_id: str, kind: Text | None = None) -> Any:
    """The latest record of each stream of a user, of one kind or all, the newest first."""
    find(rt, user_id)
    return Json(client.latest(user_id, kind=kind, runtime=rt))


@router.get("/api/users/{user_id:user}/freshness", dependencies=[needs("read:records")])
def freshness(rt: Rt, user_id: str) -> Any:
    """How fresh each stream of a user is: as of when, whether more is on its way, or why it is not read."""
    find(rt, user_id)
    return Json(client.freshness(user_id, runtime=rt))


@router.get(
    "/api/users/{user_id:user}/imports",
    dependencies=[needs("read:records")],
    responses={200: {"model": list[Import]}},
)
def imports(rt: Rt, user_id: str) -> Any:
    """How far each first import of a user is, and how long it still takes; without those that are done."""
    find(rt, user_id)
    return Json([asdict(each) for each in client.imports(user_id, runtime=rt)])


@router.post("/api/users/{user_id:user}/sync", status_code=202, dependencies=[needs("sync")])
def sync(rt: Rt, health: Parts, user_id: str) -> Any:
    """Ask for a sync now: `connections` says how many will look, `at` when, `runs` which syncs it joined.

    A person's wish has a sync begin once a minute. Sooner, it is served when the minute is over.
    """
    wish = ask_for_sync(rt, health, user_id)
    return Json({"connections": wish.connections, "at": wish.at, "runs": wish.runs}, 202)


@router.delete("/api/users/{user_id:user}/connections/{provider}", dependencies=[needs("erase")])
def disconnect(rt: Rt, user_id: str, provider: str) -> Any:
    """End a connection here and at the provider, and delete all that came of it; the answer is a receipt."""
    return Json(end_connection(rt, user_id, provider))


@router.delete("/api/users/{user_id:user}", dependencies=[needs("erase")])
def erase(rt: Rt, user_id: str) -> Any:
    """Erase a user with every connection; the answer is a receipt."""
    return Json(erase_user(rt, user_id))


@router.get("/api/receipts/{number}", dependencies=[needs("erase")])
def receipt(rt: Rt, number: str) -> Any:
    """What went, and whether the providers have revoked it by now; it names nobody."""
    return Json(find_receipt(rt, number))


@router.get("/api/runs", dependencies=[needs("read:status")])
def runs(rt: Rt, user: OneOrAll, before: Annotated[int | None, Query(ge=1)] = None, limit: Limit = 50) -> Any:
    """The journal, newest first, of one user or all; `before` is the id of a run."""
    return Json(status.runs(rt, user_id=user, before=before, limit=limit))


@router.get("/api/changes", dependencies=[needs("read:records")])
async def changes(
    request: Request,
    rt: Rt,
    watch: Annotated[Watch, Depends(of_watch)],
    user: OneOrAll,
    after: Text = "",
    limit: Limit = 100,
    wait: Annotated[float, Query(ge=0, le=MOST_WAIT_SECONDS)] = 0,
    connections: bool = False,
) -> Any:
    """What changed since the cursor `after`, in order, of one user or all; ask again with `next`.

    With `connections` also whose connection has to be signed in again, or was: for keys with `read:status`.

    Nothing is missed. When there is nothing yet, the answer comes as soon as there is, or after `wait`
    seconds. 410: the cursor is unknown, begin without one.
    """
    if connections:
        needs_too(request, "read:status")
    until = time.monotonic() + wait
    while True:
        page = await run_in_threadpool(
            client.changes, after, limit=limit, user_id=user, connections=connections, runtime=rt
        )
        if page.changes or not await watch.passed(int(page.next), until):
            return Json(page._asdict())
        after = page.next
