"""``tessera-exp note``, ``tag``, ``archive``: what people say of a run, as records of the root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from tessera.cli.common import epilog, json_option, print_json, root_option
from tessera.cli.run_names import run_argument

if TYPE_CHECKING:
    from tessera.tracking.annotations import Annotation


@click.command(
    epilog=epilog(
        'tessera-exp note smoke "Diverges above 1e-3; the warm-up is too short."',
        "tessera-exp note smoke --edit",
        "tessera-exp note smoke               # the note, and those before it",
    )
)
@run_argument
@click.argument("text", required=False)
@click.option("--edit", is_flag=True, help="Write it in $EDITOR.")
@click.option("--clear", is_flag=True, help="Take the note back.")
@root_option
@json_option
def note(run: str, text: str | None, edit: bool, clear: bool, root: str, as_json: bool) -> None:
    """Say what came out of RUN, conclusion first; without TEXT, show what was said.

    The first line is what `list` shows and MLflow puts on top. Earlier notes stay on record.
    """
    from tessera.errors import InputError
    from tessera.runs import find_run
    from tessera.storage import open_root
    from tessera.tracking.annotations import Annotated, annotate, read_annotations

    store = open_root(root)
    found = find_run(store, run)
    if (text is not None) + edit + clear > 1:
        raise InputError("Give TEXT, --edit or --clear, one of them.")
    said = read_annotations(store, found.id)
    if edit:
        before = Annotated.of(said).note or ""
        text = click.edit(before, extension=".md")
        if text is None or text.strip() == before.strip():
            click.echo("Nothing was changed.")
            return
    if text is not None and not text.strip():
        raise InputError("The note is empty; give it words, or --clear to take it back.")
    if text is not None or clear:
        annotate(store, found.id, "note", text.strip() if text is not None else None)
        click.echo(f"{found.id}: {'the note was taken back' if clear else 'noted'}.")
        return
    _show([record for record in said if record.kind == "note"], found.id, as_json)


@click.command(
    epilog=epilog(
        "tessera-exp tag smoke sweep=lr keep",
        "tessera-exp tag smoke --remove keep",
        "tessera-exp list --tag sweep=lr",
    )
)
@run_argument
@click.argument("tags", nargs=-1, metavar="[KEY[=VALUE]]...")
@click.option("--remove", multiple=True, metavar="KEY", help="Take a tag back; may be repeated.")
@root_option
@json_option
def tag(run: str, tags: tuple[str, ...], remove: tuple[str, ...], root: str, as_json: bool) -> None:
    """Give RUN tags; without any, show those that it has."""
    from tessera.errors import InputError
    from tessera.runs import find_run
    from tessera.storage import open_root
    from tessera.tracking.annotations import Annotated, annotate, check_tag, read_annotations

    store = open_root(root)
    found = find_run(store, run)
    had = Annotated.of(read_annotations(store, found.id)).tags
    pairs = [(key, value) for key, _, value in (text.partition("=") for text in tags)]
    for key, value in pairs:  # all of them before the first is written
        check_tag(key, value)
    for key in remove:
        if key not in had:
            known = ", ".join(had) or "none"
            raise InputError(f"{found.id} has no tag {key!r}; it has: {known}.")
    for key, value in pairs:
        annotate(store, found.id, "tag", value, key=key)
    for key in remove:
        annotate(store, found.id, "tag", None, key=key)
    now = Annotated.of(read_annotations(store, found.id)).tags
    if as_json:
        print_json(dict(now))
        return
    words = ", ".join(key if value == "" else f"{key}={value}" for key, value in now.items())
    click.echo(f"{found.id}: {words or 'no tags'}.")


@click.command(
    epilog=epilog("tessera-exp archive smoke-1a2b3c4d", "tessera-exp archive --undo smoke-1a2b3c4d")
)
@run_argument(nargs=-1, required=True)
@click.option("--undo", is_flag=True, help="Show them again.")
@root_option
def archive(run: tuple[str, ...], undo: bool, root: str) -> None:
    """Hide RUN from `list` and MLflow; nothing of it is deleted.

    MLflow shows an archived run under "deleted" runs, from where it can be restored as well.
    """
    from tessera.runs import find_run
    from tessera.storage import open_root
    from tessera.tracking.annotations import annotate

    store = open_root(root)
    found = [find_run(store, name) for name in run]  # all of them before the first is written
    for each in found:
        annotate(store, each.id, "archive", None if undo else "yes")
        click.echo(f"{each.id}: {'shown again' if undo else 'archived'}.")


COMMANDS = (note, tag, archive)


def _show(notes: Sequence[Annotation], run_id: str, as_json: bool) -> None:
    if as_json:
        print_json([asdict(record) for record in notes])
        return
    if not notes:
        click.echo(f'{run_id} has no note; tessera-exp note {run_id} "..." writes one.')
        return
    *before, last = notes
    click.echo(last.value or "(the note was taken back)")
    for record in (last, *reversed(before)):
        at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M UTC")
        first = (record.value or "(taken back)").split("\n")[0]
        click.echo(f"  {at}  {record.by}, {record.source}: {first}")
