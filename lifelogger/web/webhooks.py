"""Where providers call: written down, answered, and only then told to a worker.

`/webhooks/{provider}`, and for each further application `/webhooks/{provider}/{application}`.
"""

from __future__ import annotations

import logging
import queue
import threading

import dramatiq
from dramatiq.errors import BrokerError
from fastapi import APIRouter, Request
from redis import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from lifelogger import client, webhooks
from lifelogger.errors import Forged
from lifelogger.providers.base import Call
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN, path_of
from lifelogger.web.render import Json

log = logging.getLogger(__name__)

MOST_WAITING = 1000
"""Messages that wait for Redis at most; what is beyond is met by the next tick, as it is written down."""


class Messenger:
    """Sends messages in a thread of its own: a Redis that does not answer must not keep a reply waiting.

    Redis is patient with us for seconds, and a provider that waits as long tries again, or gives us up.
    """

    def __init__(self, broker: dramatiq.Broker) -> None:
        self.broker = broker
        self._waiting: queue.Queue[str] = queue.Queue(MOST_WAITING)
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def tell(self, user_id: str) -> None:
        """Have this user synced soon; returns at once."""
        try:
            self._waiting.put_nowait(user_id)
        except queue.Full:
            log.warning("a message is not sent: too many wait for Redis; the next tick serves it")
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="messenger", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Wait until all that was told is sent, or was tried."""
        self._waiting.join()

    def _run(self) -> None:
        while True:
            user_id = self._waiting.get()
            try:
                self.broker.enqueue(client.urgent(user_id, "news"))
            except (RedisError, BrokerError) as trouble:
                log.warning("a message is not sent: %s; the next tick serves it", type(trouble).__name__)
            except Exception:  # the thread must live: without it no news would be told any more
                log.exception("a message is not sent; the next tick serves it")
            finally:
                self._waiting.task_done()


router = APIRouter(include_in_schema=False)


@router.api_route("/webhooks/{name}", methods=["GET", "POST"])
@router.api_route("/webhooks/{name}/{application}", methods=["GET", "POST"])
async def receive(request: Request, name: str) -> Response:
    """What a provider calls. The body is read as it came: signatures are of its bytes."""
    # As a parameter with a default it would be one of the query, too.
    application = request.path_params.get("application", MAIN)
    call = Call(
        method=request.method,
        headers={key.lower(): value for key, value in request.headers.items()},
        query=dict(request.query_params),
        body=await request.body(),
    )
    return await run_in_threadpool(answer, request, name, application, call)


def answer(request: Request, name: str, application: str, call: Call) -> Response:
    rt: Runtime = request.app.state.runtime
    messenger: Messenger = request.app.state.messenger
    try:
        heard, users = webhooks.hear(rt, name, call, application)
    except webhooks.NoWebhooks:
        return Json({"detail": "There are no such webhooks."}, 404)
    except Forged as refused:
        log.info("a webhook of %s was refused: %s", path_of(name[:50], application[:50]), refused)
        return Json({"detail": "Refused."}, 401)
    for user_id in users:
        messenger.tell(user_id)
    return Response(status_code=204) if heard.status == 204 else Json(heard.reply or {}, heard.status)
