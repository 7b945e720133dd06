"""One FastAPI application: the status pages, the API and the dashboard.

    uvicorn --factory lifelogger.web.app:create_app

Endpoints are plain functions, which run in threads, so they may wait for the database.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dramatiq
import redis
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from lifelogger import __version__, api_keys
from lifelogger.client import CursorUnknown, newest_cursor
from lifelogger.runtime import Runtime
from lifelogger.runtime import runtime as processwide
from lifelogger.web import api, connect, login, pages, users, webhooks
from lifelogger.web.access import key_of
from lifelogger.web.health import DATABASE_SENTENCE, DATABASE_TROUBLE, REDIS_SENTENCE, Health
from lifelogger.web.render import Json, explain, is_api, page
from lifelogger.web.waiting import Watch

log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")


def dashboard(broker: dramatiq.Broker, health: Health) -> ASGIApp:
    """Dramatiq's dashboard; where it is not installed, a page that says how it comes there.

    `lifelogger[web]` cannot ask for it: it pins years-old versions of what it works unchanged with.
    """
    if find_spec("dramatiq_dashboard") is None:
        return page(
            "error.html",
            title="No dashboard",
            sentence="It is not installed: pip install --no-deps dramatiq-dashboard==0.4.0",
            signed_in=True,
        )
    from lifelogger.web.dashboard import Dashboard

    return Dashboard(broker, health)


def offer_mcp(app: FastAPI, rt: Runtime) -> None:
    """Serve the assistant's tools at /mcp, where the SDK is installed: the key that the guard found asks."""
    if find_spec("mcp") is None:
        return
    from mcp.server.transport_security import TransportSecuritySettings

    from lifelogger import mcp_server

    def asking(context: Any) -> api_keys.Key | None:
        return key_of(context.request_context.request)

    server = mcp_server.server(rt, asking)
    # Each request for itself: any process may answer the next one. Hosts and origins are the guard's.
    served = server.streamable_http_app(
        streamable_http_path="/mcp",
        stateless_http=True,
        json_response=True,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    app.router.routes.extend(served.routes)
    app.router.lifespan_context = lambda _: server.session_manager.run()


def create_app(runtime: Runtime | None = None, broker: dramatiq.Broker | None = None) -> FastAPI:
    """The application on `runtime` and `broker`, by default those of this process.

    Redis and the database need not answer yet. Raises `SettingsError` when the settings are wrong.
    """
    rt = runtime or processwide()
    if broker is None:
        from lifelogger.broker import broker as processwide_broker

        broker = processwide_broker
    token, _ = login.login_token(rt.settings)
    app = FastAPI(
        title="lifelogger",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.state.runtime = rt
    app.state.health = health = Health(rt)
    app.state.door = door = login.Door(token, rt.clock)
    app.state.watch = Watch(lambda: int(newest_cursor(runtime=rt)))
    app.state.messenger = webhooks.Messenger(broker)
    app.include_router(login.router)
    app.include_router(webhooks.router)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.include_router(
        connect.router(users.chosen, returning=users.anybody, tell=pages.told, runtime=rt), prefix="/connect"
    )
    app.mount("/static", StaticFiles(directory=STATIC))
    app.mount("/dashboard", dashboard(broker, health))
    offer_mcp(app, rt)
    app.add_middleware(
        login.Guard, door=door, web=rt.settings.web, find_key=lambda key: api_keys.find(rt, key)
    )
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(CursorUnknown, cursor_unknown)
    app.add_exception_handler(redis.RedisError, redis_away)
    for error in DATABASE_TROUBLE:
        app.add_exception_handler(error, database_away)
    app.add_exception_handler(Exception, failed)
    return app


# What went wrong -----------------------------------------------------------------------------------


async def refused(request: Request, error: Exception) -> Response:
    """An HTTP error: our own have a sentence, the framework's are told in ours."""
    assert isinstance(error, HTTPException)
    sentence = str(error.detail)
    if sentence == HTTPStatus(error.status_code).phrase:
        sentence = SENTENCES.get(error.status_code, f"{sentence}.")
    return explain(request, error.status_code, sentence, error.headers)


SENTENCES = {
    404: "There is no such page. It may have moved, or the address was cut short.",
    405: "This address does not take that kind of request.",
}


async def unreadable(request: Request, error: Exception) -> Response:
    """Parameters that are none: which, and what is allowed, but never what was sent."""
    assert isinstance(error, RequestValidationError)
    faults: Sequence[Any] = error.errors()
    if is_api(request.scope["path"]):
        return Json({"detail": [{key: each[key] for key in ("loc", "msg", "type")} for each in faults]}, 422)
    return explain(request, 422, "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in faults) + ".")


async def cursor_unknown(request: Request, error: Exception) -> Response:
    return explain(request, 410, str(error))


async def database_away(request: Request, error: Exception) -> Response:
    log.error("%s: the database failed: %s", request.scope["path"], type(error).__name__)
    return explain(request, 503, DATABASE_SENTENCE, {"retry-after": "5"})


async def redis_away(request: Request, error: Exception) -> Response:
    log.error("%s: Redis failed: %s", request.scope["path"], type(error).__name__)
    return explain(request, 503, REDIS_SENTENCE, {"retry-after": "5"})


async def failed(request: Request, error: Exception) -> Response:
    """A fault of ours. It is answered outside the guard, so it takes the headers along."""
    return explain(
        request, 500, "This is our fault, not yours. The log of the web server says more.", login.HEADERS
    )
