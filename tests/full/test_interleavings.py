"""Two attempts of one run, held and let go at every publication, on stores of both kinds.

Whatever the order, nothing is mixed: the records of the run stand on one chain of attempts with
the losses of an undisturbed run, and the next attempt finishes it. moto honours conditional
writes, rclone ignores them. See ``interleaving.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.full import schedules
from tests.full.interleaving import Case, Theatre, Variant
from tests.full.lineages import Whole
from tests.full.schedules import ONE, POISONED, TWO
from tests.full.stage import Bucket, Stage, Tally
from tests.services.stores import KINDS, Store, serve
from tests.services.trainers import Forker
from tests.training.conftest import write_corpus

SEED = 20261123
SAMPLED = 12
STAGES = 2
"""Cases at once, each in a root of its own: one for each core of a small machine."""


@dataclass
class Stages:
    """Roots on one store, and what an undisturbed run comes to there."""

    store: Store
    stages: list[Stage]
    wholes: dict[Variant, Whole]
    cases: dict[Variant, list[Case]]

    def perform(self, cases: Sequence[Case]) -> Tally:
        """All of them, as many at once as there are stages."""
        waiting, tally, lock = iter(cases), Tally(), threading.Lock()

        def work(stage: Stage) -> None:
            while True:
                with lock:
                    case = next(waiting, None)
                if case is None:
                    return
                stage.judge(case, self.wholes[case.variant], tally)

        with ThreadPoolExecutor(len(self.stages)) as pool:
            list(pool.map(work, self.stages))
        print(f"\n{self.store.kind}: {tally}")
        return tally


@pytest.fixture(scope="module", params=KINDS)
def stages(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forker: Forker
) -> Iterator[Stages]:
    """Servers of its own, since conditional writes are what the kinds differ in."""
    folder = tmp_path_factory.mktemp(f"stages-{request.param}")
    with serve(request.param, folder) as store, Theatre() as theatre:
        found = []
        for number in range(STAGES):
            prefix = f"stage-{number}"
            here = folder / prefix
            here.mkdir()
            corpus = ["corpus", "build", str(write_corpus(here)), "--root", store.url(prefix)]
            built = forker.run(corpus, store.environment(), here / "build")
            assert built.code == 0, built.err
            bucket = Bucket(store, prefix)
            found.append(Stage(theatre, here, store.url(prefix), bucket, store.environment()))
        yield survey(store, found)


def survey(store: Store, stages: list[Stage]) -> Stages:
    """Run undisturbed once a variant, which also says where an attempt can be held."""
    wholes, cases = {}, {}
    for variant in (TWO, ONE, POISONED):
        wholes[variant], points = stages[0].undisturbed(variant)
        cases[variant] = schedules.every_case(variant, points)
        if not variant.poisoned:
            later = stages[0].points_of_later(variant)
            cases[variant] += schedules.every_case(variant, later, later=True)
    return Stages(store, stages, wholes, cases)


@pytest.mark.timeout(1200)
def test_what_is_known_to_be_delicate(stages: Stages) -> None:
    tally = stages.perform(schedules.chosen())
    assert not tally.problems, "\n".join(tally.problems)
    assert tally.facts["stopped because another took over"] > 10, "they hardly ever met"


@pytest.mark.timeout(1200)
def test_a_sample_of_all_interleavings(stages: Stages) -> None:
    every = [case for cases in stages.cases.values() for case in cases]
    print(f"\n{stages.store.kind}: {SAMPLED} of {len(every)} interleavings, seed {SEED}")
    tally = stages.perform(schedules.sampled(every, SAMPLED, SEED))
    assert not tally.problems, "\n".join(tally.problems)


@pytest.mark.parametrize("text", schedules.NUDGED)
def test_the_model_is_the_one_of_the_attempt_that_finished(stages: Stages, text: str) -> None:
    """Weights that differ in their last bits, as two GPUs would make them."""
    tally = stages.perform([Case(schedules.moves(text), TWO, nudged="A")])
    assert not tally.problems, "\n".join(tally.problems)
