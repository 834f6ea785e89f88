"""known_coefficients: gradients made in the forward of transformers models and of TRL's trainers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import rows, tiny

import qempo_fast as qf
from qempo_fast.integrations.hf import fused_forward
from qempo_fast.integrations.known import known_coefficients


def _leaves(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _weights(labels: torch.Tensor) -> torch.Tensor:
    return torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))


def test_the_gradient_is_the_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask, labels = rows()
    model, c = tiny("llama"), _weights(labels)
    with fused_forward(model, entropy=True):
        plain = model(input_ids=ids, attention_mask=mask, labels=labels)
        wanted = torch.autograd.grad((c * plain.logps).sum() * 7, _leaves(model))
        monkeypatch.setattr(qf, "linear_logps", None)  # the other way is not taken
        with known_coefficients(c):
            out = model(input_ids=ids, attention_mask=mask, labels=labels)
        found = torch.autograd.grad((c * out.logps).sum() * 7, _leaves(model))
        packed = dict(input_ids=ids[:1], shift_labels=labels[:1])
        with known_coefficients(c[:1]):
            (model(**packed).logps * c[:1]).sum().backward()
    torch.testing.assert_close(out.logps, plain.logps)
    torch.testing.assert_close(out.entropy, plain.entropy)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_other_coefficients_than_foretold_raise() -> None:
    ids, mask, labels = rows()
    model, c = tiny("llama"), _weights(labels)
    with fused_forward(model), known_coefficients(c):
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
    with pytest.raises(ValueError, match=r"^coefficients: wanted those of the loss"):
        out.logps.sum().backward()


def test_a_coefficient_of_nan_makes_the_gradient_nan() -> None:
    ids, mask, labels = rows()
    model, c = tiny("llama"), _weights(labels)
    c[labels != -100] = torch.nan
    with fused_forward(model), known_coefficients(c):
        (model(input_ids=ids, attention_mask=mask, labels=labels).logps * c).sum().backward()
    assert model.lm_head.weight.grad.isnan().any()


def test_bad_input() -> None:
    ids, mask, labels = rows()
    model = tiny("llama")
    with pytest.raises(TypeError, match=r"^coefficients: wanted a tensor"), known_coefficients([1.0]):  # type: ignore[arg-type]
        pass
    with fused_forward(model, sum_sq=True):
        with known_coefficients(torch.ones(3)), pytest.raises(ValueError, match=r"^coefficients: wanted one for each"):
            model(input_ids=ids, attention_mask=mask, labels=labels)
        with known_coefficients(_weights(labels)), pytest.raises(ValueError, match=r"^sum_sq: wanted False"):
            model(input_ids=ids, attention_mask=mask, labels=labels)
        with known_coefficients(torch.ones(3)), torch.no_grad():  # no gradient, nothing to foretell
            assert model(input_ids=ids, attention_mask=mask, labels=labels).sum_sq is not None
        with known_coefficients(None):
            model(input_ids=ids, attention_mask=mask, labels=labels).logps.sum().backward()
