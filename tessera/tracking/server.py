"""The way to MLflow: which server or file, quietly, and failing in seconds with one sentence.

MLflow imports in seconds, prints its own and alembic's progress, sends telemetry unless told not
to, and retries a refused connection for four minutes. All of that is settled here, once; nobody
else opens a client.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tessera.errors import InputError, StoreError, TesseraError
from tessera.storage import Root, cache_folder, sha256_bytes

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "TESSERA_MLFLOW_EXPERIMENT"
DEFAULT_EXPERIMENT = "tessera"

_COLLECT_EVERY = 50_000
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    # A refused connection fails after 2 s, a server that hangs after 20 s. Nothing is lost by that:
    # the records stay in the root and the next sync continues.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Server:
    """An open tracking server and the experiment in it that belongs to Tessera."""

    uri: str
    client: MlflowClient
    experiment_id: str
    experiment: str

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return without_password(self.uri)


def default_uri(root: Root) -> str:
    """``MLFLOW_TRACKING_URI``, else a SQLite file in a local root, else one in ``./.tessera``."""
    if said := os.environ.get(URI_VARIABLE):
        return said
    folder = Path(root.url) if root.is_local else Path(".tessera").absolute()
    return f"sqlite:///{folder / 'mlflow.db'}"


def _anchored(uri: str) -> str:
    """A SQLite file by its whole path: a server that is started elsewhere must mean the same."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or path.startswith("/") or path in ("", ":memory:"):
        return uri
    return f"sqlite:///{Path(path).absolute()}"


def without_password(uri: str) -> str:
    """``uri`` as it may be printed."""
    # Greedy: a password may hold "/" and "@", and too much hidden is better than too little.
    return re.sub(r"(://[^/:@]*):.*@", r"\1:***@", uri)


def connect(root: Root, tracking_uri: str | None = None) -> Server:
    """Open the server and make sure that the experiment exists.

    Raises ``StoreError`` if the server does not answer and ``InputError`` for a URI that MLflow
    cannot use or where MLflow is not installed.
    """
    uri = _anchored(tracking_uri or default_uri(root))
    name = os.environ.get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    with quiet():
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise InputError(
                f"MLflow is not installed ({error}); run pip install 'tessera[tracking]'."
            ) from error
        with sentences(uri):
            if uri.startswith("sqlite:///"):
                Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(uri):
                client = MlflowClient(tracking_uri=uri)
                return Server(uri, client, _experiment(client, root, uri, name), name)


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Of two processes that open a new SQLite file one makes the tables; MLflow does not see to it.

    The replayer beside a trainer and a ``tessera-exp sync`` right after it are two such.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    place = str(Path(uri.removeprefix("sqlite:///")).absolute())
    lock = cache_folder() / "locks" / sha256_bytes(place.encode())[:24]
    with ExitStack() as stack:
        with suppress(OSError):  # a cache that cannot be written: as before
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(lock.open("wb")), fcntl.LOCK_EX)
        yield


def _experiment(client: MlflowClient, root: Root, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifacts(root, uri)))
        except MlflowException:  # another sync was faster
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage != "active":
        raise InputError(
            f"The MLflow experiment {name!r} at {without_password(uri)} was deleted there; restore "
            f"it, or name another one in {EXPERIMENT_VARIABLE}."
        )
    return str(found.experiment_id)


def _artifacts(root: Root, uri: str) -> str | None:
    """Where models lie; frozen when the experiment is created. A server decides for itself."""
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-artifacts"
        return folder.as_uri()
    if uri.startswith("http"):
        return None
    return Path(root.url, "mlflow-artifacts").as_uri() if root.is_local else f"{root.url}/mlflow"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep MLflow's and alembic's progress off the terminal (alembic sets its own log level)."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Let Python look for garbage seldom while many points are sent.

    MLflow makes thousands of objects a batch, all of which are gone after it; looked through at
    every 700th, as is usual, they cost a third of the time (``benchmarks/replay.md``).
    """
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def as_default(uri: str) -> Iterator[None]:
    """Make ``uri`` MLflow's own default for a while: parts of it look nowhere else.

    Without this, saving a model creates an empty ``mlflow.db`` in the working directory.
    """
    import mlflow

    before = os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(uri)  # also sets the variable
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None resets it
        if before is None:
            os.environ.pop(URI_VARIABLE, None)


@contextmanager
def sentences(uri: str) -> Iterator[None]:
    """Turn whatever MLflow and the libraries under it raise into one sentence.

    Raises ``InputError`` where the URI itself is to blame, ``StoreError`` otherwise.
    """
    from mlflow.exceptions import MlflowException

    shown = without_password(uri)
    try:
        yield
    except TesseraError:
        raise
    except (MlflowException, OSError, sqlite3.Error, ImportError) as error:
        raise _sentence(error, uri, shown) from error
    except Exception as error:
        # requests' and SQLAlchemy's own errors; anything else is a bug and keeps its traceback
        if type(error).__module__.split(".")[0] not in {"requests", "urllib3", "sqlalchemy"}:
            raise
        raise _sentence(error, uri, shown) from error


def _sentence(error: Exception, uri: str, shown: str) -> TesseraError:
    text = without_password(str(error).strip().split("\n")[0])
    reason = text[:200].rstrip(".") or type(error).__name__
    scheme = urlsplit(uri).scheme
    if re.search("Invalid Host header", str(error)):
        return InputError(
            f"The tracking server {shown} does not answer by the name "
            f"{urlsplit(uri).hostname}; add it to --allowed-hosts where the server is started."
        )
    if scheme in {"http", "https"}:
        reason = _cause(text) or reason
        return StoreError(
            f"The tracking server {shown} did not answer as it should ({reason}); start it or "
            f"correct {URI_VARIABLE}: nothing is lost, the next sync continues."
        )
    known = ("sqlite", "postgresql", "mysql", "mssql")
    if not scheme.startswith(known) or isinstance(error, ImportError):
        return InputError(
            f"MLflow cannot use {shown!r} ({reason}); give http://host:port, "
            f"sqlite:////path/mlflow.db or postgresql+psycopg2://... in {URI_VARIABLE}."
        )
    return StoreError(
        f"The tracking database {shown} failed ({reason}); check the path and that the disk is "
        "writable, then sync again."
    )


def _cause(text: str) -> str | None:
    """What went wrong on the way to a server, in a few words; None if it is something else."""
    for pattern, cause in (
        (r"refused", "connection refused"),
        (r"resolve|not known", "the host name is not known"),
        (r"timed? ?out", "no answer in time"),
        (r"error code 40[13]\b", "it refused access: check the user and password"),
        (r"error code 404\b", "there is no MLflow at this address"),
        (r"Max retries|unreachable", "not reachable"),
    ):
        if re.search(pattern, text, re.IGNORECASE):
            return cause
    return None
