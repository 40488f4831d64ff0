"""What stock SkyPilot 0.14.1 makes of the task YAMLs: which machine, at which price, or a refusal.

Prices are those of `catalogs/`, seeded with a few offers a provider: the right one, and cheaper
ones that a task must not take (another GPU, two GPUs, too few processors, a PCIe card).
"""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

CATALOGS = Path(__file__).parent / "catalogs"
TASKS = Path(__file__).parent.parent.parent / "sky"
H100_TASKS = ["pretrain_h100.yaml", "pretrain_h100_managed.yaml", "sft_h100.yaml"]
CPU_TASKS = ["corpus_cpu.yaml", "smoke_cpu.yaml"]
NODES = "pretrain_nodes.yaml"
ONE_MACHINE = [*H100_TASKS, *CPU_TASKS, "interview_h100.yaml"]
SERVER = "tracking_server.yaml"
ALL_TASKS = [*ONE_MACHINE, NODES, SERVER]
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


def test_a_corpus_is_built_without_a_gpu_where_that_is_offered(plans: Plans) -> None:
    plan = plans["plans"]["corpus_cpu.yaml"]["RunPod+Lambda"]
    assert (plan["provider"], plan["instance_type"]) == ("RunPod", "cpu5c-32-64")
    assert plan["usd_per_hour"] == cheapest("runpod", "", 0, vcpus=30, memory_gib=32) == 1.12
    assert plan["disk_gb"] <= 10 * 32
    assert plans["plans"]["corpus_cpu.yaml"]["Vast"]["usd_per_hour"] == 0.89  # 32 vCPUs and a GPU


def test_an_interview_takes_any_h100(plans: Plans) -> None:
    by_providers = plans["plans"]["interview_h100.yaml"]
    assert by_providers[ALL_PROVIDERS]["usd_per_hour"] == cheapest("vast", "H100", 1, 4, 0) == 1.49
    assert by_providers["RunPod+Lambda"]["instance_type"] == "1x_H100_SECURE"
    assert by_providers["Lambda"]["instance_type"] == "gpu_1x_h100_pcie"


def test_several_machines_come_from_a_provider_that_connects_them(plans: Plans) -> None:
    by_providers = plans["plans"][NODES]
    for providers in (ALL_PROVIDERS, "RunPod+Lambda", "Lambda"):
        plan = by_providers[providers]
        assert (plan["provider"], plan["instance_type"]) == ("Lambda", "gpu_8x_h100_sxm5")
        assert plan["accelerators"] == {"H100": 8}
        assert plan["usd_per_hour"] == cheapest("lambda", "H100", 8, 0, 0) == 31.92
        assert plan["num_nodes"] == 2
    assert "lambda" in by_providers["Vast"]["refused"]


def test_the_tracking_server_is_a_small_machine_with_an_open_port(plans: Plans) -> None:
    by_providers = plans["plans"][SERVER]
    plan = by_providers[ALL_PROVIDERS]
    assert (plan["provider"], plan["instance_type"]) == ("RunPod", "cpu3c-2-4")
    assert plan["accelerators"] is None
    assert plan["usd_per_hour"] == cheapest("runpod", "", 0, vcpus=2, memory_gib=4) == 0.06
    assert plan["disk_gb"] <= 10 * 2
    assert plan["ports"] == ["5000"]
    assert plan["down"] is None  # a server is idle most of the time
    assert (plan["num_nodes"], plan["mounts"]) == (1, [])
    assert list(plan["copies"]) == ["~/.tessera/configured", "~/.tessera/env"]
    for without in ("Vast", "Lambda"):  # no open port, no machine without a GPU
        assert "refused" in by_providers[without]


def test_only_the_managed_task_bids(plans: Plans) -> None:
    """A bid is vast.ai's own; `use_spot` would be paid in full and reported as cheap."""
    for task in ONE_MACHINE:
        plan = plans["plans"][task][ALL_PROVIDERS]
        assert not plan["use_spot"]
        kwargs = plan["vast"]["create_instance_kwargs"]
        assert "rsync" in kwargs["onstart_cmd"]
        if task == "pretrain_h100_managed.yaml":
            assert 0 < kwargs["bid_price"] < plan["usd_per_hour"]
        else:
            assert "bid_price" not in kwargs


@pytest.mark.parametrize("providers", [ALL_PROVIDERS, "Vast", "RunPod+Lambda", "Lambda"])
@pytest.mark.parametrize("task", ONE_MACHINE)
def test_one_node_two_copies_and_it_takes_itself_down(
    plans: Plans, task: str, providers: str
) -> None:
    plan = plans["plans"][task][providers]
    assert plan["num_nodes"] == 1
    assert plan["mounts"] == []  # vast.ai refuses MOUNT and MOUNT_CACHED
    assert list(plan["copies"]) == ["~/.tessera/configured", "~/.tessera/env"]
    if task == "pretrain_h100_managed.yaml":
        return  # its controller takes the machine down
    assert plan["down"] is True
    assert 1 <= plan["down_after_idle_minutes"] <= 10


@pytest.mark.parametrize("task", [*H100_TASKS, "corpus_cpu.yaml", "interview_h100.yaml", NODES])
def test_a_managed_job_is_recovered_on_75_only(plans: Plans, task: str) -> None:
    recovery = plans["plans"][task][ALL_PROVIDERS]["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 0
    assert recovery["recover_on_exit_codes"] == [75]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_launch_before_configure_is_told_to_run_it(plans: Plans, task: str) -> None:
    """The client of SkyPilot refuses in its own words; ours is the name of the missing file."""
    sentence = plans["unconfigured"][task]
    assert sentence.startswith(
        "File mount source '~/.tessera/run-tessera-configure-first' does not"
    )


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_variable_of_the_command_line_needs_no_line_in_the_task(plans: Plans, task: str) -> None:
    assert plans["envs"][task]["TESSERA_ROOT"] == "s3://b/p"
    config = yaml.safe_load((TASKS / task).read_text())
    assert "secrets" not in config  # a null secret is refused unless --secret gives it a value
    assert all(isinstance(value, str) for value in config["envs"].values())
