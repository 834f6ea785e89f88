"""Shared-prompt packing: the completions of one prompt in one row, so that the prompt is encoded once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import _check

Tokens = Sequence[int] | torch.Tensor

_PAD = -1
_IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_INT64 = 2**63 - 1


@dataclass(frozen=True)
class PackedPrompts:
    """B rows of L tokens, each a run of groups: a prompt, then its completions without their last tokens.

    A completion's last token predicts nothing and is not fed. S completions lie in the order given, prompt by prompt.

    Attributes:
        input_ids, position_ids: (B, L) int64; every completion's positions go on where its prompt's end.
        prompt: (B, L) int64, the number of each token's prompt; -1 in the padding at a row's end.
        completion: (B, L) int64, the number of each token's completion; -1 in prompts and padding.
        source: (N,) int64, where in the B * L tokens the hidden state lies that predicts each completion token.
        targets: (N,) int64, the completion tokens; with cu_seqlens what sequence_logps takes.
        cu_seqlens: (S + 1,) int64.
        separate_tokens: tokens that S rows of prompt and completion would feed, without padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    prompt: torch.Tensor
    completion: torch.Tensor
    source: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    separate_tokens: int

    def to(self, device: torch.device | str) -> PackedPrompts:
        """The same on another device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return PackedPrompts(**moved, separate_tokens=self.separate_tokens)

    def mask(self) -> torch.Tensor:
        """(B, 1, L, L) bool, True where query attends to key: own prompt, own completion, nothing later."""
        count, length = self.input_ids.shape
        place = torch.arange(length, dtype=torch.int64, device=self.input_ids.device)
        rows = torch.arange(count, dtype=torch.int64, device=self.input_ids.device)
        return _attends(self.prompt, self.completion, rows[:, None, None], None, place[:, None], place).unsqueeze(1)

    def block_mask(self) -> Any:
        """The same as flex_attention's BlockMask, which leaves out whole blocks of 128 x 128."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = self.input_ids.shape
        rule = partial(_attends, self.prompt, self.completion)
        # A plain function: create_block_mask looks at the signature of its rule.
        return create_block_mask(
            lambda b, h, q, k: rule(b, h, q, k), rows, None, length, length, device=self.input_ids.device
        )

    def model_inputs(self, model: torch.nn.Module) -> dict[str, Any]:
        """Keyword arguments for a transformers causal LM (or its base model), with the mask its attention takes.

        flex_attention gets a BlockMask; sdpa a bool mask and eager an additive one, (B, 1, L, L) both.

        Raises:
            ValueError: a model whose attention cannot follow the mask (flash-attn, sliding windows shorter than a
                prompt with its longest completion, recurrent layers), or that takes no position_ids.
        """
        model = getattr(model, "get_base_model", lambda: model)()  # of a PEFT model
        text_config = getattr(getattr(model, "config", None), "get_text_config", None)
        if not callable(text_config):
            _check.bad_type("model", "a transformers model with a config", type(model).__name__)
        config: Any = text_config()
        span = int(self.position_ids.max()) + 1 if self.position_ids.numel() else 0
        _check_model(model, config, span)
        attention = config._attn_implementation
        if attention == "flex_attention":
            mask = self.block_mask()
        elif attention == "sdpa":
            mask = self.mask()
        else:
            # Eager attention adds its mask to the scores: a bool mask would add 1 where it should allow, and run.
            dtype = next(model.parameters()).dtype
            seen = self.mask()
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        ids = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {**ids, "attention_mask": mask, "use_cache": False}

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D): the rows of hidden (B, L, D) that predict targets; differentiable."""
        _check.tensor("hidden", hidden, shape=(*self.input_ids.shape, -1), device=self.source.device)
        return hidden.flatten(0, 1)[self.source]


def pack_prompts(
    prompts: Sequence[Tokens],
    completions: Sequence[Sequence[Tokens]],
    *,
    max_length: int | None = None,
    pad_id: int = 0,
) -> PackedPrompts:
    """Groups of completions as rows in which every prompt stands once.

        p = pack_prompts(prompts, completions)
        hidden = model.model(**p.model_inputs(model)).last_hidden_state
        out = qf.sequence_logps(p.select(hidden), model.lm_head.weight, p.targets, p.cu_seqlens)

    For a prompt of P tokens and k completions of C, P + k (C - 1) tokens are fed instead of k (P + C - 1). The
    log-probs are those of separate rows: a completion sees its prompt and itself, at the positions it would have.

    Args:
        prompts: (G,) token ids of each prompt, at least one token each.
        completions: (G,) lists, the completions of each prompt; one without tokens has log-prob 0.
        max_length: longest row; groups are put into as few rows as first-fit by falling length finds. None: one row.
        pad_id: fills rows up to the longest.

    Returns:
        PackedPrompts, on CPU.

    Raises:
        TypeError, ValueError: an empty prompt, another number of completion lists than prompts, token ids or a pad_id
            that are not non-negative integers, a group longer than max_length.
    """
    _many("prompts", prompts, "prompts")
    _many("completions", completions, "lists of completions, one for each prompt")
    (pad_id,) = _ids("pad_id", [pad_id])
    if len(prompts) != len(completions):
        _check.bad_value("completions", f"one list for each of {len(prompts)} prompts", f"{len(completions)} lists")
    heads = [_ids(f"prompts[{g}]", prompt) for g, prompt in enumerate(prompts)]
    for g, head in enumerate(heads):
        if not head:
            _check.bad_value(f"prompts[{g}]", "at least one token, which predicts the completions' first", "none")
    for g, group in enumerate(completions):
        _many(f"completions[{g}]", group, "completions of one prompt")
    tails = [[_ids(f"completions[{g}]", c) for c in group] for g, group in enumerate(completions)]
    lengths = [len(h) + sum(max(len(c) - 1, 0) for c in group) for h, group in zip(heads, tails, strict=True)]
    if max_length is not None:
        _check.integer("max_length", max_length, low=1)
        if lengths and max(lengths) > max_length:
            _check.bad_value("max_length", f"at least {max(lengths)}, the longest group", max_length)
    rows = _first_fit(lengths, max_length)
    width = max((sum(lengths[g] for g in row) for row in rows), default=0)
    first = [sum(map(len, tails[:g])) for g in range(len(heads))]
    cells = torch.full((4, len(rows), width), _PAD, dtype=torch.int64, device="cpu")
    cells[0], cells[1] = pad_id, 0
    source: dict[int, list[int]] = {}
    for r, row in enumerate(rows):
        line: list[tuple[int, int, int, int]] = []  # token, position, prompt, completion
        for g in row:
            line += ((t, i, g, _PAD) for i, t in enumerate(heads[g]))
            last = r * width + len(line) - 1
            for s, tail in enumerate(tails[g], first[g]):
                start = r * width + len(line)
                line += ((t, len(heads[g]) + i, g, s) for i, t in enumerate(tail[:-1]))
                source[s] = ([last, *range(start, start + len(tail) - 1)])[: len(tail)]
        cells[:, r, : len(line)] = torch.tensor(line, dtype=torch.int64, device="cpu").T
    flat = [c for group in tails for c in group]
    counts = torch.tensor([len(c) for c in flat], dtype=torch.int64, device="cpu")
    return PackedPrompts(
        input_ids=cells[0],
        position_ids=cells[1],
        prompt=cells[2],
        completion=cells[3],
        source=torch.tensor([i for s in range(len(flat)) for i in source[s]], dtype=torch.int64, device="cpu"),
        targets=torch.tensor([t for c in flat for t in c], dtype=torch.int64, device="cpu"),
        cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        separate_tokens=sum(len(h) + max(len(c) - 1, 0) for h, group in zip(heads, tails, strict=True) for c in group),
    )


def _attends(prompt: torch.Tensor, completion: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
    own = (completion[b, k] == _PAD) | (completion[b, k] == completion[b, q])
    return (q >= k) & (prompt[b, q] == prompt[b, k]) & own


def _many(name: str, x: Any, of: str) -> None:
    """Refuse what is no list of sequences; a tensor of two dimensions and more is one."""
    if isinstance(x, torch.Tensor):
        _check.tensor(name, x, dtypes=_IDS)
        if x.ndim < 2:
            _check.bad_value(name, f"a list of {of}", f"a tensor of shape {tuple(x.shape)}")
    elif not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
        _check.bad_type(name, f"a list of {of}", type(x).__name__)


def _ids(name: str, tokens: Any) -> list[int]:
    if isinstance(tokens, torch.Tensor):
        _check.tensor(name, tokens, dtypes=_IDS, ndim=1)
        _check.present(name, tokens)
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence) or isinstance(tokens, (str, bytes)):
        _check.bad_type(name, "a sequence of token ids or a 1-dimensional tensor", type(tokens).__name__)
    for i in tokens:
        _check.integer(name, i, low=0)
    if tokens and max(tokens) > _INT64:
        _check.bad_value(name, "token ids that int64 holds", max(tokens))
    return [int(i) for i in tokens]


def _first_fit(lengths: list[int], room: int | None) -> list[list[int]]:
    """Groups of each row; with room None all in one, in order."""
    if room is None:
        return [list(range(len(lengths)))] if lengths else []
    rows: list[list[int]] = []
    left: list[int] = []
    for g in sorted(range(len(lengths)), key=lambda g: -lengths[g]):
        r = next((r for r, space in enumerate(left) if space >= lengths[g]), len(rows))
        if r == len(rows):
            rows.append([])
            left.append(room)
        rows[r].append(g)
        left[r] -= lengths[g]
    return rows


def _check_model(model: torch.nn.Module, config: Any, span: int) -> None:
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        _check.bad_value("model", "a model whose forward takes position_ids", name)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("flex_attention", "sdpa", "eager"):
        wanted = "attention by flex_attention, sdpa or eager: model.set_attn_implementation('sdpa')"
        _check.bad_value("model", wanted, f"{name} with {attention}")
    kinds = set(getattr(config, "layer_types", None) or ())
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    if kinds - known:
        _check.bad_value("model", "attention layers only, which a mask can steer", f"{name} with {kinds - known}")
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    if getattr(config, "use_sliding_window", True) is False:
        windows = []
    window = min((w for w in windows if w), default=span)
    # A mask of four dimensions takes the place of the model's own, window and all: equal only while none would cut.
    if kinds != {"full_attention"} and window < span:
        wanted = f"attention windows of at least {span}, the longest prompt with completion"
        _check.bad_value("model", wanted, f"{name} with {window}")
