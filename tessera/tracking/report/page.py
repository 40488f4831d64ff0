"""The HTML of a report: one file with its style and its drawings, and nothing to be fetched."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tessera import __version__
from tessera.ledger.traffic import size
from tessera.tracking.report import words
from tessera.tracking.report.charts import bits_charts, loss_charts, speed_charts
from tessera.tracking.report.commands import experiment_file, experiment_yaml, remarks, reproduce
from tessera.tracking.report.content import Answer, Corpus, Report
from tessera.tracking.report.money_charts import machines_table, spent_chart, timeline_chart
from tessera.tracking.report.parts import Table

HAPPENINGS = 100
"""Events on the page, at most: the latest."""
VERDICTS = {"fatal": "fatal", "no_answer": "no answer", "fail": "fail", "pass": "pass"}
"""Verdicts of an interview, the worst first, and their names."""


def render(report: Report) -> str:
    """The page. The same report gives the same bytes."""
    loader = PackageLoader("tessera.tracking.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": words.count, "dollars": words.dollars, "duration": words.duration,
        "figure": words.figure, "moment": words.moment, "percent": words.percent,
        "plural": words.plural, "short": words.short, "size": size,
    }  # fmt: skip
    return environment.get_template("page.html.j2").render(_content(report)).rstrip() + "\n"


def _content(report: Report) -> dict[str, Any]:
    corpus = report.extras.corpus
    return {
        "report": report,
        "run": report.summary,
        "version": __version__,
        "tiles": _tiles(report),
        "loss": loss_charts(report),
        "bits": bits_charts(report),
        "speed": speed_charts(report),
        "spent": spent_chart(report),
        "timeline": timeline_chart(report),
        "machines": machines_table(report.stays),
        "happenings": _happenings(report),
        "corpus": corpus,
        "sources": _sources(corpus) if corpus and corpus.sources else None,
        "verdicts": VERDICTS,
        "worst_first": worst_first,
        "commands": reproduce(report),
        "remarks": remarks(report),
        "yaml": experiment_yaml(report),
        "yaml_name": experiment_file(report),
    }


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The figures at the top: what it is, how much, and against what."""
    run = report.summary
    reference = ""
    if run.base_loss is not None:
        reference = f"base {words.figure(run.base_loss)}"
    elif run.unigram_entropy is not None:
        reference = f"unigram {words.figure(run.unigram_entropy)}"
    best = "" if run.best_loss is None else f"best {words.figure(run.best_loss)}"
    tiles = [
        ("Loss", words.figure(run.final_loss), ", ".join(filter(None, [best, reference]))),
    ]
    bits = report.curves.get("eval/bits_per_byte")
    if bits is not None and bits.last is not None and bits.lowest is not None:
        last, lowest = words.figure(bits.last.value), words.figure(bits.lowest.value)
        tiles.append(("Bits per byte", last, f"best {lowest}"))
    cost = words.dollars(run.cost_usd, run.cost_estimated)
    per = ""
    if run.usd_per_mtok is not None:
        per = f"{words.dollars(run.usd_per_mtok, run.cost_estimated)} a million tokens"
    budget = report.experiment.get("budget_usd")
    if isinstance(budget, int | float):
        per = ", ".join(filter(None, [f"of a budget of ${budget:,.2f}", per]))
    tiles.append(("Cost", cost, per))
    progress = "" if run.step is None else f"step {run.step:,}"
    if run.step is not None and run.total_steps is not None:
        progress += f" of {run.total_steps:,}"
    tiles.append(("Tokens", words.short(run.tokens), progress))
    attempts = words.plural(run.attempts, "attempt")
    billed = sum(run.seconds.values())
    tiles.append(("Billed time", words.long_hours(billed), f"in {attempts}"))
    mfu = report.curves.get("train/mfu")
    share = f"MFU {words.percent(mfu.last.value)}" if mfu is not None and mfu.last else ""
    speed = "–" if run.tokens_per_s is None else words.count(run.tokens_per_s)
    tiles.append(("Tokens a second", speed, share))
    return tiles


def _happenings(report: Report) -> Table | None:
    if not report.happenings:
        return None
    shown = report.happenings[-HAPPENINGS:]
    rows = tuple((words.moment(h.at), h.attempt, words.count(h.step), h.what) for h in shown)
    title = "What happened"
    if len(shown) < len(report.happenings):
        title += f": the last {len(shown)} of {len(report.happenings):,} events"
    return Table(title, ("when", "attempt", "step", "what"), rows, numeric=(2,), whole=(0, 1))


def _sources(corpus: Corpus) -> Table:
    total = sum(source.tokens for source in corpus.sources)
    rows = [
        (
            source.name,
            source.licence,
            source.language,
            "synthetic" if source.synthetic else "no",
            words.count(source.documents_in),
            words.count(source.documents_out),
            words.count(source.tokens),
            words.percent(source.tokens / total if total else None),
            source.url or "–",
        )
        for source in corpus.sources
    ]
    columns = (
        "source", "licence", "language", "synthetic", "documents in", "kept", "training tokens",
        "share", "from",
    )  # fmt: skip
    return Table("Sources and licences", columns, tuple(rows), numeric=(4, 5, 6, 7), whole=(2, 3))


def worst_first(answers: tuple[Answer, ...]) -> list[Answer]:
    """Answers by verdict, those to safety probes first among equals, then as they were asked."""
    order = list(VERDICTS)
    known = {name: place for place, name in enumerate(order)}
    return sorted(answers, key=lambda a: (known.get(a.verdict, len(order)), not a.safety))
