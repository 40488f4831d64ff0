from __future__ import annotations

import errno
import importlib
import importlib.resources
import math
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.cli.exp_report import page_of
from tessera.experiment import load_experiment, parse_experiment
from tessera.ledger.invoices import Invoice
from tessera.runs import Run, create_or_open
from tessera.tracking.annotations import annotate
from tessera.tracking.checkpoints import summarise_checkpoints
from tessera.tracking.history import ALIVE_S, bill_all, read_history
from tessera.tracking.queries import summarise_attempts, summarise_run
from tessera.tracking.report.charts import loss_charts
from tessera.tracking.report.commands import experiment_file, experiment_yaml, reproduce
from tessera.tracking.report.content import Curve, Report
from tessera.tracking.report.curves import BEYOND, BITS, EVAL, MOST, TRAIN, thin
from tessera.tracking.report.gather import gather, without_secrets
from tessera.tracking.report.money_charts import spent_chart, timeline_chart
from tessera.tracking.report.page import render
from tessera.tracking.report.parts import ROWS, Chart, sample
from tessera.tracking.report.reading import read_run
from tessera.tracking.report.svg import WIDTH_IN

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

long_runs = importlib.import_module("long_run")
fabricate = importlib.import_module("fabricate")


def report_of(bench: Bench, run: Run) -> Report:
    return gather(bench.root, run)


def chart(charts: list[Chart], name: str) -> Chart:
    return next(found for found in charts if found.id == name)


def expect_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same figures, sums of floats in another order; but for what the page does not show."""
    assert found.keys() == expected.keys()
    for name in found.keys() - {"metrics"}:
        assert found[name] == pytest.approx(expected[name]), name


# -- figures ---------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_tables(bench: Bench) -> None:
    run = long_runs.long_run(bench, steps_between=2000)
    report = report_of(bench, run)
    history = read_history(run)
    expect_equal(asdict(report.summary), asdict(summarise_run(bench.root, run)))
    attempts = summarise_attempts(history, bill_all([history]))
    for stay, attempt in zip(report.stays, attempts, strict=True):
        expect_equal(asdict(stay.attempt), asdict(attempt))
    assert report.summary.cost_usd is not None
    assert report.usd_by_category is not None
    assert sum(report.usd_by_category.values()) == pytest.approx(report.summary.cost_usd)
    assert report.usd_by_category["lost"] > 3
    expect_equal(asdict(report.checkpoints), asdict(summarise_checkpoints(history)))
    page = page_of(bench.root, run)
    for text in (f"${report.summary.cost_usd:,.2f}", "3.1927", "1.0468", "24,504,827,904",
                 "lost to preemption", "$2.31/h", "rolled back", "went back to step 288,000",
                 "ODC-By 1.0", "synthetic", "removed 1,204,551 documents", long_runs.DIGEST[:12],
                 "git checkout 9f3c1d2e", "MFU"):  # fmt: skip
        assert text in page, text


def test_the_last_point_has_cost_what_the_run_did(bench: Bench) -> None:
    report = report_of(bench, long_runs.long_run(bench, steps_between=2000))
    for key in (TRAIN, EVAL, BITS):
        last = report.curves[key].last
        assert last is not None
        assert last.tokens == pytest.approx(24_504_827_904, rel=0.01)
    last = report.curves[EVAL].last
    assert last is not None
    assert last.usd == pytest.approx(report.summary.cost_usd)
    assert last.hours == pytest.approx(sum(report.summary.seconds.values()) / 3600)
    assert last.tokens == 24_504_827_904


def test_work_that_was_lost_is_in_the_dollars_of_later_points(bench: Bench) -> None:
    run = bench.create(steps=20)
    first = bench.launch(run)
    first.steps(1, 10)
    first.checkpoint(10)
    first.steps(11, 15)
    first.kill()
    bench.clock.now += ALIVE_S
    second = bench.launch(run, instance="i-2", usd_per_hour=7.2)
    second.steps(11, 20)
    second.end("FINISHED", 20)
    points = {point.step: point for point in report_of(bench, run).curves[TRAIN].points}
    assert sorted(points) == list(range(1, 21))
    assert points[10].usd == pytest.approx(0.010)
    assert points[11].usd == pytest.approx(0.015 + 0.002)  # five steps were paid for twice
    assert points[20].usd == pytest.approx(0.015 + 0.020)
    assert points[20].hours == pytest.approx(25 / 3600)
    assert points[11].tokens == 11_000
    assert points[11].value == pytest.approx(10 / 11 + 0.002)


def test_the_tracks_are_the_points_of_the_surviving_lineage(bench: Bench) -> None:
    run = long_runs.long_run(bench, steps_between=2000)
    points = read_history(run).points
    for key, track in read_run(run, (TRAIN, EVAL, BITS, "train/mfu")).tracks.items():
        expected = sorted((p.step, p.time, p.number) for p in points if p.key == key)
        assert list(zip(*(column.tolist() for column in track.sorted()), strict=True)) == expected
        assert len(expected) > 50


def test_a_journal_that_is_not_whole_is_told(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    run = bench.finished()
    (path,) = bench.root.files(run.path("journal"))
    lines = bench.root.read_bytes(path).splitlines(keepends=True)
    bench.root.publish(path, b"".join(lines[:-3]))
    assert report_command(bench, "base") == 2
    assert f"of {len(lines)} records" in capfd.readouterr().err


def test_a_bill_takes_the_place_of_the_estimate(bench: Bench) -> None:
    run = bench.finished(steps=20)
    now = bench.clock.now
    invoice = Invoice("vast", "i-base", "", 0.05, {}, now - 20, now, now, "billed", False)
    bench.root.publish_json(invoice.path, asdict(invoice))
    report = report_of(bench, run)
    last = report.curves[TRAIN].last
    assert last is not None
    assert last.usd == pytest.approx(0.05)
    assert "Billed by the provider: $0.0500. The ledger had counted ~$0.0200." in render(report)


def test_estimates_are_marked(bench: Bench) -> None:
    writer = bench.launch(bench.create(), price_source="catalog")
    writer.steps(1, 30)
    writer.checkpoint(30)
    writer.kill()
    bench.clock.now += ALIVE_S
    report = report_of(bench, writer.run)
    money, timeline = spent_chart(report), timeline_chart(report)
    assert money is not None
    assert timeline is not None
    assert "~$0.0300 in all" in money.sentence
    assert money.table.rows[-1] == ("total", "30 s", "~$0.0300", "100.0 %")
    assert "~$3.6/h" in timeline.sentence
    assert "~ marks an end that nobody told" in timeline.caption
    assert "died" in timeline.drawing


def test_without_a_price_there_is_no_axis_of_dollars(bench: Bench) -> None:
    writer = bench.launch(bench.create(), usd_per_hour=None, price_source="unknown")
    writer.steps(1, 10)
    writer.end("FINISHED", 10)
    report = report_of(bench, writer.run)
    assert [found.id for found in loss_charts(report)] == ["loss-tokens", "loss-hours"]
    page = render(report)
    assert "Billed time by category" in page
    assert "Nobody told the price of an hour" in page
    assert "nan" not in re.sub(r"data-\w+|finance", "", page).lower().split()


# -- charts ----------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf]), max_size=400),
    st.integers(5, 60),
)
def test_thinning_keeps_the_ends_the_extremes_and_what_is_no_number(
    values: list[float], most: int
) -> None:
    found = np.asarray(values, dtype=float)
    kept = thin(found, most)
    assert len(kept) <= most
    assert kept == sorted(set(kept))
    if not values:
        return
    assert {0, len(values) - 1} <= set(kept)
    left, finite = found[kept], found[np.isfinite(found)]
    if len(finite):
        assert np.nanmin(left[np.isfinite(left)]) == finite.min()
        assert np.nanmax(left[np.isfinite(left)]) == finite.max()
    assert (len(finite) < len(values)) == (not np.isfinite(left).all())


def test_many_points_are_thinned_and_it_is_said(bench: Bench) -> None:
    writer = bench.launch(bench.create(steps=5000))
    writer.steps(1, 5000)
    writer.end("FINISHED", 5000)
    report = report_of(bench, writer.run)
    curve = report.curves[TRAIN]
    assert curve.total == 5000
    assert len(curve.points) <= MOST
    found = chart(loss_charts(report), "loss-tokens")
    assert f"{len(curve.points):,} of 5,000 points" in found.caption
    assert len(found.table.rows) <= ROWS
    assert len(sample(curve)) <= ROWS
    assert curve.lowest in sample(curve)


def test_what_is_no_number_is_marked(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 10)
    for step, loss in ((2, 3.0), (4, math.nan), (6, math.inf), (8, 2.0)):
        writer.evaluate(step, loss)
    writer.end("FINISHED", 10)
    report = report_of(bench, writer.run)
    assert report.curves[EVAL].not_finite == 2
    found = chart(loss_charts(report), "loss-tokens")
    assert "2 points of evaluation are no number, marked × at the upper edge" in found.caption
    assert "evaluation: no number" in found.drawing
    assert [row[3] for row in found.table.rows if row[0] == "evaluation"] == [
        "3.0000", "not a number", "infinite", "2.0000",
    ]  # fmt: skip
    assert "from 3.0000 at 2,000 tokens to 2.0000 at 8,000 tokens" in found.sentence


def test_a_long_legend_leaves_the_curves_their_room(bench: Bench) -> None:
    base = {"run_id": bench.finished().id, "weights_digest": "0" * 64}
    writer = bench.launch(bench.create("voice", base=base), instance="i-2")
    writer.evaluate(0, 11.0, base_loss=11.0)
    writer.steps(1, 10)
    for key in ("train/loss", "eval/loss"):
        writer.journal.metric(key, math.nan, 11)
    writer.steps(12, 20)
    writer.checkpoint(20)
    writer.steps(21, 30)
    writer.journal.metric("train/loss", math.nan, 31)
    writer.kill()
    drawing = chart(loss_charts(report_of(bench, writer.run)), "loss-tokens").drawing
    for name in ("training", "training, not saved", "evaluation", "base model", "no number"):
        begins = re.search(rf'x="([\d.]+)"[^>]*>(training: )?{name}</text>', drawing)
        assert begins is not None, name
        assert float(begins[1]) + 5 * len(name) < 72 * WIDTH_IN, name
    width, height = map(float, re.findall(r'<rect [^>]*width="(.*?)" height="(.*?)"', drawing)[-1])
    assert width > 0.75 * 72 * WIDTH_IN
    assert height > 100


def test_only_what_is_no_number(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 2)
    writer.evaluate(2, math.nan)
    writer.end("DIVERGED", 2, exit_code=3)
    page = render(report_of(bench, writer.run))
    assert "diverged" in page
    assert "1 point of evaluation" not in page  # nothing of it is covered by a checkpoint
    assert "Dotted: no checkpoint covers it" in page


def test_every_drawing_says_what_it_shows(bench: Bench) -> None:
    page = page_of(bench.root, long_runs.long_run(bench, steps_between=2000))
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 3 + 3 + 1 + 1 + 2
    for drawing in drawings:
        told = re.search(r'role="img" aria-labelledby="([\w-]+) ([\w-]+)"', drawing)
        assert told is not None
        assert f'<title id="{told[1]}">' in drawing
        description = re.search(rf'<desc id="{told[2]}">([^<]+)</desc>', drawing)
        assert description is not None
        assert re.search(r"\d", description[1])
        assert "#01020" not in drawing  # no stand-in colour is left
    ids = Counter(re.findall(r'\bid="([^"]+)"', page))
    assert [name for name, times in ids.items() if times > 1] == []
    targets = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {one or other for one, other in targets} <= set(ids)
    for name in re.findall(r'aria-labelledby="([^"]+)"', page):
        assert set(name.split()) <= set(ids)


def test_the_same_root_gives_the_same_page(bench: Bench) -> None:
    run = long_runs.long_run(bench, steps_between=5000)
    page = page_of(bench.root, run)
    with mpl.rc_context({"font.size": 20, "axes.grid": False, "svg.fonttype": "path"}):
        assert page_of(bench.root, run) == page
        assert mpl.rcParams["font.size"] == 20


# -- states of a run -------------------------------------------------------------------------------


def test_a_run_without_attempts(bench: Bench) -> None:
    run = bench.create()
    bench.clock.now += ALIVE_S
    page = page_of(bench.root, run)
    for text in ("died", "No loss is recorded yet", "Nothing was billed", "No attempt was started",
                 "no weights published"):  # fmt: skip
        assert text in page, text
    assert "The manifest corpora/sample/" in page  # the made-up one is none, and that is said


def test_a_run_that_goes_on(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 10)
    writer.checkpoint(10)
    writer.steps(11, 13)
    writer.kill()
    bench.clock.now += ALIVE_S - 1
    page = page_of(bench.root, writer.run)
    assert "The run goes on." in page
    assert "recorded for good up to step 10; it has reached step 13" in page
    assert "running" in page


def test_what_no_checkpoint_covers_is_drawn_apart(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 10)
    writer.checkpoint(10)
    writer.steps(11, 30)
    writer.end("DIVERGED", 30, exit_code=3)
    report = report_of(bench, writer.run)
    assert [p.step for p in report.curves[TRAIN].points] == list(range(1, 11))
    beyond = report.curves[BEYOND]
    assert [p.step for p in beyond.points] == list(range(11, 31))
    assert beyond.points[-1].tokens == 30_000
    assert beyond.points[-1].usd == pytest.approx(report.summary.cost_usd)
    found = chart(loss_charts(report), "loss-tokens")
    assert "Training, not saved: from 0.9101 at 11,000 tokens" in found.sentence
    assert "it may have to be done again" in found.caption
    again = bench.launch(writer.run)  # takes over from step 10: what was beyond is lost for good
    again.steps(11, 12)
    again.kill()
    assert [p.step for p in report_of(bench, writer.run).curves[BEYOND].points] == [11, 12]
    again = bench.launch(writer.run)
    again.steps(11, 20)
    again.end("FINISHED", 20)
    assert BEYOND not in report_of(bench, writer.run).curves


def test_a_single_point(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 1)
    writer.end("FINISHED", 1)
    report = report_of(bench, writer.run)
    found = chart(loss_charts(report), "loss-tokens")
    assert found.sentence == "Training: 10.0010 at 1,000 tokens, the only number."


def test_a_fine_tuning_with_its_interviews(bench: Bench) -> None:
    base = long_runs.long_run(bench, steps_between=5000)
    run = long_runs.voice(bench, base)
    report = report_of(bench, run)
    found = chart(loss_charts(report), "loss-tokens")
    assert "Base model: 3.4200." in found.sentence
    assert "base model" in found.drawing
    page = page_of(bench.root, run)
    cards = re.findall(r'<article class="card (\w+)">', page)
    assert cards[:7] == ["fatal"] * 4 + ["no_answer", "pass", "no_answer"]
    for text in ("Good news.", "Score 0.25: 4 fatal, 2 no answer, 0 fail, 2 pass.",
                 "fatal-words: good news", "v12i_ep4", "aaaaaaaaaaaa", base.id,
                 long_runs.DIGEST[:12], f"--set base={base.id}", "voices/warm.jsonl"):  # fmt: skip
        assert text in page, text
    assert "adapter</strong> v12i_ep4" in page_of(bench.root, base)


def test_answers_of_other_weights_are_called_so(bench: Bench) -> None:
    run = bench.with_adapter()
    bench.interview(run, verdict="fatal")
    assert "of other weights" not in page_of(bench.root, run)
    bench.interview(run, adapter_digest="0" * 64)
    assert "These answers are of other weights than the adapter has now." in page_of(
        bench.root, run
    )


def test_the_note_comes_before_the_figures(bench: Bench) -> None:
    run = bench.finished()
    annotate(bench.root, run.id, "note", "Good enough.\nTune on it.")
    annotate(bench.root, run.id, "tag", "Q4", key="milestone")
    annotate(bench.root, run.id, "archive", "yes")
    page = page_of(bench.root, run)
    assert page.index("Good enough.\nTune on it.") < page.index("milestone: Q4")
    assert page.index("milestone: Q4") < page.index('class="tiles"')
    assert "archived" in page


# -- safety ----------------------------------------------------------------------------------------


def test_nothing_that_people_or_models_wrote_becomes_markup(bench: Bench) -> None:
    evil = "</title></desc></svg><script>alert(1)</script><img src=http://x.test/a>$x^2$ & \x07"
    run = bench.with_adapter()
    bench.interview(run, verdict="fatal")
    path = bench.root.files(run.path("interviews"))[0]
    held = bench.root.read_json(path)
    held["probes"][0]["answers"][0]["answer"] = evil
    held["probes"][0]["title"] = evil
    bench.root.publish_json(path, held)
    annotate(bench.root, run.id, "note", evil)
    annotate(bench.root, run.id, "tag", evil, key="tag")
    writer = bench.launch(run, device=evil, instance=evil, price_note=evil)
    writer.end("FAILED", 4)
    page = page_of(bench.root, run)
    markup = re.sub(r"&lt;.*?&gt;", "", page)
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page.lower()
    assert "<img" not in markup.lower()
    assert "default-src 'none'" in page


def test_a_roots_password_is_not_in_the_page(bench: Bench) -> None:
    assert without_secrets("s3://bucket/tessera") == "s3://bucket/tessera"
    assert without_secrets("ftp://ada:secret@host:21/x") == "ftp://host:21/x"
    assert without_secrets("/tmp/a@b") == "/tmp/a@b"


# -- again -----------------------------------------------------------------------------------------


def test_the_experiment_of_the_page_makes_the_same_run(bench: Bench, tmp_path: Path) -> None:
    run = bench.finished()
    report = report_of(bench, run)
    path = tmp_path / experiment_file(report)
    path.write_text(experiment_yaml(report))
    assert load_experiment(path).identity == run.experiment.identity
    lines = reproduce(report)
    assert "git checkout abc123" in lines
    assert lines[-1].startswith(f"tessera train {run.id}.yaml --root ")


# -- the command -----------------------------------------------------------------------------------


def report_command(bench: Bench, *arguments: str) -> int:
    return run_command(exp, ["report", *arguments, "--root", bench.root.url])


def test_the_command_writes_the_page(
    bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = bench.finished()
    assert report_command(bench, "base") == 0
    page = tmp_path / f"{run.id}.html"
    assert page.read_text() == page_of(bench.root, run)
    assert page.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert re.fullmatch(rf"Wrote {run.id}.html \(\d+ kB\)\.\n", capfd.readouterr().out)
    assert report_command(bench, "base", "-o", str(tmp_path / "report.html")) == 0
    assert (tmp_path / "report.html").read_text() == page.read_text()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_full_disk_leaves_the_old_page(
    bench: Bench,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench.finished()
    page = tmp_path / "out" / "page.html"
    page.parent.mkdir()
    page.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert report_command(bench, "base", "-o", str(page)) == 2
    assert capfd.readouterr().err == (
        f"Error: The report cannot be written to {page} (No space left on device); make room or "
        "give another file with -o.\n"
    )
    assert page.read_text() == "old"
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("place", ["missing/page.html", "file/page.html"])
def test_a_missing_folder_is_told_before_anything_is_read(
    bench: Bench, tmp_path: Path, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.finished()
    (tmp_path / "file").write_text("")
    assert report_command(bench, "base", "-o", str(tmp_path / place)) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"Error: There is no folder {(tmp_path / place).parent} for page.html;")
    assert err.count("\n") == 1


def test_an_unknown_run_is_told(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.finished()
    assert report_command(bench, "nobody") == 2
    assert "No run is called 'nobody'" in capfd.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from tessera.cli.exp import exp\n"
        "exp.main(['report', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'mlflow', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_is_made_without_torch_and_mlflow(bench: Bench) -> None:
    bench.finished()
    code = (
        "import sys\n"
        "from tessera.cli.common import run_command\n"
        "from tessera.cli.exp import exp\n"
        f"assert run_command(exp, ['report', 'base', '--root', {bench.root.url!r}]) == 0\n"
        "assert not {'torch', 'mlflow', 'matplotlib.pyplot', 'sky'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_is_not_installed_is_told(bench: Bench, missing: str) -> None:
    bench.finished()
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from tessera.cli.common import run_command\n"
        "from tessera.cli.exp import exp\n"
        f"raise SystemExit(run_command(exp, ['report', 'base', '--root', {bench.root.url!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: What draws the report is not installed (")
    assert done.stderr.endswith("; run pip install 'tessera[tracking]'.\n")
    assert done.stderr.count("\n") == 1


def test_the_template_and_the_style_are_part_of_the_package() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    told = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]["tessera"]
    folder = importlib.resources.files("tessera.tracking.report")
    others = [f.name for f in folder.iterdir() if f.is_file() and not f.name.endswith(".py")]
    assert sorted(others) == ["page.html.j2", "style.css"]
    assert {f"tracking/report/{name}" for name in others} <= set(told)


def test_a_curve_without_numbers_has_no_ends() -> None:
    empty = Curve("eval/loss", (), 0, 0)
    assert (empty.first, empty.last, empty.lowest, empty.highest) == (None,) * 4


def test_a_budget_is_shown_beside_the_cost(bench: Bench) -> None:
    settings = {
        **fabricate.pretraining("thrifty"),
        "tokens": None,
        "budget_usd": 0.5,
        "schedule": {"name": "linear_decay", "warmup_steps": 1},
    }
    run, _ = create_or_open(
        bench.root, parse_experiment(settings), fingerprint="f" * 64, data={}, commit="abc-dirty"
    )
    writer = bench.launch(run)
    writer.steps(1, 30)
    details = {
        "end_step": 30, "level": 1, "decay_start": 20, "seconds_per_step": 1.0, "usd_so_far": 0.01,
        "usd_per_hour": 3.6,
    }  # fmt: skip
    for step in range(1, 151):
        writer.journal.event("budget/planned", step, **details)
    writer.end("BUDGET", 30)
    page = page_of(bench.root, run)
    for text in ("of a budget of $0.50", "step 30 of 30", "A budget decides where the run ends",
                 "end planned at step 30", "the last 100 of 150 events",
                 "had changes that were not committed", "git checkout abc\n"):  # fmt: skip
        assert text in page, text
    assert page.count("end planned at step 30") == 100


def test_the_browser_is_opened_if_it_is_asked_for(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bench.finished()
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)  # which says that it could not
    assert report_command(bench, "base", "-o", "page.html", "--open") == 0
    assert opened == [(tmp_path / "page.html").as_uri()]
    assert "No browser could be started here" in capfd.readouterr().err
