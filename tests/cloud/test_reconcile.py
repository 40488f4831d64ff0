from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tessera.cloud.reconcile import Lodger, ask_vast, worth_recording
from tessera.cloud.sky_records import catalog_invoices, sky_records
from tessera.cloud.vast import VastCharge, VastClient, VastInstance
from tessera.errors import ProviderError
from tessera.ledger.invoices import Invoice
from tests.cloud.conftest import KEY, Rent
from tests.services.vast import PretendVast

NOW = 1_800_000_000.0


class Told:
    """A client that tells what a test wants told."""

    def __init__(self, charges: list[dict[str, Any]], instances: list[dict[str, Any]]) -> None:
        self._charges = [VastCharge.model_validate(row) for row in charges]
        self._instances = [VastInstance.model_validate(row) for row in instances]
        self.since: float | None = None

    def instances(self) -> list[VastInstance]:
        return self._instances

    def charges(self, start: float, end: float | None = None) -> list[VastCharge]:
        self.since = start
        return self._charges


def lodger(instance: str = "C.7", ended: float = -3600.0, **changes: Any) -> Lodger:
    fields = {
        "name": f"run/{instance}", "provider": "vast", "instance": instance,
        "billed_from": NOW - 7200, "ended_at": NOW + ended, "alive": False, **changes,
    }  # fmt: skip
    return Lodger(**fields)


def charge(source: str = "instance-7", amount: Any = 3.0, **changes: Any) -> dict[str, Any]:
    return {
        "type": "instance", "source": source, "start": NOW - 86400, "end": NOW, "amount": amount,
        "description": "", "metadata": {"label": "job-0123abcd-head"}, "items": [], **changes,
    }  # fmt: skip


def item(kind: str, amount: Any) -> dict[str, Any]:
    return {"type": kind, "description": "x", "amount": amount, "items": []}


def living(number: int = 7, age_s: float = 7200.0, **changes: Any) -> dict[str, Any]:
    return {
        "id": number, "label": "job-0123abcd-head", "actual_status": "running", "dph_total": 2.0,
        "storage_total_cost": 0.05, "start_date": NOW - age_s, "gpu_name": "H100 SXM", **changes,
    }  # fmt: skip


def ask(
    charges: list[dict[str, Any]], instances: list[dict[str, Any]], *lodgers: Lodger
) -> tuple[list[Invoice], tuple[str, ...], list[str]]:
    """Invoices, instances without one, and the reasons why machines are idle."""
    found = ask_vast(Told(charges, instances), lodgers, NOW)  # type: ignore[arg-type]
    return list(found.invoices), found.unbilled, [machine.why for machine in found.idle]


# -- invoices --------------------------------------------------------------------------------------


def test_a_charge_becomes_an_invoice_by_category() -> None:
    items = [item("gpu", 2.0), item("disk", 0.5), item("bwu", 0.2), item("Internet down", 0.1),
             item("tax", 0.1), item("gpu", None)]  # fmt: skip
    ((invoice,), unbilled, idle) = ask([charge(items=items, extra=[1])], [], lodger())
    assert invoice.by_category == pytest.approx(
        {"gpu": 2.0, "storage": 0.5, "traffic": 0.3, "other": 0.2}
    )
    assert invoice.usd == pytest.approx(3.0)
    assert (invoice.counts, invoice.partial, invoice.label) == (True, False, "job-0123abcd-head")
    assert (invoice.started_at, invoice.ended_at, invoice.fetched_at) == (NOW - 86400, NOW, NOW)
    assert invoice.lines[0]["extra"] == [1], "kept as it came"
    assert (unbilled, idle) == ((), [])


def test_several_charges_of_an_instance_add_up() -> None:
    rows = [charge(amount=1.0), charge(amount=0.5, start=NOW - 10 * 86400), charge("instance-8")]
    ((invoice,), _, _) = ask([*rows, charge(amount=-0.25)], [], lodger())
    assert invoice.usd == pytest.approx(1.25), "a credit counts as well"
    assert invoice.started_at == NOW - 10 * 86400


def test_an_instance_that_lives_has_a_partial_invoice() -> None:
    ((invoice,), _, _) = ask([charge()], [living()], lodger())
    assert (invoice.usd, invoice.partial, invoice.counts) == (3.0, True, False)
    ((invoice,), _, _) = ask([], [living()], lodger())
    assert (invoice.usd, invoice.partial, invoice.by_category) == (4.0, True, {"gpu": 4.0})
    ((invoice,), _, _) = ask([charge()], [], lodger(alive=True))
    assert invoice.partial


def test_charges_that_end_days_before_the_attempt_did_are_partial() -> None:
    for before, partial in ((23 * 3600, False), (25 * 3600, True)):
        ((invoice,), _, _) = ask([charge(end=NOW - 3600 - before)], [], lodger())
        assert invoice.partial is partial


@pytest.mark.parametrize("amount", [None, "NaN", float("nan"), "much"])
def test_a_charge_without_a_figure_is_no_invoice(amount: Any) -> None:
    assert ask([charge(amount=amount)], [], lodger()) == ([], ("C.7",), [])
    ((invoice,), _, _) = ask([charge(amount=amount, items=[item("gpu", 2.0)])], [], lodger())
    assert invoice.usd == 2.0


def test_what_nobody_told_a_charge_for_is_named() -> None:
    lodgers = lodger(), lodger("C.9"), lodger("pod", provider="runpod")
    assert ask([charge()], [], *lodgers)[1] == ("C.9",)


def test_a_machine_that_did_not_know_its_id_is_found_by_its_cluster() -> None:
    ((invoice,), _, idle) = ask([charge()], [], lodger("job/host-1"))
    assert (invoice.instance, invoice.usd) == ("job/host-1", 3.0)
    assert ask([charge()], [], lodger("job-2/host-1"))[1] == ("job-2/host-1",)
    assert idle == []


def test_charges_are_asked_for_from_before_the_first_bill() -> None:
    told = Told([], [])
    ask_vast(told, [lodger(), lodger(billed_from=NOW - 99999)], NOW)  # type: ignore[arg-type]
    assert told.since == NOW - 99999 - 86400
    told = Told([], [])
    ask_vast(told, [lodger("pod", provider="runpod")], NOW)  # type: ignore[arg-type]
    assert told.since is None


def test_the_pretend_bill_and_the_invoice_agree(
    vast: PretendVast, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = rent()
    vast.use_traffic(number, up_gb=12.0, down_gb=3.0)
    vast.set_price(number, 1.2)
    with VastClient(KEY, vast.url) as client:
        client.destroy(number)
        now = time.time()
        at = lodger(f"C.{number}", billed_from=now - 60, ended_at=now)
        ((invoice,),) = [ask_vast(client, [at], now).invoices]
    (line,) = vast.bill()
    assert invoice.usd == pytest.approx(line["usd"])
    assert invoice.counts


def test_a_later_invoice_replaces_an_earlier_one_but_no_whole_by_a_part() -> None:
    ((whole,), _, _) = ask([charge()], [], lodger())
    ((more,), _, _) = ask([charge(amount=3.5)], [], lodger())
    ((part,), _, _) = ask([charge(amount=4.0)], [living()], lodger())
    assert worth_recording(whole, None)
    assert worth_recording(part, None)
    assert worth_recording(whole, part)
    assert worth_recording(more, whole)
    assert not worth_recording(whole, whole)
    assert not worth_recording(part, whole)


# -- machines that bill for nobody -----------------------------------------------------------------


def test_a_machine_is_idle_when_no_run_uses_it() -> None:
    gone = lodger(ended=-601.0)
    (why,) = ask([], [living()], gone)[2]
    assert why == "its last attempt (run/C.7) ended 10 min ago"
    (why,) = ask([], [living()], lodger("C.8"))[2]
    assert why == "no run of this root was ever on it"
    assert ask([], [living()], lodger(ended=-599.0))[2] == [], "it may still be leaving"
    assert ask([], [living()], gone, lodger(alive=True, ended=0.0))[2] == []
    assert ask([], [living()], lodger("job/host", alive=True, ended=0.0))[2] == []
    (why,) = ask([], [living()], lodger(ended=-5 * 3600.0))[2]
    assert why.endswith("ended 5.0 h ago")
    (why,) = ask([], [living()], lodger(ended=-5 * 86400.0))[2]
    assert why.endswith("ended 5 days ago")


def test_a_young_machine_may_be_starting() -> None:
    assert ask([], [living(age_s=1799)])[2] == []
    assert len(ask([], [living(age_s=1801)])[2]) == 1
    assert ask([], [living(age_s=60, actual_status=None)])[2] == []
    assert len(ask([], [living(start_date=None)])[2]) == 1, "nobody knows how old it is"


def test_a_stopped_machine_goes_on_paying_for_its_disk() -> None:
    found = ask_vast(Told([], [living(actual_status="exited", age_s=60)]), [], NOW)  # type: ignore[arg-type]
    (machine,) = found.idle
    assert machine.usd_per_hour == 0.05
    assert machine.why.endswith("it is exited, its disk goes on costing")
    assert machine.stop == "vastai destroy instance 7"
    free = living(actual_status="exited", storage_total_cost=0.0)
    assert ask([], [free])[2] == []


def test_a_machine_without_a_price_is_named_all_the_same() -> None:
    found = ask_vast(Told([], [living(dph_total="NaN")]), [], NOW)  # type: ignore[arg-type]
    assert [machine.usd_per_hour for machine in found.idle] == [None]


# -- SkyPilot's records ----------------------------------------------------------------------------


def cluster(**changes: Any) -> Mapping[str, Any]:
    return {
        "name": "job", "usage_intervals": [(NOW - 7200, NOW - 3600)], "total_cost": 2.5,
        "resources": object(), "cloud": "Lambda", **changes,
    }  # fmt: skip


def test_a_record_of_skypilot_is_a_catalogs_figure() -> None:
    at = lodger("job/host", provider="lambda")
    (invoice,) = catalog_invoices([cluster(), cluster(name="other")], [at], NOW)
    assert (invoice.usd, invoice.source, invoice.counts) == (2.5, "catalog", False)
    assert (invoice.provider, invoice.instance, invoice.partial) == ("lambda", "job/host", False)
    assert invoice.lines[0]["cloud"] == "Lambda"
    assert "resources" not in invoice.lines[0]
    (invoice,) = catalog_invoices([cluster(usage_intervals=[(NOW - 7200, None)])], [at], NOW)
    assert invoice.partial


@pytest.mark.parametrize(
    "record",
    [
        {"total_cost": None}, {"usage_intervals": None}, {"usage_intervals": [(1, 2)]},
        {"usage_intervals": [(NOW, None)]}, {"name": "job-2"},
    ],
)  # fmt: skip
def test_a_record_of_another_time_or_name_is_not_its(record: dict[str, Any]) -> None:
    at = lodger("job/host", provider="lambda")
    assert catalog_invoices([cluster(**record)], [at], NOW) == []


def test_vast_and_ones_own_machine_need_no_record() -> None:
    lodgers = [lodger("job/host"), lodger("job/host", provider="local")]
    assert catalog_invoices([cluster()], lodgers, NOW) == []


def test_skypilot_that_fails_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def report(days: int) -> str:
        asked.append(days)
        return "id"

    sky = SimpleNamespace(cost_report=report, get=lambda request: [cluster()][: request == "id"])
    monkeypatch.setitem(sys.modules, "sky", sky)
    assert len(sky_records([lodger(billed_from=NOW - 3 * 86400)], NOW)) == 1
    assert asked == [5]

    def fail(request: str) -> None:
        raise RuntimeError("no server here.\nTraceback")

    sky.get = fail
    with pytest.raises(ProviderError, match=r"records cannot be read \(no server here\); see `sky"):
        sky_records([lodger(provider="lambda")], NOW)


def test_without_skypilot_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sky", None)
    with pytest.raises(ProviderError, match="SkyPilot is not installed here"):
        sky_records([lodger(provider="lambda")], NOW)
