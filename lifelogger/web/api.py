"""What programs read, in the words of `lifelogger.status`. The schema: /api/openapi.json."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AfterValidator, AwareDatetime
from starlette.responses import Response

from lifelogger import client, status
from lifelogger.web.render import Json
from lifelogger.web.users import Parts, Rt, Text, ask_for_sync, find


def utc(instant: datetime) -> datetime:
    """The instant in UTC, which the first and the last day of the calendar may not have."""
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise ValueError("out of range") from None


Instant = Annotated[AwareDatetime, AfterValidator(utc)]
Limit = Annotated[int, Query(ge=1, le=client.MOST)]

router = APIRouter(default_response_class=Json)


@router.get("/healthz")
def healthz(health: Parts) -> Response:
    """Whether the database and Redis answer; the only thing told without login."""
    failing = health.failing()
    return Json({"ok": False, "failing": failing}, 503) if failing else Json({"ok": True})


@router.get("/api/status")
def overview(rt: Rt, health: Parts) -> Any:
    """Totals, the last tick, and each provider with its budget and what waits."""
    return Json(status.overview(rt, budgets=health.redis()))


@router.get("/api/users")
def users(rt: Rt, after: Text = "", search: Text = "", limit: Limit = 50) -> Any:
    """Users by id, those behind `after`, with their connections; `search` is the beginning of an id."""
    return Json(status.users(rt, after=after, limit=limit, search=search))


@router.get("/api/users/{user_id:user}")
def user(rt: Rt, user_id: str) -> Any:
    """Everything about one user: connections, streams, what they hold, and their last runs."""
    return Json(find(rt, user_id))


@router.get("/api/users/{user_id:user}/records")
def records(
    rt: Rt,
    user_id: str,
    kind: Text | None = None,
    since: Instant | None = None,
    until: Instant | None = None,
    limit: Limit = 100,
) -> Any:
    """A user's records that started in [since, until), the newest first."""
    find(rt, user_id)
    return Json(client.records(user_id, kind=kind, since=since, until=until, limit=limit, runtime=rt))


@router.post("/api/users/{user_id:user}/sync", status_code=202)
def sync(rt: Rt, health: Parts, user_id: str) -> Any:
    """Ask for a sync now: `connections` says how many will look, `at` when, `runs` which syncs it joined.

    A person's wish has a sync begin once a minute. Sooner, it is served when the minute is over.
    """
    wish = ask_for_sync(rt, health, user_id)
    return Json({"connections": wish.connections, "at": wish.at, "runs": wish.runs}, 202)


@router.get("/api/runs")
def runs(
    rt: Rt, user: Text | None = None, before: Annotated[int | None, Query(ge=1)] = None, limit: Limit = 50
) -> Any:
    """The journal, newest first, of one user or all; `before` is the id of a run."""
    return Json(status.runs(rt, user_id=user, before=before, limit=limit))
