"""What a script that is no click command does with an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tessera.cli.common import run_script
from tessera.errors import InputError, RetryElsewhereError


@pytest.mark.parametrize("error", [InputError("Too small."), RetryElsewhereError("Too far.")])
def test_a_deliberate_error_is_a_sentence_and_its_code(
    capfd: pytest.CaptureFixture[str], error: InputError | RetryElsewhereError
) -> None:
    def fails() -> None:
        raise error

    assert run_script(fails) == error.exit_code
    assert capfd.readouterr() == ("", f"Error: {error}\n")


def test_a_command_that_failed_is_named_and_its_code_passed_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(75)"]

    assert run_script(lambda: subprocess.run(command, check=True)) == 75
    err = capfd.readouterr().err
    assert err.startswith("why\nError: `")
    assert err.endswith("failed, see above.\n")


def test_what_nobody_expected_is_not_hidden() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(fails)


def test_success_is_0() -> None:
    assert run_script(lambda: 5) == 0
