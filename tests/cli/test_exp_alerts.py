"""``tessera-exp alerts`` and the line for ``list``, with a real webhook."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tessera.cli import exp_alerts
from tessera.cli._exp_alerts_view import ago, last_alerts_line
from tessera.cli._exp_read import ALERTS, read_everything
from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.errors import StoreError
from tessera.storage import Root
from tessera.tracking import webhooks
from tessera.tracking.alert_records import FOLDER

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))
receiving = importlib.import_module("receiver").receiving
SECRET = importlib.import_module("receiver").SECRET

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """``tessera-exp alerts`` in this process, at the bench's time; asleep, nothing happens."""
    monkeypatch.setattr(exp_alerts, "time", SimpleNamespace(time=bench.clock, sleep=_never))
    monkeypatch.setattr(webhooks, "_WAIT", lambda _: 0.0)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_command(exp, ["alerts", *arguments, "--root", bench.root.url])
        out, err = capfd.readouterr()
        assert SECRET not in out + err
        return code, out, err

    return run


def _never(seconds: float) -> None:
    raise KeyboardInterrupt


def died(bench: Bench, name: str = "smoke") -> str:
    run = bench.create(name)
    writer = bench.launch(run, instance=f"i-{name}")
    writer.steps(1, 12)
    writer.kill()
    bench.clock.now += 3 * 3600
    return run.id


def test_alerts_newest_first_with_what_was_done(bench: Bench, command: Command) -> None:
    smoke = died(bench)
    bench.finished("good")
    code, out, err = command()
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if " finished " in line or " died " in line]
    assert "good-" in lines[0]
    assert "finished at step 20, last evaluation 2.5000, $0.02." in lines[0]
    assert "just now" in lines[0]
    assert smoke in lines[1]
    assert "3 h ago" in lines[1]
    assert out.splitlines()[-1] == (
        "2 new alerts; none was sent, since TESSERA_ALERT_WEBHOOK is not set."
    )
    code, again, err = command()
    assert (code, err) == (0, "")
    assert "new alert" not in again
    assert "finished at step 20" in again


def test_json_has_the_promised_keys(bench: Bench, command: Command) -> None:
    smoke = died(bench)
    code, out, _ = command("--json")
    (row,) = json.loads(out)
    assert code == 0
    assert row.keys() == {"id", "run_id", "kind", "at", "step", "attempt", "text"}
    assert (row["run_id"], row["kind"], row["step"]) == (smoke, "died", 12)


def test_one_run(bench: Bench, command: Command) -> None:
    died(bench)
    bench.finished("good")
    code, out, _ = command("--run", "good")
    assert code == 0
    assert "good-" in out
    assert "smoke" not in out
    code, _, err = command("--run", "nobody")
    assert code == 2
    assert err.startswith("Error: No run is called 'nobody' in ")


def test_nothing_to_tell_and_no_root(
    bench: Bench, command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.create()
    assert command() == (0, f"No alerts in {bench.root.url}.\n", "")
    assert run_command(exp, ["alerts", "--root", str(tmp_path / "nowhere")]) == 2
    assert "which does not exist yet; correct --root" in capfd.readouterr().err


def test_sent_and_failed_are_told_apart(
    bench: Bench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished()
    with receiving(200) as well, receiving(404) as ill:
        monkeypatch.setenv("TESSERA_ALERT_WEBHOOK", f"{well.url} {ill.url}/2")
        code, out, err = command()
        assert code == 75
        assert out.splitlines()[-1] == "1 new alert, 1 message sent."
        assert err.startswith("Error: Webhook 2 of TESSERA_ALERT_WEBHOOK did not take base-")
        assert "it answered 404; whoever runs `tessera-exp alerts` from a minute on" in err
        ill.answers[:] = [200]
        bench.clock.now += 61
        code, out, err = command()
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == "0 new alerts, 1 message sent."
        assert (well.kinds, ill.kinds) == (["finished"], ["finished"])


def test_a_variable_that_is_no_url_is_refused_unseen(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_ALERT_WEBHOOK", "hooks.slack.com/" + SECRET)
    code, out, err = command()
    assert (code, out) == (2, "")
    assert err.startswith("Error: Webhook 1 of TESSERA_ALERT_WEBHOOK is no URL; expected")


def test_watch_tells_what_is_new_until_ctrl_c(
    bench: Bench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    list_runs = Root.children

    def nap(seconds: float) -> None:
        naps.append(seconds)
        bench.clock.now += seconds
        if len(naps) == 1:
            monkeypatch.setattr(Root, "children", _down)
        elif len(naps) == 2:
            monkeypatch.setattr(Root, "children", list_runs)
            died(bench)
        elif len(naps) == 4:
            raise KeyboardInterrupt

    with receiving() as receiver:
        monkeypatch.setenv("TESSERA_ALERT_WEBHOOK", receiver.url)
        monkeypatch.setattr(exp_alerts, "time", SimpleNamespace(time=bench.clock, sleep=nap))
        bench.finished("good")
        code, out, err = command("--watch", "--every", "30")
        assert receiver.kinds == ["finished", "died"]
    assert code == 0
    assert naps == [30.0] * 4
    assert out.count("  died: attempt 1 (vast/i-smoke) died at step 12") == 1
    told = err.splitlines()
    assert told[0] == "Looking every 30 s; Ctrl-C stops the looking, not a run."
    assert told[1] == "Error: The store is down; try later. Looking again in 30 s."
    assert told[2:] == ["Stopped looking; the runs go on."]


def _down(*_: object) -> list[str]:
    raise StoreError("The store is down; try later.")


def test_watch_as_json_is_a_line_each(
    bench: Bench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished("good")
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if naps[1:]:
            raise KeyboardInterrupt
        died(bench)

    monkeypatch.setattr(exp_alerts, "time", SimpleNamespace(time=bench.clock, sleep=sleep))
    code, out, _ = command("--watch", "--json")
    assert code == 0
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["finished", "died"]


def test_a_damaged_run_is_exit_code_2_and_hides_nothing(bench: Bench, command: Command) -> None:
    bad = bench.finished("bad")
    bench.finished("good")
    (segment,) = bench.root.files(bad.path("journal"))
    bench.root.publish(segment, b"nonsense\n" + bench.root.read_bytes(segment))
    code, out, err = command()
    assert code == 2
    assert "good-" in out
    assert segment in err


def test_the_line_for_list(bench: Bench, command: Command) -> None:
    def line(now: float) -> str | None:
        return last_alerts_line(read_everything(bench.root, now=now).alerts, now)

    assert line(bench.clock()) is None
    smoke = died(bench)
    good = bench.finished("good")
    command()
    now = bench.clock() + 60
    assert line(now) == (
        f"2 alerts in the last day: {good.id} finished at step 20 (1 min ago); "
        f"{smoke} died at step 12 (3 h ago); all: tessera-exp alerts"
    )
    assert str(line(now + 22 * 3600)).startswith("1 alert in the last day")
    assert line(now + 48 * 3600) is None
    for name in ("c", "d", "e"):
        bench.finished(name)
    command()
    found = str(line(bench.clock()))
    assert found.startswith("5 alerts in the last day: e-")
    assert found.endswith("; 2 more; all: tessera-exp alerts")


@pytest.mark.parametrize("recorded", [False, True])
def test_list_tells_what_happened_today(
    bench: Bench, command: Command, capfd: pytest.CaptureFixture[str], recorded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("tessera.cli.exp_list.time", SimpleNamespace(time=bench.clock))
    smoke = died(bench)
    if recorded:
        command()
        capfd.readouterr()
    assert run_command(exp, ["list", "--root", bench.root.url]) == 0
    out = capfd.readouterr().out
    assert f"1 alert in the last day: {smoke} died at step 12 (" in out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "just now"), (59, "just now"), (300, "5 min ago"), (5400, "2 h ago"),
     (47 * 3600, "47 h ago"), (72 * 3600, "3 days ago")],
)  # fmt: skip
def test_ago(seconds: float, said: str) -> None:
    assert ago(seconds) == said


def test_a_damaged_record_is_left_out_of_the_line(bench: Bench, command: Command) -> None:
    bench.finished()
    command()
    bench.root.publish("alerts/base/died-1-ab.json", b"nonsense")
    found = read_everything(bench.root, now=bench.clock()).alerts
    assert str(last_alerts_line(found, bench.clock())).startswith("1 alert in the last day: base-")


def test_the_folder_of_alerts_is_the_one_they_are_written_to() -> None:
    assert ALERTS == FOLDER


def test_a_damaged_alert_is_named_and_hides_nothing(bench: Bench, command: Command) -> None:
    bench.finished()
    bench.root.publish("alerts/base/died-1-ab.json", b"{}")
    code, out, err = command()
    assert code == 2
    assert "finished at step 20" in out
    assert err.startswith(f"Error: alerts/base/died-1-ab.json in {bench.root.url} is not an alert")
    assert err.count("Error") == 1
