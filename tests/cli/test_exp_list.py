"""``tessera-exp list``: which runs, in which order, in which form."""

from __future__ import annotations

import csv
import io
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.shell import Shell
    from tests.tracking.fabricate import Bench


@pytest.fixture
def three(bench: Bench) -> dict[str, str]:
    """A dear good run, a cheap bad one, and one that died without a figure; by name."""
    good = bench.finished("good", steps=40, final=2.0)
    bad = bench.finished("bad", steps=20, final=3.0)
    writer = bench.launch(bench.create("dead"), usd_per_hour=None, instance="i-9")
    writer.steps(1, 3)
    writer.kill()
    bench.clock.now += 500
    return {"good": good.id, "bad": bad.id, "dead": writer.run.id}


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["good", "bad", "dead"]),
        (["--max-cost", "0.03"], ["bad"]),
        (["--under-loss", "3.0"], ["good"]),
        (["--under-loss", "3.01", "--max-cost", "0.03"], ["bad"]),
        (["--kind", "sft"], []),
        (["--status", "died"], ["dead"]),
        (["--status", "died", "--status", "finished"], ["good", "bad", "dead"]),
        (["--run", "goo"], ["good"]),
        (["--run", "*d-*"], ["good", "bad", "dead"]),
        (["--limit", "2"], ["good", "bad"]),
        (["--sort", "cost"], ["bad", "good", "dead"]),
        (["--sort", "cost", "--reverse"], ["good", "bad", "dead"]),
        (["--sort", "loss", "--limit", "1"], ["good"]),
        (["--base", "good"], []),
        (["--tag", "keep"], []),
    ],
)
def test_filters_and_order(
    three: dict[str, str], shell: Shell, options: list[str], expected: list[str]
) -> None:
    assert names(shell.json("list", *options)) == expected
    assert names(shell.json("list", "--fresh", *options)) == expected


def test_since_counts_from_the_creation(
    bench: Bench, shell: Shell, three: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = min(row["created_at"] for row in shell.json("list"))
    monkeypatch.setattr(time, "time", lambda: made + 7200.0)
    assert len(shell.json("list", "--since", "3h")) == 3
    assert shell.json("list", "--since", "90m") == []


def test_tags_notes_and_archived_runs(shell: Shell, three: dict[str, str]) -> None:
    shell.said("tag", "good", "sweep=lr", "keep")
    shell.said("tag", "bad", "sweep=batch")
    shell.said("note", "good", "Best so far.\nThe rest.")
    shell.said("archive", "bad", "dead")
    assert names(shell.json("list")) == ["good"]
    assert names(shell.json("list", "--archived")) == ["good", "bad", "dead"]
    assert names(shell.json("list", "--archived", "--tag", "sweep")) == ["good", "bad"]
    assert names(shell.json("list", "--tag", "sweep=lr", "--tag", "keep")) == ["good"]
    (row,) = shell.json("list")
    assert row["note"] == "Best so far.\nThe rest."
    assert row["tags"] == {"keep": "", "sweep": "lr"}
    out = shell.said("list")
    assert "Best so far." in out
    assert "The rest." not in out
    assert "2 archived not shown (--archived)." in out
    shell.said("archive", "--undo", "dead")
    assert names(shell.json("list")) == ["good", "dead"]
    assert "bad" in shell.said("list", "--archived", "--columns", "run")
    out = shell.said("list", "--status", "diverged")
    assert out.startswith("None of the 3 runs in ")
    assert "is like that (1 archived: --archived)" in out


def test_columns_in_csv_and_markdown(shell: Shell, three: dict[str, str]) -> None:
    shell.said("note", "good", "a|b, [bold]c")
    columns = ["--columns", "run,cost,train/loss,note"]
    rows = list(csv.DictReader(io.StringIO(shell.said("list", "--csv", *columns))))
    assert [row["run"] for row in rows] == list(three.values())
    assert float(rows[0]["cost"]) == pytest.approx(0.04)
    assert float(rows[0]["train/loss"]) == pytest.approx(10 / 40 + 0.001)
    assert rows[0]["note"] == "a|b, [bold]c"
    assert rows[2]["cost"] == ""
    lines = shell.said("list", "--md", *columns).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == columns[1].split(",")
    assert set(lines[1]) <= set("|-: ")
    assert "a\\|b, [bold]c" in lines[2]
    assert len(lines) == 5
    out = shell.said("list", *columns)
    assert "0.251" in out
    assert "tok/s" not in out


def test_a_tree_puts_voices_under_their_base(bench: Bench, shell: Shell) -> None:
    bench.finished("other")
    voice = bench.with_adapter()
    bench.finished("last")
    lines = [line for line in shell.said("list", "--tree", "--columns", "run").splitlines() if line]
    found = [line.rstrip() for line in lines if "-" in line]
    assert found[-2].startswith(f" └─ {voice.id}")
    assert found[-3].startswith(" base-")
    # Without its base a voice stands for itself.
    assert "└─" not in shell.said("list", "--tree", "--kind", "sft", "--columns", "run")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--columns", "run,colour"], "There is no column 'colour'; give some of run, kind"),
        (["--since", "yesterday"], "--since 'yesterday' should be a number and m, h, d or w"),
        (["--csv", "--json"], "Give one of --json, --csv, --md and --watch."),
        (["--watch", "--json"], "Give one of --json, --csv, --md and --watch."),
        (["--watch"], "--watch needs a terminal"),
    ],
)
def test_bad_options_are_a_sentence(
    shell: Shell, three: dict[str, str], options: list[str], sentence: str
) -> None:
    code, out, err = shell("list", *options)
    assert (code, out) == (2, "")
    assert sentence in err


def test_a_damaged_annotation_hides_nothing(
    bench: Bench, shell: Shell, three: dict[str, str]
) -> None:
    shell.said("note", "good", "words")
    shell.said("note", "bad", "others")
    (path,) = bench.root.files(f"annotations/{three['bad']}")
    bench.root.publish(path, b"torn")
    code, out, err = shell("list", "--json")
    assert code == 2
    assert f"Error: {path}" in err
    assert "words" in out


def test_watch_shows_again_what_changed(bench: Bench, three: dict[str, str], tmp_path: Any) -> None:
    """On a real terminal: the table comes again with the new figure, and Ctrl-C ends it."""
    import os
    import pty
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-c", "from tessera.cli.exp import main; main()", "list", "--watch",
               "--every", "1", "--root", bench.root.url]  # fmt: skip
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "COLUMNS": "160", "LINES": "40", "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    try:
        seen = _until(master, b"Ctrl-C ends")
        assert b"good-" in seen
        bench.finished("fresh")
        _until(master, b"fresh-")
        process.send_signal(signal.SIGINT)
        threading.Thread(target=_drain, args=(master,), daemon=True).start()
        assert process.wait(120) == 130
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _drain(terminal: int) -> None:
    """Read on: a terminal that nobody reads holds up whoever writes to it."""
    import os

    with suppress(OSError):
        while os.read(terminal, 65536):
            pass


def _until(terminal: int, text: bytes) -> bytes:
    import os
    import select

    seen = b""
    deadline = time.monotonic() + 120
    while text not in seen:
        assert time.monotonic() < deadline, seen[-2000:]
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 65536)
    return seen


def test_the_folder_of_refusals_is_the_one_they_are_written_to() -> None:
    from tessera.cli._exp_read import REFUSALS
    from tessera.cloud.refusals import FOLDER

    assert REFUSALS == FOLDER
