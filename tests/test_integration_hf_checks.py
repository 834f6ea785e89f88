"""What fused_forward refuses, at the patch or at a call, and that its checks leave no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hf_models import IDS, close, logps, plain, tiny
from torch.nn.utils import parametrize

from qempo_fast.integrations.hf import _verify, fused_forward

# ---- heads that are more than x W^T + b


class LowRank(torch.nn.Linear):
    """A head with a part of its own that starts at 0: only its type tells."""

    def __init__(self, d: int, v: int) -> None:
        super().__init__(d, v, bias=False)
        self.down, self.up = torch.nn.Parameter(torch.randn(4, d)), torch.nn.Parameter(torch.zeros(v, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Linear4bit(torch.nn.Linear):
    """As bitsandbytes has it: packed weights, and a forward that unpacks them."""

    def __init__(self, d: int, v: int) -> None:
        super().__init__(d, v, bias=False)
        packed = torch.zeros(d * v // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Quantised(torch.Tensor):
    """As torchao has it: an ordinary Linear whose weight is a wrapper that looks like float32."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].x) if "detach" in str(f) else NotImplemented


def set_weight(head: torch.nn.Linear, weight: torch.Tensor) -> None:
    head.weight = torch.nn.Parameter(weight, requires_grad=False)


def replaced_forward(head: torch.nn.Linear) -> None:
    head.forward = lambda x: 2 * torch.nn.Linear.forward(head, x)


HEADS: dict[str, tuple[Any, str]] = {
    "forward hook": (lambda h: h.register_forward_hook(lambda *a: None), r"without hooks.*got one with .*<lambda>"),
    "pre-hook": (lambda h: h.register_forward_pre_hook(lambda *a: None), "without hooks"),
    "backward hook": (lambda h: h.register_full_backward_hook(lambda *a: None), "without hooks"),
    "backward pre-hook": (lambda h: h.register_full_backward_pre_hook(lambda *a: None), "without hooks"),
    "old weight norm": (torch.nn.utils.weight_norm, "without hooks"),
    "replaced forward": (replaced_forward, "one whose forward is replaced"),
    "int8": (
        lambda h: set_weight(h, torch.zeros(211, 32, dtype=torch.int8)),
        "float weights, not quantised, got one of int8",
    ),
    "float8": (lambda h: set_weight(h, torch.zeros(211, 32).to(torch.float8_e4m3fn)), "got one of float8_e4m3fn"),
    "torchao": (
        lambda h: set_weight(h, Quantised(torch.zeros(211, 32))),
        "plain weights, not quantised, got Quantised",
    ),
    "meta": (lambda h: set_weight(h, torch.zeros(211, 32, device="meta")), "in memory, got one that is offloaded"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_does_more_is_refused_at_the_call(case: str) -> None:
    change, message = HEADS[case]
    model = tiny("llama")
    with fused_forward(model):
        logps(model, IDS)
        change(model.lm_head)
        with pytest.raises((TypeError, ValueError), match=rf"model: wanted an output head .*{message}"):
            logps(model, IDS)


@pytest.mark.parametrize("kind", [LowRank, Linear4bit, torch.nn.Bilinear], ids=lambda k: k.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_head_of_another_type_is_refused(kind: Any, when: str) -> None:
    model = tiny("llama")
    head = kind(32, 211) if kind is not torch.nn.Bilinear else kind(32, 32, 211)
    wanted = pytest.raises(
        TypeError, match=rf"model: wanted an output head .* got {kind.__name__}, which has a forward"
    )
    if when == "before":
        model.lm_head = head
        with wanted:
            fused_forward(model)
        assert type(model) is transformers.LlamaForCausalLM
        return
    with fused_forward(model):
        model.lm_head = head
        with wanted:
            logps(model, IDS)


def test_a_head_in_an_fsdp_unit_of_its_own_is_refused() -> None:
    from torch.distributed.fsdp import FSDPModule

    model = tiny("llama")
    with fused_forward(model):
        # As fully_shard(model.lm_head) leaves it, without ranks: a class over the head's, and hooks.
        model.lm_head.__class__ = type("FSDPLinear", (FSDPModule, type(model.lm_head)), {})
        model.lm_head.register_forward_pre_hook(lambda *a: None)
        with pytest.raises(ValueError, match="model: wanted an output head in the FSDP unit of the whole model"):
            logps(model, IDS)


def test_global_hooks_but_for_torchs_own() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("llama")
    with fused_forward(model), torch.no_grad():
        with FlopCounterMode(display=False):
            logps(model, IDS)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            with pytest.raises(ValueError, match="model: wanted no global forward hooks"):
                logps(model, IDS)
        finally:
            handle.remove()


def test_a_parametrised_head_is_right_and_so_is_a_new_one() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    model = tiny("llama")
    with fused_forward(model):
        parametrize.register_parametrization(model.lm_head, "weight", Doubled())
        close(logps(model, IDS), plain(model, IDS))
        logps(model, IDS).sum().backward()
        assert model.lm_head.parametrizations.weight.original.grad.abs().sum() > 0
        parametrize.remove_parametrizations(model.lm_head, "weight")
        close(logps(model, IDS), plain(model, IDS))
        model.resize_token_embeddings(220)
        close(logps(model, IDS), plain(model, IDS))
    assert type(model.lm_head) is torch.nn.Linear
    fresh = tiny("llama")
    torch.nn.utils.parametrizations.weight_norm(fresh.lm_head)
    with fused_forward(fresh):
        close(logps(fresh, IDS), plain(fresh, IDS))
    torch.nn.utils.parametrize.remove_parametrizations(fresh.lm_head, "weight")


def test_looking_at_the_head_costs_microseconds() -> None:
    import timeit

    from qempo_fast.integrations.hf import _head

    model = tiny("llama")
    found = min(timeit.repeat(lambda: _head.find_head(model), number=200, repeat=9))
    asked = min(timeit.repeat(lambda: model.get_output_embeddings(), number=200, repeat=9))
    assert found < 4 * asked  # measured: 1.5 to 2, the first of which is get_output_embeddings itself


# ---- models that do something to their logits, or to their labels


class Masked(transformers.LlamaForCausalLM):
    """One row of the head is no token: its logits are masked. One column of 211, in any context."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits[..., 200:201] = torch.finfo(out.logits.dtype).min
        return out


class Cut(Masked):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = transformers.LlamaForCausalLM.forward(self, *args, **kwargs)
        out.logits = out.logits[..., :208]
        return out


class Scaled(Masked):
    """By so little that log-probs are off by a hundredth."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = transformers.LlamaForCausalLM.forward(self, *args, **kwargs)
        out.logits = out.logits * 1.001
        return out


class Infinite(Masked):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = transformers.LlamaForCausalLM.forward(self, *args, **kwargs)
        out.logits[..., 7] = -torch.inf
        return out


class Twice(Masked):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = transformers.LlamaForCausalLM.forward(self, *args, **kwargs)
        self.lm_head(torch.zeros(1, 1, 32, dtype=self.lm_head.weight.dtype))
        return out


class Around(Masked):
    """Makes its logits without calling its head."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.t())


class Bidirectional(Masked):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        full = torch.zeros(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1], dtype=self.lm_head.weight.dtype)
        return transformers.LlamaForCausalLM.forward(self, input_ids, attention_mask=full, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Masked, "an architecture whose logits are its output head's, scaled and capped"),
        (Cut, r"whose logits are \(2, 16, 208\) where the head's are \(2, 16, 211\)"),
        (Scaled, "scaled and capped, got Scaled, log-probs off by 0.0"),
        (Infinite, "scaled and capped, got Infinite, log-probs off by inf"),
        (Twice, "calls its output head once, got Twice, which calls it 2 times"),
        (Around, "calls its output head once, got Around, which calls it 0 times"),
        (Bidirectional, "a causal model, whose hidden states do not depend on later tokens"),
    ],
)
def test_a_model_that_does_more_is_refused(kind: Any, message: str, dtype: torch.dtype) -> None:
    model = kind(tiny("llama").config).eval()
    model.load_state_dict(tiny("llama").state_dict())
    with pytest.raises(ValueError, match=f"model: wanted .*{message}"):
        fused_forward(model.to(dtype))
    assert type(model) is kind
    assert type(model.lm_head) is torch.nn.Linear


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 211}
    return transformers.BartForCausalLM(transformers.BartConfig(**sizes, is_decoder=True, init_std=0.3)).eval()


class Weighted(transformers.LlamaForCausalLM):
    """Its loss has a part that its log-probs do not have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.loss = None if out.loss is None else out.loss + 0.1
        return out


class Otherwise(transformers.LlamaForCausalLM):
    """Attends to fewer tokens at a call with labels."""

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids) if labels is None else torch.arange(input_ids.shape[1])[None] % 4 > 0
        return super().forward(input_ids, attention_mask=mask.expand_as(input_ids).long(), labels=labels, **kwargs)


def test_labels_are_refused_where_the_model_reads_them_otherwise() -> None:
    model = bart()
    with fused_forward(model):
        with pytest.raises(ValueError, match=r"labels: wanted None and shift_labels.* BartForCausalLM does not shift"):
            model(input_ids=IDS, labels=IDS)
        got = model(input_ids=IDS[:, :-1], shift_labels=IDS[:, 1:]).logps
    close(got, plain(model, IDS)[:, 1:])
    weighted = Weighted(tiny("llama").config).eval()
    with fused_forward(weighted), pytest.raises(ValueError, match=r"labels: .* Weighted's own loss is "):
        weighted(input_ids=IDS, labels=IDS)
    other = Otherwise(tiny("llama").config).eval()
    with (
        fused_forward(other),
        pytest.raises(ValueError, match=r"labels: .* other hidden states with labels than without"),
    ):
        other(input_ids=IDS, labels=IDS)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.BartConfig(**sizes, encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64)
    with pytest.raises(TypeError, match=r"model: wanted a decoder, .* got BartForConditionalGeneration"):
        fused_forward(transformers.BartForConditionalGeneration(config))


# ---- packed rows


def opt() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 16,
        "word_embed_proj_dim": 16,
    }
    return transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=50, init_std=0.5, **sizes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_mixes_packed_sequences_is_refused(dtype: torch.dtype) -> None:
    x = torch.randint(3, 50, (1, 10))
    cu_seqlens = torch.tensor([0, 4, 10])
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    model = opt().to(dtype)
    with fused_forward(model) as handle:
        whole = logps(model, x)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"cu_seqlens: wanted one sequence: .* OPTForCausalLM"):
                logps(model, x, cu_seqlens=cu_seqlens)
            with pytest.raises(ValueError, match="cu_seqlens: wanted one sequence"):
                model(input_ids=x, cu_seqlens=cu_seqlens)
            with pytest.raises(ValueError, match="position_ids: wanted one sequence"):
                logps(model, x, position_ids=positions)
        # Positions of one sequence are no packed row.
        assert torch.equal(logps(model, x, position_ids=torch.arange(10)[None]), whole)
        with pytest.raises(ValueError, match="cu_seqlens: wanted one sequence"):
            handle.check(packed=True)
    with fused_forward(model, check=False):
        assert logps(model, x, cu_seqlens=cu_seqlens).shape == (1, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_keeps_them_apart_is_asked_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    check = _verify.check_packed
    monkeypatch.setattr(_verify, "check_packed", lambda *a: asked.append(1) or check(*a))
    model = tiny("llama").to(dtype)
    packed = IDS.reshape(1, -1)
    with fused_forward(model):
        out = logps(model, packed, cu_seqlens=torch.tensor([0, 9, 18]))
        logps(model, packed, cu_seqlens=torch.tensor([0, 9, 18]))
        assert len(asked) == 1
        apart = torch.cat([logps(model, row[None]) for row in IDS], 1)
        model.set_attn_implementation("eager")
        logps(model, packed, cu_seqlens=torch.tensor([0, 9, 18]))
        assert len(asked) == 2  # other kernels, other masks
    error = (out - apart).abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 0.1)


# ---- the checks leave no trace


class Counting(transformers.LlamaForCausalLM):
    """A model with statistics that each forward pass changes, a module in eval mode, and dropout."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(3))
        self.frozen = torch.nn.Dropout(0.5).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += torch.rand(3)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_checks_leave_no_trace(autocast: bool) -> None:
    config = copy.deepcopy(tiny("llama").config)
    config.attention_dropout = 0.3
    torch.manual_seed(0)
    model = Counting(config).train()
    twin = copy.deepcopy(model)
    model.frozen.eval(), twin.frozen.eval()
    packed = IDS.reshape(1, -1)
    cu_seqlens = torch.tensor([0, 9, 18])
    results = []
    for m, check in ((model, True), (twin, False)):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            handle = fused_forward(m, check=check, grad="exact")
            assert not m.calls.any()
            assert all(p.grad is None for p in m.parameters())
            out = m(input_ids=packed, labels=packed, cu_seqlens=cu_seqlens)
            out.loss.backward()
        assert m.training
        assert not m.frozen.training
        results.append((out.logps, m.calls, torch.rand(2), *(p.grad for p in m.parameters())))
        handle.remove()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_check_takes_two_forward_passes_and_packed_rows_three() -> None:
    model, calls = tiny("llama"), []
    model.model.register_forward_hook(
        lambda m, args, kwargs, out: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with fused_forward(model):
        assert calls == [32, 32]
        logps(model, IDS.reshape(1, -1), cu_seqlens=torch.tensor([0, 9, 18]))
        assert calls == [32, 32, 9, 22, 22, 18]
