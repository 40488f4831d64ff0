"""What the commands of ``tessera-exp`` read before they choose, sort and show."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.errors import DamagedError
from tessera.promotion.records import FOLDER as REGISTRY
from tessera.promotion.records import holders, parse_promotions
from tessera.storage import Root
from tessera.tracking.annotations import FOLDER as ANNOTATIONS
from tessera.tracking.annotations import NOTHING, Annotated, parse_annotations
from tessera.tracking.choose import Listed
from tessera.tracking.history import Histories
from tessera.tracking.index import read_indexed
from tessera.tracking.memory import Memory, remembered
from tessera.tracking.queries import summarise_history


@dataclass(frozen=True)
class Everything:
    """All runs of a root with all that is said of them; ``damaged`` are sentences."""

    histories: Histories
    rows: tuple[Listed, ...]
    damaged: tuple[str, ...]


def read_everything(root: Root, *, fresh: bool = False, now: float | None = None) -> Everything:
    """Every run that can be read, oldest first; ``fresh`` trusts nothing that is remembered."""
    with remembered(root) as memory:
        read = read_indexed(root, memory, now=now, fresh=fresh)
        said, wrong = _annotations(root, memory)
        aliases: dict[str, dict[str, str]] = {}
        promotions = parse_promotions(root, memory.contents(root, REGISTRY))
    for alias, promotion in holders(promotions).items():
        aliases.setdefault(promotion.run_id, {})[alias] = promotion.adapter
    rows = tuple(
        Listed(
            summarise_history(history, read.bills, now=now),
            said.get(history.run.id, NOTHING),
            aliases.get(history.run.id, {}),
        )
        for history in read.whole
    )
    return Everything(read, rows, (*(str(error) for error in read.damaged.values()), *wrong))


def _annotations(root: Root, memory: Memory) -> tuple[dict[str, Annotated], list[str]]:
    """A damaged annotation hides no run: what can be read, and sentences about the rest."""
    contents = memory.contents(root, ANNOTATIONS)
    try:
        return parse_annotations(root, contents), []
    except DamagedError:
        pass
    wrong = []
    for path in list(contents):
        try:
            parse_annotations(root, {path: contents[path]})
        except DamagedError as error:
            wrong.append(str(error))
            del contents[path]
    return parse_annotations(root, contents), wrong
