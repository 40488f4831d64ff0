"""A small root for looking at: four pretrainings and two voices, with dollars and interviews."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tessera.evaluation.verdicts import Verdict
from tessera.runs import Run
from tessera.tracking.saved_views import SO_FAR

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer

STEP_S = 600.0
TOKENS_PER_STEP = 45_000_000
USD_PER_HOUR = {"small": 1.8, "steady": 3.6, "wide": 7.2, "hasty": 5.4}
FINAL_LOSS = {"small": 3.42, "steady": 2.95, "wide": 2.71, "hasty": 3.61}
STEPS, EVERY = 60, 5


def learn(writer: Writer, usd_per_hour: float, final: float, steps: int = STEPS) -> None:
    """Train to the end: dollars at every step, an evaluation at every fifth, from 6 nats down."""
    started = writer.clock.now
    for step in range(1, steps + 1):
        writer.clock.now += STEP_S
        writer.journal.metric("train/loss", final + 3.0 * (1 - step / steps) ** 3, step)
        writer.journal.metric("progress/tokens", step * TOKENS_PER_STEP, step)
        writer.journal.span("train", STEP_S, step)
        usd = (writer.clock.now - started) * usd_per_hour / 3600
        writer.journal.metric("cost/usd", usd, step)
        if step % EVERY == 0:
            writer.journal.metric(SO_FAR, usd, step)
            writer.evaluate(step, final + (6.0 - final) * (1 - step / steps) ** 3)
    writer.checkpoint(steps)
    writer.end("FINISHED", steps)


def voices_root(bench: Bench) -> list[Run]:
    """Fill the root: the bases by name, then the voices ``warm`` and ``curt`` on ``wide``."""
    runs = []
    for name, price in USD_PER_HOUR.items():
        run = bench.create(name, steps=STEPS)
        writer = bench.launch(run, instance=f"i-{name}", usd_per_hour=price)
        writer.evaluate(0, 6.0)
        learn(writer, price, FINAL_LOSS[name])
        runs.append(run)
    base = {"run_id": runs[2].id, "weights_digest": "b" * 64}
    voices: tuple[tuple[str, float, Verdict], ...] = (("warm", 2.1, "pass"), ("curt", 2.4, "fatal"))
    for name, loss, verdict in voices:
        run = bench.create(name, base=base)
        writer = bench.launch(run, instance=f"i-{name}")
        writer.evaluate(0, 4.0, base_loss=4.0)
        digest = name[0] * 64
        writer.journal.event("adapter/saved", 10, name="ep1", weights_digest=digest)
        learn(writer, 3.6, loss, 10)
        folder = run.path("adapters", "ep1")
        bench.root.publish_json(f"{folder}/base.json", {"weights_digest": "b" * 64})
        bench.root.publish_json(f"{folder}/weights.json", {"weights_digest": digest})
        bench.interview(run, verdict=verdict)
        runs.append(run)
    return runs
