"""Whether a running run could go on for less: arithmetic, a pretend market, an alert a day."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tessera.cli import _exp_offers as offers
from tessera.cli import exp_alerts
from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.cloud import skypilot
from tessera.cloud.cards import card_named
from tessera.cloud.offers import Market, Offer
from tessera.errors import InputError
from tessera.runs import Attempt, Run
from tessera.tracking.history import read_history
from tessera.tracking.queries import summarise_run
from tessera.tracking.told import HOUR
from tests.cloud.offered import H100, H200, other
from tests.services.vast import PretendVast

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer

CARD = card_named("H100 SXM")
assert CARD is not None
ATTEMPT = Attempt(
    number=1, token="ab", started_at=0.0, provider="vast", instance="i-1", host="box",
    device="NVIDIA H100 80GB HBM3", devices=1, usd_per_hour=3.0, price_source="provider",
    billed_from=0.0, billed_from_source="provider",
)  # fmt: skip
RUN = offers.Standing(
    run_id="big-1a2b", attempt=ATTEMPT, card=CARD, step=1000, usd_per_hour=3.0, hours_left=10.0,
    lost_hours=0.5, down_bytes=20 * 10**9,
)  # fmt: skip
CHEAP = other(H100, usd_per_hour=1.95)  # $2.00 with its disk, $0.02 a GB from the root


def test_what_moving_saves() -> None:
    saving = offers.best_saving(RUN, [other(H100, usd_per_hour=2.5), CHEAP])
    assert saving is not None
    assert saving.left_usd == pytest.approx(30.0)
    assert saving.moving_usd == pytest.approx((0.5 + 0.25) * 2.0 + 20 * 0.02)
    assert saving.usd == pytest.approx(30.0 - 20.0 - 1.9)
    assert saving.worth_telling


@pytest.mark.parametrize(
    ("hours_left", "price", "told"),
    [
        (10.0, 2.40, True),
        (10.0, 2.55, False),  # less than a tenth of what is left
        (1.0, 1.50, False),  # less than a dollar
        (0.2, 0.05, False),  # moving costs more than it saves
    ],
)
def test_what_is_worth_telling(hours_left: float, price: float, told: bool) -> None:
    offer = other(CHEAP, usd_per_hour=price, storage_usd_per_hour=None)
    saving = offers.best_saving(replace(RUN, hours_left=hours_left), [offer])
    assert (saving is not None and saving.worth_telling) is told


@pytest.mark.parametrize(
    "offer",
    [
        other(H200, usd_per_hour=0.5),
        other(CHEAP, gpus=2),
        other(CHEAP, bid=True),
        other(CHEAP, enabled=False),
        other(CHEAP, usd_per_hour=3.5),
    ],
)
def test_what_is_no_place_to_move_to(offer: Offer) -> None:
    assert offers.best_saving(RUN, [offer]) is None


# -- a run in a root -------------------------------------------------------------------------------


def training(bench: Bench, **changes: Any) -> tuple[Run, Writer]:
    """A run on an H100 at $6 an hour, ten hours from its end."""
    run = bench.create("big", steps=100_000)
    changes = {"device": "NVIDIA H100 80GB HBM3", "usd_per_hour": 6.0, "instance": "i-9", **changes}
    writer = bench.launch(run, **changes)
    writer.steps(1, 20)
    writer.journal.metric("train/tokens_per_s", 1000.0, 20)
    writer.journal.metric("forecast/seconds_left", 36_000.0, 20)
    writer.journal.flush()
    return run, writer


def standing(bench: Bench, run: Run) -> offers.Standing | None:
    now = bench.clock()
    history = read_history(run, now=now)
    return offers.standing_of(history, summarise_run(bench.root, run, now=now))


def test_how_a_run_stands(bench: Bench) -> None:
    run, writer = training(bench)
    found = standing(bench, run)
    assert found is not None
    assert (found.card, found.step, found.usd_per_hour) == (CARD, 20, 6.0)
    assert found.hours_left == 10.0
    assert found.lost_hours == pytest.approx(10 * 1000 / 2 / 1000 / 3600)
    assert found.down_bytes > 100_000 * 1000 * 2, "the shards and the state"
    writer.journal.metric(HOUR, 5.0, 20)
    writer.journal.flush()
    found = standing(bench, run)
    assert found is not None
    assert found.usd_per_hour == 5.0, "a price that moved"
    writer.kill()
    bench.clock.now += 100
    assert standing(bench, run) is None, "it died"


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"usd_per_hour": None}, {"provider": "local"}]
)
def test_runs_that_cannot_be_compared(bench: Bench, changes: dict[str, Any]) -> None:
    run, writer = training(bench, **changes)
    assert standing(bench, run) is None
    writer.kill()


def test_the_command_is_that_of_the_last_launch(bench: Bench) -> None:
    command = offers.launch_command(bench.root, RUN, CHEAP)
    assert command == (
        "`tessera launch` with its experiment file and --provider vast --gpu 'H100 SXM'"
    )
    for number, file in enumerate(("old.yaml", "new.yaml")):
        record = {"run_id": RUN.run_id, "experiment": file, "set": ["seed=7"]}
        bench.root.publish_json(f"launches/2026030{number}T0-ab.json", record)
        bench.root.publish_json(f"launches/2026030{number}T0-ab.end.json", {"outcome": "x"})
    bench.root.publish_json("launches/20260309T0-ab.json", {"run_id": "another"})
    assert offers.launch_command(bench.root, RUN, CHEAP) == (
        "`tessera launch new.yaml --set seed=7 --provider vast --gpu 'H100 SXM'`"
    )


@pytest.fixture
def vast(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendVast]:
    with PretendVast() as server:
        monkeypatch.setenv("VAST_URL", server.url)
        monkeypatch.setenv("VAST_API_KEY", "a-key")
        yield server


def no_skypilot(*_: object) -> Market:
    raise InputError("SkyPilot is not installed here.")


def test_without_skypilot_vast_alone_is_asked(
    vast: PretendVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skypilot, "catalog_market", no_skypilot)
    monkeypatch.chdir(Path(__file__).parents[2])
    assert CARD is not None
    market = offers.ask_market(CARD, 1)
    assert {offer.card for offer in market.offers} == {CARD}
    assert {offer.source for offer in market.offers} == {"live"}
    assert "SkyPilot is not installed here." in market.notes[0]
    monkeypatch.delenv("VAST_API_KEY")
    market = offers.ask_market(CARD, 1)
    assert market.offers == ()
    assert "No vast.ai key here" in market.notes[1]


@pytest.fixture
def command(
    bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(exp_alerts, "time", SimpleNamespace(time=bench.clock))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_command(exp, ["alerts", *arguments, "--root", bench.root.url])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_alerts_offers_tells_a_cheaper_machine_once_a_day(
    bench: Bench,
    vast: PretendVast,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(skypilot, "catalog_market", no_skypilot)
    _, writer = training(bench)
    code, out, err = command("--offers", "--json")
    assert code == 0
    assert "SkyPilot's catalogs were not asked" in err
    (alert,) = json.loads(out)
    assert (alert["kind"], alert["step"]) == ("offer", 20)
    assert "has H100 SXM for $" in alert["text"]
    assert "(offered now), this machine costs $6.00: moving would save about $" in alert["text"]
    assert "--provider vast --gpu 'H100 SXM' goes on from it." in alert["text"]
    assert len(json.loads(command("--offers", "--json")[1])) == 1
    writer.kill()
