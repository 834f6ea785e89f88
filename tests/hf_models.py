"""Tiny models of transformers of each kind of head, rows for them, and what the logits path makes of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "vocab_size": 211}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What each brings: a plain head, q and k norms, softcap with windows, logit scale and a tied head, division by a
# scaling, a bias on the head, a tied head with learnt positions.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 2.0, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "phi": ("PhiConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def tiny(name: str, attention: str | None = None) -> Any:
    kind, extra = CONFIGS[name]
    sizes = {"vocab_size": 211, "bos_token_id": 1, "eos_token_id": 2} if name == "gpt2" else SIZES
    config = getattr(transformers, kind)(**sizes, **extra, attn_implementation=attention)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger logits than a fresh model has: a missed scale or cap shows
        model.get_output_embeddings().weight.mul_(20)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model.eval()


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels of three right-padded rows, one without any label."""
    ids = torch.randint(3, 211, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0  # fewer than the window of gemma2: transformers gives NaN to a row that sees only padding
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    labels[2] = -100
    return ids, mask, labels


def from_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probs and entropies as the logits path has them, shaped like labels."""
    log_p = torch.log_softmax(logits[:, :-1], -1)
    targets = labels[:, 1:]
    logps = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets != -100, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1).where(targets != -100, 0.0)
    return tuple(torch.nn.functional.pad(x, (1, 0)) for x in (logps, entropy))


def gradients(model: Any, logps: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).view_as(logps)
    ((weights * logps).sum() + 0.3 * (weights * entropy).sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def logps(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, **kwargs).logps


def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return from_logits(model(input_ids=ids).logits.float(), ids)[0]


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


IDS = torch.randint(3, 211, (2, 9), generator=torch.Generator().manual_seed(3))
