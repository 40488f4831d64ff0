"""Run `tessera plan` and what `tessera launch` does before it rents, on stock SkyPilot, offline.

Run as a program with a HOME of its own, like plan_tasks.py and for the same reason: importing
SkyPilot takes seconds, so all questions are asked in one process. vast.ai is the pretend one.

    python plan_commands.py REPOSITORY ANSWERS.json
"""

import contextlib
import io
import itertools
import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(sys.argv[1])
sys.path.insert(0, str(REPOSITORY))

import sky  # noqa: E402 - after sys.path
from sky import clouds, execution, global_user_state  # noqa: E402
from sky.jobs.utils import generate_managed_job_cluster_name  # noqa: E402
from sky.utils.common_utils import make_cluster_name_on_cloud  # noqa: E402

from tessera.cli.common import run_command  # noqa: E402
from tessera.cli.main import tessera  # noqa: E402
from tests.services.vast import PretendVast  # noqa: E402

REFERENCE = "experiments/tessera_1b.yaml"
OPEN = "experiments/tessera_1b_budget.yaml"
LINEAR = ["--set", "schedule={name: linear_decay, warmup_steps: 200}"]
NOWHERE = str(Path.home() / "root")
KEY = "5ecret-of-the-account"
LONG = "an-experiment-with-a-long-name-00c0ffee"
UNSEEDED = """
resources:
  ordered:
    - {infra: nebius, accelerators: "H100:1"}
    - {infra: vast, accelerators: "H100:1"}
envs: {TESSERA_GPU: H100}
"""
ALONE = """
resources: {infra: nebius, accelerators: "H100:1"}
envs: {TESSERA_GPU: H100}
"""


def run(*words: str) -> dict[str, Any]:
    """A tessera command in this process: its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(tessera, list(words))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def plan(*words: str) -> dict[str, Any]:
    """The document of `tessera plan --json`."""
    done = run("plan", "--root", NOWHERE, "--json", *words)
    assert done["code"] == 0, done
    found: dict[str, Any] = json.loads(done["out"])
    return found


def enable(*providers: str) -> None:
    """Leave behind what `sky check` would, had these providers alone accepted our keys."""
    global_user_state.set_allowed_clouds(["Vast", "RunPod", "Lambda"], "default")
    compute = clouds.cloud.CloudCapability.COMPUTE
    global_user_state.set_enabled_clouds(list(providers), compute, "default")


def without_skypilot() -> dict[str, Any]:
    """`tessera plan` where `import sky` fails."""
    kept = sys.modules["sky"]
    sys.modules["sky"] = None  # type: ignore[assignment]
    try:
        return run("plan", REFERENCE, "--root", NOWHERE)
    finally:
        sys.modules["sky"] = kept


def launched(*words: str) -> dict[str, Any]:
    """What SkyPilot makes of the very task that `tessera launch` would hand it: a dry launch."""
    from tessera.cli.launch import _order
    from tessera.cli.plan import commands_for, learn_from
    from tessera.cli.plan import plan as command

    context = command.make_context("plan", [REFERENCE, "--root", NOWHERE, *words])
    own = ("experiment", "limit", "as_json")
    options = {name: value for name, value in context.params.items() if name not in own}
    known = learn_from(REFERENCE, options)
    order = _order(known, commands_for(known, REFERENCE, options))
    task = order.task()
    with contextlib.redirect_stdout(io.StringIO()):
        execution.launch(task, cluster_name=order.name, dryrun=True)
    return {
        "resources": [
            [str(r.cloud), r.instance_type, r.accelerators, r.max_hourly_cost, r.disk_size]
            for r in task.resources
        ],
        "envs": dict(task.envs),
        "name": task.name,
        "mounts": sorted(task.file_mounts or {}),
        "bid": [
            r.cluster_config_overrides.get("vast", {}).get("create_instance_kwargs", {})
            for r in task.resources
        ],
        "retries": [r.job_recovery for r in task.resources],
    }


def typed(command: str) -> list[list[Any]]:
    """The resources that SkyPilot's command line makes of a printed `sky launch` command."""
    from sky.client.cli.command import _parse_override_params

    words = shlex.split(command)
    given = dict(itertools.pairwise(words))
    file = next(word for word in words if word.endswith(".yaml"))
    task = sky.Task.from_yaml(file)
    task.set_resources_override(
        _parse_override_params(
            cloud=given["--infra"], gpus=given["--gpus"], instance_type=given["--instance-type"]
        )
    )
    return [[str(r.cloud), r.instance_type, r.accelerators] for r in task.resources]


def main() -> None:
    """Write the answers to every question that the tests have."""
    warnings.simplefilter("ignore")
    answers: dict[str, Any] = {"catalog": plan(REFERENCE)}
    answers["catalog_typed"] = [
        typed(offer["commands"]["sky"]) for offer in answers["catalog"]["offers"]
    ]
    answers["nvl"] = plan(REFERENCE, "--gpu", "H100 NVL", "--set", "tokens=655360000")
    enable("Vast", "RunPod", "Lambda")
    os.environ["NO_PROXY"] = "127.0.0.1"  # the pretend vast.ai is no network
    with PretendVast() as vast:
        os.environ |= {"VAST_URL": vast.url, "VAST_API_KEY": KEY}
        answers["live"] = plan(OPEN, "--set", "tokens=24504827904", "--budget", "200")
        answers["open"] = run("plan", OPEN, "--root", NOWHERE)
        answers["live_text"] = run("plan", REFERENCE, "--root", NOWHERE, "--limit", "2")
        answers["managed"] = plan(REFERENCE, "--managed")
        answers["lambda"] = plan(REFERENCE, "--provider", "lambda")
        answers["cpu"] = plan("experiments/smoke.yaml", "--task", "sky/smoke_cpu.yaml")
        answers["sft"] = plan("experiments/tessera_1b_sft.yaml")
        answers["launched"] = launched("--budget", "200", *LINEAR, "--set", "description=two words")
        answers["launched_managed_anywhere"] = launched("--managed")
        answers["launched_managed"] = launched("--managed", "--bid", "1.25")
        unseeded = Path.home() / "unseeded.yaml"
        unseeded.write_text(UNSEEDED)
        answers["unseeded"] = plan(REFERENCE, "--task", str(unseeded))
        vast.fault("500", times=99)
        answers["down"] = plan(REFERENCE)
        answers["asked_with"] = sorted({str(request["key"]) for request in vast.requests})
    del os.environ["VAST_API_KEY"]
    answers["bid"] = plan(REFERENCE, "--managed", "--bid", "1.20")
    alone = Path.home() / "alone.yaml"
    alone.write_text(ALONE)
    offline = ("plan", REFERENCE, "--root", NOWHERE, "--task", str(alone))
    answers["offline"] = run(*offline, "--json")
    answers["offline_provider"] = run(*offline, "--provider", "nebius")
    answers["refusals"] = {
        " ".join(words): run(*words)
        for words in (
            ("plan", REFERENCE, "--gpu", "T4"),
            ("plan", REFERENCE, "--provider", "azure"),
            ("plan", REFERENCE, "--bid", "1.2"),
            ("plan", REFERENCE, "--budget", "-1"),
            ("plan", REFERENCE, "--budget", "200"),
            ("plan", REFERENCE, "--task", "sky/none.yaml"),
            ("plan", REFERENCE, "--task", REFERENCE),
            ("plan", "experiments/none.yaml"),
            ("launch",),
            ("launch", REFERENCE),
            ("launch", "/etc/hostname"),
        )
    }
    settings = Path.home() / ".tessera" / "env"
    settings.write_text("TESSERA_ROOT='/a/folder'\n")
    answers["local_root"] = run("launch", REFERENCE, "--yes")
    settings.write_text("TESSERA_ROOT='s3://bucket/x'\n")
    answers["other_root"] = run("launch", REFERENCE, "--yes", "--root", NOWHERE)
    settings.write_text("TESSERA_ROOT='memory://root'\n")
    small = ("experiments/smoke.yaml", "--task", "sky/smoke_cpu.yaml", "--root", "memory://root")
    answers["eaten_up"] = run("launch", *small, "--budget", "0.01", *LINEAR, "--yes")
    answers["eaten_up_plan"] = run("plan", OPEN, "--root", NOWHERE, "--budget", "0.1")
    answers["nobody"] = run("launch", *small)
    enable()
    answers["none_enabled"] = plan(REFERENCE)
    answers["none_enabled_launch"] = run("launch", *small, "--yes")
    answers["none_enabled_vast"] = run("launch", *small, "--yes", "--provider", "vast.ai")
    answers["without_skypilot"] = without_skypilot()
    enable("Vast")
    answers["enabled"] = plan(REFERENCE)
    answers["labels"] = {
        "cluster": make_cluster_name_on_cloud(LONG, 120) + "-head",
        "job": make_cluster_name_on_cloud(generate_managed_job_cluster_name(LONG, 12), 120)
        + "-head",
        "short_job": make_cluster_name_on_cloud(
            generate_managed_job_cluster_name("tessera-1b-00c0ffee", 3), 120
        )
        + "-head",
    }
    Path(sys.argv[2]).write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
