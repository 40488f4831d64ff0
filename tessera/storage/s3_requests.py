"""The requests of S3, one try each, and how s3fs is set up for that.

s3fs brings the connection, the keys and the settings.
"""

from __future__ import annotations

import os
from typing import Any

import fsspec

from tessera.errors import InputError
from tessera.storage.digests import CHUNK
from tessera.storage.faults import BrokenAnswerError
from tessera.storage.retry import WORKERS, Budget, Caller, Limits


def options(limits: Limits) -> dict[str, Any]:
    """Arguments of s3fs: short time-outs, no retries below ours, checksums only where required."""
    config: dict[str, Any] = {
        **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),  # ours would replace them
        "connect_timeout": limits.timeout_s,
        "read_timeout": limits.timeout_s,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "max_pool_connections": 4 * WORKERS,
    }
    # Some stores answer a ranged read with the whole object's checksum.
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        config[name] = os.environ.get(f"AWS_{name.upper()}", "when_required")
    # Each root has a connection of its own: an instance that fsspec kept would also keep the keys
    # and the endpoint that the environment named when it was made.
    return {"config_kwargs": config, "use_listings_cache": False, "skip_instance_cache": True}


class S3Requests:
    """Requests about the objects of one bucket and prefix, from any thread."""

    def __init__(self, fs: Any, base: str, caller: Caller) -> None:
        fs.retries = 1  # tries, not tries after the first one
        self._fs, self._caller = fs, caller
        self._bucket, prefix, _ = fs.split_path(base)
        self._prefix = f"{prefix}/" if prefix else ""

    def _key(self, path: str) -> str:
        return f"{self._prefix}{path}" if path else self._prefix.rstrip("/")

    def _request(
        self,
        path: str,
        method: str,
        needed: str = "",
        budget: Budget | None = None,
        share: int = 1,
        **arguments: Any,
    ) -> dict[str, Any]:
        """One request about ``path``, tried again while its faults may pass.

        ``needed`` must be in the answer. ``share`` requests of this call lose time at once.
        """
        if method != "list_objects_v2":
            arguments["Key"] = self._key(path)
        return self._caller.call(
            path, lambda: self._ask(method, needed, **arguments), budget=budget, share=share
        )

    def _ask(self, method: str, needed: str, **arguments: Any) -> dict[str, Any]:
        """One try of one request, in the thread that runs s3fs's event loop."""
        answer: dict[str, Any] = fsspec.asyn.sync(
            self._fs.loop, self._answer, method, needed, arguments,
            timeout=self._caller.limits.request_s(len(arguments.get("Body", b"")) or CHUNK),
        )  # fmt: skip
        return answer

    async def _answer(self, method: str, needed: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The parsed answer; bytes of an object of at most ``CHUNK`` are under ``data``."""
        try:
            await self._fs.set_session()
        except ValueError as error:
            raise InputError(
                f"The root {self._caller.url!r} cannot be opened ({error}); check AWS_ENDPOINT_URL "
                "and the other settings of the store."
            ) from error
        try:
            answer = await self._fs._call_s3(method, Bucket=self._bucket, **arguments)
            if "Body" in answer:
                body = answer.pop("Body")
                try:
                    if int(answer["ContentLength"]) <= CHUNK:
                        answer["data"] = await body.read()
                finally:
                    body.close()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # What the parsers raise on XML and headers that are well-formed and make no sense.
            raise BrokenAnswerError(f"{method} was answered with nonsense ({error})") from error
        if answer.get("IsTruncated") and method == "list_objects_v2":
            needed = "NextContinuationToken"
        if needed and needed not in answer:
            raise BrokenAnswerError(f"{method} was answered without {needed}")
        return dict(answer)
