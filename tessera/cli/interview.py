"""``tessera interview``: ask a voice the probes, show what it said, rank several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tessera.cli.common import epilog, json_option, print_json, root_option

if TYPE_CHECKING:
    from tessera.evaluation.verdicts import InterviewResult
    from tessera.runs import Run
    from tessera.storage import Root

_SUITE = "experiments/interview.yaml"
_COLOURS = {"pass": "green", "fail": "yellow", "fatal": "bold red", "no_answer": "magenta"}


@click.group(
    epilog=epilog(
        "tessera interview run smoke-sft-warm --adapter ep4",
        "tessera interview rank",
    )
)
def interview() -> None:
    """Ask a voice the probes of a suite, judge its answers, and show them."""


_adapter_option = click.option(
    "--adapter", metavar="NAME", help="Adapter of the run, such as ep4; default: its last one."
)


@interview.command(
    epilog=epilog(
        "tessera interview run smoke-sft-warm --adapter ep4",
        "tessera interview run smoke-sft-warm --adapter ep4 --suite experiments/interview.yaml",
    )
)
@click.argument("run", metavar="RUN")
@_adapter_option
@click.option(
    "--suite",
    type=click.Path(),
    help="The probes; default: experiments/interview.yaml, here or beside the package.",
)
@root_option
@click.option("--again", is_flag=True, help="Ask even if the same weights were asked before.")
@json_option
def run(
    run: str, adapter: str | None, suite: str | None, root: str, again: bool, as_json: bool
) -> None:
    """Interview an adapter of RUN (a run id, or the name of an experiment with one run)."""
    from tessera.evaluation.suite import load_suite

    questions = load_suite(suite or _default_suite())  # before torch: a typo is told at once
    from tessera.runs import find_run
    from tessera.storage import open_root

    place = open_root(root)
    found = find_run(place, run, kind="sft")
    name = adapter or _last_adapter(found)
    from tessera.evaluation.interview import stored_interview

    result = None if again else stored_interview(found, questions.digest, name)
    if result is not None:
        click.echo(
            f"reusing the interview of {found.id} {name}: same weights, same suite", err=True
        )
    else:
        result = _hold(place, found, name, questions)
    if as_json:
        print_json(result.to_json())
    else:
        _print_transcript(result, only_greedy=True)
        where = "" if root == ".tessera" else f" --root {root}"
        click.echo(f"Every answer: tessera interview show {found.id} --adapter {name}{where}")


def _default_suite() -> Path:
    """The suite of this folder, else the one of the checkout that the package was taken from."""
    import tessera
    from tessera.errors import InputError

    here, beside = Path(_SUITE), Path(tessera.__file__).parents[1] / _SUITE
    for path in (here, beside):
        if path.is_file():
            return path
    raise InputError(
        f"There is no {_SUITE} in {Path.cwd()} nor in {beside.parents[1]}; give the probes with "
        "--suite FILE."
    )


def _hold(root: Root, run: Run, adapter: str, suite: Any) -> InterviewResult:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from tessera.evaluation.interview import hold_interview, store_interview
    from tessera.evaluation.weights import load_voice

    voice = load_voice(root, run, adapter)
    console = Console(stderr=True)
    columns = (TextColumn("interview"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("interview", total=len(list(suite.questions())))
        result = hold_interview(
            voice, suite, run_id=run.id, adapter=adapter, asked=lambda q, a: bar.advance(task)
        )
    store_interview(run, result)
    return result


@interview.command(epilog=epilog("tessera interview show smoke-sft-warm --adapter ep4"))
@click.argument("run", metavar="RUN")
@_adapter_option
@root_option
@json_option
def show(run: str, adapter: str | None, root: str, as_json: bool) -> None:
    """Show the stored transcripts of RUN."""
    from tessera.errors import InputError
    from tessera.evaluation.interview import stored_interviews
    from tessera.runs import find_run
    from tessera.storage import open_root

    found = find_run(open_root(root), run, kind="sft")
    results = [r for r in stored_interviews(found) if adapter in (None, r.adapter)]
    if not results:
        raise InputError(
            f"Run {found.id} has no interview{f' of {adapter}' if adapter else ''} yet; hold one "
            f"with `tessera interview run {found.id}`."
        )
    if as_json:
        print_json([result.to_json() for result in results])
        return
    for result in results:
        _print_transcript(result)


@interview.command(
    epilog=epilog(
        "tessera interview rank",
        "tessera interview rank smoke-sft-warm smoke-sft-brief --json",
    )
)
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@root_option
@json_option
def rank(runs: tuple[str, ...], root: str, as_json: bool) -> None:
    """Rank interviewed adapters, best first.

    Fewest fatal answers, then fewest unanswered safety probes, then the highest score, then the
    lowest loss on held-out conversations.
    """
    from tessera.cli.ranking import rank_interviews
    from tessera.errors import InputError
    from tessera.runs import find_run, list_runs
    from tessera.storage import open_root

    place = open_root(root)
    chosen = [find_run(place, name, kind="sft") for name in runs] or [
        run for run in list_runs(place) if run.record.kind == "sft"
    ]
    rows = rank_interviews(chosen)
    if not rows:
        raise InputError(
            f"No adapter in {place.url} was interviewed; hold one with `tessera interview run`."
        )
    if as_json:
        print_json(rows)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("run", "adapter", "fatal", "safety unanswered", "score", "held-out loss"):
        table.add_column(heading, justify="left" if heading in ("run", "adapter") else "right")
    for row in rows:
        loss = row["heldout_loss"]
        table.add_row(
            row["run_id"],
            row["adapter"],
            str(row["fatal"]),
            str(len(row["unanswered_safety"])),
            f"{row['score']:.2f}",
            "-" if loss is None else f"{loss:.3f}",
        )
    Console().print(table)


def _last_adapter(run: Run) -> str:
    from tessera.errors import InputError

    names = run.root.children(run.path("adapters"))
    if not names:
        raise InputError(f"Run {run.id} has no adapter yet; finish its first epoch.")
    return max(names, key=lambda name: (len(name), name))  # ep10 comes after ep9


def _print_transcript(result: InterviewResult, only_greedy: bool = False) -> None:
    """Answers with their verdicts; ``only_greedy`` leaves out the seeded samples."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    title = f"{result.run_id} {result.adapter}: suite {result.suite}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("asked", "answered", "verdict", "why"):
        table.add_column(heading, overflow="fold")
    for probe in result.probes:
        safety = " (safety)" if probe.safety else ""
        title = f"{probe.title}{safety}: {probe.pass_rate:.0%} passed"
        table.add_row(Text(title, style="bold"), "", "", "", end_section=False)
        for answer in probe.answers:
            if only_greedy and answer.sample_index:
                continue
            how = "greedy" if answer.sample_index == 0 else f"sample {answer.sample_index}"
            why = "" if answer.check is None else f"{answer.check}: {answer.detail}"
            table.add_row(
                Text(f"{answer.question} [{how}]"),
                Text(" ".join(answer.answer.split()) or "(nothing)"),
                Text(answer.verdict.replace("_", " "), style=_COLOURS[answer.verdict]),
                Text(why),
            )
        table.add_section()
    console.print(table)
    unanswered = ", ".join(result.unanswered_safety) or "none"
    console.print(
        f"score {result.score:.2f}; fatal answers {len(result.fatal)}; safety probes unanswered: "
        f"{unanswered}; {result.wall_seconds:.1f} s",
        highlight=False,
    )
