"""``tessera-exp report``: one page about one run, in a file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tessera.cli.common import epilog, root_option
from tessera.cli.run_names import run_argument

if TYPE_CHECKING:
    from tessera.runs import Run
    from tessera.storage import Root


@click.command(
    epilog=epilog(
        "tessera-exp report smoke",
        "tessera-exp report smoke-1a2b3c4d -o report.html --open",
        "tessera-exp report tessera-1b --root s3://bucket/tessera -o /tmp/1b.html",
    )
)
@run_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The page; default: <run id>.html in this folder. An old one is replaced.",
)
@root_option
@click.option("--open", "open_it", is_flag=True, help="Show it in the browser.")
def report(run: str, output: Path | None, root: str, open_it: bool) -> None:
    """Write one page about RUN: loss, dollars, attempts, data, interviews, how to run it again.

    The page needs no network and no script; it is made for a phone and for paper too. RUN is a run
    id, its beginning, or the name of an experiment that has one run.
    """
    from tessera.runs import find_run
    from tessera.storage import open_root

    store = open_root(root)
    found = find_run(store, run)
    path = output or Path(f"{found.id}.html")
    check_place(path)
    text = page_of(store, found)
    write_whole(path, text)
    click.echo(f"Wrote {path} ({len(text.encode()) / 1000:,.0f} kB).")
    if open_it:
        import webbrowser

        if not webbrowser.open(path.absolute().as_uri()):
            click.echo("No browser could be started here; open the file yourself.", err=True)


def page_of(root: Root, run: Run) -> str:
    """The page of one run; ``InputError`` where what draws it is not installed."""
    from tessera.cli._exp_events import EVENTS, worded
    from tessera.cli._exp_report import extras_of
    from tessera.errors import InputError
    from tessera.tracking.report.gather import gather

    try:
        from tessera.tracking.report.page import render
    except ModuleNotFoundError as error:
        raise InputError(
            f"What draws the report is not installed ({error}); run pip install "
            "'tessera[tracking]'."
        ) from error

    return render(gather(root, run, extras_of(root, run), events=EVENTS, worded=worded))


def check_place(path: Path) -> None:
    """Before anything is read: ``InputError`` where the page cannot be put."""
    from tessera.errors import InputError

    if not path.parent.is_dir():
        raise InputError(
            f"There is no folder {path.parent} for {path.name}; make it, or give another file with "
            "-o."
        )


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` so that it appears whole or not at all; ``InputError`` where that fails."""
    import os
    import tempfile

    from tessera.errors import InputError

    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's file is for its owner alone
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"The report cannot be written to {path} ({error.strerror or error}); make room or "
            "give another file with -o."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
