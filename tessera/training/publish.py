"""What a run leaves for others: ``model/`` and ``adapters/<name>/``, each with its weights digest.

The sidecar ``weights.json`` is written last and readers check the tensors against it, so half a
publication is never taken for a model. Two attempts may publish a model at once, and on a GPU
theirs differ in the last bits. So the tensors' file is named by their digest, each attempt has a
sidecar of its own, and the one of the attempt that finished the run decides (``published_model``);
``model/weights.json`` is the same for whoever looks before that.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tessera.corpus.tokenizer import Tokenizer
from tessera.evaluation.weights import SIDECAR, Base, shape_to_json
from tessera.experiment import Lora
from tessera.model.digest import weights_digest
from tessera.model.lora import lora_state, peft_config
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape
from tessera.runs import Attempt, Run
from tessera.training.checkpoint.publish import guard_publication


def publish_model(
    run: Run,
    shape: ModelShape,
    state: dict[str, Tensor],
    tokenizer: Tokenizer,
    attempt: Attempt | None = None,
) -> str:
    """Write ``model/``: weights (float32, CPU), sizes, tokenizer, digest; returns the digest.

    Raises ``SupersededError`` if another attempt took over before the sidecar was written.
    """
    digest = weights_digest(state)
    file = f"model-{digest[:16]}.safetensors"
    _put_tensors(run, f"model/{file}", state)
    run.root.publish_json(run.path("model/config.json"), shape_to_json(shape))
    run.root.publish(run.path("model/tokenizer.json"), tokenizer.to_bytes())
    sidecar = {"weights_digest": digest, "file": file}
    if attempt is not None:
        guard_publication(run, attempt)
        run.root.publish_json(run.path("model", f"{attempt.id}.json"), sidecar)
    run.root.publish_json(run.path("model", SIDECAR), sidecar)
    return digest


def publish_adapter(run: Run, name: str, model: ProtoGPT, lora: Lora, base: Base) -> str:
    """Write ``adapters/<name>/`` in PEFT's format beside the base's digest; returns its own."""
    folder = f"adapters/{name}"
    state = lora_state(model)
    digest = weights_digest(state)
    _put_tensors(run, f"{folder}/adapter_model.safetensors", state)
    config = peft_config(lora.rank, lora.alpha, lora.targets, base.run_id)
    run.root.publish_json(run.path(folder, "adapter_config.json"), config)
    run.root.publish_json(
        run.path(folder, "base.json"), {"run_id": base.run_id, "weights_digest": base.digest}
    )
    run.root.publish_json(run.path(folder, SIDECAR), {"weights_digest": digest})
    return digest


def _put_tensors(run: Run, path: str, state: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensors.safetensors"
        save_file(state, file, metadata={"format": "pt"})
        run.root.put_file(file, run.path(path))
