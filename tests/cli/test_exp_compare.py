"""``compare``, ``best`` and ``frontier`` on runs whose figures are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.shell import Shell
    from tests.tracking.fabricate import Bench


@pytest.fixture
def two(bench: Bench) -> tuple[str, str]:
    """The first is dearer and better; both evaluated in between."""
    ids = []
    for name, steps, losses in (("slow", 40, (4.0, 2.0)), ("fast", 20, (3.5, 3.0))):
        run = bench.create(name, steps=steps)
        writer = bench.launch(run, instance=f"i-{name}", usd_per_hour=3.6)
        writer.steps(1, steps // 2)
        writer.evaluate(steps // 2, losses[0])
        writer.steps(steps // 2 + 1, steps)
        writer.evaluate(steps, losses[1])
        writer.checkpoint(steps)
        writer.end("FINISHED", steps)
        ids.append(run.id)
    return ids[0], ids[1]


def test_compare_tells_only_what_differs(two: tuple[str, str], shell: Shell) -> None:
    out = shell.said("compare", *two)
    assert "tokens " in out
    assert "2.0000" in out
    assert "3.0000" in out
    for same in ("optimizer.lr", "commit", "fingerprint", "not comparable", "seed"):
        assert same not in out
    assert "train/loss" in out
    assert "┌" in out  # the charts
    found = shell.json("compare", *two, "--against", "usd", "--metric", "eval/loss")
    assert [(one["group"], one["key"]) for one in found["differences"]] == [("config", "tokens")]
    curve = found["curves"]["eval/loss"][two[0]]
    assert curve["y"] == [4.0, 2.0]
    assert curve["x"] == pytest.approx([0.02, 0.04])
    hours = shell.json("compare", *two, "--against", "hours", "--metric", "eval/loss")
    assert hours["curves"]["eval/loss"][two[1]]["x"] == pytest.approx([10 / 3600, 20 / 3600])
    tokens = shell.json("compare", *two, "--metric", "eval/loss")
    assert tokens["curves"]["eval/loss"][two[1]]["x"] == [10_000, 20_000]


def test_compare_says_that_data_differ_and_which_code(
    bench: Bench, shell: Shell, two: tuple[str, str]
) -> None:
    path = f"runs/{two[1]}/run.json"
    record = bench.root.read_json(path)
    bench.root.publish_json(path, record | {"fingerprint": "e" * 64, "commit": "def456"})
    out = shell.said("compare", *two)
    assert "git diff abc123 def456" in out
    assert "Their data differ: losses on different text are not comparable." in out


def test_compare_needs_two_runs(shell: Shell, two: tuple[str, str]) -> None:
    code, _, err = shell("compare", two[0], "slow")
    assert code == 2
    assert "Name two different runs or more" in err


def test_best_by_each_figure(shell: Shell, two: tuple[str, str]) -> None:
    slow, fast = two
    assert [row["run_id"] for row in shell.json("best")] == [slow, fast]
    rows = shell.json("best", "--by", "usd-to-loss")
    assert rows[0]["loss_reached"] == 3.0  # the lowest that both reached
    assert [(row["run_id"], row["figure"]) for row in rows] == [
        (fast, pytest.approx(0.02)),
        (slow, pytest.approx(0.04)),
    ]
    rows = shell.json("best", "--by", "usd-to-loss", "--loss", "4")
    assert [row["figure"] for row in rows] == pytest.approx([0.01, 0.02])
    rows = shell.json("best", "--by", "usd-to-loss", "--loss", "2.5")
    assert [row["figure"] for row in rows] == [pytest.approx(0.04), None]
    assert [row["run_id"] for row in shell.json("best", "--by", "usd-per-mtok")] == [slow, fast]
    assert "dollars to 2.5000" in shell.said("best", "--by", "usd-to-loss", "--loss", "2.5")
    assert len(shell.json("best", "--limit", "1")) == 1
    code, _, err = shell("best", "--loss", "3")
    assert code == 2
    assert "--loss belongs to --by usd-to-loss" in err


def test_lost_work_counts_in_dollars_to_a_loss(bench: Bench, shell: Shell) -> None:
    run = bench.create("moved", steps=40)
    first = bench.launch(run)
    first.steps(1, 30)  # thirty seconds of a machine that took all with it
    first.kill()
    second = bench.launch(run, instance="i-2")
    second.steps(1, 40)
    second.evaluate(40, 2.0)
    second.checkpoint(40)
    second.end("FINISHED", 40)
    (row,) = shell.json("best", "--by", "usd-to-loss", "--loss", "2")
    assert row["figure"] == pytest.approx(0.07)
    assert row["cost_usd"] == pytest.approx(0.07)


def test_the_frontier_leaves_out_what_another_beats(
    bench: Bench, shell: Shell, two: tuple[str, str]
) -> None:
    beaten = bench.finished("beaten", steps=30, final=3.2)
    blown = bench.launch(bench.create("nan"), instance="i-nan")
    blown.evaluate(1, float("nan"))
    blown.checkpoint(1)
    blown.end("DIVERGED", 1, 3)
    assert [row["run_id"] for row in shell.json("frontier")] == [two[1], two[0]]
    out = shell.said("frontier")
    assert "2 of 4 runs" in out
    assert beaten.id not in out
    shell.said("archive", two[1])
    assert [row["run_id"] for row in shell.json("frontier")] == [beaten.id, two[0]]


def test_other_data_and_kinds_have_a_frontier_of_their_own(bench: Bench, shell: Shell) -> None:
    voice = bench.with_adapter()
    kinds = [row["kind"] for row in shell.json("frontier")]
    assert sorted(kinds) == ["pretrain", "sft"]
    assert voice.id in shell.said("frontier")


def test_an_empty_root_has_neither(shell: Shell) -> None:
    assert shell.said("best") == "No run to choose from.\n"
    assert shell.said("frontier") == "No run with both a cost and a loss.\n"
    assert shell.json("frontier") == []
