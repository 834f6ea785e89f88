"""The demo's language model, split so that what training never changes is computed once.

The lower layers (the trunk) and the tied head stay frozen and only the top layers are trained. Every answer continues
the same prompt, so the trunk reads the prompt once per process and each answer once, while it is sampled.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

import qempo_fast as qf

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(package)
    return Path(spec.origin).parent


def load_smollm2(folder: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, from the GGUF file in folder; nothing is downloaded.

    De-quantising takes 15 s, so the result (514 MiB) is kept under $XDG_CACHE_HOME or ~/.cache and read in 0.3 s later.
    """
    digest = hashlib.sha256((folder / GGUF_NAME).read_bytes()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qempo_fast"
    kept = root / f"smollm2-{digest}-transformers-{transformers.__version__}"
    # transformers draws bars of its own on stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        if kept.is_dir():
            model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
            return model, AutoTokenizer.from_pretrained(kept)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    _keep(model, tokenizer, kept)
    return model, tokenizer


def _keep(model: Any, tokenizer: Any, kept: Path) -> None:
    """Write model and tokenizer to the folder kept, whole or not at all."""
    # A cache that cannot be written costs the 15 s again at the next start, and changes nothing else.
    with contextlib.suppress(OSError, SafetensorError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=kept.parent))
        try:
            config = copy.deepcopy(model.config)
            del config.quantization_config  # the weights are float32 now, and save_pretrained refuses GGUF
            save_model(model, str(part / "model.safetensors"))
            config.save_pretrained(part)
            tokenizer.save_pretrained(part)
            part.rename(kept)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@dataclass(frozen=True)
class Rollout:
    """S sampled answers, packed: answer i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]], its stop token included."""

    tokens: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (S + 1,) int64
    trunk: torch.Tensor  # (N - S, D): the trunk's hidden state of every token but each answer's last

    def answers(self) -> list[list[int]]:
        return [part.tolist() for part in self.tokens.split(self.cu_seqlens.diff().tolist())]


class SplitModel:
    """A Llama cut in two, and the one prompt that all answers continue.

    Attributes:
        head: (V, D), frozen.
        reference: the top layers as loaded, frozen; ``new_policy`` copies them.
    """

    def __init__(
        self, model: LlamaForCausalLM, prompt: list[int], *, trained_layers: int, stop: list[int], max_tokens: int
    ) -> None:
        model.requires_grad_(False).eval()
        self.head: torch.Tensor = model.lm_head.weight
        self._stop, self._max_tokens = torch.tensor(stop, dtype=torch.int64, device="cpu"), max_tokens
        self._trunk, cut = model.model, len(model.model.layers) - trained_layers
        # The top layers become a Llama of their own, which is fed hidden states and so needs no vocabulary.
        config = copy.deepcopy(model.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = trained_layers, 1, None
        self.reference = LlamaModel(config).requires_grad_(False).eval()
        self.reference.layers.load_state_dict(self._trunk.layers[cut:].state_dict())
        self.reference.norm.load_state_dict(self._trunk.norm.state_dict())
        self._trunk.layers, self._trunk.norm = self._trunk.layers[:cut], nn.Identity()
        self._trunk.config.num_hidden_layers = cut
        with torch.no_grad():
            self._prompt, self._trunk_cache = _read(
                self._trunk, input_ids=torch.tensor([prompt], dtype=torch.int64, device="cpu")
            )  # (1, P, D)

    def new_policy(self) -> LlamaModel:
        return copy.deepcopy(self.reference).requires_grad_(True)

    @torch.no_grad()
    def sample(self, policy: LlamaModel, n: int, generator: torch.Generator, *, temperature: float = 1.0) -> Rollout:
        """n answers, each ended by a stop token or by max_tokens; temperature is of every token."""
        top, cache_top = _read(policy, inputs_embeds=self._prompt)
        out = top[:, -1].expand(n, -1)
        caches = copy.deepcopy(self._trunk_cache), cache_top
        for cache in caches:
            cache.batch_repeat_interleave(n)
        alive = torch.arange(n, dtype=torch.int64, device="cpu")
        rows, tokens, fed, trunk = [], [], [], []
        for step in range(self._max_tokens):
            token = _draw(out @ self.head.T / temperature, generator)
            rows.append(alive)
            tokens.append(token)
            go_on = torch.isin(token, self._stop, invert=True).nonzero()[:, 0]
            if step == self._max_tokens - 1 or go_on.numel() == 0:
                break
            # Answers that ended leave the batch: at about 3 tokens each they would be over half of it.
            alive = alive[go_on]
            for cache in caches:
                cache.batch_select_indices(go_on)
            hidden = _step(self._trunk, caches[0], input_ids=token[go_on, None])
            out = _step(policy, caches[1], inputs_embeds=hidden)[:, 0]
            fed.append(alive)
            trunk.append(hidden[:, 0])
        row = torch.cat(rows)
        order, order_fed = row.argsort(stable=True), torch.cat([row[:0], *fed]).argsort(stable=True)
        lengths = torch.bincount(row, minlength=n)
        hidden = torch.cat([self._prompt[0, :0], *trunk])[order_fed]
        return Rollout(torch.cat(tokens)[order], _offsets(lengths), hidden)

    def logps(self, policy: LlamaModel, rollout: Rollout, *, temperature: float = 1.0) -> qf.SequenceLogps:
        """Log-probs of the answers under policy, differentiable in its parameters.

        All answers ride in one row behind the prompt, without padding: each sees the prompt and itself.
        """
        prompt, lengths = self._prompt.shape[1], rollout.cu_seqlens.diff()
        fed = _offsets(lengths - 1)
        answer = torch.repeat_interleave(torch.arange(lengths.numel(), dtype=torch.int64, device="cpu"), lengths - 1)
        place = torch.arange(answer.numel(), dtype=torch.int64, device="cpu") - fed[answer]
        owner = torch.cat([torch.full((prompt,), -1, dtype=torch.int64, device="cpu"), answer])
        mask = ((owner == owner[:, None]) | (owner == -1)).tril()
        hidden = policy(
            inputs_embeds=torch.cat([self._prompt, rollout.trunk[None]], 1),
            position_ids=torch.cat([torch.arange(prompt, dtype=torch.int64, device="cpu"), prompt + place])[None],
            attention_mask=mask[None, None],
            use_cache=False,
        ).last_hidden_state[0]
        # A token is predicted one position earlier, and each answer's first one at the prompt's last position.
        source = torch.empty_like(rollout.tokens)
        first = rollout.cu_seqlens[:-1]
        source[first] = prompt - 1
        later = torch.ones_like(source, dtype=torch.bool).index_fill(0, first, False)
        source[later] = prompt + torch.arange(answer.numel(), dtype=torch.int64, device="cpu")
        return qf.sequence_logps(hidden[source], self.head, rollout.tokens, rollout.cu_seqlens, temperature=temperature)


def _read(model: LlamaModel, **inputs: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    cache = DynamicCache(config=model.config)
    return _step(model, cache, **inputs), cache


def _step(model: LlamaModel, cache: DynamicCache, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution; torch.multinomial draws V exponentials a row for it."""
    cdf = torch.softmax(logits, -1).cumsum(-1)
    u = torch.rand(len(logits), 1, generator=generator, dtype=torch.float32, device="cpu") * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0))
