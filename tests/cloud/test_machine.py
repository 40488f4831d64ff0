from __future__ import annotations

import json
import os
import socket
import time

import psutil
import pytest

from tessera.cli.attempts import place_of
from tessera.cloud.machine import describe_machine
from tessera.errors import InputError
from tessera.ledger.prices import HourlyPrice, TrafficPrice


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
