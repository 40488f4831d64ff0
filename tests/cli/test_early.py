"""Told to go before the training listens: real processes, held by an experiment that is a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tessera.cli.early import told_early

SMOKE = Path(__file__).parents[2] / "experiments/smoke.yaml"
FATAL = (signal.SIGTERM, signal.SIGINT)


def sentence(name: str) -> str:
    return (
        f"Error: Stopped by {name} before the training began; nothing is lost, and the same "
        "command starts it.\n"
    )


class Held:
    """``tessera train`` that reads its experiment from a pipe, so it stands still while it does."""

    def __init__(self, folder: Path) -> None:
        self._pipe, self._root = folder / "held.yaml", folder / "root"
        os.mkfifo(self._pipe)
        self._root.mkdir()
        self._writers: list[int] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tessera", "train", str(self._pipe), "--root", str(self._root),
             *options],
            env={**os.environ, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        return self.process

    def until(self, there: Callable[[], bool]) -> None:
        assert self.process is not None
        deadline = time.monotonic() + 120
        while not there():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def until_read(self) -> None:
        """Return once somebody waits in a read of the pipe; it stays open, and empty.

        Opened is not enough: a signal between Python's last look for signals and the system call is
        heard when that returns, and an empty pipe never does.
        """

        def reader_waits() -> bool:
            with suppress(OSError):  # ENXIO: nobody reads yet
                self._writers.append(os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK))
                return True
            return False

        self.until(reader_waits)
        self.until(self._is_at_rest)

    def _is_at_rest(self) -> bool:
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid)
            every = [family, *family.children(recursive=True)]
            before = [process.cpu_times()[:2] for process in every]
            time.sleep(0.2)
            return before == [process.cpu_times()[:2] for process in every]
        return False

    def write(self, text: str) -> None:
        """What the reader gets; it reads no more after that."""
        writer = self._writers.pop()
        os.write(writer, text.encode())
        os.close(writer)

    def is_read_by(self, process: psutil.Process) -> bool:
        """Whether ``process`` has opened the pipe, so that it reads or is about to."""
        with suppress(OSError):
            links = Path(f"/proc/{process.pid}/fd").iterdir()
            return str(self._pipe) in {os.readlink(link) for link in links}
        return False

    def is_empty(self) -> bool:
        return list(self._root.iterdir()) == []

    def close(self) -> None:
        for writer in self._writers:
            os.close(writer)
        if self.process is not None:
            if self.process.poll() is None:
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    child.kill()
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    found = Held(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("number", FATAL)
@pytest.mark.parametrize("options", [(), ("--gpus", "2")], ids=["one", "launcher"])
def test_told_to_go_before_torch_is_75_and_a_sentence(
    held: Held, number: signal.Signals, options: tuple[str, ...]
) -> None:
    process = held.start(*options)
    held.until_read()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "", sentence(number.name))
    assert held.is_empty()


@pytest.mark.parametrize(("rank", "said"), [("0", sentence("SIGTERM")), ("1", "")])
def test_one_of_several_workers_speaks(held: Held, rank: str, said: str) -> None:
    process = held.start(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
    held.until_read()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "", said)


def test_workers_that_are_told_early_make_the_command_75(held: Held) -> None:
    """The command itself has read the experiment and waits for workers that read it again."""
    process = held.start("--gpus", "2")
    command = psutil.Process(process.pid)
    held.until_read()
    held.until(lambda: held.is_read_by(command))  # else the pipe opened next would be its own again
    held.write(SMOKE.read_text("utf-8"))
    held.until(lambda: not held.is_read_by(command))
    held.until_read()

    def both_read() -> bool:
        workers = [c for c in command.children() if held.is_read_by(c)]
        return len(workers) == 2

    held.until(both_read)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert err.count(sentence("SIGTERM")) == 1
    assert held.is_empty()


_HANDING_OVER = """
import os, signal, sys, threading
from tessera.cli.early import told_early
from tessera.training.preemption import StoppedEarlyError, StopRequest, listening

number = getattr(signal, sys.argv[1])
with told_early() as hand_over:
    hand_over()
    if sys.argv[2] == "before":
        os.kill(os.getpid(), number)
    try:
        with listening(StopRequest(25.0)):
            if sys.argv[2] == "within":
                os.kill(os.getpid(), number)
    except StoppedEarlyError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize("number", FATAL)
@pytest.mark.parametrize(
    ("when", "says"),
    [("before", "began or ended"), ("within", "before the training began"), ("after", "ended")],
)
def test_nothing_falls_between_the_handlers(number: signal.Signals, when: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANDING_OVER, number.name, when], capture_output=True, text=True
    )
    assert done.returncode == 75
    (line,) = done.stderr.splitlines()
    assert f"Stopped by {number.name} " in line
    assert says in line


def test_handlers_are_as_before_when_it_is_over() -> None:
    before = [signal.getsignal(number) for number in FATAL]
    with told_early():
        assert [signal.getsignal(number) for number in FATAL] != before
    assert [signal.getsignal(number) for number in FATAL] == before
