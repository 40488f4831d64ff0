"""Fine-tuning: a LoRA adapter on a published base, loss on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.corpus.chat import Conversation, read_conversations, render, split_holdout
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.evaluation.fixed import Scorer, mean_loss
from tessera.evaluation.weights import Base
from tessera.experiment import Sft
from tessera.ledger.budget import Plan
from tessera.model.lora import add_lora
from tessera.model.loss import IGNORE
from tessera.model.shape import flops_per_token, parameters, training_memory
from tessera.runs import Attempt, Run
from tessera.training.order import derive_key, permute
from tessera.training.parallel import World
from tessera.training.program import Program, StepBatch
from tessera.training.publish import publish_adapter

HOLDOUT_SALT = "tessera-sft-holdout-1"


@dataclass(frozen=True)
class Example:
    """One conversation as ids and targets of equal length; what is not learnt is ``IGNORE``."""

    inputs: list[int]
    targets: list[int]

    @property
    def learned(self) -> int:
        """Targets that count."""
        return sum(target != IGNORE for target in self.targets)


def make_example(conversation: Conversation, tokenizer: Tokenizer, context: int) -> Example:
    """Render a conversation; turns at its end that do not fit ``context`` are left out whole.

    Raises ``InputError`` naming the conversation if not even its first exchange fits.
    """
    messages = list(conversation.messages)
    while messages:
        ids, mask = render(messages, tokenizer)
        if len(ids) <= context + 1:
            targets = [t if m else IGNORE for t, m in zip(ids[1:], mask[1:], strict=True)]
            return Example(ids[:-1], targets)
        messages = messages[:-2]
    raise InputError(
        f"The first exchange of conversation {conversation.id!r} needs more than the base's "
        f"context of {context} tokens; shorten it or use a base with a longer context."
    )


def collate(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded (B, T) inputs and targets; causal attention never looks at the padding."""
    length = max(len(example.inputs) for example in examples)
    inputs = torch.full((len(examples), length), pad, dtype=torch.int64)
    targets = torch.full((len(examples), length), IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        inputs[row, : len(example.inputs)] = torch.tensor(example.inputs)
        targets[row, : len(example.targets)] = torch.tensor(example.targets)
    return inputs, targets


class SftProgram(Program):
    """LoRA on all of a base's chosen linears; one adapter is published after every epoch."""

    experiment: Sft

    def __init__(
        self,
        experiment: Sft,
        base: Base,
        fingerprint: str,
        world: World,
        compute_dtype: torch.dtype,
    ) -> None:
        """Raises ``InputError`` for conversations that cannot be used."""
        if experiment.parallel == "fsdp":
            raise InputError(
                f"{experiment.origin('parallel')}: parallel is fsdp, but an adapter's state is "
                "small and every GPU holds the whole base; use ddp or auto."
            )
        self.experiment, self.base, self.world = experiment, base, world
        self.device, self.compute_dtype = world.device, compute_dtype
        self._fingerprint = fingerprint
        self._pad = base.tokenizer.end_of_text_id
        files = [Path(name) for name in experiment.data.conversations]
        conversations = read_conversations(files)
        train, held = split_holdout(conversations, experiment.data.holdout, HOLDOUT_SALT)
        if not train or not held:
            raise InputError(
                f"data.holdout {experiment.data.holdout} leaves {len(train)} conversations to "
                f"learn from and {len(held)} to measure on; both must be at least one."
            )
        context = base.model.shape.context
        self.examples = [make_example(c, base.tokenizer, context) for c in train]
        self.held_out = [make_example(c, base.tokenizer, context) for c in held]
        self.truncated = sum(
            len(render(c.messages, base.tokenizer)[0]) > context + 1 for c in conversations
        )
        self._per_step = self.samples_per_step = experiment.batch.conversations_per_step
        size = experiment.batch.micro_batch
        self.micro_batch = 1 if size == "auto" else size
        self.steps_per_epoch = -(-len(self.examples) // self._per_step)
        self.evaluates_every = self.steps_per_epoch
        self.plan = Plan.fixed(self.steps_per_epoch * experiment.epochs)
        self.model = base.model
        lora = experiment.lora
        add_lora(self.model, lora.rank, lora.alpha, experiment.seed, lora.targets)
        self.model.recompute = experiment.recompute
        self.model.to(self.device)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # Frozen weights need no gradient of their own: forward and the gradient of activations.
        shape = base.model.shape
        lengths = [len(example.inputs) for example in self.examples]
        self.flops_per_token = flops_per_token(shape, sum(lengths) // len(lengths)) - 2 * (
            parameters(shape) - shape.context * shape.d_model
        )

    def batch(self, first: int) -> StepBatch:
        """This rank's conversations of the step; each epoch is a fresh permutation.

        A rank that has none left trains on one that counts nothing.
        """
        epoch, place = divmod(first // self._per_step, self.steps_per_epoch)
        key = derive_key(self.experiment.seed, self._fingerprint, epoch)
        size = len(self.examples)
        begin = place * self._per_step
        chosen = [
            self.examples[permute(i, size, key)]
            for i in range(begin, min(begin + self._per_step, size))
        ]
        ranks, width = self.world.size, self.micro_batch
        blank = Example(chosen[0].inputs, [IGNORE] * len(chosen[0].inputs))
        padded = chosen + [blank] * (-len(chosen) % ranks)
        own = padded[self.world.rank :: ranks]
        return StepBatch(
            [collate(own[i : i + width], self._pad) for i in range(0, len(own), width)],
            tokens=sum(len(example.inputs) for example in chosen),
            targets=sum(example.learned for example in chosen),
        )

    def dummy(self, size: int) -> tuple[Tensor, Tensor]:
        """``size`` copies of the longest conversation."""
        longest = max(self.examples, key=lambda example: len(example.inputs))
        return collate([longest] * size, self._pad)

    def estimate_bytes(self, size: int) -> int:
        """See ``training_memory``; an upper bound, since only the adapter has gradients."""
        low = self.compute_dtype != torch.float32
        longest = max(len(example.inputs) for example in self.examples)
        return sum(training_memory(self.model.shape, size, low, longest).values())

    def close(self) -> None:
        """Nothing is open."""

    def evaluates_after(self, done: int) -> bool:
        """Before the first step (a fresh adapter is the base itself) and after every epoch."""
        return done % self.steps_per_epoch == 0

    def evaluate(self, done: int, score: Scorer) -> dict[str, float]:
        """Nats per assistant token on the held-out conversations."""
        width = self.micro_batch
        batches = [
            collate(self.held_out[i : i + width], self._pad)
            for i in range(0, len(self.held_out), width)
        ]
        loss, _ = mean_loss(score, batches, self.world)
        return {"eval/loss": loss} | ({"eval/base_loss": loss} if done == 0 else {})

    def publishes_after(self, done: int) -> bool:
        """An adapter is published after every epoch."""
        return done > 0 and done % self.steps_per_epoch == 0

    def publish(
        self, run: Run, attempt: Attempt, done: int, weights: dict[str, Tensor]
    ) -> tuple[str, dict[str, Any]]:
        """``adapters/ep1``, ``ep2``, ..."""
        name = f"ep{done // self.steps_per_epoch}"
        digest = publish_adapter(run, name, self.model, self.experiment.lora, self.base)
        return "adapter/saved", {"name": name, "weights_digest": digest}
