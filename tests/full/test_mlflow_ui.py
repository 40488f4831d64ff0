"""MLflow's page in a real browser: the saved views, and ``tessera-exp ui`` that opens them.

The views' form is undocumented, so this is what a release of MLflow has to pass before it is added
to ``saved_views.CHECKED_VERSIONS``. The screenshots of docs/mlflow-ui.md are made here:

    TESSERA_SCREENSHOTS=docs/images python -m pytest tests/full/test_mlflow_ui.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tessera.tracking.saved_views import page, views
from tests.full.voices import FINAL_LOSS, STEPS, TOKENS_PER_STEP, voices_root
from tests.services.browser import chromium
from tests.tracking.fabricate import Bench, Clock
from tests.tracking.fabricate import bench as bench

CHECKOUT = Path(__file__).parents[2]
PATIENCE_MS = 20_000
COLUMNS = ("final/cost_usd", "final/loss", "final/usd_per_mtok", "tessera.interview")
_SCREENSHOTS = os.environ.get("TESSERA_SCREENSHOTS")  # read before the tests' clean environment


@dataclass(frozen=True)
class Shown:
    """``tessera-exp ui`` at work: the address that it printed, and the ids of the runs."""

    process: subprocess.Popen[str]
    url: str
    runs: dict[str, str]

    @property
    def base(self) -> str:
        return self.url.split("/#/")[0]

    @property
    def experiment(self) -> str:
        found = re.search(r"/experiments/(\d+)/", self.url)
        assert found, self.url
        return found[1]


def processes() -> str:
    """Command lines of all processes."""
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The server that the command starts, on a root of six runs; it stops on SIGTERM."""
    folder = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(folder, Clock(), patch)
        runs = {run.record.name: run.id for run in voices_root(bench)}
    command = ["-c", "from tessera.cli.exp import main; main()", "ui", "--no-open"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TESSERA_"))}
    process = subprocess.Popen(
        [sys.executable, *command, "--root", bench.root.url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**kept, "PYTHONPATH": str(CHECKOUT), "TESSERA_ENV_FILE": os.devnull},
    )  # fmt: skip
    try:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("MLflow: "):
                break
        assert lines[0].startswith("Synced 6 runs into "), lines
        at_work = processes()
        yield Shown(process, lines[-1].removeprefix("MLflow: ").strip(), runs)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert out.endswith("Stopped.\n"), out + err
    assert process.returncode == 0
    port = urlsplit(lines[-1].split()[1]).port
    assert f"--port {port}" in at_work
    assert f"--port {port}" not in processes(), "it left a process behind"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    found = browser.new_page(viewport={"width": 1440, "height": 900})
    found.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield found
    found.close()


def settle(tab: Page) -> None:
    """Close what MLflow puts beside or over the page at a first visit."""
    close = tab.get_by_role("button", name="Close", exact=True)
    if close.count():
        close.first.click()
    banner = tab.get_by_role("button", name="Hide banner")
    if banner.count():
        banner.first.click()


def keep(tab: Page, name: str, folder: Path) -> None:
    """A screenshot, small enough for a repository."""
    tab.wait_for_timeout(1500)  # transitions
    place = CHECKOUT / _SCREENSHOTS if _SCREENSHOTS else folder
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"mlflow-{name}.png"
    tab.screenshot(path=path)
    assert path.stat().st_size < 300_000


def test_the_page_that_ui_opens_draws_loss_against_dollars(
    shown: Shown, tab: Page, tmp_path: Path
) -> None:
    tab.goto(shown.url)
    expect(tab.get_by_role("button", name="Loss vs dollars").first).to_be_visible()
    expect(tab.locator(".xtitle").first).to_be_visible()
    settle(tab)
    charts = tab.locator(".js-plotly-plot")
    expect(charts).to_have_count(3)
    expect(charts.nth(0).locator(".xtitle")).to_have_text("cost/usd_so_far")
    expect(charts.nth(1).locator(".xtitle")).to_have_text("final/cost_usd")
    expect(charts.nth(1).locator(".ytitle")).to_have_text("final/loss")
    # What Plotly drew: each run's line ends at its dollars and its last loss (MLflow draws it
    # twice, once smoothed).
    drawn = charts.nth(0).evaluate(
        "plot => plot.data.filter(t => t.x && t.x.length > 1).map(t => [t.x.at(-1), t.y.at(-1)])"
    )
    assert {(round(usd, 2), round(loss, 2)) for usd, loss in drawn} == {
        (18.0, FINAL_LOSS["small"]), (36.0, FINAL_LOSS["steady"]), (72.0, FINAL_LOSS["wide"]),
        (54.0, FINAL_LOSS["hasty"]), (6.0, 2.1), (6.0, 2.4),
    }  # fmt: skip
    keep(tab, "loss-vs-dollars", tmp_path)


def test_the_table_has_dollars_loss_rate_and_interview_sorted_by_dollars(
    shown: Shown, tab: Page, tmp_path: Path
) -> None:
    tab.goto(page(shown.base, shown.experiment, views()[1]))
    expect(tab.get_by_text(shown.runs["wide"]).first).to_be_visible()
    settle(tab)
    for column in COLUMNS:
        expect(tab.locator(".ag-header-cell").filter(has_text=column)).to_be_visible()
    cells = tab.locator("[col-id='tags.`tessera.interview`'].ag-cell")
    expect(cells.filter(has_text="1.00, 0 fatal (ep1, honest)")).to_be_visible()
    expect(cells.filter(has_text="0.00, 1 fatal, 1 unanswered (ep1, honest)")).to_be_visible()
    rows = {
        row.get_attribute("row-index"): row.inner_text().split("\n")[1:4]
        for row in tab.locator(".ag-center-cols-container .ag-row").all()
    }
    dollars = [float(rows[str(place)][0]) for place in range(6)]
    assert dollars == sorted(dollars) == [6, 6, 18, 36, 54, 72]
    rate = 72 / (STEPS * TOKENS_PER_STEP / 1e6)
    assert [float(cell) for cell in rows["5"]] == pytest.approx([72, FINAL_LOSS["wide"], rate])
    columns = tab.locator(".ag-header-cell")
    places = [columns.filter(has_text=name).bounding_box() for name in COLUMNS]
    assert [place["x"] for place in places if place] == sorted(p["x"] for p in places if p)
    keep(tab, "runs", tmp_path)


def test_the_note_begins_with_the_conclusion_and_both_views_are_in_the_menu(
    shown: Shown, tab: Page
) -> None:
    tab.goto(page(shown.base, shown.experiment))
    bold = tab.get_by_text(re.compile(r"Pretraining on sample: .*reached 2\.7100 nats a token"))
    expect(bold.first).to_be_visible()
    settle(tab)
    tab.get_by_role("button", name=re.compile("[Vv]iews?$")).first.click()
    for view in views():
        expect(tab.get_by_text(view.name).first).to_be_visible()


def test_a_key_that_is_gone_is_told_and_the_page_still_works(shown: Shown, tab: Page) -> None:
    """What a person meets whose bookmark is older than the views."""
    tab.goto(shown.url.replace("tesseraLossVsDollars", "noSuchView"))
    expect(tab.get_by_text(re.compile('share key "noSuchView" does not exist'))).to_be_visible()
    expect(tab.get_by_text(shown.runs["wide"]).first).to_be_visible()
