"""What both commands share: options, the one place where errors become sentences and exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tessera.storage import Root

F = TypeVar("F", bound=Callable[..., Any])


def root_option(function: F) -> F:
    """``--root``: where everything that must last is kept."""
    return click.option(
        "--root",
        envvar="TESSERA_ROOT",
        default=".tessera",
        show_default="the root that `tessera configure` wrote to ~/.tessera/env, else .tessera",
        metavar="URL",
        callback=not_empty,
        help="Folder or URL (s3://bucket/prefix) that holds corpora, runs and records; "
        "also TESSERA_ROOT.",
    )(function)


def not_empty(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A script's unset variable (``--root "$ROOT"``) must not mean another root silently."""
    from tessera.errors import InputError

    if value is not None and not value.strip():
        raise InputError(
            "The root is empty; give --root a folder or a URL such as s3://bucket/prefix, or leave "
            "it out for TESSERA_ROOT or the folder .tessera."
        )
    return value


def provider_named(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """A provider as SkyPilot spells it in small letters; vast.ai goes by its own name too."""
    from tessera.errors import InputError

    if value is None:
        return None
    name = value.strip().lower()
    if not name:
        raise InputError("--provider is empty; name one, such as vast, or leave it out for all.")
    return "vast" if name in ("vast.ai", "vastai") else name


def place_named(root: Root) -> str:
    """The root in a sentence that says what is not in it."""
    return f"{root.url}, which does not exist yet" if root.is_absent() else root.url


def json_option(function: F) -> F:
    """``--json``: the same figures for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(
        function
    )


class Seconds(click.FloatRange):
    """A number of seconds (or another unit) that can be waited: finite, at least ``min``."""

    name = "seconds"

    def __init__(self, min: float) -> None:  # noqa: A002 - click's own name
        super().__init__(min=min, max=1e6)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Refuses NaN, which lies in every range of click's."""
        found = float(super().convert(value, param, ctx))
        if found != found:
            self.fail(f"{value!r} is no number that can be waited.", param, ctx)
        return found


def print_json(value: Any) -> None:
    """JSON on stdout, readable and in one piece."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """JSON values of figures: NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def tell_damaged(sentences: Sequence[str]) -> int:
    """A line on stderr for each thing that is damaged; returns the exit code."""
    from tessera.errors import DamagedError

    for sentence in sentences:
        click.echo(f"Error: {sentence}", err=True)
    return DamagedError.exit_code if sentences else 0


def epilog(*examples: str) -> str:
    """The examples at the end of a ``--help``, kept line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


def run_command(
    command: click.Command, arguments: Sequence[str] | None = None, *, configured: bool = False
) -> int:
    """Run a click command; deliberate errors become one sentence on stderr and their exit code.

    A reader that went away (``| head``) is no error. ``TESSERA_DEBUG=1`` shows the traceback. With
    ``configured``, what ``tessera configure`` wrote is the default of unset variables.
    """
    from tessera.errors import TesseraError

    result: object = 0
    try:
        if configured:
            from tessera.cloud.credentials import apply_defaults

            apply_defaults(sys.argv[1:])
        result = command.main(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("Stopped.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except TesseraError as error:
        if os.environ.get("TESSERA_DEBUG"):
            raise
        if not error.told_elsewhere:
            click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)
        return 130
    except BrokenPipeError:
        _reader_gone()
        return result if isinstance(result, int) else 0
    except SystemExit as error:  # how click and rich leave when they find the pipe broken
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _reader_gone()


def run_script(main: Callable[[], object]) -> int:
    """Run the ``main`` of a script that is no click command, with one sentence for what went wrong.

    A command that it ran and that failed has said why already; its exit code is passed on.
    """
    import shlex
    import subprocess

    from tessera.errors import TesseraError

    try:
        main()
    except TesseraError as error:
        if os.environ.get("TESSERA_DEBUG"):
            raise
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        click.echo(f"Error: `{shlex.join(map(str, error.cmd))}` failed, see above.", err=True)
        return error.returncode
    return 0


def _reader_gone() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
