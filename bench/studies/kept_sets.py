"""Importance ratios of a trainer that scores a truncated sampler's draws over the whole vocabulary and the kept sets.

    python -P bench/studies/kept_sets.py --json bench/results/kept_sets.json

SmolLM2-135M, float32, one policy for both: each ratio exp(logp of the trainer - logp of the sampler) should be 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import qempo_fast as qf
from studies.table import record
from suite import heads
from suite.provenance import environment

RULES: tuple[dict[str, Any], ...] = ({"top_p": 0.8}, {"top_p": 0.95}, {"top_k": 20}, {"top_k": 50})
ROWS, PROMPT, LENGTH = 16, 16, 64


def sampled(model: Any, prompt: torch.Tensor, rule: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, qf.Support]:
    """Tokens (ROWS, LENGTH), the sampler's log-probs of them, and the sets, row after row."""
    generator = torch.Generator().manual_seed(0)
    ids, cache, tokens, logps, steps = prompt, None, [], [], []
    for _ in range(LENGTH):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        kept = qf.Support.from_logits(logits, **rule)
        mask = torch.zeros_like(logits, dtype=torch.bool)
        mask[torch.arange(ROWS).repeat_interleave(kept.offsets.diff()), kept.ids] = True
        log_p = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
        ids = torch.multinomial(log_p.exp(), 1, generator=generator)
        tokens.append(ids)
        logps.append(log_p.gather(1, ids))
        steps.append(kept)
    order = torch.arange(LENGTH * ROWS).view(LENGTH, ROWS).T.flatten()
    return torch.cat(tokens, 1), torch.cat(logps, 1), qf.Support.cat(steps).rows(order)


def rows(model: Any, prompt: torch.Tensor) -> Iterator[dict[str, Any]]:
    for rule in RULES:
        tokens, sampler, support = sampled(model, prompt, rule)
        hidden = model.model(torch.cat([prompt, tokens], 1)).last_hidden_state[:, PROMPT - 1 : -1]
        whole = qf.linear_logps(hidden, model.lm_head.weight, tokens).logps
        kept = qf.linear_logps(hidden, model.lm_head.weight, tokens, support=support).logps
        ratios = {"whole": (whole - sampler).exp(), "kept": (kept - sampler).exp()}
        yield {
            **{"top_p": 1.0, "top_k": 0, **rule},
            "tokens": tokens.numel(),
            "set_size": len(support.ids) / tokens.numel(),
            **{f"mean_ratio_{name}": float(x.mean()) for name, x in ratios.items()},
            **{f"least_ratio_{name}": float(x.min()) for name, x in ratios.items()},
            "mean_ratio_sequence_whole": float((whole - sampler).sum(1).exp().mean()),
            "mean_ratio_sequence_kept": float((kept - sampler).sum(1).exp().mean()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("kept_sets.json"))
    args = parser.parse_args()
    model, tokenizer = heads.smollm2()
    prompt = heads.english(tokenizer, ROWS * PROMPT).view(ROWS, PROMPT)
    provenance = {**environment(("transformers",)), "rows": ROWS, "prompt": PROMPT, "length": LENGTH}
    with torch.no_grad():
        record(args.json, provenance, rows(model.eval(), prompt))


if __name__ == "__main__":
    main()
