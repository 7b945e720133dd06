"""What people read: a state is a sentence with a time, and an empty table says what will appear there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from lifelogger import connections, plans, status
from lifelogger.runtime import Runtime
from lifelogger.web.connect import Outcome
from lifelogger.web.health import REDIS_SENTENCE
from lifelogger.web.render import page, segment
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

USERS_EACH = 50
RUNS_EACH = 50
LATEST = 10
REFRESH_SECONDS = 30
REFRESH_SOON_SECONDS = 5

router = APIRouter(include_in_schema=False)


@router.get("/")
def overview(rt: Rt, health: Parts) -> Response:
    """Totals, each provider, the latest runs, and what is in trouble."""
    answers = health.redis()
    everything = status.overview(rt, budgets=answers)
    troubles = [] if answers else [REDIS_SENTENCE]
    if answers and everything["last_tick"] is None:
        troubles.append(
            "No tick has fired yet, so nothing is synced by itself: start the scheduler (`make periodiq`) "
            "and a worker (`make worker`)."
        )
    return page(
        "overview.html",
        **everything,
        troubles=troubles,
        runs=status.runs(rt, limit=LATEST),
        titles=titles(rt),
        refresh=REFRESH_SECONDS,
    )


@router.get("/plan")
def plan(rt: Rt) -> Response:
    """What the next ticks will do, and why."""
    return page("plan.html", **plans.overall(rt), refresh=REFRESH_SECONDS)


@router.get("/users")
def users(rt: Rt, search: Text = "", after: Text = "") -> Response:
    """Users by id, one page of them."""
    found = status.users(rt, after=after, limit=USERS_EACH + 1, search=search)
    return page(
        "users.html",
        now=rt.clock(),
        users=found[:USERS_EACH],
        more=found[USERS_EACH - 1]["user_id"] if len(found) > USERS_EACH else None,
        search=search,
        after=after,
        titles=titles(rt),
    )


@router.post("/users")
def add_user(rt: Rt, user_id: Annotated[str, Form()] = "") -> Response:
    """Add a user, unless there is one of that id, and go to the user's page, which offers to connect."""
    if not connections.may_be_id(user_id):
        raise HTTPException(422, f"A user's id has {connections.ID_RULE}.")
    connections.add_user(rt, user_id)
    return RedirectResponse(f"/users/{segment(user_id)}", 303)


@router.get("/users/{user_id:user}")
def user(
    rt: Rt, user_id: str, asked: Annotated[int | None, Query(ge=0, le=1000)] = None, joined: bool = False
) -> Response:
    """One user: each connection's state, what it holds, and its last syncs."""
    found = find(rt, user_id)
    connected = {each["provider"] for each in found["connections"]}
    return page(
        "user.html",
        **found,
        now=rt.clock(),
        why={each["provider"]: each["why"] for each in plans.of_user(rt, user_id)},
        asked=asked,
        joined=joined,
        titles=titles(rt),
        simulated=rt.settings.simulated,
        missing={each["provider"]: not_granted(rt, each) for each in found["connections"]},
        offered=[name for name in rt.enabled() if name not in connected],
        here=segment(f"/users/{segment(user_id)}"),
        refresh=REFRESH_SOON_SECONDS if asked or is_moving(found, rt.clock()) else REFRESH_SECONDS,
        refresh_to=f"/users/{segment(user_id)}",
    )


def not_granted(rt: Runtime, connection: Mapping[str, Any]) -> list[str]:
    """The scopes of an active connection that are asked for and were not granted."""
    offered = rt.enabled().get(connection["provider"])
    if offered is None or connection["status"] != "active":
        return []
    return [scope for scope in offered.scopes if scope not in connection["scopes"]]


def is_moving(user: Mapping[str, Any], now: datetime) -> bool:
    """Whether a sync runs, or one that somebody waits for is about to."""
    due = any(
        each["news_at"] and each["next_sync_at"] and each["next_sync_at"] <= now
        for each in user["connections"]
    )
    return due or any(run["outcome"] == "running" for run in user["runs"])


def told(request: Request, outcome: Outcome) -> Response:
    """What came of connecting an account, unless all went well."""
    return page("connected.html", outcome.status, **asdict(outcome))


@router.post("/users/{user_id:user}/sync")
def sync(rt: Rt, health: Parts, user_id: str) -> Response:
    """Ask for a sync, and go back to the user's page, which says so."""
    wish = ask_for_sync(rt, health, user_id)
    joined = "&joined=1" if wish.runs else ""
    return RedirectResponse(f"/users/{segment(user_id)}?asked={wish.connections}{joined}", 303)


@router.get("/users/{user_id:user}/leave")
def leave(rt: Rt, user_id: str) -> Response:
    """What would be deleted, and the buttons that do it."""
    return page("leave.html", **find(rt, user_id), titles=titles(rt))


@router.post("/users/{user_id:user}/connections/{provider}/disconnect")
def disconnect(rt: Rt, user_id: str, provider: str) -> Response:
    """End a connection, and go to the receipt."""
    return RedirectResponse(f"/receipts/{end_connection(rt, user_id, provider)['receipt']}", 303)


@router.post("/users/{user_id:user}/erase")
def erase(rt: Rt, user_id: str) -> Response:
    """Erase a user, and go to the receipt."""
    return RedirectResponse(f"/receipts/{erase_user(rt, user_id)['receipt']}", 303)


@router.get("/receipts/{number}")
def receipt(rt: Rt, number: str) -> Response:
    """What went, and whether the providers have revoked it by now."""
    said = find_receipt(rt, number)
    pending = any(each["revocation"] == "pending" for each in said["connections"])
    return page(
        "receipt.html",
        **said,
        now=rt.clock(),
        titles=titles(rt),
        refresh=REFRESH_SECONDS if pending else None,
    )


@router.get("/runs")
def runs(rt: Rt, before: Annotated[int | None, Query(ge=1)] = None) -> Response:
    """The journal."""
    found = status.runs(rt, before=before, limit=RUNS_EACH + 1)
    return page(
        "runs.html",
        now=rt.clock(),
        runs=found[:RUNS_EACH],
        titles=titles(rt),
        more=found[RUNS_EACH - 1]["id"] if len(found) > RUNS_EACH else None,
        before=before,
        refresh=None if before else REFRESH_SECONDS,
    )


def titles(rt: Runtime) -> dict[str, str]:
    """What people call the providers, by name."""
    return {name: provider.title for name, provider in rt.providers.items()}
