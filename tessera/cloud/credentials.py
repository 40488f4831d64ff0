"""``~/.tessera/env``: root, keys, tracking server and prices, as ``tessera configure`` wrote them.

One line a setting, ``KEY='value'``, so that a shell and this module read the same. The file is for
its owner alone (0600 in a folder of 0700) and travels to rented machines as a copy, where a
variable that the job sets wins over it. Beside it lies a file of a telling name: the task YAMLs
copy that one first, so that SkyPilot's refusal of a missing file names the command to run.

On the laptop it is the default of ``tessera`` and ``tessera-exp`` (``apply_defaults``), as long as
no other root is named: its keys and its MLflow belong to its root. Best first: the option, the
variable, this file.
"""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tessera.errors import InputError

FILE_VARIABLE = "TESSERA_ENV_FILE"
"""Another place for the file; for tests, and for two accounts on one laptop."""
MARKER = "run-tessera-configure-first"
_MARKER_TEXT = "Beside this file `tessera configure` wrote env, which the task YAMLs copy.\n"
_HEAD_HERE = "# Written by `tessera configure`; stays on this machine. Secret."
_HEAD = "# Written by `tessera configure`; copied to the machines that sky/*.yaml rent. Secret."


@dataclass(frozen=True)
class Setting:
    """A line of the file: its variable, the option and the question for it."""

    variable: str
    option: str
    question: str
    secret: bool = False


SETTINGS = (
    Setting("TESSERA_ROOT", "root", "Root, s3://bucket/prefix"),
    Setting("AWS_ENDPOINT_URL", "endpoint", "Endpoint of the store (none for Amazon's)"),
    Setting("AWS_DEFAULT_REGION", "region", "Region of the store (none: us-east-1)"),
    Setting("AWS_ACCESS_KEY_ID", "access-key-id", "Access key id", secret=True),
    Setting("AWS_SECRET_ACCESS_KEY", "secret-access-key", "Secret access key", secret=True),
    Setting("MLFLOW_TRACKING_URI", "mlflow-uri", "MLflow server, https://... (none: a file)"),
    Setting("MLFLOW_TRACKING_USERNAME", "mlflow-username", "MLflow user"),
    Setting("MLFLOW_TRACKING_PASSWORD", "mlflow-password", "MLflow password", secret=True),
    Setting("TESSERA_USD_PER_HOUR", "usd-per-hour", "Dollars an hour where no provider tells one"),
    Setting("TESSERA_USD_PER_GB_UP", "usd-per-gb-up", "Dollars for 10^9 bytes to the root"),
    Setting("TESSERA_USD_PER_GB_DOWN", "usd-per-gb-down", "Dollars for 10^9 bytes from the root"),
    Setting("TESSERA_ALERT_WEBHOOK", "alert-webhook", "Webhooks of alerts, https://", secret=True),
)
_VARIABLES = frozenset(setting.variable for setting in SETTINGS)
_OF_RENTED_MACHINES = frozenset(name for name in _VARIABLES if name.startswith("TESSERA_USD"))
_OF_THIS_MACHINE = frozenset({"TESSERA_ALERT_WEBHOOK"})
"""Kept in a second file, which no task copies: who can read it can post to the channel."""
_ROOT = "TESSERA_ROOT"


def env_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the file is: ``TESSERA_ENV_FILE``, else ``~/.tessera/env``."""
    if named := environ.get(FILE_VARIABLE):
        return Path(named)
    try:
        return Path.home() / ".tessera" / "env"
    except RuntimeError:  # a user without a home
        return Path("/nonexistent/.tessera/env")


def read_settings(path: Path) -> dict[str, str]:
    """The settings of the file and of its neighbour for this machine; empty if there is none.

    ``InputError`` names a line that is none.
    """
    return _read(path) | _read(_beside(path))


def _beside(path: Path) -> Path:
    """The file of what stays on this machine."""
    return path.with_name(f"{path.name}-here")


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(
            f"{path} cannot be read ({reason}); remove it and run `tessera configure` again."
        ) from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            (word,) = shlex.split(line)
            name, value = word.split("=", 1)
        except ValueError:  # the line itself may hold a secret
            raise InputError(
                f"{path} is damaged in line {number}; expected KEY='value': run `tessera "
                "configure` again."
            ) from None
        if name in _VARIABLES and value:
            found[name] = value
    return found


def write_settings(path: Path, values: Mapping[str, str]) -> None:
    """Replace the files with ``values``, readable for their owner alone, and the marker beside."""
    carried, here = [_HEAD], [_HEAD_HERE]
    for setting in SETTINGS:
        value = values.get(setting.variable, "")
        if not value.isprintable():
            raise InputError(
                f"{setting.variable} holds a line break or another character that cannot be "
                "typed; copy it again."
            )
        if value:
            quoted = value.replace("'", "'\\''")
            lines = here if setting.variable in _OF_THIS_MACHINE else carried
            lines.append(f"{setting.variable}='{quoted}'")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        _replace(path, "\n".join(carried) + "\n")
        if len(here) > 1:
            _replace(_beside(path), "\n".join(here) + "\n")
        else:
            _beside(path).unlink(missing_ok=True)
        _replace(path.with_name(MARKER), _MARKER_TEXT)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}); correct the permissions of "
            f"{path.parent}."
        ) from error


def _replace(path: Path, text: str) -> None:
    """Write ``path`` in one piece with mode 0600; the bytes were never readable for others."""
    temporary = path.with_name(f".partial-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def apply_defaults(
    arguments: Sequence[str], environ: MutableMapping[str, str] = os.environ
) -> None:
    """Set the variables of the file that are not set, unless another root than its own is named.

    Prices are left out: they are those of rented machines. So are the keys where AWS_PROFILE names
    others.
    """
    if environ.get("SKYPILOT_TASK_ID"):
        return  # a job: sky/run.sh has read the file
    values = read_settings(env_file(environ))
    root = values.get(_ROOT)
    named = [environ.get(_ROOT), *_roots_in(arguments)]
    if not root or any(other and other.rstrip("/") != root.rstrip("/") for other in named):
        return
    for name, value in values.items():
        is_key = name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        if name in _OF_RENTED_MACHINES or (is_key and environ.get("AWS_PROFILE")):
            continue
        if not environ.get(name):
            environ[name] = value


def root_written(url: str, environ: Mapping[str, str] = os.environ) -> str:
    """`` (the root in <file>)`` if the file names this root, for a sentence; else nothing."""
    path = env_file(environ)
    try:
        written = read_settings(path).get(_ROOT, "")
    except InputError:
        return ""
    same = bool(written) and written.rstrip("/") == url.rstrip("/")
    return f" (the root in {path})" if same else ""


def _roots_in(arguments: Sequence[str]) -> list[str]:
    """The values of ``--root`` on a command line."""
    return [value for name, value in pairwise(arguments) if name == "--root"] + [
        argument.removeprefix("--root=") for argument in arguments if argument.startswith("--root=")
    ]
