"""What an assistant asks about one user, over the Model Context Protocol: read-only tools, one user per key.

Served on standard input and output by `lifelogger mcp`, and at `/mcp` by the web application. It needs the
official SDK, `lifelogger[mcp]`. The tools are thin: what they answer is what `lifelogger.client` says.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import AwareDatetime, Field

from lifelogger import __version__, client
from lifelogger.api_keys import Key
from lifelogger.runtime import Runtime
from lifelogger.status import as_json

INSTRUCTIONS = """\
One person's wearable data, kept fresh in the background: activities, sleep, days and body measurements.
Units stand in the names of the values; instants are UTC, `local_date` is the day where the person was.
A value that is missing was not told by the provider: do not guess it.
Ask `how_fresh` before you say that something did not happen: it may not have been read yet."""

MOST = 200
"""The most records or changes of one answer: a model has to read them."""
NEW_SINCE = timedelta(days=1)
"""How far back `whats_new` looks when it is not told."""

Cursor = Annotated[
    str, Field(max_length=200, description="`next` of the answer before; empty: the first page.")
]
Limit = Annotated[int, Field(ge=1, le=MOST)]
Instant = Annotated[AwareDatetime | None, Field(description="ISO 8601 with an offset.")]
Kind = Annotated[
    str | None, Field(max_length=20, description="`activity`, `sleep`, `day` or `body`; none: all of them.")
]

Page = TypeVar("Page")
Asking = Callable[[Context[Any, Any]], Key | None]
"""Who asks: the key that came with a request, as it is now; None: there is none (any more)."""


def server(rt: Runtime, asking: Asking) -> MCPServer[Any]:
    """The server, for whoever `asking` finds to ask."""
    made: MCPServer[Any] = MCPServer("lifelogger", version=__version__, instructions=INSTRUCTIONS)
    reading = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)

    @made.tool(annotations=reading)
    def whats_new(
        ctx: Context[Any, Any], cursor: Cursor = "", since: Instant = None, limit: Limit = 50
    ) -> dict[str, Any]:
        """What came, changed or was deleted, in order: since a cursor, or a time, or else since yesterday.

        Keep `next` and ask with it as `cursor` later: it then tells only what is new since this answer.
        """
        user_id = user_of(asking(ctx))
        begin = cursor or client.cursor_since(user_id, since or rt.clock() - NEW_SINCE, runtime=rt)
        page = readable(lambda: client.changes(begin, limit=limit, user_id=user_id, runtime=rt))
        told = [{**change, "record": brief(change["record"])} for change in page.changes]
        for each in told:
            del each["reason"]  # of connections, which are not asked for
        return {"changes": as_json(told), "next": page.next}

    @made.tool(annotations=reading)
    def how_fresh(ctx: Context[Any, Any]) -> dict[str, Any]:
        """As of when each kind of data is known, and whether more is on its way.

        `as_of` null: never read. `off_reason`: why a stream is not read at all.
        """
        return {
            "streams": as_json(client.freshness(user_of(asking(ctx)), runtime=rt)),
            "now": as_json(rt.clock()),
        }

    @made.tool(annotations=reading)
    def records(
        ctx: Context[Any, Any],
        since: Instant = None,
        until: Instant = None,
        kind: Kind = None,
        cursor: Cursor = "",
        limit: Limit = 50,
    ) -> dict[str, Any]:
        """The records that started from `since` up to `until`, the newest first.

        `next` null: there are no older ones; else ask for them with it as `cursor`.
        """
        user_id = user_of(asking(ctx))
        page = readable(
            lambda: client.record_page(
                user_id, kind=kind, since=since, until=until, after=cursor, limit=limit, runtime=rt
            )
        )
        return {"records": as_json([brief(record) for record in page.records]), "next": page.next}

    @made.tool(annotations=reading)
    def latest(ctx: Context[Any, Any], kind: Kind = None) -> dict[str, Any]:
        """The latest record of each stream, the newest first."""
        found = client.latest(user_of(asking(ctx)), kind=kind, runtime=rt)
        return {"records": as_json([brief(record) for record in found])}

    return made


def user_of(key: Key | None) -> str:
    """The user that a key is for. Raises `ToolError`."""
    if key is None:
        raise ToolError("An assistant needs an API key, and there is none, or it was removed.")
    if key.user_id is None:
        raise ToolError("This key is for all users. An assistant needs one for a single user.")
    if "read:records" not in key.scopes:
        raise ToolError("This key has not the scope read:records.")
    return key.user_id


def readable(ask: Callable[[], Page]) -> Page:
    """The answer, or what is wrong with the cursor, as the model is told it."""
    try:
        return ask()
    except client.CursorUnknown as error:
        raise ToolError(str(error)) from None


def brief(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """A record without the provider's payload and without what is not known: a model reads every word."""
    if record is None:
        return None
    return {name: value for name, value in record.items() if value is not None and name not in ("raw", "id")}
