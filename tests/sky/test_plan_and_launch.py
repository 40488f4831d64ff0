"""`tessera plan`, and the task that `tessera launch` hands over, on stock SkyPilot 0.14.1, offline.

Catalogs are seeded, vast.ai is a pretend server; nothing of SkyPilot is replaced. What is rented in
the end is for tests/lab: here the very task of a launch goes through SkyPilot's dry launch.
"""

from __future__ import annotations

from typing import Any

import pytest

from tessera.cloud.rent import is_labelled

Answers = dict[str, Any]
KEY = "5ecret-of-the-account"


def of(plan: dict[str, Any], *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(offer[field] for field in fields) for offer in plan["offers"]]


def test_the_catalogs_offers_the_cheapest_total_first(commands: Answers) -> None:
    plan = commands["catalog"]
    assert of(plan, "provider", "card", "usd_per_hour", "source") == [
        ("Vast", "H100 SXM", 1.87, "catalog"),
        ("RunPod", "H100 SXM", 2.69, "catalog"),
        ("Lambda", "H100 SXM", 4.29, "catalog"),
    ]
    vast, runpod, _ = plan["offers"]
    assert vast["speed"] == "projected"  # an H100 was never measured with this code
    assert vast["machine_usd"] == pytest.approx(1.87 * vast["hours"])
    assert (vast["traffic_usd"], vast["total_is_whole"]) == (None, False)  # SkyPilot says 0: wrong
    assert runpod["traffic_usd"] == 0.0
    assert vast["enabled"] is None  # `sky check` never ran here
    assert any("is not built in" in note for note in plan["notes"])


def test_vast_s_live_offers_take_the_catalog_s_place(commands: Answers) -> None:
    plan = commands["live"]
    assert of(plan, "provider", "source", "number")[:3] == [
        ("Vast", "live", 103), ("Vast", "live", 101), ("Vast", "live", 102),
    ]  # fmt: skip
    best = plan["offers"][0]
    assert best["total_is_whole"]
    assert best["total_usd"] == pytest.approx(
        best["machine_usd"] + best["traffic_usd"] + best["storage_usd"]
    )
    assert plan["budget_usd"] == 200.0
    assert best["budget_tokens"] % 65536 == 0
    assert best["budget_tokens"] > plan["work"]["tokens"]  # 154 dollars would do
    assert not [note for note in plan["notes"] if "catalog of vast.ai" in note]


def test_a_budget_alone_says_what_it_buys(commands: Answers) -> None:
    done = commands["open"]
    assert done["code"] == 0
    assert done["out"].startswith("tessera-1b-budget: as many tokens as $315.00 pay for")
    assert "$315 pays" in done["out"]


def test_what_a_person_reads(commands: Answers) -> None:
    done = commands["live_text"]
    assert done["code"] == 0
    text = done["out"]
    assert "projected" in text
    assert "Speed of 1: projected; MFU 55% of 74,739 on H200" in text
    assert "3 more with --limit 5." in text
    assert "  tessera launch experiments/tessera_1b.yaml --provider vast\n" in text
    assert "  sky launch -c tessera-1b-" in text
    assert KEY not in text + done["err"]


def test_a_managed_job_bids_at_vast(commands: Answers) -> None:
    plan = commands["managed"]
    bids = [offer for offer in plan["offers"] if offer["provider"] == "Vast"]
    assert {(offer["bid"], offer["source"]) for offer in bids} == {(True, "live")}
    command = bids[0]["commands"]["sky"]
    assert command.startswith("sky jobs launch -n ")
    assert "sky/pretrain_h100_managed.yaml" in command
    assert "--provider" not in bids[0]["commands"]["tessera"]  # it may go on anywhere


def test_another_card_is_found_by_its_form_factor(commands: Answers) -> None:
    (offer,) = commands["nvl"]["offers"]
    assert (offer["card"], offer["instance_type"]) == ("H100 NVL", "1x-H100_NVL-32-65536")
    assert "--env 'TESSERA_GPU=H100 NVL'" in offer["commands"]["sky"]
    assert "--gpu 'H100 NVL'" in offer["commands"]["tessera"]
    assert "TESSERA_SET=tokens=655360000" in offer["commands"]["sky"]
    assert commands["nvl"]["work"]["tokens"] == 655360000


def test_one_provider_alone(commands: Answers) -> None:
    assert of(commands["lambda"], "provider") == [("Lambda",)]


def test_a_task_without_a_gpu(commands: Answers) -> None:
    plan = commands["cpu"]
    assert of(plan, "provider", "usd_per_hour", "speed")[0] == ("RunPod", 0.12, "not measured")
    assert all(offer["total_usd"] is None for offer in plan["offers"])


def test_fine_tuning_has_prices(commands: Answers) -> None:
    assert commands["sft"]["work"] is None
    assert {offer["total_usd"] for offer in commands["sft"]["offers"]} == {None}


def test_a_catalog_that_cannot_be_had_costs_its_provider_alone(commands: Answers) -> None:
    plan = commands["unseeded"]
    assert {offer["provider"] for offer in plan["offers"]} == {"Vast"}
    assert any("catalog of Nebius could not be fetched" in note for note in plan["notes"])


@pytest.mark.parametrize("question", ["offline", "offline_provider"])
def test_no_catalog_at_all_is_no_plan(commands: Answers, question: str) -> None:
    """Not the task file's fault, and nothing that a plan could be made of."""
    done = commands[question]
    assert (done["code"], done["out"]) == (75, "")
    last = done["err"].splitlines()[-1]  # SkyPilot's own lines come before
    assert last.startswith("Error: SkyPilot's catalog of Nebius could not be fetched")
    assert last.endswith("is this machine online?")


def test_a_bid_is_the_price_and_is_rented_at_vast_alone(commands: Answers) -> None:
    plan = commands["bid"]  # without a key: whether it wins is not known
    assert of(plan, "provider", "usd_per_hour", "bid") == [("Vast", 1.2, True)]
    (offer,) = plan["offers"]
    assert offer["machine_usd"] == pytest.approx(1.2 * offer["hours"])
    assert "--provider vast" in offer["commands"]["tessera"]
    assert "TESSERA_CATALOG_USD_PER_HOUR=1.2 " in offer["commands"]["sky"]
    assert "bid_price=1.2" in offer["commands"]["sky"]
    assert any("your bid of $1.20/h, won or not" in note for note in plan["notes"])


def test_a_launch_where_nothing_is_enabled(commands: Answers) -> None:
    """`sky check` ran and enabled nothing, which is not the same as that it never ran."""
    assert {offer["enabled"] for offer in commands["none_enabled"]["offers"]} == {False}
    assert {offer["commands"] for offer in commands["none_enabled"]["offers"]} == {None}
    done = commands["none_enabled_launch"]
    assert done["code"] == 2
    assert done["err"].startswith("Error: RunPod is not enabled: `sky check runpod`")
    assert "giving" not in done["out"] + done["err"]
    assert commands["none_enabled_vast"]["err"].startswith(
        "Error: Vast is not enabled: `vastai set api-key KEY && sky check vast`"
    )


def test_a_launch_for_a_budget_that_the_reserve_eats_up(commands: Answers) -> None:
    done = commands["eaten_up"]
    assert done["code"] == 2
    assert done["err"].startswith(
        "Error: Nothing can be trained for a budget of $0.01 at $0.12 an hour: $0.0220 are kept "
        "back for the last save"
    )
    text = commands["eaten_up_plan"]["out"]
    assert "nothing" in text
    assert "Launch the cheapest" not in text
    assert "None of these can be launched: Nothing can be trained for a budget of $0.1" in text


def test_a_launch_that_nobody_can_agree_to(commands: Answers) -> None:
    _refused(commands["nobody"], "Nobody can be asked here")


def test_vast_down_leaves_the_catalog_s_prices_marked(commands: Answers) -> None:
    plan = commands["down"]
    assert of(plan, "provider", "source")[0] == ("Vast", "catalog")
    assert any("answered 500" in note and "are the catalog's" in note for note in plan["notes"])
    assert any("never renews itself" in note for note in plan["notes"])
    assert commands["asked_with"] == [KEY]  # it was asked for real, with the key in the header


def test_a_provider_that_is_not_enabled_is_marked(commands: Answers) -> None:
    assert of(commands["enabled"], "provider", "enabled") == [
        ("Vast", True), ("RunPod", False), ("Lambda", False),
    ]  # fmt: skip


def test_skypilot_s_command_line_takes_the_printed_commands(commands: Answers) -> None:
    """Each alternative of the YAML becomes the offer that the command names."""
    wanted = of(commands["catalog"], "provider", "instance_type")
    for (provider, instance_type), resources in zip(wanted, commands["catalog_typed"], strict=True):
        assert {(r[0], r[1]) for r in resources} == {(provider, instance_type)}


def test_the_task_of_a_launch_is_one_that_skypilot_would_rent(commands: Answers) -> None:
    task = commands["launched"]
    assert task["resources"] == [["Vast", "1x-H100_SXM-32-65536", {"H100": 1}, 4.5, 200]]
    envs = task["envs"]
    assert envs["TESSERA_EXPERIMENT"] == "experiments/tessera_1b.yaml"
    assert envs["TESSERA_SET"].endswith(" 'description=two words'")
    assert envs["TESSERA_BUDGET_USD"] == "200"
    assert envs["TESSERA_CATALOG_USD_PER_HOUR"] == "1.87"
    assert envs["TESSERA_GPU"] == "H100 80GB HBM3"  # the YAML's own
    assert envs["TESSERA_RUN_ID"] == task["name"]
    assert "~/.tessera/env" in task["mounts"]
    assert not any("KEY" in name or "SECRET" in name for name in envs)


def test_the_task_of_a_managed_job_goes_on_anywhere(commands: Answers) -> None:
    anywhere = commands["launched_managed_anywhere"]
    assert [r[0] for r in anywhere["resources"]] == ["Vast", "RunPod", "Lambda"]
    task = commands["launched_managed"]
    assert [r[0] for r in task["resources"]] == ["Vast"]  # a bid is an offer to vast.ai
    assert task["bid"][0]["bid_price"] == 1.25
    assert all(retry["recover_on_exit_codes"] == [75] for retry in task["retries"])


def test_labels_of_machines_are_known_as_skypilot_makes_them(commands: Answers) -> None:
    labels, long = commands["labels"], "an-experiment-with-a-long-name-00c0ffee"
    assert is_labelled(labels["cluster"], long, False)
    assert is_labelled(labels["job"], long, True)
    assert not is_labelled(labels["job"], f"{long}x", True)  # cut to the same 22 characters
    assert is_labelled(labels["short_job"], "tessera-1b-00c0ffee", True)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("plan experiments/tessera_1b.yaml --gpu T4", "--gpu 'T4' is no GPU known here"),
        ("plan experiments/tessera_1b.yaml --provider azure", "it has offers of Lambda, RunPod"),
        ("plan experiments/tessera_1b.yaml --bid 1.2", "add --managed"),
        ("plan experiments/tessera_1b.yaml --budget -1", "--budget"),
        ("plan experiments/tessera_1b.yaml --budget 200", "a cosine has to know its last step"),
        ("plan experiments/tessera_1b.yaml --task sky/none.yaml", "does not exist"),
        (
            "plan experiments/tessera_1b.yaml --task experiments/tessera_1b.yaml",
            "no SkyPilot task",
        ),
        ("plan experiments/none.yaml", "does not exist"),
        ("launch", "Give an experiment"),
        ("launch experiments/tessera_1b.yaml", "run `tessera configure` once"),
        ("launch /etc/hostname", "lies outside"),
    ],
)
def test_refusals(commands: Answers, command: str, sentence: str) -> None:
    _refused(commands["refusals"][command], sentence)


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("local_root", "which a rented one cannot reach"),
        ("other_root", "the machine would write to s3://bucket/x"),
        ("without_skypilot", "pip install 'tessera[cloud]'"),
    ],
)
def test_refusals_before_a_launch(commands: Answers, question: str, sentence: str) -> None:
    _refused(commands[question], sentence)


def _refused(done: dict[str, Any], sentence: str) -> None:
    assert done["code"] == 2
    assert done["out"] == ""
    assert done["err"].startswith("Error: ")
    assert done["err"].count("\n") == 1
    assert sentence in done["err"]
