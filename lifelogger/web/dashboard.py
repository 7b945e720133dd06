"""Dramatiq's dashboard, mounted behind our login.

dramatiq-dashboard 0.4.0 is a small WSGI application whose habits are mended here: its worker list runs
`KEYS` over the whole Redis, "requeue" deletes before it enqueues, its CSRF cookie has no SameSite and goes
unescaped into the page, what it does not expect (`?cursor=abc`) is an exception, and it knows only the queues
declared in its own process. It gets neither our cookie nor a token; its messages hold user ids only.
"""

from __future__ import annotations

import io
import logging
import re
from base64 import b64encode
from datetime import datetime
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

import dramatiq
from anyio.to_thread import run_sync
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import dq_name, q_name
from dramatiq_dashboard import DashboardApp
from dramatiq_dashboard.application import tab_from_q_name
from dramatiq_dashboard.csrf import csrf_protect
from dramatiq_dashboard.http import HTTP_405, HTTP_410, handler, redirect
from dramatiq_dashboard.interface import Queue, RedisInterface, Worker
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lifelogger.web.health import REDIS_SENTENCE, Health
from lifelogger.web.login import POLICY
from lifelogger.web.render import page

log = logging.getLogger(__name__)

PREFIX = "/dashboard"
QUEUES = frozenset({"default", "now", "schedule", "notify"})
"""The queues of our actors, which this process does not import."""
HEAD = b"<head>"
VIEWPORT = b'<meta name="viewport" content="width=device-width, initial-scale=1">'
NAVIGATION = b'<ul class="nav__items">'
WAY_BACK = b'<li class="nav__items__item"><a href="/">lifelogger</a></li>'
CSRF_COOKIE = "__dd_csrf"
SENTENCES = {
    403: "This form is too old. Go back, reload the page, and try again.",
    404: "The dashboard has no such page.",
    405: "This address does not take that kind of request.",
    410: "That message is gone: a worker took it, or somebody deleted it.",
}


class Dashboard:
    """The dashboard as an ASGI application; its errors are sentences, like ours."""

    def __init__(self, broker: dramatiq.Broker, health: Health) -> None:
        self._health = health
        self._app = Mended(broker) if isinstance(broker, RedisBroker) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()  # the guard has limited it
        response = await run_sync(self.answer, request, body)
        await response(scope, receive, send)

    def answer(self, request: Request, body: bytes) -> Response:
        """The dashboard's reply. Raises `HTTPException` with a sentence for whatever goes wrong."""
        if self._app is None:
            return page(
                "error.html",
                title="No dashboard",
                sentence="Messages stay in this process (LIFELOGGER_BROKER=stub): no queues to show.",
                signed_in=True,
            )
        if not self._health.redis():
            raise HTTPException(503, REDIS_SENTENCE)
        started: list[tuple[int, list[tuple[str, str]]]] = []
        environ = environment(request, body)
        try:
            reply = self._app(environ, lambda status, headers: started.append((int(status[:3]), headers)))
            content = b"".join(reply or ())
        except (KeyError, ValueError):  # a parameter is missing, or no number
            raise HTTPException(400, "The dashboard cannot read that address or form.") from None
        except Exception:
            log.exception("the dashboard failed on %s", environ["PATH_INFO"])
            raise HTTPException(500, "The dashboard failed. The log of the web server says why.") from None
        status, headers = started[0] if started else (404, [])
        if status >= 400:
            raise HTTPException(status, SENTENCES.get(status, "The dashboard refused that."))
        content = content.replace(HEAD, HEAD + VIEWPORT, 1).replace(NAVIGATION, NAVIGATION + WAY_BACK, 1)
        response = Response(content, status)
        for name, value in headers:
            if name.lower() == "set-cookie":
                value = value.replace("Path=/", f"Path={PREFIX}; SameSite=Lax")
                value += "; Secure" if request.url.scheme == "https" else ""
            response.headers.append(name, value)
        response.headers["content-security-policy"] = self._app.policy
        return response


class Interface(RedisInterface):  # type: ignore[misc]  # the dashboard has no types
    """What the dashboard asks Redis."""

    @property
    def names(self) -> list[str]:
        return sorted(QUEUES | set(self.broker.queues))

    @property
    def queues(self) -> list[Queue]:
        return [self.get_queue(name) for name in self.names]

    @property
    def workers(self) -> list[Worker]:
        """The workers that were heard of, with what they have in hand; its keys are known without KEYS."""
        client = self.broker.client
        beats = client.zrange(self.qualify("__heartbeats__"), 0, -1, withscores=True)
        queues = [each for name in self.names for each in (name, dq_name(name))]
        found = []
        for name, milliseconds in sorted((each.decode(), beat) for each, beat in beats):
            with client.pipeline(transaction=False) as pipeline:
                for queue in queues:
                    pipeline.scard(self.qualify(f"__acks__.{name}.{queue}"))
                in_hand = sum(pipeline.execute())
            # Without an offset, in UTC: what the dashboard's own filters take.
            seen = datetime.utcfromtimestamp(milliseconds / 1000)  # noqa: DTZ004
            found.append(Worker(name, seen, in_hand))
        return found


class Mended(DashboardApp):  # type: ignore[misc]  # the dashboard has no types
    """The dashboard's own application, on our interface."""

    def __init__(self, broker: RedisBroker) -> None:
        super().__init__(broker, PREFIX)
        self.iface = Interface(broker)
        source = self.templates.loader.get_source(self.templates, "_base.html")[0]
        styles = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
        hashes = [f"'sha256-{b64encode(sha256(each.encode()).digest()).decode()}'" for each in styles]
        self.policy = f"{POLICY}; style-src {' '.join(hashes)}"
        """It has one style sheet in its pages, no script, and loads nothing."""

    @handler  # type: ignore[untyped-decorator]
    @csrf_protect  # type: ignore[untyped-decorator]
    def requeue_message(self, req: Any) -> Any:
        """Enqueue a failed message again, then delete it: cut short, it runs twice rather than never."""
        if req.method != "POST":
            return HTTP_405, ""
        queue, message_id = req.post_data["queue"], req.post_data["id"]
        job = self.iface.get_job(queue, message_id)
        if not job:
            return HTTP_410, ""
        options = {"eta": job.message_timestamp, "retries": 0}
        copy = self.broker.enqueue(job.message.copy(queue_name=q_name(queue), options=options))
        self.iface.delete_message(queue, message_id)
        where = q_name(queue), tab_from_q_name(q_name(queue)), copy.options["redis_message_id"]
        return redirect(self.make_uri("queues", *where))


def environment(request: Request, body: bytes) -> dict[str, Any]:
    """The part of a WSGI environment that the dashboard reads.

    Of the cookies only its own, and only if it looks like one: it goes unescaped into the page.
    """
    token = request.cookies.get(CSRF_COOKIE, "")
    return {
        "REQUEST_METHOD": request.method,
        "PATH_INFO": unquote(request.scope["path"].removeprefix(request.scope["root_path"])),
        "QUERY_STRING": request.url.query,
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_COOKIE": f"{CSRF_COOKIE}={token}" if re.fullmatch("[0-9a-f]{64}", token) else "",
        "wsgi.input": io.BytesIO(body),
    }
