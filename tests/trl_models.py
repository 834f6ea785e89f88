"""A tiny model with a tokenizer of words, configs that run on CPU, and data for the tests of the TRL trainers."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import DPOConfig, GRPOConfig

WORDS = [f"w{i}" for i in range(45)]
QUIET = {"use_cpu": True, "report_to": "none", "dataloader_pin_memory": False, "bf16": False, "disable_tqdm": True}
QUIET |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "gradient_checkpointing": False}

logging.getLogger("transformers").setLevel(logging.ERROR)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def new_model(folder: Path) -> str:
    """Path of a two-layer Llama: TRL loads reference models from it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "vocab_size": len(tokenizer()), "max_position_embeddings": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # away from the uniform distribution
    model.save_pretrained(folder)
    return str(folder)


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def perturbed(path: str) -> Any:
    """A policy that differs from its reference, which TRL loads from path."""
    model = load(path)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def some_words(count: int, generator: torch.Generator) -> str:
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator))


def pairs(n: int = 8) -> Dataset:
    g = torch.Generator().manual_seed(3)
    rows = [{"prompt": some_words(3, g) + " ", "chosen": some_words(2 + i % 3, g)} for i in range(n)]
    return Dataset.from_list([{**row, "rejected": some_words(1 + i % 4, g)} for i, row in enumerate(rows)])


def prompts(n: int = 8) -> Dataset:
    g = torch.Generator().manual_seed(4)
    return Dataset.from_list([{"prompt": some_words(2 + i % 2, g) + " "} for i in range(n)])


def stored_groups(sizes: tuple[int, ...] = (3, 2, 4, 3)) -> Dataset:
    g = torch.Generator().manual_seed(9)
    rows = []
    for i, k in enumerate(sizes):
        texts = [some_words(1 + (i + j) % 4, g) for j in range(k)]
        rows.append({"prompt": some_words(2, g), "responses": texts, "rewards": torch.rand(k, generator=g).tolist()})
    return Dataset.from_list(rows)


def dpo_config(folder: Path, **kw: Any) -> DPOConfig:
    given = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 16}
    return DPOConfig(str(folder / "out"), **{**QUIET, **given, **kw})


def grpo_config(folder: Path, **kw: Any) -> GRPOConfig:
    given = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 2}
    return GRPOConfig(str(folder / "out"), **{**QUIET, **given, **kw})


def word_reward(completions: list[str], **_: Any) -> list[float]:
    """The share of even words: graded, and different between completions."""
    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit()) / (1 + len(c.split())) for c in completions]


def word_counts(texts: list[str]) -> torch.Tensor:
    """(S, d): how often each word occurs, and 1."""
    rows = [[1.0, *(text.split().count(word) for word in WORDS)] for text in texts]
    return torch.tensor(rows)


def history(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]
