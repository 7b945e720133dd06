"""A line between a client and a server that can be cut: nothing comes through, and nobody is told."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

Address = tuple[str, int]


class Line:
    """Passes on what comes to `address`, a port of `host`, to `target`: a socket's path or an address.

    With `tls` it speaks TLS to the client. While it is cut, connections are taken and stay silent, and what
    was sent waits: once it is whole again, it arrives late. So does a network that swallows packets.
    """

    def __init__(self, target: Path | Address, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None):
        self.target, self.host, self.tls = target, host, tls
        self.passed = 0
        """Bytes that clients have sent to the server."""
        self._watched: tuple[bytes, Callable[[], None]] | None = None
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="line", daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._connected, host, 0, ssl=tls)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def whole(self) -> bool:
        return self._whole.is_set()

    def cut(self) -> None:
        """From now on nothing comes through, in either direction."""
        self._call(self._whole.clear)

    def mend(self) -> None:
        """What waited arrives, and the line is as before."""
        self._call(self._whole.set)

    def when(self, sent: bytes, action: Callable[[], None]) -> None:
        """Do `action` once, just before a client's message that has `sent` in it reaches the server."""
        self._watched = sent, action

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for each in asyncio.all_tasks() - {asyncio.current_task()}:
                each.cancel()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._call(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, function: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            function()
        else:
            self._loop.call_soon_threadsafe(function)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            if isinstance(self.target, Path):
                answers, asks = await asyncio.open_unix_connection(self.target)
            else:
                answers, asks = await asyncio.open_connection(*self.target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, asks, True), self._pass(answers, writer, False))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, asks: bool) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._whole.wait()
                if asks:
                    self.passed += len(data)
                    if self._watched and self._watched[0] in data:
                        (_, action), self._watched = self._watched, None
                        action()  # before the server has it, so that its answer finds the line cut
                sink.write(data)
                await sink.drain()
            await self._whole.wait()
        except OSError:  # an end is gone: so is the other
            pass
        finally:
            sink.close()
