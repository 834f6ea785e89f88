"""Completions of one prompt in one row against rows of their own, on SmolLM2-135M: forward and backward of a step.

    python -P bench/studies/packing.py --json bench/results

Log-probs and the gradient of every weight, float32. All completions are equally long, so that the separate rows, too,
go without padding. Rows are checked against each other before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import qempo_fast as qf
from qempo_fast.packing import pack_prompts
from suite import heads
from suite.interleave import Step, add_ratios, interleaved, relative, require, timings
from suite.provenance import environment
from suite.results import result_path, save

# (prompt tokens, completions, tokens of each)
CASES = ((64, 8, 32), (256, 8, 32))
# float32 through 30 layers, relative Frobenius error of the log-probs and of all weights' gradients.
LIMITS = {"logps": 1e-5, "gradients": 1e-3}


def steps_of(model: Any, ids: torch.Tensor, prompt: int, k: int, length: int) -> tuple[dict[str, Step], dict[str, int]]:
    """Both providers on one case, and the tokens that each feeds."""
    completions = ids[prompt : prompt + k * length].reshape(k, length)
    packed = pack_prompts([ids[:prompt]], [list(completions)])
    rows = torch.cat([ids[:prompt].expand(k, -1), completions[:, :-1]], 1)
    leaves, head = list(model.parameters()), model.lm_head.weight

    def together() -> torch.Tensor:
        hidden = packed.select(model.model(**packed.model_inputs(model)).last_hidden_state)
        return qf.sequence_logps(hidden, head, packed.targets, packed.cu_seqlens).logps

    def apart() -> torch.Tensor:
        hidden = model.model(rows, use_cache=False).last_hidden_state[:, prompt - 1 :].flatten(0, 1)
        return qf.sequence_logps(hidden, head, packed.targets, packed.cu_seqlens).logps

    incoming = torch.linspace(-1, 1, k)
    steps = {"packed": Step(together, leaves, incoming), "separate rows": Step(apart, leaves, incoming)}
    return steps, {"packed": packed.input_ids.numel(), "separate rows": rows.numel()}


def rows_of(model: Any, ids: torch.Tensor, case: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    prompt, k, length = case
    steps, fed = steps_of(model, ids, *case)
    (out, grads, _), (truth, true_grads, _) = (steps[name].run() for name in ("packed", "separate rows"))
    flat, true_flat = (torch.cat([g.flatten() for g in gs]).double() for gs in (grads, true_grads))
    errors = {"logps": relative(out, truth.double()), "gradients": relative(flat, true_flat)}
    require(f"packed, {case}", errors, LIMITS)
    del grads, true_grads, flat, true_flat
    samples, failed = interleaved(steps, rounds, 1.0)
    if failed:
        raise RuntimeError(f"{case}: {failed}")
    times = {name: timings(taken) for name, taken in samples.items()}
    return [
        {
            "op": "packing",
            "case": f"prompt {prompt}, {k} completions of {length}",
            "prompt": prompt,
            "k": k,
            "length": length,
            "threads": torch.get_num_threads(),
            "provider": name,
            "kind": "ours" if name == "packed" else "peer",
            "tokens": fed[name],
            **({f"error_{key}": error for key, error in errors.items()} if name == "packed" else {}),
            "mode": mode,
            **time_,
        }
        for name, modes in times.items()
        for mode, time_ in modes.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", type=int, action="append", help="0, 1, ... of CASES; all by default")
    parser.add_argument("--json", type=Path, help="table of results, or the folder of this device's")
    args = parser.parse_args()
    model, tokenizer = heads.smollm2()
    ids = heads.english(tokenizer, 2048).flatten()
    header = {**environment(("transformers",)), "rounds": args.rounds}
    table: list[dict[str, Any]] = []
    for i in args.case or range(len(CASES)):
        made = rows_of(model, ids, CASES[i], args.rounds)
        add_ratios(made)
        for row in made:
            print(row["case"], row["provider"], row["mode"], row["tokens"], f"{row['median_ms']:.0f} ms",
                  f"x{row['ratio_to_best_peer']:.2f}")  # fmt: skip
        table += made
        if args.json:
            save(result_path(args.json, header["device"]), header, table)


if __name__ == "__main__":
    main()
