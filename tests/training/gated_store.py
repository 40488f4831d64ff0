"""An object store on the loopback that a test can hold, slow down, and look into.

The training's processes reach it as ``s3://bucket/root``; the test copies what it holds into a
folder and looks there, so that it needs no connection of its own.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.storage.tiny_s3 import TinyS3, md5

URL = "s3://bucket/root"
K = TypeVar("K")


class GatedStore(TinyS3):
    """Requests ("METHOD /path?query") that match the held pattern wait until ``release``.

    ``seen`` holds every request with what ``look`` said when it came.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open = threading.Event()
        self._held: str | None = None
        self.waiting = 0
        self.look: Callable[[], object] = lambda: None
        self.seen: list[tuple[str, object]] = []

    def hold(self, pattern: str) -> None:
        """Let nothing through that matches."""
        self._open.clear()
        self._held = pattern

    def release(self) -> None:
        """Let everything through."""
        self._held = None
        self._open.set()

    def taken(self, waiting: list[tuple[str, K]], request: str) -> K | None:
        if waiting is self.before:  # asked for every request, before it is served
            self.seen.append((request, self.look()))
            if self._held is not None and re.search(self._held, request):
                self.waiting += 1
                self._open.wait()
        return super().taken(waiting, request)

    def fill(self, folder: Path) -> None:
        """Hold what a root in a folder holds."""
        for file in folder.rglob("*"):
            if file.is_file():
                data = file.read_bytes()
                self.objects[f"root/{file.relative_to(folder)}"] = (data, md5(data))

    def copy_to(self, folder: Path) -> None:
        """Write everything into a root in a folder."""
        for key, (data, _) in list(self.objects.items()):
            file = folder / key.removeprefix("root/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def environ(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": "a-key-for-tests-only",
            "AWS_SECRET_ACCESS_KEY": "a-secret-for-tests-only",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


@contextmanager
def serving() -> Iterator[GatedStore]:
    """A store on a free port."""
    store = GatedStore()
    thread = threading.Thread(target=store.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.release()
        store.shutdown()
        store.server_close()
        thread.join()
