"""A demo of a few thousand weights: a Llama of twelve words that knows four cities. Test files take it as a plugin."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

from qempo_fast.demo.model import SplitModel
from qempo_fast.demo.task import PROMPT, Cities, Task
from qempo_fast.demo.train import Settings

WORDS = ["<eos>", "Ċ", "Paris", "Tokyo", "Sydney", "Lima", "Xyzzy", "Qwop", "Here", "are", "cities", "Foo"]
TINY = Settings(
    steps=40, samples=32, group_size=16, learning_rate=1e-2, trained_layers=1, max_tokens=4, evaluation_batches=2
)


class Words:
    """A tokenizer of twelve words."""

    all_special_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return [WORDS.index(w) for w in text.split() if w in WORDS]

    def get_vocab(self) -> dict[str, int]:
        return {w: i for i, w in enumerate(WORDS)}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(WORDS[i] for i in ids if i != 0).replace("Ċ", "\n")


@pytest.fixture(scope="module")
def cities() -> Cities:
    return Cities()


# What the tiny base model is taught to answer, and how often: 10 of 16 right, as the real one has about 0.6.
LESSONS = {"Paris": 4, "Tokyo": 2, "Sydney": 2, "Lima": 2, "Xyzzy": 2, "Qwop Foo": 2, "Foo Here are": 2}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    prompt = Words().encode(PROMPT)
    lines = [[*prompt, *Words().encode(text), 1] for text, n in LESSONS.items() for _ in range(n)]
    ids = torch.tensor([line + [0] * (len(prompt) + 4 - len(line)) for line in lines])
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def task(cities: Cities) -> Task:
    one_hot = torch.eye(97)  # texts of other letters are orthogonal, but for rare collisions
    return Task(Words(), cities, lambda texts: torch.stack([one_hot[sum(map(ord, t)) % 97] for t in texts]))


@pytest.fixture
def model(llama: LlamaForCausalLM, task: Task) -> SplitModel:
    return SplitModel(copy.deepcopy(llama), task.prompt, trained_layers=1, stop=task.stop, max_tokens=4)
