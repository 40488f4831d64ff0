"""``tessera preflight``: each fault is caused, and named in the table and the sentence.

The GPU is a script called nvidia-smi; torch and the bench are packages that stand before the real
ones. Nothing of the command itself is replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tessera.cli.main import tessera
from tessera.cloud.disk import already_here, disk_needed
from tessera.cloud.machine import describe_machine
from tessera.cloud.probe import AS_SAVED, RootProbe, variables
from tessera.cloud.refusals import refuse
from tessera.errors import TesseraError
from tessera.experiment import load_experiment
from tessera.storage import Root
from tests.cloud.pretend_s3 import pretend_s3

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
SMOKE, REFERENCE = str(EXPERIMENTS / "smoke.yaml"), str(EXPERIMENTS / "tessera_1b.yaml")
H100 = "NVIDIA H100 80GB HBM3"
RENTED = {
    "SKYPILOT_TASK_ID": "sky-managed-1",
    "SKYPILOT_CLUSTER_INFO": '{"cluster_name": "c", "cloud": "Lambda"}',
    "TESSERA_USD_PER_HOUR": "2",
}


class Box:
    """A machine: what its nvidia-smi, its torch and its bench say."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        (folder / "bin").mkdir()
        self.root = folder / "root"
        self.root.mkdir()
        monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
        monkeypatch.chdir(folder)  # `python -m tessera` looks here first
        monkeypatch.setenv("PYTHONPATH", str(folder / "packages"))

    def gpus(self, name: str = H100, count: int = 1, power: str = "700.00", clock: str = "") -> Box:
        row = f"{name}, GPU-abc, 580.1, 81559, {power}, 700.00, 1980"
        answers = "\n".join([row] * count)
        clocks = f'echo "{clock}, 1980"' if clock else "echo not a valid field; exit 2"
        script = self.folder / "bin" / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\ncase "$1" in *uuid*) echo "{answers}";; *) {clocks};; esac\n'
        )
        script.chmod(0o755)
        return self

    def torch(self, cuda: str | None = "13.0", devices: int = 1) -> Box:
        self._package(
            "torch",
            "class cuda:\n"
            f"    is_available = staticmethod(lambda: {devices} > 0)\n"
            f"    device_count = staticmethod(lambda: {devices})\n"
            f"class version:\n    cuda = {cuda!r}\n__version__ = '2.13.0'\n",
        )
        return self

    def bench(self, tokens_per_s: float | None, reason: str = "") -> Box:
        rows = [{"name": "experiment", "tokens_per_s": tokens_per_s}]
        document = json.dumps({"rows": rows, "best": "experiment"})
        body = f"print({document!r})\n"
        if tokens_per_s is None:
            body = "raise SystemExit('Error: the driver is gone.')\n"
        if reason:
            failed = {"rows": [{"name": "experiment", "reason": reason}], "best": None}
            body = f"print({json.dumps(failed)!r})\nraise SystemExit(2)\n"
        self._package("tessera", "", main=body)
        return self

    def _package(self, name: str, body: str, main: str = "") -> None:
        folder = self.folder / "packages" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(body)
        (folder / "__main__.py").write_text(main)

    def run(self, *arguments: str, **environ: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, the document, and the sentence that ended it."""
        result = CliRunner().invoke(
            tessera,
            ["preflight", *arguments, "--json"],
            env={"TESSERA_ROOT": str(self.root), **environ},
            standalone_mode=False,
        )
        error = result.exception
        if error is not None and not isinstance(error, TesseraError):
            raise error
        code = error.exit_code if isinstance(error, TesseraError) else int(result.return_value or 0)
        _, brace, rest = result.output.partition("{\n")  # what is being looked at comes before
        document = json.loads(brace + rest) if brace else {}
        return code, document, str(error or "")


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path, monkeypatch)


def found(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The check of that name."""
    (check,) = (check for check in document["checks"] if check["name"] == name)
    return dict(check)


def test_a_good_machine_is_go_with_hours_and_dollars(box: Box) -> None:
    box.gpus().torch().bench(70_000.0)
    code, document, said = box.run(
        REFERENCE, "--set", "checkpoint.every_steps=2000000", TESSERA_GPU="H100 80GB", **RENTED
    )
    disk_is_small = found(document, "disk")["code"]  # on a small test machine, say
    if not disk_is_small:
        assert (code, said) == (0, "")
        assert document["go"]
        projection = document["projection"]
        assert projection["tokens_per_s"] == 70_000.0
        assert projection["hours"] == pytest.approx(24504827904 / 70_000 / 3600)
        assert projection["usd"] == pytest.approx(2 * projection["hours"])
        assert "projected for H100 SXM" in found(document, "speed")["found"]
    assert found(document, "power limit")["found"] == "700 of 700 W"


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        ({"name": "NVIDIA GeForce RTX 5090"}, "1 x H100 was asked for"),
        ({"count": 2}, "1 x H100 was asked for"),
    ],
)
def test_another_machine_than_asked_for(box: Box, gpus: dict[str, Any], reason: str) -> None:
    box.gpus(**gpus)
    code, document, said = box.run(SMOKE, TESSERA_GPU="H100", **RENTED)
    assert code == 75
    assert found(document, "GPU")["reason"] == reason
    assert reason in said
    assert "refusal 1 of 3" in said
    assert not document["go"]
    names = [check["name"] for check in document["checks"]]
    assert "speed" not in names  # nothing is measured on it


def test_no_gpu_at_all(box: Box) -> None:
    box.patch.setenv("PATH", str(box.folder / "bin"))
    code, document, _ = box.run(SMOKE, TESSERA_GPU="H100")
    assert code == 75
    assert "there is no nvidia-smi" in found(document, "GPU")["reason"]


@pytest.mark.parametrize(
    ("gpus", "name", "told"),
    [
        ({"power": "400.00"}, "power limit", "turned it down to 57%, below 90%"),
        ({"clock": "1200"}, "clocks", "turned it down to 61%, below 90%"),
    ],
)
def test_a_gpu_that_its_owner_turned_down(
    box: Box, gpus: dict[str, Any], name: str, told: str
) -> None:
    code, document, said = box.gpus(**gpus).torch().bench(1e3).run(SMOKE, TESSERA_GPU="H100")
    assert code == 75
    assert told in found(document, name)["reason"]
    assert told in said
    low = ["--min-power", "0.5"]
    assert box.run(SMOKE, *low, TESSERA_GPU="H100")[0] == 0
    assert box.run(SMOKE, TESSERA_GPU="H100", TESSERA_PREFLIGHT_MIN_POWER="0.5")[0] == 0


def test_a_driver_that_tells_nothing_of_power(box: Box) -> None:
    box.gpus(power="[N/A]").torch().bench(1e3)
    code, document, _ = box.run(SMOKE, TESSERA_GPU="H100")
    assert code == 0
    assert found(document, "power limit")["found"] == "not told"


@pytest.mark.parametrize(
    ("cuda", "devices", "code", "told"),
    [
        (None, 0, 2, "this build of torch has no CUDA"),
        ("13.0", 0, 75, "torch finds 0 of 1 GPUs; is the driver too old for it?"),
        ("13.0", 2, 75, "torch finds 2 of 1 GPUs"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu(
    box: Box, cuda: str | None, devices: int, code: int, told: str
) -> None:
    ended, document, said = box.gpus().torch(cuda, devices).run(SMOKE, TESSERA_GPU="H100")
    assert ended == code
    assert told in found(document, "torch")["reason"]
    assert told in said
    assert box.run(SMOKE, TESSERA_GPU="H100", TESSERA_DEVICE="cpu")[0] == 0  # it is not used


def test_a_torch_that_does_not_load(box: Box) -> None:
    box.gpus()._package("torch", "raise ImportError('libcuda.so.1: cannot open')\n")
    code, document, _ = box.run(SMOKE, TESSERA_GPU="H100")
    assert code == 75
    assert "libcuda.so.1: cannot open" in found(document, "torch")["reason"]


def test_a_disk_that_is_too_small(box: Box) -> None:
    code, document, said = box.run(SMOKE, "--set", "checkpoint.local_keep=100000000")
    assert code == 75
    assert "is too small" in found(document, "disk")["reason"]
    assert "is too small" in said


def test_what_a_resumed_run_left_on_the_disk_is_not_asked_for_again(tmp_path: Path) -> None:
    experiment = load_experiment(REFERENCE)
    for place, size in (
        ("shards/a", 5), ("checkpoints/x/tessera-1b-ab/10/f", 30), ("checkpoints/x/other-1/f", 700),
    ):  # fmt: skip
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    assert already_here(experiment, tmp_path, {}) == 35
    assert already_here(experiment, tmp_path, {"TESSERA_RUN_ID": "other-1"}) == 705
    with (tmp_path / "shards/a").open("ab") as file:
        file.truncate(10**12)  # sparse: shards are never worth more than is needed
    assert already_here(experiment, tmp_path, {}) <= disk_needed(experiment)


def test_a_card_that_is_slower_than_it_was_measured(box: Box) -> None:
    room = ("--set", "checkpoint.every_steps=2000000", "--set", "checkpoint.local_keep=1")
    box.gpus("NVIDIA H200").torch().bench(50_000.0)
    quality = str(EXPERIMENTS / "quality_136m.yaml")
    code, document, _ = box.run(quality, *room, "--gpu", "H200")
    assert code == 75
    assert "10% of the 482,700 measured for H200, below 80%" in found(document, "speed")["reason"]
    assert box.run(quality, *room, "--gpu", "H200", "--min-speed", "0.1")[0] == 0


def test_steps_that_cannot_be_measured(box: Box) -> None:
    box.gpus().torch().bench(None)
    code, document, _ = box.run(SMOKE, TESSERA_GPU="H100")
    assert code == 75
    assert "the driver is gone" in found(document, "speed")["reason"]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("out of memory", 2),
        ("micro-batch 3 does not divide the step's 8 samples", 2),
        ("AcceleratorError: CUDA error: uncorrectable ECC error encountered", 75),
        ("a deeper model was not slower than a shallow one: something else keeps it busy", 75),
    ],
)
def test_an_experiment_that_fits_no_such_machine_is_no_refusal(
    box: Box, reason: str, code: int
) -> None:
    box.gpus().torch().bench(None, reason)
    ended, document, _ = box.run(SMOKE, TESSERA_GPU="H100", **RENTED)
    assert ended == code
    assert reason in found(document, "speed")["reason"]
    assert len(Root(str(box.root)).files("refusals")) == (code == 75)


def test_a_root_that_is_slow_for_its_checkpoints_is_said_and_refuses_no_machine(box: Box) -> None:
    box.gpus().torch().bench(1e12)  # a step takes no time, so the next checkpoint is due at once
    code, document, said = box.run(SMOKE, TESSERA_GPU="H100", **RENTED)
    assert (code, said) == (0, "")
    assert found(document, "checkpoints")["verdict"] == "note"
    assert "of the time is sending" in found(document, "checkpoints")["reason"]


@pytest.mark.parametrize(("again", "code"), [(0.4e6, 75), (0.6e6, 75), (5e6, 0)])
def test_a_root_below_the_floor_is_measured_twice(box: Box, again: float, code: int) -> None:
    rates = [0.5e6, again]

    def probed(url: str, *, size: int) -> RootProbe:
        assert size == AS_SAVED
        return RootProbe(size, rates.pop(0), 1e9, 0.1, None)

    box.patch.setattr("tessera.cloud.preflight.probe_root", probed)
    box.gpus().torch().bench(1e12)
    ended, document, said = box.run(SMOKE, TESSERA_GPU="H100")
    assert (ended, rates) == (code, [])
    if code:
        rate = max(0.5, again / 1e6)
        assert f"measured twice, the root takes {rate} MB/s, below 1" in said
    else:
        assert found(document, "checkpoints")["verdict"] == "note"


def test_a_root_below_the_floor_that_is_fast_enough_is_go(box: Box) -> None:
    box.gpus().torch().bench(1e3)
    code, document, _ = box.run(SMOKE, "--min-upload", "1e9", TESSERA_GPU="H100")
    assert code == 0
    assert found(document, "checkpoints")["verdict"] == "go"


def test_a_wrong_key_and_a_folder_that_is_not_there_are_no_matter_of_the_machine(box: Box) -> None:
    with pretend_s3("InvalidAccessKeyId") as environ:
        code, document, said = box.run(SMOKE, "--root", "s3://b/p", **environ, **RENTED)
    assert code == 2
    assert "does not know this access key id" in said
    assert "secret-key" not in json.dumps(document) + said
    code, _, said = box.run(SMOKE, "--root", str(box.folder / "nowhere"))
    assert code == 2
    assert "there is no such folder" in said


def test_what_another_machine_would_change_is_told_apart_from_what_it_would_not(box: Box) -> None:
    with pretend_s3("InvalidAccessKeyId") as environ:
        box.gpus("NVIDIA GeForce RTX 5090")
        code, _, said = box.run(SMOKE, "--gpu", "H100", "--root", "s3://b/p", **environ, **RENTED)
    assert code == 2
    everywhere, _, here = said.partition(" Against this machine: ")
    assert everywhere.startswith("No-go, and no other machine would change that: root: ")
    assert "RTX 5090" not in everywhere
    assert here.startswith("GPU: ")
    assert "RTX 5090" in here
    assert "access key" not in here


def test_a_store_that_does_not_answer_is_not_counted(box: Box) -> None:
    code, _, said = box.run(
        SMOKE, "--root", "s3://b/p", "--patience", "0.1", AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="k", AWS_SECRET_ACCESS_KEY="s", **RENTED,
    )  # fmt: skip
    assert code == 75
    assert "another machine or moment may help" in said


@pytest.mark.parametrize(
    ("ahead", "code", "told"), [(600, 75, "more than 60 s"), (20, 0, ""), (-600, 75, "60 s")]
)
def test_a_clock_that_is_off(box: Box, ahead: float, code: int, told: str) -> None:
    with pretend_s3(ahead_s=ahead) as environ, variables(environ):
        ended, document, said = box.run(SMOKE, "--root", "s3://bucket/prefix", **RENTED)
        assert ended == code, said
        assert told in said
        side = "behind" if ahead > 0 else "ahead of"
        assert side in found(document, "clock")["found"]
        if code:
            refusals = Root("s3://bucket/prefix").files("refusals")
            assert len(refusals) == 1
    with pretend_s3(ahead_s=ahead * 100) as environ, variables(environ):
        ended, _, said = box.run(SMOKE, "--root", "s3://bucket/prefix")
        assert ended == 75
        assert "which refuses requests beyond 900 s" in said


def test_three_no_goes_of_a_job_are_final_and_each_is_in_the_root(box: Box) -> None:
    box.gpus(power="300.00")
    codes = [box.run(SMOKE, TESSERA_GPU="H100", **RENTED)[0] for _ in range(3)]
    assert codes == [75, 75, 2]
    root = Root(str(box.root))
    assert len(root.files("preflights/other")) == 3
    assert root.read_json(root.files("preflights")[0])["exit_code"] == 75
    # At home it is told and not counted.
    home = {"SKYPILOT_TASK_ID": "", "SKYPILOT_CLUSTER_INFO": ""}
    assert box.run(SMOKE, TESSERA_GPU="H100", **home)[0] == 75
    assert len(root.files("refusals")) == 3


def test_a_machine_that_passes_forgives_the_refusals_before_it(box: Box) -> None:
    box.torch().bench(1e3)
    for _ in range(2):
        codes = [
            box.gpus(power=power).run(SMOKE, TESSERA_GPU="H100", **RENTED)[0]
            for power in ("300.00", "300.00", "700.00")
        ]
        assert codes == [75, 75, 0]


def test_a_host_that_was_refused_before_is_named(box: Box) -> None:
    here = describe_machine(environ=RENTED, hardware=(H100, 1))
    refuse(
        Root(str(box.root)), here, wanted="1 x H100", found="1 x H100",
        reason="power limit: too low", gpus=["GPU-abc"], environ=RENTED,
    )  # fmt: skip
    code, document, _ = box.gpus().torch().bench(1e3).run(SMOKE, TESSERA_GPU="H100", **RENTED)
    assert code == 0
    assert found(document, "host")["verdict"] == "note"
    assert found(document, "host")["reason"] == "refused before, once: power limit: too low"


def test_on_a_cpu_it_looks_at_the_rest(box: Box) -> None:
    code, document, _ = box.run(SMOKE, TESSERA_DEVICE="cpu")
    assert code == 0
    names = [check["name"] for check in document["checks"]]
    assert names == ["GPU", "disk", "root", "speed"]
    assert document["projection"]["hours"] is None
    assert Root(str(box.root)).files("probes") == []


def test_on_a_cpu_it_measures_if_told_to(box: Box) -> None:
    code, document, said = box.bench(1e3).run(SMOKE, "--bench", TESSERA_DEVICE="cpu", **RENTED)
    assert code == 0, said
    assert document["projection"]["hours"] == pytest.approx(737280 / 1e3 / 3600)
    assert document["projection"]["usd"] == pytest.approx(2 * 737280 / 1e3 / 3600)


def test_nonsense_is_refused(box: Box) -> None:
    assert "TESSERA_GPUS is 'two'" in box.run(SMOKE, TESSERA_GPUS="two")[2]
    assert "TESSERA_DEVICE is 'gpu'" in box.run(SMOKE, TESSERA_DEVICE="gpu")[2]
    assert "none was given" in box.run("--set", "tokens=1")[2]
    code, _, said = box.run("nowhere.yaml")
    assert code == 2
    assert "nowhere.yaml" in said


def test_the_table_says_go_and_why_not(box: Box) -> None:
    result = CliRunner().invoke(tessera, ["preflight", SMOKE], env={"TESSERA_ROOT": str(box.root)})
    assert "Go." in result.stdout
    assert "written at" in result.stdout
    box.gpus(power="300.00")
    environ = {"TESSERA_ROOT": str(box.root), "TESSERA_GPU": "H100"}
    result = CliRunner().invoke(tessera, ["preflight", SMOKE], env=environ)
    assert "No-go." in result.stdout
    assert "below 90%" in " ".join(result.stdout.split())


def test_a_number_of_gpus_alone_asks_for_them(box: Box) -> None:
    """Without a name any model will do, and none at all will not."""
    box.gpus(count=0)
    code, _, said = box.run(SMOKE, "--gpus", "2")
    assert code == 75
    assert "2 x any GPU was asked for" in said
    box.gpus(count=2).torch(devices=2)
    code, document, said = box.run(SMOKE, "--gpus", "2", "--no-bench")
    assert (code, document["wanted"]) == (0, "2 x any GPU"), said
    assert box.run(SMOKE, "--no-bench", TESSERA_GPUS="1")[0] == 75
