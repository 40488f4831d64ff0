"""Ask stock SkyPilot, offline, what it would rent for each task YAML; the answers are one file.

Run as a program, in a process of its own: SkyPilot reads HOME and its catalogs when it is imported
and the import alone takes seconds, so every question is asked in this one process. What it needs
lies in HOME (catalogs, the list of allowed providers); nothing of SkyPilot is replaced.

    python plan_tasks.py REPOSITORY ANSWERS.json
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(sys.argv[1])
# The worst case of a test run: the folder that holds the task YAMLs and the folder of these tests,
# both called sky, come before site-packages. Neither has an __init__.py, so each is no more than a
# portion of a namespace package, and Python prefers the installed regular package further down.
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import sky  # noqa: E402 - after sys.path
from sky import (  # noqa: E402
    clouds,
    exceptions,
    execution,
    global_user_state,
    optimizer,
    skypilot_config,
)

Pairs = Sequence[tuple[str, str]]

TASKS = sorted(path.name for path in (REPOSITORY / "sky").glob("*.yaml"))
PROVIDERS = [["Vast", "RunPod", "Lambda"], ["Vast"], ["RunPod", "Lambda"], ["Lambda"]]


def enable(providers: list[str]) -> None:
    """Leave behind what `sky check` would, had these providers (and no others) accepted our keys.

    For a provider that a task names and that is not enabled, SkyPilot looks for credentials again.
    There are none in HOME, so that look needs no network either.
    """
    allowed = skypilot_config.get_nested(("allowed_clouds",), [])
    global_user_state.set_allowed_clouds(allowed, "default")
    global_user_state.set_enabled_clouds(providers, clouds.cloud.CloudCapability.COMPUTE, "default")


def parse(name: str, envs: Pairs = ()) -> sky.Task:
    """The task as `sky launch sky/NAME --env ...` reads it."""
    config = yaml.safe_load((REPOSITORY / "sky" / name).read_text())
    return sky.Task.from_yaml_config(config, list(envs))


def plan(name: str, providers: list[str]) -> dict[str, Any]:
    """What SkyPilot would rent for `name` with these providers enabled, and at which price.

    What SkyPilot says against it instead: an invalid task, nothing to rent, or a feature (a mount,
    a second node, autodown) that the chosen provider refuses.
    """
    enable(providers)
    task = parse(name)
    with sky.Dag() as dag:
        dag.add(task)
    try:
        dag.validate()
        optimizer.Optimizer.optimize(dag, quiet=True)
        chosen = dag.tasks[0].best_resources
        assert chosen is not None
        assert chosen.cloud is not None
        autodown = clouds.CloudImplementationFeatures.AUTODOWN
        needs = task.get_required_cloud_features() | {autodown}
        chosen.cloud.check_features_are_supported(chosen, needs)
    except exceptions.ResourcesUnavailableError as error:
        return {"refused": str(error)}
    autostop = chosen.autostop_config
    return {
        "provider": str(chosen.cloud),
        "instance_type": chosen.instance_type,
        "accelerators": chosen.accelerators,
        "usd_per_hour": chosen.get_cost(3600),
        "use_spot": chosen.use_spot,
        "disk_gb": chosen.disk_size,
        "ports": chosen.ports,
        "down_after_idle_minutes": autostop.idle_minutes if autostop else None,
        "down": autostop.down if autostop else None,
        "job_recovery": chosen.job_recovery,
        "num_nodes": task.num_nodes,
        "copies": task.file_mounts,
        "mounts": list(task.storage_mounts or {}),
        "vast": chosen.cluster_config_overrides.get("vast", {}),
    }


def refusal(name: str, envs: Pairs = ()) -> str:
    """The sentence with which a dry `sky launch` of `name` ends, before it looks for a machine."""
    enable(PROVIDERS[0])
    with sky.Dag() as dag:
        dag.add(parse(name, envs))
    try:
        dag.validate()  # the client looks for the files to copy before anything else
        execution.launch(dag, cluster_name="refused", dryrun=True)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def main() -> None:
    """Write the answers to every question that the tests have."""
    answers = {
        "sky": sky.__file__,
        "version": sky.__version__,
        "plans": {name: {"+".join(p): plan(name, p) for p in PROVIDERS} for name in TASKS},
        "envs": {name: parse(name, [("TESSERA_ROOT", "s3://b/p")]).envs for name in TASKS},
    }
    shutil.rmtree(Path("~/.tessera").expanduser())
    answers["unconfigured"] = {name: refusal(name) for name in TASKS}
    Path(sys.argv[2]).write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
