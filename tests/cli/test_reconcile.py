from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tenacity

from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.runs import list_runs
from tessera.tracking.queries import summarise_run
from tests.services.vast import PretendVast

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer

HOUR = 3600.0


class Account:
    """A pretend account, the runs on its machines, and ``tessera-exp`` in this process."""

    def __init__(self, vast: PretendVast, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
        self.vast, self.bench, self._capfd = vast, bench, capfd
        bench.clock.now = time.time() - 5 * HOUR
        self._http = httpx.Client(base_url=vast.url, headers={"Authorization": "Bearer key"})

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def rent(self, label: str = "job-0123abcd-head") -> int:
        """A machine, rented five hours ago."""
        answer = self._http.put("/api/v0/asks/101/", json={"label": label, "disk": 100})
        number = int(answer.json()["new_contract"])
        began = self.bench.clock()
        self.vast.instances[number]["start_date"] = began
        account = self.vast._accounts[number]
        account.start, account.rates = began, [(began, account.rates[0][1])]
        return number

    def destroy(self, number: int, after_s: float = HOUR) -> None:
        """It ended that long after its start."""
        self._http.request("DELETE", f"/api/v0/instances/{number}/", json={})
        account = self.vast._accounts[number]
        account.end = account.start + after_s

    def launch(self, number: int, name: str = "base", **changes: Any) -> Writer:
        """An attempt of run ``name`` there, at the price that the table shows."""
        return self.bench.launch(
            self.bench.create(name), instance=f"C.{number}", provider="vast", **changes
        )

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = run_command(exp, [*arguments, "--root", self.bench.root.url])
        out, err = self._capfd.readouterr()
        return code, out, err

    def json(self, *arguments: str, code: int = 0) -> Any:
        found, out, err = self(*arguments, "--json")
        assert (found, err) == (code, "")
        return json.loads(out)

    def cost(self, name: str = "base") -> dict[str, Any]:
        """What ``list`` says of the run ``name``."""
        (row,) = [row for row in self.json("list") if row["name"] == name]
        return dict(row)


@pytest.fixture
def account(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Account]:  # fmt: skip
    monkeypatch.setattr("tessera.cloud.vast._WAIT", tenacity.wait_none())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    with PretendVast() as vast:
        monkeypatch.setenv("VAST_URL", vast.url)
        monkeypatch.setenv("VAST_API_KEY", "key")
        account = Account(vast, bench, capfd)
        yield account
        account.close()


def finish(writer: Writer, seconds: float = 100.0, outcome: str = "FINISHED") -> None:
    writer.steps(1, 10, seconds=seconds / 10)
    writer.end(outcome, 10)


def billed(account: Account, number: int) -> float:
    (line,) = [line for line in account.vast.bill() if line["id"] == number]
    return float(line["usd"])


def test_billed_dollars_take_the_place_of_estimated_ones(account: Account) -> None:
    number = account.rent()
    finish(account.launch(number, usd_per_hour=36.0, price_source="catalog"))
    account.vast.use_traffic(number, up_gb=10.0)
    account.destroy(number)
    before = account.cost()
    assert (before["cost_estimated"], before["billed_usd"]) == (True, None)
    assert before["cost_usd"] == pytest.approx(1.0)
    assert "~$1.00" in account("list")[1]

    code, out, err = account("reconcile", "--yes")
    assert (code, err) == (0, "")
    usd = billed(account, number)
    for text in (f"vast/C.{number}", "~$1.00", f"${usd:.2f}", "new", "Recorded 1 in"):
        assert text in out, text
    after = account.cost()
    assert after["cost_usd"] == after["billed_usd"] == pytest.approx(usd)
    assert (after["cost_estimated"], after["ledger_usd"]) == (False, pytest.approx(1.0))
    listed = account("list")[1]
    assert f"${usd:.2f}" in listed
    assert "~" not in listed
    detail = account.json("show", "base")
    assert sum(detail["usd_by_category"].values()) == pytest.approx(usd)
    assert detail["attempt_list"][0]["billed_usd"] == pytest.approx(usd)
    assert detail["attempt_list"][0]["ledger_usd"] == pytest.approx(1.0)
    shown = account("show", "base")[1]
    assert f"${usd:.2f} by the provider; the ledger's estimate was ~$1.00" in shown
    (run,) = list_runs(account.bench.root)
    assert summarise_run(account.bench.root, run).cost_usd == pytest.approx(usd)


def test_a_second_time_changes_nothing(account: Account) -> None:
    number = account.rent()
    finish(account.launch(number))
    account.destroy(number)
    assert account("reconcile", "--yes")[0] == 0
    path = f"bills/vast/C.{number}.json"
    first, cost = account.bench.root.read_bytes(path), account.cost()
    code, out, _ = account("reconcile")
    assert code == 0
    assert "recorded" in out
    assert "Nothing was recorded" not in out
    assert account.bench.root.read_bytes(path) == first
    assert account.cost() == cost


def test_nothing_is_written_without_a_yes(account: Account) -> None:
    number = account.rent()
    finish(account.launch(number))
    account.destroy(number)
    code, out, _ = account("reconcile")
    assert code == 0
    assert "Nothing was recorded (1 new); --yes records it." in out
    found = account.json("reconcile")
    assert [one["recorded"] for one in found["invoices"]] == [False]
    assert account.bench.root.files("bills") == []
    assert account.json("reconcile", "--yes")["invoices"][0]["recorded"] is True
    assert account.bench.root.files("bills") == [f"bills/vast/C.{number}.json"]


def test_a_person_is_asked(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    number = account.rent()
    finish(account.launch(number))
    account.destroy(number)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for answer, files in ((False, 0), (True, 1)):
        monkeypatch.setattr("click.confirm", lambda text, said=answer: said)
        assert account("reconcile")[0] == 0
        assert len(account.bench.root.files("bills")) == files


def test_a_partial_invoice_is_shown_and_replaced_by_the_whole(account: Account) -> None:
    number = account.rent()
    writer = account.launch(number)
    writer.steps(1, 10)
    account.bench.clock.now = time.time()
    writer.steps(11, 12)
    writer.journal.flush()
    code, out, _ = account("reconcile", "--yes")
    assert code == 0, "the attempt is alive: nothing is idle"
    assert "partial: goes on" in out
    row = account.cost()
    assert row["billed_usd"] is None
    assert row["cost_usd"] == row["ledger_usd"]
    assert f"vast/C.{number}: ~$" in account("show", "base")[1]
    writer.end("FINISHED", 12)
    account.destroy(number, 6 * HOUR)
    assert account("reconcile", "--yes")[0] == 0
    assert account.cost()["billed_usd"] == pytest.approx(billed(account, number))


def test_an_instances_dollars_are_shared_out_by_the_ledgers(account: Account) -> None:
    """Two attempts of a run and one of another on one machine; the bill is higher than all."""
    number = account.rent()
    first = account.launch(number, "one", usd_per_gb_up=0.1)
    first.journal.metric("traffic/up_bytes", 1e9, 1)
    finish(first, 100.0, "FAILED")
    finish(account.launch(number, "one"), 200.0)
    finish(account.launch(number, "two"), 300.0)
    account.destroy(number)
    ledger = {name: account.cost(name)["cost_usd"] for name in ("one", "two")}
    assert ledger == pytest.approx({"one": 0.3 + 0.1, "two": 0.3})
    assert account("reconcile", "--yes")[0] == 0
    usd = billed(account, number)
    for name in ledger:
        row = account.cost(name)
        assert row["cost_usd"] == pytest.approx(usd * ledger[name] / 0.7)
        detail = account.json("show", name)
        assert detail["cost_usd"] == pytest.approx(row["cost_usd"])
        assert sum(a["usd"] for a in detail["attempt_list"]) == pytest.approx(row["cost_usd"])
        assert sum(detail["usd_by_category"].values()) == pytest.approx(row["cost_usd"])


def test_a_run_on_several_machines_is_billed_as_far_as_it_is_told(account: Account) -> None:
    known, unknown = account.rent(), 7777
    finish(account.launch(known), outcome="PREEMPTED")
    finish(account.launch(unknown, price_source="catalog"))
    account.destroy(known)
    code, out, _ = account("reconcile", "--yes")
    assert code == 0
    assert "C.7777: no charge is told yet; ask again in some hours." in out
    row = account.cost()
    assert row["billed_usd"] == pytest.approx(billed(account, known))
    assert row["cost_usd"] == pytest.approx(row["billed_usd"] + 0.1)
    assert row["cost_estimated"], "the second machine's price is the catalog's"


def test_a_killed_attempt_is_an_estimate_until_it_was_billed(account: Account) -> None:
    number = account.rent()
    writer = account.launch(number)
    writer.steps(1, 10)
    writer.kill()
    account.bench.clock.now += HOUR
    account.destroy(number)
    assert account.cost()["cost_estimated"]
    account("reconcile", "--yes")
    assert not account.cost()["cost_estimated"]


# -- machines for nobody ---------------------------------------------------------------------------


def test_a_machine_for_nobody_is_named_with_the_command_that_stops_it(account: Account) -> None:
    number = account.rent()
    finish(account.launch(number))
    code, out, err = account("reconcile", "--yes")
    assert (code, err) == (3, "")
    for text in ("billing although no run uses them", f"vast/C.{number}", "H100 SXM", "running",
                 "1.891", "ended 5.0 h ago", f"vastai destroy instance {number}",
                 "1 machine for nobody: $1.89 an hour."):  # fmt: skip
        assert text in " ".join(out.split()), text
    found = account.json("reconcile", code=3)
    assert [one["instance"] for one in found["idle"]] == [f"C.{number}"]
    assert found["idle_usd_per_hour"] == pytest.approx(1.8905, abs=1e-3)
    account.destroy(number)
    assert account("reconcile", "--yes")[0] == 0


def test_an_empty_root_still_finds_them(account: Account) -> None:
    account.bench.root.publish("note", b"")
    number = account.rent()
    found = account.json("reconcile", code=3)
    assert found["invoices"] == []
    assert found["idle"][0]["why"] == "no run of this root was ever on it"
    code, out, err = account("reconcile", "--provider", "runpod")
    assert (code, out) == (2, "")
    assert err == (
        "Error: No run of this root was on 'runpod', so there is no bill to ask for; leave "
        "--provider out, or give vast.\n"
    )
    code, out, err = account("reconcile", "--provider", "local")
    assert (code, out) == (2, "")
    assert err.startswith("Error: Nobody sends a bill for machines of 'local'; leave --provider")
    account.destroy(number)
    code, out, _ = account("reconcile")
    assert (code, out) == (0, "No provider tells a bill for a run of this root.\n")


def test_a_root_that_does_not_exist_is_refused(account: Account, tmp_path: Path) -> None:
    """Every machine would seem to bill for nobody."""
    account.rent()
    assert run_command(exp, ["reconcile", "--root", str(tmp_path / "typo")]) == 2


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code", "what"),
    [
        ("500", 75, "answered 500"),
        ("403", 2, "refuses the key"),
        ("nonsense", 75, "no JSON object"),
    ],
)
def test_a_fault_is_a_sentence_and_changes_nothing(
    account: Account, kind: str, code: int, what: str
) -> None:
    number = account.rent()
    finish(account.launch(number))
    account.destroy(number)
    for path in ("instances", "charges"):
        account.vast.fault(kind, times=4 if kind != "403" else 1, path=path)
        found, out, err = account("reconcile", "--yes")
        assert (found, err.startswith("Error: vast.ai ("), err.count("\n")) == (code, True, 1)
        assert what in err
        assert "Recorded" not in out
        assert account.bench.root.files("bills") == []
    assert account("reconcile", "--yes")[0] == 0


def test_without_a_key_it_is_said_where_runs_need_one(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VAST_API_KEY")
    account.bench.root.publish("note", b"")
    finish(account.bench.launch(account.bench.create("own"), provider="local", instance="here"))
    code, out, err = account("reconcile")
    assert (code, err) == (0, ""), "nobody needs the key"
    assert "vast.ai was not asked, since there is no key here: what bills there is not known" in out
    found = account.json("reconcile")
    assert (found["errors"], found["idle_usd_per_hour"]) == ([], None)  # nobody said 0
    assert account("reconcile", "--provider", "vast.ai")[0] == 75
    finish(account.launch(7))
    code, out, err = account("reconcile")
    assert (code, err.count("\n")) == (75, 1)
    assert err.startswith("Error: vast.ai was not asked, since there is no key here, and runs of")
    assert "No provider tells a bill" not in out


@pytest.mark.parametrize(
    ("end", "provider", "code"),
    [
        ({"may_bill": ["Whether vast.ai still bills is not known."]}, "Vast", 75),
        (None, "Vast", 75),  # followed to no end, such as after --detach
        ({"may_bill": []}, "Vast", 0),
        (None, "RunPod", 0),
    ],
)
def test_without_a_key_a_launch_that_may_bill_is_no_all_clear(
    account: Account,
    monkeypatch: pytest.MonkeyPatch,
    end: dict[str, Any] | None,
    provider: str,
    code: int,
) -> None:
    monkeypatch.delenv("VAST_API_KEY")
    root = account.bench.root
    root.publish_json("launches/1.json", {"name": "pretrain-1", "may_rent": [[provider, "x"]]})
    if end is not None:
        root.publish_json("launches/1.end.json", end)
    found, out, err = account("reconcile", "--json")
    assert found == code
    document = json.loads(out)
    assert document["idle_usd_per_hour"] is None
    assert bool(document["errors"]) == (code == 75)
    assert ("may bill (pretrain-1)" in err) == (code == 75)


def test_a_damaged_invoice_is_named_and_its_run_shown_by_the_ledger(account: Account) -> None:
    number = account.rent()
    finish(account.launch(number))
    account.destroy(number)
    account("reconcile", "--yes")
    path = f"bills/vast/C.{number}.json"
    for data in (b"{", b"[]", b'{"provider": "vast"}'):
        account.bench.root.publish(path, data)
        code, out, err = account("list")
        assert code == 2
        assert f"Error: {path} in " in err
        assert "remove it and run `tessera-exp reconcile` again" in err
        assert "$0.1000" in out
        assert account("show", "base")[0] == 0
    account.bench.root.delete(path)
    assert account("reconcile", "--yes")[0] == 0
    assert account.cost()["billed_usd"] is not None


def test_other_providers_are_skypilots_catalog(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = account.bench.clock()
    report = [{"name": "mine", "usage_intervals": [(began - 60, began + HOUR)], "total_cost": 4.2}]
    sky = SimpleNamespace(cost_report=lambda days: "id", get=lambda request: report)
    monkeypatch.setitem(sys.modules, "sky", sky)
    run = account.bench.create()
    place = {"provider": "lambda", "instance": "mine/host", "price_source": "catalog"}
    finish(account.bench.launch(run, **place))
    code, out, err = account("reconcile", "--yes")
    assert (code, err) == (0, "")
    assert "catalog, not a bill" in out
    row = account.cost()
    assert (row["billed_usd"], row["cost_estimated"]) == (None, True)
    assert "lambda/mine/host: ~$4.20 by the catalog, which is no bill" in account("show", "base")[1]
    sky.get = lambda request: 1 / 0
    code, _, err = account("reconcile")
    assert (code, err.startswith("Error: SkyPilot's records cannot be read")) == (75, True)
    assert account("reconcile", "--provider", "vast")[0] == 0


def test_mlflow_gets_the_billed_figure(account: Account) -> None:
    number = account.rent()
    finish(account.launch(number))
    account.destroy(number)
    assert account("sync", "--tracking-uri", account.bench.uri)[0] == 0
    account("reconcile", "--yes")
    assert account("sync", "--tracking-uri", account.bench.uri)[0] == 0
    seen = account.bench.seen(account.bench.uri)
    run = account.json("list")[0]["run_id"]
    values = [float(value) for _, value in seen.values(run, "final/cost_usd")]
    assert values == [pytest.approx(billed(account, number))]


# -- refused machines ------------------------------------------------------------------------------


def refuse(account: Account, number: int, **changes: Any) -> None:
    """What a machine leaves behind that was refused ten minutes after it was rented."""
    began = account.bench.clock()
    record = {
        "number": 1, "token": f"{number:08x}", "at": began + 600, "launch": "l", "node": 0,
        "provider": "vast", "instance": f"C.{number}", "machine": "20105", "host": "box",
        "gpus": [], "wanted": "1 x H100", "found": "1 x RTX 5090", "reason": "wrong GPU",
        "billed_from": began, "usd_per_hour": 1.2, "price_source": "provider", **changes,
    }  # fmt: skip
    account.bench.root.publish_json(f"refusals/job/1-{number:08x}.json", record)


def test_refused_machines_are_in_the_bill_and_under_the_table(account: Account) -> None:
    number = account.rent()
    account.bench.finished()
    assert "refused" not in account("list")[1]
    refuse(account, number)
    assert "Not in these: 1 refused machine, ~$0.2000." in account("list")[1]
    refuse(account, 7777, usd_per_hour=None)
    assert "2 refused machines, ~$0.2000, 1 without a price." in account("list")[1]
    account.bench.root.delete("refusals/job/1-00001e61.json")
    account.destroy(number, 900.0)
    assert account("reconcile", "--yes")[0] == 0
    usd = billed(account, number)
    assert f"Not in these: 1 refused machine, ${usd:.4f}." in account("list")[1]
    finish(account.launch(number, "later"))
    assert "refused" not in account("list")[1], "its dollars are a run's"
    assert account.cost("later")["billed_usd"] == pytest.approx(usd)


def test_a_refused_machine_that_goes_on_is_for_nobody(account: Account) -> None:
    number = account.rent()
    refuse(account, number)
    (idle,) = account.json("reconcile", code=3)["idle"]
    assert idle["instance"] == f"C.{number}"
    assert "refused/1-" in idle["why"]
