"""Promotions are records of the root: ``registry/tessera-adapter/<number>.json``, in order.

MLflow keeps no history of an alias, so the records are the history and MLflow's alias follows from
them. A number is taken by exclusive creation: of two people who promote at once one gets it and the
other is told who did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from tessera.errors import ConflictError, DamagedError
from tessera.runs import what_is_wrong
from tessera.storage import Root

MODEL_NAME = "tessera-adapter"
CHAMPION = "champion"
FOLDER = f"registry/{MODEL_NAME}"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Evidence:
    """An interview that counted: where it lies, the sha256 of that file, its suite and score."""

    path: str
    sha256: str
    suite: str
    suite_digest: str
    score: float


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Promotion:
    """One promotion. ``promoted_at`` is ISO 8601 in UTC; ``previous`` is ``run id/adapter``.

    ``refusals`` are what the gate said, ``override`` the reason for which it was overruled.
    ``token`` tells two records of the same number apart.
    """

    number: int
    token: str
    alias: str
    run_id: str
    adapter: str
    base_run_id: str
    base_digest: str
    adapter_digest: str
    evidence: tuple[Evidence, ...]
    score: float | None
    refusals: tuple[str, ...]
    override: str | None
    previous: str | None
    promoted_at: str
    promoted_by: str

    @property
    def path(self) -> str:
        """The record, relative to the root."""
        return f"{FOLDER}/{self.number:06d}.json"

    @property
    def who(self) -> str:
        """What was promoted, as ``run id/adapter``."""
        return f"{self.run_id}/{self.adapter}"

    @property
    def uri(self) -> str:
        """What ``mlflow.pyfunc.load_model`` takes."""
        return f"models:/{MODEL_NAME}@{self.alias}"


_PROMOTION = TypeAdapter(Promotion)
_NAME = re.compile(r"/\d{6,}\.json$")


def read_promotions(root: Root) -> list[Promotion]:
    """Every promotion, oldest first."""
    paths = [f"{FOLDER}/{name}" for name in root.children(FOLDER)]
    found = {path: root.read_bytes(path) for path in paths if _NAME.search(path)}
    return parse_promotions(root, found)


def parse_promotions(root: Root, contents: Mapping[str, bytes]) -> list[Promotion]:
    """Every promotion, oldest first, from the records' bytes by path in the root."""
    found = [_parsed(root, path, data) for path, data in contents.items() if _NAME.search(path)]
    return sorted(found, key=lambda promotion: promotion.number)


def holders(promotions: list[Promotion]) -> dict[str, Promotion]:
    """Who carries each alias now."""
    return {promotion.alias: promotion for promotion in promotions}


def write_promotion(root: Root, promotion: Promotion) -> None:
    """Write a record under its number; ``ConflictError`` naming the winner if that is taken."""
    value = asdict(promotion)
    if root.create_json(promotion.path, value):
        # A store that ignores the condition lets the later write win; the token says whose it is.
        found = _read(root, promotion.path)
        if found.token == promotion.token:
            return
    else:
        found = _read(root, promotion.path)
    raise ConflictError(
        f"{found.promoted_by} promoted {found.who} to {found.alias} at the same moment "
        f"({found.promoted_at}, {found.path}), so {promotion.who} was not; look at it and promote "
        "again if you still want to."
    )


def _read(root: Root, path: str) -> Promotion:
    return _parsed(root, path, root.read_bytes(path))


def _parsed(root: Root, path: str, data: bytes) -> Promotion:
    try:
        return _PROMOTION.validate_python(json.loads(data))
    except ValueError as error:  # a ValidationError is one too
        why = what_is_wrong(error) if isinstance(error, ValidationError) else "it is no JSON"
        raise DamagedError(
            f"{path} in {root.url} is not a promotion record ({why}); restore it from a backup."
        ) from error
