"""The multipliers' state: every step counts at any size, and no cast, move or old checkpoint takes digits from it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qempo_fast.constraint import _STATE, QualityConstraint, solve_qempo, target_distribution

D = torch.float64


def damped(**settings: Any) -> QualityConstraint:
    return QualityConstraint(0.9, max_kl=0.5, lam=20.06, mu=0.1, damping=10.0, smoothing=0.9, **settings)


def numbers(c: torch.nn.Module) -> dict[str, Any]:
    """Buffers as numbers, NaN as a word."""
    return {name: repr(x.tolist()) for name, x in c.named_buffers()}


def test_a_small_gap_moves_a_large_multiplier() -> None:
    """4.5e-4 a step, which float32 rounds to nothing at 1e4."""
    c = QualityConstraint(0.9, lam=1e4)
    for _ in range(10_000):
        c.update(0.909)
    assert float(c.lam) == pytest.approx(1e4 - 10_000 * 0.05 * 0.009, abs=1e-6)
    c = QualityConstraint(0.9, max_kl=0.1, mu=100.0, kl_lr=1e-4)
    for _ in range(1000):
        c.update(0.9, kl=0.13)
    assert float(c.mu) == pytest.approx(100.0 + 1000 * 1e-4 * 0.03, abs=1e-9)
    c = QualityConstraint(0.9, lam=1e4, damping=1.0)
    for _ in range(10_000):
        c.update(0.909)
    assert float(c.integral[0]) == pytest.approx(9995.5, abs=1e-6)


@pytest.mark.parametrize("gap", [1e-6, 1e-9, 1e-12])
def test_a_multiplicative_step_goes_as_far_as_it_should(gap: float) -> None:
    c = QualityConstraint(0.0, lr=0.05, step="multiplicative")
    for _ in range(100):
        c.update(-gap)
    assert float(c.lam) - 1 == pytest.approx(math.expm1(100 * 0.05 * gap), abs=1e-14)
    # mu leaves 0 by (1 + mu) (e^x - 1), not by the digits that 1 + mu has left.
    c = QualityConstraint(0.0, max_kl=1.0, mu=0.0, kl_lr=1e-6, step="multiplicative")
    c.update(0.0, kl=1.0 + 2.0**-10)
    assert float(c.mu) == pytest.approx(1e-6 * 2.0**-10, rel=1e-9)


@pytest.mark.parametrize("step", ["additive", "multiplicative"])
def test_the_rule_in_exact_arithmetic(step: str) -> None:
    """Against mpmath, over 50 updates of both multipliers."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        c = QualityConstraint(0.9, max_kl=0.5, lr=0.01, kl_lr=1e-5, lam=9e3, mu=1e-3, step=step)
        lam, mu = mpmath.mpf(9e3), mpmath.mpf(1e-3)
        rewards = (0.9 + 1e-4 * torch.randn(50, dtype=D)).tolist()
        for i, reward in enumerate(rewards):
            kl = 0.5 + 0.01 * i
            c.update(reward, kl=kl)
            by, up = mpmath.mpf(0.01) * (mpmath.mpf(0.9) - reward), mpmath.mpf(1e-5) * (mpmath.mpf(kl) - 0.5)
            lam, mu = (
                (lam + by, mu + up) if step == "additive" else (lam * mpmath.exp(by), mu + (1 + mu) * mpmath.expm1(up))
            )
        assert abs(float(c.lam) - lam) < 1e-10
        assert abs(float(c.mu) - mu) < 1e-17


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mean_reward_is_taken_in_float64(dtype: torch.dtype) -> None:
    """float32 stops counting ones at 2^24, and 65504 twice leaves float16."""
    rewards = torch.full((1001,), 0.3).to(dtype)
    c = QualityConstraint(0.0, lr=1.0, lam=1.0).update(-rewards)
    assert float(c.lam) == pytest.approx(1.0 + float(rewards[0]), rel=1e-15)
    large = QualityConstraint(0.0, lr=1.0, lam=1.0, lam_max=1e6).update(torch.full((4,), -65504.0).to(dtype))
    assert float(large.lam) == 1.0 + float(torch.tensor(65504.0).to(dtype))


def share(c: torch.nn.Module) -> torch.nn.Module:
    shared = c.share_memory()
    assert all(x.is_shared() for x in shared.buffers())
    return shared


def save(c: torch.nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(c, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MOVES: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float16),
    "cpu": lambda m: m.cpu(),
    "like another": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "share_memory": share,
    "deepcopy": copy.deepcopy,
    "save": save,
}


@pytest.mark.parametrize("move", MOVES)
def test_no_move_of_a_model_takes_digits(move: str) -> None:
    """The constraint goes with the model's weights, which move as ever, and stays itself."""
    c = damped()
    c.update(0.5, kl=1.5)
    before, keys = numbers(c), list(c.state_dict())
    model = MOVES[move](torch.nn.ModuleDict({"constraint": c, "model": torch.nn.Linear(2, 2)}))
    c = model["constraint"]
    assert numbers(c) == before
    assert list(c.state_dict()) == keys
    assert {x.dtype for x in c.buffers()} == {D}
    if move in ("bfloat16", "half", "type"):
        assert model["model"].weight.dtype != torch.float32
    assert c.update(0.5, kl=1.5) is c


def test_what_a_subclass_adds_moves_as_usual() -> None:
    class Mine(QualityConstraint):
        def __init__(self) -> None:
            super().__init__(0.9)
            self.linear = torch.nn.Linear(2, 2)
            self.register_buffer("own", torch.zeros(3))

    c = Mine().half()
    assert {name: x.dtype for name, x in c.state_dict().items()} == {
        **dict.fromkeys(("lam", "mu"), D),
        **dict.fromkeys(("own", "linear.weight", "linear.bias"), torch.float16),
    }
    assert list(c.state_dict()) == ["lam", "mu", "own", "linear.weight", "linear.bias"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_old_state_loads_into_float64(assign: bool, dtype: torch.dtype) -> None:
    old = {name: x.to(dtype) for name, x in damped().state_dict().items()}
    c = QualityConstraint(0.1, max_kl=9.0, damping=1.0)
    c.load_state_dict(old, assign=assign)
    assert {x.dtype for x in c.buffers()} == {D}
    assert float(c.lam) == float(old["lam"])
    assert old["lam"].dtype is dtype
    c.update(0.1 - 1e-9, kl=9.0)
    assert float(c.integral[0]) > float(old["lam"])


def test_an_old_pickle_and_a_cast_behind_its_back_are_widened() -> None:
    c = damped()
    state = c.__getstate__() if hasattr(c, "__getstate__") else vars(c)
    old = copy.deepcopy(state)
    for name in _STATE:
        old["_buffers"][name] = old["_buffers"][name].float()
    again = QualityConstraint.__new__(QualityConstraint)
    again.__setstate__(old)
    assert {x.dtype for x in again.buffers()} == {D}
    # As FSDP and quantisation tools cast buffers.
    for x in c.buffers():
        x.data = x.data.bfloat16()
    c.update(0.9 - 1e-6, kl=0.5)
    assert {x.dtype for x in c.buffers()} == {D}
    assert float(c.integral[0]) > 20.0


def to_apple(x: torch.Tensor) -> torch.Tensor:
    """What .to("mps") does to a module's tensors: its GPU refuses float64."""
    if x.dtype is D:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return x.clone()


def test_a_device_without_float64_leaves_the_state_on_the_cpu() -> None:
    c = damped()
    before = numbers(c)
    assert c._apply(to_apple) is c
    assert numbers(c) == before
    assert {(x.dtype, x.device.type) for x in c.buffers()} == {(D, "cpu")}

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        c._apply(broken)
    assert numbers(c) == before


def test_a_default_device_without_values_holds_no_state() -> None:
    with torch.device("meta"):
        c = damped()
    assert {x.device.type for x in c.buffers()} == {"cpu"}
    assert float(c.lam) == 20.06


def test_numbers_of_numpy_do_not_lower_the_precision() -> None:
    numpy = pytest.importorskip("numpy")
    lr = numpy.float32(0.05)
    c = QualityConstraint(numpy.float64(0.9), lr=lr, lam=numpy.float32(1e4)).update(0.909)
    assert float(c.lam) == 1e4 + float(lr) * (0.9 - 0.909)
    rewards = torch.arange(4, dtype=D)
    wanted = solve_qempo(rewards, min_reward=2.5)
    assert solve_qempo(rewards, min_reward=numpy.float32(2.5)).lam == wanted.lam


def test_a_common_offset_costs_no_digits() -> None:
    """The target depends on differences: 1e4 / 0.01 has no digit in float32 for what tells its rewards apart."""
    rewards, f = torch.tensor([1e4, 1e4 + 0.0078125, 1e4 - 0.03125]), torch.tensor([-3e3, -3e3 + 0.25, -3e3])
    for settings in ({"alpha": 0.01}, {"alpha": 0.01, "beta": 0.02}):
        truth = target_distribution(rewards.double(), f.double(), **settings)
        assert float((target_distribution(rewards, f, **settings) - truth).abs().max()) < 3e-7
    assert target_distribution(torch.tensor([1e30, 0.0]), alpha=1e-10).tolist() == [1.0, 0.0]
