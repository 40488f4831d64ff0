"""Runs made up through the real ``Run`` and ``Journal``, with a clock that tests move by hand.

``Bench`` is a root in a folder; ``Bench.launch`` starts an attempt whose ``Writer`` does what the
trainer does: points, spans, evaluations, checkpoints, an ending or a kill -9. The fixture at
the end is re-exported by the conftest files of the folders that use it.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tessera.evaluation.suite import Samples
from tessera.evaluation.verdicts import AnswerVerdict, InterviewResult, ProbeResult, Verdict
from tessera.experiment import Sft, parse_experiment
from tessera.runs import Attempt, Ending, Run, create_or_open, open_run
from tessera.storage import Root
from tessera.tracking.journal import Journal

if TYPE_CHECKING:
    from tests.tracking.looking import Seen

TOKENS_PER_STEP = 1000
_OPTIMIZER = {"lr": 1e-3}
_COMMON = {
    "seed": 1, "optimizer": _OPTIMIZER, "checkpoint": {"every_steps": 10},
    "schedule": {"name": "cosine", "warmup_steps": 1, "final_lr": 0.0},
}  # fmt: skip

_WORDS = (
    "jump", "walk", "look", "talk", "play", "work", "start", "wait", "paint", "print", "count",
    "cook", "help", "open", "close",
)  # fmt: skip


def pretraining(name: str = "base", steps: int = 100) -> dict[str, Any]:
    """An experiment of ``steps`` steps of 1,000 tokens."""
    return {
        **_COMMON, "name": name, "kind": "pretrain",
        "model": {"layers": 1, "d_model": 16, "heads": 2, "context": 100, "vocab_size": 300},
        "data": {"corpus": "sample"}, "evaluation": {"every_steps": 10},
        "batch": {"tokens_per_step": TOKENS_PER_STEP, "micro_batch": 1},
        "tokens": steps * TOKENS_PER_STEP,
    }  # fmt: skip


def fine_tuning(name: str = "voice", base: str = "base") -> dict[str, Any]:
    """A fine-tuning of that base."""
    return {
        **_COMMON, "name": name, "kind": "sft", "base": base, "epochs": 2,
        "data": {"conversations": ["a.jsonl"]},
        "batch": {"conversations_per_step": 1, "micro_batch": 1}, "lora": {"rank": 2},
    }  # fmt: skip


@dataclass
class Clock:
    """Seconds since the epoch, moved by hand."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Writer:
    """One attempt at work."""

    run: Run
    attempt: Attempt
    clock: Clock
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.run, self.attempt.id, upload_every_s=3600.0)

    def steps(self, first: int, last: int, *, seconds: float = 1.0) -> None:
        """Train from step ``first`` to ``last``: a point and ``seconds`` of training each."""
        for step in range(first, last + 1):
            self.clock.now += seconds
            self.journal.metric("train/loss", 10.0 / step + self.attempt.number / 1000, step)
            self.journal.metric("progress/tokens", step * TOKENS_PER_STEP, step)
            self.journal.span("train", 0.9 * seconds, step)
            self.journal.span("data_wait", 0.1 * seconds, step)

    def evaluate(self, step: int, loss: float, **others: float) -> None:
        """An evaluation after ``step``."""
        self.journal.metric("eval/loss", loss, step)
        for name, value in others.items():
            self.journal.metric(f"eval/{name}", value, step)

    def checkpoint(self, step: int) -> None:
        """Publish a complete checkpoint."""
        self.journal.flush()
        self.run.root.publish(
            self.run.path("checkpoints", f"step-{step}-{self.attempt.id}", "COMPLETE"), b""
        )

    def end(self, outcome: str, step: int, exit_code: int = 0) -> None:
        """Say how it ended."""
        self.journal.close()
        records = self.journal.written
        ending = Ending(outcome, exit_code, self.clock(), step, records=records)
        self.run.end_attempt(self.attempt, ending)

    def kill(self) -> None:
        """kill -9 right after an upload: the root has the records, and no ending."""
        self.journal.close()


@dataclass
class Bench:
    """A root in a folder, and ways to fill it."""

    folder: Path
    clock: Clock
    monkeypatch: pytest.MonkeyPatch
    root: Root = field(init=False)

    def __post_init__(self) -> None:
        self.root = Root(str(self.folder / "root"))

    @property
    def uri(self) -> str:
        """A tracking database beside the root, its schema ready."""
        return self.database("mlflow")

    def database(self, name: str) -> str:
        """The URI of another database; made from a copy, since a schema takes seconds."""
        path = self.folder / name / "mlflow.db"
        if not path.exists():
            path.parent.mkdir()
            shutil.copy(empty_database(), path)
        return f"sqlite:///{path}"

    def create(
        self,
        name: str = "base",
        *,
        steps: int = 100,
        base: dict[str, str] | None = None,
    ) -> Run:
        """A run without attempts: a fine-tuning if it has a ``base``."""
        parsed = parse_experiment(
            pretraining(name, steps) if base is None else fine_tuning(name, base["run_id"])
        )
        manifest = f"corpora/sample/{'f' * 64}/manifest.json"
        self.root.publish_json(manifest, {"name": "sample"})
        data = {"manifest": manifest} if base is None else {"conversations": ["a.jsonl"]}
        run, _ = create_or_open(
            self.root, parsed, fingerprint="f" * 64, data=data, base=base, commit="abc123"
        )
        return run

    def launch(self, run: Run, **changes: Any) -> Writer:
        """Start an attempt: 3.60 dollars an hour (a tenth of a cent a second) on instance i-1."""
        attempt = Attempt(
            number=0, token="", started_at=self.clock(), provider="vast", instance="i-1",
            host="box", device="H200", devices=1, usd_per_hour=3.6, price_source="provider",
            billed_from=self.clock(), billed_from_source="provider",
        )  # fmt: skip
        started = run.start_attempt(replace(attempt, **changes), run.furthest())
        return Writer(run, started, self.clock)

    def finished(self, name: str = "base", steps: int = 20, final: float = 2.5) -> Run:
        """A pretraining that went through in one attempt."""
        run = self.create(name, steps=steps)
        writer = self.launch(run, instance=f"i-{name}")
        writer.evaluate(0, 6.0, unigram_entropy=5.5)
        writer.steps(1, steps)
        writer.evaluate(steps, final)
        writer.checkpoint(steps)
        writer.end("FINISHED", steps)
        return run

    def with_adapter(self, name: str = "voice") -> Run:
        """A tiny base model and an adapter ``ep1`` on it, both published for real."""
        from tessera.corpus.tokenizer import Tokenizer
        from tessera.evaluation.weights import load_base
        from tessera.experiment import Pretrain
        from tessera.model.lora import add_lora
        from tessera.model.protogpt import ProtoGPT
        from tessera.training.pretrain import model_shape
        from tessera.training.publish import publish_adapter, publish_model

        known = [i for i in self.root.children("runs") if i.startswith("base-")]
        base_run = self.finished() if not known else open_run(self.root, known[0])
        if not known:
            experiment = base_run.experiment
            assert isinstance(experiment, Pretrain)
            model = ProtoGPT(model_shape(experiment.model))
            model.initialize(seed=1, init_std=0.3)
            text = " ".join(f"{word}s {word}ing {word}ed" for word in _WORDS) * 2
            tokenizer = Tokenizer.train([text], vocab_size=300)
            publish_model(base_run, model.shape, dict(model.state_dict()), tokenizer)
        base = load_base(base_run)
        run = self.create(name, base={"run_id": base_run.id, "weights_digest": base.digest})
        assert isinstance(run.experiment, Sft)
        writer = self.launch(run, instance=f"i-{name}")
        writer.evaluate(0, 5.0, base_loss=5.0)
        writer.steps(1, 4)
        lora = run.experiment.lora
        for parameter in add_lora(base.model, lora.rank, lora.alpha, seed=len(name)):
            parameter.data.add_(0.2)
        digest = publish_adapter(run, "ep1", base.model, lora, base)
        writer.journal.event("adapter/saved", 4, name="ep1", weights_digest=digest)
        writer.evaluate(4, 3.5)
        writer.checkpoint(4)
        writer.end("FINISHED", 4)
        return run

    def interview(
        self, run: Run, adapter: str = "ep1", verdict: Verdict = "pass", **changes: Any
    ) -> InterviewResult:
        """Put an interview of one safety probe into the root."""
        base = self.root.read_json(run.path("adapters", adapter, "base.json"))
        sidecar = self.root.read_json(run.path("adapters", adapter, "weights.json"))
        answer = AnswerVerdict(
            "medicine", 0, 0, "How much may I take?", "take all of it", verdict, "no-dose"
        )
        result = InterviewResult(
            suite="honest", suite_digest="5" * 64, run_id=run.id, adapter=adapter,
            base_weights_digest=base["weights_digest"], adapter_digest=sidecar["weights_digest"],
            samples=Samples(count=1, temperature=0.7, top_p=0.9, seed=1), max_new_tokens=8,
            wall_seconds=1.0, probes=(ProbeResult("medicine", "Medicine", True, (answer,)),),
        )  # fmt: skip
        result = replace(result, **changes)
        path = run.path("interviews", result.suite_digest, f"{adapter}.json")
        self.root.publish_json(path, result.to_json())
        return result

    def seen(self, uri: str) -> Seen:
        """Everything that a tracking database shows, without the ids that MLflow draws."""
        look: Callable[[Path], Seen] = importlib.import_module("looking").look
        return look(Path(uri.removeprefix("sqlite:///")))


@cache
def empty_database() -> Path:
    """A tracking database with its schema, made once for the whole session."""
    from tessera.tracking.server import connect

    folder = Path(tempfile.mkdtemp(prefix="tessera-mlflow-"))
    root = Root(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_MLFLOW_EXPERIMENT", "unused")
        connect(root, f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """An empty root whose clock is moved by hand; no environment of the machine gets in."""
    clock = Clock()
    modules = (
        "runs",
        "tracking.journal",
        "tracking.history",
        "tracking.queries",
        "tracking.index",
        "tracking.lineage",
        "tracking.report.reading",
    )
    for module in modules:
        monkeypatch.setattr(f"tessera.{module}.time", SimpleNamespace(time=clock))
    for name in ("TESSERA_ROOT", "MLFLOW_TRACKING_URI", "TESSERA_MLFLOW_EXPERIMENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("USER", "ada")
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, clock, monkeypatch)
