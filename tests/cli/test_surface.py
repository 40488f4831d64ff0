"""The commands and options that people and scripts rely on are those in surface.txt.

A change there is a change for everybody who uses them: write it by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.cli.main import tessera

_AS_INSTALLED = "import sys; sys.argv[0] = 'tessera-exp'; from tessera.cli.exp import main; main()"
SURFACE = Path(__file__).with_name("surface.txt")


def surface(command: click.Command, name: str) -> Iterator[str]:
    """A line a command: its options, then its arguments."""
    found = [max(p.opts, key=len) for p in command.params if isinstance(p, click.Option)]
    arguments = [p.human_readable_name for p in command.params if isinstance(p, click.Argument)]
    yield " ".join([name, *sorted(found), *arguments])
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            below = command.get_command(context, child)
            assert below is not None
            yield from surface(below, f"{name} {child}")


def test_commands_and_options_are_the_promised_ones() -> None:
    found = [*surface(tessera, "tessera"), *surface(exp, "tessera-exp")]
    assert found == SURFACE.read_text().splitlines()


@pytest.mark.parametrize("program", ["tessera", "tessera-exp"])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(program: str, shell: str) -> None:
    module = {"tessera": "tessera.cli.main", "tessera-exp": "tessera.cli.exp"}[program]
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import main; main()", "completion", shell],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"_{program.replace('-', '_').upper()}_COMPLETE" in done.stdout


def test_runs_are_completed(tmp_path: Path) -> None:
    (tmp_path / "runs" / "smoke-1a2b3c4d").mkdir(parents=True)
    (tmp_path / "runs" / "other-1a2b3c4d").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", _AS_INSTALLED],
        env={**os.environ, "TESSERA_ROOT": str(tmp_path), "COMP_CWORD": "2",
             "COMP_WORDS": "tessera-exp show smo", "_TESSERA_EXP_COMPLETE": "bash_complete"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "plain,smoke-1a2b3c4d\n"
    assert done.stderr == ""


@pytest.mark.parametrize("program", ["tessera", "tessera-exp"])
def test_without_arguments_it_says_what_there_is(program: str) -> None:
    module = {"tessera": "tessera.cli.main", "tessera-exp": "tessera.cli.exp"}[program]
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import main; main()"],
        env={**os.environ, "TESSERA_ENV_FILE": os.devnull}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Commands:" in done.stdout + done.stderr


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "1e9", "soon"])
@pytest.mark.parametrize(
    "command", [["tail", "x"], ["alerts", "--watch"], ["list", "--watch"], ["sync", "--follow"]]
)
def test_what_cannot_be_waited_is_refused(
    command: list[str], seconds: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(exp, [*command, "--every", seconds, "--root", str(tmp_path)]) == 2
    err = capfd.readouterr().err
    assert "Invalid value for '--every'" in err
    assert "Traceback" not in err
