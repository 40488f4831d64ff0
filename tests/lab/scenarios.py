"""What is tried in the lab: each a function that returns what it found, in a few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.chaos.objects import RunFiles
from tests.chaos.verdict import points, repeated
from tests.lab.lab import ROOT, Failure, Lab, expect, say, wait_for
from tests.services.vast import OFFERS, offer

_CPU = (
    "--env", "TESSERA_EXPERIMENT=experiments/smoke.yaml", "--env", "TESSERA_DEVICE=cpu",
    "--env", "OMP_WAIT_POLICY=PASSIVE",
)  # fmt: skip
"""Threads that wait do not spin: on two cores that other processes use too, ten times as fast."""
_SMALL = "model.layers=2 model.d_model=64 batch.tokens_per_step=2048"
_STEPS = 300
# A spike that is not applied leaves no loss, and every step has to leave one here.
_SETTINGS = (
    f"{_SMALL} tokens={_STEPS * 2048} checkpoint.every_steps=50 log_every_steps=1 "
    "stability.sigma=1000"
)
_SHORT = f"{_SMALL} tokens=102400"
_LAUNCH = (
    "tessera", "launch", "experiments/smoke.yaml", "--task", "sky/smoke_cpu.yaml", "--yes",
    *(word for setting in _SHORT.split() for word in ("--set", setting)),
)  # fmt: skip
_HEARTBEAT_S = 5.0
_UPLOAD_S = 3.0
"""Longest time that a heartbeat may be on its way to the bucket of this machine."""
_CHEAP = offer(
    199, "RTX 5090", 0.41, 0.20, "California, US", gpu_ram=32607, gpu_total_ram=32607,
    compute_cap=1200, gpu_max_power=575.0, score=900.0,
)  # fmt: skip


def plain(lab: Lab) -> str:
    """`sky launch` as typed: trains to the end, is listed with dollars, the machine goes away."""
    command = ["sky", "launch", "-y", "-c", "plain", "-i", "1", "--down"]
    done = lab.sky.run(
        *command, *_CPU, "--env", f"TESSERA_SET={_SHORT}", "sky/pretrain_h100.yaml",
        timeout=600,
    )  # fmt: skip
    expect(done.returncode == 0, f"sky launch ended with {done.returncode}")
    expect_no_secret(lab, done.stdout)
    (run,) = (row for row in lab.listed(lab.root) if row["run_id"].startswith("smoke-"))
    expect(run["status"] == "finished", f"the run is {run['status']}")
    wait_for(lambda: not lab.rented("plain"), "the machine takes itself down", seconds=300)
    (line,) = lab.billed("plain")
    expect(0 < run["cost_usd"] <= line["usd"], f"${run['cost_usd']} of a bill of ${line['usd']}")
    return (
        f"{run['step']} steps, ${run['cost_usd']:.4f} in tessera-exp, ${line['usd']:.4f} billed "
        f"until the machine took itself down"
    )


def managed(lab: Lab) -> str:
    """A managed job preempted twice: one run, losses as undisturbed, dollars as billed."""
    root = lab.new_root("managed")
    aside = ThreadPoolExecutor(1)
    undisturbed = aside.submit(lab.undisturbed, "experiments/smoke.yaml", _SETTINGS)
    submitted = lab.sky.run(
        "sky", "jobs", "launch", "-y", "-d", "-n", "managed", *_CPU,
        "--env", f"TESSERA_ROOT={root}", "--env", f"TESSERA_SET={_SETTINGS}",
        "--env", f"TESSERA_HEARTBEAT_S={_HEARTBEAT_S}", "sky/pretrain_h100_managed.yaml",
        timeout=300,
    )  # fmt: skip
    expect(submitted.returncode == 0, f"sky jobs launch ended with {submitted.returncode}")
    files = RunFiles(lab.objects("managed"))
    for at_step in (100, 200):
        wait_for(
            lambda at=at_step: max(files.complete(), default=0) >= at,  # type: ignore[misc]
            f"a checkpoint of step {at_step}", seconds=600, every=0.2,
        )  # fmt: skip
        (id,) = lab.rented("managed")  # noqa: A001
        lab.outbid(id)
        say(f"managed: instance {id} was taken away after step {at_step}")
    wait_for(lambda: lab.ended("managed"), "the managed job ends", seconds=600, every=3)
    expect(lab.status("managed") == "SUCCEEDED", f"the job is {lab.status('managed')}")
    wait_for(lambda: not lab.rented("managed"), "the last machine is destroyed", seconds=120)
    (run,) = lab.listed(root)
    expect(run["status"] == "finished", f"the run is {run['status']}")
    expect_same(files, undisturbed.result(), _STEPS)
    estimated = expect_dollars(lab, files, run)
    code, _ = lab.reconcile(root)
    expect(code in (0, 3), f"tessera-exp reconcile ended with {code}")  # 3: other roots' machines
    (run,) = lab.listed(root)
    usd = sum(line["usd"] for line in lab.billed("managed"))
    expect(abs(run["cost_usd"] - usd) < 1e-4, f"reconciled to ${run['cost_usd']}, billed ${usd}")
    return f"3 instances, losses equal bit for bit, {estimated}, reconciled to the bill"


def refused(lab: Lab) -> str:
    """The list is headed by another GPU: nothing trains, and the job ends after two of them."""
    root = lab.new_root("refused")
    lab.vast.offers = [_CHEAP, *OFFERS]
    submitted = lab.sky.run(
        "sky", "jobs", "launch", "-y", "-d", "-n", "refused", *_CPU,
        "--env", f"TESSERA_ROOT={root}", "--env", "TESSERA_MAX_REFUSALS=2",
        "sky/pretrain_h100_managed.yaml", timeout=300,
    )  # fmt: skip
    expect(submitted.returncode == 0, f"sky jobs launch ended with {submitted.returncode}")
    wait_for(lambda: lab.ended("refused"), "the managed job ends", seconds=600, every=3)
    expect(lab.status("refused") == "FAILED", f"the job is {lab.status('refused')}")
    wait_for(lambda: not lab.rented("refused"), "its machines are destroyed", seconds=120)
    bill = lab.billed("refused")
    records = lab.objects("refused").keys("refusals/")
    expect(len(bill) == 2, f"{len(bill)} instances were rented, expected 2")
    expect(len(records) == 2, f"the root has {records}, expected 2 refusals")
    expect(not lab.objects("refused").keys("runs/"), "something trained on a refused machine")
    return f"2 machines refused, ${sum(line['usd'] for line in bill):.4f}, none left"


def provider_faults(lab: Lab) -> str:
    """vast.ai answers nonsense and a 500 while a machine is asked for: nothing is rented."""
    lab.vast.offers = list(OFFERS)
    before = len(lab.vast.requests)
    lab.vast.fault("429", times=2, path="/bundles")  # tried again by vast's own SDK
    lab.vast.fault("500", path="/asks")
    lab.vast.fault("nonsense", path="/instances")
    launch = ["sky", "launch", "-y", "-c", "faults", "-i", "1", "--down", *_CPU]
    done = lab.sky.run(*launch, "sky/pretrain_h100.yaml")
    met = {request["fault"] for request in lab.vast.requests[before:]}
    expect({"429", "500", "nonsense"} <= met, f"only {met} came to pass")
    expect(done.returncode != 0, "the launch succeeded in spite of its faults")
    expect("Failed to provision" in done.stdout, "the launch does not say why it failed")
    expect(not lab.billed("faults"), "a machine was rented all the same")
    return "429, 500 and nonsense: the launch fails in seconds, nothing was rented"


def lost_answer(lab: Lab) -> str:
    """A machine is rented and the answer lost: both machines are named, one command ends them.

    vast's SDK asks again after a 502, so two carry the cluster's label, and SkyPilot's provisioner
    wants exactly one: it waits for ever if it meets both ready, and takes the second for a worker
    if it met the first alone. It says nothing either way; `tessera-exp reconcile` does, once they
    are half an hour old: here they are made an hour older.
    """
    lab.vast.offers = list(OFFERS)
    root = lab.new_root("lost-answer")
    lab.vast.fault("lost", path="/asks")
    submitted = lab.sky.run(
        "sky", "launch", "-y", "--async", "-c", "lost-answer", *_CPU, "sky/pretrain_h100.yaml"
    )  # fmt: skip
    expect(submitted.returncode == 0, f"sky launch --async ended with {submitted.returncode}")
    wait_for(lambda: len(lab.rented("lost-answer")) == 2, "the SDK asks a second time", seconds=120)
    for row in lab.rented("lost-answer").values():
        row["start_date"] -= 3600
    code, found = lab.reconcile(root)
    expect(code == 3, f"tessera-exp reconcile ended with {code}")
    for id in lab.rented("lost-answer"):  # noqa: A001
        expect(f"vastai destroy instance {id}" in found, f"instance {id} is not named: {found}")
    down = lab.sky.run("sky", "down", "-y", "lost-answer")
    expect(down.returncode == 0, f"sky down ended with {down.returncode}")
    wait_for(lambda: not lab.rented("lost-answer"), "sky down ends both machines", seconds=60)
    return "rented twice; tessera-exp reconcile names both machines, sky down ends both"


def wrong_key(lab: Lab) -> str:
    """The bucket refuses the key: a sentence, a final code, and the machine goes away."""
    done = lab.sky.run(
        "sky", "launch", "-y", "-c", "wrong-key", "-i", "0", "--down", *_CPU,
        "--env", f"AWS_ENDPOINT_URL={lab.strict.endpoint}", "--env", f"TESSERA_ROOT={lab.root}",
        "--env", "AWS_SECRET_ACCESS_KEY=not-the-key-of-this-bucket",
        "--env", "TESSERA_GPU=NVIDIA",  # any: the list is headed by a wrong one at this time
        "sky/pretrain_h100.yaml",
        timeout=600,
    )  # fmt: skip
    expect("failed with return code list: [2]" in done.stdout, "the job's code is not 2")
    expect("Traceback" not in done.stdout, "a traceback instead of a sentence")
    expect("not-the-key-of" not in done.stdout, "the key is in the log")
    wait_for(lambda: not lab.rented("wrong-key"), "the machine takes itself down", seconds=300)
    sentence = next(line for line in done.stdout.splitlines() if "Error:" in line)
    return sentence.partition("Error:")[2].strip()


def launched(lab: Lab) -> str:
    """`tessera launch` to the end: plan, machine, corpus, training, log, and all given back."""
    done = lab.sky.run(*_LAUNCH, "--run-id", "launched", timeout=600)
    expect(done.returncode == 0, f"tessera launch ended with {done.returncode}")
    expect_no_secret(lab, done.stdout)
    gone = "Done, and launched is gone: nothing of it bills any more."
    expect(gone in done.stdout, f"it did not say: {gone}")
    expect(not lab.rented("launched"), "a machine of it is still there")
    (run,) = (row for row in lab.listed(lab.root) if row["run_id"] == "launched")
    expect(run["status"] == "finished", f"the run is {run['status']}")
    (line,) = lab.billed("launched")
    expect(0 < run["cost_usd"] <= line["usd"], f"${run['cost_usd']} of a bill of ${line['usd']}")
    expect_ending(lab, "launched", "done")
    return f"${run['cost_usd']:.4f} in tessera-exp, ${line['usd']:.4f} billed, all given back"


def stopped(lab: Lab) -> str:
    """Ctrl-C while a machine is set up gives it back; while it trains it only stops following."""
    name = "stopped"
    with lab.sky.start(*_LAUNCH, "--run-id", name) as launch:
        wait_for(lambda: lab.rented(name), "a machine is rented", seconds=200)
        code = launch.interrupt(seconds=200)
        expect(code == 130, f"interrupted while renting, it ended with {code}")
        expect(
            "Stopped before it ran; nothing of it is left" in launch.said(), launch.said()[-300:]
        )
    expect(not lab.rented(name), "Ctrl-C while renting left a machine")
    expect_ending(lab, name, "interrupted")

    with lab.sky.start(*_LAUNCH, "--run-id", name) as launch:
        wait_for(lambda: lab.objects(ROOT).keys(f"runs/{name}/attempts/"), "it trains", seconds=400)
        code = launch.interrupt(seconds=60)
        expect(code == 130, f"interrupted while training, it ended with {code}")
        said = launch.said()
        expect(f"{name} costs about $" in said, "it does not say what goes on costing money")
        expect(f"`tessera launch --stop {name}`" in said, "it does not say how to stop that")
    expect(len(lab.rented(name)) == 1, "Ctrl-C while training took the machine away")
    expect_stopped(lab, name, f"the cluster {name}")
    bill = lab.billed(name)
    expect(len(bill) == 2, f"{len(bill)} machines were rented, expected 2")
    return f"given back, followed no more, stopped: ${sum(line['usd'] for line in bill):.4f} billed"


def left_alone(lab: Lab) -> str:
    """A managed job that was launched and left alone is ended by one command."""
    name = "left-alone"
    done = lab.sky.run(
        "tessera", "launch", "experiments/smoke.yaml", "--set", "tokens=65536000", "--managed",
        "--yes", "--detach", "--run-id", name,
    )  # fmt: skip
    expect(done.returncode == 0, f"tessera launch ended with {done.returncode}")
    expect(f"sky jobs cancel -n {name}" in done.stdout, "it does not say how to stop it")
    wait_for(lambda: lab.rented(name), "its controller rents a machine", seconds=200)
    expect_stopped(lab, name, f"the managed job {name}")
    return f"cancelled, {len(lab.billed(name))} machine destroyed"


@dataclass(frozen=True)
class Scenario:
    """A name to ask for it, and what is done."""

    name: str
    play: Callable[[Lab], str]


GROUPS = (
    (Scenario("plain", plain), Scenario("managed", managed)),
    (Scenario("refused", refused), Scenario("wrong-key", wrong_key)),
    (Scenario("faults", provider_faults),),
    (Scenario("lost-answer", lost_answer),),
    (Scenario("launched", launched), Scenario("left-alone", left_alone)),
    (Scenario("stopped", stopped),),
)
"""Groups run one after the other; what is in one runs at the same time."""


def expect_stopped(lab: Lab, name: str, what: str) -> None:
    """`tessera launch --stop` says what it ended, and nothing of it is left."""
    done = lab.sky.run("tessera", "launch", "--stop", name, timeout=400)
    expect(done.returncode == 0, f"--stop ended with {done.returncode}: {done.stdout[-300:]}")
    expect(f"Gone: {what}" in done.stdout, f"--stop said: {done.stdout[-300:]}")
    expect(not lab.rented(name), "--stop left a machine")


def expect_ending(lab: Lab, run_id: str, outcome: str) -> None:
    """The newest launch of that run is in the root, and so is how it ended."""
    found = lab.objects(ROOT)
    keys = sorted(key for key in found.keys("launches/") if not key.endswith(".end.json"))
    newest = [key for key in keys if json.loads(found.read(key))["run_id"] == run_id][-1]
    ending = json.loads(found.read(newest.replace(".json", ".end.json")))
    expect(ending["outcome"] == outcome, f"the launch's record says {ending}")
    expect(ending["may_bill"] == [], f"the record names {ending['may_bill']}")


def expect_no_secret(lab: Lab, text: str) -> None:
    """Neither key of the person may be in what SkyPilot printed."""
    for secret in lab.secrets():
        expect(secret not in text, "a key is in what SkyPilot printed")


def expect_same(files: RunFiles, undisturbed: RunFiles, steps: int) -> None:
    """Every point of the surviving attempts as the undisturbed run has it, once each."""
    found, expected = points(files), points(undisturbed)
    missing = sorted(set(range(1, steps + 1)) - found["train/loss"].keys())
    twice = [step for key, step, _ in repeated(files) if key == "train/loss"]
    expect(not missing and not twice, f"steps without a loss: {missing}, with two: {twice}")
    for key, values in expected.items():
        differ = [step for step in values if found[key].get(step) != values[step]]
        expect(not differ, f"{key} differs at steps {differ[:5]}")
    expect(files.weights_digest() == undisturbed.weights_digest(), "the weights differ")


def expect_dollars(lab: Lab, files: RunFiles, run: dict[str, Any]) -> str:
    """tessera-exp's dollars against the provider's own bill.

    They may be short of it by what no process could record: one and a half heartbeats and an upload
    before each preemption, the disk of a stopped machine, and the time from the end of training
    until SkyPilot destroyed the last machine. They are never above it.
    """
    bill = lab.billed("managed")
    expect(len(bill) == 3, f"{len(bill)} instances were rented, expected 3")
    total = sum(line["usd"] for line in bill)
    tolerance = 0.0
    for line in bill[:-1]:
        rate, stopped = line["prices"][0]["usd_per_hour"], line["prices"][-1]
        tolerance += rate * (1.5 * _HEARTBEAT_S + _UPLOAD_S) / 3600
        tolerance += stopped["usd_per_hour"] * (line["end"] - stopped["from"]) / 3600
    ended = max(ending["ended_at"] for ending in files.endings().values())
    tolerance += bill[-1]["prices"][-1]["usd_per_hour"] * (bill[-1]["end"] - ended) / 3600
    said = f"${run['cost_usd']:.4f} in tessera-exp, ${total:.4f} billed"
    if not total - tolerance <= run["cost_usd"] <= total + 1e-4:
        raise Failure(f"{said}, which is not within ${tolerance:.4f} below it")
    return f"{said} (tolerance ${tolerance:.4f} below)"
