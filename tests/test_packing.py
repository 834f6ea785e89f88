"""Shared-prompt packing: log-probs and gradients of the separate rows, on models that transformers ships."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen3Config

import qempo_fast as qf
from qempo_fast.packing import PackedPrompts, pack_prompts

PROMPTS = [[5, 6, 7, 8, 9], [3], [11, 12, 13]]
# A completion of one token (nothing of it is fed), one without tokens, two alike, and two of one prompt of a token.
COMPLETIONS = [[[1, 2, 3], [4], [1, 2, 3, 9]], [[7, 7], [8, 2, 1]], [[], [14, 15]]]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "qwen3": Qwen3Config(**SIZES, **HEADS, head_dim=8),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=32),  # learned positions, tied head
}


def build(config: Any, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    # Tiny initial weights make nearly uniform predictions, where a wrong mask hardly shows.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def separate(model: Any) -> torch.Tensor:
    """(S,) log-probs of each completion in a row of its own, from logits."""
    out = []
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in group:
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            rows = logits.log_softmax(-1).gather(1, torch.tensor(completion, dtype=torch.int64)[:, None])
            out.append(rows.sum())
    return torch.stack(out)


def packed(model: Any, p: PackedPrompts) -> qf.SequenceLogps:
    hidden = model.base_model(**p.model_inputs(model)).last_hidden_state
    return qf.sequence_logps(p.select(hidden), model.lm_head.weight, p.targets, p.cu_seqlens)


@pytest.mark.parametrize(
    ("name", "attention", "max_length"),
    [
        ("llama", "sdpa", None),  # all prompts in one row
        ("llama", "eager", 14),  # a batch of rows with padding, additive mask
        ("qwen3", "sdpa", 14),
        ("gpt2", "sdpa", 14),
        ("gpt2", "eager", None),
    ],
)
def test_log_probs_and_gradients_are_those_of_separate_rows(name: str, attention: str, max_length: int | None) -> None:
    model = build(CONFIGS[name], attention)
    p = pack_prompts(PROMPTS, COMPLETIONS, max_length=max_length, pad_id=19)
    assert len(p.input_ids) == (1 if max_length is None else 2)
    truth = separate(model)
    assert truth.std() > 1  # not all the same number
    out = packed(model, p)
    # Llama's eager softmax is float32 whatever the model's dtype, and sums the zeros of other completions in another
    # order, which one depends on the processor: with AVX2 the log-probs differ by 5e-7.
    rounding = 1e-5 if (name, attention) == ("llama", "eager") else 1e-11
    torch.testing.assert_close(out.logps, truth, rtol=0, atol=rounding)
    assert out.lengths.tolist() == [3, 1, 4, 2, 3, 0, 2]
    coefficients = torch.linspace(-1, 2, len(truth), dtype=torch.float64)
    wanted = torch.autograd.grad((truth * coefficients).sum(), list(model.parameters()))
    found = torch.autograd.grad((out.logps * coefficients).sum(), list(model.parameters()))
    # RMSNorm rounds to float32 whatever the model's dtype; GPT-2's layer norm does not.
    tolerance = 1e-10 if name == "gpt2" else 1e-5
    for (parameter, _), a, b in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, n=parameter: f"{n}: {m}")


def test_flex_attention_gives_the_same() -> None:
    # In float32, for which flex_attention has a CPU path, forward only.
    model = build(CONFIGS["llama"], "flex_attention", torch.float32)
    p = pack_prompts(PROMPTS, COMPLETIONS, max_length=14)
    with torch.no_grad():
        out = packed(model, p).logps
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(out, packed(model, p).logps, rtol=0, atol=2e-4)


def test_the_block_mask_is_the_mask() -> None:
    from torch.nn.attention.flex_attention import create_mask

    prompts = [list(range(1, n)) for n in (150, 3, 40)]
    completions = [[list(range(1, n)) for n in (70, 90)], [[1, 2], [3]], [list(range(1, 200))]]
    p = pack_prompts(prompts, completions, max_length=320)
    blocks, (rows, length) = p.block_mask(), p.input_ids.shape
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, device="cpu"), p.mask())
    assert blocks.to_dense().sum() < blocks.to_dense().numel()
    wanted = torch.nn.functional.pad(p.mask(), (0, -length % 128, 0, -length % 128))
    seen = wanted.unflatten(2, (-1, 128)).unflatten(4, (-1, 128)).any(5).any(3)
    assert torch.equal(blocks.to_dense().bool(), seen)


def test_the_mask_by_hand() -> None:
    p = pack_prompts([[1, 2], [3]], [[[4, 5], [6, 7, 8]], [[9, 9]]])
    assert p.input_ids.tolist() == [[1, 2, 4, 6, 7, 3, 9]]
    assert p.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert p.source.tolist() == [1, 2, 1, 3, 4, 5, 6]
    assert p.targets.tolist() == [4, 5, 6, 7, 8, 9, 9]
    assert p.cu_seqlens.tolist() == [0, 2, 5, 7]
    seen = ["1", "11", "111", "1101", "11011", "000001", "0000011"]
    assert p.mask()[0, 0].int().tolist() == [[int(c) for c in row.ljust(7, "0")] for row in seen]
    # Separate rows feed 2 + 1, 2 + 2 and 1 + 1 tokens.
    assert (p.input_ids.numel(), p.separate_tokens) == (7, 9)


def test_rows_hold_whole_groups_and_no_more_than_max_length() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (25, 4), generator=generator).tolist()
    prompts = [torch.arange(a) for a, *_ in sizes]
    completions = [[list(range(n)) for n in rest] for _, *rest in sizes]
    p = pack_prompts(prompts, completions, max_length=128)
    fed = sum(a + sum(n - 1 for n in rest) for a, *rest in sizes)
    assert p.input_ids.shape[1] <= 128
    assert int((p.prompt >= 0).sum()) == fed
    homes = [set((p.prompt == g).any(1).nonzero().flatten().tolist()) for g in range(25)]
    assert all(len(home) == 1 for home in homes)
    # First-fit by falling length stays within 11/9 of the best, which holds at least this many.
    assert len(p.input_ids) <= -(-fed // 128) * 11 / 9 + 1
    assert p.cu_seqlens.diff().tolist() == list(itertools.chain.from_iterable(rest for _, *rest in sizes))


def test_no_groups_are_no_rows() -> None:
    p = pack_prompts([], [])
    assert (p.input_ids.numel(), p.targets.shape, p.cu_seqlens.tolist()) == (0, (0,), [0])


def test_packing_heeds_no_default_of_torch() -> None:
    wanted = pack_prompts(PROMPTS, COMPLETIONS, max_length=14)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    try:
        p = pack_prompts(PROMPTS, COMPLETIONS, max_length=14)
        mask = p.mask()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for name, x in vars(wanted).items():
        assert not isinstance(x, torch.Tensor) or torch.equal(getattr(p, name), x), name
    assert torch.equal(mask, wanted.mask())


def test_a_tensor_of_prompts_is_a_list_of_them() -> None:
    p = pack_prompts(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[[5, 6]], [[7, 8]]]))
    assert torch.equal(p.input_ids, pack_prompts([[1, 2], [3, 4]], [[[5, 6]], [[7, 8]]]).input_ids)


@pytest.mark.parametrize(
    ("prompts", "completions", "settings", "error", "message"),
    [
        ([[1]], [], {}, ValueError, "^completions: wanted one list for each of 1 prompts"),
        ([[1], []], [[[1]], [[1]]], {}, ValueError, r"^prompts\[1\]: wanted at least one token"),
        ([[1]], [[[1.5]]], {}, TypeError, r"^completions\[0\]: wanted an int, got float"),
        ([[-3]], [[[1]]], {}, ValueError, r"^prompts\[0\]: wanted an int of at least 0"),
        (["text"], [[[1]]], {}, TypeError, r"^prompts\[0\]: wanted a sequence of token ids"),
        ([[1, 2]], [[[1, 2, 3]]], {"max_length": 3}, ValueError, "^max_length: wanted at least 4"),
        ([[1, 2]], [[[1]]], {"max_length": "3"}, TypeError, "^max_length: wanted an int"),
        ([[1]], [[[1, 2]]], {"pad_id": None}, TypeError, "^pad_id: wanted an int, got NoneType"),
        ([[1]], [[[1, 2]]], {"pad_id": 1.5}, TypeError, "^pad_id: wanted an int, got float"),
        ([[1]], [[[1, 2]]], {"pad_id": True}, TypeError, "^pad_id: wanted an int, got bool"),
        ([[1]], [[[1, 2]]], {"pad_id": -1}, ValueError, "^pad_id: wanted an int of at least 0, got -1"),
        ([[1]], [[[1, 2]]], {"pad_id": 2**63}, ValueError, "^pad_id: wanted "),
        ([[2**63]], [[[1]]], {}, ValueError, r"^prompts\[0\]: wanted "),
        (None, [], {}, TypeError, "^prompts: wanted a list of prompts, got NoneType"),
        ("ab", [[[1]], [[1]]], {}, TypeError, "^prompts: wanted a list of prompts, got str"),
        (torch.tensor([1]), [[[1]]], {}, ValueError, "^prompts: wanted a list of prompts, got a tensor"),
        ([[1]], None, {}, TypeError, "^completions: wanted a list of lists"),
        ([[1]], [None], {}, TypeError, r"^completions\[0\]: wanted a list of completions"),
        ([[1]], [[1, 2]], {}, TypeError, r"^completions\[0\]: wanted a sequence of token ids"),
        ([b"ab"], [[[1]]], {}, TypeError, r"^prompts\[0\]: wanted a sequence of token ids"),
        ([torch.ones(2)], [[[1]]], {}, TypeError, r"^prompts\[0\]: wanted uint8 or .*float32"),
        ([torch.ones(2, 2, dtype=torch.int64)], [[[1]]], {}, ValueError, r"^prompts\[0\]: wanted 1 dim"),
        ([torch.ones(2, dtype=torch.int64, device="meta")], [[[1]]], {}, ValueError, r"^prompts\[0\]: wanted values"),
    ],
)
def test_bad_input(prompts: Any, completions: Any, settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_prompts(prompts, completions, **settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SIZES, **HEADS, sliding_window=7), "windows of at least 8"),
        (MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4), "position_ids"),
    ],
)
def test_models_that_a_mask_cannot_steer_are_refused(config: Any, message: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"^model: wanted .*{message}"):
        pack_prompts(PROMPTS, COMPLETIONS).model_inputs(model)


def test_a_window_that_never_cuts_is_fine_and_flash_attention_is_not() -> None:
    model = build(MistralConfig(**SIZES, **HEADS, sliding_window=8))
    p = pack_prompts(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(packed(model, p).logps, separate(model), rtol=0, atol=1e-11)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"^model: wanted attention by flex_attention, .*flash_attention_2"):
        p.model_inputs(model)
