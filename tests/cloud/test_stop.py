"""``tessera launch --stop``: what goes by a name is ended, or it is said that it was not.

``Pretend`` plays SkyPilot as in test_launch; below, the real ``SkyPilot`` renter asks a made-up
``sky`` module that answers as SkyPilot 0.14.1 does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tessera.cli.main import tessera
from tessera.cloud.give_back import stop
from tessera.cloud.rent import SkyPilot
from tessera.errors import InputError, RetryElsewhereError
from tests.cloud.test_launch import NAME, Pretend, at_once, vast
from tests.services.vast import PretendVast

__all__ = ["vast"]


def test_a_managed_job_is_found_without_being_told_that_it_is_one(vast: PretendVast) -> None:
    renter = Pretend(vast, jobs={7: NAME, 8: "another"}, cancelling=3)
    others = [renter.rent("another-8-1a2b3c4d-head")]
    renter.rent(f"{NAME}-7-1a2b3c4d-head")
    found = stop(renter, NAME, sleep=at_once)
    assert found.left == ()
    assert f"the managed job {NAME}" in found.ended
    assert renter.jobs == {8: "another"}
    assert list(vast.instances) == others


def test_a_cluster_and_a_job_of_one_name_are_both_ended(vast: PretendVast) -> None:
    renter = Pretend(vast, cluster=NAME, jobs={7: NAME, 9: NAME})
    assert stop(renter, NAME, sleep=at_once).ended == (
        f"the cluster {NAME}", f"the managed job {NAME}",
    )  # fmt: skip
    assert (renter.cluster, renter.jobs) == (None, {})


def test_a_machine_that_skypilot_knows_nothing_of_is_ended(vast: PretendVast) -> None:
    renter = Pretend(vast)
    number = renter.rent(f"{NAME}-7-1a2b3c4d-head")
    assert stop(renter, NAME, sleep=at_once).ended == (f"vast.ai's instance {number}",)
    assert vast.instances == {}


def test_a_misspelt_name_is_no_success(vast: PretendVast) -> None:
    renter = Pretend(vast, cluster=NAME)
    with pytest.raises(InputError, match="no such cluster or job as tessera-1c"):
        stop(renter, "tessera-1c", sleep=at_once)
    assert renter.ended == 0


def test_a_cluster_that_skypilot_cannot_take_down(vast: PretendVast) -> None:
    renter = Pretend(vast, cluster=NAME, down_fails=RuntimeError("no record"))
    renter.rent(f"{NAME}-1a2b3c4d-head")
    found = stop(renter, NAME, sleep=at_once)
    with pytest.raises(RetryElsewhereError, match=r"SkyPilot could not take down the cluster"):
        found.require()  # gone at vast.ai; elsewhere nobody knows
    assert vast.instances == {}


def test_a_job_that_is_not_over_after_all_looks_is_told(vast: PretendVast) -> None:
    renter = Pretend(vast, jobs={7: NAME}, cancelling=10**6)
    (left,) = stop(renter, NAME, sleep=at_once).left
    assert f"SkyPilot still has the managed job {NAME} (RUNNING)" in left


def test_a_controller_that_cannot_be_asked_is_not_taken_for_empty(vast: PretendVast) -> None:
    renter = Pretend(vast, unknown=RuntimeError("controller is INIT"))
    (left,) = stop(renter, NAME, sleep=at_once).left
    assert f"does not tell whether there is the managed job {NAME} (controller is INIT)" in left


def test_without_a_key_nothing_is_claimed_of_vast(
    vast: PretendVast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A launch may have left a machine there of which SkyPilot knows nothing."""
    monkeypatch.delenv("VAST_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    for renter, ended in ((Pretend(vast), ()), (Pretend(vast, cluster=NAME), (NAME,))):
        found = stop(renter, NAME, sleep=at_once)
        assert found.ended == tuple(f"the cluster {name}" for name in ended)
        with pytest.raises(RetryElsewhereError, match=f"Whether vast.ai still bills for {NAME}"):
            found.require()


# -- the real renter -------------------------------------------------------------------------------


class NotUpError(Exception):
    def __init__(self, message: str, status: str | None) -> None:
        super().__init__(message)
        self.cluster_status = status and SimpleNamespace(value=status)


class NoClusterError(ValueError):
    pass


@dataclass
class MadeUpSky:
    """The calls of SkyPilot that ending needs; a request is the answer, as a function."""

    clusters: dict[str, str] = field(default_factory=dict)
    queue: list[dict[str, Any]] = field(default_factory=list)
    controller: Exception | None = None
    cancelled: list[int] = field(default_factory=list)
    exceptions = SimpleNamespace(ClusterNotUpError=NotUpError, ClusterDoesNotExist=NoClusterError)

    def get(self, request: Any) -> Any:
        return request()

    stream_and_get = get

    def status(self, names: list[str]) -> Any:
        found = [n for n in names if n in self.clusters]
        return lambda: [{"status": SimpleNamespace(value=self.clusters[n])} for n in found]

    def down(self, name: str) -> Any:
        def answer() -> None:
            if self.clusters.pop(name, None) is None:
                raise NoClusterError(name)

        return answer

    @property
    def jobs(self) -> Any:
        def queue(**how: Any) -> Any:
            def answer() -> Any:
                if self.controller:
                    raise self.controller
                return self.queue, len(self.queue), {}, len(self.queue)

            return answer

        def cancel(job_ids: list[int]) -> Any:  # by name it would cancel none of several
            def answer() -> None:
                self.cancelled += job_ids
                self.queue = [job for job in self.queue if job["job_id"] not in job_ids]

            return answer

        return SimpleNamespace(queue_v2=queue, cancel=cancel)


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch) -> MadeUpSky:
    made_up = MadeUpSky()
    monkeypatch.setattr("tessera.cloud.rent.require_skypilot", lambda: made_up)
    return made_up


def job(number: int, name: str = NAME, status: str = "RUNNING") -> dict[str, Any]:
    return {"job_id": number, "job_name": name, "status": SimpleNamespace(value=status)}


def test_all_jobs_of_the_name_are_cancelled_by_their_numbers(
    sky: MadeUpSky, vast: PretendVast
) -> None:
    sky.queue = [job(3), job(4), job(5, f"{NAME}2")]
    assert stop(SkyPilot(), NAME, sleep=at_once).left == ()
    assert sky.cancelled == [3, 4]


def test_a_job_that_is_being_cancelled_is_there_and_left_to_it(sky: MadeUpSky) -> None:
    sky.queue = [job(3, status="CANCELLING")]
    renter = SkyPilot()
    assert renter.exists(NAME, True) == "CANCELLING"
    renter.end(NAME, True)
    assert sky.cancelled == []


@pytest.mark.parametrize("status", [None, "STOPPED"])
def test_no_controller_or_a_stopped_one_has_no_jobs(sky: MadeUpSky, status: str | None) -> None:
    sky.controller = NotUpError("no controller", status)
    assert SkyPilot().exists(NAME, True) is None


@pytest.mark.parametrize("status", ["INIT", "UP"])
def test_a_controller_that_is_not_reached_may_have_jobs(sky: MadeUpSky, status: str) -> None:
    sky.controller = NotUpError("cannot be reached", status)
    with pytest.raises(NotUpError):
        SkyPilot().exists(NAME, True)
    with pytest.raises(NotUpError):
        SkyPilot().end(NAME, True)


def test_a_cluster_is_taken_down(sky: MadeUpSky, vast: PretendVast) -> None:
    sky.clusters = {NAME: "UP"}
    assert stop(SkyPilot(), NAME, sleep=at_once).ended == (f"the cluster {NAME}",)
    assert sky.clusters == {}
    SkyPilot().end(NAME, False)  # nothing there is no error


def test_the_command_says_what_it_ended(
    sky: MadeUpSky, vast: PretendVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.cloud.give_back.BETWEEN_S", 0.0)
    sky.queue = [job(3)]
    done = CliRunner().invoke(tessera, ["launch", "--stop", NAME], standalone_mode=False)
    assert done.return_value == 0
    assert done.output == (
        f"Asking SkyPilot and vast.ai about {NAME} ...\n"
        f"Gone: the managed job {NAME}. Nothing of {NAME} bills any more.\n"
    )
    again = CliRunner().invoke(tessera, ["launch", "--stop", NAME], standalone_mode=False)
    assert isinstance(again.exception, InputError)


def test_the_command_without_a_key(
    sky: MadeUpSky, vast: PretendVast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tessera.cloud.give_back.BETWEEN_S", 0.0)
    monkeypatch.delenv("VAST_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    sky.queue = [job(3)]
    done = CliRunner().invoke(tessera, ["launch", "--stop", NAME], standalone_mode=False)
    assert done.output == (
        f"Asking SkyPilot (no vast.ai key here) about {NAME} ...\nEnded: the managed job {NAME}.\n"
    )
    assert isinstance(done.exception, RetryElsewhereError)


def test_the_command_after_ctrl_c(
    sky: MadeUpSky, vast: PretendVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sky.controller = KeyboardInterrupt()  # type: ignore[assignment]
    done = CliRunner().invoke(tessera, ["launch", "--stop", NAME], standalone_mode=False)
    assert done.return_value == 130
    assert "was broken off, so it may still bill" in done.output


def test_a_skypilot_that_may_rent_nowhere_has_rented_nothing(
    sky: MadeUpSky, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCloudAccessError(RuntimeError):
        pass

    def launch(task: Any, cluster_name: str) -> Any:
        raise NoCloudAccessError("Cloud access is not set up. Run: sky check")

    monkeypatch.setattr(sky, "launch", launch, raising=False)
    monkeypatch.setattr(sky.exceptions, "NoCloudAccessError", NoCloudAccessError, raising=False)
    with pytest.raises(InputError, match="so nothing was rented: `vastai set api-key KEY && sky"):
        SkyPilot().start(object(), NAME, False)
