"""What the pages and the API share: user ids in addresses, asking for a sync, and leaving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import unquote

from dramatiq.errors import BrokerConnectionError
from fastapi import Depends, Query, Request
from redis import RedisError
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

from lifelogger import client, connections, leaving, status
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.web.health import Health
from lifelogger.web.render import segment


class UserId(Convertor[str]):
    """Any user id as one segment of the path, percent-encoded: `a%2Fb` is the user `a/b`."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return segment(value)


register_url_convertor("user", UserId())


def of_runtime(request: Request) -> Runtime:
    rt: Runtime = request.app.state.runtime
    return rt


def of_health(request: Request) -> Health:
    health: Health = request.app.state.health
    return health


Rt = Annotated[Runtime, Depends(of_runtime)]
Parts = Annotated[Health, Depends(of_health)]
Text = Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")]
"""A text that a database takes: PostgreSQL has no NUL."""


def find(rt: Runtime, user_id: str) -> dict[str, Any]:
    """`status.user`, or the answer that there is none."""
    found = None if "\0" in user_id else status.user(rt, user_id)
    if found is None:
        raise HTTPException(404, "There is no such user.")
    return found


def chosen(rt: Rt, user: Text) -> str:
    """Whose account is connected: whoever is logged in here looks after everybody."""
    return str(find(rt, user)["user_id"])


def anybody() -> None:
    """Who comes back is known by the browser alone: the session is not any user's."""


def ask_for_sync(rt: Runtime, health: Health, user_id: str) -> connections.Wish:
    """Ask for a sync as its person does: once a minute.

    When Redis is away that is an answer of its own: nobody is told now, but the wish is written down.
    """
    find(rt, user_id)
    try:
        if health.redis():
            return client.sync_now(user_id, runtime=rt)
        connections.note_wish(rt, user_id)  # at once, where a broker would try for seconds
    except (RedisError, BrokerConnectionError):
        pass  # the wish was written down before the message was sent
    raise HTTPException(
        503,
        "Redis does not answer, so no worker could be told. The wish is written down: "
        "the first tick after Redis is back serves it.",
    )


def end_connection(rt: Runtime, user_id: str, provider: str) -> dict[str, Any]:
    """`leaving.disconnect`, or the answer that there is nothing to disconnect."""
    found = find(rt, user_id)
    if provider not in (each["provider"] for each in found["connections"]):
        raise HTTPException(404, "The user has no such connection.")
    return _gone_meanwhile(leaving.disconnect, rt, user_id, provider)


def erase_user(rt: Runtime, user_id: str) -> dict[str, Any]:
    """`leaving.erase`, or the answer that there is no such user."""
    find(rt, user_id)
    return _gone_meanwhile(leaving.erase, rt, user_id)


def _gone_meanwhile(leave: Callable[..., dict[str, Any]], rt: Runtime, *which: str) -> dict[str, Any]:
    try:
        return leave(rt, *which)
    except LifeloggerError:
        raise HTTPException(404, "It is gone already.") from None


def find_receipt(rt: Runtime, number: str) -> dict[str, Any]:
    """`leaving.receipt`, or the answer that there is none."""
    found = None if "\0" in number else leaving.receipt(rt, number)
    if found is None:
        raise HTTPException(404, "There is no such receipt.")
    return found
