"""Live offers against a pretend vast.ai over HTTP: what is taken, and what a fault leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from tessera.cloud.cards import card_named
from tessera.cloud.offers import Needs, with_live
from tessera.cloud.vast import VastClient
from tests.cloud.offered import H100, H200, other
from tests.services.vast import PretendVast, offer

CATALOG = (other(H100, source="catalog", usd_per_hour=1.87, storage_usd_per_hour=None), H200)
NEEDS = Needs(
    card=None, reported="H100 80GB HBM3", gpus=1, disk_gb=200.0, cpus=8.0, memory_gb=None,
    max_usd_per_hour=4.5,
)  # fmt: skip
KEY = "5ecret-of-the-account"


@pytest.fixture
def vast() -> Iterator[PretendVast]:
    with PretendVast() as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAST_API_KEY", KEY)


def client(vast: PretendVast) -> Callable[[], VastClient]:
    """One try, so that a fault shows at once; the client's own tests are about trying again."""
    return partial(VastClient, url=vast.url, tries=1, timeout_s=0.5)


def test_live_offers_take_the_place_of_the_catalog_s_of_vast(vast: PretendVast) -> None:
    market = with_live(CATALOG, NEEDS, client=client(vast))
    assert market.notes == ()
    *live, runpod = market.offers
    assert runpod == H200
    assert [o.number for o in live] == [103, 101, 102]  # the PCIe card and the 5090 left out
    first = live[0]
    assert first.source == "live"
    assert first.usd_per_hour == pytest.approx(1.55)
    assert first.storage_usd_per_hour == pytest.approx(0.15 * 200 / 730)
    assert (first.usd_per_gb_up, first.usd_per_gb_down) == (0.004, 0.003)
    assert first.reliability == 0.9962
    assert first.region == "Quebec, CA"
    # SkyPilot rents by type, never a chosen offer, at a price that it does not know.
    assert first.instance_type == "1x-H100_SXM-32-65536"
    assert first.catalog_usd_per_hour == 1.87
    assert not first.bid


def test_a_bid_takes_the_offers_that_it_wins(vast: PretendVast) -> None:
    market = with_live(CATALOG, NEEDS, bid=1.10, client=client(vast))
    *live, _ = market.offers
    assert {o.number for o in live} == {103, 101}
    assert all(o.bid and o.usd_per_hour == 1.10 for o in live)


def test_a_bid_that_wins_nothing_is_said(vast: PretendVast) -> None:
    market = with_live(CATALOG, NEEDS, bid=0.05, client=client(vast))
    assert market.offers == (H200,)
    assert "at a bid of $0.05/h" in market.notes[0]


@pytest.mark.parametrize(
    ("needs", "numbers"),
    [
        ({"max_usd_per_hour": 1.60}, [103]),
        ({"cpus": 64.0}, []),
        ({"disk_gb": 5000.0}, []),
        ({"memory_gb": 512.0}, []),
        ({"gpus": 8}, []),
    ],
)
def test_what_the_task_needs(
    vast: PretendVast, needs: dict[str, float], numbers: list[int]
) -> None:
    market = with_live(CATALOG, replace(NEEDS, **needs), client=client(vast))  # type: ignore[arg-type]
    assert [o.number for o in market.offers if o.source == "live"] == numbers


def test_a_card_that_was_asked_for(vast: PretendVast) -> None:
    nvl = other(H100, source="catalog", gpu="H100 PCIe", instance_type="1x-H100_PCIE-32-65536")
    needs = replace(NEEDS, card=card_named("H100 PCIe"), reported="")
    market = with_live([nvl], needs, client=client(vast))
    assert [(o.number, o.instance_type) for o in market.offers] == [(104, nvl.instance_type)]


@pytest.mark.parametrize("fault", ["500", "429", "nonsense", "silence", "403"])
def test_a_fault_is_a_sentence_and_the_catalog_remains(vast: PretendVast, fault: str) -> None:
    vast.fault(fault, times=99)
    market = with_live(CATALOG, NEEDS, client=client(vast))
    assert market.offers == CATALOG
    (sentence,) = market.notes
    assert sentence.startswith("vast.ai (http://127.0.0.1")
    assert sentence.endswith("The prices of vast.ai below are the catalog's.")
    assert KEY not in sentence


def test_a_wrong_key_still_shows_what_is_open_to_all(vast: PretendVast) -> None:
    vast.key = "another"
    market = with_live(CATALOG, NEEDS, client=client(vast))
    assert market.offers[0].source == "live"


def test_no_offer_is_said(vast: PretendVast) -> None:
    vast.offers = []
    market = with_live(CATALOG, NEEDS, client=client(vast))
    assert market.offers == (H200,)
    assert "has no machine now that fits;" in market.notes[0]


def test_an_offer_whose_price_is_gone_is_left_out(vast: PretendVast) -> None:
    # The server adds prices up, so a NaN of the GPU's reaches the answer's totals too.
    vast.offers = [
        offer(1, "H100 SXM", float("nan"), 1.0, "Texas, US"),
        offer(2, "H100 SXM", 2.0, 1.0, "Texas, US"),
    ]
    market = with_live(CATALOG, NEEDS, client=client(vast))
    assert [o.number for o in market.offers if o.source == "live"] == [2]


def test_a_live_card_that_skypilot_has_no_type_for_cannot_be_launched(vast: PretendVast) -> None:
    anything = replace(NEEDS, reported="H100")
    market = with_live(CATALOG, anything, client=client(vast))
    pcie = next(o for o in market.offers if o.number == 104)
    assert pcie.instance_type == ""


def test_without_a_key_nothing_is_asked(
    vast: PretendVast, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.delenv("VAST_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    market = with_live(CATALOG, NEEDS, client=client(vast))
    assert market.offers == CATALOG
    assert "No vast.ai key" in market.notes[0]
    assert vast.requests == []


def test_a_task_without_a_gpu_asks_nothing(vast: PretendVast) -> None:
    market = with_live(CATALOG, replace(NEEDS, gpus=0), client=client(vast))
    assert market.offers == CATALOG
    assert vast.requests == []
