"""Open what a run published: base model, tokenizer, adapters, each checked against its digest."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from tessera.corpus.chat import Message, render
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import DamagedError, InputError
from tessera.model.device import best_device
from tessera.model.digest import weights_digest
from tessera.model.generate import generate
from tessera.model.lora import add_lora, load_lora_state
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import LINEARS, ModelShape, parameters
from tessera.runs import Run, read_text, scan_runs, what_is_wrong
from tessera.storage import Root, cache_folder

SIDECAR = "weights.json"
"""The weights digest of the tensors beside it."""


@dataclass(frozen=True)
class Base:
    """A base model in memory, float32, with its tokenizer and the digest that was checked."""

    run_id: str
    model: ProtoGPT
    tokenizer: Tokenizer
    digest: str


@dataclass(frozen=True)
class Voice:
    """A base with an adapter on it, ready to answer."""

    base: Base
    adapter_digest: str
    compute_dtype: torch.dtype

    def answer(
        self,
        prompt: str | Sequence[Message],
        *,
        seed: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        top_p: float = 0.9,
    ) -> str:
        """One answer; ``seed`` None is greedy. A prompt that is too long is an ``InputError``."""
        return self.answers(
            prompt,
            seeds=[seed],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )[0]

    def answers(
        self,
        prompt: str | Sequence[Message],
        *,
        seeds: Sequence[int | None],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[str]:
        """One answer a seed (None: greedy), in one batch."""
        tokenizer = self.base.tokenizer
        messages: Sequence[Message]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids, _ = render(messages, tokenizer, add_generation_prompt=True)
        try:
            answers = generate(
                self.base.model,
                ids,
                seeds=seeds,
                max_new_tokens=max_new_tokens,
                stop=tokenizer.end_of_turn_id,
                temperature=temperature,
                top_p=top_p,
                # An answer is text: of the special tokens only the end of the turn may come.
                forbidden=[i for i in tokenizer.special_ids() if i != tokenizer.end_of_turn_id],
                compute_dtype=self.compute_dtype,
            )
        except ValueError as error:
            raise InputError(f"This prompt cannot be answered: {error}") from error
        return [tokenizer.decode(answer) for answer in answers]


def shape_to_json(shape: ModelShape) -> dict[str, Any]:
    """``model/config.json``: the model's sizes and what kind of model it is."""
    return {"architecture": "ProtoGPT", **asdict(shape)}


def load_base(run: Run, device: torch.device | None = None) -> Base:
    """The base model that ``run`` published.

    Raises ``InputError`` if it has none yet, ``DamagedError`` if the weights are not the ones whose
    digest stands beside them.
    """
    root = run.root
    sidecar = published_model(run)
    if sidecar is None:
        raise InputError(
            f"Run {run.id} has not published a model yet; finish it with `tessera train` first."
        )
    shape = _shape(root, run.path("model", "config.json"))
    digest = read_text(root, sidecar, "weights_digest")
    file = read_text(root, sidecar, "file")
    tokenizer = Tokenizer.from_bytes(root.read_bytes(run.path("model", "tokenizer.json")))
    state = _tensors(root, run.path("model", file), digest)
    model = _model(shape, state, f"{run.path('model', 'config.json')} in {root.url}")
    return Base(run.id, model.to(device or best_device()).eval(), tokenizer, digest)


def published_model(run: Run) -> str | None:
    """Path of the sidecar that says which model the run published; None if there is none yet.

    That of the attempt that finished the run, so that another one, overtaken while it published,
    cannot change what the run is.
    """
    done = run.finished_by()
    own = run.path("model", f"{done}.json")
    if done is not None and run.root.exists(own):
        return own
    path = run.path("model", SIDECAR)
    return path if run.root.exists(path) else None


def find_base(root: Root, digest: str) -> Run:
    """The run of the root whose published model has this weights digest."""
    runs, damaged = scan_runs(root)
    errors = list(damaged.values())
    for run in runs:
        try:
            path = published_model(run)
            if path is not None and read_text(root, path, "weights_digest") == digest:
                return run
        except DamagedError as error:
            errors.append(error)
    if errors:
        raise errors[0]  # it may be the one that is wanted
    raise InputError(
        f"No base model in {root.url} has the weights digest {digest[:12]} that the adapter was "
        "trained on; give the root that holds it (--root or TESSERA_ROOT)."
    )


def load_voice(root: Root, run: Run, adapter: str, device: torch.device | None = None) -> Voice:
    """Adapter ``adapter`` of an SFT run on its base, digests checked."""
    names = root.children(run.path("adapters"))
    if adapter not in names:
        raise InputError(
            f"Run {run.id} has no adapter {adapter!r}; it has: {', '.join(names) or 'none yet'}."
        )
    with tempfile.TemporaryDirectory() as folder:
        for path in root.files(run.path("adapters", adapter)):
            root.get_file(path, Path(folder) / path.rsplit("/", 1)[-1])
        shown = f"{run.path('adapters', adapter)} in {root.url}"
        return load_voice_from_folder(root, Path(folder), device, shown=shown)


def load_voice_from_folder(
    root: Root, folder: Path, device: torch.device | None = None, *, shown: str | None = None
) -> Voice:
    """An adapter folder on the local disk, on its base, which the root holds under its digest.

    ``shown`` is what sentences call the folder.
    """
    shown = shown or str(folder)
    base_digest = _text(folder / "base.json", "weights_digest", shown)
    adapter_digest = _text(folder / SIDECAR, "weights_digest", shown)
    config = _adapter_config(folder / "adapter_config.json", shown)
    state = _verified(folder / "adapter_model.safetensors", adapter_digest)
    base = load_base(find_base(root, base_digest), device)
    targets = [name for name in LINEARS if name in config.target_modules]
    try:
        add_lora(base.model, config.r, config.lora_alpha, seed=0, targets=targets)
        load_lora_state(base.model, state)
    except ValueError as error:
        raise InputError(f"The adapter in {shown} does not fit its base: {error}.") from error
    base.model.eval()
    on_gpu = base.model.tokens.weight.is_cuda
    return Voice(base, adapter_digest, torch.bfloat16 if on_gpu else torch.float32)


def _shape(root: Root, path: str) -> ModelShape:
    """The sizes in ``model/config.json``; a ``DamagedError`` unless it is what we write."""
    config = root.read_json(path)
    try:
        if not isinstance(config, dict) or config.get("architecture") != "ProtoGPT":
            raise ValueError("expected an object with architecture ProtoGPT")
        sizes = {key: value for key, value in config.items() if key != "architecture"}
        if unknown := sizes.keys() - {field.name for field in fields(ModelShape)}:
            raise ValueError(f"unknown key {min(unknown)}")
        return _SHAPE.validate_python(sizes)
    except ValueError as error:
        reason = what_is_wrong(error) if isinstance(error, ValidationError) else str(error)
    raise DamagedError(
        f"{path} in {root.url} does not describe a model ({reason}); it was damaged or written by "
        "something else: publish it again or restore it from a backup."
    )


def _model(shape: ModelShape, state: dict[str, torch.Tensor], described_by: str) -> ProtoGPT:
    """The model of that shape with these tensors; a ``DamagedError`` where they do not fit."""
    count = sum(tensor.numel() for tensor in state.values())
    try:
        if parameters(shape) != count:  # before anything of a wrong size is allocated
            raise ValueError(f"{parameters(shape):,} parameters, the tensors have {count:,}")
        if shape.heads < 1 or shape.d_model % shape.heads:
            raise ValueError(f"{shape.d_model} channels do not divide into {shape.heads} heads")
        model = ProtoGPT.unset(shape)
        model.load_state_dict(state)
    except (RuntimeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".:;, ")
        raise DamagedError(
            f"{described_by} does not describe the tensors beside it ({reason}); restore it from a "
            "backup or publish the model again."
        ) from error
    return model


_SHAPE = TypeAdapter(ModelShape)


def _tensors(root: Root, path: str, digest: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file of the root; a local root is read in place."""
    local = root.local_path(path)
    if local is None:
        local = cache_folder() / "weights" / f"{digest}.safetensors"
        if local.exists():
            try:
                return _verified(local, digest)
            except DamagedError:
                local.unlink()  # only this machine's copy is damaged so far
        root.get_file(path, local)
    return _verified(local, digest)


def _verified(file: Path, digest: str) -> dict[str, torch.Tensor]:
    """Tensors of a local safetensors file; a ``DamagedError`` unless they have this digest."""
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DamagedError(
            f"{file} cannot be read as tensors ({error}); it is damaged: publish it again or "
            "restore it from a backup."
        ) from error
    if (found := weights_digest(state)) != digest:
        raise DamagedError(
            f"{file} has weights digest {found[:12]}, its {SIDECAR} says {digest[:12]}; it is "
            "damaged: publish it again or restore it from a backup."
        )
    return state


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not readable ({error}); expected an adapter folder."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not readable (no object); expected an adapter folder.")
    return value


def _text(path: Path, key: str, shown: str) -> str:
    found = _json(path).get(key)
    if not isinstance(found, str):
        raise _foreign(path, shown, f"{key}: expected a text")
    return found


@dataclass(frozen=True)
class _AdapterConfig:
    """What we need of PEFT's ``adapter_config.json``, which has many more keys."""

    r: Annotated[int, Field(gt=0)]
    lora_alpha: float
    target_modules: list[str]


_ADAPTER_CONFIG = TypeAdapter(_AdapterConfig)


def _adapter_config(path: Path, shown: str) -> _AdapterConfig:
    try:
        return _ADAPTER_CONFIG.validate_python(_json(path))
    except ValidationError as error:
        raise _foreign(path, shown, what_is_wrong(error)) from error


def _foreign(path: Path, shown: str, reason: str) -> DamagedError:
    return DamagedError(
        f"{path.name} of {shown} is not a record that this version of tessera writes ({reason}); "
        "publish the adapter again or restore it from a backup."
    )
