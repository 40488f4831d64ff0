"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from tessera.experiment import Cosine, LinearDecay
from tessera.ledger.budget import Plan


def learning_rate(schedule: Cosine | LinearDecay, peak: float, step: int, steps: int) -> float:
    """Learning rate of optimiser step ``step`` (0-based) out of ``steps``.

    Both schedules rise linearly over ``warmup_steps`` (the first step is not zero) and reach
    ``final_lr`` at the last step, if the warm-up ends before that. Cosine: Loshchilov & Hutter
    2017. Linear decay: constant at the peak, then a straight line over the last ``decay_fraction``
    of all steps (Hägele et al. 2024).
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    last = max(steps - 1, 1)
    if isinstance(schedule, Cosine):
        progress = min(1.0, (step - warmup) / max(last - warmup, 1))
        return schedule.final_lr + (peak - schedule.final_lr) * (
            0.5 * (1 + math.cos(math.pi * progress))
        )
    start = max(warmup, min(round(steps * (1 - schedule.decay_fraction)), last - 1))
    if step < start:
        return peak
    progress = min(1.0, (step - start) / max(last - start, 1))
    return peak + (schedule.final_lr - peak) * progress


def planned_rate(schedule: Cosine | LinearDecay, peak: float, step: int, plan: Plan) -> float:
    """Learning rate of step ``step`` (0-based) of a run whose end may move (see ``Plan``).

    Where the end does not move it is ``learning_rate``.
    """
    if plan.sized_by != "budget":
        return learning_rate(schedule, peak, step, plan.end_step)
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    return peak + (schedule.final_lr - peak) * (1.0 - plan.share(step))
