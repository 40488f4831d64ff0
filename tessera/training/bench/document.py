"""The document of ``tessera bench --json``: what was measured, and what follows from it.

Keys are stable and explained in ``docs/speed.md``. Everything here is arithmetic.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera.experiment import Pretrain
from tessera.ledger.prices import HourlyPrice
from tessera.model.peak import Peak
from tessera.model.probe import AttentionSpeed, Card, Product
from tessera.model.shape import FLOPS_FORMULA, ModelShape, flops_per_token, parameters
from tessera.training.bench.embedded import is_reference
from tessera.training.bench.floor import FLOOR_FORMULA, Ceilings, Floor, floor_of_step
from tessera.training.bench.ladder import Measured
from tessera.training.bench.quick import Projection

VERSION = 1
"""It rises when a key changes its meaning or goes."""
MFU_FORMULA = "FLOPs a token x tokens/s / peak FLOP/s"
REFERENCE_TOKENS_PER_S, REFERENCE_TOKENS = 46_700, 24_504_827_904
REFERENCE_HOURS, REFERENCE_USD = 145.7, 315.0
REFERENCE_NOTE = "published, other hardware: one H100 SXM 80 GB"

Document = dict[str, Any]


@dataclass
class Basis:
    """What turns seconds into figures; ``ceilings`` come once they are measured.

    ``element`` is the bytes of an activation, ``own_attention`` the backend of fused operations
    where no row names another.
    """

    experiment: Pretrain
    shape: ModelShape
    element: int
    peak: Peak
    price: HourlyPrice
    own_attention: str
    ceilings: Ceilings | None = None

    def floor(self, float8: bool) -> Floor | None:
        """Of a step of the experiment; None where a ceiling is missing."""
        if self.ceilings is None:
            return None
        experiment = self.experiment
        return floor_of_step(
            self.shape, experiment.sequence, experiment.batch.tokens_per_step, self.ceilings,
            element=self.element, float8=float8,
        )  # fmt: skip

    def figures(self, step_s: float, float8: bool) -> Document:
        """What follows from the time of a step."""
        experiment = self.experiment
        speed = experiment.batch.tokens_per_step / step_s
        floor = self.floor(float8)
        price = self.price.usd_per_hour
        hours, usd = _hours_and_usd(experiment, speed, price)
        flops = flops_per_token(self.shape, experiment.sequence)
        return {
            "tokens_per_s": speed,
            "mfu": flops * speed / self.peak.flops,
            "ceiling_fraction": None if floor is None else floor.total_s / step_s,
            "hours": hours,
            "usd": usd,
        }


def _hours_and_usd(
    experiment: Pretrain, tokens_per_s: float, usd_per_hour: float | None
) -> tuple[float | None, float | None]:
    """What the run takes: its tokens, or its budget, whichever ends first; None: not known."""
    tokens, budget = experiment.tokens, experiment.budget_usd
    ends = [] if tokens is None else [tokens / tokens_per_s / 3600]
    if budget is not None and usd_per_hour:
        ends.append(budget / usd_per_hour)
    if not ends:
        return None, None
    return min(ends), None if usd_per_hour is None else min(ends) * usd_per_hour


def opening(basis: Basis, source: str, data: str, card: Card, quick: bool) -> Document:
    """The document before anything is measured."""
    experiment, model = basis.experiment, basis.experiment.model
    return {
        "version": VERSION,
        "quick": quick,
        "interrupted": False,
        "experiment": {
            "name": experiment.name,
            "source": source,
            "parameters": parameters(basis.shape),
            "layers": model.layers,
            "d_model": model.d_model,
            "heads": model.heads,
            "vocab_size": model.vocab_size,
            "sequence": experiment.sequence,
            "tokens": experiment.tokens,
            "budget_usd": experiment.budget_usd,
            "tokens_per_step": experiment.batch.tokens_per_step,
            "micro_batch": experiment.batch.micro_batch,
            "precision": experiment.precision,
        },
        "card": dataclasses.asdict(card),
        "data": data,
        "price": _told(basis.price),
        "mfu": {
            "formula": MFU_FORMULA,
            "flops_per_token": flops_per_token(basis.shape, experiment.sequence),
            "flops_formula": FLOPS_FORMULA,
            "peak_flops_per_s": basis.peak.flops,
            "peak_source": basis.peak.source,
        },
        "ceilings": {
            "copy_bytes_per_s": None,
            "products": [],
            "matrix_flops_per_s": None,
            "float8_flops_per_s": None,
            "float8_missing": None,
            "attention": [],
        },
        "floor": {"formula": FLOOR_FORMULA, "plain": None, "float8": None},
        "rows": [],
        "best": None,
        "reference": _reference(experiment),
    }


def product_entry(product: Product) -> Document:
    """One matrix product of the ceilings."""
    rate = product.flops / product.seconds
    return {**dataclasses.asdict(product), "flops_per_s": rate}


def attention_entry(name: str, speed: AttentionSpeed | None, reason: str | None) -> Document:
    """One attention backend of the ceilings."""
    return {
        "backend": name,
        "reason": reason,
        "forward_flops_per_s": speed.forward_flops_per_s if speed else None,
        "backward_flops_per_s": speed.backward_flops_per_s if speed else None,
    }


def floor_entry(floor: Floor | None) -> Document | None:
    """Seconds by part, and all of them."""
    return None if floor is None else {**dataclasses.asdict(floor), "total_s": floor.total_s}


def ladder_row(basis: Basis, row: Measured) -> Document:
    """One technique."""
    document = _empty_row(row.technique.name, row.reason)
    document |= {"settings": _settings(basis, row), "micro_batch": row.micro_batch}
    if row.timing is None:
        return document
    low, middle, high = np.percentile(row.timing.seconds, (10, 50, 90)).tolist()
    document |= {
        "attention": row.timing.attention,
        "steps": len(row.timing.seconds),
        "step_s": {"median": middle, "p10": low, "p90": high},
        "first_step_s": row.timing.first_s,
        "peak_memory_bytes": row.timing.peak_bytes,
    }
    return document | basis.figures(middle, row.technique.float8)


def quick_row(
    basis: Basis, experiment: Pretrain, projection: Projection | None, reason: str | None
) -> Document:
    """The experiment as it is; ``experiment`` has the micro-batch that was measured."""
    eight = experiment.precision == "fp8"
    document = _empty_row("experiment", reason)
    document["micro_batch"] = experiment.batch.micro_batch
    if projection is None:
        return document
    whole = len(projection.layers) == 1
    document |= {
        "attention": projection.attention,
        "steps": projection.steps,
        "step_s": {"median": projection.step_s, "p10": None, "p90": None},
        "first_step_s": projection.first_s,
        "peak_memory_bytes": projection.peak_bytes,
        "projected_from_layers": None if whole else list(projection.layers),
    }
    return document | basis.figures(projection.step_s, eight)


def _settings(basis: Basis, row: Measured) -> dict[str, Any]:
    """What to write into the experiment to train as the row was measured."""
    settings: dict[str, Any] = dict(row.technique.settings)
    if basis.experiment.precision == "fp8" and not row.technique.float8:
        settings["precision"] = "bf16"
        settings |= {"float8": None} if basis.experiment.float8 else {}
    if basis.experiment.attention != "auto" and not row.technique.fused:
        settings["attention"] = "auto"
    if row.technique.times != 1 and row.micro_batch is not None:
        settings["batch.micro_batch"] = row.micro_batch
    return settings


def _reference(experiment: Pretrain) -> Document | None:
    """The reference run for as many tokens; None for a model of another shape."""
    if not is_reference(experiment) or experiment.tokens is None:
        return None
    share = experiment.tokens / REFERENCE_TOKENS
    return {
        "tokens_per_s": REFERENCE_TOKENS_PER_S,
        "hours": REFERENCE_HOURS * share,
        "usd": REFERENCE_USD * share,
        "note": REFERENCE_NOTE,
    }


def _empty_row(name: str, reason: str | None) -> Document:
    return {
        "name": name,
        "reason": reason,
        "settings": {},
        "attention": None,
        "micro_batch": None,
        "steps": 0,
        "tokens_per_s": None,
        "step_s": None,
        "first_step_s": None,
        "mfu": None,
        "peak_memory_bytes": None,
        "ceiling_fraction": None,
        "hours": None,
        "usd": None,
        "projected_from_layers": None,
    }


def _told(price: HourlyPrice) -> dict[str, Any]:
    """The price and its source; why the provider's own is missing only where it is."""
    found = dataclasses.asdict(price)
    return found if price.note else {key: found[key] for key in ("usd_per_hour", "source")}
