"""From an experiment to a run and its program: everything that can be refused, refused here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tessera.corpus.chat import conversations_digest
from tessera.corpus.manifest import resolve
from tessera.errors import InputError
from tessera.evaluation.weights import load_base
from tessera.experiment import Experiment, Pretrain, Sft
from tessera.runs import Run, RunRecord, create_or_open, find_run
from tessera.source import code_commit
from tessera.storage import Root, canonical_json, sha256_bytes
from tessera.training.fused import attention_backend, wants_fused
from tessera.training.parallel import World
from tessera.training.pretrain import PretrainProgram, first_plan
from tessera.training.program import Program, compiles
from tessera.training.replica import FSDP, choose_strategy
from tessera.training.sft import SftProgram


@dataclass(frozen=True)
class Prepared:
    """What an attempt needs; ``created`` says whether the run is new."""

    experiment: Experiment
    run: Run
    created: bool
    program: Program


def prepare(
    experiment: Experiment, root: Root, world: World, run_id: str | None, new: bool
) -> Prepared:
    """The run and its program; raises before anything is recorded if they do not fit."""
    if experiment.deterministic:
        be_deterministic()
    dtype = compute_dtype(experiment.precision, world.device)
    # The run's identity holds what `auto` came to: half a run in bf16 and half in float32 is none.
    resolved = "bf16" if dtype == torch.bfloat16 else "float32"
    if experiment.precision == "fp8":
        resolved = "fp8"
    experiment = experiment.model_copy(update={"precision": resolved})
    if fused := wants_fused(experiment, world):
        assert isinstance(experiment, Pretrain)
        attention_backend(experiment, world.device, dtype)
    built = world.together(partial(_build, experiment, root, world, dtype))
    strategy = choose_strategy(experiment.parallel, built.program.model, world)
    if experiment.batch.micro_batch == "auto" and strategy == FSDP:
        raise InputError(
            f"{experiment.origin('batch.micro_batch')}: batch.micro_batch is auto, which parallel: "
            "fsdp cannot search for; give a number (`tessera describe` estimates the memory)."
        )

    def record() -> tuple[RunRecord, bool]:
        run, created = create_or_open(
            root,
            experiment,
            fingerprint=built.fingerprint,
            data=built.data,
            base=built.base,
            run_id=run_id,
            new=new,
            commit=code_commit(),
        )
        return run.record, created

    run_record, created = world.run_on_main(record)
    program = built.program
    experiment = program.experiment = _with_the_runs_budget(experiment, run_record)
    if isinstance(experiment, Pretrain):
        program.plan = first_plan(experiment)
    program.fused = fused
    if compiles(program):
        for block in program.model.blocks:
            block.compile()
    program.model.train()
    return Prepared(experiment, Run(root, run_record), created, program)


def _with_the_runs_budget(experiment: Experiment, record: RunRecord) -> Experiment:
    """``experiment`` with the budget that its run was started with, where it names none itself."""
    if not isinstance(experiment, Pretrain) or experiment.budget_usd is not None:
        return experiment
    kept = (
        ("budget_usd", "budget_reserve_usd")
        if experiment.budget_reserve_usd is None
        else ("budget_usd",)
    )
    return experiment.model_copy(update={key: record.experiment.get(key) for key in kept})


@dataclass(frozen=True)
class _Built:
    """A program and what its run records of the data; ``base`` of a fine-tuning alone."""

    program: Program
    fingerprint: str
    data: dict[str, Any]
    base: dict[str, str] | None = None


def _build(experiment: Experiment, root: Root, world: World, dtype: torch.dtype) -> _Built:
    if isinstance(experiment, Pretrain):
        manifest = resolve(root, experiment.data.corpus, experiment.data.fingerprint)
        pretrain = PretrainProgram(experiment, root, manifest, world, dtype)
        return _Built(pretrain, manifest.fingerprint, {"manifest": manifest.path})
    base = load_base(find_run(root, experiment.base, kind="pretrain"), torch.device("cpu"))
    fingerprint = _sft_fingerprint(experiment, base.tokenizer.sha256)
    sft = SftProgram(experiment, base, fingerprint, world, dtype)
    files = list(experiment.data.conversations)
    data = {"conversations": files, "steps": sft.steps, "truncated": sft.truncated}
    return _Built(sft, fingerprint, data, {"run_id": base.run_id, "weights_digest": base.digest})


def _sft_fingerprint(experiment: Sft, tokenizer_sha256: str) -> str:
    files = [Path(name) for name in experiment.data.conversations]
    material = {"tokenizer": tokenizer_sha256, "conversations": conversations_digest(files)}
    return sha256_bytes(canonical_json(material))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: ``auto`` is bf16 on a GPU that has it, else float32.

    With fp8 it is what is not cast to float8, and what evaluations compute in.
    """
    if precision in ("auto", "fp8"):
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(
            f"precision is bf16, but {torch.cuda.get_device_name(device)} has no bf16; use float32 "
            "or another GPU."
        )
    return torch.bfloat16 if precision == "bf16" else torch.float32


def be_deterministic() -> None:
    """Only algorithms that give the same bits every time, where a GPU has a faster one too.

    Not ``warn_only``: with it cuDNN's attention keeps adding up in any order, and losses after a
    resume differ in the fifth digit (measured on an H200).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
