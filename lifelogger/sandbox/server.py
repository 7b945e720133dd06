"""Running the sandbox: in this process until it is told to end, or in a thread for tests."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lifelogger.sandbox.app import App
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.provider import Provider
from lifelogger.sandbox.world import World

HOST = "127.0.0.1"
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


class _Protocol(H11Protocol):
    """HTTP/1.1 that shows its connection to the application, which cuts it on purpose."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class _Server(uvicorn.Server):
    """Ends at once and in order, whatever is held open, and leaves the exit status to its caller."""

    def __init__(self, app: App) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,
            )
        )
        self.app = app
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.ending.set()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True


def listen(host: str = HOST, port: int = 0) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError when that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off, which costs 40 ms a reply.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(world: World, listener: socket.socket) -> None:
    """Answer until SIGTERM or SIGINT comes."""
    _Server(App(world)).run(sockets=[listener])


class Sandbox:
    """The sandbox in a thread, on a free port.

    `with Sandbox(people=3, seed=1, history_days=30, clock=clock) as sandbox: sandbox.url`. Its world is
    the thread's: ask it through the control API. `providers` are those of the world.
    """

    def __init__(
        self,
        people: int = 3,
        seed: int = 1,
        history_days: int = 30,
        clock: Clock | None = None,
        state: Path | None = None,
        host: str = HOST,
        port: int = 0,
        providers: Sequence[type[Provider]] | None = None,
    ) -> None:
        self._world = World(people, seed, history_days, state, clock, providers)
        try:
            self._listener = listen(host, port)
        except OSError:
            self._world.close()
            raise
        self.url = url_of(self._listener)
        self._server = _Server(App(self._world))
        self._thread = threading.Thread(target=self._run, name="sandbox", daemon=True)

    def __enter__(self) -> Sandbox:
        self._thread.start()
        self._server.ready.wait()
        if not self._server.started:
            raise RuntimeError("the sandbox did not start; its thread told why")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._world.close()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._server.ready.set()  # whoever waits for a server that failed to start shall not wait on
