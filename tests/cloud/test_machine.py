from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import psutil
import pytest
import tenacity

from tessera.cli.attempts import ask_for_all, place_of
from tessera.cloud.billing import first_environ
from tessera.cloud.machine import describe_machine
from tessera.errors import InputError
from tessera.ledger.prices import HourlyPrice, TrafficPrice
from tests.cloud.conftest import Rent
from tests.services.vast import PretendVast


def sky(cluster: str, cloud: str) -> str:
    """What SkyPilot puts into SKYPILOT_CLUSTER_INFO."""
    return json.dumps({"cluster_name": cluster, "cloud": cloud, "region": "x", "zone": None})


@pytest.mark.parametrize(
    ("environ", "provider", "instance"),
    [
        ({"VAST_CONTAINERLABEL": "C.1234"}, "vast", "C.1234"),
        ({"RUNPOD_POD_ID": "pod7"}, "runpod", "pod7"),
        ({"SKYPILOT_CLUSTER_INFO": sky("mine", "Lambda")}, "lambda", "mine/{host}"),
        (
            {"SKYPILOT_CLUSTER_INFO": sky("mine", "Vast"), "VAST_CONTAINERLABEL": "C.1234"},
            "vast",
            "C.1234",
        ),
        ({"SKYPILOT_CLUSTER_INFO": sky("mine", "RunPod"), "RUNPOD_POD_ID": "p"}, "runpod", "p"),
    ],
)
def test_a_provider_is_known_by_its_variables(
    environ: dict[str, str], provider: str, instance: str
) -> None:
    machine = describe_machine(environ=environ)
    assert machine.provider == provider
    assert machine.instance == instance.format(host=socket.gethostname())


@pytest.mark.parametrize("info", ["", "{", "[]", "null", "3", "{}"])
def test_anything_else_is_a_machine_of_ones_own(info: str) -> None:
    machine = describe_machine(environ={"SKYPILOT_CLUSTER_INFO": info})
    assert machine.provider == "local"
    assert machine.instance.startswith(f"{socket.gethostname()}/")
    again = describe_machine(environ={})
    assert machine.instance == again.instance, "one boot is one instance"


def test_a_cloud_host_is_billed_since_its_first_process() -> None:
    machine = describe_machine(environ={"VAST_CONTAINERLABEL": "C.1"})
    assert machine.billed_from == psutil.Process(1).create_time()
    assert machine.billed_from_source == "start of the first process"


def test_a_machine_of_ones_own_is_billed_since_this_process() -> None:
    machine = describe_machine(environ={})
    assert machine.billed_from == psutil.Process().create_time() == machine.process_started_at
    assert machine.billed_from_source == "start of this process"
    assert machine.setup_started_at is None


@pytest.mark.parametrize("environ", [{}, {"VAST_CONTAINERLABEL": "C.1"}])
def test_the_variable_says_better_when_the_bill_began(environ: dict[str, str]) -> None:
    began = str(int(time.time()) - 600)
    machine = describe_machine(
        environ={**environ, "TESSERA_BILLED_FROM": began, "TESSERA_SETUP_STARTED": f"{began}.5"}
    )
    assert machine.billed_from == float(began)
    assert machine.billed_from_source == "TESSERA_BILLED_FROM"
    assert machine.setup_started_at == float(began) + 0.5


@pytest.mark.parametrize("name", ["TESSERA_BILLED_FROM", "TESSERA_SETUP_STARTED"])
@pytest.mark.parametrize(
    "text",
    ["yesterday", "nan", "inf", "-1", "0", "24", "2026-06-14T00:00:00Z",
     str(int(time.time() * 1000)), str(int(time.time()) + 86_400)],
    ids=["word", "nan", "inf", "negative", "zero", "hours", "iso", "milliseconds", "tomorrow"],
)  # fmt: skip
def test_a_time_that_cannot_be_is_a_sentence(name: str, text: str) -> None:
    """Milliseconds or hours would be a bill of decades, or none."""
    with pytest.raises(InputError) as error:
        describe_machine(environ={name: text})
    assert str(error.value) == (
        f"{name} is {text!r}; expected seconds since the epoch (date +%s), not in the future."
    )


def test_an_empty_variable_is_none() -> None:
    names = ("BILLED_FROM", "SETUP_STARTED", "USD_PER_HOUR", "USD_PER_GB_UP")
    empty = describe_machine(environ={f"TESSERA_{name}": "" for name in names})
    assert empty == describe_machine(environ={})


def test_the_price_of_the_variable_counts_before_that_of_the_experiment() -> None:
    variable = {"TESSERA_USD_PER_HOUR": "1.91"}
    assert describe_machine(environ=variable, experiment_price=5.0).price == HourlyPrice(
        1.91, "TESSERA_USD_PER_HOUR"
    )
    assert describe_machine(environ={}, experiment_price=5.0).price == HourlyPrice(
        5.0, "experiment"
    )
    assert describe_machine(environ={}).price == HourlyPrice(None, "unknown")
    with pytest.raises(InputError, match="TESSERA_USD_PER_HOUR is 'much'"):
        describe_machine(environ={"TESSERA_USD_PER_HOUR": "much"})


def test_the_price_of_traffic_is_found_the_same_way() -> None:
    variable = {"TESSERA_USD_PER_GB_UP": "0.02"}
    told = describe_machine(environ=variable, experiment_traffic_price=5.0)
    assert told.traffic == TrafficPrice(0.02, "TESSERA_USD_PER_GB_UP")
    assert place_of(told).usd_per_gb_up == 0.02
    guessed = describe_machine(environ={}, experiment_price=1.0, experiment_traffic_price=5.0)
    assert guessed.traffic == TrafficPrice(5.0, "experiment")
    assert guessed.price.usd_per_hour == 1.0
    assert place_of(describe_machine(environ={})).usd_per_gb_up == 0.0
    with pytest.raises(InputError, match="TESSERA_USD_PER_GB_UP is 'much'"):
        describe_machine(environ={"TESSERA_USD_PER_GB_UP": "much"})


def test_the_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAST_CONTAINERLABEL", "C.77")
    assert describe_machine().instance == "C.77"


def test_an_attempt_knows_its_machine() -> None:
    machine = describe_machine(environ={"VAST_CONTAINERLABEL": "C.1"}, experiment_price=2.5)
    attempt = place_of(machine)
    assert (attempt.number, attempt.token, attempt.resumed_from) == (0, "", None)
    assert attempt.started_at == machine.process_started_at
    assert attempt.billed_from <= time.time()
    assert (attempt.provider, attempt.instance) == ("vast", "C.1")
    assert (attempt.usd_per_hour, attempt.price_source) == (2.5, "experiment")
    assert attempt.host == socket.gethostname()
    assert attempt.device
    assert 1 <= attempt.devices <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("told", "source"),
    [
        ({"TESSERA_USD_PER_HOUR": "32"}, "TESSERA_USD_PER_HOUR"),
        ({"TESSERA_CATALOG_USD_PER_HOUR": "32"}, "catalog"),
        ({}, "experiment"),
    ],
)
def test_an_attempt_on_two_machines_costs_both(told: dict[str, str], source: str) -> None:
    both = {**told, "SKYPILOT_NUM_NODES": "2", "GROUP_WORLD_SIZE": "7"}
    machine = describe_machine(environ=both, experiment_price=32.0)
    assert (machine.nodes, machine.price.usd_per_hour) == (2, 32.0)
    attempt = place_of(machine)
    assert (attempt.nodes, attempt.usd_per_hour, attempt.price_source) == (2, 64.0, source)
    one = place_of(describe_machine(environ=told, experiment_price=32.0))
    assert (one.nodes, one.usd_per_hour) == (1, 32.0)
    by_torchrun = describe_machine(environ={**told, "GROUP_WORLD_SIZE": "3"}, experiment_price=1.0)
    assert place_of(by_torchrun).nodes == 3
    assert place_of(describe_machine(environ={"SKYPILOT_NUM_NODES": "2"})).usd_per_hour is None


def test_the_providers_price_is_followed_for_two_machines(
    vast: PretendVast, host: dict[str, str], rent: Rent
) -> None:
    number = rent()
    price = vast.instances[number]["dph_total"]
    machine = describe_machine(environ=on(host, number, SKYPILOT_NUM_NODES="2"))
    assert place_of(machine).usd_per_hour == pytest.approx(2 * price)
    ask = ask_for_all(machine)
    assert ask is not None
    vast.set_price(number, 3.0)
    quote = ask()
    assert (quote.usd_per_hour, quote.usd_per_gb_up) == (6.0, 0.01)
    alone = describe_machine(environ=on(host, number))
    assert ask_for_all(alone) == alone.ask_price
    assert ask_for_all(describe_machine(environ={"SKYPILOT_NUM_NODES": "2"})) is None


@pytest.mark.parametrize("text", ["two", "0", "-1"])
def test_a_number_of_machines_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"SKYPILOT_NUM_NODES is '{text}'; expected how many"):
        describe_machine(environ={"SKYPILOT_NUM_NODES": text})


# -- what vast.ai says about this instance ---------------------------------------------------------


def on(host: dict[str, str], number: int, **more: str) -> dict[str, str]:
    """The variables of a job in the container of instance ``number``."""
    return {**host, "VAST_CONTAINERLABEL": f"C.{number}", **more}


def test_the_provider_says_what_this_instance_costs(
    vast: PretendVast, host: dict[str, str], rent: Rent
) -> None:
    rent(102)
    number = rent()
    vast.instances[number]["start_date"] -= 700.0
    machine = describe_machine(
        environ=on(host, number, TESSERA_USD_PER_HOUR="9", TESSERA_USD_PER_GB_UP="9",
                   TESSERA_BILLED_FROM=str(int(time.time()))),
        experiment_price=8.0,
    )  # fmt: skip
    assert machine.price.usd_per_hour == pytest.approx(1.87 + 0.15 * 100 / 730)
    assert (machine.price.source, machine.price.note) == ("provider", "")
    assert machine.traffic == TrafficPrice(0.01, "provider")
    assert machine.traffic_down == TrafficPrice(0.006, "provider")
    assert (machine.instance, machine.machine) == (f"C.{number}", "20101")
    assert machine.billed_from == vast.instances[number]["start_date"]
    assert machine.billed_from_source == "provider"
    attempt = place_of(machine)
    assert (attempt.machine, attempt.price_note, attempt.price_followed) == ("20101", "", True)
    assert (attempt.usd_per_gb_up, attempt.usd_per_gb_down) == (0.01, 0.006)


def test_the_container_is_named_by_the_first_process(
    vast: PretendVast, host: dict[str, str], rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ssh session, and so a job of SkyPilot, does not get the container's variables."""
    number = rent(label="whatever")
    job = {**host, "SKYPILOT_CLUSTER_INFO": sky("mine", "Vast")}
    for first in ({"VAST_CONTAINERLABEL": f"C.{number}"}, {"CONTAINER_ID": str(number)}):
        monkeypatch.setattr("tessera.cloud.machine.first_environ", lambda found=first: found)
        machine = describe_machine(environ=job)
        assert (machine.provider, machine.instance) == ("vast", f"C.{number}")
        assert machine.price.source == "provider"
    here = {**host, "CONTAINER_ID": str(number), "VAST_TCP_PORT_22": "22"}
    assert describe_machine(environ=here).instance == f"C.{number}"
    assert describe_machine(environ={"CONTAINER_ID": "7"}).provider == "local", "not vast.ai's"
    odd = {**job, "CONTAINER_ID": "0f3c"}
    monkeypatch.setattr("tessera.cloud.machine.first_environ", dict)
    assert describe_machine(environ=odd).instance == f"mine/{socket.gethostname()}"


def test_the_first_process_is_asked_for_its_variables(tmp_path: Path) -> None:
    path = tmp_path / "environ"
    assert first_environ(path) == {}
    path.write_bytes(b"PATH=/bin:/usr\0CONTAINER_ID=12\0odd\0A=b=c\0\xff=\xfe\0")
    found = first_environ(path)
    assert (found["CONTAINER_ID"], found["A"], found["PATH"]) == ("12", "b=c", "/bin:/usr")


def test_a_machine_without_a_container_name_is_found_by_its_label(
    vast: PretendVast, host: dict[str, str], rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.cloud.machine.first_environ", dict)
    rent(102, "mine-2-0123abcd-head")
    number = rent(103, "mine-0123abcd-head")
    job = {**host, "SKYPILOT_CLUSTER_INFO": sky("mine", "Vast")}
    machine = describe_machine(environ=job)
    assert (machine.instance, machine.price.source) == (f"C.{number}", "provider")
    assert machine.ask_price is not None
    asked = len(vast.requests)
    machine.ask_price()
    assert [r["path"] for r in vast.requests[asked:]] == [f"/api/v0/instances/{number}/"]


@pytest.mark.parametrize(
    ("given", "price", "source"),
    [
        ({"TESSERA_USD_PER_HOUR": "1.5", "TESSERA_CATALOG_USD_PER_HOUR": "2"}, 1.5,
         "TESSERA_USD_PER_HOUR"),
        ({"TESSERA_CATALOG_USD_PER_HOUR": "2"}, 2.0, "catalog"),
        ({}, 8.0, "experiment"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("500", "answered 500"), ("429", "asks to come less often"),
        ("nonsense", "answered something that is no JSON object"),
        ("403", "refuses the key"),
    ],
)  # fmt: skip
def test_without_an_answer_the_next_best_price_counts_and_why_is_kept(
    vast: PretendVast, host: dict[str, str], rent: Rent, monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str], price: float, source: str, kind: str, why: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("tessera.cloud.vast._WAIT", tenacity.wait_none())
    number = rent()
    vast.fault(kind, times=99)
    machine = describe_machine(environ=on(host, number, **given), experiment_price=8.0)
    assert (machine.price.usd_per_hour, machine.price.source) == (price, source)
    assert why in machine.price.note
    assert "try again" not in machine.price.note, "nobody here can"
    assert (machine.instance, machine.machine) == (f"C.{number}", "")
    assert machine.billed_from_source == "start of the first process"
    attempt = place_of(machine)
    assert (attempt.price_note, attempt.price_followed) == (machine.price.note, True)


@pytest.mark.parametrize("status", ["offline", "exited", "stopped", "running", None])
def test_a_living_host_pays_for_its_gpu_whatever_its_status_says(
    vast: PretendVast, host: dict[str, str], rent: Rent, status: str | None
) -> None:
    number = rent()
    vast.instances[number]["actual_status"] = status
    machine = describe_machine(environ=on(host, number))
    assert machine.price.usd_per_hour == vast.instances[number]["dph_total"]


@pytest.mark.parametrize("value", [None, float("nan"), "free", -1.0])
def test_a_price_that_vanished_is_not_believed(
    vast: PretendVast, host: dict[str, str], rent: Rent, value: object
) -> None:
    number = rent()
    vast.instances[number]["dph_total"] = value
    machine = describe_machine(environ=on(host, number, TESSERA_CATALOG_USD_PER_HOUR="2.5"))
    assert (machine.price.usd_per_hour, machine.price.source) == (2.5, "catalog")
    assert machine.price.note == f"vast.ai tells no usable price for instance {number}"


def test_an_instance_that_is_not_of_the_account_is_said(
    vast: PretendVast, host: dict[str, str]
) -> None:
    machine = describe_machine(environ=on(host, 7))
    assert machine.price.note == "vast.ai has no instance C.7 on the account of this machine's key"


def test_without_a_key_nobody_is_asked(vast: PretendVast, rent: Rent) -> None:
    number = rent()
    before = len(vast.requests)
    machine = describe_machine(environ=on({"VAST_URL": vast.url}, number))
    assert "There is no vast.ai key on this machine" in machine.price.note
    assert len(vast.requests) == before


def test_silence_does_not_hold_the_start_up(
    vast: PretendVast, host: dict[str, str], rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = rent()
    vast.fault("silence", times=99)
    monkeypatch.setattr("tessera.cloud.machine.PATIENCE_S", 0.5)
    began = time.monotonic()
    machine = describe_machine(environ=on(host, number, TESSERA_USD_PER_HOUR="1.5"))
    assert time.monotonic() - began < 6, "the client alone would take nine"
    assert machine.price.usd_per_hour == 1.5
    assert machine.price.note == "The provider did not answer within 0 s"


@pytest.mark.parametrize("environ", [{}, {"RUNPOD_POD_ID": "p"}, {"SKYPILOT_CLUSTER_INFO": "aws"}])
def test_nobody_else_is_asked_anything(
    vast: PretendVast, host: dict[str, str], environ: dict[str, str]
) -> None:
    if "SKYPILOT_CLUSTER_INFO" in environ:
        environ = {"SKYPILOT_CLUSTER_INFO": sky("mine", "AWS")}
    machine = describe_machine(environ={**host, **environ})
    assert machine.ask_price is None
    assert (machine.price, machine.machine) == (HourlyPrice(None, "unknown"), "")
    assert vast.requests == []


def test_one_of_several_workers_is_enough_to_ask(
    vast: PretendVast, host: dict[str, str], rent: Rent
) -> None:
    number = rent()
    before = len(vast.requests)
    machine = describe_machine(environ=on(host, number), ask=False)
    assert machine.ask_price is None
    assert len(vast.requests) == before


# -- whose clock -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead_s", [-7200.0, -3.0, 0.0, 3.0, 7200.0])
def test_clocks_that_differ_do_not_move_the_bill(
    vast: PretendVast, host: dict[str, str], rent: Rent, monkeypatch: pytest.MonkeyPatch,
    ahead_s: float,
) -> None:  # fmt: skip
    """vast.ai's clock is ahead of ours by that: the instance began ten minutes ago all the same."""
    number = rent()
    began = time.time() - 600
    vast.instances[number]["start_date"] = began + ahead_s
    monkeypatch.setattr("tessera.cloud.vast._ahead_s", lambda date: ahead_s)
    machine = describe_machine(environ=on(host, number))
    assert machine.billed_from == pytest.approx(began, abs=5)
    assert machine.billed_from <= machine.process_started_at


def test_a_bill_that_begins_in_the_future_begins_with_this_process(
    vast: PretendVast, host: dict[str, str], rent: Rent
) -> None:
    number = rent()
    vast.instances[number]["start_date"] = time.time() + 20
    machine = describe_machine(environ=on(host, number))
    assert machine.billed_from == machine.process_started_at
    assert machine.billed_from_source == "provider"


@pytest.mark.parametrize("date", [None, 0, "soon", float("nan"), 5e12])
def test_a_date_that_cannot_be_is_not_believed(
    vast: PretendVast, host: dict[str, str], rent: Rent, date: object
) -> None:
    number = rent()
    vast.instances[number]["start_date"] = date
    machine = describe_machine(environ=on(host, number))
    assert machine.billed_from_source == "start of the first process"
    assert machine.price.source == "provider"
