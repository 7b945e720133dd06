"""The way of a request through the sandbox.

    request ─▶ provider and route ─▶ ledger begins ─▶ counted ─▶ held ─▶ fault ─▶ answered ─▶ ledger ends

Control requests go their own way: they are neither counted nor written down.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from email.utils import formatdate
from urllib.parse import parse_qs, parse_qsl

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from lifelogger.sandbox import hooks
from lifelogger.sandbox.calls import Call, Reply, compact
from lifelogger.sandbox.control import control_app
from lifelogger.sandbox.faults import UNSET, Asked, Fault
from lifelogger.sandbox.ledger import Entry, masked
from lifelogger.sandbox.provider import Provider
from lifelogger.sandbox.world import World

CHUNK = b"x" * 65_536


class Gone(Exception):
    """Nobody waits for the reply any more: the client left, or the sandbox ends."""


class App:
    """The sandbox as an ASGI application. `scope["state"]["transport"]` is the connection, to cut it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.control = control_app(world)
        self.ending = asyncio.Event()
        self.postman: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the sandbox speaks HTTP, not {scope['type']}")
        if self.postman is None:
            self.postman = asyncio.create_task(hooks.run(self.world.providers))
        elif self.postman.done():
            self.postman.result()  # it failed: whoever asks next shall know
        first, _, rest = scope["path"].lstrip("/").partition("/")
        provider = self.world.providers.get(first)
        if provider:
            await self._provide(provider, f"/{rest}", scope, receive, send)
        elif first == "control":
            await self.control(scope, receive, send)
        elif scope["path"] == "/":
            names = ", ".join(provider.title for provider in self.world.providers.values())
            text = f"The lifelogger sandbox. Simulated here: {names}. Control: /control/health\n"
            await PlainTextResponse(text)(scope, receive, send)
        else:
            await PlainTextResponse("There is nothing here.\n", 404)(scope, receive, send)

    def ask(self, scope: Scope, body: bytes = b"") -> tuple[Reply, dict[str, str]]:
        """Answer one request to a provider at once, without a wire: for simulations on a fast clock.

        It is counted and written down like any other. Faults and holds are of the wire, and so is a reply for
        which the sandbox has to call somebody: that raises `RuntimeError`. Returns the reply and its headers.
        """
        name, _, rest = scope["path"].lstrip("/").partition("/")
        provider = self.world.providers[name]
        call = self._call(provider, f"/{rest}", scope, body, time.time())
        self.world.ledger.begin(call.entry)
        with self.world.state:
            provider.count(call)
            reply = provider.answer(call)
            call.entry.status, call.entry.usage = reply.status, provider.usage_note(call)
            self.world.ledger.end(call.entry, time.time())
        if reply.later:
            raise RuntimeError(f"{call.method} {call.path} needs a wire")
        return reply, {**heads(self.world, provider, call, reply), **reply.headers}

    async def _provide(
        self, provider: Provider, path: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        started = time.time()
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            body = b""  # it left in mid-request; it is written down, and what follows notices
        call = self._call(provider, path, scope, body, started)
        exchange = Exchange(self.world, provider, call, self.ending, scope, receive, send)
        self.world.ledger.begin(call.entry)
        try:
            await exchange.run()
        except Gone:
            if not self.ending.is_set():
                call.entry.status = 0
            await exchange.cut()
        except Exception as error:
            call.entry.status, call.entry.note = 500, f"the sandbox failed: {error!r}"
            raise
        finally:
            with self.world.state:
                self.world.ledger.end(call.entry, time.time())

    def _call(self, provider: Provider, path: str, scope: Scope, body: bytes, started: float) -> Call:
        method = scope["method"]
        route, params = provider.find_route(method, path)
        query = scope["query_string"].decode("latin-1")
        now = self.world.clock.now()
        entry = Entry(
            id=0,
            provider=provider.name,
            client=None,
            person=None,
            kind="",
            route=route.label if route else "",
            method=method,
            path=path,
            query=masked(parse_qsl(query, keep_blank_values=True)) if query else "",
            status=0,
            at=now,
            started=started,
            ended=started,
        )
        call = Call(
            entry=entry,
            method=method,
            path=path,
            headers={name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
            query=parse_qs(query, keep_blank_values=True) if query else {},
            form=dict(parse_qsl(body.decode("latin-1"), keep_blank_values=True)) if body else {},
            now=now,
            body=body,
            route=route,
            params=params,
        )
        entry.kind = provider.kind(call)
        provider.identify(call)
        return call


def heads(world: World, provider: Provider, call: Call, reply: Reply) -> dict[str, str]:
    """The headers that every reply has; its own come beside them."""
    return {
        "Content-Type": reply.content_type,
        "Date": formatdate(world.clock.now(), usegmt=True),
        **provider.headers(call),
    }


class Exchange:
    """One request and its reply, on one connection."""

    def __init__(
        self,
        world: World,
        provider: Provider,
        call: Call,
        ending: asyncio.Event,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self.world = world
        self.provider = provider
        self.call = call
        self.ending = ending
        self.scope = scope
        self.receive = receive
        self.send = send

    async def run(self) -> None:
        """Raises `Gone` when nobody waits for the reply any more."""
        call, entry = self.call, self.call.entry
        asked = Asked(
            self.provider.name,
            entry.route,
            f"{call.method} {call.path.removeprefix(self.provider.base)}",
            entry.person,
        )
        fault = self.world.faults.fault(asked) if self.world.faults.faults else None
        hold = self.world.faults.hold(asked) if self.world.faults.holds else None
        if fault is None or fault.count:
            with self.world.state:
                self.provider.count(call)
        if hold:
            await self._wait(hold.released.wait())
        if fault is None:
            reply = self._answer()
            if reply.later:
                reply = await reply.later()
            entry.status = reply.status
            await self._start(reply, length=len(reply.body))
            await self._body(reply.body)
        else:
            await self._break(fault)

    async def cut(self) -> None:
        """End the connection, after what was sent."""
        self.scope["state"]["transport"].close()
        await self._left()

    def _answer(self) -> Reply:
        with self.world.state:
            reply = self.provider.answer(self.call)
        self.call.entry.usage = self.provider.usage_note(self.call)
        return reply

    async def _break(self, fault: Fault) -> None:
        call, entry = self.call, self.call.entry
        if fault.delay:
            await self._wait(asyncio.sleep(fault.delay))
        call.endless = fault.endless
        reply = self._false_answer(fault) if fault.replaces else self._answer()
        if fault.cut in ("before", "after"):
            await self.cut()
            return
        entry.status = reply.status
        removed = set()
        for name, value in (fault.headers or {}).items():
            if value is None:
                removed.add(name.lower())
            else:
                reply.headers[name] = value
        if fault.size is not None:
            await self._start(reply, length=None, removed=removed)
            await self._fill(fault.size)
            return
        await self._start(reply, length=len(reply.body), removed=removed)
        if fault.cut == "middle":
            await self._body(reply.body[: len(reply.body) // 2], more=True)
            await self.cut()
        elif fault.trickle:
            for position in range(len(reply.body)):
                await self._body(reply.body[position : position + 1], more=True)
                await self._wait(asyncio.sleep(fault.trickle))
            await self._body(b"")
        else:
            await self._body(reply.body)

    def _false_answer(self, fault: Fault) -> Reply:
        """What a fault says in place of the provider."""
        status = fault.status or (302 if fault.redirect is not None else 200)
        self.call.entry.usage = self.provider.usage_note(self.call)
        if status in (204, 304):
            return Reply(status)
        if fault.redirect is not None:
            return Reply(status, headers={"Location": fault.redirect})
        if fault.body is not None:
            return Reply(status, fault.body.encode())
        if fault.json is not UNSET:
            return Reply(status, compact(fault.json))
        return Reply(status) if fault.size is not None else self.provider.failure(status)

    async def _start(self, reply: Reply, length: int | None, removed: set[str] | None = None) -> None:
        """Status line and headers; without a length the body comes in chunks."""
        headers = heads(self.world, self.provider, self.call, reply)
        if length is not None:
            headers["Content-Length"] = str(length)
        for name, value in reply.headers.items():
            # A header that a fault sets takes the place of ours, however it is written.
            for ours in [ours for ours in headers if ours.lower() == name.lower()]:
                del headers[ours]
            headers[name] = value
        raw = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in headers.items()
            if not removed or name.lower() not in removed
        ]
        await self.send({"type": "http.response.start", "status": reply.status, "headers": raw})

    async def _body(self, data: bytes, more: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def _fill(self, size: int) -> None:
        """A list of one string, `size` bytes in all, as long as somebody takes them."""
        left = max(0, size - 4)
        await self._body(b'["', more=True)
        while left > 0:
            await self._wait(self._body(CHUNK[:left], more=True))
            left -= len(CHUNK)
        await self._body(b'"]')

    async def _left(self) -> None:
        """Return when the client has left."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _wait(self, waiting: Coroutine[object, object, object]) -> None:
        """Wait for something. Raises `Gone` when there is nobody left to wait for it."""
        wanted = asyncio.ensure_future(waiting)
        others = [asyncio.ensure_future(self._left()), asyncio.ensure_future(self.ending.wait())]
        try:
            await asyncio.wait([wanted, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (wanted, *others):
                task.cancel()
        if not wanted.done() or wanted.cancelled():
            raise Gone
        wanted.result()
