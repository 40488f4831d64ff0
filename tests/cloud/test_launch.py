"""A launch that starts, that does not, that is interrupted: what is recorded and what still bills.

SkyPilot itself is not here: ``Renter``, the boundary through which a launch uses it, is played by
``Pretend``, which rents rows at a pretend vast.ai as SkyPilot would (label ``<name>-<user>-head``).
The client, the HTTP, the search for what still bills and its end are real. Stock SkyPilot plans
such tasks in tests/sky, and launches them for real in tests/lab.
"""

from __future__ import annotations

import contextlib
import io
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tessera.cloud.cards import card_named
from tessera.cloud.launch import (
    Order,
    check,
    cluster_name,
    costs,
    launch,
    require_settings,
    run_id_of,
)
from tessera.cloud.plan import make_plan
from tessera.cloud.rent import Followed, ShownLog, is_labelled
from tessera.cloud.skypilot import TaskFile
from tessera.cloud.speeds import shipped
from tessera.errors import ConflictError, InputError, RetryElsewhereError
from tessera.experiment import load_experiment
from tessera.runs import Attempt, Ending, create_or_open
from tessera.storage import Root, open_root
from tests.cloud.offered import H100, H200, other
from tests.services.vast import PretendVast

REPOSITORY = Path(__file__).parents[2]
ONE_B = REPOSITORY / "experiments" / "tessera_1b.yaml"
KEY = "5ecret-of-the-account"
NAME = "tessera-1b-00c0ffee"


class AsIsOrder(Order):
    """An order whose task is not made: that takes SkyPilot, seconds to import."""

    def task(self) -> Any:
        return {"envs": self.envs()}


def at_once(seconds: float) -> None:
    """No waiting between two looks."""


@dataclass
class Pretend:
    """SkyPilot, played: it rents one row at the pretend vast.ai, unless told to fail.

    ``jobs`` are managed jobs, number to name; ``cancelling`` looks pass until a cancelled one is
    over. ``cluster`` is what it has a record of, wherever that is.
    """

    vast: PretendVast
    fails: BaseException | None = None
    fails_after_renting: BaseException | None = None
    unknown: Exception | None = None
    down_fails: BaseException | None = None
    code: int = 0
    exit_code: int | None = None
    follow_raises: BaseException | None = None
    cluster: str | None = None
    jobs: dict[int, str] = field(default_factory=dict)
    cancelling: int = 0
    cancelled: set[str] = field(default_factory=set)
    task: Any = None
    ended: int = 0

    def rent(self, label: str) -> int:
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{self.vast.url}/api/v0/asks/101/"
        return int(httpx.put(url, json={"label": label}, headers=headers).json()["new_contract"])

    def exists(self, name: str, managed: bool) -> str | None:
        if not managed:
            return "UP" if self.cluster == name else None
        if self.unknown:
            raise self.unknown
        if name in self.cancelled:
            self.cancelling -= 1
            if self.cancelling < 0:
                self.jobs = {number: job for number, job in self.jobs.items() if job != name}
        return "RUNNING" if name in self.jobs.values() else None

    def start(self, task: Any, name: str, managed: bool) -> int | None:
        self.task = task
        if self.fails:
            raise self.fails
        job = "-7" if managed else ""
        self.rent(f"{name}{job}-1a2b3c4d-head")
        if managed:
            self.jobs[7] = name
        else:
            self.cluster = name
        if self.fails_after_renting:
            raise self.fails_after_renting
        return 7 if managed else 1

    def follow(self, name: str, job: int | None, managed: bool) -> Followed:
        if self.follow_raises:
            raise self.follow_raises
        return Followed(self.code, self.exit_code)

    def end(self, name: str, managed: bool) -> None:
        self.ended += 1
        if self.down_fails:
            raise self.down_fails
        if managed:
            self.cancelled.add(name)
        elif self.cluster == name:
            self.cluster = None
        for number, row in list(self.vast.instances.items()):
            if is_labelled(row["label"], name, managed):
                headers = {"Authorization": f"Bearer {KEY}"}
                httpx.request(
                    "DELETE", f"{self.vast.url}/api/v0/instances/{number}/", headers=headers
                )


@pytest.fixture
def vast(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendVast]:
    with PretendVast() as server:
        monkeypatch.setenv("VAST_URL", server.url)
        monkeypatch.setenv("VAST_API_KEY", KEY)
        yield server


@pytest.fixture
def root(tmp_path: Path) -> Root:
    (tmp_path / "root").mkdir()
    return open_root(str(tmp_path / "root"))


def order(**changes: Any) -> Order:
    settings = load_experiment(ONE_B)
    plan = make_plan(settings, [H100, H200, other(H100, usd_per_hour=2.5, region="X")], shipped())
    given: dict[str, Any] = {
        "experiment": "experiments/tessera_1b.yaml",
        "overrides": ("tokens=65536", "description=two words"),
        "run_id": NAME,
        "name": NAME,
        "file": TaskFile(REPOSITORY / "sky" / "pretrain_h100.yaml"),
        "line": plan.lines[0],
        "alternatives": tuple(line.offer for line in plan.lines),
        "card": None,
        "budget_usd": 250.0,
        "managed": False,
        "root_url": "s3://bucket/x",
    }
    return AsIsOrder(**{**given, **changes})


def records(root: Root, kind: str = ".json") -> list[dict[str, Any]]:
    names = [n for n in root.children("launches") if n.endswith(".end.json") == (kind != ".json")]
    return [root.read_json(f"launches/{name}") for name in names]


def test_a_job_that_is_done_leaves_a_record_and_no_machine(vast: PretendVast, root: Root) -> None:
    said: list[str] = []
    assert launch(order(), root, Pretend(vast), said.append, sleep=at_once) == 0
    assert vast.instances == {}
    (record,) = records(root)
    assert record["run_id"] == record["name"] == NAME
    assert record["offer"]["instance_type"] == "1x-H100_SXM-32-65536"
    assert record["catalog_usd_per_hour"] == 1.87
    assert record["budget_usd"] == 250.0
    assert record["may_rent"] == [["Vast", "1x-H100_SXM-32-65536"]]
    assert record["command"].startswith(f"sky launch -c {NAME} ")
    (end,) = records(root, ".end.json")
    assert (end["outcome"], end["may_bill"]) == ("done", [])
    assert said[-1].endswith("nothing of it bills any more.")


def test_what_the_job_is_handed(vast: PretendVast, root: Root) -> None:
    renter = Pretend(vast)
    launch(order(card=card_named("H200")), root, renter, lambda _: None, sleep=at_once)
    assert renter.task["envs"] == {
        "TESSERA_EXPERIMENT": "experiments/tessera_1b.yaml",
        "TESSERA_SET": "tokens=65536 'description=two words'",
        "TESSERA_RUN_ID": NAME,
        "TESSERA_CATALOG_USD_PER_HOUR": "1.87",
        "TESSERA_BUDGET_USD": "250",
        "TESSERA_GPU": "H200",
    }


@pytest.mark.parametrize("after", [False, True])
def test_what_did_not_start_leaves_nothing_that_bills(
    vast: PretendVast, root: Root, after: bool
) -> None:
    error = RuntimeError("\x1b[31mFailed to provision:\x1b[0m\nno machine answered")
    fault = {"fails_after_renting" if after else "fails": error}
    with pytest.raises(RetryElsewhereError) as caught:
        launch(order(), root, Pretend(vast, **fault), lambda _: None, sleep=at_once)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert sentence == (
        f"{NAME} did not start (Failed to provision); nothing of it is left that bills."
    )
    assert vast.instances == {}
    assert len(vast.bill()) == int(after)
    (end,) = records(root, ".end.json")
    assert (end["outcome"], end["reason"]) == ("not started", "Failed to provision")


def test_a_machine_that_skypilot_lost_is_found_by_its_label_and_ended(
    vast: PretendVast, root: Root
) -> None:
    """SkyPilot fails twice, to start and to take down; others' machines are left alone."""
    renter = Pretend(
        vast, fails_after_renting=RuntimeError("no ssh"), down_fails=RuntimeError("no record")
    )
    others = [renter.rent(f"{NAME}2-1a2b3c4d-head"), renter.rent("mine")]
    with pytest.raises(RetryElsewhereError, match="nothing of it is left that bills"):
        launch(order(), root, renter, lambda _: None, sleep=at_once)
    assert sorted(vast.instances) == others


def test_a_machine_that_cannot_be_ended_is_named_with_its_price(
    vast: PretendVast, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretendVast, "_end", lambda self, number: None)  # "success", and it stays
    renter = Pretend(vast, fails_after_renting=RuntimeError("no ssh"))
    with pytest.raises(RetryElsewhereError) as caught:
        launch(order(), root, renter, lambda _: None, sleep=at_once)
    (number,) = vast.instances
    sentence = str(caught.value)
    assert f"instance {number} ({NAME}-1a2b3c4d-head) is still there and bills $1.87/h" in sentence
    assert "https://cloud.vast.ai/instances/" in sentence
    (end,) = records(root, ".end.json")
    assert str(number) in end["may_bill"][0]


@pytest.mark.parametrize("fault", ["500", "403"])
def test_a_provider_that_does_not_answer_is_not_taken_for_empty(
    vast: PretendVast, root: Root, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.cloud.vast._WAIT", lambda state: 0.0)
    vast.fault(fault, times=99, path="/api/v1/instances")
    with pytest.raises(RetryElsewhereError) as caught:
        launch(order(), root, Pretend(vast, fails=RuntimeError("x")), lambda _: None, sleep=at_once)
    assert f"Whether vast.ai still bills for {NAME} is not known" in str(caught.value)
    assert "https://cloud.vast.ai/instances/" in str(caught.value)
    assert KEY not in str(caught.value)


def test_without_a_key_nobody_can_make_sure(
    vast: PretendVast, root: Root, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VAST_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RetryElsewhereError, match=r"no vast\.ai key here to make sure"):
        launch(order(), root, Pretend(vast, fails=RuntimeError("x")), lambda _: None, sleep=at_once)


def test_ctrl_c_while_it_starts_gives_the_machine_back(vast: PretendVast, root: Root) -> None:
    said: list[str] = []
    renter = Pretend(vast, fails_after_renting=KeyboardInterrupt())
    assert launch(order(), root, renter, said.append, sleep=at_once) == 130
    assert vast.instances == {}
    assert said[-1] == "Stopped before it ran; nothing of it is left that bills."


def test_a_ctrl_c_that_a_library_swallows_gives_the_machine_back_too(
    vast: PretendVast, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    renter, said = Pretend(vast), list[str]()
    start = renter.start

    def swallowing(*arguments: Any) -> int | None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return start(*arguments)

    monkeypatch.setattr(renter, "start", swallowing)
    before = signal.getsignal(signal.SIGINT)
    assert launch(order(), root, renter, said.append, sleep=at_once) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert vast.instances == {}
    assert said[-1] == "Stopped before it ran; nothing of it is left that bills."


def test_a_job_in_the_background_goes_on_at_ctrl_c(
    vast: PretendVast, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    renter = Pretend(vast)
    start = renter.start

    def told(*arguments: Any) -> int | None:
        signal.raise_signal(signal.SIGINT)
        return start(*arguments)

    monkeypatch.setattr(renter, "start", told)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts `launch ... &`
    try:
        assert launch(order(), root, renter, lambda _: None, detach=True, sleep=at_once) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(vast.instances) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no ssh")])
def test_a_machine_that_appears_after_the_first_empty_look_is_found(
    vast: PretendVast, root: Root, error: BaseException
) -> None:
    """What was being rented when the launch was called off arrives seconds later."""
    renter, looks = Pretend(vast, fails=error), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            renter.rent(f"{NAME}-1a2b3c4d-head")

    with contextlib.suppress(RetryElsewhereError):
        launch(order(), root, renter, lambda _: None, sleep=sleep)
    assert len(vast.bill()) == 1
    assert vast.instances == {}
    assert len(looks) == 6  # two empty looks, the machine, and four empty ones in a row
    assert min(looks) >= 1.0


def test_a_second_ctrl_c_says_what_was_not_given_back(vast: PretendVast, root: Root) -> None:
    said: list[str] = []
    renter = Pretend(vast, fails_after_renting=KeyboardInterrupt(), down_fails=KeyboardInterrupt())
    assert launch(order(), root, renter, said.append, sleep=at_once) == 130
    command = f"`tessera launch --stop {NAME}`"
    assert command in said[0]  # told before it begins
    assert f"{NAME} back was broken off, so it may still bill; end it with {command}" in said[-1]
    assert "https://cloud.vast.ai/instances/" in said[-1]
    (end,) = records(root, ".end.json")
    assert (end["outcome"], end["may_bill"][0][:6]) == ("interrupted", "Giving")


@pytest.mark.parametrize("done", [False, True])
def test_ctrl_c_between_two_looks_names_the_machine_that_is_still_there(
    vast: PretendVast, root: Root, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretendVast, "_end", lambda self, number: None)

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    said: list[str] = []
    renter = Pretend(vast, fails_after_renting=None if done else RuntimeError("no ssh"))
    assert launch(order(), root, renter, said.append, sleep=sleep) == 130
    (number,) = vast.instances
    assert f"instance {number} ({NAME}-1a2b3c4d-head) is still there" in said[-1]
    (end,) = records(root, ".end.json")
    assert end["outcome"] == ("done" if done else "not started")


def test_ctrl_c_while_following_says_what_goes_on_costing(vast: PretendVast, root: Root) -> None:
    said: list[str] = []
    renter = Pretend(vast, follow_raises=KeyboardInterrupt())
    assert launch(order(), root, renter, said.append, sleep=at_once) == 130
    assert len(vast.instances) == 1
    assert "$2.05/h (at most $4.50/h)" in said[-1]
    assert f"`tessera launch --stop {NAME}` or `sky down {NAME}`" in said[-1]
    assert f"`sky logs {NAME}`" in said[-1]


def test_a_log_that_breaks_off_is_not_the_end_of_the_job(vast: PretendVast, root: Root) -> None:
    renter = Pretend(vast, follow_raises=ConnectionError("reset by peer"))
    with pytest.raises(
        RetryElsewhereError, match=r"reset by peer\), the job did not\. .*\$2\.05/h"
    ):
        launch(order(), root, renter, lambda _: None, sleep=at_once)
    assert len(vast.instances) == 1


def test_a_log_that_ends_before_the_job_is_not_its_end(vast: PretendVast, root: Root) -> None:
    """SkyPilot's code 101: it is not over."""
    with pytest.raises(RetryElsewhereError) as caught:
        launch(order(), root, Pretend(vast, code=101), lambda _: None, sleep=at_once)
    assert str(caught.value).startswith(f"The log of {NAME} broke off, the job did not. {NAME} ")
    assert f"`sky logs {NAME}`. Stop it: `tessera launch --stop {NAME}`" in str(caught.value)
    assert len(vast.instances) == 1
    assert records(root, ".end.json") == []  # it has not ended


def test_detached(vast: PretendVast, root: Root) -> None:
    said: list[str] = []
    renter = Pretend(vast, follow_raises=AssertionError("nobody follows"))
    assert launch(order(), root, renter, said.append, detach=True, sleep=at_once) == 0
    assert said == [costs(order())]


@pytest.mark.parametrize("code", [2, 3, 75, None])
def test_a_failed_job_ends_with_the_trainer_s_code_and_keeps_its_machine_for_a_look(
    vast: PretendVast, root: Root, code: int | None
) -> None:
    """None: it never came to an attempt, such as on a wrong GPU; another machine may help."""
    if code is not None:
        _attempt(root, ended_at=time.time() + 60, exit_code=code)
        _attempt(root, ended_at=time.time() - 3600, exit_code=1)  # of an earlier launch
    said: list[str] = []
    renter = Pretend(vast, code=100)
    expected = 75 if code is None else code
    assert launch(order(), root, renter, said.append, sleep=at_once) == expected
    assert len(vast.instances) == 1
    assert f"`tessera launch --stop {NAME}` ends it now" in said[-1]


@pytest.mark.parametrize("code", [2, 75])
def test_the_code_that_the_log_tells_is_the_job_s(vast: PretendVast, root: Root, code: int) -> None:
    """It may have left before an attempt of the run could say how: bad input, a refusal."""
    renter = Pretend(vast, code=100, exit_code=code)
    assert launch(order(), root, renter, lambda _: None, sleep=at_once) == code
    (end,) = records(root, ".end.json")
    assert end["reason"] == f"exit code {code}"


def test_a_log_is_shown_at_once_and_tells_the_exit_code() -> None:
    shown = io.StringIO()
    log = ShownLog(shown)
    told = [
        "(pretrain, pid=5) ERROR: Job 9 failed with return code list: [9]\n",
        "\x1b[0mstep 1\nERROR: \x1b[31mJob 1 failed with ", "return code list:\x1b[0m [137, 2] \n",
    ]  # fmt: skip
    for number, text in enumerate(told, 1):
        assert log.exit_code is None
        print(text, end="", file=log, flush=True)
        assert shown.getvalue() == "".join(told[:number])
    assert log.exit_code == 2


def _attempt(root: Root, *, ended_at: float, exit_code: int) -> None:
    settings = load_experiment(ONE_B)
    run, _ = create_or_open(root, settings, fingerprint="f" * 64, data={}, run_id=NAME)
    machine = Attempt(
        number=0, token="", started_at=0.0, provider="vast", instance="C.1", host="h",
        device="NVIDIA H100 80GB HBM3", devices=1, usd_per_hour=2.0, price_source="provider",
        billed_from=0.0, billed_from_source="provider",
    )  # fmt: skip
    attempt = run.start_attempt(machine, None)
    run.end_attempt(attempt, Ending("FAILED", exit_code, ended_at, 10))


def test_a_managed_job_may_rent_wherever_the_plan_found_something(
    vast: PretendVast, root: Root
) -> None:
    managed = order(managed=True)
    assert [(o.provider, o.instance_type) for o in managed.rented] == [
        ("Vast", "1x-H100_SXM-32-65536"), ("RunPod", "1x_H200_SECURE"),
    ]  # fmt: skip
    renter = Pretend(vast, fails_after_renting=RuntimeError("x"))
    with pytest.raises(RetryElsewhereError, match="nothing of it is left"):
        launch(managed, root, renter, lambda _: None, sleep=at_once)
    assert vast.instances == {}
    assert "sky jobs logs" in costs(managed)
    assert f"--stop {NAME}`" in costs(managed)


@pytest.mark.parametrize("managed", [False, True])
def test_what_skypilot_could_not_end_is_told_though_vast_is_empty(
    vast: PretendVast, root: Root, managed: bool
) -> None:
    """The controller replaces a job's lost machine; a cluster at RunPod was never looked at."""
    line = make_plan(load_experiment(ONE_B), [H200], shipped()).lines[0]
    elsewhere = {} if managed else {"line": line, "alternatives": (line.offer,)}
    renter = Pretend(vast, fails_after_renting=RuntimeError("x"), down_fails=RuntimeError("y"))
    with pytest.raises(RetryElsewhereError) as caught:
        launch(order(managed=managed, **elsewhere), root, renter, lambda _: None, sleep=at_once)
    what = "cancel the managed job" if managed else "take down the cluster"
    assert f"SkyPilot could not {what} {NAME} (y)" in str(caught.value)
    assert ("its controller replaces a machine that is ended" in str(caught.value)) is managed
    assert f"`tessera launch --stop {NAME}`" in str(caught.value)
    assert vast.instances == {}
    (end,) = records(root, ".end.json")
    assert "SkyPilot could not" in end["may_bill"][0]


def test_the_price_handed_over_is_the_dearest_that_may_be_rented() -> None:
    """Where the provider does not tell its price, a budget ends the run too soon, not late."""
    assert order(managed=True).envs()["TESSERA_CATALOG_USD_PER_HOUR"] == "3"  # RunPod's H200
    dear = other(H100, region="X", catalog_usd_per_hour=2.2)
    plain = order(alternatives=(H100, H200, dear))
    assert plain.envs()["TESSERA_CATALOG_USD_PER_HOUR"] == "2.2"
    unknown = other(H100, region="X", catalog_usd_per_hour=None, usd_per_hour=2.4)
    assert order(alternatives=(unknown,)).catalog_usd_per_hour == 2.4


def test_a_plain_launch_stays_with_what_was_agreed_to() -> None:
    assert {o.provider for o in order().rented} == {"Vast"}


# -- refused before anything is rented -------------------------------------------------------------


def test_a_cluster_of_that_name_is_not_touched(vast: PretendVast, root: Root) -> None:
    renter = Pretend(vast, cluster=NAME)
    with pytest.raises(ConflictError, match=rf"{NAME} is there already \(UP\) and may bill"):
        check(order(), root, renter)
    assert renter.ended == 0
    assert records(root) == []


def test_a_provider_that_is_not_enabled(vast: PretendVast, root: Root) -> None:
    line = order().line
    disabled = replace(line, offer=replace(line.offer, enabled=False))
    with pytest.raises(InputError, match="sky check vast"):
        check(order(line=disabled), root, Pretend(vast))


def test_what_skypilot_refuses_before_it_rents_is_given_back_by_nobody(
    vast: PretendVast, root: Root
) -> None:
    said: list[str] = []
    renter = Pretend(vast, fails=InputError("No provider is enabled."))
    with pytest.raises(InputError, match="No provider is enabled"):
        launch(order(), root, renter, said.append, sleep=at_once)
    assert (said, renter.ended) == ([], 0)
    (end,) = records(root, ".end.json")
    assert (end["outcome"], end["may_bill"]) == ("refused", [])


def test_a_finished_run_is_not_paid_for_again(vast: PretendVast, root: Root) -> None:
    settings = load_experiment(ONE_B)
    _attempt(root, ended_at=time.time(), exit_code=0)
    run, _ = create_or_open(root, settings, fingerprint="f" * 64, data={}, run_id=NAME)
    run.end_attempt(run.attempts()[0], Ending("FINISHED", 0, time.time(), 10))
    with pytest.raises(ConflictError, match="is finished"):
        check(order(), root, Pretend(vast))


def test_a_skypilot_that_does_not_answer_rents_nothing(vast: PretendVast, root: Root) -> None:
    renter = Pretend(vast)
    renter.exists = lambda name, managed: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(RetryElsewhereError, match="nothing was rented"):
        check(order(), root, renter)


# -- names and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "managed", "ours"),
    [
        (f"{NAME}-1a2b3c4d-head", False, True),
        (f"{NAME}-1a2b3c4d-worker", False, True),
        (f"{NAME}-7-1a2b3c4d-head", False, False),  # a managed job of the same name
        (f"{NAME}-7-1a2b3c4d-head", True, True),
        (f"{NAME}-1a2b3c4d-head", True, False),
        (f"{NAME}-x-1a2b3c4d-head", False, False),
        (f"x{NAME}-1a2b3c4d-head", False, False),
        ("", False, False),
    ],
)
def test_whose_machine_a_label_names(label: str, managed: bool, ours: bool) -> None:
    assert is_labelled(label, NAME, managed) is ours


def test_labels_of_long_names_are_those_that_skypilot_makes() -> None:
    """Compared with SkyPilot's own functions in tests/sky."""
    long = "an-experiment-with-a-long-name-00c0ffee"
    assert is_labelled(f"{long}-1a2b3c4d-head", long, False)
    assert is_labelled("an-experiment-with-a-l-cz-12-1a2b3c4d-head", long, True)
    another = "an-experiment-with-a-long-name-11c0ffee"  # cut to the same 22 characters
    assert not is_labelled("an-experiment-with-a-l-cz-12-1a2b3c4d-head", another, True)


def test_the_run_s_id_is_the_one_that_training_computes(root: Root) -> None:
    settings = load_experiment(ONE_B)
    fingerprint = "0123456789abcdef" * 4
    run, _ = create_or_open(root, settings, fingerprint=fingerprint, data={})
    assert run_id_of(settings, fingerprint, gpu=True) == run.id
    auto = load_experiment(REPOSITORY / "experiments" / "smoke.yaml")
    on_cpu, on_gpu = (run_id_of(auto, fingerprint, gpu=gpu) for gpu in (False, True))
    assert on_cpu != on_gpu  # `auto` comes to float32 or to bf16, which is part of the identity
    assert run_id_of(auto, None, gpu=True) == run_id_of(auto, None, gpu=True)


@pytest.mark.parametrize(
    ("run_id", "name"), [("a.b_c-1", "a-b-c-1"), ("1b-0a", "t-1b-0a"), ("x-", "x")]
)
def test_a_cluster_s_name(run_id: str, name: str) -> None:
    assert cluster_name(run_id) == name


def test_a_launch_needs_what_configure_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "env"
    monkeypatch.setenv("TESSERA_ENV_FILE", str(path))
    with pytest.raises(InputError, match="run `tessera configure` once"):
        require_settings()
    path.write_text("TESSERA_ROOT='s3://b/p'\n")
    assert require_settings() == {"TESSERA_ROOT": "s3://b/p"}
