"""The pretend vast.ai as vast's own SDK and a plain client see it."""

# ruff: noqa: A001, A002 - an instance's number is called `id` at vast.ai

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from vastai.api.client import VastClient as Sdk
from vastai.sdk import VastAI

from tests.services.vast import PretendVast


@pytest.fixture
def vast() -> Iterator[PretendVast]:
    with PretendVast() as server:
        yield server


@pytest.fixture
def sdk(vast: PretendVast) -> VastAI:
    client = VastAI(api_key="a-key")
    client.client = Sdk(api_key="a-key", server_url=vast.url, retry=1, timeout=5)
    return client


def rent(sdk: VastAI, ask: int = 101, **more: Any) -> int:
    contract = sdk.create_instance(id=ask, image="image", disk=200, label="c-head", **more)
    return int(contract["new_contract"])


def test_offers_are_filtered_and_sorted(sdk: VastAI) -> None:
    found = sdk.search_offers(query="gpu_name=H100_SXM num_gpus=1", order="dph_total")
    assert [row["id"] for row in found] == [103, 101, 102]
    assert sdk.search_offers(query="gpu_name=H100_SXM geolocation=NO")[0]["id"] == 102
    assert sdk.search_offers(query="dph_total<0.5")[0]["gpu_name"] == "RTX 5090"
    assert sdk.search_offers()[0]["id"] == 101  # the best score


def test_a_search_prices_the_disk_it_asks_for_and_bids(sdk: VastAI) -> None:
    (small,) = sdk.search_offers(query="id=101")
    (large,) = sdk.search_offers(query="id=101", storage=200.0)
    (bid,) = sdk.search_offers(query="id=101", storage=200.0, type="bid")
    assert large["dph_total"] - small["dph_total"] == pytest.approx(195 * 0.15 / 730)
    assert bid["dph_total"] == pytest.approx(1.07 + large["storage_total_cost"])


def test_an_instance_from_renting_to_its_end(vast: PretendVast, sdk: VastAI) -> None:
    id = rent(sdk, env={"A": "b"})
    (row,) = sdk.show_instances()
    assert (row["id"], row["label"], row["actual_status"]) == (id, "c-head", "running")
    assert row["dph_total"] == pytest.approx(1.87 + 200 * 0.15 / 730)
    assert row["extra_env"] == {"A": "b"}
    assert (row["machine_id"], row["host_id"]) == (20101, 50101)
    shown = sdk.show_instance(id=id)
    assert shown is not None
    assert shown["start_date"] == row["start_date"]
    sdk.destroy_instance(id=id)
    assert sdk.show_instances() == []
    assert sdk.show_instance(id=id) is None
    (line,) = vast.bill()
    hours = (line["end"] - line["start"]) / 3600
    assert line["usd"] == pytest.approx(hours * row["dph_total"], rel=1e-6)


def test_a_bid_is_paid_moved_and_outbid(vast: PretendVast, sdk: VastAI) -> None:
    with pytest.raises(Exception, match="400"):
        rent(sdk, price=0.5)
    id = rent(sdk, price=1.23)
    disk = vast.instances[id]["storage_total_cost"]
    assert vast.instances[id]["is_bid"]
    vast.set_price(id, 1.5)
    vast.preempt(id)
    (row,) = sdk.show_instances()
    assert (row["actual_status"], row["cur_state"]) == ("exited", "stopped")
    rates = [price["usd_per_hour"] for price in vast.bill()[0]["prices"]]
    assert rates == pytest.approx([1.23 + disk, 1.5, disk])
    vast.vanish(id)
    assert sdk.show_instances() == []
    assert vast.bill()[0]["end"] is not None


def test_bill_charges_and_invoices_agree(vast: PretendVast, sdk: VastAI) -> None:
    ids = [rent(sdk) for _ in range(2)]
    vast.use_traffic(ids[0], up_gb=10, down_gb=5)
    for id in ids:
        vast.vanish(id)
    usd = [line["usd"] for line in vast.bill()]
    assert usd[0] == pytest.approx(10 * 0.01 + 5 * 0.006, rel=0.01)
    charged = sdk.show_invoices_v1(charges=True)
    assert [row["amount"] for row in charged["results"]] == usd
    assert [row["source"] for row in charged["results"]] == [f"instance-{id}" for id in ids]
    with pytest.warns(DeprecationWarning, match="show_invoices"):
        old = sdk.show_invoices(only_charges=True)
    assert [float(row["amount"]) for row in old["invoices"]] == pytest.approx(usd, abs=1e-6)


def test_instances_come_in_pages(sdk: VastAI) -> None:
    ids = [rent(sdk) for _ in range(30)]
    assert [row["id"] for row in sdk.show_instances()] == ids


def test_a_key_is_needed_and_seen(vast: PretendVast) -> None:
    url = f"{vast.url}/api/v0/instances"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer a"}).status_code == 200
    vast.key = "b"
    assert httpx.get(url, headers={"Authorization": "Bearer a"}).status_code == 401
    assert [request["key"] for request in vast.requests] == [None, "a", "a"]
    assert httpx.post(f"{vast.url}/api/v0/bundles/", json={}).status_code == 200


def test_faults_come_as_often_and_where_they_were_asked_for(vast: PretendVast) -> None:
    def get(path: str) -> httpx.Response:
        return httpx.get(vast.url + path, headers={"Authorization": "Bearer a"}, timeout=0.5)

    vast.fault("500", times=2, path="/instances")
    assert get("/api/v0/users/current").status_code == 200
    assert [get("/api/v0/instances/").status_code for _ in range(3)] == [500, 500, 200]
    for kind in ("429", "403"):
        vast.fault(kind)
        assert get("/api/v0/instances/").status_code == int(kind)
    vast.fault("nonsense")
    with pytest.raises(ValueError):
        get("/api/v0/instances/").json()
    vast.fault("silence")
    began = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        get("/api/v0/instances/")
    assert time.monotonic() - began < 5
    assert get("/api/v0/instances/").status_code == 200
    with pytest.raises(ValueError, match="no fault"):
        vast.fault("flood")


def test_an_answer_is_lost_after_what_was_asked_for_was_done(
    vast: PretendVast, sdk: VastAI
) -> None:
    vast.fault("lost", path="/asks")
    with pytest.raises(Exception, match="502"):
        rent(sdk)
    assert [row["label"] for row in sdk.show_instances()] == ["c-head"]


class Machines:
    """A backend whose machine needs a second look until it is up."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.looks = 0

    def start(self, instance: Any) -> dict[str, Any]:
        self.running.add(instance["id"])
        return {"ssh_host": "127.0.0.1", "ssh_port": 22}

    def ready(self, id: int) -> bool:
        self.looks += 1
        return self.looks > 1

    def stop(self, id: int) -> None:
        self.running.discard(id)


def test_machines_are_started_waited_for_and_stopped() -> None:
    machines = Machines()
    with PretendVast(machines=machines) as vast:
        headers = {"Authorization": "Bearer a"}
        for _ in range(2):
            httpx.put(f"{vast.url}/api/v0/asks/103/", json={"label": "x"}, headers=headers)
        url = f"{vast.url}/api/v0/instances/9001/"
        seen = [httpx.get(url, headers=headers).json()["instances"] for _ in range(2)]
        assert [row["actual_status"] for row in seen] == ["loading", "running"]
        assert machines.running == {9001, 9002}
        httpx.put(url, json={"state": "stopped"}, headers=headers)
        assert machines.running == {9002}
        httpx.put(url, json={"state": "running"}, headers=headers)
        assert machines.running == {9001, 9002}
    assert machines.running == set()
