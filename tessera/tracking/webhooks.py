"""Where alerts go: ``TESSERA_ALERT_WEBHOOK``, one or several URLs separated by spaces.

A webhook's URL is a secret: who has it can write into the channel. It is never printed, logged,
raised or recorded; sentences number the URLs instead. The body is what ``payload`` says.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from tessera.errors import InputError
from tessera.storage import sha256_bytes
from tessera.tracking.alerts import Alert

WEBHOOK_VARIABLE = "TESSERA_ALERT_WEBHOOK"
PATIENCE_S = 10.0
"""All tries of one message to one webhook together take no longer."""
_TRIES = 4
_ONE_TRY_S = 3.0
_WAIT = wait_random_exponential(multiplier=0.3, max=2.0)
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_TEXT_CHARACTERS = 1_900  # Discord refuses a content of more than 2,000


@dataclass(frozen=True)
class Webhook:
    """One URL, known by its ``number`` (from 1) in the variable."""

    number: int
    url: str

    def __repr__(self) -> str:
        return f"Webhook({self.number})"

    @property
    def mark(self) -> str:
        """Four hex digits that tell the webhooks of a root apart, far too few to find the URL."""
        return sha256_bytes(self.url.encode())[:4]


class _PassingError(Exception):
    """Another try may help; the text is a clause."""


class _RefusedError(Exception):
    """No other try will help; the text is a clause."""


def webhooks(environ: Mapping[str, str] = os.environ) -> tuple[Webhook, ...]:
    """What the variable names; empty where it is not set.

    Raises ``InputError``, which says which one cannot be used, not what it is.
    """
    found = []
    for number, text in enumerate(dict.fromkeys(environ.get(WEBHOOK_VARIABLE, "").split()), 1):
        try:
            url = httpx.URL(text)
            usable = url.scheme in ("http", "https") and bool(url.host)
        except httpx.InvalidURL:
            usable = False
        if not usable:
            raise InputError(
                f"Webhook {number} of {WEBHOOK_VARIABLE} is no URL; expected one or several of "
                "https://..., separated by spaces: correct the variable."
            )
        found.append(Webhook(number, text))
    return tuple(found)


def payload(alert: Alert) -> dict[str, object]:
    """The JSON body: ``text`` for Slack and Mattermost, ``content`` for Discord, plain fields.

    In ``text`` the three characters that Slack reads as markup are escaped, so that nothing in it
    can call a whole channel; ``allowed_mentions`` tells Discord the same. None of the other names
    means anything to the three.
    """
    said = f"Tessera: {alert.run_id}: {alert.text}"[:_TEXT_CHARACTERS]
    escaped = said.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {
        "text": escaped,
        "content": said,
        "allowed_mentions": {"parse": []},
        "id": alert.id,
        "run_id": alert.run_id,
        "kind": alert.kind,
        "at": alert.at,
        "step": alert.step,
        "attempt": alert.attempt,
        "message": alert.text,
    }


def send(webhook: Webhook, alert: Alert, *, patience_s: float = PATIENCE_S) -> str | None:
    """Post one alert, in at most ``patience_s`` seconds; None if it was taken, else a clause.

    The clause says what went wrong without the URL, such as ``it answered 404``. Never raises for
    what the other side does.
    """
    said: list[str | None] = []
    # An answer that trickles in is never late by httpx's own clock: each byte starts it anew.
    work = threading.Thread(
        target=lambda: said.append(_send(webhook, alert, patience_s)), name="webhook", daemon=True
    )
    work.start()
    work.join(patience_s)
    return said[0] if said else "it did not answer in time"


def _send(webhook: Webhook, alert: Alert, patience_s: float) -> str | None:
    until = time.monotonic() + patience_s

    def post() -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise _PassingError("it did not answer in time")
        _post(webhook.url, payload(alert), min(_ONE_TRY_S, left))

    def wait(state: RetryCallState) -> float:
        return min(_WAIT(state), max(0.0, until - time.monotonic()))

    tries = Retrying(
        stop=stop_after_attempt(_TRIES) | stop_before_delay(patience_s - 0.1),
        wait=wait,
        retry=retry_if_exception_type(_PassingError),
        reraise=True,
    )
    try:
        with _quiet():
            tries(post)
    except (_PassingError, _RefusedError) as error:
        return str(error)
    return None


def _post(url: str, body: Mapping[str, object], timeout_s: float) -> None:
    """One request. What httpx says may name the URL, so none of it is passed on."""
    try:
        # Only the status counts: of a body that never ends nothing is read.
        with (
            httpx.Client(timeout=timeout_s, trust_env=True) as client,
            client.stream("POST", url, json=body) as answer,
        ):
            status = answer.status_code
    except httpx.TimeoutException:
        raise _PassingError(f"it did not answer within {timeout_s:.0f} s") from None
    except httpx.TransportError as error:
        raise _PassingError(f"it cannot be reached ({type(error).__name__})") from None
    except Exception as error:
        raise _RefusedError(f"it cannot be used ({type(error).__name__})") from None
    if status in _PASSING:
        raise _PassingError(f"it answered {status}")
    if not 200 <= status < 300:
        raise _RefusedError(f"it answered {status}")


_SENDING = threading.local()
_LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy")))


def _unless_sending(_: logging.LogRecord) -> bool:
    return not getattr(_SENDING, "on", False)


@contextmanager
def _quiet() -> Iterator[None]:
    """httpx logs every URL that it asks for; nobody's logging may see these."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_unless_sending)  # once, however often it is added
    _SENDING.on = True
    try:
        yield
    finally:
        _SENDING.on = False
