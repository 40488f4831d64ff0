"""Refused machines: counted in a real root, named when they come back, and at last final."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.cloud.machine import Machine, describe_machine
from tessera.cloud.refusals import (
    RefusedError,
    RefusedTooOftenError,
    forgive,
    job_of,
    limit,
    refuse,
    refused_before,
    scan_refusals,
)
from tessera.errors import InputError
from tessera.storage import Root
from tests.services.stores import Store, serve

REPOSITORY = Path(__file__).parent.parent.parent
RTX = "1 x NVIDIA GeForce RTX 5090"
MANAGED = {
    "SKYPILOT_TASK_ID": "sky-managed-2026-11-23_pretrain_3-0",
    "SKYPILOT_MANAGED_JOB_ID": "3",
    "SKYPILOT_CLUSTER_INFO": '{"cluster_name": "pretrain-3", "cloud": "Lambda"}',
    "TESSERA_EXPERIMENT": "experiments/tessera_1b.yaml",
}


def machine(environ: dict[str, str]) -> Machine:
    return describe_machine(environ=environ, hardware=(RTX, 1))


def refuse_once(root: Root, gpu: str = "GPU-1", **more: str) -> Exception:
    environ = {**MANAGED, **more}
    here = machine(environ)
    return refuse(
        root, here, wanted="1 x H100", found=RTX, reason="another GPU than asked for", gpus=[gpu],
        environ=environ,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serve("moto", tmp_path_factory.mktemp("moto")) as store:
        yield store


def test_the_third_refusal_of_a_job_is_final_and_says_what_was_found(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    for number in (1, 2):
        error = refuse_once(root, f"GPU-{number}")
        assert isinstance(error, RefusedError)
        assert error.exit_code == 75
        assert f"refusal {number} of 3" in str(error)
        assert "wanted 1 x H100, found 1 x NVIDIA GeForce RTX 5090" in str(error)
    last = refuse_once(root, "GPU-3")
    assert isinstance(last, RefusedTooOftenError)
    assert last.exit_code == 2
    assert str(last).count(RTX) == 3
    assert "TESSERA_GPU" in str(last)
    assert [r.number for r in scan_refusals(root)] == [1, 2, 3]
    (folder,) = (tmp_path / "refusals").iterdir()
    assert folder.name == MANAGED["SKYPILOT_TASK_ID"]


def test_a_new_launch_counts_from_one_and_remembers_the_host(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    for _ in range(3):
        refuse_once(root, TESSERA_RUN_ID="run-1")
    again = refuse_once(root, "GPU-2", TESSERA_RUN_ID="run-1", SKYPILOT_TASK_ID="sky-managed-later")
    assert isinstance(again, RefusedError)
    assert "refusal 1 of 3" in str(again)
    assert "refused before" not in str(again)
    known = refuse_once(root, "GPU-1", TESSERA_RUN_ID="run-1", SKYPILOT_TASK_ID="sky-managed-later")
    assert "This host was refused before (another GPU than asked for)." in str(known)
    assert [r.number for r in refused_before(root, machine(MANAGED), ["GPU-1"])] == [1, 2, 3, 5]
    assert refused_before(root, machine(MANAGED), ["GPU-9"]) == []


def test_refusals_before_a_machine_that_passed_do_not_count(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert forgive(root, MANAGED) == 0
    for _ in range(4):  # over days of one managed job, whose launch stays the same
        for number in (1, 2):
            assert f"refusal {number} of 3" in str(refuse_once(root))
        forgive(root, MANAGED)
    last = [refuse_once(root, f"GPU-{number}") for number in range(3)][-1]
    assert isinstance(last, RefusedTooOftenError)
    assert str(last).count(RTX) == 3
    assert len(scan_refusals(root)) == 11


def test_a_node_that_passed_forgives_no_other_and_a_torn_mark_nothing(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    refuse_once(root, SKYPILOT_NODE_RANK="1")
    assert forgive(root, MANAGED) == 0
    assert "refusal 2 of 3" in str(refuse_once(root, SKYPILOT_NODE_RANK="1"))
    root.publish(f"refusals/{job_of(MANAGED)}/cleared-1.json", b"[]")
    assert isinstance(refuse_once(root, SKYPILOT_NODE_RANK="1"), RefusedTooOftenError)


def test_two_nodes_that_refuse_together_count_once(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert "refusal 1 of 3" in str(refuse_once(root, SKYPILOT_NODE_RANK="0"))
    assert "refusal 1 of 3" in str(refuse_once(root, SKYPILOT_NODE_RANK="1"))
    assert "refusal 2 of 3" in str(refuse_once(root, SKYPILOT_NODE_RANK="1"))


def test_what_cannot_be_counted_is_final(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = Root(str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "refusals").touch()  # a file where the folder has to be
    error = refuse_once(root)
    assert error.exit_code == 2  # type: ignore[attr-defined]
    assert "rented for ever" in str(error)
    nobody = refuse_once(Root(str(tmp_path / "only-here")))
    assert isinstance(nobody, RefusedTooOftenError)
    assert "a folder of this rented machine alone" in str(nobody)


def test_the_limit_is_a_setting(tmp_path: Path) -> None:
    assert limit({}) == 3
    assert limit({"TESSERA_MAX_REFUSALS": "1"}) == 1
    assert isinstance(
        refuse_once(Root(str(tmp_path)), TESSERA_MAX_REFUSALS="1"), RefusedTooOftenError
    )
    for text in ("0", "many", "-1"):
        with pytest.raises(InputError, match="TESSERA_MAX_REFUSALS is"):
            limit({"TESSERA_MAX_REFUSALS": text})


def test_a_job_is_named_by_its_run_else_the_managed_job_else_the_experiment() -> None:
    assert job_of({**MANAGED, "TESSERA_RUN_ID": "tessera-1b-x"}) == "tessera-1b-x"
    assert job_of(MANAGED) == "sky-managed-2026-11-23_pretrain_3-0"
    assert job_of({"TESSERA_EXPERIMENT": "experiments/tessera_1b.yaml"}) == "tessera_1b"
    assert job_of({"TESSERA_RUN_ID": "../../x"}) == "-..-x"
    assert job_of({}) == "other"


def test_a_foreign_record_is_not_counted(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    root.publish(f"refusals/{MANAGED['SKYPILOT_TASK_ID']}/1-x.json", b"torn")
    assert "refusal 1 of 3" in str(refuse_once(root))


def command(root: str, home: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``python -m tessera.cloud.refuse`` as sky/run.sh calls it; importing torch would fail."""
    bare = home / "site"
    (bare / "torch").mkdir(parents=True, exist_ok=True)
    (bare / "torch" / "__init__.py").write_text("raise SystemError('torch was imported')\n")
    tools = home / "bin"
    tools.mkdir(exist_ok=True)
    smi = tools / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA GeForce RTX 5090, GPU-abc, 580, 32607, 575, 575, 3090'\n"
    )
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    return subprocess.run(
        [sys.executable, "-m", "tessera.cloud.refuse", "--found", RTX],
        cwd=REPOSITORY,
        env={
            **environ, "HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": f"{bare}:{REPOSITORY}", "TESSERA_ROOT": root, "TESSERA_GPU": "H100",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )  # fmt: skip


def test_the_command_counts_in_a_bucket_and_never_tells_the_key(
    bucket: Store, tmp_path: Path
) -> None:
    environ = {**MANAGED, **bucket.environment(), "TESSERA_MAX_REFUSALS": "2"}
    first = command(bucket.url("jobs"), tmp_path, environ)
    assert first.returncode == 75, first.stderr
    assert "wanted 1 x H100, found 1 x NVIDIA GeForce RTX 5090" in first.stderr
    second = command(bucket.url("jobs"), tmp_path, environ)
    assert second.returncode == 2
    assert "This host was refused before" in second.stderr
    assert "Traceback" not in second.stderr
    assert bucket.secret_key not in first.stderr + second.stderr


def test_the_command_is_final_where_the_root_cannot_be_reached(tmp_path: Path) -> None:
    environ = {
        **MANAGED, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "x",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "TESSERA_STORE_TIMEOUT_S": "0.05",
    }  # fmt: skip
    done = command("s3://bucket/prefix", tmp_path, environ)
    assert done.returncode == 2
    assert "could not be counted in the root, so this is final" in done.stderr
    assert done.stderr.count("\n") == 1
