"""S3 and its relatives: every byte that goes or comes is checked, whatever lies in between.

The requests are made here and not by s3fs, because only their answers tell the ETag of what was
moved, and because one lost request of a thousand must not send 12 GB again: ``Caller`` tries each
of them again.

What an ETag proves:

* Most stores answer with the MD5 of an object, or of its parts' MD5s. That is compared with what
  was sent or received, and one that agrees settles it.
* Other stores (and AWS with KMS keys) answer with something else. A write is then read back, and a
  read is done twice until two agree. Which ETag belongs to which bytes is remembered per root, so
  an object that was verified once costs one read from then on, as long as its ETag is the same.

The trade-off: an object that rotted in the store itself, under an ETag of the old bytes, agrees
with itself and passes for one whose ETag is no MD5. Where that matters, there is a sha256
(``Root.get_file``).
"""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tessera.errors import NotFoundError, StoreError
from tessera.storage.digests import (
    CHUNK,
    Content,
    LocalFile,
    Memory,
    Target,
    bare,
    etag_proves,
    md5,
    md5_of,
    part_size,
    parts_etag,
)
from tessera.storage.faults import MismatchError, is_taken
from tessera.storage.retry import WORKERS, Budget, Caller, at_once
from tessera.storage.s3_requests import S3Requests
from tessera.storage.stores import DOWNLOADS, Progress, not_stored

_REMEMBERED = 4096


class S3Store(S3Requests):
    """One bucket and prefix, safe to use from several threads."""

    def __init__(self, fs: Any, base: str, caller: Caller) -> None:
        super().__init__(fs, base, caller)
        self._verified: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._opaque = False  # an ETag was seen that is no digest

    # -- reading ---------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """The whole object, proved by its ETag or by a second read."""
        target = Memory()
        budget = self._caller.budget()
        self._caller.call(path, lambda: self._receive(path, target, budget), budget=budget)
        return target.read(0, target.size)

    def fetch(self, path: str, local: Path, check: Callable[[], None] | None) -> None:
        """Download to ``local``; ``check`` raises ``MismatchError`` if it must be done again."""
        target = LocalFile(local)
        size = self.size(path)
        budget = self._caller.budget(size)

        def once() -> None:
            if check is None:
                self._receive(path, target, budget, large=size > CHUNK)
            else:
                self._download(path, target, budget, large=size > CHUNK)
                check()

        written_to = str(local.parent)
        self._caller.call(path, once, budget=budget, attempts=DOWNLOADS, written_to=written_to)

    def exists(self, path: str) -> bool:
        """Whether there is an object or a folder."""
        try:
            if self._key(path):
                self.size(path)
                return True
        except NotFoundError:
            pass
        return bool(self._list(path, "", 1))

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return int(self._request(path, "head_object", "ContentLength")["ContentLength"])

    def files(self, prefix: str) -> list[str]:
        """Paths of all objects at or below a folder, in any order; empty if there is none."""
        found = self._list(prefix, "", None)
        if not found and prefix:
            with suppress(NotFoundError):
                self.size(prefix)
                return [prefix]
        return found

    def children(self, prefix: str) -> list[str]:
        """Paths of the direct children of a folder; empty if there is none."""
        return self._list(prefix, "/", None)

    def stamps(self, prefix: str) -> dict[str, str]:
        """``files``, each with its ETag, its time, and its size."""
        found = {
            item["Key"][
                len(self._prefix) :
            ]: f"{item['ETag']} {item['LastModified']} {item['Size']}"
            for page in self._pages(prefix, "", None)
            for item in page.get("Contents", [])
        }
        return {path: stamp for path, stamp in found.items() if not path.endswith("/")}

    def _list(self, prefix: str, delimiter: str, most: int | None) -> list[str]:
        """Paths below a folder."""
        found: list[str] = []
        for page in self._pages(prefix, delimiter, most):
            found += [item["Key"] for item in page.get("Contents", [])]
            found += [item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", [])]
        # Keys that end in a slash are how consoles draw empty folders.
        return [name[len(self._prefix) :] for name in found if most or not name.endswith("/")]

    def _pages(self, prefix: str, delimiter: str, most: int | None) -> Iterator[dict[str, Any]]:
        """A listing page by page, each page tried again by itself."""
        key = self._key(prefix)
        query: dict[str, Any] = {"Prefix": f"{key.rstrip('/')}/" if key else ""}
        query |= {"Delimiter": delimiter} if delimiter else {}
        query |= {"MaxKeys": most} if most else {}
        budget = self._caller.budget()
        while True:
            # An empty body parses as an empty page; only a real one says whether it is the last.
            page = self._request(prefix, "list_objects_v2", "IsTruncated", budget, **query)
            yield page
            if most or not page["IsTruncated"]:
                break
            query["ContinuationToken"] = page["NextContinuationToken"]

    def _receive(self, path: str, target: Target, budget: Budget, *, large: bool = False) -> None:
        """Download, and again if the ETag does not prove what came; accept two that agree."""
        seen: set[bytes] = set()
        for _ in range(2):
            etag = self._download(path, target, budget, large=large)
            if etag_proves(etag, target):
                return
            digest = md5_of(target)
            if self._remembers(path, etag, digest):
                return
            if digest in seen:
                self._remember(path, etag, digest)
                return
            seen.add(digest)
        raise MismatchError(
            StoreError(
                f"{path} in {self._caller.url} was different each time it was read; the connection "
                "or the store damages data: try again later."
            )
        )

    def _download(self, path: str, target: Target, budget: Budget, *, large: bool) -> str:
        """Fill ``target`` with the object, in ranges if it is large; return its ETag.

        ``large`` is what the caller expects: it saves a request whose body nobody reads.
        """
        first = self._request(
            path, "head_object" if large else "get_object", "ContentLength", budget
        )
        size, etag = int(first["ContentLength"]), str(first.get("ETag", ""))
        target.resize(size)
        if "data" in first:
            target.write(0, first["data"])
            return etag

        def part(offset: int) -> None:
            end = min(offset + CHUNK, size)
            answer = self._request(
                path, "get_object", "data", budget, WORKERS, Range=f"bytes={offset}-{end - 1}"
            )
            if len(answer["data"]) != end - offset or str(answer.get("ETag", "")) != etag:
                raise _changed(path, self._caller.url)
            target.write(offset, answer["data"])

        for _ in at_once(part, range(0, size, CHUNK), budget):
            pass
        return etag

    # -- writing ---------------------------------------------------------------------------------

    def publish(self, path: str, data: bytes) -> None:
        """Write or replace an object; it counts once the store is known to hold the same bytes."""
        self._send(path, Memory(data), None)

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist; False if it does."""
        if self.exists(path):  # for the stores that ignore the condition below
            return False
        try:
            answer = self._put(path, data, self._caller.budget(), new=True)
        except StoreError as error:
            if is_taken(error.__cause__):
                # A retry of our own write that had arrived looks the same: compare the bytes.
                return self.read(path) == data
            raise
        if not self._holds(path, str(answer.get("ETag", "")), Memory(data)):
            self.publish(path, data)  # it is ours, and arrived damaged
        return True

    def upload(self, local: Path, path: str, *, link: bool, on_bytes: Progress | None) -> None:
        """Write or replace an object from a local file, checked as by ``publish``."""
        self._send(path, LocalFile(local), on_bytes)

    def delete(self, path: str) -> None:
        """Remove an object if it is there."""
        with suppress(NotFoundError):
            self._request(path, "delete_object")

    def delete_folder(self, prefix: str) -> None:
        """Nothing: a folder of an object store is only a part of names."""

    def _send(self, path: str, content: Content, on_bytes: Progress | None) -> None:
        budget = self._caller.budget(content.size)

        def once() -> None:
            if content.size > CHUNK:
                held = self._send_parts(path, content, budget, on_bytes)
            else:
                data = content.read(0, CHUNK)
                etag = str(self._put(path, data, budget).get("ETag", ""))
                held = self._holds(path, etag, Memory(data))
                if on_bytes:
                    on_bytes(len(data))
            if not held:
                raise not_stored(path, self._caller.url)

        self._caller.call(path, once, budget=budget)

    def _put(self, path: str, data: bytes, budget: Budget, *, new: bool = False) -> dict[str, Any]:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if new else {}
        return self._request(
            path, "put_object", "", budget, Body=data, ContentMD5=_base64(md5(data)), **condition
        )

    def _send_parts(
        self, path: str, content: Content, budget: Budget, on_bytes: Progress | None
    ) -> bool:
        """Upload in parts and say whether the store holds them; a failed upload is given up."""
        length = part_size(content.size)
        upload = self._request(path, "create_multipart_upload", "UploadId", budget)["UploadId"]
        digests, parts = [], []

        def part(offset: int) -> tuple[bytes, str, int]:
            return self._send_part(path, upload, 1 + offset // length, content, length, budget)

        try:
            for digest, etag, sent in at_once(part, range(0, content.size, length), budget):
                digests.append(digest)
                parts.append({"PartNumber": len(digests), "ETag": etag})
                if on_bytes:
                    on_bytes(sent)
            with suppress(NotFoundError):  # finished already, and the answer was lost: look below
                self._request(
                    path, "complete_multipart_upload", "ETag", budget, UploadId=upload,
                    MultipartUpload={"Parts": parts},
                )  # fmt: skip
            head = self._request(path, "head_object", "ContentLength", budget)
        except NotFoundError as error:  # the upload vanished from under us
            raise not_stored(path, self._caller.url) from error
        except BaseException:
            with suppress(Exception):  # best effort: a lifecycle rule removes what stays
                self._ask("abort_multipart_upload", "", Key=self._key(path), UploadId=upload)
            raise
        if head["ContentLength"] != content.size:
            return False
        etag = str(head.get("ETag", ""))
        return bare(etag) == parts_etag(digests) or self._holds(path, etag, content)

    def _send_part(
        self, path: str, upload: str, number: int, content: Content, length: int, budget: Budget
    ) -> tuple[bytes, str, int]:
        """Send one part; return its MD5, its ETag and how many bytes it has."""
        data = content.read((number - 1) * length, length)
        digest = md5(data)

        def send() -> str:
            answer = self._request(
                path, "upload_part", "ETag", budget, WORKERS, UploadId=upload, PartNumber=number,
                Body=data, ContentMD5=_base64(digest),
            )  # fmt: skip
            return str(answer["ETag"])

        etag = send()
        if bare(etag) != digest.hex() and not self._opaque:
            try:
                etag = send()  # no MD5 again: left to the check of the whole object
            except NotFoundError:
                raise
            except StoreError as error:  # rclone lets nobody replace a part: begin again
                raise not_stored(path, self._caller.url) from error
        return digest, etag, len(data)

    def _holds(self, path: str, etag: str, content: Content) -> bool:
        """Whether the object is ``content``: by its ETag, else by reading it back."""
        if etag and etag_proves(etag, content):
            return True
        budget = self._caller.budget(content.size)

        def same(offset: int) -> bool:
            wanted = content.read(offset, CHUNK)
            span: dict[str, Any] = {}
            if wanted:
                span["Range"] = f"bytes={offset}-{offset + len(wanted) - 1}"
            for _ in range(DOWNLOADS):  # a flip on the way back is no reason to send it all again
                answer = self._request(path, "get_object", "data", budget, WORKERS, **span)
                if answer["data"] == wanted:
                    return True
            return False

        if not all(list(at_once(same, range(0, max(content.size, 1), CHUNK), budget))):
            return False
        self._opaque = True
        self._remember(path, etag, md5_of(content))
        return True

    # -- what ETags stood for --------------------------------------------------------------------

    def _remember(self, path: str, etag: str, digest: bytes) -> None:
        with self._lock:
            self._opaque = True
            self._verified[path] = (etag, digest)
            self._verified.move_to_end(path)
            while len(self._verified) > _REMEMBERED:
                self._verified.popitem(last=False)

    def _remembers(self, path: str, etag: str, digest: bytes) -> bool:
        with self._lock:
            return bool(etag) and self._verified.get(path) == (etag, digest)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _changed(path: str, url: str) -> MismatchError:
    return MismatchError(
        StoreError(f"{path} in {url} was replaced while it was read; read it again.")
    )
