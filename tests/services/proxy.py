"""A proxy between an S3 client and a server that makes the network as bad as it is told to.

    python -m tests.services.proxy --upstream http://127.0.0.1:9000 --log requests.jsonl --seed 1

It prints one JSON line with the two ports it chose (``proxy``, ``control``) and ends when its
standard input does, so it never outlives whoever started it. ``PUT /faults`` on the control port
takes the fields of ``Faults``, ``GET /counts`` answers how many requests and faults there were.

The Host header and the raw path go through untouched, since a signature covers both. Bodies stream.
Each request makes two lines of the log: ``begin`` when its head arrived, ``end`` with its outcome.
``status`` is what the client was sent, None where it was sent no whole answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from tests.services.faults import NONE, Asked, Chooser, Faults, ask, first, flipped

_BUFFER = 4 << 20
_HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization",
    "te", "trailer", "transfer-encoding", "upgrade", "expect",
})  # fmt: skip
_REFUSALS = {"slow_down": (503, "SlowDown"), "throttle": (429, "TooManyRequests")}


class ResetWantedError(Exception):
    """The connection to the client is to be reset now."""


class Relay:
    """Passes requests on to one server, with faults."""

    def __init__(self, upstream: str, log: IO[str], chooser: Chooser) -> None:
        self._upstream, self._log, self.chooser = upstream.rstrip("/"), log, chooser
        self.requests = 0
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Get ready; needs a running loop.

        No connection to the server is used twice: one that it closes while it is idle would look
        like a fault that nobody injected.
        """
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_BUFFER,
        )

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request of the client's."""
        self.requests += 1
        line = {"request": self.requests, "method": request.method, "path": request.raw_path}
        self._write(line, "begin")
        asked = ask(
            request.method,
            request.raw_path,
            request.content_length,
            request.headers.get("Content-Encoding", ""),
        )
        told: dict[str, Any] = {"status": None, "fault": None}
        try:
            return await self._serve(request, asked, told)
        except ResetWantedError:
            _reset(request)
        except (aiohttp.ClientError, ConnectionError) as error:
            # The client went away, or the server did: neither can be told apart here, or mended.
            told["error"] = f"{type(error).__name__}: {error}"
            _reset(request)
        finally:
            self._write(line | told, "end")
        return web.Response(status=502)  # the connection is gone: nobody will read it

    async def _serve(
        self, request: web.BaseRequest, asked: Asked, told: dict[str, Any]
    ) -> web.StreamResponse:
        faults, chance = self.chooser.faults, self.chooser.random
        fault = self.chooser.choose(asked)
        if faults.latency_s:
            await asyncio.sleep(chance.uniform(0, 2 * faults.latency_s))
        if fault in ("slow_down", "throttle", "reset_before", "stall"):
            self._note(fault, told)
        if fault == "reset_before":
            raise ResetWantedError
        if fault == "stall":
            await asyncio.sleep(faults.stall_s)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        if fault in _REFUSALS:
            return await self._refuse(request, *_REFUSALS[fault], told)
        async with self._pass_on(request, asked, fault, told) as answer:
            if fault == "reset_after":
                await answer.read()
                self._note(fault, told)
                raise ResetWantedError
            return await self._pass_back(request, asked, answer, fault, told)

    async def _refuse(
        self, request: web.BaseRequest, status: int, code: str, told: dict[str, Any]
    ) -> web.Response:
        """An S3 error; the body is read first, or the client might see a reset instead."""
        async for _ in request.content.iter_any():
            pass
        told["status"] = status
        text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
        return web.Response(status=status, text=text, content_type="application/xml")

    def _pass_on(
        self, request: web.BaseRequest, asked: Asked, fault: str | None, told: dict[str, Any]
    ) -> Any:
        """The request to the server, its body streaming."""
        assert self._session is not None
        body: AsyncIterator[bytes] | None = None
        if request.body_exists and request.content_length != 0:
            body = request.content.iter_any()
            if asked.upload and fault == "flip":
                self._note(fault, told)
                body = flipped(body, request.content_length or 0, self.chooser.random)
            if asked.upload and fault == "reset_body":
                body = self._half(body, request.content_length or 0, told)
        return self._session.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers=_end_to_end(request.headers),
            data=body,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            allow_redirects=False,
        )

    async def _half(
        self, chunks: AsyncIterator[bytes], length: int, told: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        async for chunk in first(chunks, length // 2):
            yield chunk
        self._note("reset_body", told)
        # What the request to the server makes of an error in its body: it breaks the connection.
        raise ConnectionResetError("injected")

    async def _pass_back(
        self,
        request: web.BaseRequest,
        asked: Asked,
        answer: aiohttp.ClientResponse,
        fault: str | None,
        told: dict[str, Any],
    ) -> web.StreamResponse:
        """The server's answer to the client, its body streaming."""
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        response.headers.extend(_end_to_end(answer.headers))
        length = answer.content_length
        chunks: AsyncIterator[bytes] = answer.content.iter_any()
        cut = False
        if asked.download and answer.status in (200, 206) and length:
            if fault == "flip":
                self._note(fault, told)
                chunks = flipped(chunks, length, self.chooser.random)
            elif fault in ("truncate", "reset_body"):
                self._note(fault, told)
                cut, chunks = True, first(chunks, length // 2)
        await response.prepare(request)
        if request.method != "HEAD":
            async for chunk in chunks:
                await response.write(chunk)
        if cut:
            if fault == "reset_body":
                raise ResetWantedError
            if request.transport is not None:  # what is in the buffer still goes out
                request.transport.close()
            return response
        await response.write_eof()
        told["status"] = answer.status
        return response

    def _note(self, fault: str, told: dict[str, Any]) -> None:
        told["fault"] = fault
        self.chooser.happened(fault)

    def _write(self, line: dict[str, Any], event: str) -> None:
        self._log.write(json.dumps({"time": time.time(), "event": event} | line) + "\n")
        self._log.flush()


def _end_to_end(headers: Any) -> CIMultiDict[str]:
    """Without what concerns one connection only."""
    kept = CIMultiDict[str]()
    for name, value in headers.items():
        if name.lower() not in _HOP_BY_HOP:
            kept.add(name, value)
    return kept


def _reset(request: web.BaseRequest) -> None:
    """Close the client's connection with an RST and without what is in the buffers."""
    transport = request.transport
    if transport is None:
        return
    link = transport.get_extra_info("socket")
    if link is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _control(relay: Relay) -> web.Application:
    async def put_faults(request: web.Request) -> web.Response:
        try:
            relay.chooser.set(Faults.from_json(await request.json()))
        except (ValueError, TypeError) as error:
            return web.Response(status=400, text=str(error))
        return web.Response(status=204)

    async def get_counts(_: web.Request) -> web.Response:
        return web.json_response({"requests": relay.requests, "faults": relay.chooser.counts})

    application = web.Application()
    application.add_routes([web.put("/faults", put_faults), web.get("/counts", get_counts)])
    return application


async def _listen(runner: web.BaseRunner) -> int:
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return int(runner.addresses[0][1])


async def serve(upstream: str, log: Path, seed: int) -> None:
    """Run until standard input ends."""
    with log.open("a", encoding="utf-8") as file:
        relay = Relay(upstream, file, Chooser(NONE, seed))
        await relay.open()
        server = web.Server(relay.handle, access_log=None)
        runners = [web.ServerRunner(server), web.AppRunner(_control(relay), access_log=None)]
        ports = dict(zip(("proxy", "control"), [await _listen(r) for r in runners], strict=True))
        print(json.dumps(ports), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await asyncio.gather(*(runner.cleanup() for runner in runners))
        await relay.close()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="A proxy that injects faults.")
    parser.add_argument("--upstream", required=True, metavar="URL", help="the S3 server")
    parser.add_argument("--log", required=True, type=Path, help="where the log of requests goes")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of faults")
    given = parser.parse_args()
    asyncio.run(serve(given.upstream, given.log, given.seed))


if __name__ == "__main__":
    main()
