"""``tessera configure``: ask once for root, keys, MLflow and prices, try each, write one file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from tessera.cli.common import epilog, json_option, print_json
from tessera.cloud.credentials import (
    SETTINGS,
    Setting,
    env_file,
    read_settings,
    write_settings,
)

_NONE = "-"  # as an answer: no value
_MLFLOW = "MLFLOW_TRACKING_URI"
_ROOT = "TESSERA_ROOT"
_ENDPOINT = "AWS_ENDPOINT_URL"
_TRIED = {
    "root": {s.variable for s in SETTINGS if s.variable == _ROOT or s.variable.startswith("AWS_")},
    "MLflow": {s.variable for s in SETTINGS if s.variable.startswith("MLFLOW_")},
}
"""The settings that a check of that name rests on."""


@dataclass(frozen=True)
class Check:
    """What trying a setting came to; ``ok`` is None for what is told and does not count.

    ``unknown``: what was asked did not answer, so nothing is known of it.
    """

    name: str
    ok: bool | None
    text: str
    unknown: bool = False


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each setting."""
    for setting in reversed(SETTINGS):
        told = f"{setting.question}; {setting.variable}."
        command = click.option(
            f"--{setting.option}", setting.variable.lower(), metavar="VALUE", help=told
        )(command)
    return command


@click.command(
    epilog=epilog(
        "tessera configure",
        "tessera configure --from-env",
        "tessera configure --root s3://bucket/tessera --usd-per-hour 1.91",
        "tessera configure --check",
    )
)
@_options
@click.option("--from-env", is_flag=True, help="Take every variable that is set; ask nothing.")
@click.option("--check", is_flag=True, help="Only try again what is written.")
@click.option("--no-check", is_flag=True, help="Write without trying anything.")
@json_option
def configure(from_env: bool, check: bool, no_check: bool, as_json: bool, **options: Any) -> int:
    """Ask for root, keys, MLflow and prices; try each; write ~/.tessera/env for you alone.

    What is not answered keeps its value; the answer - removes it. With options or --from-env
    nothing is asked. A secret given as an option is seen by who lists your processes: prefer
    --from-env. The vast.ai key is not among them: `vastai set api-key` keeps that one.

    Exit codes: 0 written, or all checks passed; 2 something cannot be used, and nothing was
    written; 75 --check could not try all of it.
    """
    from tessera.errors import InputError, RetryElsewhereError

    path = env_file()
    before = read_settings(path)
    given = {name.upper(): value for name, value in options.items() if value is not None}
    if check and (given or from_env or no_check):
        raise InputError("--check tries what is written already; give it no other option.")
    if check and not before:
        raise InputError(f"{path} holds nothing to check; run `tessera configure`.")
    if check:
        values = before
    elif given or from_env:
        values = _merged(before, {**(_set_variables() if from_env else {}), **given})
        _require_root(values, from_env)
    else:
        values, checks = _asked_until_right(before, no_check)
    if check or given or from_env:
        validate(values)
        checks = [] if no_check else run_checks(values)
    failed = [item for item in checks if item.ok is False]
    written = not check and not failed
    if written:
        write_settings(path, values)
    _tell(checks, path, written, values, as_json)
    if failed:
        names = " and ".join(item.name for item in failed)
        wrote = "" if check else f" and {path} was not written (--no-check would)"
        raise InputError(f"The check of {names} failed{wrote}; put right what is said above.")
    unknown = [item.name for item in checks if item.unknown]
    if check and unknown:
        raise RetryElsewhereError(
            f"{' and '.join(unknown)} did not answer, so whether the key works is not known; try "
            "again later."
        )
    return 0


def _require_root(values: Mapping[str, str], from_env: bool) -> None:
    from tessera.errors import InputError

    if from_env and not values.get(_ROOT):
        raise InputError(
            "--from-env found no TESSERA_ROOT among the variables, and a rented machine needs a "
            "root that it can reach; export TESSERA_ROOT=s3://bucket/prefix, or add --root."
        )


def _asked_until_right(
    before: Mapping[str, str], no_check: bool
) -> tuple[dict[str, str], list[Check]]:
    """The answers, and what trying them came to; what fails is asked again, the rest is kept."""
    from tessera.errors import InputError

    values = dict(before)
    settings: Sequence[Setting] = SETTINGS
    while True:
        values = _merged(values, _ask(values, settings))
        try:
            validate(values)
        except InputError as error:
            if not _at_terminal() or not _again(str(error)):
                raise
            settings = SETTINGS
            continue
        checks = [] if no_check else run_checks(values)
        failed = [item for item in checks if item.ok is False]
        told = "\n".join(f"FAIL {item.name}: {item.text}" for item in failed)
        if not failed or not _at_terminal() or not _again(told):
            return values, checks
        of_them = {name for item in failed for name in _TRIED[item.name]}
        settings = tuple(setting for setting in SETTINGS if setting.variable in of_them)


def _again(told: str) -> bool:
    click.echo(told, err=True)
    return click.confirm("Answer that again?", default=True, err=True)


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _set_variables() -> dict[str, str]:
    return {s.variable: os.environ[s.variable] for s in SETTINGS if os.environ.get(s.variable)}


def _merged(before: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, str]:
    """The answers over what was there; ``-`` and nothing remove a value."""
    values = {**before, **{name: answer.strip() for name, answer in answers.items()}}
    return {name: value for name, value in values.items() if value not in ("", _NONE)}


def _ask(before: Mapping[str, str], settings: Sequence[Setting]) -> dict[str, str]:
    from tessera.errors import InputError

    click.echo("Return keeps what stands in brackets, - removes it.", err=True)
    answers: dict[str, str] = {}
    try:
        for setting in settings:
            if not _of_no_server(setting, answers):
                answers[setting.variable] = _answer(setting, before)
        return answers
    except click.Abort:
        if _at_terminal():
            raise
        raise InputError(
            "There is nobody to ask here; give the answers as options, or as variables with "
            "--from-env."
        ) from None


def _of_no_server(setting: Setting, answers: Mapping[str, str]) -> bool:
    """Whether the question is about an MLflow server that was just said not to be there."""
    server = answers.get(_MLFLOW, _NONE).strip() if _MLFLOW in answers else "?"
    return setting.variable.startswith("MLFLOW_") and server in ("", _NONE)


def _answer(setting: Setting, before: Mapping[str, str]) -> str:
    """Asked again, with the reason, until the answer can be right by its form."""
    from tessera.errors import InputError

    old = before.get(setting.variable, "")
    shown = f" [{'kept' if setting.secret else old}]" if old else ""
    while True:
        answer: str = click.prompt(
            f"{setting.question}{shown}",
            default=old,
            show_default=False,
            hide_input=setting.secret,
            err=True,
        )
        try:
            validate_one(setting.variable, answer.strip())
        except InputError as error:
            if not _at_terminal():
                raise
            click.echo(f"{error}", err=True)
            continue
        return answer


def validate_one(variable: str, value: str) -> None:
    """Refuse a value whose form is wrong; ``InputError`` says what was expected."""
    from tessera.errors import InputError
    from tessera.ledger.prices import (
        DOWN_VARIABLE,
        PRICE_VARIABLE,
        UP_VARIABLE,
        choose_price,
        choose_traffic_price,
    )
    from tessera.tracking.server import without_password

    if value in ("", _NONE):
        return
    if variable == _ROOT and (found := _bucket_of(value)):
        raise InputError(f"{value!r} is a bucket's web address; write {found}.")
    if variable == _ROOT and "://" not in value:
        raise InputError(
            f"{value!r} is a folder of this machine; a rented machine needs one that it can reach: "
            "--root s3://bucket/prefix."
        )
    if variable in (_MLFLOW, _ENDPOINT) and not value.startswith(("http://", "https://")):
        raise InputError(
            f"{variable} is {without_password(value)!r}; expected a URL that begins with https:// "
            "or http://."
        )
    if variable == PRICE_VARIABLE and choose_price(variable=value).usd_per_hour == 0:
        raise InputError(
            f"{variable} is {value}, and no rented machine costs nothing: its runs would be shown "
            "as free; give its price, or - for none."
        )
    if variable in (UP_VARIABLE, DOWN_VARIABLE):
        choose_traffic_price(variable=value, name=variable)
    if variable == "TESSERA_ALERT_WEBHOOK":
        from tessera.tracking.webhooks import webhooks

        webhooks({variable: value})


def _bucket_of(url: str) -> str | None:
    """``s3://bucket/prefix`` of Amazon's web address of it; None for what is none."""
    found = re.fullmatch(
        r"https?://(?:([^/.]+(?:\.[^/]+)*?)\.)?s3[.-](?:[a-z0-9-]+\.)?amazonaws\.com(/.*)?", url
    )
    if found is None:
        return None
    path = (found[2] or "").strip("/")
    whole = "/".join(part for part in (found[1], path) if part)
    return f"s3://{whole or 'bucket/prefix'}"


def _warnings(values: Mapping[str, str]) -> list[str]:
    """What works on this machine and will not on a rented one."""
    from tessera.tracking.server import without_password

    return [
        f"{name} is {without_password(values[name])}, which is this machine alone: a rented one "
        "does not reach it."
        for name in (_ENDPOINT, _MLFLOW)
        if (urlsplit(values.get(name, "")).hostname or "") in _HERE
        or (urlsplit(values.get(name, "")).hostname or "").startswith("127.")
    ]


_HERE = frozenset({"localhost", "::1", "0.0.0.0", "host.docker.internal"})


def validate(values: Mapping[str, str]) -> None:
    """Refuse, before anything is tried, what cannot be right; ``InputError`` names the option."""
    from tessera.errors import InputError

    root = values.get("TESSERA_ROOT", "")
    if not root:
        raise InputError(
            "No root was given; a rented machine needs one that it can reach: --root "
            "s3://bucket/prefix."
        )
    for variable, value in values.items():
        validate_one(variable, value)
    missing = [
        setting.option
        for setting in SETTINGS
        if setting.variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        and root.startswith(("s3://", "s3a://"))
        and not values.get(setting.variable)
    ]
    if missing:
        raise InputError(
            f"A rented machine cannot open {root} without {' and '.join(missing)}: answer that "
            "question, or set the variable and use --from-env."
        )


def run_checks(values: Mapping[str, str]) -> list[Check]:
    """Use the root, MLflow and the vast.ai key, each by itself."""
    from tessera.cloud.probe import variables

    ours: dict[str, str | None] = {s.variable: values.get(s.variable) for s in SETTINGS}
    # A profile of this machine, or a session of it, would not be there on the rented one.
    ours |= {"AWS_PROFILE": None, "AWS_SESSION_TOKEN": None, "AWS_ENDPOINT_URL_S3": None}
    checks = []
    with variables(ours):
        checks.append(_try("root", lambda: _root(values["TESSERA_ROOT"])))
    if uri := values.get("MLFLOW_TRACKING_URI"):
        checks.append(_try("MLflow", lambda: _mlflow(uri, values)))
    checks.append(_try("vast.ai", _vast, counts=False))
    return checks


def _try(name: str, work: Callable[[], str], *, counts: bool = True) -> Check:
    from tessera.errors import RetryElsewhereError, TesseraError

    try:
        return Check(name, True if counts else None, work())
    except TesseraError as error:
        unknown = not counts and isinstance(error, RetryElsewhereError)
        return Check(name, False if counts else None, str(error), unknown)


def _root(url: str) -> str:
    from tessera.cloud.probe import clock_named, probe_root

    found = probe_root(url)
    ahead = found.clock_ahead_s
    clock = "" if not ahead else f"; this machine's clock {clock_named(ahead)} its own"
    return (
        f"{url}: {found.size / 1e6:.1f} MB written at {found.write_bytes_per_s / 1e6:,.1f} MB/s, "
        f"read back at {found.read_bytes_per_s / 1e6:,.1f} MB/s and removed, "
        f"{found.latency_s * 1e3:,.0f} ms a listing{clock}."
    )


def _mlflow(uri: str, values: Mapping[str, str]) -> str:
    from tessera.cloud.probe import probe_mlflow

    name = values.get("MLFLOW_TRACKING_USERNAME", "")
    version = probe_mlflow(uri, name, values.get("MLFLOW_TRACKING_PASSWORD", ""))
    return f"{uri}: MLflow {version} answers." if version else f"{uri} is no server: not asked."


def _vast() -> str:
    from tessera.cloud.vast import VastClient, find_key

    if find_key() is None:
        return "no key here; to rent there, `vastai set api-key KEY`."
    with VastClient(tries=2, patience_s=10.0) as client:
        client.user()
    return "the key works."


def _tell(
    checks: list[Check], path: Path, written: bool, values: Mapping[str, str], as_json: bool
) -> None:
    if as_json:
        names = [s.variable for s in SETTINGS if s.variable in values]
        document = {
            "file": str(path),
            "written": written,
            "variables": names,
            "checks": [asdict(item) for item in checks],
            "warnings": _warnings(values),
        }
        print_json(document)
        return
    for item in checks:
        sign = {True: "ok  ", False: "FAIL", None: "    "}[item.ok]
        click.echo(f"{'?   ' if item.unknown else sign} {item.name}: {item.text}")
    for sentence in _warnings(values):
        click.echo(f"!    {sentence}")
    if written:
        click.echo(f"Wrote {path}, which only you can read. Next, for cents (docs/first-run.md):")
        click.echo("tessera launch experiments/smoke.yaml --task sky/smoke_cpu.yaml")
