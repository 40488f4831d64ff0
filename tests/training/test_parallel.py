"""Two workers train as one: same gradients, same losses, same checkpoints, same errors.

The workers are real processes that talk through gloo; each test's part in them is a function of
this module whose name begins with ``worker_``.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from tessera.errors import ConflictError, InputError
from tessera.model.lora import add_lora
from tessera.model.loss import IGNORE, summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape
from tessera.training.parallel import PeerLostError, World, join, leave
from tessera.training.replica import Replica, Tuning, choose_strategy, local_tensor

SHAPE = ModelShape(layers=2, d_model=33 * 2, heads=2, context=32, vocab_size=301)  # divides by no 4
STEPS, MICRO, ROWS, CLIP = 6, 4, 2, 0.5
STRATEGIES = ["ddp", "fsdp"]
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
# Two workers add the same numbers in another order. Measured over these six float32 steps, torch
# 2.13 on x86-64: losses differ by at most 1.7e-7 relative, norms by 1.2e-7, weights by 2.8e-6.
TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 3e-5


Job = tuple[str, tuple[Any, ...]]
"""``worker_<name>`` and its further arguments."""

TUNINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "ddp, small buckets": ("ddp", {"bucket_mb": 0.01, "bucket_view": False}),
    "ddp, compiled": ("ddp", {"compile": "aot_eager"}),
    "fsdp": ("fsdp", {}),
    "fsdp, kept whole and compiled": ("fsdp", {"reshard": False, "compile": "aot_eager"}),
}


def start_workers(
    size: int, folder: Path, jobs: dict[str, Job], codes: list[int] | None = None
) -> dict[str, list[Any]]:
    """Run ``jobs`` one after the other in ``size`` processes; what each returned, by rank."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    processes = []
    for rank in range(size):
        torchrun = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TESSERA_WORKERS_TIMEOUT_S": "200",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command = [sys.executable, __file__, str(folder)]
        processes.append(subprocess.Popen(command, env=os.environ | torchrun))
    try:
        assert [process.wait(280) for process in processes] == (codes or [0] * size)
    finally:
        for process in processes:
            process.kill()
    return {
        key: [
            torch.load(file, weights_only=False)
            for rank in range(size)
            if (file := folder / f"{key}.{rank}").exists()
        ]
        for key in jobs
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two workers leave what four, and one, find."""
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def pair(shared: Path) -> dict[str, list[Any]]:
    """Everything that two workers do, done once: starting them takes longer than all of it."""
    jobs: dict[str, Job] = {"talk": ("talk", ())}
    for name, (strategy, tuning) in TUNINGS.items():
        jobs[f"training {name}"] = ("training", (strategy, tuning))
    for strategy in STRATEGIES:
        for name in ("skipping", "adapter", "uneven", "save"):
            jobs[f"{name} {strategy}"] = (name, (strategy,))
    return start_workers(2, shared, jobs)


def make_model() -> ProtoGPT:
    model = ProtoGPT(SHAPE)
    model.initialize(7)
    return model


def make_data(step: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a step for all workers; some targets do not count."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for number in range(MICRO):
        tokens = torch.randint(SHAPE.vocab_size, (ROWS, 25), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, : 3 * number] = IGNORE
        batches.append((tokens[:, :-1], targets))
    return batches


def make_optimizer(replica: Replica) -> torch.optim.Optimizer:
    return torch.optim.AdamW(replica.trainable.values(), lr=1e-2, fused=True)


def make_replica(world: World, strategy: str, **tuning: Any) -> Replica:
    return Replica.build(
        make_model(), strategy, world, torch.float32, summed_cross_entropy, Tuning(**tuning)
    )


def train_step(replica: Replica, step: int) -> tuple[Tensor, Tensor]:
    """Gradients of one step, clipped; the loss of all workers and the norm before clipping."""
    world, data = replica.world, make_data(step)
    divisor = sum(int((targets != IGNORE).sum()) for _, targets in data)
    mine = data[world.rank :: world.size]
    loss = torch.zeros(())
    for number, (inputs, targets) in enumerate(mine):
        loss += replica.micro_step(inputs, targets, divisor, number == len(mine) - 1)
    return world.sum(loss), replica.clip(CLIP)


def train_plainly() -> dict[str, Any]:
    """What one process computes without any of this."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        data = make_data(step)
        divisor = sum(int((targets != IGNORE).sum()) for _, targets in data)
        total = torch.zeros(())
        for inputs, targets in data:
            states = model.hidden(inputs, torch.float32)
            loss = summed_cross_entropy(states, model.tokens.weight, targets) / divisor
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        if step == 0:
            gradients = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "gradients": gradients,
        "state": {n: p.detach() for n, p in model.named_parameters()},
        "evaluation": evaluate(model),
    }


@torch.no_grad()
def evaluate(model: ProtoGPT) -> float:
    return sum(
        float(summed_cross_entropy(model.hidden(inputs), model.tokens.weight, targets))
        for inputs, targets in make_data(99)
    )


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return train_plainly()


def worker_training(world: World, folder: Path, strategy: str, tuning: dict[str, Any]) -> Any:
    backend = tuning.pop("compile", None)
    model = make_model()
    for block in model.blocks if backend else ():
        block.compile(backend=backend)
    replica = Replica.build(
        model, strategy, world, torch.float32, summed_cross_entropy, Tuning(**tuning)
    )
    optimizer = make_optimizer(replica)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        loss, norm = train_step(replica, step)
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in replica.trainable.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        norms.append(norm)
        with replica.evaluating() as evaluated:
            evaluation = evaluate(evaluated)  # between the steps, to be in their way
    assert replica.finite()
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "gradients": gradients,
        "state": replica.full_state(),
        "evaluation": evaluation,
        "sharded": sum(isinstance(p, DTensor) for p in replica.trainable.values()),
    }


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


# -- numbers ---------------------------------------------------------------------------------------


def test_alone_it_is_the_plain_path_to_the_last_bit(plain: dict[str, Any], tmp_path: Path) -> None:
    result = worker_training(ALONE, tmp_path, "fsdp", {})
    for key in ("losses", "norms"):
        assert torch.equal(result[key], plain[key])
    for key in ("state", "gradients"):
        assert result[key].keys() == plain[key].keys()
        assert all(torch.equal(result[key][name], plain[key][name]) for name in plain[key])
    assert result["evaluation"] == plain["evaluation"]
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", TUNINGS)
def test_two_workers_train_as_one(
    plain: dict[str, Any], pair: dict[str, list[Any]], name: str
) -> None:
    first, second = pair[f"training {name}"]
    strategy = TUNINGS[name][0]
    for key in ("losses", "norms"):
        assert torch.equal(first[key], second[key]), "the workers disagree"
        torch.testing.assert_close(first[key], plain[key], rtol=TOLERANCE, atol=0)
    assert not torch.equal(first["state"]["norm.weight"], make_model().norm.weight)
    for name, gradient in plain["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-4, atol=1e-8)
    assert first["state"].keys() == plain["state"].keys()
    for name, weight in plain["state"].items():
        torch.testing.assert_close(first["state"][name], weight, rtol=0, atol=WEIGHT_TOLERANCE)
        assert first["state"][name].dtype == torch.float32
    assert second["state"] == {}
    assert first["evaluation"] == pytest.approx(plain["evaluation"], rel=TOLERANCE)
    assert first["sharded"] == (len(plain["state"]) if strategy == "fsdp" else 0)


def worker_skipping(world: World, folder: Path, strategy: str) -> Any:
    """Steps that ``found_inf`` forbids leave no trace, not even in the count of steps."""
    replica = make_replica(world, strategy)
    optimizer = make_optimizer(replica)
    traces = []
    for step, bad in enumerate([0.0, 1.0, 0.0]):
        train_step(replica, step)
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        tensors = {n: local_tensor(p.detach()).clone() for n, p in replica.trainable.items()}
        for name, parameter in replica.trainable.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = local_tensor(value).clone()
        traces.append(tensors)
    return traces


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_can_be_skipped_on_the_device(pair: dict[str, list[Any]], strategy: str) -> None:
    for before, skipped, after in pair[f"skipping {strategy}"]:
        assert all(torch.equal(before[name], skipped[name]) for name in before)
        assert not torch.equal(after["norm.weight"], before["norm.weight"])
        assert after["norm.weight.step"] == 2


def worker_adapter(world: World, folder: Path, strategy: str) -> Any:
    model = make_model()
    add_lora(model, 4, 8.0, seed=3)
    replica = Replica.build(model, strategy, world, torch.float32, summed_cross_entropy)
    optimizer = make_optimizer(replica)
    losses = []
    for step in range(3):
        losses.append(train_step(replica, step)[0])
        optimizer.step()
        optimizer.zero_grad()
    return losses, replica.full_state(), list(replica.trainable)


def test_an_adapter_trains_and_its_base_stays(pair: dict[str, list[Any]], shared: Path) -> None:
    alone = worker_adapter(ALONE, shared, "ddp")
    base = make_model()
    for strategy in STRATEGIES:
        losses, state, names = pair[f"adapter {strategy}"][0]
        assert names == alone[2]
        assert all(".lora_" in name for name in names)
        torch.testing.assert_close(losses, alone[0], rtol=TOLERANCE, atol=0)
        assert torch.equal(state["tokens.weight"], base.tokens.weight)


def worker_uneven(world: World, folder: Path, strategy: str) -> Any:
    """A step of three micro-batches: the second worker fills up with one that does not count."""
    replica = make_replica(world, strategy)
    data = make_data(0)[:3]
    divisor = sum(int((targets != IGNORE).sum()) for _, targets in data)
    empty = torch.full_like(data[0][1], IGNORE)
    mine = data[:2] if world.rank == 0 else [data[2], (data[2][0], empty)]
    loss = torch.zeros(())
    for number, (inputs, targets) in enumerate(mine):
        loss += replica.micro_step(inputs, targets, torch.tensor(divisor), number == 1)
    return world.sum(loss), replica.clip(1e9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_worker_with_less_to_do_fills_up(pair: dict[str, list[Any]], strategy: str) -> None:
    replica = make_replica(ALONE, strategy)
    data = make_data(0)[:3]
    divisor = sum(int((targets != IGNORE).sum()) for _, targets in data)
    loss = sum(replica.micro_step(*batch, divisor, True) for batch in data)
    norm = replica.clip(1e9)
    for result in pair[f"uneven {strategy}"]:
        torch.testing.assert_close(result, (loss, norm), rtol=TOLERANCE, atol=0)


# -- checkpoints -----------------------------------------------------------------------------------


def state_of(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in replica.trainable.items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def worker_save(world: World, folder: Path, strategy: str) -> Any:
    replica = make_replica(world, strategy)
    optimizer = make_optimizer(replica)
    for step in range(2):
        train_step(replica, step)
        optimizer.step()
        optimizer.zero_grad()
    tensors = state_of(replica, optimizer)
    dcp_save(tensors, checkpoint_id=folder / f"saved-{strategy}", process_group=world.background)
    return {name: whole(tensor) for name, tensor in tensors.items()}


def worker_load(world: World, folder: Path, strategy: str) -> Any:
    replica = make_replica(world, strategy)
    optimizer = make_optimizer(replica)
    train_step(replica, 50)  # other values everywhere
    optimizer.step()
    optimizer.zero_grad()
    with replica.evaluating() as model:
        evaluate(model)  # what FSDP put together for this must not outlive the load
    tensors = state_of(replica, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process"
        dcp_load(tensors, checkpoint_id=folder / f"saved-{strategy}", no_dist=world.size == 1)
    loaded = {name: whole(tensor) for name, tensor in tensors.items()}
    return loaded, train_step(replica, 2)[0]


def test_a_checkpoint_of_two_loads_on_one_and_on_four(
    pair: dict[str, list[Any]], shared: Path
) -> None:
    four = start_workers(4, shared, {f"load {s}": ("load", (s,)) for s in STRATEGIES})
    for strategy in STRATEGIES:
        saved = pair[f"save {strategy}"][0]
        one = worker_load(ALONE, shared, strategy)
        for loaded, loss in [one, *four[f"load {strategy}"]]:
            assert loaded.keys() == saved.keys()
            assert all(torch.equal(loaded[name], saved[name]) for name in saved)
            torch.testing.assert_close(loss, one[1], rtol=TOLERANCE, atol=0)


# -- the world -------------------------------------------------------------------------------------


def worker_talk(world: World, folder: Path) -> Any:
    assert world.broadcast({"run": 1} if world.is_main else None) == {"run": 1}
    assert world.gather(world.rank) == world.gather(world.rank, background=True) == [0, 1]
    assert world.any(world.rank == 1)
    assert not world.any(False)
    assert world.sum(torch.tensor([1.5, float(world.rank)])).tolist() == [3.0, 1.0]
    assert world.run_on_main(lambda: os.environ["RANK"]) == "0"
    said = []
    for error in (ConflictError("The run exists; use --new."), KeyError("bug")):

        def fail(error: Exception = error) -> None:
            raise error

        try:
            world.run_on_main(fail)
        except Exception as caught:
            said.append((type(caught), str(caught)))
    try:
        world.run_on_main(lambda: lambda: None)  # cannot travel
    except Exception as caught:
        said.append((type(caught), ""))
    world.barrier()
    return said


def test_what_rank_0_says_reaches_all(pair: dict[str, list[Any]]) -> None:
    first, second = pair["talk"]
    assert first[0] == second[0] == (ConflictError, "The run exists; use --new.")
    assert first[1] == (KeyError, "'bug'")
    assert second[1] == (RuntimeError, "rank 0 failed with KeyError: 'bug'")
    assert len(first) == len(second) == 3
    assert second[2][0] is RuntimeError


def worker_losing(world: World, folder: Path) -> Any:
    """The other worker dies; this one notices at its next question."""
    if world.rank == 1:
        os._exit(9)
    began = time.monotonic()
    try:
        for _ in range(3):
            world.any(False)
    except PeerLostError as error:
        torch.save((str(error), time.monotonic() - began), folder / "losing.0")
        os._exit(error.exit_code)


def test_a_peer_that_is_gone_is_told_from_a_bug(tmp_path: Path) -> None:
    results = start_workers(2, tmp_path, {"losing": ("losing", ())}, codes=[76, 9])
    sentence, waited_s = results["losing"][0]
    assert "went away" in sentence
    assert "\n" not in sentence
    assert waited_s < 150, "it waited for the time-out"


def test_without_torchrun_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = join("cpu")
    assert world == ALONE
    assert world.run_on_main(lambda: 5) == world.broadcast(5) == 5
    assert world.gather("a", background=True) == ["a"]
    tensor = torch.ones(2)
    assert world.sum(tensor) is tensor
    assert not world.any(False)
    world.barrier()
    leave(world)
    assert not dist.is_initialized()
    assert choose_strategy("fsdp", make_model(), world) == "single"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"LOCAL_RANK": ""}, "WORLD_SIZE is set but LOCAL_RANK is not"),
        ({"RANK": "two"}, "RANK is 'two', expected a whole number"),
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"TESSERA_WORKERS_TIMEOUT_S": "soon"}, "TESSERA_WORKERS_TIMEOUT_S is 'soon'"),
    ],
)
def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    whole = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    for name, value in (whole | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        join("cpu")


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    here = join("cpu")
    for key, (name, arguments) in pickle.loads((place / "jobs").read_bytes()).items():
        result = globals()[f"worker_{name}"](here, place, *arguments)
        torch.save(result, place / f"{key}.{here.rank}")
    leave(here)
