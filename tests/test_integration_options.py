"""logits_dtype and batch_invariant on their way through fused_forward, known coefficients and TRL's seam."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from hf_models import SIZES, rows, tiny

import qempo_fast as qf
from qempo_fast.integrations import openrlhf
from qempo_fast.integrations.hf import fused_forward
from qempo_fast.integrations.known import known_coefficients

WIDE: dict[str, Any] = {"logits_dtype": torch.float32}
FIXED: dict[str, Any] = {"batch_invariant": True}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_bfloat16_model_keeps_float32_logits(name: str) -> None:
    """At the check, in the outputs and in the backward: linear_logps with that option, to the bit."""
    ids, mask, labels = rows()
    model = tiny(name).bfloat16()
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1].detach()
    head = model.get_output_embeddings().weight
    asked: dict[str, Any] = {"entropy": True, "sum_sq": True, "softcap": 2.0 if name == "gemma2" else None}
    wanted = qf.linear_logps(hidden, head, labels[:, 1:], **asked, **WIDE)
    truth = qf.linear_logps(hidden.float(), head.detach().float(), labels[:, 1:], **asked)
    (slope,) = torch.autograd.grad(wanted.logps.sum(), head)
    model.model.requires_grad_(False)
    head.requires_grad_()
    for how, most in ((WIDE, 1e-4), ({}, 0.5)):
        with fused_forward(model, entropy=True, sum_sq=True, **how):
            out = model(input_ids=ids, attention_mask=mask, labels=labels)
        found = [x[:, 1:].detach() for x in (out.logps, out.entropy, out.sum_sq)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[:3], strict=True)) == bool(how)
        assert float((found[0] - truth.logps).abs().max()) < most
    assert float((found[0] - truth.logps).abs().max()) > 1e-3  # what the option is for
    if name == "llama":  # gemma2's head is its embedding too
        with fused_forward(model, **WIDE):
            model(input_ids=ids, attention_mask=mask, labels=labels).logps.sum().backward()
        assert torch.equal(head.grad, slope)


def test_float32_logits_of_wider_models() -> None:
    ids, mask, labels = rows()
    model, given = tiny("llama"), {"input_ids": ids, "attention_mask": mask, "labels": labels}
    logps = []
    for how in ({}, WIDE):
        with fused_forward(model, **how):
            logps.append(model(**given).logps)
    assert torch.equal(*logps)
    model.double()
    with pytest.raises(ValueError, match=r"^logits_dtype: wanted None with float64 hidden"):
        fused_forward(model, **WIDE)
    assert "forward" not in model.__dict__
    with fused_forward(model, check=False, **WIDE), pytest.raises(ValueError, match=r"^logits_dtype: wanted None"):
        model(**given)


def test_a_row_alone_has_its_bits_in_a_batch() -> None:
    """The body is an embedding and a norm, exact by rows. Sampled steps have other tiles than rows that are scored."""
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 0, "vocab_size": 5000})
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(20)
    ids = torch.randint(3, 5000, (20, 9), generator=torch.Generator().manual_seed(0))
    for how in ({}, FIXED):
        with fused_forward(model, entropy=True, sum_sq=True, tau=0.05, **how):
            batch = model(input_ids=ids, labels=ids)
            with torch.no_grad():
                alone = [model(input_ids=row, labels=row) for row in ids.split(1)]
        names = ("logps", "entropy", "sum_sq")
        same = [torch.equal(batch[n].detach(), torch.cat([x[n] for x in alone])) for n in names]
        assert same == [bool(how)] * 3


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            {"logits_dtype": torch.float16},
            ValueError,
            r"^logits_dtype: wanted None or torch.float32, got torch.float16",
        ),
        ({"logits_dtype": "float32"}, TypeError, r"^logits_dtype: wanted None or torch.float32, got str"),
        ({"batch_invariant": 1}, TypeError, r"^batch_invariant: wanted a bool"),
        ({"backend": "reference", **FIXED}, ValueError, r"^batch_invariant: wanted False with backend 'reference'"),
    ],
    ids=["half", "word", "number", "reference"],
)
def test_bad_values_are_named_when_the_slot_is_filled(how: dict[str, Any], error: Any, message: str) -> None:
    trl = pytest.importorskip("qempo_fast.integrations.trl")
    fill = [trl.use_fused_logps, lambda **how: fused_forward(tiny("llama"), check=False, **how)]
    # OpenRLHF itself is not looked for before. verl's: tests/integrations.
    for function in fill if "backend" in how else [*fill, openrlhf.use_fused_logps]:
        with pytest.raises(error, match=message):
            function(**how)
    assert openrlhf._options == {}


def test_kept_sets_refuse_batch_invariant() -> None:
    ids, mask, labels = rows()
    model = tiny("llama")
    sets = qf.Support(ids.flatten(), torch.arange(ids.numel() + 1))
    with fused_forward(model, **FIXED), pytest.raises(ValueError, match=r"^batch_invariant: wanted False with support"):
        model(input_ids=ids, attention_mask=mask, labels=labels, support=sets)


def test_known_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 logits go into the forward's gradient; a row's bits are not kept there, so linear_logps runs."""
    ids, mask, labels = rows()
    model, given = tiny("llama").bfloat16(), {"input_ids": ids, "attention_mask": mask, "labels": labels}
    c = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    hidden, head = model.model(input_ids=ids, attention_mask=mask).last_hidden_state, model.lm_head.weight
    made = qf.weighted_logps(hidden[:, :-1], head, labels[:, 1:], c[:, 1:], **WIDE)
    wanted = torch.autograd.grad(made.loss, head)[0]
    with monkeypatch.context() as patch, fused_forward(model, **WIDE), known_coefficients(c):
        patch.setattr(qf, "linear_logps", None)
        out = model(**given)
    assert torch.equal(out.logps[:, 1:], made.logps)
    assert torch.equal(torch.autograd.grad((c * out.logps).sum(), head)[0], wanted)
    monkeypatch.setattr(qf, "weighted_logps", None)
    results = []
    for known in (None, c):
        with fused_forward(model, entropy=True, sum_sq=True, **FIXED), known_coefficients(known):
            out = model(**given)
        # Another gradient than foretold, and the entropy's.
        results.append((out.logps, torch.autograd.grad(out.logps.sum() + out.entropy.sum(), head)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def seam(how: dict[str, Any], *args: Any) -> Any:
    utils = pytest.importorskip("trl.trainer.utils")
    from qempo_fast.integrations.trl import use_fused_logps

    with use_fused_logps(**how):
        return utils._ChunkedLogProbFunction.apply(*args)


def trl_head(kind: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(600, 24, generator=g), torch.randn(5000, 24, generator=g)
    targets = (hidden @ weight.t()).argmax(1)
    return hidden.to(kind), weight.to(kind), targets


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_trls_seam_keeps_float32_logits(softcap: float | None) -> None:
    hidden, weight, targets = trl_head(torch.bfloat16)
    args = (hidden, weight, None, targets, 0.7, 32, softcap, 0.1)
    found, rounded = seam(WIDE, *args), seam({}, *args)
    head = {"temperature": 0.7, "softcap": softcap, "logit_scale": 0.1}
    wanted = qf.linear_logps(hidden, weight, targets, entropy=True, sum_sq=True, **head, **WIDE)
    for ours, theirs, other in zip(found[:3], wanted[:3], rounded[:3], strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, other)
    # The flag and the mean are of the same logits: those of half precision tie here and there.
    logits = hidden.float() @ weight.float().t()
    assert torch.equal(found[4], logits.argmax(1) == targets)
    assert not torch.equal(found[4], rounded[4])
    torch.testing.assert_close(found[3], qf.reference.logps.finish_head(logits, **head).mean(1), rtol=1e-5, atol=1e-5)


def test_trls_seam_keeps_a_rows_bits() -> None:
    hidden, weight, targets = trl_head(torch.float32)
    for how in ({}, FIXED):
        batch = seam({"tau": 0.05, **how}, hidden.requires_grad_(), weight, None, targets, 1.0, 32)
        with torch.no_grad():
            alone = seam({"tau": 0.05, **how}, hidden[:1], weight, None, targets[:1], 1.0, 32)
            some = seam({"tau": 0.05, **how}, hidden[250:400], weight, None, targets[250:400], 1.0, 32)
        same = [torch.equal(a[250:400].detach(), b) for a, b in zip(batch[:3], some[:3], strict=True)]
        assert same == [bool(how)] * 3
        assert not how or all(torch.equal(a[:1].detach(), b) for a, b in zip(batch[:3], alone[:3], strict=True))


def test_trls_own_kernel_does_not_run_under_batch_invariant(caplog: pytest.LogCaptureFixture) -> None:
    hidden, weight, targets = trl_head(torch.float32)
    parted = torch.nn.Parameter(weight)
    parted.ds_id = 0
    for w, scale, reason in ((weight, -1.0, "logit_scale -1.0"), (parted, 1.0, "DeepSpeed ZeRO-3")):
        args = (hidden, w, None, targets, 1.0, 32, None, scale)
        with pytest.raises(
            ValueError, match=rf"^batch_invariant: wanted False .*TRL's own kernel .*{reason}.*got True"
        ):
            seam(FIXED, *args)
        with caplog.at_level(logging.WARNING):
            seam(WIDE, *args)
        assert reason in caplog.text


def test_a_trainers_own_gradient_keeps_the_rest_of_an_outer_seam() -> None:
    pytest.importorskip("trl")
    import trl.trainer.utils as utils

    from qempo_fast.integrations.trl import kernel

    with kernel.use_fused_logps(tau=0.1, backend="cpu", **WIDE, **FIXED):
        outer = utils._ChunkedLogProbFunction.options
        with kernel.own_logps(True, "exact", None):
            assert utils._ChunkedLogProbFunction.options == {**outer, "grad": "exact", "tau": None}
        with kernel.own_logps(True, "auto", None):
            assert utils._ChunkedLogProbFunction.options is outer
    with kernel.own_logps(True, "exact", None):
        plain = {"backend": None, "logits_dtype": None, "batch_invariant": False}
        assert utils._ChunkedLogProbFunction.options == {"grad": "exact", "tau": None, **plain}
