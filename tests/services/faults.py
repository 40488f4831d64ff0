"""What the proxy may do to a request, how often, and how it chooses."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from typing import Any

ANY = ("slow_down", "throttle", "reset_before", "stall")
CHANGING = ("reset_after",)
UPLOAD = ("reset_body", "flip")
DOWNLOAD = ("reset_body", "truncate", "flip")
NAMES = tuple(dict.fromkeys((*ANY, *CHANGING, *UPLOAD, *DOWNLOAD)))


@dataclass(frozen=True)
class Faults:
    """Rates per request (0 to 1, of the requests that the fault can befall), and the rest.

    * ``slow_down``: 503 SlowDown; ``throttle``: 429. The store never hears of the request.
    * ``reset_before``: the connection is reset before anything reached the store.
    * ``reset_body``: reset half way through an object's body, up or down. Of an upload the store
      gets half of what Content-Length promised.
    * ``reset_after``: PUT, POST or DELETE arrives, and the connection is reset instead of the
      answer.
    * ``stall``: ``stall_s`` seconds of silence, then everything goes on.
    * ``truncate``: half of a downloaded object, then an orderly end of the connection.
    * ``flip``: one bit of an object's body, up or down.

    ``latency_s`` is added to each request, between nothing and twice as much. ``only`` is a regular
    expression that ``"METHOD /raw/path?query"`` must contain; ``limit`` is how many more faults
    there will be (None: no limit).

    Bytes of listings, and of other answers that are no object's, are never changed: they carry no
    digest that anybody could check. Nor are uploads in chunks with signatures or trailers
    (``aws-chunked``), where a flip would break the framing.
    """

    slow_down: float = 0.0
    throttle: float = 0.0
    reset_before: float = 0.0
    reset_body: float = 0.0
    reset_after: float = 0.0
    stall: float = 0.0
    truncate: float = 0.0
    flip: float = 0.0
    stall_s: float = 2.0
    latency_s: float = 0.0
    only: str = ""
    limit: int | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Faults:
        """Read from a parsed JSON object; ``ValueError`` names a key that there is not."""
        unknown = data.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
        return cls(**data)


NONE = Faults()
MODERATE = Faults(
    slow_down=0.02,
    throttle=0.01,
    reset_before=0.01,
    reset_body=0.01,
    reset_after=0.01,
    stall=0.005,
    truncate=0.01,
    flip=0.01,
    stall_s=2.0,
    latency_s=0.005,
)
"""About one request in twelve goes wrong: far worse than a store that people pay for."""


@dataclass(frozen=True)
class Asked:
    """What can be told of a request by its head."""

    method: str
    target: str
    upload: bool
    download: bool

    @property
    def possible(self) -> tuple[str, ...]:
        """The faults that can befall it."""
        changing = CHANGING if self.method in ("PUT", "POST", "DELETE") else ()
        return (
            *ANY, *changing, *(UPLOAD if self.upload else ()),
            *(DOWNLOAD if self.download else ()),
        )  # fmt: skip


def ask(method: str, target: str, length: int | None, encoding: str) -> Asked:
    """``target`` is the raw path with its query, ``length`` the body's bytes if they are told.

    An object is anything below a bucket, unless a query asks for something about it; a part of an
    upload in parts is one too.
    """
    path, _, query = target.partition("?")
    below_bucket = len([part for part in path.split("/") if part]) > 1
    names = {item.partition("=")[0] for item in query.split("&") if item}
    names = {name for name in names if not name.startswith("X-Amz-")}  # a signature in the query
    part = {"partNumber", "uploadId"} <= names
    is_object = below_bucket and (part or names <= {"versionId", "x-id"})
    framed = "aws-chunked" in encoding
    return Asked(
        method,
        target,
        upload=is_object and method == "PUT" and bool(length) and not framed,
        download=is_object and method == "GET",
    )


class Chooser:
    """At most one fault a request, by a seeded draw; counts those that came to pass."""

    def __init__(self, faults: Faults, seed: int) -> None:
        self.random = random.Random(seed)
        self.counts = dict.fromkeys(NAMES, 0)
        self.set(faults)

    def set(self, faults: Faults) -> None:
        """Other rates from now on; the counts stay."""
        self.faults = faults
        self._left = faults.limit

    def choose(self, asked: Asked) -> str | None:
        """The fault of this request, or None. It counts once it has happened (``happened``)."""
        draw = self.random.random()
        if self._left == 0 or not re.search(self.faults.only, f"{asked.method} {asked.target}"):
            return None
        for kind in asked.possible:
            draw -= getattr(self.faults, kind)
            if draw < 0:
                return kind
        return None

    def happened(self, kind: str) -> None:
        """Count it."""
        self.counts[kind] += 1
        if self._left:
            self._left -= 1


async def flipped(
    chunks: AsyncIterator[bytes], length: int, chance: random.Random
) -> AsyncIterator[bytes]:
    """``chunks`` of ``length`` bytes in all, with one bit of one of them turned over."""
    place, bit = chance.randrange(length), 1 << chance.randrange(8)
    seen = 0
    async for chunk in chunks:
        if seen <= place < seen + len(chunk):
            changed = bytearray(chunk)
            changed[place - seen] ^= bit
            yield bytes(changed)
        else:
            yield chunk
        seen += len(chunk)


async def first(chunks: AsyncIterator[bytes], count: int) -> AsyncIterator[bytes]:
    """The first ``count`` bytes."""
    left = count
    async for chunk in chunks:
        if left <= 0:
            return
        yield chunk[:left]
        left -= len(chunk)
