"""What a run comes to on an offer, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.cli._plan_view import Commands, print_plan
from tessera.cloud.offers import Offer
from tessera.cloud.plan import Corpus, Line, Plan, Work, make_plan
from tessera.cloud.skypilot import TaskFile
from tessera.cloud.speeds import shipped
from tessera.errors import InputError
from tessera.experiment import Pretrain, load_experiment
from tests.cloud.offered import H100, H200, other

REPOSITORY = Path(__file__).parents[2]
TOKENS = 24_504_827_904
PARAMETERS = 1_013_024_256
GB = 10**9
COMMANDS = Commands(
    file=TaskFile(REPOSITORY / "sky" / "pretrain_h100.yaml"),
    experiment="experiments/tessera_1b.yaml", overrides=(), gpu=None, card=None,
    budget_usd=None, managed=False, bid=None, task=None, provider=None, run_id="tessera-1b",
)  # fmt: skip


def reference(*overrides: str) -> Pretrain:
    found = load_experiment(REPOSITORY / "experiments" / "tessera_1b.yaml", overrides)
    assert isinstance(found, Pretrain)
    return found


def work_of(corpus: Corpus) -> Work:
    return Work.of(reference(), corpus, TOKENS)


def planned(*offers: Offer, corpus: Corpus | None = None, budget: float | None = None) -> Plan:
    return make_plan(reference(), offers, shipped(), corpus=corpus, budget_usd=budget)


def test_every_part_of_a_total() -> None:
    """One H100 SXM at $2.00 an hour, $0.05 of disk, 1 cent a GB up, 2 cents down."""
    (line,) = planned(H100, corpus=Corpus("c", TOKENS, 40 * GB)).lines
    hours = TOKENS / 74739 / 3600
    saves = (TOKENS // 65536) // 2000
    up = saves * 12 * PARAMETERS + 4 * PARAMETERS
    assert saves == 186
    assert line.hours == pytest.approx(hours)
    assert line.machine_usd == pytest.approx(hours * 2.0)
    assert line.storage_usd == pytest.approx(hours * 0.05)
    # 40 GB fit in 32 GiB of cache? No: they come down once an epoch, and this is one epoch.
    assert line.traffic_usd == pytest.approx(40 * 0.02 + up / GB * 0.01)
    assert line.total_usd == pytest.approx(hours * 2.05 + 0.8 + up / GB * 0.01)
    assert line.whole


def test_shards_come_once_if_the_cache_holds_them_and_every_epoch_if_not() -> None:
    fits = work_of(Corpus("c", TOKENS // 10, 5 * GB))
    assert fits.epochs == pytest.approx(10)
    assert fits.down_bytes == 5 * GB
    large = work_of(Corpus("c", TOKENS // 10, 50 * GB))
    assert large.down_bytes == pytest.approx(500 * GB)
    part = work_of(Corpus("c", TOKENS * 10, 490 * GB))
    assert part.down_bytes == pytest.approx(49 * GB)  # a tenth of the corpus is ever asked for


def test_a_resume_fetches_the_state_and_what_the_cache_held() -> None:
    work = work_of(Corpus("c", TOKENS // 10, 5 * GB))
    assert work.resume_bytes == 12 * PARAMETERS + 5 * GB
    assert work.tokens_at_risk == 1000 * 65536
    (line,) = planned(H100, corpus=Corpus("c", TOKENS // 10, 5 * GB)).lines
    again = 1000 * 65536 / 74739 / 3600 * 2.05
    assert line.loss_usd == pytest.approx(again + work.resume_bytes / GB * 0.02)


def test_the_cheapest_total_comes_first_not_the_cheapest_hour() -> None:
    slow = other(H100, gpu="H100 PCIe", usd_per_hour=1.7)
    plan = planned(slow, H200, H100)
    assert [line.offer.gpu for line in plan.lines] == ["H100 SXM", "H100 PCIe", "H200"]
    totals = [line.total_usd for line in plan.lines]
    assert totals == sorted(totals, key=lambda total: total or 0)


def test_an_unmeasured_card_comes_last_without_a_figure() -> None:
    free = other(H100, gpu="RTX 5090", usd_per_hour=0.01)
    plan = planned(free, H100)
    last = plan.lines[-1]
    assert last.offer.gpu == "RTX 5090"
    assert (last.hours, last.machine_usd, last.total_usd, last.loss_usd) == (None,) * 4
    assert last.speed.how == "not measured"


def test_what_the_provider_does_not_tell_is_left_out_and_marked() -> None:
    (line,) = planned(other(H100, usd_per_gb_up=None, storage_usd_per_hour=None)).lines
    assert (line.traffic_usd, line.storage_usd) == (None, None)
    assert line.total_usd == line.machine_usd
    assert not line.whole


def test_a_budget_buys_whole_steps_and_no_more_than_it_pays_for() -> None:
    corpus = Corpus("c", TOKENS, 20 * GB)
    (line,) = planned(H100, corpus=corpus, budget=100.0).lines
    assert line.budget_tokens is not None
    assert line.budget_tokens % 65536 == 0
    assert line.total_usd is not None
    spent, more = (
        make_plan(reference(f"tokens={tokens}"), [H100], shipped(), corpus=corpus).lines[0]
        for tokens in (line.budget_tokens, line.budget_tokens + 65536)
    )
    assert spent.total_usd is not None
    assert more.total_usd is not None
    # 2.05 an hour for 660 s and 16.2 GB at 50 MB/s, a cent a GB of them; a tenth of it more.
    kept = 2.05 * (660 + 16 * PARAMETERS / 50e6) / 3600 + 16 * PARAMETERS / GB * 0.01
    assert line.budget is not None
    assert line.budget.reserve_usd == pytest.approx(kept)
    aim = 100.0 - 1.1 * kept
    assert aim - 0.01 < spent.total_usd <= aim < more.total_usd


def test_a_budget_that_its_reserve_eats_up_is_no_offer() -> None:
    """The trainer's own sentence, on the laptop and for the price of that machine."""
    plan = planned(H100, H200, budget=0.7)
    dear, cheap = sorted(plan.lines, key=lambda line: line.offer.gpu, reverse=True)
    assert (cheap.budget_tokens, dear.budget_tokens) == (0, 0)
    assert plan.cheapest is None
    sentence = planned(H100, budget=0.7).why_none
    assert "Nothing can be trained for a budget of $0.7 at $2.05 an hour: $0.7225 are" in sentence
    unmeasured = other(H100, gpu="RTX 5090")
    assert planned(unmeasured, budget=0.1).cheapest is None  # no speed, and a price all the same
    own = make_plan(reference("budget_reserve_usd=0.01"), [H100], shipped(), budget_usd=0.7)
    assert own.cheapest is not None
    barely = make_plan(reference("budget_reserve_usd=0.6999"), [H100], shipped(), budget_usd=0.7)
    assert barely.cheapest is None
    assert "pays for no step at $2.05 an hour" in barely.why_none


def test_a_run_costs_no_more_than_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens that the budget ends too; the traffic that nobody tells makes them fewer still."""
    untold = other(H100, usd_per_gb_up=None, storage_usd_per_hour=None)
    plan = planned(untold, H200, budget=60.0)
    for line in plan.lines:
        assert line.capped
        assert line.total_usd is not None
        assert line.total_usd < 60.0
        assert line.hours == pytest.approx((line.budget_tokens or 0) / TOKENS * _hours(line))
    print_plan(plan, None, 10)
    shown = capsys.readouterr().out
    assert "$60 pays" in shown
    assert "> " not in shown
    assert "< " in shown
    assert "Kept back of $60 for the end of the run: $0." in shown
    enough = planned(H100, budget=1000.0).lines[0]
    assert (enough.tokens, enough.capped) == (TOKENS, False)


def _hours(line: Line) -> float:
    assert line.speed.tokens_per_s is not None
    return TOKENS / line.speed.tokens_per_s / 3600


def test_offers_that_finish_within_the_budget_come_before_those_that_do_not() -> None:
    plan = planned(other(H200, usd_per_hour=9.0), H100, budget=250.0)
    assert [line.capped for line in plan.lines] == [False, True]


def test_what_is_not_enabled_gets_no_command_and_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    off = [other(offer, enabled=False) for offer in (H100, H200)]
    plan = planned(*off)
    assert plan.cheapest is None
    assert plan.why_none.startswith(
        "Vast is not enabled: `vastai set api-key KEY && sky check vast`"
    )
    print_plan(plan, COMMANDS, 10)
    shown = capsys.readouterr().out
    assert "RunPod is not enabled: `sky check runpod`" in shown
    assert "is not known" not in shown
    assert "tessera launch" not in shown
    mixed = planned(off[0], other(H200, enabled=True))
    assert mixed.cheapest is not None
    assert mixed.cheapest.offer.provider == "RunPod"


def test_a_run_that_only_a_budget_ends_goes_where_it_gets_most_tokens() -> None:
    open_ended = load_experiment(REPOSITORY / "experiments" / "tessera_1b_budget.yaml")
    offers = [H200, H100]
    plan = make_plan(open_ended, offers, shipped(), budget_usd=315.0)
    assert plan.work is None
    assert [line.offer.gpu for line in plan.lines] == ["H100 SXM", "H200"]
    for line in plan.lines:
        assert line.budget is not None
        assert line.total_usd == pytest.approx(line.budget.aim_usd, abs=0.01)
        assert line.tokens == line.budget_tokens
    with pytest.raises(InputError, match="neither tokens nor a budget"):
        make_plan(open_ended, offers, shipped())


def test_two_machines_cost_twice_and_fetch_twice() -> None:
    one = other(H200, gpus=2, usd_per_gb_down=0.02)
    two = other(one, gpus=1, nodes=2)
    single, pair = (planned(o, corpus=Corpus("c", TOKENS, 20 * GB)).lines[0] for o in (one, two))
    assert single.hours == pair.hours == pytest.approx(TOKENS / 127910 / 3600)
    assert single.machine_usd is not None
    assert pair.machine_usd == pytest.approx(2 * single.machine_usd)
    assert single.traffic_usd is not None
    assert pair.traffic_usd == pytest.approx(single.traffic_usd + 20 * 0.02)


def test_a_corpus_that_is_far_too_small_is_said() -> None:
    plan = planned(H100, corpus=Corpus("novels-ja-en", 36_000_000, 72_000_000))
    (sentence,) = [note for note in plan.notes if "epochs" in note]
    assert "36M tokens" in sentence
    assert "24.5B" in sentence
    assert "681 epochs" in sentence
    enough = planned(H100, corpus=Corpus("c", TOKENS, 49 * GB))
    assert not [note for note in enough.notes if "epochs" in note]


def test_a_projection_stands_beside_what_was_published_for_the_card() -> None:
    (sentence,) = [note for note in planned(H100).notes if "reference run" in note]
    assert "46,700" in sentence
    assert "145.8 h" in sentence


def test_fine_tuning_has_prices_and_no_total() -> None:
    sft = load_experiment(REPOSITORY / "experiments" / "tessera_1b_sft.yaml")
    plan = make_plan(sft, [H200, H100], shipped())
    assert [line.offer.gpu for line in plan.lines] == ["H100 SXM", "H200"]  # by price an hour
    assert all(line.total_usd is None for line in plan.lines)
    assert any("not been measured" in note for note in plan.notes)


def test_the_cheapest_that_can_be_launched() -> None:
    unlaunchable = other(H100, usd_per_hour=0.5, instance_type="")
    plan = planned(unlaunchable, H100)
    assert plan.lines[0].offer is unlaunchable
    assert plan.cheapest is not None
    assert plan.cheapest.offer is H100
    assert planned().cheapest is None


@pytest.mark.parametrize(("columns", "parts"), [("80", False), ("140", True)])
def test_the_table_fits_the_terminal(
    columns: str, parts: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_plan(planned(H100, H200), COMMANDS, 10)
    shown = capsys.readouterr().out.split("Launch the cheapest")[0]
    assert max(len(line) for line in shown.splitlines()) <= int(columns)
    assert ("traffic" in shown.splitlines()[2]) == parts
    for word in ("74,739", "total", H100.region.split(",")[0]):
        assert word in shown  # nothing that is needed to choose was cut
    assert ("~ is projected" in shown) == (not parts)
