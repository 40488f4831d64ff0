"""Promotions are records of the root: ``registry/tessera-adapter/<number>.json``, in order.

MLflow keeps no history of an alias, so the records are the history and MLflow's alias follows from
them. A number is taken by exclusive creation: of two people who promote at once one gets it and the
other is told who did.
"""

from __future__ import annotations

import re
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


def read_promotions(root: Root) -> list[Promotion]:
    """Every promotion, oldest first."""
    names = [n for n in root.children(FOLDER) if re.fullmatch(r"\d{6,}\.json", n)]
    return sorted((_read(root, f"{FOLDER}/{name}") for name in names), key=lambda p: p.number)


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
    try:
        return _PROMOTION.validate_python(root.read_json(path))
    except ValidationError as error:
        raise DamagedError(
            f"{path} in {root.url} is not a promotion record ({what_is_wrong(error)}); restore it "
            "from a backup."
        ) from error
