"""What the examples here share: a language model that trains in seconds, and a task with many right answers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, ANSWER = 32, 4
PROMPTS = torch.arange(4)[:, None]  # one token each


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **sizes))


@torch.no_grad()
def sample(model: torch.nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """(S, prompt + ANSWER) token ids: one answer after each of the prompts (S, prompt), at temperature 1."""
    ids = prompts
    for _ in range(ANSWER):
        p = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids


def answer_labels(ids: torch.Tensor) -> torch.Tensor:
    """ids with -100 where the prompt is."""
    return ids.index_fill(1, torch.arange(ids.shape[1] - ANSWER), -100)


def rewards(ids: torch.Tensor) -> torch.Tensor:
    """(S,): the share of the answer's tokens among the last four of the vocabulary; 256 answers earn 1."""
    return (ids[:, -ANSWER:] >= VOCABULARY - 4).float().mean(1)


def embed(ids: torch.Tensor) -> torch.Tensor:
    """(S, VOCABULARY): how often each token stands in the answer; what DQO takes for the meaning of an answer."""
    return torch.nn.functional.one_hot(ids[:, -ANSWER:], VOCABULARY).float().sum(1)


def report(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """before and after: (S, prompt + ANSWER) ids of the untrained and the trained model."""
    first, last = (float(rewards(ids).mean()) for ids in (before, after))
    distinct = len(torch.unique(after[:, -ANSWER:], dim=0))
    print(f"{name}: reward {first:.2f} -> {last:.2f}, {distinct} distinct answers in {len(after)}")
