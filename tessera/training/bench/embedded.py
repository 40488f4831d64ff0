"""Experiments for a machine on which there is nothing yet: no file, no corpus, no root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tessera.errors import InputError
from tessera.experiment import Experiment, Pretrain, load_experiment

REFERENCE = """
name: tessera-1b
kind: pretrain
seed: 20260614
model:
  layers: 32
  d_model: 1536
  heads: 16
  context: 4096
  vocab_size: 65536
  mlp_ratio: 4
  gelu: tanh
data: {corpus: web-books-academic, sequence: 4096}
optimizer: {lr: 2.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, clip_norm: 1.0}
schedule: {name: cosine, warmup_steps: 200, final_lr: 1.0e-5}
batch: {tokens_per_step: 65536, micro_batch: 4}
tokens: 24504827904
precision: bf16
evaluation: {every_steps: 1000, tokens: 1048576}
checkpoint: {every_steps: 2000}
price: {usd_per_hour: 2.16}
"""
"""``experiments/tessera_1b.yaml`` as far as speed and price depend on it."""

TINY = """
name: tiny
kind: pretrain
seed: 20260614
model: {layers: 8, d_model: 64, heads: 2, context: 64, vocab_size: 512}
data: {corpus: none, sequence: 64}
optimizer: {lr: 1.0e-3}
schedule: {name: cosine, warmup_steps: 10, final_lr: 1.0e-4}
batch: {tokens_per_step: 256, micro_batch: 2}
tokens: 256000
evaluation: {every_steps: 100}
checkpoint: {every_steps: 100}
"""
"""Small enough for any CPU: what it shows is that everything runs, not what training costs."""

_EMBEDDED = {"cuda": ("tessera_1b.yaml", REFERENCE), "cpu": ("tiny.yaml", TINY)}


def experiment_to_measure(
    path: str | None, overrides: Sequence[str], device_type: str
) -> tuple[Pretrain, str]:
    """The experiment and where it is from; without ``path`` the embedded one for the device.

    Raises ``InputError`` for what ``load_experiment`` refuses, and for a fine-tuning.
    """
    if path is not None:
        return _pretraining(load_experiment(path, overrides), path), path
    name, text = _EMBEDDED[device_type]
    with TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_text(text, "utf-8")
        experiment = load_experiment(file, overrides)
    return _pretraining(experiment, name), f"embedded {experiment.name}"


def is_reference(experiment: Pretrain) -> bool:
    """Whether its model and its samples have the reference's sizes."""
    embedded, _ = experiment_to_measure(None, (), "cuda")
    return (experiment.model, experiment.sequence) == (embedded.model, embedded.sequence)


def _pretraining(experiment: Experiment, path: str) -> Pretrain:
    if isinstance(experiment, Pretrain):
        return experiment
    raise InputError(
        f"{path} is a fine-tuning, and bench measures pretraining; give an experiment of kind "
        "pretrain, such as experiments/tessera_1b.yaml, or none."
    )
