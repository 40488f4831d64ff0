"""Pretraining: a base model from random weights over the shards of one corpus."""

from __future__ import annotations

from typing import Any

import torch

from tessera.corpus.manifest import Manifest
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.evaluation.fixed import evaluate_fixed, fixed_windows
from tessera.experiment import Model, Pretrain
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape, flops_per_token
from tessera.runs import Run
from tessera.storage import Root
from tessera.training.loader import SampleLoader, ShardStore, evaluation_tokens
from tessera.training.program import Program, StepBatch
from tessera.training.publish import publish_model


def model_shape(model: Model) -> ModelShape:
    """The experiment's model section as sizes (``init_std`` is not one)."""
    return ModelShape(**model.model_dump(exclude={"init_std"}))


class PretrainProgram(Program):
    """Next-token prediction over packed documents, evaluated on the frozen split."""

    experiment: Pretrain

    def __init__(
        self,
        experiment: Pretrain,
        root: Root,
        manifest: Manifest,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        """Raises ``InputError`` where the experiment and the corpus do not fit together."""
        if experiment.model.vocab_size != manifest.tokenizer.vocab_size:
            raise InputError(
                f"{experiment.origin('model.vocab_size')}: model.vocab_size is "
                f"{experiment.model.vocab_size}, the tokenizer of corpus {manifest.name} has "
                f"{manifest.tokenizer.vocab_size} entries; make them equal."
            )
        self.experiment = experiment
        self.steps = experiment.steps
        self.device, self.compute_dtype = device, compute_dtype
        self.tokenizer = Tokenizer.from_bytes(root.read_bytes(manifest.tokenizer.path))
        store = ShardStore(root, manifest)
        self._loader = SampleLoader(
            store, experiment.sequence, experiment.seed, manifest.fingerprint
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
        self.model = ProtoGPT(shape)
        self.model.initialize(experiment.seed, experiment.model.init_std)
        self.model.to(device)
        self.trainable = dict(self.model.named_parameters())

    def batch(self, step: int) -> StepBatch:
        """The samples of ``step``: consecutive numbers of the sample order."""
        size = self.experiment.batch
        samples = size.tokens_per_step // self.experiment.sequence
        inputs, targets = self._loader.batch(step * samples, samples)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        micro = list(
            zip(
                torch.split(inputs, size.micro_batch),
                torch.split(targets, size.micro_batch),
                strict=True,
            )
        )
        return StepBatch(micro, size.tokens_per_step, size.tokens_per_step)

    def evaluates_after(self, done: int) -> bool:
        """Every ``evaluation.every_steps``, and after the last step."""
        return done > 0 and (
            done % self.experiment.evaluation.every_steps == 0 or done == self.steps
        )

    def evaluate(self, done: int) -> dict[str, float]:
        """Nats per token, perplexity and bits per byte on the frozen split."""
        return evaluate_fixed(
            self.model, self._fixed, self.experiment.batch.micro_batch, self.compute_dtype
        )

    def publishes_after(self, done: int) -> bool:
        """The base model is published once, at the end."""
        return done == self.steps

    def publish(self, run: Run, done: int) -> tuple[str, dict[str, Any]]:
        """``model/`` and its weights digest."""
        digest = publish_model(run, self.model, self.tokenizer)
        return "model/published", {"weights_digest": digest}
