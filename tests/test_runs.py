from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.errors import ConflictError, InputError, NotFoundError, StoreError
from tessera.experiment import Experiment, parse_experiment
from tessera.runs import (
    BUDGET,
    DIVERGED,
    FINISHED,
    PREEMPTED,
    Attempt,
    CheckpointRef,
    Ending,
    Run,
    Segment,
    create_or_open,
    find_run,
    identity_hash,
    list_runs,
    open_run,
    scan_runs,
)
from tessera.storage import Root

FINGERPRINT = "f" * 64
PRETRAIN: dict[str, Any] = {
    "name": "base", "kind": "pretrain", "seed": 1,
    "model": {"layers": 2, "d_model": 64, "heads": 4, "context": 32, "vocab_size": 512},
    "data": {"corpus": "sample"}, "optimizer": {"lr": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 2, "final_lr": 1e-5},
    "batch": {"tokens_per_step": 128, "micro_batch": 2}, "tokens": 1280,
    "evaluation": {"every_steps": 5}, "checkpoint": {"every_steps": 5},
}  # fmt: skip
SFT: dict[str, Any] = {
    "name": "voice", "kind": "sft", "seed": 1, "base": "base",
    "data": {"conversations": ["a.jsonl"]}, "optimizer": {"lr": 1e-3},
    "schedule": {"name": "linear_decay", "warmup_steps": 2},
    "batch": {"conversations_per_step": 8, "micro_batch": 4}, "epochs": 2,
    "checkpoint": {"every_steps": 5},
}  # fmt: skip
PLACE = Attempt(
    number=0, token="", started_at=100.0, provider="vast", instance="i-1", host="box",
    device="H200", devices=1, usd_per_hour=3.6, price_source="provider", billed_from=90.0,
    billed_from_source="provider", setup_started_at=95.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSERA_RUN_ID", raising=False)


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root")) if request.param == "folder" else fresh_root()


def fresh_root() -> Root:
    return Root(f"memory://{secrets.token_hex(8)}")


def experiment(**changes: Any) -> Experiment:
    return parse_experiment({**PRETRAIN, **changes})


def create(root: Root, settings_: Experiment | None = None, **changes: Any) -> Run:
    arguments: dict[str, Any] = {"fingerprint": FINGERPRINT, "data": {}, **changes}
    run, created = create_or_open(root, settings_ or experiment(), **arguments)
    assert created
    return run


def save(run: Run, attempt: Attempt | str, step: int) -> CheckpointRef:
    """Publish a complete checkpoint."""
    ref = CheckpointRef(step, attempt if isinstance(attempt, str) else attempt.id)
    run.root.publish(run.path(ref.folder, "state.json"), b"{}")
    run.root.publish(run.path(ref.folder, "COMPLETE"), b"")
    return ref


def end(run: Run, attempt: Attempt, outcome: str, step: int, at: float = 200.0) -> None:
    run.end_attempt(attempt, Ending(outcome, 0, at, step))


# -- identity --------------------------------------------------------------------------------------


def test_the_identity_of_an_experiment_is_frozen() -> None:
    """If this fails, every run in every root would be started again under another id."""
    assert identity_hash(experiment().identity, FINGERPRINT) == "8bd196cb"
    sft = parse_experiment(SFT)
    assert identity_hash(sft.identity, FINGERPRINT) == "38c6682f"


def test_identity_does_not_depend_on_order_but_on_every_value_and_the_data() -> None:
    identity = experiment().identity
    backwards = dict(reversed(identity.items()))
    assert identity_hash(backwards, FINGERPRINT) == identity_hash(identity, FINGERPRINT)
    hashes = {identity_hash({**identity, key: "other"}, FINGERPRINT) for key in identity}
    hashes |= {identity_hash(identity, FINGERPRINT), identity_hash(identity, "0" * 64)}
    assert len(hashes) == len(identity) + 2


def test_a_run_is_created_once_and_then_opened(root: Root) -> None:
    run = create(root, data={"manifest": "m.json"}, commit="abc")
    assert run.id == f"base-{identity_hash(experiment().identity, FINGERPRINT)}"
    again, created = create_or_open(root, experiment(), fingerprint=FINGERPRINT, data={})
    assert not created
    assert again.record == run.record == open_run(root, run.id).record
    assert again.experiment == experiment()
    assert (run.record.commit, run.record.data) == ("abc", {"manifest": "m.json"})


def test_free_settings_open_the_same_run_and_others_start_another(root: Root) -> None:
    run = create(root)
    cheaper = experiment(price={"usd_per_hour": 1.0}, checkpoint={"every_steps": 1})
    assert create_or_open(root, cheaper, fingerprint=FINGERPRINT, data={})[0].id == run.id
    pinned = experiment(data={"corpus": "sample", "fingerprint": "ffff"})
    assert create_or_open(root, pinned, fingerprint=FINGERPRINT, data={})[0].id == run.id
    assert create(root, experiment(seed=2)).id != run.id
    assert create(root, fingerprint="0" * 64).id != run.id


def test_new_takes_the_first_free_number(root: Root) -> None:
    first = create(root)
    assert create(root, new=True).id == f"{first.id}-2"
    assert create(root, new=True).id == f"{first.id}-3"
    opened, _ = create_or_open(root, experiment(), fingerprint=FINGERPRINT, data={})
    assert opened.id == first.id
    second, created = create_or_open(
        root, experiment(), fingerprint=FINGERPRINT, data={}, run_id=f"{first.id}-2"
    )
    assert (second.id, created) == (f"{first.id}-2", False)


def test_new_without_a_run_is_the_first(root: Root) -> None:
    assert not create(root, new=True).id.endswith("-2")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2}, "seed = 1"),
        ({"tokens": 2560}, "tokens = 1280"),
        ({"optimizer": {"lr": 2e-3}}, "optimizer.lr = 0.001"),
        ({"model": {**PRETRAIN["model"], "heads": 8}}, "model.heads = 4"),
        (
            {"schedule": {"name": "linear_decay", "warmup_steps": 2, "final_lr": 1e-5}},
            "schedule.decay_fraction = None",
        ),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    root: Root, changes: dict[str, Any], named: str
) -> None:
    create(root, run_id="mine")
    with pytest.raises(ConflictError) as error:
        create_or_open(root, experiment(**changes), fingerprint=FINGERPRINT, data={}, run_id="mine")
    assert str(error.value).startswith("Run mine was started with ")
    assert named in str(error.value)
    assert error.value.exit_code == 2


def test_changed_data_and_a_changed_base_are_refused(root: Root) -> None:
    create(root, run_id="mine")
    with pytest.raises(ConflictError, match=r"trained on data ffffffffffff, .* reads 000000000000"):
        create_or_open(root, experiment(), fingerprint="0" * 64, data={}, run_id="mine")
    sft = parse_experiment(SFT)
    base = {"run_id": "base", "weights_digest": "1" * 64}
    voice = create(root, sft, base=base, run_id="voice")
    assert voice.record.base == base
    with pytest.raises(ConflictError, match=r"base\.weights_digest = 1{64}"):
        create_or_open(
            root, sft, fingerprint=FINGERPRINT, data={}, run_id="voice",
            base={"run_id": "base", "weights_digest": "2" * 64},
        )  # fmt: skip


def test_the_run_id_may_come_from_the_environment(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_RUN_ID", "from-sky-7")
    assert create(root).id == "from-sky-7"
    assert create(root, run_id="from-option").id == "from-option"
    monkeypatch.setenv("TESSERA_RUN_ID", "")
    assert create(root).id.startswith("base-")


@pytest.mark.parametrize(
    "run_id", ["Upper", "-x", ".hidden", "a/b", "..", "a b", "x\n", "é", "a" * 101]
)
def test_a_run_id_that_cannot_be_a_folder_is_refused(root: Root, run_id: str) -> None:
    with pytest.raises(InputError, match=r"is not usable; use a-z"):
        create(root, run_id=run_id)
    assert root.files("") == []


def test_every_id_that_we_give_can_be_given_back(root: Root) -> None:
    longest = experiment(name="n" * 63)
    create(root, longest)
    run = create(root, longest, new=True)
    opened, created = create_or_open(root, longest, fingerprint=FINGERPRINT, data={}, run_id=run.id)
    assert (opened.id, created) == (run.id, False)


# -- attempts --------------------------------------------------------------------------------------


def test_attempts_are_numbered_and_keep_what_they_were_told(root: Root) -> None:
    run = create(root)
    first = run.start_attempt(PLACE, None)
    ref = save(run, first, 5)
    second = run.start_attempt(replace(PLACE, usd_per_hour=None, setup_started_at=None), ref)
    assert (first.number, second.number) == (1, 2)
    assert first.token != second.token
    assert first == replace(PLACE, number=1, token=first.token)
    assert second.resumed_from == ref
    assert run.attempts() == [first, second]


def test_the_tenth_attempt_comes_after_the_ninth(root: Root) -> None:
    run = create(root)
    started = [run.start_attempt(PLACE, None) for _ in range(11)]
    assert [attempt.number for attempt in run.attempts()] == list(range(1, 12))
    assert run.attempts() == started
    assert started[10].number == 11
    assert run.superseded_by(started[8]) is not None
    assert run.superseded_by(started[10]) is None


def test_an_ending_says_how_an_attempt_ended(root: Root) -> None:
    run = create(root)
    first, second = run.start_attempt(PLACE, None), run.start_attempt(PLACE, None)
    ending = Ending(PREEMPTED, 75, 300.5, 7, "Stopped by SIGTERM.")
    run.end_attempt(first, ending)
    assert run.endings() == {first.id: ending}
    assert run.attempts() == [first, second]
    assert run.finished() is None


@pytest.mark.parametrize(("outcome", "done"), [(FINISHED, True), (BUDGET, True), (DIVERGED, False)])
def test_which_endings_complete_a_run(root: Root, outcome: str, done: bool) -> None:
    run = create(root)
    end(run, run.start_attempt(PLACE, None), outcome, 10)
    assert (run.finished() is not None) == done


def test_of_two_that_finished_the_first_one_counts(root: Root) -> None:
    run = create(root)
    a, b = run.start_attempt(PLACE, None), run.start_attempt(PLACE, None)
    end(run, b, FINISHED, 10, at=400.0)
    end(run, a, FINISHED, 10, at=300.0)
    finished = run.finished()
    assert finished is not None
    assert finished.ended_at == 300.0
    assert run.lineage() == [Segment(a.id, 0, 10)]


class _Blind(Run):
    """A run whose listing does not show the attempts that others have just started."""

    def attempts(self) -> list[Attempt]:
        return []


def test_of_two_that_took_one_number_the_smaller_token_goes_on(root: Root) -> None:
    run = create(root)
    blind = _Blind(root, run.record)
    twins = sorted((blind.start_attempt(PLACE, None) for _ in range(4)), key=lambda a: a.token)
    assert [attempt.number for attempt in twins] == [1, 1, 1, 1]
    assert run.attempts() == twins
    assert run.superseded_by(twins[0]) is None
    for loser in twins[1:]:
        winner = run.superseded_by(loser)
        assert winner is not None
        assert winner < loser.id
    third = run.start_attempt(PLACE, None)
    assert third.number == 2
    assert {run.superseded_by(attempt) for attempt in twins[1:]} <= {t.id for t in twins} | {
        third.id
    }
    assert run.superseded_by(twins[0]) == third.id
    assert run.superseded_by(third) is None


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["0a", "f9"])), unique=True, min_size=1)
)
def test_exactly_one_of_any_attempts_is_not_superseded(
    names: list[tuple[int, str]],
) -> None:
    run = create(fresh_root())
    attempts = [replace(PLACE, number=n, token=token * 4) for n, token in names]
    for attempt in attempts:
        run.root.publish(run.path("attempts", f"{attempt.id}.json"), b"{}")
        run.root.publish(run.path("attempts", f"{attempt.id}.end.json"), b"{}")
    (alive,) = [attempt for attempt in attempts if run.superseded_by(attempt) is None]
    assert alive.number == max(attempt.number for attempt in attempts)
    assert alive.token == min(a.token for a in attempts if a.number == alive.number)


# -- checkpoints and lineage -----------------------------------------------------------------------


def test_no_checkpoint_is_no_lineage(root: Root) -> None:
    run = create(root)
    assert (run.checkpoints(), run.furthest(), run.lineage()) == ([], None, [])
    run.start_attempt(PLACE, None)
    assert run.lineage() == []


def test_a_checkpoint_without_complete_is_ignored(root: Root) -> None:
    run = create(root)
    attempt = run.start_attempt(PLACE, None)
    ref = save(run, attempt, 5)
    root.publish(run.path("checkpoints", f"step-10-{attempt.id}", "state.json"), b"{}")
    root.publish(run.path("checkpoints", f"step-15-{attempt.id}", "COMPLETE.tmp"), b"")
    root.publish(run.path("checkpoints", f"step-20-{attempt.id}", "deep", "COMPLETE"), b"")
    assert run.checkpoints() == [ref]
    assert run.furthest() == ref
    assert run.lineage() == [Segment(attempt.id, 0, 5)]


def test_the_furthest_is_by_number_and_at_one_step_of_the_latest_attempt(root: Root) -> None:
    run = create(root)
    for step, attempt in [(9, "1-aa"), (100, "1-aa"), (100, "2-bb"), (100, "10-cc"), (20, "10-dd")]:
        save(run, attempt, step)
    assert [(ref.step, ref.attempt) for ref in run.checkpoints()] == [
        (100, "10-cc"), (100, "2-bb"), (100, "1-aa"), (20, "10-dd"), (9, "1-aa"),
    ]  # fmt: skip


def test_the_lineage_follows_what_was_resumed_and_drops_what_was_rolled_back(root: Root) -> None:
    run = create(root)
    a = run.start_attempt(PLACE, None)
    at_10 = save(run, a, 10)
    save(run, a, 20)
    b = run.start_attempt(PLACE, at_10)  # 20 was damaged, so it went back
    assert run.lineage() == [Segment(a.id, 0, 20)]  # b has published nothing yet
    save(run, b, 20)
    assert run.lineage() == [Segment(a.id, 0, 10), Segment(b.id, 10, 20)]
    at_30 = save(run, b, 30)
    c = run.start_attempt(PLACE, at_30)
    end(run, c, PREEMPTED, 35)
    assert run.lineage() == [Segment(a.id, 0, 10), Segment(b.id, 10, 30)]
    end(run, c, FINISHED, 40)
    assert run.lineage() == [
        Segment(a.id, 0, 10), Segment(b.id, 10, 30), Segment(c.id, 30, 40),
    ]  # fmt: skip


def test_a_finished_attempt_is_the_tip_even_if_another_saved_further(root: Root) -> None:
    run = create(root)
    a = run.start_attempt(PLACE, None)
    at_5 = save(run, a, 5)
    b = run.start_attempt(PLACE, at_5)
    end(run, a, FINISHED, 10)
    save(run, b, 12)
    assert run.lineage() == [Segment(a.id, 0, 10)]


def test_a_missing_attempt_is_a_sentence(root: Root) -> None:
    run = create(root)
    save(run, "3-dead", 10)
    with pytest.raises(StoreError) as error:
        run.lineage()
    assert f"attempts/3-dead.json of run {run.id} is missing" in str(error.value)
    assert str(error.value).endswith(".")


_OPERATION = st.sampled_from(["start", "step", "step", "step", "save", "save", "kill", "partial"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(0, 1), _OPERATION), max_size=40),
    finish=st.none() | st.integers(0, 1),
)
def test_two_attempts_alive_at_once_never_mix(
    moves: list[tuple[int, str]], finish: int | None
) -> None:
    """Two processes that do not know of each other publish in any order.

    Whatever they publish, readers see one chain whose segments touch, each of one attempt, each
    covered by what that attempt did itself, and which reaches the furthest checkpoint.
    """
    run = create(fresh_root())
    alive: list[tuple[Attempt, int] | None] = [None, None]
    did: dict[str, tuple[int, int]] = {}  # attempt -> first and last step that it trained
    saved: list[int] = []
    for who, operation in moves:
        held = alive[who]
        if operation == "start" and held is None:
            ref = run.furthest()
            attempt = run.start_attempt(PLACE, ref)
            alive[who] = (attempt, ref.step if ref else 0)
            did[attempt.id] = (ref.step if ref else 0, ref.step if ref else 0)
        elif held is not None:
            attempt, step = held
            if operation == "step":
                alive[who] = (attempt, step + 1)
                did[attempt.id] = (did[attempt.id][0], step + 1)
            elif operation == "save":
                save(run, attempt, step)
                saved.append(step)
            elif operation == "partial":
                run.root.publish(run.path("checkpoints", f"step-99-{attempt.id}", "x"), b"")
            elif operation == "kill":
                alive[who] = None
        _check_chain(run, did, max(saved, default=None))
    winner = alive[finish] if finish is not None else None
    if winner is not None:
        end(run, winner[0], FINISHED, winner[1])
        assert run.lineage()[-1].attempt == winner[0].id
        _check_chain(run, did, winner[1])


def _check_chain(run: Run, did: dict[str, tuple[int, int]], reaches: int | None) -> None:
    lineage = run.lineage()
    if reaches is None:
        assert lineage == []
        return
    assert lineage[0].after == 0
    assert lineage[-1].upto == reaches
    for before, after in pairwise(lineage):
        assert after.after == before.upto
    assert len({segment.attempt for segment in lineage}) == len(lineage)
    for segment in lineage:
        first, last = did[segment.attempt]
        assert first == segment.after <= segment.upto <= last
    steps = [s for segment in lineage for s in range(segment.after + 1, segment.upto + 1)]
    assert steps == list(range(1, reaches + 1))  # every step once, in order


# -- damaged and foreign records -------------------------------------------------------------------


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    with pytest.raises(StoreError) as error:
        yield
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert text.endswith(".")
    assert "\n" not in text


def test_foreign_records_are_named(root: Root) -> None:
    run = create(root, run_id="mine")
    root.publish_json("runs/other/run.json", {"run_id": "other", "colour": "blue"})
    with refused("runs/other/run.json", "colour"):
        open_run(root, "other")
    with refused("runs/other/run.json"):
        list_runs(root)
    root.publish_json(run.path("attempts", "1-aa.json"), {"number": 1})
    with refused("attempts/1-aa.json"):
        run.attempts()
    root.publish_json(run.path("attempts", "1-aa.end.json"), ["FINISHED"])
    with refused("attempts/1-aa.end.json"):
        run.finished()
    root.publish(run.path("attempts", "1-aa.json"), b'{"number": 1')
    with refused("attempts/1-aa.json", "not valid JSON"):
        run.attempts()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"number": "one"}, "number"),
        ({"started_at": None}, "started_at"),
        ({"usd_per_hour": "cheap"}, "usd_per_hour"),
        ({"resumed_from": {"step": 1}}, "resumed_from.attempt"),
        ({"resumed_from": {"step": 1, "attempt": "1-aa", "colour": 1}}, "resumed_from.colour"),
        ({"resumed_from": [1]}, "resumed_from"),
    ],
)
def test_a_record_with_a_value_of_another_kind_is_damage(
    root: Root, change: dict[str, Any], says: str
) -> None:
    run = create(root)
    attempt = run.start_attempt(PLACE, None)
    root.publish_json(run.path("attempts", f"{attempt.id}.json"), asdict(attempt) | change)
    with refused(f"attempts/{attempt.id}.json", says):
        run.attempts()


def test_the_records_of_an_ending_are_kept_and_may_be_unsaid(root: Root) -> None:
    run = create(root)
    attempt = run.start_attempt(PLACE, None)
    path = run.path("attempts", f"{attempt.id}.end.json")
    run.end_attempt(attempt, Ending(FINISHED, 0, 1.0, 5, records=7))
    assert run.endings()[attempt.id].records == 7
    old = root.read_json(path)
    del old["records"]
    root.publish_json(path, old)
    assert run.endings()[attempt.id] == Ending(FINISHED, 0, 1.0, 5)
    root.publish_json(path, old | {"step": None})
    with refused(path, "step"):
        run.endings()


def test_a_damaged_run_does_not_hide_the_others(root: Root) -> None:
    run = create(root)
    root.publish_json("runs/broken-1/run.json", {})
    found, damaged = scan_runs(root)
    assert [one.id for one in found] == [run.id]
    assert list(damaged) == ["broken-1"]
    assert find_run(root, "base").id == run.id
    for text in ("broken", "broken-1"):
        with refused("runs/broken-1/run.json"):
            find_run(root, text)


# -- finding ---------------------------------------------------------------------------------------


def test_runs_are_listed_oldest_first_and_folders_without_a_record_are_none(root: Root) -> None:
    assert list_runs(root) == []
    ids = [create(root, run_id=name).id for name in ("zebra", "ant", "mole")]
    root.publish("runs/half/attempts/1-aa.json", b"{}")
    assert [run.id for run in list_runs(root)] == ids


def test_a_run_is_found_by_id_by_name_and_by_the_beginning_of_its_id(root: Root) -> None:
    base = create(root)
    other = create(root, experiment(name="base-large"))
    assert find_run(root, base.id).id == base.id
    assert find_run(root, "base").id == base.id  # a name counts before the beginning of an id
    assert find_run(root, "base-l").id == other.id
    assert find_run(root, base.id[:-1]).id == base.id


def test_an_ambiguous_or_unknown_name_lists_what_there_is(root: Root) -> None:
    with pytest.raises(InputError, match=r"No run is called 'x' in .*; there is: none yet\."):
        find_run(root, "x")
    one, two = create(root), create(root, new=True)
    with pytest.raises(InputError, match=rf"'base' names 2 runs \({one.id}, {two.id}\)"):
        find_run(root, "base")
    assert find_run(root, one.id).id == one.id  # although the other id begins with it
    with pytest.raises(InputError, match=rf"No run is called 'x'.*{one.id}"):
        find_run(root, "x")
    with pytest.raises(NotFoundError, match=r"runs/x/run\.json"):
        open_run(root, "x")


def test_a_kind_narrows_the_search(root: Root) -> None:
    base = create(root, experiment(name="same"))
    voice = create(root, parse_experiment({**SFT, "name": "same"}))
    assert find_run(root, "same", kind="pretrain").id == base.id
    assert find_run(root, "same", kind="sft").id == voice.id
    assert find_run(root, voice.id, kind="sft").id == voice.id
    with pytest.raises(InputError, match=rf"Run {base.id} .* is of kind pretrain, expected sft"):
        find_run(root, base.id, kind="sft")
