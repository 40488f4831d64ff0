from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tessera.cli import _exp_figures as figures
from tessera.cli import _exp_view as view
from tessera.cli._exp_events import worded
from tessera.cli.common import run_command
from tessera.cli.exp import exp

if TYPE_CHECKING:
    from tests.cli.shell import Shell
    from tests.tracking.fabricate import Bench


def test_an_empty_root_is_said_in_a_line(shell: Shell) -> None:
    code, out, _ = shell("list")
    assert code == 0
    assert out.startswith("No runs in ")
    assert shell.json("list") == []


def test_a_root_that_does_not_exist_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "root"
    for exists in (False, True):
        assert run_command(exp, ["list", "--root", str(there)]) == 0
        out, _ = capfd.readouterr()
        assert out.startswith(f"No runs in {there}")
        assert ("which does not exist yet; correct --root" in " ".join(out.split())) is not exists
        there.mkdir(exist_ok=True)


def test_list_shows_losses_dollars_and_time(bench: Bench, shell: Shell) -> None:
    voice = bench.with_adapter()
    writer = bench.launch(bench.create("dear"), price_source="experiment", instance="i-9")
    writer.steps(1, 10)
    writer.end("FAILED", 10, exit_code=1)
    code, out, err = shell("list")
    assert (code, err) == (0, "")
    by_name = {line.strip().split("-")[0]: line for line in out.splitlines()}
    base, dear, tuned = by_name["base"], by_name["dear"], by_name["voice"]
    for text in ("pretrain", "finished", "20/20", "20.0k", "2.5000", "unigram 5.5000", "$0.0200",
                 "$1.00", "20 s", "1,000"):  # fmt: skip
        assert text in base, text
    assert "failed" in dear
    assert "~$0.0100" in dear
    assert "base 5.0000" in tuned
    assert voice.record.base is not None
    assert tuned.rstrip().endswith(voice.record.base["run_id"])


def test_list_as_json_has_the_promised_keys(bench: Bench, shell: Shell) -> None:
    voice = bench.with_adapter()
    rows = shell.json("list")
    assert [row["kind"] for row in rows] == ["pretrain", "sft"]
    promised = {"run_id", "kind", "status", "tokens", "final_loss", "best_loss", "cost_usd",
                "wall_s", "tokens_per_s", "base"}  # fmt: skip
    assert promised <= rows[0].keys()
    assert rows[1]["run_id"] == voice.id
    assert rows[1]["base"] == rows[0]["run_id"]
    assert [row["run_id"] for row in shell.json("list", "--kind", "sft")] == [voice.id]


def test_list_sorts_with_the_unknown_last(bench: Bench, shell: Shell) -> None:
    bench.create("unknown")
    for name, final in (("worse", 3.0), ("better", 2.0), ("broken", float("nan"))):
        bench.finished(name, final=final)
    names = [row["name"] for row in shell.json("list", "--sort", "loss")]
    assert names[:2] == ["better", "worse"]
    assert set(names[2:]) == {"unknown", "broken"}


def test_nan_is_null_in_json(bench: Bench, shell: Shell) -> None:
    bench.finished(final=float("nan"))
    (row,) = shell.json("list")
    assert row["final_loss"] is None


def test_a_narrow_terminal_loses_columns_and_says_which(
    bench: Bench, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.with_adapter()
    monkeypatch.setattr(view, "_LOG_WIDTH", 72)
    code, out, _ = shell("list")
    assert code == 0
    assert all(len(line) <= 72 for line in out.splitlines())
    assert "Left out for want of width: base, step" in out
    assert "$0.0200" in out


def test_show_tells_all_of_one_run(bench: Bench, shell: Shell) -> None:
    voice = bench.with_adapter()
    bench.interview(voice)
    code, out, err = shell("show", "voice")
    assert (code, err) == (0, "")
    for text in (voice.id, "final 3.5000", "base 5.0000", "provider", "3.600", "ep1", "train",
                 "honest: 1.00 (1 pass)", "optimizer.lr", "0.001"):  # fmt: skip
        assert text in out, text
    detail = shell.json("show", voice.id)
    assert detail["attempt_list"][0]["price_source"] == "provider"
    assert detail["adapters"][0]["interviews"][0]["verdicts"]["pass"] == 1
    assert detail["usd_by_category"]["train"] == pytest.approx(0.0036)
    assert sum(detail["usd_by_category"].values()) == pytest.approx(detail["cost_usd"])
    assert [point["loss"] for point in detail["losses"]] == [5.0, 3.5]


def line(out: str, name: str) -> str:
    """The line of ``show`` that begins with ``name``."""
    (found,) = [text for text in out.splitlines() if text.strip().startswith(name)]
    return found.strip().removeprefix(name).strip()


def with_traffic(bench: Bench, **changes: Any) -> None:
    """A run that went back once and then finished, with two gigabytes of checkpoints."""
    run = bench.create("far")
    first = bench.launch(run, usd_per_gb_up=0.01, **changes)
    journal = first.journal
    first.steps(1, 10)
    journal.metric("checkpoint/stall_s", 0.018, 10)
    journal.event("checkpoint/published", 10, folder="f")
    first.checkpoint(10)
    journal.metric("traffic/up_bytes", 1e9, 10)
    journal.event("stability/skipped", 12, loss=float("nan"), grad_norm=123.456, first_sample=704,
                  end_sample=768)  # fmt: skip
    journal.event("checkpoint/postponed", 13, reason="an upload is under way")
    journal.event("checkpoint/failed", 14, reason="the store is down")
    journal.event("checkpoint/stays_local", 15, reason="4 s are left")
    journal.event("run/rolled_back", 15, reason="6 steps failed", to_step=10,
                  excluded=[[704, 768], [1024, 1088]])  # fmt: skip
    first.end("ROLLED_BACK", 15)
    second = bench.launch(run, usd_per_gb_up=0.01, **changes)
    second.journal.event("attempt/resumed", 10, adopted=[], local=False, lost_steps=5, lost_s=61.4,
                         lost_usd=0.0614, lost_attempt=first.attempt.id)  # fmt: skip
    second.steps(11, 20)
    second.journal.event("checkpoint/published", 20, folder="f")
    second.checkpoint(20)
    second.journal.metric("traffic/up_bytes", 1e9, 20)
    second.end("FINISHED", 20)


def test_show_tells_traffic_and_checkpoints_apart(bench: Bench, shell: Shell) -> None:
    with_traffic(bench)
    code, out, err = shell("show", "far")
    assert (code, err) == (0, "")
    assert line(out, "cost ") == (
        "$0.0400 ($2.00 per million tokens), $0.0200 of it for 2.0 GB of traffic"
    )
    assert line(out, "checkpoints ") == (
        "2 published, 2.0 GB, stall 0.02 s (0.10 % of training), $0.0200 traffic"
    )
    assert line(out, "traffic ").split() == ["-", "$0.0200"]
    detail = shell.json("show", "far")
    assert detail["cost_usd"] == pytest.approx(0.04)
    assert (detail["traffic_usd"], detail["traffic_bytes"]) == (pytest.approx(0.02), 2_000_000_000)
    assert [a["traffic_bytes"] for a in detail["attempt_list"]] == [10**9, 10**9]
    assert sum(a["usd"] for a in detail["attempt_list"]) == pytest.approx(0.04)
    assert sum(detail["usd_by_category"].values()) == pytest.approx(0.04)
    assert detail["checkpoints"]["published"] == 2
    (row,) = shell.json("list")
    assert (row["cost_usd"], row["traffic_usd"]) == (pytest.approx(0.04), pytest.approx(0.02))
    assert "$0.0400" in shell("list")[1]


def test_show_words_what_happened(bench: Bench, shell: Shell) -> None:
    with_traffic(bench)
    out = shell("show", "far")[1]
    assert "rolled back" in out
    assert "rolled_back" not in out
    assert "events" in out
    first = shell.json("show", "far")["attempt_list"][0]["attempt"]
    for text in (
        "step not applied: loss NaN, gradient norm 123.5; samples 704 to 767 skipped",
        "upload of the checkpoint postponed: an upload is under way",
        "no checkpoint: the store is down",
        "checkpoint stays on the machine's own disk: 4 s are left",
        "went back to step 10: 6 steps failed; samples 704 to 767, 1,024 to 1,087 left out",
        f"continued from the root; 5 steps of attempt {first} lost (61 s, $0.0614)",
    ):
        assert text in out, text
    events = shell.json("show", "far")["events"]
    assert [event["event"] for event in events] == [
        "stability/skipped", "checkpoint/postponed", "checkpoint/failed", "checkpoint/stays_local",
        "run/rolled_back", "attempt/resumed",
    ]  # fmt: skip
    assert (events[-1]["step"], events[-1]["details"]["lost_steps"]) == (10, 5)


@pytest.mark.parametrize(
    ("key", "details", "shown"),
    [
        ("attempt/resumed", {"local": True},
         "continued from this machine's disk, no recorded step lost"),
        ("attempt/resumed", {"lost_steps": 1, "lost_s": 2.0, "lost_usd": None},
         "continued from the root; 1 step lost (2 s)"),
        ("run/rolled_back", {"reason": "spike", "to_step": 1000}, "went back to step 1,000: spike"),
        ("checkpoint/failed", {}, "checkpoint/failed: {}"),
        ("checkpoint/failed", "what", "checkpoint/failed: what"),
        ("stability/skipped", {"loss": None}, "stability/skipped: {'loss': None}"),
        ("run/rolled_back", {"reason": "r", "to_step": 1, "excluded": [[1]]},
         "run/rolled_back: {'reason': 'r', 'to_step': 1, 'excluded': [[1]]}"),
    ],
)  # fmt: skip
def test_events_in_words_and_odd_ones_as_they_are(key: str, details: Any, shown: str) -> None:
    assert worded(key, details) == shown


def test_a_run_that_had_no_checkpoint_started_again() -> None:
    details = {"lost_steps": 20, "lost_s": 9.0, "lost_usd": None}
    assert worded("attempt/resumed", details, 0) == "started again; 20 steps lost (9 s)"


def test_of_many_events_the_last_are_shown(bench: Bench, shell: Shell) -> None:
    writer = bench.launch(bench.create("spiky"))
    for step in range(1, 31):
        writer.journal.event("checkpoint/failed", step, reason=f"outage {step};")
    writer.end("FAILED", 30)
    out = shell("show", "spiky")[1]
    assert "last 20 events" in out
    assert "outage 30;" in out
    assert "outage 11;" in out
    assert "outage 10;" not in out
    assert len(shell.json("show", "spiky")["events"]) == 30


def test_an_unknown_price_breaks_no_table(bench: Bench, shell: Shell) -> None:
    with_traffic(bench, usd_per_hour=None, price_source="unknown")
    assert shell("list")[0] == 0
    code, out, err = shell("show", "far")
    assert (code, err) == (0, "")
    assert line(out, "cost ") == "? (? per million tokens), ~$0.0200 of it for 2.0 GB of traffic"
    assert line(out, "traffic ").split() == ["-", "~$0.0200"]
    detail = shell.json("show", "far")
    assert (detail["cost_usd"], detail["usd_by_category"]) == (None, None)
    assert detail["traffic_usd"] == pytest.approx(0.02)


def test_a_run_without_traffic_says_nothing_of_it(bench: Bench, shell: Shell) -> None:
    bench.finished()
    out = shell("show", "base")[1]
    assert "traffic" not in out
    assert "events" not in out
    assert line(out, "checkpoints ") == "0 published, stall 0.00 s (0.00 % of training)"


@pytest.mark.parametrize(
    "arguments",
    [("show", "nobody"), ("promote", "nobody", "--adapter", "ep1"), ("list", "--sort", "charm")],
)
def test_bad_input_is_a_sentence_and_exit_code_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    code, out, err = shell(*arguments)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


def test_sync_says_what_it_added(bench: Bench, shell: Shell) -> None:
    bench.finished()
    code, out, err = shell("sync", "--tracking-uri", bench.uri)
    assert (code, err) == (0, "")
    assert "Synced 1 run into sqlite:///" in out
    assert "1 new, 43 points added." in out
    assert f"Look at them: tessera-exp ui --root {bench.root.url}" in out
    assert "0 new, 0 points added." in shell("sync", "--tracking-uri", bench.uri)[1]


def test_promote_prints_how_to_load_it_and_list_marks_it(bench: Bench, shell: Shell) -> None:
    voice = bench.with_adapter()
    tracking = ("--tracking-uri", bench.uri)
    code, out, err = shell("promote", "voice", "--adapter", "ep1", *tracking)
    assert (code, out) == (2, "")
    assert "was not promoted: no interview of it was held" in err
    assert err.count("\n") == 1
    bench.interview(voice)
    code, out, err = shell("promote", "voice", "--adapter", "ep1", *tracking)
    assert (code, err) == (0, "")
    assert f"{voice.id}/ep1 is champion, interview score 1.00" in out
    assert 'mlflow.pyfunc.load_model("models:/tessera-adapter@champion")' in out
    assert "★ ep1 champion" in shell("list")[1]
    assert shell.json("list")[1]["aliases"] == {"champion": "ep1"}
    seen = bench.seen(bench.uri)
    assert (len(seen.runs), seen.aliases) == (2, {"champion": 1})


def test_an_override_is_said_aloud(bench: Bench, shell: Shell) -> None:
    bench.with_adapter()
    arguments = ("--adapter", "ep1", "--override", "only a rehearsal")
    code, out, _ = shell("promote", "voice", *arguments, "--tracking-uri", bench.uri)
    assert code == 0
    assert "overruled: only a rehearsal (it said: no interview of it was held)" in out


def test_help_has_examples_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from tessera.cli.common import run_command; from tessera.cli.exp import exp\n"
        "assert run_command(exp, ['--help']) == 0\n"
        "for name in ('list', 'show', 'sync', 'promote'):\n"
        "    assert run_command(exp, [name, '--help']) == 0\n"
        "assert not {'torch', 'mlflow', 'sky', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Examples:") == 5


def test_list_and_show_load_neither_torch_nor_mlflow(bench: Bench) -> None:
    bench.finished()
    code = (
        "import sys; from tessera.cli.common import run_command; from tessera.cli.exp import exp\n"
        f"for name in (['list'], ['show', 'base']):\n"
        f"    assert run_command(exp, [*name, '--root', {bench.root.url!r}]) == 0\n"
        "assert not {'torch', 'mlflow', 'sky', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (59.4, "59 s"), (725, "12 min 05 s"), (27061, "7 h 31 min")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert figures.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "estimated", "shown"),
    [(None, False, "?"), (0.00012, False, "$0.000120"), (0.25, True, "~$0.2500"),
     (1234.5, False, "$1,234.50"), (0.0, False, "$0.00")],
)  # fmt: skip
def test_dollars(value: float | None, estimated: bool, shown: str) -> None:
    assert figures.dollars(value, estimated) == shown


def damage(bench: Bench) -> tuple[str, str]:
    """Two runs that cannot be read: one without a form, one with a broken line."""
    bench.root.publish_json("runs/formless/run.json", {})
    run = bench.finished("torn")
    (attempt,) = run.attempts()
    bench.root.publish(run.path("journal", attempt.id, "000000.jsonl"), b"{}\n{}\n")
    return "runs/formless/run.json", f"journal/{attempt.id}/000000.jsonl"


def test_list_shows_the_others_of_a_damaged_run(bench: Bench, shell: Shell) -> None:
    good = bench.finished()
    named = damage(bench)
    for arguments in (("list",), ("list", "--json")):
        code, out, err = shell(*arguments)
        assert code == 2
        assert good.id in out
        assert "torn" not in out
        lines = err.splitlines()
        assert len(lines) == 2
        for path, line in zip(named, lines, strict=True):
            assert path in line
            assert line.endswith(".")
    assert [row["run_id"] for row in json.loads(out)] == [good.id]
    assert shell("show", "base")[0] == 0


def test_list_of_nothing_but_damage_is_an_empty_list(bench: Bench, shell: Shell) -> None:
    damage(bench)
    code, out, _ = shell("list", "--json")
    assert (code, json.loads(out)) == (2, [])


def test_sync_sends_the_others_of_a_damaged_run(bench: Bench, shell: Shell) -> None:
    good = bench.finished()
    damage(bench)
    code, out, err = shell("sync", "--tracking-uri", bench.uri)
    assert code == 2
    assert out.startswith("Synced 1 run into")
    assert len(err.splitlines()) == 2
    assert list(bench.seen(bench.uri).runs) == [good.id]


def test_promote_needs_only_its_own_run_and_base(bench: Bench, shell: Shell) -> None:
    voice = bench.with_adapter()
    bench.interview(voice)
    damage(bench)
    arguments = ("promote", "voice", "--adapter", "ep1", "--tracking-uri", bench.uri)
    code, _, err = shell(*arguments)
    assert (code, err) == (0, "")
    assert voice.record.base is not None
    base = voice.record.base["run_id"]
    for path in bench.root.files(f"runs/{base}/journal"):
        bench.root.publish(path, b"{}\n{}\n")
    code, out, err = shell(*arguments)
    assert (code, out) == (2, "")
    assert f"runs/{base}/journal/" in err


def test_the_width_that_columns_names_counts_without_a_terminal(
    bench: Bench, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.with_adapter()
    monkeypatch.setenv("COLUMNS", "72")
    for arguments in (("list",), ("show", "base")):
        code, out, _ = shell(*arguments)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 72
    assert "Left out for want of width" in shell("list")[1]
    monkeypatch.setenv("COLUMNS", "wide")
    assert "Left out for want of width" not in shell("list")[1]
