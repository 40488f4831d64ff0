"""Fine-tuning's data: what counts in the loss, what padding changes, what is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from tessera.corpus.chat import Conversation, Message, render
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.evaluation.fixed import scorer
from tessera.evaluation.weights import Base
from tessera.experiment import Sft, load_experiment
from tessera.model.loss import IGNORE, summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape
from tessera.training.parallel import World
from tessera.training.program import StepBatch
from tessera.training.sft import Example, SftProgram, collate, make_example

TEXTS = [f"the {word} goes with the {word}" for word in ("ferry", "kettle", "lamp", "river")] * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=280)


def talk(*contents: str, name: str = "c-1") -> Conversation:
    messages = [
        Message(role=("user", "assistant")[n % 2], content=content)
        for n, content in enumerate(contents)
    ]
    return Conversation(name, "en", tuple(messages))


def make_model() -> ProtoGPT:
    model = ProtoGPT(ModelShape(2, 24, 3, 64, 280))
    model.initialize(5, init_std=0.3)
    return model


def loss_of(model: ProtoGPT, examples: Sequence[Example], pad: int = 0) -> float:
    inputs, targets = collate(examples, pad)
    with torch.no_grad():
        return float(summed_cross_entropy(model.hidden(inputs), model.tokens.weight, targets))


# -- what counts -----------------------------------------------------------------------------------


def test_the_loss_counts_the_assistants_words_and_their_end(tokenizer: Tokenizer) -> None:
    conversation = talk("the lamp", "the river", "the kettle?", "goes")
    example = make_example(conversation, tokenizer, context=64)
    first, second = tokenizer.encode("the river"), tokenizer.encode("goes")
    end = tokenizer.end_of_turn_id
    assert [t for t in example.targets if t != IGNORE] == [*first, end, *second, end]
    assert example.learned == len(first) + len(second) + 2

    ids, _ = render(conversation.messages, tokenizer)
    assert example.inputs == ids[:-1]
    for place, target in enumerate(example.targets):
        assert target in (IGNORE, ids[place + 1]), "a target is the token that comes next"
    # The first counted target is predicted from the assistant's mark, not from the user's words.
    start = next(place for place, target in enumerate(example.targets) if target != IGNORE)
    assert example.inputs[start] == tokenizer.assistant_id


def test_what_the_user_says_is_no_target(tokenizer: Tokenizer) -> None:
    """Every ignored target may be anything; every counted one may not."""
    model = make_model()
    example = make_example(talk("the lamp", "the river"), tokenizer, context=64)
    logits = model(torch.tensor([example.inputs]))[0].detach().double()
    shares = torch.log_softmax(logits, -1)
    counted = [(n, t) for n, t in enumerate(example.targets) if t != IGNORE]
    by_hand = -sum(float(shares[n, t]) for n, t in counted)
    assert loss_of(model, [example]) == pytest.approx(by_hand, rel=1e-5)
    for place, target in enumerate(example.targets):
        other = list(example.targets)
        if target == IGNORE:
            continue
        other[place] = (target + 1) % 280
        assert loss_of(model, [Example(example.inputs, other)]) != pytest.approx(by_hand, rel=1e-4)


def test_a_users_words_are_not_learnt_by_gradient(tokenizer: Tokenizer) -> None:
    """The head's rows move by what is predicted; of ignored positions nothing is."""
    model = make_model()
    example = make_example(talk("the lamp", "the river"), tokenizer, context=64)
    inputs, targets = collate([example], 0)
    states = model.hidden(inputs).detach().requires_grad_()
    summed_cross_entropy(states, model.tokens.weight, targets).backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    moved = (states.grad[0].abs().amax(-1) > 0).tolist()
    assert moved == [target != IGNORE for target in example.targets]


# -- padding ---------------------------------------------------------------------------------------


def test_padding_changes_nothing(tokenizer: Tokenizer) -> None:
    model = make_model()
    examples = [
        make_example(talk("the lamp", "goes"), tokenizer, 64),
        make_example(talk("the ferry", "the river goes with the kettle"), tokenizer, 64),
        make_example(talk("with", "the", "river", "the lamp goes with"), tokenizer, 64),
    ]
    assert len({len(example.inputs) for example in examples}) == 3
    alone = [loss_of(model, [example]) for example in examples]
    for pad in (0, 99):
        assert loss_of(model, examples, pad) == pytest.approx(sum(alone), rel=1e-6)
    shortest, longest = (f(examples, key=lambda e: len(e.inputs)) for f in (min, max))
    inputs, targets = collate([shortest, longest], 7)
    size = len(shortest.inputs)
    assert inputs[0, :size].tolist() == shortest.inputs
    assert targets[0, :size].tolist() == shortest.targets
    assert (inputs[0, size:] == 7).all()
    assert (targets[0, size:] == IGNORE).all()


# -- too long --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out_by_whole_exchanges(tokenizer: Tokenizer) -> None:
    turns = ("the lamp", "goes", "the river", "the kettle goes", "with", "the ferry")
    sizes = [len(render(talk(*turns[:n]).messages, tokenizer)[0]) for n in (2, 4, 6)]
    for context in range(sizes[0] - 1, sizes[2] + 2):
        kept = sum(size <= context + 1 for size in sizes)
        example = make_example(talk(*turns), tokenizer, context)
        assert example == make_example(talk(*turns[: 2 * kept]), tokenizer, 64)
        assert len(example.inputs) <= context
        assert example.targets[-1] == tokenizer.end_of_turn_id
    exact = make_example(talk(*turns), tokenizer, sizes[2] - 1)
    assert len(exact.inputs) == sizes[2] - 1


def test_a_first_exchange_that_does_not_fit_is_named(tokenizer: Tokenizer) -> None:
    long = talk("the lamp", "goes " * 80, "the", "river", name="warm-17")
    with pytest.raises(InputError) as caught:
        make_example(long, tokenizer, 64)
    assert str(caught.value) == (
        "The first exchange of conversation 'warm-17' needs more than the base's context of 64 "
        "tokens; shorten it or use a base with a longer context."
    )


# -- the program -----------------------------------------------------------------------------------


def make_program(
    folder: Path, tokenizer: Tokenizer, *, count: int = 43, micro: int = 3, seed: int = 7
) -> SftProgram:
    rows = [
        {
            "id": str(n),
            "language": "en",
            "messages": [
                {"role": "user", "content": f"lamp {n}"},
                {"role": "assistant", "content": "goes " * (1 + n % 4) + str(n)},
            ],
        }
        for n in range(count)
    ]
    (folder / "talk.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    data = {
        "name": "voice",
        "kind": "sft",
        "seed": seed,
        "base": "tiny",
        "data": {"conversations": ["talk.jsonl"], "holdout": 0.2},
        "lora": {"rank": 2, "alpha": 4},
        "optimizer": {"lr": 1e-2},
        "schedule": {"name": "cosine", "warmup_steps": 1, "final_lr": 0.0},
        "batch": {"conversations_per_step": 6, "micro_batch": micro},
        "epochs": 3,
        "checkpoint": {"every_steps": 2},
    }
    (folder / "voice.yaml").write_text(yaml.safe_dump(data), "utf-8")
    experiment = load_experiment(folder / "voice.yaml")
    assert isinstance(experiment, Sft)
    base = Base("tiny-1", make_model(), tokenizer, "d" * 64)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    return SftProgram(experiment, base, "f" * 64, world, torch.float32)


def batch_of(program: SftProgram, step: int) -> StepBatch:
    """The data of an optimiser step (0-based) of a run that leaves nothing out."""
    return program.batch(step * program.samples_per_step)


def evaluate(program: SftProgram, done: int) -> dict[str, float]:
    return program.evaluate(done, scorer(program.model, torch.float32))


def seen(program: SftProgram, epoch: int) -> list[tuple[int, ...]]:
    """Every conversation of an epoch, in order, its padding taken off."""
    rows = []
    for step in range(epoch * program.steps_per_epoch, (epoch + 1) * program.steps_per_epoch):
        for inputs, _ in batch_of(program, step).micro:
            for row in inputs.tolist():
                while row[-1] == program.base.tokenizer.end_of_text_id:
                    row.pop()
                rows.append(tuple(row))
    return rows


def test_each_epoch_is_a_permutation_and_another_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    program = make_program(tmp_path, tokenizer)
    everything = sorted(tuple(example.inputs) for example in program.examples)
    assert len(everything) + len(program.held_out) == 43
    assert program.steps_per_epoch == -(-len(everything) // 6)
    assert program.steps == 3 * program.steps_per_epoch
    epochs = [seen(program, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == everything
    other = seen(make_program(tmp_path, tokenizer, seed=8), 0)
    assert sorted(other) == everything
    assert len({tuple(epoch) for epoch in [*epochs, other]}) == 4


def test_what_is_held_out_is_never_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    program = make_program(tmp_path, tokenizer)
    held = {tuple(example.inputs) for example in program.held_out}
    assert held
    assert not held & {row for epoch in range(3) for row in seen(program, epoch)}


def test_a_step_counts_its_targets_however_it_is_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole, parts = (make_program(tmp_path, tokenizer, micro=micro) for micro in (6, 1))
    for step in (0, whole.steps_per_epoch - 1):
        one, six = batch_of(whole, step), batch_of(parts, step)
        assert (one.tokens, one.targets) == (six.tokens, six.targets)
        assert one.targets == sum(int((t != IGNORE).sum()) for _, t in one.micro)
        assert one.targets == sum(int((t != IGNORE).sum()) for _, t in six.micro)
        assert [len(inputs) for inputs, _ in six.micro] == [1] * sum(len(i) for i, _ in one.micro)
    last = batch_of(whole, whole.steps_per_epoch - 1)
    assert sum(len(inputs) for inputs, _ in last.micro) == len(whole.examples) % 6 != 0


def test_evaluations_and_publications_fall_on_the_ends_of_epochs(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    program = make_program(tmp_path, tokenizer)
    every = range(program.steps + 1)
    ends = [program.steps_per_epoch * epoch for epoch in range(4)]
    assert [done for done in every if program.evaluates_after(done)] == ends
    assert [done for done in every if program.publishes_after(done)] == ends[1:]
    first, later = evaluate(program, 0), evaluate(program, ends[1])
    assert first == {"eval/loss": later["eval/loss"], "eval/base_loss": later["eval/loss"]}


def test_the_held_out_loss_is_the_mean_over_the_assistants_tokens(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    program = make_program(tmp_path, tokenizer)
    total = sum(loss_of(program.model, [example]) for example in program.held_out)
    count = sum(example.learned for example in program.held_out)
    assert evaluate(program, 0)["eval/loss"] == pytest.approx(total / count, rel=1e-6)


def test_too_few_conversations_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"data\.holdout 0\.2 leaves \d conv.* at least one"):
        make_program(tmp_path, tokenizer, count=1)
