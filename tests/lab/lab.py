"""The lab itself: a pretended vast.ai, a real bucket, and SkyPilot, in a sealed network."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.chaos.objects import BucketObjects, FolderObjects, RunFiles
from tests.lab.bake import LAB, Image
from tests.lab.enter import private_tmp
from tests.lab.instances import Namespaces
from tests.lab.network import GATEWAY, seal
from tests.lab.skypilot import VAST_KEY, SkyPilot
from tests.services.stores import Store, serve
from tests.services.vast import PretendVast

RUN = LAB / "run"
ROOT = "runs"
"""Prefix of the configured root in the bucket."""
T = TypeVar("T")


class Failure(AssertionError):  # noqa: N818 - what a scenario expected and did not find
    """A scenario's own sentence."""


@dataclass
class Lab:
    """What scenarios work with."""

    image: Image
    vast: PretendVast
    machines: Namespaces
    sky: SkyPilot
    store: Store
    strict: Store
    """Another bucket, whose server looks at signatures."""

    @property
    def root(self) -> str:
        """The root that the person configured."""
        return self.store.url(ROOT)

    def new_root(self, name: str) -> str:
        """A root of its own with the same corpus."""
        source, target = self.objects(ROOT), self.objects(name)
        for key in source.keys("corpora/"):
            target.write(key, source.read(key))
        return self.store.url(name)

    def objects(self, name: str) -> BucketObjects:
        """What lies in the root of that name."""
        return BucketObjects(self.store, name)

    def tessera(self, *arguments: str, program: str = "tessera") -> str:
        """A command of ours on the laptop, with the keys of the bucket; what it printed."""
        done = self.sky.run(program, *arguments, timeout=300, more=self.store.environment())
        expect(done.returncode == 0, f"{program} {arguments[0]} ended with {done.returncode}")
        return done.stdout

    def listed(self, root: str) -> list[dict[str, Any]]:
        """What `tessera-exp list` says of a root."""
        text = self.tessera("list", "--json", "--root", root, program="tessera-exp")
        rows: list[dict[str, Any]] = json.loads(text[text.index("[") : text.rindex("]") + 1])
        return rows

    def reconcile(self, root: str) -> tuple[int, str]:
        """`tessera-exp reconcile --yes`: its code, and what it printed."""
        command = ["tessera-exp", "reconcile", "--yes", "--provider", "vast", "--root", root]
        done = self.sky.run(*command, more=self.store.environment())
        return done.returncode, done.stdout

    def undisturbed(self, experiment: str, settings: str) -> RunFiles:
        """The same training on this machine, in the same versions, with nobody in its way."""
        root = FolderObjects(RUN / "undisturbed")
        for key in self.objects(ROOT).keys("corpora/"):
            root.write(key, self.objects(ROOT).read(key))
        command = [str(self.image.python), "-c", "from tessera.cli.main import main; main()"]
        command += ["train", experiment, "--root", str(root.folder)]
        for setting in settings.split():
            command += ["--set", setting]
        more = {"TESSERA_CACHE": str(RUN / "undisturbed-cache"), "OMP_WAIT_POLICY": "PASSIVE"}
        done = self.sky.run(*command, timeout=600, more=more)
        expect(done.returncode == 0, f"the undisturbed run ended with {done.returncode}")
        return RunFiles(root)

    def outbid(self, id: int) -> None:  # noqa: A002 - an instance's number at vast.ai
        """Somebody else takes its host: the instance stops, and that offer is no longer there."""
        host = self.vast.instances[id]["machine_id"]
        self.vast.offers = [row for row in self.vast.offers if row["machine_id"] != host]
        self.vast.preempt(id)

    def rented(self, name: str) -> dict[int, dict[str, Any]]:
        """The instances that exist now for the cluster or job of that name."""
        rows = dict(self.vast.instances)
        return {at: row for at, row in rows.items() if (row["label"] or "").startswith(name)}

    def billed(self, name: str) -> list[dict[str, Any]]:
        """The provider's bill for the cluster or job of that name, in the order of renting."""
        return [line for line in self.vast.bill() if line["label"].startswith(name)]

    def status(self, name: str) -> str:
        """Of the managed job of that name, as `sky jobs queue` has it."""
        return next((str(job["status"]) for job in self.sky.jobs() if job["job_name"] == name), "")

    def ended(self, name: str) -> bool:
        """Whether the managed job is over, however it ended."""
        return self.status(name) in ("SUCCEEDED", "CANCELLED") or "FAILED" in self.status(name)

    def secrets(self) -> list[str]:
        """What nobody may print."""
        return [self.store.secret_key, VAST_KEY]


def expect(holds: bool, sentence: str) -> None:
    """A scenario's assertion."""
    if not holds:
        raise Failure(sentence)


def wait_for(look: Callable[[], T], what: str, *, seconds: float, every: float = 0.5) -> T:
    """The first true answer of ``look``; a failure once the time is over."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise Failure(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(every)
    return found


@contextmanager
def build(image: Image) -> Iterator[Lab]:
    """Set everything up; called inside the lab's namespaces, which take it all down."""
    shutil.rmtree(RUN, ignore_errors=True)
    for name in ("home", "logs", "network"):
        (RUN / name).mkdir(parents=True)
    private_tmp(RUN / "tmp")
    bundle = seal(RUN / "network")
    machines = Namespaces(image, RUN / "instances")
    with (
        serve("moto", RUN / "s3", host=GATEWAY) as store,
        serve("rclone", RUN / "s3", host=GATEWAY) as strict,
        PretendVast(machines=machines, host=GATEWAY) as vast,
    ):
        # Threads that wait do not spin: on two cores that all machines share, ten times as fast.
        machines.variables = {"VAST_URL": vast.url, "OMP_WAIT_POLICY": "PASSIVE"}
        sky = SkyPilot(RUN / "home", RUN / "logs", bundle, vast.url)
        sky.furnish()
        lab = Lab(image, vast, machines, sky, store, strict)
        given = {**store.environment(), "TESSERA_ROOT": lab.root}
        done = sky.run("tessera", "configure", "--from-env", more=given)
        expect(done.returncode == 0, f"tessera configure: {done.stdout}")
        lab.tessera("corpus", "build", "data_manifests/sample.yaml", "--root", lab.root)
        started = sky.run("sky", "api", "start")
        expect(started.returncode == 0, "SkyPilot's API server did not start")
        yield lab


def say(text: str) -> None:
    """A line of progress, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def show_logs(lab: Lab, name: str) -> None:
    """The ends of all logs that have to do with a cluster or job of that name."""
    instances = [line["id"] for line in lab.billed(name)]
    logs = [path for path in sorted(lab.sky.logs.glob("*.log")) if f" {name} " in _head(path)]
    logs += [RUN / "instances" / str(id) / "console.log" for id in instances]  # noqa: A001
    logs += sorted((lab.sky.home / "sky_logs").glob("jobs_controller/*.log"))
    logs += sorted((lab.sky.home / "sky_logs").glob("*/provision.log"))[-1:]
    logs.append(lab.sky.home / ".sky" / "api_server" / "server.log")
    for path in logs:
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()[-40:]
            print(f"---- {path}", *(line[:400] for line in lines), sep="\n", flush=True)
    for request in lab.vast.requests[-20:]:
        print(
            f"vast.ai: {request['method']} {request['path']} {request['code']} {request['fault']}"
        )


def _head(path: Path) -> str:
    with path.open(errors="replace") as file:
        return file.readline()
