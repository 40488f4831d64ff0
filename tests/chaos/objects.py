"""The root as it lies in the store, read without the code under test and past the proxy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.services.proxied import Entry
from tests.services.stores import Store, s3_client

_PARTIAL = re.compile(r"^\.partial-[0-9a-f]+-")


class Objects(Protocol):
    """Objects below one root; keys are relative to it."""

    def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with ``prefix``, sorted."""

    def read(self, key: str) -> bytes:
        """One object."""

    def write(self, key: str, data: bytes) -> None:
        """Put one there."""


@dataclass(frozen=True)
class FolderObjects:
    """A root that is a folder."""

    folder: Path

    def keys(self, prefix: str = "") -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        names = (path.relative_to(self.folder).as_posix() for path in files)
        return sorted(n for n in names if n.startswith(prefix) and ".partial-" not in n)

    def read(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class BucketObjects:
    """A root in a bucket, asked directly at the server."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._s3, self._bucket, self._prefix = s3_client(store), store.bucket, f"{prefix}/"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self._s3.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        found = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return sorted(key.removeprefix(self._prefix) for key in found)

    def read(self, key: str) -> bytes:
        answer = self._s3.get_object(Bucket=self._bucket, Key=self._prefix + key)
        data: bytes = answer["Body"].read()
        return data

    def write(self, key: str, data: bytes) -> None:
        self._s3.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)


class FolderWatch:
    """What the proxy's log is for a bucket: which objects of a folder appeared since the last look.

    A temporary file is the beginning of a write, the file under its own name the end. Nobody can
    see from outside that a file is being read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, int] = {}

    def fresh(self) -> list[Entry]:
        """The writes since the last call."""
        entries = []
        for path, changed in self._files():
            if self._seen.get(path) == changed:
                continue
            self._seen[path] = changed
            name = _PARTIAL.sub("", path.name)
            event = "end" if name == path.name else "begin"
            key = path.with_name(name).relative_to(self._folder).as_posix()
            status = 200 if event == "end" else None
            entries.append(Entry(changed / 1e9, event, 0, "PUT", key, "", status, None))
        return entries

    def _files(self) -> Iterator[tuple[Path, int]]:
        for path in self._folder.rglob("*"):
            try:
                if path.is_file():
                    yield path, path.stat().st_mtime_ns
            except FileNotFoundError:
                continue  # renamed since it was listed


class RunFiles:
    """The records of the only run of a root, read as files."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._folder: str | None = None

    def folder(self) -> str:
        """``runs/<run_id>/``; a ``LookupError`` before the run was created."""
        if self._folder is None:
            found = {"/".join(key.split("/")[:2]) + "/" for key in self.objects.keys("runs/")}
            if len(found) != 1:
                raise LookupError(f"expected one run, found {sorted(found)}")
            self._folder = found.pop()
        return self._folder

    def keys(self, below: str) -> list[str]:
        """The run's keys below one of its folders, relative to that; none before it was created."""
        try:
            prefix = f"{self.folder()}{below}/"
        except LookupError:
            return []
        return [key.removeprefix(prefix) for key in self.objects.keys(prefix)]

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints, sorted."""
        found = (COMPLETE.search(f"/checkpoints/{key}") for key in self.keys("checkpoints"))
        return sorted(int(match[1]) for match in found if match)

    def attempt_names(self) -> list[str]:
        """The attempts that were recorded, ``<n>-<token>``, in order."""
        found = (re.fullmatch(r"((\d+)-[0-9a-f]+)\.json", key) for key in self.keys("attempts"))
        return [name for _, name in sorted((int(match[2]), match[1]) for match in found if match)]

    def attempt(self, name: str) -> dict[str, Any]:
        """The record of one attempt."""
        return self._json(f"attempts/{name}.json")

    def endings(self) -> dict[str, dict[str, Any]]:
        """How attempts ended, where they said so."""
        keys = [key for key in self.keys("attempts") if key.endswith(".end.json")]
        return {key.removesuffix(".end.json"): self._json(f"attempts/{key}") for key in keys}

    def journal(self, attempt: str) -> list[dict[str, Any]]:
        """Every record of an attempt, in order of writing."""
        segments: dict[str, list[tuple[list[dict[str, Any]], bool]]] = {}
        for key in self.keys(f"journal/{attempt}"):
            data = self.objects.read(f"{self.folder()}journal/{attempt}/{key}")
            segments.setdefault(key.partition(".")[0], []).append(whole_lines(data))
        found: list[dict[str, Any]] = []
        for number, copies in sorted(segments.items()):
            whole = [lines for lines, is_whole in copies if is_whole]
            # Damage counts unless another copy is whole; or it was the first upload, the last act.
            if not whole and (len(copies) > 1 or number != max(segments)):
                raise ValueError(f"segment {number} of attempt {attempt} is damaged")
            lengths = {len(lines): lines for lines in whole or [copies[0][0]]}
            found += lengths[max(lengths)]
        return found

    def weights_digest(self) -> str:
        """Of the published model."""
        return str(self._json("model/weights.json")["weights_digest"])

    def _json(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.objects.read(self.folder() + key))
        return found


def whole_lines(data: bytes) -> tuple[list[dict[str, Any]], bool]:
    """Records up to the first line that is none, and whether there is no such line."""
    found = []
    for line in data.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            return found, False
    return found, True


COMPLETE = re.compile(r"/checkpoints/step-(\d+)-\d+-[0-9a-f]+/COMPLETE$")
