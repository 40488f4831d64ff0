"""Try a root, a tracking server and a clock by using them; each failure is one sentence.

What is wrong with a bucket is told by what it answers: which key it does not know, which request it
refuses, how its clock differs. Everything that the probe writes it removes again.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from tessera.errors import InputError, RetryElsewhereError, StoreError, TesseraError
from tessera.storage import Root, sha256_file
from tessera.storage.digests import CHUNK
from tessera.storage.faults import answer_of
from tessera.storage.retry import WORKERS

LARGEST_SKEW_S = 900.0
"""S3 refuses a request whose time differs by more."""
AS_SAVED = WORKERS * CHUNK
"""Bytes that go up as a checkpoint's file does: in parts, as many at once."""
_PATIENCE_S = 10.0
_ATTEMPTS = 3
_WRONG_REGION = {
    "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
}  # fmt: skip


class ClockError(RetryElsewhereError):
    """This machine's clock differs from the store's by more than the store bears."""


@dataclass(frozen=True)
class RootProbe:
    """What a root can do: bytes a second each way, seconds of one small request, the clocks.

    ``clock_ahead_s`` is by how much the store's clock is ahead of this machine's, in whole seconds;
    None for a store that tells no time.
    """

    size: int
    write_bytes_per_s: float
    read_bytes_per_s: float
    latency_s: float
    clock_ahead_s: float | None


@contextmanager
def variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """A block in which the environment has these variables; None for one that is not set."""
    before = {name: os.environ.get(name) for name in values}

    def put(wanted: Mapping[str, str | None]) -> None:
        for name, value in wanted.items():
            if value:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)

    put(values)
    try:
        yield
    finally:
        put(before)


def probe_root(url: str, *, size: int = CHUNK) -> RootProbe:
    """Write ``size`` random bytes to the root, find, read and remove them, timing each.

    A small object goes first, so that the start of the client and its handshake are not timed; more
    than ``CHUNK`` goes in parts at once, as checkpoints do. Keys and endpoint are those of the
    environment. Raises ``InputError`` for what only a person can put right (a key, a permission,
    the bucket's name, this machine's clock), and ``RetryElsewhereError`` where another machine or
    moment may help.
    """
    ahead = store_clock_ahead_s(url)
    _require_clock(ahead)
    path = f"probes/{secrets.token_hex(8)}"
    first = f"{path}-first"
    quick = Root(url, attempts=_ATTEMPTS, longest_wait_s=1.0, timeout_s=_PATIENCE_S)
    _timed(url, "written to", lambda: quick.publish(first, b"tessera"))
    root = Root(url, attempts=_ATTEMPTS, longest_wait_s=1.0)  # with bytes as patient as the saver
    try:
        _timed(url, "written to", lambda: root.publish(first, b"tessera"))
        write_s, latency_s, read_s = _transfer(root, url, path, size)
    except TesseraError:
        for left in (path, first):
            with suppress(TesseraError):
                quick.delete(left)
        raise
    _timed(url, "cleaned up", lambda: quick.delete(path))
    _timed(url, "cleaned up", lambda: quick.delete(first))
    return RootProbe(size, size / write_s, size / read_s, latency_s, ahead)


def _transfer(root: Root, url: str, path: str, size: int) -> tuple[float, float, float]:
    """Seconds of writing, listing and reading ``size`` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        sent, got = Path(folder, "sent"), Path(folder, "got")
        try:
            sent.write_bytes(os.urandom(size))
        except OSError as error:
            raise RetryElsewhereError(
                f"The root {url} could not be tried: {folder} does not take {size / 1e6:,.0f} MB "
                f"({error.strerror or error}); make room, or point TMPDIR elsewhere."
            ) from error
        digest = sha256_file(sent)
        return (
            _timed(url, "written to", lambda: root.put_file(sent, path)),
            _timed(url, "listed", lambda: _require_listed(root, path)),
            _timed(url, "read", lambda: root.get_file(path, got, sha256=digest)),
        )


def _require_listed(root: Root, path: str) -> None:
    if path not in root.files("probes"):
        raise StoreError(
            f"{root.url} does not list an object that was just written; a run could not be "
            "continued there: use another store."
        )


def _timed(url: str, what: str, work: Callable[[], object]) -> float:
    """Seconds that ``work`` took; its failure as a sentence that names ``what`` cannot be done."""
    began = time.monotonic()
    try:
        work()
    except StoreError as error:
        raise explain(error, url, what) from error
    return max(time.monotonic() - began, 1e-6)


def explain(error: StoreError, url: str, what: str) -> TesseraError:
    """What a person should do about the failure of a root that could not be ``what`` (written)."""
    status, code = answer_of(error)
    cannot = f"The root {url} cannot be {what}"
    if code == "RequestTimeTooSkewed":
        return _skewed(None)
    if code in ("InvalidAccessKeyId", "InvalidAccessKey"):
        advice = "the store does not know this access key id: copy it again, or check the endpoint"
    elif code == "SignatureDoesNotMatch":
        advice = "the secret key does not belong to the access key id: copy both again"
    elif code == "NoSuchBucket":
        advice = "there is no such bucket at this endpoint: create it, or correct its name"
    elif code in _WRONG_REGION or status == 301:
        advice = "the bucket is in another region: give it (AWS_DEFAULT_REGION)"
    elif status == 403 and what == "written to":
        advice = "the keys may not write there: give them s3:PutObject for the bucket"
    elif status == 403:
        advice = (
            "the keys lack a permission: a run needs s3:GetObject, s3:PutObject, s3:DeleteObject "
            "and s3:ListBucket"
        )
    elif status == 0 and error.exit_code == RetryElsewhereError.exit_code:
        said = str(error).rstrip(".").removesuffix("; try again later")
        return RetryElsewhereError(
            f"{cannot}: {said}; is the endpoint right "
            f"({endpoint_of(os.environ)}), and does this machine reach it?"
        )
    else:
        return error
    return InputError(f"{cannot} ({status} {code}): {advice}.")


def endpoint_of(environ: Mapping[str, str]) -> str:
    """Where S3 requests go."""
    region = environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    named = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    return named or f"https://s3.{region}.amazonaws.com"


def store_clock_ahead_s(url: str, environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds that the store's clock is ahead of this one, by the Date of an answer of it.

    Any answer will do, a refusal too. None for a root that is no S3, and where nothing answered:
    what uses the root says that better.
    """
    if not url.startswith(("s3://", "s3a://")):
        return None
    asked = time.time()
    try:
        date = httpx.head(endpoint_of(environ), timeout=_PATIENCE_S).headers.get("Date")
        told = parsedate_to_datetime(date).timestamp() if date else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    answered = time.time()
    if told is None or asked - 1 <= told <= answered:  # it tells whole seconds, rounded down
        return None if told is None else 0.0
    return told - (answered if told > answered else asked)


def _require_clock(ahead_s: float | None) -> None:
    if ahead_s is not None and abs(ahead_s) > LARGEST_SKEW_S:
        raise _skewed(ahead_s)


def _skewed(ahead_s: float | None) -> ClockError:
    off = "differs from" if ahead_s is None else clock_named(ahead_s)
    return ClockError(
        f"The clock of this machine {off} the store's, which refuses requests beyond "
        f"{LARGEST_SKEW_S:.0f} s; set it (timedatectl set-ntp true), or use another machine."
    )


def clock_named(ahead_s: float) -> str:
    """``is 40 s behind``: this machine's clock, given by how much the other one is ahead."""
    return f"is {abs(ahead_s):,.0f} s {'behind' if ahead_s > 0 else 'ahead of'}"


def probe_mlflow(uri: str, username: str = "", password: str = "") -> str:
    """Ask an MLflow server for its version and its experiments; returns the version.

    Raises ``InputError`` for a wrong address, user or password, ``RetryElsewhereError`` for a
    server that does not answer. Something else than http is a file or a database: nothing to ask.
    """
    if not uri.startswith(("http://", "https://")):
        return ""
    if "@" in uri:
        raise InputError(
            "The MLflow address holds a user or a password; give them apart, with "
            "--mlflow-username and --mlflow-password."
        )
    auth = (username, password) if username else None
    base = uri.rstrip("/")
    try:
        with httpx.Client(auth=auth, timeout=_PATIENCE_S) as client:
            version = client.get(f"{base}/version")
            found = client.post(
                f"{base}/api/2.0/mlflow/experiments/search", json={"max_results": 1}
            )
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InputError(f"The MLflow server {uri!r} is no address ({error}).") from error
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise RetryElsewhereError(
            f"The MLflow server {uri} does not answer ({reason}); is it running, and is the "
            "address right (--mlflow-uri)?"
        ) from error
    if found.status_code in (401, 403):
        raise InputError(
            f"The MLflow server {uri} refuses this user ({found.status_code}); correct "
            "--mlflow-username and --mlflow-password."
        )
    try:
        is_mlflow = found.status_code == 200 and isinstance(found.json(), dict)
    except ValueError:
        is_mlflow = False
    if not is_mlflow:
        raise InputError(
            f"{uri} answers, but not as MLflow does ({found.status_code}); give the server's own "
            "address, without a path of its pages (--mlflow-uri)."
        )
    text = version.text.strip()
    return text if version.status_code == 200 and len(text) < 20 else "unknown"
