from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tenacity

from tessera.cloud.vast import VastClient, VastInstance, find_key, is_model
from tessera.errors import InputError, ProviderError
from tests.cloud.conftest import KEY, Rent
from tests.services.vast import PretendVast


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow one another at once, unless vast.ai itself asks to wait."""
    monkeypatch.setattr("tessera.cloud.vast._WAIT", tenacity.wait_none())


@pytest.fixture
def client(vast: PretendVast) -> Iterator[VastClient]:
    with VastClient(KEY, vast.url, tries=3, timeout_s=0.3) as one:
        yield one


def answering(content: Any, code: int = 200, **more: Any) -> VastClient:
    """A client of a server that always says the same."""
    text = content if isinstance(content, str) else json.dumps(content)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(code, text=text, **more)

    return VastClient(KEY, "http://vast.test", tries=3, transport=httpx.MockTransport(answer))


# -- the key ---------------------------------------------------------------------------------------


def test_the_key_is_found_where_vasts_own_tools_put_it(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert find_key(environ) is None
    (tmp_path / ".vast_api_key").write_text("old\n")
    assert find_key(environ) == "old"
    (tmp_path / ".config" / "vastai").mkdir(parents=True)
    (tmp_path / ".config" / "vastai" / "vast_api_key").write_text(" \n")
    assert find_key(environ) == "old", "an empty file holds no key"
    (tmp_path / ".config" / "vastai" / "vast_api_key").write_text("new")
    assert find_key(environ) == "new"
    (tmp_path / "xdg" / "vastai").mkdir(parents=True)
    (tmp_path / "xdg" / "vastai" / "vast_api_key").write_text("elsewhere")
    assert find_key({**environ, "XDG_CONFIG_HOME": str(tmp_path / "xdg")}) == "elsewhere"
    assert find_key({**environ, "VAST_API_KEY": "told"}) == "told"
    assert find_key({}) is None


def test_without_a_key_it_says_where_to_put_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    with pytest.raises(InputError, match=r"No vast\.ai key was found; set VAST_API_KEY, or write"):
        VastClient()
    with pytest.raises(InputError, match="holds characters that no key has") as error:
        VastClient("two words")
    assert "two words" not in str(error.value)


def test_the_key_is_in_no_log_message_or_repr(
    vast: PretendVast, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = VastClient(KEY, vast.url, tries=2, timeout_s=0.2)
    shown = [repr(client), str(client), repr(vars(client)["_http"])]
    for kind in ("500", "429", "403", "nonsense", "silence"):
        vast.fault(kind, times=1 if kind == "403" else 2)
        with pytest.raises((InputError, ProviderError)) as error:
            client.instances()
        shown += [str(error.value), repr(error.value), repr(error.value.__cause__)]
    client.instances()
    assert vast.requests[-1]["key"] == KEY, "it did travel"
    assert caplog.records, "there was something to log"
    shown += [record.getMessage() for record in caplog.records]
    assert not [text for text in shown if KEY in text]
    assert not [r for r in vast.requests if KEY in r["query"] or KEY in r["path"]]


def test_a_server_that_quotes_the_key_is_not_quoted() -> None:
    client = answering({"success": False, "msg": f"odd request by {KEY}"}, 400)
    with pytest.raises(ProviderError, match=r"answered 400 at .* \(odd request by \*\*\*\)"):
        client.user()


# -- questions -------------------------------------------------------------------------------------


def test_instances_come_from_all_pages(vast: PretendVast, client: VastClient, rent: Rent) -> None:
    ids = [rent(103, f"c{n}-0123abcd-head") for n in range(30)]
    found = client.instances()
    assert [instance.id for instance in found] == ids
    assert len([r for r in vast.requests if r["path"] == "/api/v1/instances/"]) == 2
    one = found[0]
    assert (one.gpu_name, one.num_gpus, one.machine_id) == ("H100 SXM", 1, 20103)
    assert (one.inet_up_cost, one.inet_down_cost) == (0.004, 0.003)
    assert one.dph_total == pytest.approx(1.55 + 0.15 * 100 / 730)
    assert one.start_date == pytest.approx(time.time(), abs=20)


def test_an_instance_is_found_by_container_and_by_cluster(client: VastClient, rent: Rent) -> None:
    first = rent(label="train-0123abcd-head")
    other = rent(label="train-2-0123abcd-head")
    assert client.instance_of(f"C.{first}") == client.instance(first)
    assert client.instance_of(str(other)) == client.instance(other)
    by_name = client.instance_of("train")
    assert by_name is not None
    assert by_name.id == first, "train-2 is another cluster"
    again = rent(label="train-0123abcd-head")
    by_name = client.instance_of("train")
    assert by_name is not None
    assert by_name.id == again, "a recovered job's machine has the name of the one before"
    assert client.instance_of("trai") is None
    assert client.instance_of("C.7") is None


def test_offers_are_of_the_model_and_cheapest_first(client: VastClient) -> None:
    assert [offer.id for offer in client.offers("H100")] == [104, 103, 101, 102]
    assert [offer.id for offer in client.offers("h100_sxm", disk_gb=200)] == [103, 101, 102]
    assert [offer.gpu_name for offer in client.offers("RTX 5090")] == ["RTX 5090"]
    assert client.offers("H1") == client.offers("B200") == client.offers("H100", 8) == []
    assert len(client.offers("")) == 5
    small, large = client.offers("H100")[0], client.offers("H100", disk_gb=500)[0]
    assert small.dph_total is not None
    assert large.dph_total is not None
    assert large.dph_total - small.dph_total == pytest.approx(0.15 * 495 / 730)
    bids = client.offers("H100 SXM", bid=True)
    assert [offer.id for offer in bids] == [103, 101, 102]
    assert bids[0].min_bid == 0.91


def test_an_offer_that_nobody_asked_for_is_left_out_although_it_was_told() -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "gpu_name": "RTX 5090", "num_gpus": 1, "dph_total": 0.4},
        {"id": 2, "gpu_name": "H100 SXM", "num_gpus": 2, "dph_total": 3.0},
        {"id": 3, "gpu_name": "H100 SXM", "num_gpus": 1, "dph_total": "NaN"},
        {"id": 4, "gpu_name": "H100 SXM", "num_gpus": 1, "dph_total": 1.9, "rentable": False},
        {"id": 5, "gpu_name": "H100 SXM", "num_gpus": 1, "dph_total": 2.0, "verified": False},
        {"id": 6, "gpu_name": "H100 SXM", "num_gpus": 1, "dph_total": 2.1, "new_field": [1]},
    ]
    client = answering({"offers": rows, "gpu_names": ["H100 SXM", "RTX 5090"]})
    assert [offer.id for offer in client.offers("H100")] == [6]
    assert [offer.id for offer in client.offers("H100", verified=False)] == [5, 6]


def test_charges_name_their_instance(
    vast: PretendVast, client: VastClient, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.cloud.vast._PAGE", 2)
    ids = [rent(103, f"c{n}-0123abcd-head") for n in range(3)]
    client.destroy(ids[0])
    found = client.charges(time.time() - 86400)
    assert [charge.instance for charge in found] == ids, "from both pages"
    assert found[0].amount == pytest.approx(vast.bill()[0]["usd"])
    assert client.charges(0, time.time() - 86400) == []


def test_destroying_twice_is_no_error(vast: PretendVast, client: VastClient, rent: Rent) -> None:
    number = rent()
    assert client.destroy(number) is True
    assert vast.instances == {}
    assert client.destroy(number) is False


def test_a_destruction_that_was_refused_is_said() -> None:
    client = answering({"success": False, "msg": "locked."})
    with pytest.raises(ProviderError, match=r"did not destroy instance 5 \(locked\)"):
        client.destroy(5)


def test_the_account(client: VastClient) -> None:
    assert client.user().credit == 25.0


@pytest.mark.parametrize(
    ("name", "wanted", "same"),
    [("H100 SXM", "H100", True), ("H100 SXM", "h100_sxm", True), ("H100 SXM", "H100 PCIE", False),
     ("H100", "H100 SXM", False), ("H1000", "H100", False), ("RTX 4090D", "RTX 4090", False)],
)  # fmt: skip
def test_a_variant_is_of_its_model(name: str, wanted: str, same: bool) -> None:
    assert is_model(name, wanted) is same


# -- figures that are none -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "NaN", float("nan"), float("inf"), -1, "much", [], {}])
def test_a_price_that_is_no_number_is_none(value: Any) -> None:
    row = VastInstance.model_validate({"id": 1, "dph_total": value, "start_date": value})
    assert (row.dph_total, row.start_date, row.usd_per_hour) == (None, None, None)
    assert VastInstance.model_validate({"id": 1}).dph_total is None


@pytest.mark.parametrize(
    ("status", "price"),
    [(None, 2.0), ("loading", 2.0), ("running", 2.0), ("exited", 0.1), ("stopped", 0.1)],
)
def test_a_stopped_machine_pays_for_its_disk(status: str | None, price: float) -> None:
    row = {"id": 1, "dph_total": 2.0, "storage_total_cost": 0.1, "actual_status": status}
    assert VastInstance.model_validate(row).usd_per_hour == price


# -- faults ----------------------------------------------------------------------------------------

_ADVICE = "; try again in some minutes, or see https://status.vast.ai."


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("500", "answered 500, at /api/v1/instances/, 3 times"),
        ("429", "asks to come less often (429), at /api/v1/instances/, 3 times"),
        ("nonsense", "answered something that is no JSON object, at /api/v1/instances/, 3 times"),
        ("silence", "was silent for 0.3 s, at /api/v1/instances/, 3 times"),
    ],
)
def test_a_fault_that_stays_is_one_sentence(
    vast: PretendVast, client: VastClient, kind: str, what: str
) -> None:
    vast.fault(kind, times=3)
    with pytest.raises(ProviderError) as error:
        client.instances()
    assert str(error.value) == f"vast.ai ({vast.url}) {what}{_ADVICE}"
    assert error.value.exit_code == 75
    assert client.instances() == []


@pytest.mark.parametrize("kind", ["500", "429", "nonsense", "silence"])
def test_a_fault_that_passes_is_not_noticed(
    vast: PretendVast, client: VastClient, rent: Rent, kind: str
) -> None:
    number = rent()
    vast.fault(kind, times=2)
    assert [instance.id for instance in client.instances()] == [number]


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_key_is_not_tried_again(code: int) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(code, json={"msg": f"bad key {KEY}"})

    client = VastClient(KEY, "http://vast.test", transport=httpx.MockTransport(answer))
    with pytest.raises(InputError, match=rf"refuses the key at /api/v1/instances/ \({code}\)"):
        client.instances()
    assert len(asked) == 1


def test_a_wrong_key_is_refused_by_the_server(vast: PretendVast) -> None:
    with pytest.raises(InputError, match="refuses the key"):
        VastClient("another-key", vast.url).instances()


@pytest.mark.parametrize(("header", "least", "most"), [("0.4", 0.4, 3.0), ("3600", 0.0, 0.3)])
def test_retry_after_is_heeded_within_reason(header: str, least: float, most: float) -> None:
    answers = iter([429, 200])

    def answer(request: httpx.Request) -> httpx.Response:
        code = next(answers)
        return httpx.Response(code, json={"instances": []}, headers={"Retry-After": header})

    client = VastClient(KEY, "http://vast.test", transport=httpx.MockTransport(answer))
    began = time.monotonic()
    assert client.instances() == []
    assert least <= time.monotonic() - began < most


def test_a_daily_quota_is_not_asked_again() -> None:
    client = answering({"error": "search_quota_exceeded", "msg": "tomorrow"}, 429)
    with pytest.raises(ProviderError, match=r"answered 429 at .*bundles/ \(tomorrow\)"):
        client.offers("")


def test_patience_ends_the_tries(monkeypatch: pytest.MonkeyPatch, vast: PretendVast) -> None:
    monkeypatch.setattr("tessera.cloud.vast._WAIT", tenacity.wait_fixed(0.2))
    vast.fault("silence", times=50)
    client = VastClient(KEY, vast.url, tries=50, timeout_s=0.3, patience_s=1.0)
    began = time.monotonic()
    with pytest.raises(ProviderError, match="was silent"):
        client.instances()
    assert time.monotonic() - began < 2.0


def test_a_port_where_nobody_listens_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ProviderError, match=r"cannot be reached \(.*refused\), at .* 3 times"):
            VastClient(KEY, url, tries=3).instances()


@pytest.mark.parametrize("url", ["no-url", "ftp://x", "http://[", "console.vast.ai"])
def test_an_address_that_is_none_is_a_sentence(url: str) -> None:
    with pytest.raises((InputError, ProviderError), match=r"VAST_URL|cannot be reached"):
        VastClient(KEY, url, tries=1).instances()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"instances": None}, "told no instances"),
        ({"instances": [{"label": "x"}]}, r"answered what is no VastInstance \(id: Field required"),
        ({"instances": ["x"]}, "answered what is no VastInstance"),
        ([1], "answered something that is no JSON object"),
    ],
)
def test_an_answer_of_another_form_is_a_sentence(content: Any, what: str) -> None:
    with pytest.raises(ProviderError, match=what):
        answering(content).instances()


def test_pages_that_lead_in_a_circle_end() -> None:
    assert answering({"instances": [], "next_token": "same"}).instances() == []


def test_the_clocks_are_compared(vast: PretendVast, client: VastClient) -> None:
    client.user()
    assert abs(client.clock_ahead_s) < 3
    late = answering({"id": 1}, headers={"Date": "Mon, 01 Jan 2029 00:00:00 GMT"})
    late.user()
    assert late.clock_ahead_s == pytest.approx(1861920000 - time.time(), abs=5)
    odd = answering({"id": 1}, headers={"Date": "yesterday"})
    odd.user()
    assert odd.clock_ahead_s == 0.0
