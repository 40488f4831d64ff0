"""What stock SkyPilot 0.14.1 makes of the task YAMLs: which machine, at which price, or a refusal.

Prices are those of `catalogs/`, seeded with a few offers a provider: the right one, and cheaper
ones that a task must not take (another GPU, two GPUs, too few processors, a PCIe card).
"""

import csv
from pathlib import Path
from typing import Any

import pytest

CATALOGS = Path(__file__).parent / "catalogs"
H100_TASKS = ["pretrain_h100.yaml", "sft_h100.yaml"]
ALL_TASKS = [*H100_TASKS, "smoke_cpu.yaml"]
ALL_PROVIDERS = "Vast+RunPod+Lambda"

Plans = dict[str, Any]


def cheapest(
    provider: str, accelerator: str, count: float, vcpus: float, memory_gib: float
) -> float:
    """Dollars an hour of the cheapest seeded offer with that much of everything."""
    with (CATALOGS / provider / "vms.csv").open(newline="") as file:
        return min(
            float(row["Price"])
            for row in csv.DictReader(file)
            if row["AcceleratorName"] == accelerator
            and float(row["AcceleratorCount"] or 0) == count
            and float(row["vCPUs"]) >= vcpus
            and float(row["MemoryGiB"]) >= memory_gib
        )


def test_our_folder_of_tasks_does_not_hide_skypilot(plans: Plans) -> None:
    """`import sky` is SkyPilot although the repository, with its own sky/, is first on sys.path."""
    assert Path(plans["sky"]).parts[-3:] == ("site-packages", "sky", "__init__.py")
    assert plans["version"] == "0.14.1"


@pytest.mark.parametrize("task", H100_TASKS)
def test_an_h100_is_rented_on_vast_at_the_cheapest_suitable_price(plans: Plans, task: str) -> None:
    plan = plans["plans"][task][ALL_PROVIDERS]
    assert plan["provider"] == "Vast"
    assert plan["accelerators"] == {"H100": 1}
    assert plan["usd_per_hour"] == cheapest("vast", "H100", 1, vcpus=8, memory_gib=0) == 1.87
    assert plan["instance_type"] == "1x-H100_SXM-32-65536"
    assert not plan["use_spot"]  # on vast.ai spot would be paid in full and reported as cheap


@pytest.mark.parametrize("task", H100_TASKS)
def test_other_providers_follow_in_the_order_written(plans: Plans, task: str) -> None:
    by_providers = plans["plans"][task]
    without_vast = by_providers["RunPod+Lambda"]
    assert (without_vast["provider"], without_vast["accelerators"]) == ("RunPod", {"H100-SXM": 1})
    assert without_vast["usd_per_hour"] == cheapest("runpod", "H100-SXM", 1, 8, 0) == 2.69
    # Lambda's PCIe card is cheaper in the catalog and is not what we ask for.
    assert by_providers["Lambda"]["instance_type"] == "gpu_1x_h100_sxm5"
    assert by_providers["Lambda"]["usd_per_hour"] == 4.29
    # A laptop with a key for vast.ai alone can launch too: the others are passed over.
    assert by_providers["Vast"] == by_providers[ALL_PROVIDERS]


def test_the_smoke_run_takes_the_cheapest_cpu_machine(plans: Plans) -> None:
    plan = plans["plans"]["smoke_cpu.yaml"][ALL_PROVIDERS]
    assert (plan["provider"], plan["instance_type"]) == ("RunPod", "cpu3c-4-8")
    assert plan["accelerators"] is None
    assert plan["usd_per_hour"] == cheapest("runpod", "", 0, vcpus=4, memory_gib=8) == 0.12
    assert plan["disk_gb"] <= 10 * 4  # RunPod's limit for a CPU pod: 10 GB a vCPU


def test_the_smoke_run_needs_no_second_provider(plans: Plans) -> None:
    """vast.ai lists no machine without a GPU: its cheapest does, still for cents."""
    plan = plans["plans"]["smoke_cpu.yaml"]["Vast"]
    assert (plan["provider"], plan["usd_per_hour"]) == ("Vast", 0.14)


@pytest.mark.parametrize("providers", [ALL_PROVIDERS, "Vast", "RunPod+Lambda", "Lambda"])
@pytest.mark.parametrize("task", ALL_TASKS)
def test_one_node_no_mounts_and_it_takes_itself_down(
    plans: Plans, task: str, providers: str
) -> None:
    plan = plans["plans"][task][providers]
    assert plan["num_nodes"] == 1
    assert plan["mounts"] == []  # vast.ai refuses MOUNT and MOUNT_CACHED
    assert plan["down"] is True
    assert 1 <= plan["down_after_idle_minutes"] <= 10


@pytest.mark.parametrize("task", H100_TASKS)
def test_a_managed_job_is_recovered_on_75_only(plans: Plans, task: str) -> None:
    recovery = plans["plans"][task][ALL_PROVIDERS]["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 0
    assert recovery["recover_on_exit_codes"] == [75]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_launch_without_a_root_is_refused_by_name(plans: Plans, task: str) -> None:
    sentence = plans["without_root"][task]
    assert "'TESSERA_ROOT' is None" in sentence
    assert "--env" in sentence


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_launch_without_keys_is_refused_by_name(plans: Plans, task: str) -> None:
    """A null secret passes the parser; the launch refuses it before it looks for a machine."""
    sentence = plans["without_keys"][task]
    assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in sentence
    assert "--secret" in sentence
