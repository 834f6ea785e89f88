"""What the TRL examples share: a model that trains in seconds on a CPU, its tokenizer of words, and a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = ["red", "blue", "green", "yellow", "white", "black", "pink", "brown"]
OTHERS = ["cat", "dog", "house", "tree", "river", "stone", "bread", "salt", "spoon", "chair", "train", "cloud"]
OTHERS += ["seven", "north", "paper", "glass"]
PROMPT = "colours :"
# What every example here sets: no log service, no checkpoint, and the CPU where there is no GPU.
QUIET = {
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
QUIET |= {"dataloader_pin_memory": False, "logging_steps": 10}


def model_and_tokenizer(name: str | None, folder: Path) -> tuple[str, Any]:
    """A path that TRL loads policy and reference from, and the tokenizer: of a real model, or of one made here."""
    if name:
        return name, AutoTokenizer.from_pretrained(name, padding_side="left")
    words = ["<pad>", "<eos>", "<unk>", *PROMPT.split(), *COLOURS, *OTHERS]
    split = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, padding_side="left", **tokens)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **ids)).save_pretrained(folder)
    return str(folder), tokenizer


def prompts(n: int) -> Dataset:
    return Dataset.from_list([{"prompt": PROMPT + " "}] * n)


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of the words that are colours."""
    return [sum(word in COLOURS for word in text.split()) / max(len(text.split()), 1) for text in completions]


def embed(texts: list[str]) -> torch.Tensor:
    """(S, d): how often each known word stands in a text, and 1; a sentence embedder in real work."""
    words = COLOURS + OTHERS
    return torch.tensor([[1.0, *(text.split().count(word) for word in words)] for text in texts])
