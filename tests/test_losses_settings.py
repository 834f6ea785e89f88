"""The words of the losses' settings: one list for Python, C++ and Triton, and an error for any other word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qempo_fast._backends import OPS, implementation
from qempo_fast.losses import cpu
from qempo_fast.reference.tokens import SURROGATES

ROOT = Path(__file__).resolve().parent.parent
ENUMS = {
    "Reduction": cpu.REDUCTIONS,
    "Baseline": cpu.BASELINES,
    "Scale": cpu.SCALES,
    "Normalize": cpu.NORMALIZE,
    "Surrogate": cpu.SURROGATES,
}
D = torch.float64
CU = torch.tensor([0, 3, 3, 10])


def tokens() -> tuple[torch.Tensor, ...]:
    """Log-probs of ten tokens, ratios to the old ones from e^-2 to e^2, and advantages of either sign."""
    old = torch.linspace(-3, -1, 10, dtype=D)
    return old + torch.linspace(-2, 2, 10, dtype=D), old, torch.tensor([1.0, 0.5, -2.0], dtype=D), CU


def run(op: str, backend: str, *args: Any, **settings: Any) -> Any:
    if backend == "triton":
        pytest.importorskip("triton")
        args = tuple(x.to("cuda" if torch.cuda.is_available() else "cpu") for x in args)
    return implementation(op, backend)(*args, **settings)


def test_the_words_are_those_of_the_header_in_its_order() -> None:
    header = (ROOT / "csrc" / "include" / "qempo" / "losses.h").read_text()
    enums = dict(re.findall(r"^enum class (\w+) \{ (.*) \};$", header, re.MULTILINE))
    del enums["Status"]
    assert {name: list(words) for name, words in ENUMS.items()} == {k: v.split(", ") for k, v in enums.items()}


def test_every_backend_has_every_surrogate() -> None:
    source = (ROOT / "kernels" / "loss_tokens.py").read_text()
    assert list(cpu.SURROGATES) == list(SURROGATES)
    assert re.findall(r'SURROGATE == "(\w+)"', source) == list(SURROGATES), "branches of the Triton kernel"
    pytest.importorskip("triton")
    from qempo_fast.kernels import loss_tokens

    assert list(loss_tokens.SURROGATES) == list(SURROGATES)
    compiled = {entry.constexprs["SURROGATE"] for entry in loss_tokens.COMPILE}
    assert compiled == set(SURROGATES), "entries of COMPILE"


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("backend", OPS["token_loss"].backends)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_surrogate_is_that_of_the_reference(surrogate: str, backend: str, ratio: str) -> None:
    logps, *rest = tokens()
    settings = {"eps_low": 0.3, "eps_high": 0.4, "ratio": ratio, "surrogate": surrogate}
    value, (coef,) = run("token_loss", backend, logps, *rest, **settings)
    leaf = logps.clone().requires_grad_()
    want = run("token_loss", "reference", leaf, *rest, **settings)
    torch.testing.assert_close(value.cpu(), want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(coef.cpu(), torch.autograd.grad(want, leaf)[0], rtol=1e-12, atol=0)
    assert bool(coef.any())


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", ["reference", *OPS["token_loss"].backends])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_surrogate_of_ratios_out_of_range(surrogate: str, backend: str, dtype: torch.dtype) -> None:
    """Ratios of e^1000 and e^-1000 with advantages of either sign and none: infinity may be right, NaN is not."""
    log_ratio = torch.tensor([1000.0, 1000.0, 1000.0, -1000.0, -1000.0, -1000.0], dtype=dtype)
    advantages = torch.tensor([1.0, -1.0, 0.0] * 2, dtype=dtype)
    settings = {"eps_low": 0.3, "eps_high": 0.4, "surrogate": surrogate}
    tensors = (log_ratio.requires_grad_(backend == "reference"), torch.zeros(6, dtype=dtype), advantages)
    got = run("token_loss", backend, *tensors, torch.arange(7), **settings)
    coef = torch.autograd.grad(got, log_ratio)[0] if backend == "reference" else got[1][0]
    assert not bool(coef.isnan().any())


@pytest.mark.parametrize("backend", ["reference", *OPS["token_loss"].backends])
def test_an_unknown_surrogate_raises_by_name(backend: str) -> None:
    with pytest.raises(ValueError, match=r"surrogate: wanted 'clip'.* got 'clamp'"):
        run("token_loss", backend, *tokens(), surrogate="clamp")


@pytest.mark.parametrize("backend", ["reference", *OPS["group_advantages"].backends])
def test_an_unknown_scale_raises_by_name(backend: str) -> None:
    with pytest.raises(ValueError, match=r"scale: wanted 'none' or 'std'.* got 'max'"):
        run("group_advantages", backend, torch.arange(4.0), group_size=2, scale="max")


@pytest.mark.parametrize(("setting", "words"), [("reduction", cpu.REDUCTIONS), ("baseline", cpu.BASELINES)])
def test_no_number_stands_for_an_unknown_word(setting: str, words: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{setting}: wanted .* got 'median'"):
        words["median"]
