"""``tessera preflight``: is this machine worth its price? A table, a verdict, an exit code."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tessera.cli.common import F, epilog, json_option, not_empty, print_json

if TYPE_CHECKING:
    from tessera.cloud.machine import Machine
    from tessera.cloud.preflight import Check, Findings, Wanted
    from tessera.experiment import Experiment

_STYLES = {"go": "green", "note": "yellow", "no-go": "bold red"}


def _limit(name: str, default: float, text: str) -> Callable[[F], F]:
    """An option that is a threshold, and its variable."""
    return click.option(
        f"--{name}",
        type=click.FloatRange(min=0),
        default=default,
        show_default=True,
        envvar=f"TESSERA_PREFLIGHT_{name.upper().replace('-', '_')}",
        help=text,
    )


@click.command(
    epilog=epilog(
        "tessera preflight experiments/tessera_1b.yaml --gpu H100 --root s3://bucket/tessera",
        "tessera preflight experiments/smoke.yaml --json",
    )
)
@click.argument("experiment", type=click.Path(), required=False)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting of the experiment; may be repeated.",
)
@click.option(
    "--root", envvar="TESSERA_ROOT", metavar="URL", callback=not_empty,
    help="Try this root too; also TESSERA_ROOT.",
)  # fmt: skip
@click.option("--gpu", metavar="NAME", help="Part of what nvidia-smi must report; TESSERA_GPU.")
@click.option("--gpus", metavar="N", help="How many of them; TESSERA_GPUS, else 1. Alone: any.")
@click.option("--bench/--no-bench", default=None, help="Measure steps; default: on a GPU.")
@_limit("min-speed", 0.8, "Share of the tokens/s measured for this card.")
@_limit("min-projected-speed", 0.5, "The same where they are only projected from another card.")
@_limit("min-power", 0.9, "Share of the card's default power limit and clocks.")
@_limit("max-saving", 0.5, "Say so if sending takes more of the time between checkpoints.")
@_limit("min-upload", 1.0, "MB/s, measured twice, below which checkpoints that late are a no-go.")
@_limit("max-skew", 60.0, "Seconds between the clocks of this machine and of the store.")
@_limit("patience", 300.0, "Seconds to wait for a root that does not answer.")
@json_option
def preflight(
    experiment: str | None,
    overrides: tuple[str, ...],
    root: str | None,
    gpu: str | None,
    gpus: str | None,
    bench: bool | None,
    as_json: bool,
    **limits: float,
) -> int:
    """Look at this machine before EXPERIMENT is trained on it: GPU, disk, root, clock, speed.

    On a rented machine a no-go counts as a refusal in the root, see TESSERA_MAX_REFUSALS. Nothing
    is asked of a GPU where none is wanted; TESSERA_DEVICE=cpu looks at the GPU and leaves it alone.

    Exit codes: 0 go; 2 bad input, or one machine too many was refused; 75 another machine may help.
    """
    from tessera.cloud.machine import describe_machine
    from tessera.cloud.nvidia import summary
    from tessera.cloud.preflight import Limits, look, wanted_from
    from tessera.errors import InputError
    from tessera.experiment import load_experiment

    if overrides and experiment is None:
        raise InputError("--set changes an experiment, and none was given; name one.")
    settings = load_experiment(experiment, overrides) if experiment else None
    given = {**os.environ, **({"TESSERA_GPU": gpu} if gpu else {})}
    wanted = wanted_from({**given, **({"TESSERA_GPUS": gpus} if gpus else {})}, on_cpu=_on_cpu())
    asked = [experiment, *(f"--set={item}" for item in overrides)] if experiment else []
    findings = look(
        settings,
        asked,
        root,
        wanted,
        Limits(
            speed=limits["min_speed"],
            projected_speed=limits["min_projected_speed"],
            power=limits["min_power"],
            saving=limits["max_saving"],
            upload=limits["min_upload"] * 1e6,
            skew_s=limits["max_skew"],
            patience_s=limits["patience"],
        ),
        bench=wanted.uses_gpu if bench is None else bench,
        said=lambda what: click.echo(f"preflight: {what}", err=True),
    )
    price = settings.price if settings else None
    machine = describe_machine(
        experiment_price=price.usd_per_hour if price else None,
        hardware=(summary(findings.gpus), len(findings.gpus) or 1),
    )
    _remember(findings, machine, root)
    document = document_of(findings, machine, wanted, settings, limits)
    _record(document, root)
    if as_json:
        print_json(document)
    else:
        _print(document)
    return _verdict(findings, machine, wanted, root)


def _on_cpu() -> bool:
    """``TESSERA_DEVICE``, without loading torch for it."""
    from tessera.errors import InputError

    word = os.environ.get("TESSERA_DEVICE") or "auto"
    if word not in ("auto", "cpu"):
        raise InputError(f"TESSERA_DEVICE is {word!r}; expected auto or cpu.")
    return word == "cpu"


def _remember(findings: Findings, machine: Machine, root: str | None) -> None:
    """Name this host if it was refused before; a root that does not answer was told already."""
    from tessera.cloud.refusals import refused_before
    from tessera.errors import TesseraError
    from tessera.storage import open_root

    if root is None or any(check.name == "root" for check in findings.against):
        return
    try:
        before = refused_before(open_root(root), machine, [gpu.uuid for gpu in findings.gpus])
    except TesseraError:
        return
    if before:
        times = f"{len(before)} times" if len(before) > 1 else "once"
        findings.go("host", before[-1].place, f"refused before, {times}: {before[-1].reason}")


def document_of(
    findings: Findings,
    machine: Machine,
    wanted: Wanted,
    experiment: Experiment | None,
    limits: dict[str, float],
) -> dict[str, Any]:
    """What ``--json`` prints and the root keeps."""
    return {
        "at": time.time(),
        "go": not findings.against,
        "exit_code": findings.exit_code,
        "experiment": experiment.name if experiment else None,
        "wanted": wanted.text,
        "machine": {
            "provider": machine.provider,
            "instance": machine.instance,
            "machine": machine.machine,
            "host": machine.host,
            "gpus": [asdict(gpu) for gpu in findings.gpus],
        },
        "checks": [asdict(check) for check in findings.checks],
        "projection": _projection(findings, machine, experiment),
        "limits": limits,
    }


def _projection(
    findings: Findings, machine: Machine, experiment: Experiment | None
) -> dict[str, Any]:
    """Hours and dollars of the whole experiment at the measured speed, training steps alone."""
    from tessera.experiment import Pretrain

    price, speed = machine.price, findings.tokens_per_s
    tokens = experiment.tokens if isinstance(experiment, Pretrain) else None
    hours = tokens / speed / 3600 if tokens and speed else None
    usd = hours * price.usd_per_hour if hours and price.usd_per_hour is not None else None
    return {
        "tokens": tokens,
        "tokens_per_s": speed,
        "hours": hours,
        "usd": usd,
        "usd_per_hour": price.usd_per_hour,
        "price_source": price.source,
    }


def _record(document: dict[str, Any], root: str | None) -> None:
    """Keep it in the root, if that takes it: ``preflights/<job>/<time>-<token>.json``."""
    from tessera.cloud.refusals import job_of
    from tessera.errors import TesseraError
    from tessera.storage import open_root

    unusable = any(c["name"] == "root" and c["code"] for c in document["checks"])
    if root is None or unusable:
        return
    name = f"{document['at']:.0f}-{secrets.token_hex(4)}"
    try:
        open_root(root).publish_json(f"preflights/{job_of()}/{name}.json", document)
    except TesseraError as error:
        click.echo(f"preflight: not recorded: {error}", err=True)


def _print(document: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "what", "found"):
        table.add_column(name)
    for check in document["checks"]:
        told = ": ".join(part for part in (check["found"], check["reason"]) if part)
        verdict = Text(check["verdict"], style=_STYLES[check["verdict"]])
        table.add_row(verdict, check["name"], Text(told))
    console.print(table)
    found = document["projection"]
    if found["hours"] is not None:
        usd = "no price known" if found["usd"] is None else f"${found['usd']:,.2f}"
        rate = f" at ${found['usd_per_hour']:g}/h ({found['price_source']})" if found["usd"] else ""
        console.print(
            f"{document['experiment']}: {found['tokens']:,} tokens, "
            f"{found['tokens_per_s']:,.0f} tokens/s, {found['hours']:,.2f} h, {usd}{rate}."
        )
    console.print("Go." if document["go"] else "No-go.")


def _told(checks: Iterable[Check]) -> str:
    return "; ".join(f"{c.name}: {c.found}: {c.reason}" for c in checks)


def _verdict(findings: Findings, machine: Machine, wanted: Wanted, root: str | None) -> int:
    """0, or the sentence that ends it; on a rented machine one that counts."""
    from tessera.cloud.machine import LOCAL
    from tessera.cloud.nvidia import summary
    from tessera.cloud.preflight import INPUT
    from tessera.cloud.refusals import forgive, refuse
    from tessera.errors import InputError, RetryElsewhereError, TesseraError
    from tessera.storage import open_root

    if not findings.against:
        if machine.provider != LOCAL and root is not None:
            try:
                forgive(open_root(root))
            except TesseraError as error:
                click.echo(f"preflight: earlier refusals still count: {error}", err=True)
        return 0
    reason = _told(findings.against)
    if findings.exit_code == INPUT:
        rest = [check for check in findings.against if check.code != INPUT]
        also = f" Against this machine: {_told(rest)}." if rest else ""
        everywhere = _told(check for check in findings.against if check.code == INPUT)
        raise InputError(f"No-go, and no other machine would change that: {everywhere}.{also}")
    if machine.provider == LOCAL or [check.name for check in findings.against] == ["root"]:
        # A store that is down says nothing against the machine, and nothing could be counted in it.
        raise RetryElsewhereError(f"No-go: {reason}; another machine or moment may help.")
    raise refuse(
        open_root(root),
        machine,
        wanted=wanted.text,
        found=summary(findings.gpus),
        reason=reason,
        gpus=[gpu.uuid for gpu in findings.gpus],
    )
