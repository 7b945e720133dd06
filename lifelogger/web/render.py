"""How an answer looks: the templates and their filters, JSON, and one way to say what went wrong.

Everything shown may come from a provider or a host application, so it counts as hostile: templates escape,
and JSON is plain ASCII. Relative times are for people; the exact one stands in the title.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, Response

from lifelogger.status import UNITS, as_json, brought, count, moment, span

TITLES = {
    400: "That cannot be read",
    401: "Please log in",
    403: "Not from there",
    404: "Not here",
    405: "Not that way",
    410: "Gone",
    413: "Too much",
    422: "That cannot be read",
    429: "Too many attempts",
    503: "A part does not answer",
}


class Json(JSONResponse):
    """JSON of plain values and times, in ASCII: a lone surrogate in a provider's text is no error."""

    def render(self, content: Any) -> bytes:
        return json.dumps(as_json(content), separators=(",", ":")).encode("ascii")


def page(name: str, status_code: int = 200, **context: Any) -> HTMLResponse:
    """The page of a template. `now` in the context is what relative times relate to."""
    return HTMLResponse(templates.get_template(name).render(context), status_code)


def explain(
    request: HTTPConnection, status_code: int, sentence: str, headers: Mapping[str, str] | None = None
) -> Response:
    """What went wrong, in a sentence: as a page, or as JSON to those who asked the API."""
    response: Response
    if is_api(request.scope["path"]):
        response = Json({"detail": sentence}, status_code)
    else:
        title = TITLES.get(status_code, "Something went wrong")
        response = page("error.html", status_code, title=title, sentence=sentence, signed_in=False)
    response.headers.update(headers or {})
    return response


def is_api(path: str) -> bool:
    """Whether programs ask here, which want JSON and no redirection."""
    return path in ("/api", "/healthz", "/mcp") or path.startswith("/api/")


# Filters -------------------------------------------------------------------------------------------


@pass_context
def ago(context: Context, instant: datetime | None) -> str:
    """A time as people say it: `3 minutes ago`, `in 2 hours`; None is `never`."""
    if instant is None:
        return "never"
    now: datetime = context["now"]
    seconds = (now - instant).total_seconds()
    if abs(seconds) < 1:
        words = "now"
    else:
        words = f"{span(seconds)} ago" if seconds > 0 else f"in {span(-seconds)}"
    return _time(instant, words)


@pass_context
def clock(context: Context, instant: datetime) -> str:
    """A time as `status.moment` writes it, with the exact one in the title."""
    return _time(instant, moment(instant, context["now"]))


def _time(instant: datetime, words: str) -> Markup:
    return Markup('<time datetime="{0}" title="{0}">{1}</time>').format(instant.isoformat(), words)


def per(seconds: int) -> str:
    """The length of a budget's window: `15 minutes`, `day`."""
    for unit, length in UNITS[1:]:
        if seconds % length == 0:
            return unit if seconds == length else count(seconds // length, unit)
    return count(seconds, "second")


def took(run: Mapping[str, Any]) -> str:
    """How long a sync ran: `4 seconds`; while it runs, a dash."""
    return span((run["ended_at"] - run["started_at"]).total_seconds()) if run["ended_at"] else "–"


def segment(text: str) -> str:
    """A text as one segment of a path, whatever is in it."""
    return quote(text, safe="")


def scope(text: str) -> str:
    """A scope as people read it: of one that is an address, what stands behind the last slash."""
    return text.rsplit("/", 1)[-1] if "://" in text else text


templates = Environment(
    loader=PackageLoader("lifelogger.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
templates.filters |= {
    each.__name__: each for each in (ago, brought, clock, count, per, scope, segment, span, took)
}
