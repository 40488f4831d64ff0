"""vast.ai's API, as far as Tessera needs it: instances, offers, charges; nothing is rented here.

Endpoints and fields are those of vast's own SDK (vastai 1.9) and https://docs.vast.ai/api-reference.
A request is tried a few times within seconds (500s, 429, silence, an answer that is no JSON); what
fails after that is one sentence. The key travels in a header only: it is in no URL, no ``repr`` and
no message, and where vast.ai quotes it back it is struck out.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx
from pydantic import ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from tessera.cloud.vast_answers import (
    RUNNING,
    VastCharge,
    VastChargeItem,
    VastInstance,
    VastModel,
    VastOffer,
    VastUser,
    as_number,
    is_model,
)
from tessera.errors import InputError, ProviderError

__all__ = [
    "RUNNING", "VastCharge", "VastChargeItem", "VastClient", "VastInstance", "VastOffer",
    "VastUser", "find_key", "is_model",
]  # fmt: skip

DEFAULT_URL = "https://console.vast.ai"
URL_VARIABLE = "VAST_URL"
KEY_VARIABLE = "VAST_API_KEY"
_PAGE = 100
_PAGES = 1000  # a token that leads in a circle ends somewhere
_WAIT = wait_random_exponential(multiplier=0.3, max=4.0)
_LONGEST_RETRY_AFTER_S = 15.0

M = TypeVar("M", bound=VastModel)


def find_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """The API key: ``VAST_API_KEY``, else the files of vast's own tools; None if there is none.

    SkyPilot puts both files on every vast.ai host that it rents.
    """
    if key := environ.get(KEY_VARIABLE, "").strip():
        return key
    home = Path(environ.get("HOME") or "/nonexistent")
    configs = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    folders = (configs / "vastai", home / ".config" / "vastai")
    for path in (*(folder / "vast_api_key" for folder in folders), home / ".vast_api_key"):
        try:
            if key := path.read_text(encoding="utf-8").strip():
                return key
        except (OSError, ValueError):
            continue
    return None


class VastClient:
    """A few questions to vast.ai; see the head of this module. Safe to share among threads."""

    def __init__(
        self,
        key: str | None = None,
        url: str | None = None,
        *,
        tries: int = 4,
        timeout_s: float = 8.0,
        patience_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """``key``: see ``find_key``; ``url``: ``VAST_URL``, else vast.ai's own.

        One request takes at most about ``timeout_s``, all tries of it together ``patience_s``.
        Raises ``InputError`` where there is no key.
        """
        found = key or find_key()
        if not found:
            raise InputError(
                "No vast.ai key was found; set VAST_API_KEY, or write it to "
                "~/.config/vastai/vast_api_key (`vastai set api-key KEY` does)."
            )
        if not found.isprintable() or not found.isascii() or " " in found:
            raise InputError(
                "The vast.ai key holds characters that no key has (a space or a line break?); copy "
                "it again from https://cloud.vast.ai/manage-keys/."
            )
        self._key = found
        self.clock_ahead_s = 0.0
        """Seconds that vast.ai's clock is ahead of this one, by its last answer; whole seconds."""
        self.url = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
        self._tries, self._timeout_s, self._patience_s = tries, timeout_s, patience_s
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {found}", "Accept": "application/json"},
                follow_redirects=True,
                transport=transport,
            )
        except httpx.InvalidURL as error:
            raise InputError(
                f"{URL_VARIABLE} is {self.url!r}, which is no URL; expected one like {DEFAULT_URL}."
            ) from error

    def __repr__(self) -> str:
        return f"VastClient({self.url!r})"

    def __enter__(self) -> VastClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    # -- questions ---------------------------------------------------------------------------------

    def user(self) -> VastUser:
        """Whose key this is."""
        return self._parse(VastUser, self._ask("GET", "/api/v0/users/current/"))

    def instances(self) -> list[VastInstance]:
        """All instances of the account, by id."""
        query: dict[str, Any] = {
            "select_filters": {}, "order_by": [{"col": "id", "dir": "asc"}], "limit": 25,
        }  # fmt: skip
        rows = self._pages("/api/v1/instances/", query, "instances")
        return sorted(self._parse_rows(VastInstance, rows), key=lambda instance: instance.id)

    def instance(self, number: int) -> VastInstance | None:
        """The instance of that id; None where the account has none."""
        answer = self._ask("GET", f"/api/v0/instances/{number}/", {"owner": "me"}, absent_ok=True)
        row = answer.get("instances")
        return self._parse(VastInstance, row) if isinstance(row, dict) else None

    def instance_of(self, name: str) -> VastInstance | None:
        """The instance of a container (``C.<id>`` or the id) or of a SkyPilot cluster, or None.

        SkyPilot labels the machine of cluster ``name`` as ``<name>-<8 hex of the user>-head``. Of
        several the youngest is meant: a recovered job keeps its cluster's name.
        """
        if match := re.fullmatch(r"(?:C\.)?(\d+)", name):
            return self.instance(int(match[1]))
        exact = re.compile(rf"{re.escape(name)}(-[0-9a-f]{{4,8}})?-head")
        found = [instance for instance in self.instances() if exact.fullmatch(instance.label)]
        return max(found, key=lambda i: (i.start_date or 0.0, i.id), default=None)

    def gpu_names(self) -> list[str]:
        """Every GPU model that is or was offered, in vast.ai's spelling (``H100 SXM``)."""
        names = self._ask("GET", "/api/v0/gpu_names/unique/").get("gpu_names")
        if not isinstance(names, list):
            self._fail("named no GPU models")
        return sorted(str(name) for name in names)

    def offers(
        self,
        gpu_name: str,
        count: int = 1,
        *,
        disk_gb: float = 0.0,
        bid: bool = False,
        verified: bool = True,
        limit: int = 200,
    ) -> list[VastOffer]:
        """Machines with ``count`` GPUs of that model, the cheapest first.

        ``gpu_name`` is a model (``H100``: all its variants) or a variant (``H100 SXM``), in any
        case, with spaces or underscores; empty for all. ``dph_total`` includes ``disk_gb`` of
        storage. With ``bid`` they are the interruptible ones, which run from ``min_bid`` on.
        Offers without a usable price are left out.
        """
        query: dict[str, Any] = {
            "external": {"eq": False}, "rentable": {"eq": True}, "rented": {"eq": False},
            "num_gpus": {"eq": count}, "disk_space": {"gte": disk_gb},
            "order": [["dph_total", "asc"]], "type": "bid" if bid else "on-demand",
            "limit": limit, "allocated_storage": disk_gb or 5.0,
        }  # fmt: skip
        if verified:
            query["verified"] = {"eq": True}
        if gpu_name:
            names = [name for name in self.gpu_names() if is_model(name, gpu_name)]
            if not names:
                return []
            query["gpu_name"] = {"in": names}
        rows = self._ask("POST", "/api/v0/bundles/", body=query).get("offers")
        if not isinstance(rows, list):
            self._fail("told no offers")
        # Filters have been dropped on the way before: what is not asked for is left out here too.
        found = [
            offer
            for offer in self._parse_rows(VastOffer, rows)
            if offer.dph_total is not None
            and offer.num_gpus == count
            and (not gpu_name or is_model(offer.gpu_name, gpu_name))
            and offer.rentable is not False
            and (offer.verified is not False or not verified)
        ]
        return sorted(found, key=lambda offer: (offer.dph_total or 0.0, offer.id))

    def charges(self, start: float, end: float | None = None) -> list[VastCharge]:
        """What was billed for instances from ``start`` to ``end`` (now), seconds of the epoch."""
        until = time.time() if end is None else end
        query: dict[str, Any] = {
            "select_filters": {
                "day": {"gte": int(start), "lte": math.ceil(until)},
                "type": {"in": ["instance"]},
            },
            "latest_first": False, "limit": _PAGE, "format": "tree",
        }  # fmt: skip
        rows = self._pages("/api/v0/charges/", query, "results")
        return list(self._parse_rows(VastCharge, rows))

    def destroy(self, number: int) -> bool:
        """End an instance for good, and its bill with it; False if there was none any more."""
        answer = self._ask("DELETE", f"/api/v0/instances/{number}/", body={}, absent_ok=True)
        if answer and answer.get("success") is False:
            said = self._struck_out(str(answer.get("msg") or answer.get("error") or "no reason"))
            self._fail(f"did not destroy instance {number} ({said})")
        return bool(answer)

    # -- one request -------------------------------------------------------------------------------

    def _pages(self, path: str, query: dict[str, Any], key: str) -> Iterator[Any]:
        for _ in range(_PAGES):
            answer = self._ask("GET", path, query)
            rows = answer.get(key)
            if not isinstance(rows, list):
                self._fail(f"told no {key}")
            yield from rows
            token = answer.get("next_token")
            if not token or token == query.get("after_token"):
                return
            query = {**query, "after_token": token}

    def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        *,
        body: Any = None,
        absent_ok: bool = False,
    ) -> dict[str, Any]:
        """The answer, a JSON object; empty for a 404 if ``absent_ok``.

        Every request here may be repeated: none of them rents anything.
        """
        deadline = time.monotonic() + self._patience_s
        params = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in (query or {}).items()
        }

        def once() -> dict[str, Any]:
            left = max(0.1, deadline - time.monotonic())
            timeout = min(self._timeout_s, left)
            try:
                response = self._http.request(
                    method, path, params=params, json=body, timeout=timeout
                )
            except httpx.TimeoutException:
                raise _TryAgainError(f"was silent for {timeout:.2g} s") from None
            except httpx.TooManyRedirects:
                self._fail("redirects in a circle")
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                reason = self._struck_out(str(error) or type(error).__name__)
                raise _TryAgainError(f"cannot be reached ({reason})") from None
            self.clock_ahead_s = _ahead_s(response.headers.get("Date"))
            return self._read(response, path, absent_ok)

        retrying = Retrying(
            retry=retry_if_exception_type(_TryAgainError),
            wait=_wait,
            stop=stop_before_delay(self._patience_s) | stop_after_attempt(self._tries),
            reraise=True,
        )
        try:
            return retrying(once)
        except _TryAgainError as error:
            self._fail(f"{error}, at {path}, {retrying.statistics['attempt_number']} times")

    def _read(self, response: httpx.Response, path: str, absent_ok: bool) -> dict[str, Any]:
        code = response.status_code
        if code in (401, 403):
            raise InputError(
                f"vast.ai ({self.url}) refuses the key at {path} ({code}); check it, or give it "
                "that permission, at https://cloud.vast.ai/manage-keys/, then "
                "`vastai set api-key KEY`."
            )
        if code == 404 and absent_ok:
            return {}
        try:
            answer = response.json()
        except ValueError:
            answer = None
        said = answer if isinstance(answer, dict) else {}
        if code == 429 and said.get("error") != "search_quota_exceeded":
            raise _TryAgainError("asks to come less often (429)", _retry_after(response))
        if code >= 500:
            raise _TryAgainError(f"answered {code}")
        if code >= 300:
            reason = (
                said.get("msg") or said.get("message") or said.get("error") or "no reason given"
            )
            self._fail(f"answered {code} at {path} ({self._struck_out(str(reason))})")
        if not isinstance(answer, dict):
            raise _TryAgainError("answered something that is no JSON object")
        return answer

    def _parse(self, form: type[M], row: Any) -> M:
        try:
            return form.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"]) or "answer"
            self._fail(f"answered what is no {form.__name__} ({place}: {first['msg']})")

    def _parse_rows(self, form: type[M], rows: Iterator[Any] | Sequence[Any]) -> Iterator[M]:
        return (self._parse(form, row) for row in rows)

    def _fail(self, what: str) -> NoReturn:
        raise ProviderError(
            f"vast.ai ({self.url}) {what}; try again in some minutes, or see https://status.vast.ai."
        )

    def _struck_out(self, text: str) -> str:
        return " ".join(text.replace(self._key, "***").split())[:160].rstrip(".")


class _TryAgainError(Exception):
    """A failure that another try may not meet; ``after_s`` is what vast.ai asked to wait."""

    def __init__(self, what: str, after_s: float | None = None) -> None:
        super().__init__(what)
        self.after_s = after_s


def _retry_after(response: httpx.Response) -> float | None:
    wait = as_number(response.headers.get("Retry-After"))
    return wait if wait is not None and wait <= _LONGEST_RETRY_AFTER_S else None


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.after_s if isinstance(error, _TryAgainError) else None
    return _WAIT(state) if asked is None else asked


def _ahead_s(date: str | None) -> float:
    """Seconds that a server's ``Date`` header is ahead of this clock; 0 where it tells none."""
    try:
        then = parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError):
        return 0.0
    return then - time.time()
