"""Pretraining: a base model from random weights over the shards of one corpus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.corpus.manifest import Manifest, require_fit
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.evaluation.fixed import Scorer, evaluate_fixed, fixed_windows
from tessera.experiment import Experiment, LinearDecay, Model, Pretrain
from tessera.ledger.budget import OPEN, Plan
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape, flops_per_token, training_memory
from tessera.runs import Attempt, Run
from tessera.storage import Root
from tessera.training.loader import SampleLoader, ShardStore, evaluation_tokens
from tessera.training.parallel import World
from tessera.training.program import Program, StepBatch
from tessera.training.publish import publish_model


def model_shape(model: Model) -> ModelShape:
    """The experiment's model section as sizes (``init_std`` is not one)."""
    return ModelShape(**model.model_dump(exclude={"init_std"}))


def first_plan(experiment: Pretrain) -> Plan:
    """Before anything is measured: the end by tokens, as far as those are given."""
    if experiment.budget_usd is None:
        return Plan.fixed(experiment.steps or OPEN)
    if experiment.steps is None:
        return Plan()
    assert isinstance(experiment.schedule, LinearDecay)
    warmup, fraction = experiment.schedule.warmup_steps, experiment.schedule.decay_fraction
    return Plan().moved(0, experiment.steps, warmup, fraction)


class PretrainProgram(Program):
    """Next-token prediction over packed documents, evaluated on the frozen split."""

    experiment: Pretrain

    def __init__(
        self,
        experiment: Pretrain,
        root: Root,
        manifest: Manifest,
        world: World,
        compute_dtype: torch.dtype,
    ) -> None:
        """Raises ``InputError`` where the experiment and the corpus do not fit together."""
        require_fit(
            manifest,
            vocab_size=experiment.model.vocab_size,
            sequence=experiment.sequence,
            origin=experiment.origin,
        )
        self.experiment, self.world = experiment, world
        self._sequence = experiment.sequence
        self.plan = first_plan(experiment)
        self.evaluates_every = experiment.evaluation.every_steps
        self.samples_per_step = experiment.batch.tokens_per_step // experiment.sequence
        if self.samples_per_step % world.size:
            raise InputError(
                f"{experiment.origin('batch.tokens_per_step')}: the {self.samples_per_step} "
                f"sequences of a step do not divide among {world.size} GPUs; use a number of GPUs "
                "that divides them, or change batch.tokens_per_step."
            )
        self.micro_batch = first_micro_batch(experiment)
        self.device, self.compute_dtype = world.device, compute_dtype
        self.tokenizer = Tokenizer.from_bytes(root.read_bytes(manifest.tokenizer.path))
        limit = int(experiment.data.cache_gib * 2**30)
        self._store = store = ShardStore(root, manifest, limit_bytes=limit)
        self._loader = SampleLoader(
            store,
            experiment.sequence,
            experiment.seed,
            manifest.fingerprint,
            samples=experiment.steps and experiment.steps * self.samples_per_step,
        )
        try:
            self._fixed = fixed_windows(
                evaluation_tokens(store),
                experiment.sequence,
                experiment.evaluation.tokens,
                self.tokenizer.byte_lengths(),
            )
        except ValueError as error:
            raise InputError(
                f"Corpus {manifest.name} cannot be evaluated on: {error}; raise "
                "holdout.fraction in its recipe or shorten data.sequence."
            ) from error
        shape = model_shape(experiment.model)
        self.flops_per_token = flops_per_token(shape, experiment.sequence)
        self.model = ProtoGPT.unset(shape)
        self.model.initialize(experiment.seed, experiment.model.init_std)
        self.model.recompute = experiment.recompute
        self.model.to(self.device)
        self.trainable = dict(self.model.named_parameters())

    def batch(self, first: int) -> StepBatch:
        """This rank's samples: consecutive numbers of the sample order."""
        own = self.samples_per_rank
        inputs, targets = self._loader.batch(first + self.world.rank * own, own)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        width = self.micro_batch
        micro = list(zip(torch.split(inputs, width), torch.split(targets, width), strict=True))
        tokens = self.experiment.batch.tokens_per_step
        return StepBatch(micro, tokens, tokens)

    def dummy(self, size: int) -> tuple[Tensor, Tensor]:
        """(size, T) of one token; memory does not depend on which."""
        ids = torch.zeros(size, self.experiment.sequence, dtype=torch.int64)
        return ids, ids

    def evaluates_after(self, done: int) -> bool:
        """Every ``evaluation.every_steps``, and after the last step."""
        return done > 0 and (
            done % self.experiment.evaluation.every_steps == 0 or done == self.steps
        )

    def evaluate(self, done: int, score: Scorer) -> dict[str, float]:
        """Nats per token, perplexity and bits per byte on the frozen split."""
        return evaluate_fixed(score, self._fixed, self.micro_batch, self.world)

    def publishes_after(self, done: int) -> bool:
        """The base model is published once, at the end."""
        return done == self.steps

    def publish(
        self, run: Run, attempt: Attempt, done: int, weights: dict[str, Tensor]
    ) -> tuple[str, dict[str, Any]]:
        """``model/`` and its weights digest."""
        digest = publish_model(run, self.model.shape, weights, self.tokenizer, attempt)
        return "model/published", {"weights_digest": digest}

    def estimate_bytes(self, size: int) -> int:
        """See ``training_memory``."""
        low = self.compute_dtype != torch.float32
        return sum(training_memory(self.model.shape, size, low, self._sequence).values())

    def close(self) -> None:
        """Stop fetching shards."""
        self._store.close()


def first_micro_batch(experiment: Experiment) -> int:
    """The size until ``auto`` is resolved."""
    size = experiment.batch.micro_batch
    return 1 if size == "auto" else size
