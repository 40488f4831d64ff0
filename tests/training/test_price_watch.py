"""The price of an hour while a run trains: what moves, what is told late, and who agrees."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.errors import InputError, ProviderError
from tessera.ledger.prices import Quote
from tessera.runs import list_runs
from tessera.storage import Root
from tessera.tracking.history import read_history
from tessera.tracking.queries import summarise_attempts, summarise_run, usd_by_category
from tessera.tracking.records import read_journal
from tessera.tracking.told import late_quote, price_changes
from tessera.training.cost import RunningCost
from tessera.training.price_watch import PriceWatch, every_s, follow_price

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer
    from tests.training.conftest import Bench as Workplace

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

made = importlib.import_module("fabricate").bench


@pytest.fixture
def paid(made: Bench) -> Bench:
    """A root of made-up runs, whose clock the running cost and the watch go by as well."""
    for module in ("cost", "price_watch"):
        made.monkeypatch.setattr(f"tessera.training.{module}.now", made.clock)
    return made


@dataclass
class Provider:
    """Answers with ``answer``, or fails with it."""

    answer: Quote | Exception
    asked: int = 0

    def __call__(self) -> Quote:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def fixed(usd: float, **changes: Any) -> Quote:
    return replace(Quote(usd, None, None, True), **changes)


def bid(usd: float) -> Quote:
    return Quote(usd, 0.02, 0.01, False)


@dataclass
class Watched:
    """An attempt, its running cost, and a watch that is asked to look by hand."""

    writer: Writer
    provider: Provider
    step: int = 0
    said: list[str] = field(default_factory=list)
    moves: int = 0
    cost: RunningCost = field(init=False)
    watch: PriceWatch = field(init=False)

    def __post_init__(self) -> None:
        attempt = self.writer.attempt
        self.cost = RunningCost(self.writer.run, attempt)
        self.watch = PriceWatch(
            self.provider, attempt, self.cost, self.writer.journal, lambda: self.step,
            self.said.append,
        )  # fmt: skip

    def told(self) -> list[tuple[str, Any]]:
        """What the journal has of prices."""
        self.writer.journal.flush()
        records = read_journal(self.writer.run, self.writer.attempt.id)
        return [(r.key, r.value) for r in records if r.key.startswith(("cost/", "price/"))]


def launch(paid: Bench, **changes: Any) -> Watched:
    changes = {"price_followed": True, "usd_per_gb_up": 0.01, "usd_per_gb_down": 0.02} | changes
    return Watched(paid.launch(paid.create(), **changes), Provider(fixed(3.6)))


def agrees(paid: Bench, watched: Watched) -> float:
    """The dollars of the running cost, which everybody after the fact arrives at as well."""
    usd = watched.cost.usd()
    assert usd is not None
    writer = watched.writer
    writer.end("FINISHED", 20)
    found = summarise_run(paid.root, writer.run)
    assert found.cost_usd == pytest.approx(usd, abs=1e-6)
    assert found.traffic_usd == pytest.approx(watched.cost.traffic_usd)
    history = read_history(writer.run)
    from tessera.tracking.history import bill_all

    attempts = summarise_attempts(history, bill_all([history]))
    assert attempts[0].price_changes == watched.moves
    assert sum((usd_by_category(attempts) or {}).values()) == pytest.approx(usd, abs=1e-6)
    later = paid.launch(writer.run, instance="i-99", usd_per_hour=0.0)
    assert RunningCost(writer.run, later.attempt).usd() == pytest.approx(usd, abs=1e-6)
    later.kill()
    return usd


def test_a_price_that_stays_is_not_told_again(paid: Bench) -> None:
    watched = launch(paid)
    for _ in range(3):
        watched.watch.look()
    assert watched.provider.asked == 3
    assert watched.told() == []
    assert watched.said == []
    assert watched.cost.usd_per_hour == 3.6
    watched.writer.kill()


def test_a_bid_that_moves_is_billed_from_when_it_was_seen(paid: Bench) -> None:
    watched = launch(paid)
    paid.clock.now += 100
    watched.provider.answer = bid(7.2)
    watched.step = 7
    watched.watch.look()
    assert watched.cost.usd_per_hour == 7.2
    assert watched.said == ["this machine now costs $7.2/h, before $3.6/h"]
    paid.clock.now += 50
    assert watched.cost.usd() == pytest.approx(0.1 + 0.1)
    watched.provider.answer = bid(3.6)
    watched.watch.look()
    paid.clock.now += 10
    assert watched.told() == [("cost/usd_per_hour", 7.2), ("cost/usd_per_hour", 3.6)]
    watched.moves = 2
    assert agrees(paid, watched) == pytest.approx(0.1 + 0.1 + 0.01)


def test_an_outage_is_told_once_and_changes_nothing(paid: Bench) -> None:
    watched = launch(paid)
    for _ in range(2):
        for answer in (ProviderError("vast.ai is out; wait."), InputError("the key; fix it.")):
            watched.provider.answer = answer
            watched.watch.look()
        watched.provider.answer = fixed(3.6)
        watched.watch.look()
    assert watched.told() == [("price/unanswered", {"reason": "vast.ai is out; wait."})] * 2
    assert watched.cost.usd_per_hour == 3.6
    watched.writer.kill()


@pytest.mark.parametrize("strange", [0.0, 0.1, 1.1, 11.0, 360.0])
def test_a_strange_price_is_believed_at_the_second_look(paid: Bench, strange: float) -> None:
    watched = launch(paid)
    for answer in (bid(strange), fixed(3.6), bid(strange)):  # twice, but not in a row
        watched.provider.answer = answer
        assert watched.watch.look() == (answer.usd_per_hour == strange)
        assert watched.told() == []
        assert watched.cost.usd_per_hour == 3.6
    watched.provider.answer = ProviderError("out.")
    assert not watched.watch.look()
    watched.provider.answer = bid(strange * 1.1)
    assert not watched.watch.look()
    assert watched.cost.usd_per_hour == strange * 1.1
    watched.writer.kill()


def test_two_strange_prices_that_differ_confirm_nothing(paid: Bench) -> None:
    watched = launch(paid)
    for usd in (0.0, 36.0, 0.36, 0.0):
        watched.provider.answer = bid(usd)
        assert watched.watch.look()
    assert (watched.told(), watched.cost.usd_per_hour) == ([], 3.6)
    watched.provider.answer = bid(3.6 * 3)
    assert not watched.watch.look(), "three times as much may be at once"
    assert watched.cost.usd_per_hour == pytest.approx(10.8)
    watched.writer.kill()


def test_the_thread_looks_again_soon_at_a_strange_price(paid: Bench) -> None:
    watched = launch(paid)
    watched.provider.answer = bid(36.0)
    paid.monkeypatch.setattr("tessera.training.price_watch.FIRST_S", 0.02)
    with follow_price(watched.watch, 3600.0, confirm=0.02):
        until(lambda: watched.cost.usd_per_hour == 36.0)
    assert watched.provider.asked == 2
    watched.writer.kill()


GUESSED = {"usd_per_hour": 36.0, "price_source": "catalog", "price_note": "vast.ai answered 500"}


def test_a_fixed_price_that_is_told_late_counts_from_the_start(paid: Bench) -> None:
    watched = launch(paid, **GUESSED)
    watched.provider.answer = ProviderError("still out.")
    watched.watch.look()
    assert watched.told() == [], "the attempt's own record says so already"
    paid.clock.now += 100
    watched.cost.add_traffic(10**9)
    watched.writer.journal.metric("traffic/up_bytes", 1e9, 1)
    watched.cost.add_download(10**9)
    watched.writer.journal.metric("traffic/down_bytes", 1e9, 1)
    assert watched.cost.usd() == pytest.approx(1.0 + 0.01 + 0.02)
    watched.provider.answer = fixed(3.6, usd_per_gb_up=0.03)
    assert watched.watch.look(), "a tenth of the guess: asked again"
    watched.watch.look()
    assert watched.said == ["the provider answers: this machine costs $3.6/h, and has all along"]
    assert [key for key, _ in watched.told()] == ["price/provider", "cost/usd_per_hour"]
    paid.clock.now += 100
    assert agrees(paid, watched) == pytest.approx(0.2 + 0.03 + 0.02)
    (found,) = [i.attempt for i in read_history(watched.writer.run).attempts[:1]]
    assert (found.usd_per_hour, found.price_source, found.usd_per_gb_up) == (3.6, "provider", 0.03)
    assert not summarise_run(paid.root, watched.writer.run).cost_estimated


def test_a_bid_that_is_told_late_counts_from_then_on(paid: Bench) -> None:
    watched = launch(paid, **GUESSED)
    paid.clock.now += 100
    watched.provider.answer = bid(3.6)
    assert watched.watch.look(), "a tenth of the guess: asked again"
    watched.watch.look()
    assert watched.said == ["the provider answers: this machine costs $3.6/h, from now on"]
    paid.clock.now += 100
    watched.moves = 1
    assert agrees(paid, watched) == pytest.approx(1.0 + 0.1)
    assert summarise_run(paid.root, watched.writer.run).cost_estimated, "an hour of it was a guess"


@pytest.mark.parametrize("fixed_", [True, False])
def test_where_nobody_told_a_price_the_late_one_is_the_best_guess(
    paid: Bench, fixed_: bool
) -> None:
    watched = launch(paid, usd_per_hour=None, price_source="unknown")
    paid.clock.now += 100
    assert (watched.cost.usd(), watched.cost.usd_per_hour) == (None, None)
    watched.provider.answer = fixed(3.6, fixed=fixed_)
    watched.watch.look()
    assert agrees(paid, watched) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "details",
    [None, "3.6", [], {}, {"usd_per_hour": "NaN"}, {"usd_per_hour": -1}, {"usd_per_hour": None}],
)
def test_a_late_word_that_is_none_counts_as_nothing(details: Any) -> None:
    assert late_quote(details) is None


def test_prices_that_cannot_be_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    assert price_changes([(1.0, nan), (2.0, inf), (3.0, -1.0), (4.0, 0.0)]) == ((4.0, 0.0),)


_EVENTS = st.lists(
    st.tuples(
        st.integers(0, 100),
        st.sampled_from(["move", "late", "up", "down", "out"]),
        st.sampled_from([0.0, 3.6, 7.2, 36.0]),
    ),
    max_size=8,
)
_LIVES = st.tuples(_EVENTS, st.sampled_from("xy"), st.booleans())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lives=st.lists(st.tuples(_EVENTS, st.sampled_from("xy"), st.booleans()), min_size=1, max_size=3)
)
def test_the_running_cost_and_the_tables_agree(
    paid: Bench, lives: list[tuple[list[tuple[int, str, float]], str, bool]]
) -> None:
    """Several attempts on one instance or two, prices that move or are told late, traffic."""
    paid.root = Root(str(paid.folder / f"root-{time.monotonic_ns()}"))
    run = paid.create()
    for events, instance, guessed in lives:
        changes: dict[str, Any] = GUESSED if guessed else {}
        writer = paid.launch(
            run, instance=instance, billed_from=paid.clock() - 50, price_followed=True,
            usd_per_gb_up=0.01, usd_per_gb_down=0.02, **changes,
        )  # fmt: skip
        watched = Watched(writer, Provider(fixed(3.6)))
        for wait, kind, usd in events:
            paid.clock.now += wait
            if kind == "up":
                watched.cost.add_traffic(10**9)
                writer.journal.metric("traffic/up_bytes", 1e9, 1)
            elif kind == "down":
                watched.cost.add_download(10**9)
                writer.journal.metric("traffic/down_bytes", 1e9, 1)
            else:
                answers: dict[str, Quote | Exception] = {
                    "move": bid(usd),
                    "late": fixed(usd),
                    "out": ProviderError("out."),
                }
                watched.provider.answer = answers[kind]
                while watched.watch.look():
                    pass
        paid.clock.now += 30
        usd_now = watched.cost.usd()
        writer.end("FAILED", 1)
        assert summarise_run(paid.root, run).cost_usd == pytest.approx(usd_now, abs=1e-4)


# -- the thread ------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_thread_asks_again_and_survives_everything(paid: Bench) -> None:
    watched = launch(paid)
    watched.provider.answer = RuntimeError("a bug")
    with follow_price(watched.watch, 0.02):
        until(lambda: watched.provider.asked >= 2)
        watched.provider.answer = bid(7.2)
        until(lambda: watched.cost.usd_per_hour == 7.2)
        names = [thread.name for thread in threading.enumerate() if thread.daemon]
        assert "price-watch" in names, "leaving the process never waits for it"
    until(lambda: "price-watch" not in [thread.name for thread in threading.enumerate()])
    watched.writer.kill()


def test_the_first_look_is_soon(paid: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.training.price_watch.FIRST_S", 0.02)
    watched = launch(paid)
    with follow_price(watched.watch, 3600.0):
        until(lambda: watched.provider.asked == 1)
    watched.writer.kill()


def test_a_provider_that_hangs_holds_nobody_up(paid: Bench) -> None:
    watched = launch(paid)
    entered, leave = threading.Event(), threading.Event()

    def hang() -> Quote:
        entered.set()
        leave.wait(10)
        return fixed(3.6)

    watched.watch = PriceWatch(
        hang, watched.writer.attempt, watched.cost, watched.writer.journal, lambda: 0, print
    )
    with follow_price(watched.watch, 0.02):
        assert entered.wait(10)
        began = time.monotonic()
    assert time.monotonic() - began < 1
    leave.set()
    watched.writer.kill()


@pytest.mark.parametrize("text", ["often", "0", "-1", "nan", "1e9"])
def test_a_wait_that_is_none_is_a_sentence(text: str) -> None:
    assert every_s({}) == every_s({"TESSERA_PRICE_EVERY_S": ""}) == 300.0
    assert every_s({"TESSERA_PRICE_EVERY_S": "60"}) == 60.0
    with pytest.raises(InputError, match=f"TESSERA_PRICE_EVERY_S is '{text}'; expected seconds"):
        every_s({"TESSERA_PRICE_EVERY_S": text})


# -- the command -----------------------------------------------------------------------------------


def test_a_run_on_vast_follows_its_price(
    bench: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the host's own files to the record: no answer at first, then one, then another."""
    from tests.services.vast import PretendVast

    home = Path(os.environ["TESSERA_CACHE"]).parent / "vast-home"
    home.mkdir(exist_ok=True)
    (home / ".vast_api_key").write_text("0123456789abcdef-the-key")
    with PretendVast() as vast:
        import httpx

        body = {"label": "job-0123abcd-head", "disk": 100}
        key = {"Authorization": "Bearer x"}
        number = httpx.put(f"{vast.url}/api/v0/asks/101/", json=body, headers=key).json()
        number = int(number["new_contract"])
        vast.instances[number]["start_date"] -= 3600
        for name, value in {
            "HOME": str(home), "VAST_URL": vast.url, "VAST_CONTAINERLABEL": f"C.{number}",
            "TESSERA_CATALOG_USD_PER_HOUR": "5", "TESSERA_PRICE_EVERY_S": "0.05",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        vast.fault("403")
        done = bench.command(capfd)
        assert done.code == 0, done.err
        assert "refuses the key" in done.err
        assert "; its price is $5/h (catalog)." in done.err
        assert "0123456789abcdef" not in done.err + done.out
        price = vast.instances[number]["dph_total"]
    (run,) = list_runs(bench.root)
    (item,) = read_history(run).attempts
    assert (item.attempt.instance, item.attempt.price_source) == (f"C.{number}", "provider")
    assert item.attempt.usd_per_hour == pytest.approx(price)
    (kept,) = run.attempts()
    assert (kept.usd_per_hour, kept.price_source, kept.price_followed) == (5.0, "catalog", True)
    assert "refuses the key" in kept.price_note
    found = summarise_run(bench.root, run)
    points = [p.number for p in read_history(run).points if p.key == "cost/usd"]
    assert found.cost_usd is not None
    assert points[-1] <= found.cost_usd
    assert not found.cost_estimated
