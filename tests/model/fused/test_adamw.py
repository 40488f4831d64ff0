from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tessera.model.fused.adamw import FusedAdamW, clip_factor

SHAPES = [(1,), (17,), (64, 48), (1500,)]
LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.95), 1e-8, 0.1
ULP = 2.0**-23


def parameters(device: torch.device) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in SHAPES]


def gradients(step: int, device: torch.device) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=draw).to(device) for shape in SHAPES]


def groups(made: list[nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": [p for p in made if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in made if p.ndim < 2], "weight_decay": 0.0},
    ]


def ours(made: list[nn.Parameter]) -> FusedAdamW:
    return FusedAdamW(groups(made), lr=LR, betas=BETAS, eps=EPS)


def theirs(made: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(made), lr=LR, betas=BETAS, eps=EPS, fused=True)


def run(
    optimizer: torch.optim.Optimizer, made: list[nn.Parameter], steps: range, clip: float = 1.0
) -> None:
    """Steps with gradients that are clipped beforehand, unless the optimiser is ours."""
    for step in steps:
        for parameter, gradient in zip(made, gradients(step, made[0].device), strict=True):
            parameter.grad = gradient
        if isinstance(optimizer, FusedAdamW):
            optimizer.clip_factor = torch.tensor(clip, device=made[0].device)
        else:
            for parameter in made:
                assert parameter.grad is not None
                parameter.grad.mul_(clip)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + step % 3)
        optimizer.step()


def in_float64(steps: int, clip: float) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loshchilov & Hutter's algorithm 2 as it is written: weights, and the moments by name."""
    results = []
    for number, parameter in enumerate(parameters(torch.device("cpu"))):
        weight = parameter.detach().double()
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        decay = DECAY if weight.ndim >= 2 else 0.0
        for step in range(steps):
            g = gradients(step, torch.device("cpu"))[number].double() * clip
            lr = LR * (1 + step % 3)
            mean = BETAS[0] * mean + (1 - BETAS[0]) * g
            square = BETAS[1] * square + (1 - BETAS[1]) * g * g
            m_hat = mean / (1 - BETAS[0] ** (step + 1))
            v_hat = square / (1 - BETAS[1] ** (step + 1))
            weight = weight - lr * decay * weight - lr * m_hat / (v_hat.sqrt() + EPS)
        results.append((weight, {"exp_avg": mean, "exp_avg_sq": square}))
    return results


def test_fifty_steps_are_those_of_the_paper_and_of_torch(form: str, device: torch.device) -> None:
    made, other = parameters(device), parameters(device)
    mine, torchs = ours(made), theirs(other)
    run(mine, made, range(50), clip=0.3)
    run(torchs, other, range(50), clip=0.3)
    for one, two, (wanted, moments) in zip(made, other, in_float64(50, 0.3), strict=True):
        # A weight that ends near 0 has been elsewhere: 0.5 is how far 50 steps of 3 x LR go.
        unit = ULP * (wanted.abs() + 0.5)
        mine_off = (one.detach().cpu().double() - wanted).abs() / unit
        torch_off = (two.detach().cpu().double() - wanted).abs() / unit
        assert float(mine_off.mean()) < 1.1 * float(torch_off.mean()) + 0.1
        if form == "triton":  # torch's own on a CPU has beta2 in float32, and is 4.4 off
            assert float(mine_off.mean()) < 1.5
        assert float(mine_off.max()) < 1.25 * float(torch_off.max()) + 1
        if form == "torch":
            assert torch.equal(one, two)
        for key, exact in moments.items():
            unit = ULP * (exact.abs() + exact.abs().mean())
            ours_off, theirs_off = (
                float(((state[parameter][key].cpu().double() - exact).abs() / unit).max())
                for state, parameter in ((mine.state, one), (torchs.state, two))
            )
            assert ours_off < max(4.0, 1.25 * theirs_off), key
        assert torch.equal(mine.state[one]["step"], torchs.state[two]["step"])


def test_the_first_step_has_all_its_digits(form: str, device: torch.device) -> None:
    weight = nn.Parameter(torch.zeros(40, device=device))
    optimizer = FusedAdamW([weight], lr=1.0, betas=(0.9, 0.9999), eps=1e-12)
    weight.grad = torch.linspace(0.1, 1.0, 40, device=device)
    optimizer.step()
    # 1 - 0.9999 has four digits fewer in float32, and the step is 1 whatever the gradient.
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, -1.0), rtol=1e-6, atol=0.0)


def test_the_state_is_that_of_torch_and_either_continues_with_the_other(
    form: str, device: torch.device
) -> None:
    made, other = parameters(device), parameters(device)
    mine, torchs = ours(made), theirs(other)
    run(mine, made, range(3))
    run(torchs, other, range(3))
    for one, two in zip(made, other, strict=True):
        assert list(mine.state[one]) == list(torchs.state[two]) == ["step", "exp_avg", "exp_avg_sq"]
        for key, value in torchs.state[two].items():
            found = mine.state[one][key]
            assert (found.dtype, found.shape, found.device) == (
                value.dtype,
                value.shape,
                value.device,
            )
    assert mine.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]
    swapped, reswapped = copy.deepcopy(made), copy.deepcopy(other)
    after, again = theirs(swapped), ours(reswapped)
    after.load_state_dict(copy.deepcopy(mine.state_dict()))
    again.load_state_dict(copy.deepcopy(torchs.state_dict()))
    run(mine, made, range(3, 6))
    for optimizer, weights in ((after, swapped), (again, reswapped)):
        run(optimizer, weights, range(3, 6))
        for one, two in zip(made, weights, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_a_forbidden_step_leaves_everything_as_it_was(form: str, device: torch.device) -> None:
    made = parameters(device)
    optimizer = ours(made)
    optimizer.copies = {p: p.detach().to(torch.bfloat16) for p in made}
    optimizer.zero_gradients = True
    forbidden = torch.ones((), device=device)
    for steps in (range(1), range(1, 4)):  # before there is any state, and later
        optimizer.found_inf = forbidden
        before = [p.detach().clone() for p in made]
        states = copy.deepcopy([dict(optimizer.state[p]) for p in made])
        copies = [c.clone() for c in optimizer.copies.values()]
        for parameter in made:
            parameter.grad = torch.full_like(parameter, float("nan"))
        optimizer.step()
        for number, parameter in enumerate(made):
            assert torch.equal(parameter, before[number])
            assert torch.equal(optimizer.copies[parameter], copies[number])
            assert float(optimizer.state[parameter]["step"]) == (3.0 if states[number] else 0.0)
            for key, value in states[number].items():
                assert torch.equal(optimizer.state[parameter][key], value)
            assert parameter.grad is not None
            assert not parameter.grad.any()
        if steps.start == 0:
            optimizer.found_inf = torch.zeros((), device=device)
            run(optimizer, made, range(3))


def test_the_copy_is_the_rounded_weight_and_gradients_are_zeroed(
    form: str, device: torch.device
) -> None:
    made, plain = parameters(device), parameters(device)
    optimizer = ours(made)
    optimizer.copies = {p: torch.full_like(p, float("nan"), dtype=torch.bfloat16) for p in made[1:]}
    optimizer.zero_gradients = True
    run(optimizer, made, range(2))
    run(ours(plain), plain, range(2))
    for one, two in zip(made, plain, strict=True):
        assert torch.equal(one, two)
        assert one.grad is not None
        assert not one.grad.any()
    # Triton's interpreter cuts off where GPUs round.
    rtol = 2**-7 if form == "triton" and device.type == "cpu" else 0.0
    for parameter, rounded in optimizer.copies.items():
        torch.testing.assert_close(rounded, parameter.to(torch.bfloat16), rtol=rtol, atol=0.0)


def test_a_parameter_without_gradient_is_left_alone(form: str, device: torch.device) -> None:
    made = parameters(device)
    optimizer = ours(made)
    optimizer.step()
    before = made[1].detach().clone()
    made[2].grad = torch.ones_like(made[2])
    optimizer.step()
    assert torch.equal(made[1], before)
    assert list(optimizer.state) == [made[2]]


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 20.0])
def test_the_clip_factor_is_that_of_torch(norm: float) -> None:
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([norm, 0.0, 0.0, 0.0])
    factor = clip_factor(torch.nn.utils.get_total_norm([weight.grad]), 1.0)
    wanted = weight.grad * factor
    nn.utils.clip_grad_norm_([weight], 1.0)
    assert torch.equal(weight.grad, wanted)
