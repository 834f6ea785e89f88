"""kept_sets: sets that tokens were drawn from, on their way through fused_forward and TRL's seam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from hf_models import rows, tiny

import qempo_fast as qf
from qempo_fast.integrations.hf import fused_forward
from qempo_fast.integrations.known import kept_sets, known_coefficients
from qempo_fast.integrations.trl import use_fused_logps
from qempo_fast.integrations.trl.kernel import seam_rows, seam_sets


def sets(labels: torch.Tensor, vocabulary: int) -> qf.Support:
    """Half of the vocabulary with the label in it, and nothing where a label does not count."""
    mask = torch.rand(*labels.shape, vocabulary, generator=torch.Generator().manual_seed(2)) < 0.5
    mask.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), True)
    return qf.Support.from_mask(mask & (labels != -100).unsqueeze(-1))


def test_a_model_under_fused_forward_gives_what_support_at_the_call_does() -> None:
    ids, mask, labels = rows()
    model = tiny("llama")
    given = {"input_ids": ids, "attention_mask": mask}
    support = sets(labels, model.config.vocab_size)
    with fused_forward(model, entropy=True):
        wanted = model(**given, labels=labels, support=support)
        whole = model(**given, labels=labels)
        with kept_sets(support):
            out = model(**given, labels=labels)
            with pytest.raises(ValueError, match=r"^support: wanted None at a call under kept_sets"):
                model(**given, labels=labels, support=support)
            with known_coefficients(torch.ones(labels.shape)):  # nothing is gained, nothing is lost
                assert torch.equal(model(**given, labels=labels).logps, out.logps)
        # All rows of labels that count have a set: one that does not is left out.
        with kept_sets(sets(labels.where(torch.arange(labels.shape[1]) > 4, -100), model.config.vocab_size)):
            late = model(**given, labels=labels)
        again = model(**given, labels=labels)
    assert torch.equal(out.logps, wanted.logps)
    assert torch.equal(out.entropy, wanted.entropy)
    assert (out.logps > whole.logps)[:, 1:][labels[:, 1:] != -100].all()
    assert torch.equal(again.logps, whole.logps)
    assert (late.logps[:, :5] == 0).all()
    assert (late.logps[:, 5:] != 0).any()


def test_shifted_labels_and_a_compiled_model() -> None:
    ids, mask, labels = rows()
    model = tiny("llama")
    support = sets(labels, model.config.vocab_size)
    with fused_forward(model):
        call = torch.compile(
            lambda: model(input_ids=ids, attention_mask=mask, shift_labels=labels).logps, backend="eager"
        )
        before = call()
        with kept_sets(support):
            found = call()
        wanted = model(input_ids=ids, attention_mask=mask, shift_labels=labels, support=support).logps
    torch.testing.assert_close(found, wanted)
    assert (found > before)[labels != -100].all()


def test_trls_seam() -> None:
    torch.manual_seed(0)
    ids = torch.randint(50, (3, 7))
    drawn = torch.zeros(3, 7, dtype=torch.bool)
    drawn[:, 3:] = True
    drawn[2, 5:] = False
    support = sets(ids.where(drawn, -100), 50)
    hidden, weight = torch.randn(18, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = ids[:, 1:].reshape(-1)
    with use_fused_logps() as patch, kept_sets(seam_sets(support, drawn)):
        outputs = ("log_probs", "entropy")
        logps, entropy, *_ = trl_utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 0.7, 256, None, 1.0, outputs
        )
        with pytest.raises(ValueError, match=r"^support: .*own log-probs have to run: logit_scale"):
            trl_utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.7, 256, None, -1.0, outputs)
        assert patch is not None
    where = seam_rows(drawn, drawn)
    wanted = qf.linear_logps(
        hidden, weight, targets.where(where, -100), temperature=0.7, entropy=True,
        support=support.rows(torch.arange(21).view(3, 7)[:, 1:].reshape(-1)),
    )  # fmt: skip
    assert torch.equal(logps, wanted.logps)
    assert torch.equal(entropy, wanted.entropy)
    assert (logps[~where] == 0).all()
    grads = [torch.autograd.grad(x.sum(), (hidden, weight)) for x in (logps, wanted.logps)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_bad_input() -> None:
    ids, mask, labels = rows()
    model: Any = tiny("llama")
    support = sets(labels, model.config.vocab_size)
    with pytest.raises(TypeError, match=r"^support: wanted a qempo_fast.Support"), kept_sets(tuple(support)):  # type: ignore[arg-type]
        pass
    with kept_sets(None), fused_forward(model):
        assert model(input_ids=ids, attention_mask=mask, labels=labels).logps.isfinite().all()
    with (
        fused_forward(model),
        kept_sets(support.rows(slice(0, 3))),
        pytest.raises(ValueError, match=r"^support: wanted a qempo_fast.Support of \d+ sets.*got 3"),
    ):
        model(input_ids=ids, attention_mask=mask, labels=labels)
    with pytest.raises(ValueError, match=r"^support: wanted a qempo_fast.Support of 21 sets.*got 3"):
        seam_sets(support.rows(slice(0, 3)), torch.ones(3, 7, dtype=torch.bool))
