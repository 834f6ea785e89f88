"""Kept share and gradient error of grad="sampled" against tau: SmolLM2-135M's real hidden states, synthetic heads.

    python -P bench/sampled_error.py --json bench/results/sampled_error.json             (two minutes)

Errors are relative Frobenius norms against the float64 gradient; "plain" rows are plain torch in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import heads
import torch
from bench_logps import EVERY, kept_share, truth
from interleave import console, environment, relative
from rich.progress import track

import qempo_fast as qf
from qempo_fast import reference

TAUS = [2.0**-7, 2.0**-8, 2.0**-9, 2.0**-10, 2.0**-11]


def rows_of(name: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[dict]:
    with torch.no_grad():
        entropy = float(qf.linear_logps(hidden, weight, targets, entropy=True).entropy.mean())
    base = {"case": name, "n": len(targets), "d": weight.shape[1], "v": weight.shape[0], "entropy": entropy}
    coefficients = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        exact = truth(h.detach(), w.detach(), targets, coefficients)
        modes = [("plain", None, reference.linear_logps, {}), ("exact", None, qf.linear_logps, {"grad": "exact"})]
        modes += [("sampled", tau, qf.linear_logps, {"grad": "sampled", "tau": tau}) for tau in TAUS]
        for mode, tau, function, keywords in track(modes, f"{name}, {dtype}", console=console):
            torch.manual_seed(0)
            logps = function(h, w, targets, **keywords).logps
            kept = kept_share(logps, len(w)) if mode == "sampled" else 1.0
            dh, dw = torch.autograd.grad(logps, (h, w), coefficients.to(logps.dtype))
            rows.append(
                {**base, "dtype": str(dtype).removeprefix("torch."), "mode": mode, "tau": tau, "kept": kept,
                 "error_hidden": relative(dh, exact[0]), "error_weight": relative(dw[::EVERY], exact[1])}
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = [
        r
        for source in (heads.ENGLISH, heads.SAMPLED, heads.TRAINED)
        for r in rows_of(source, *heads.real(source, args.n))
    ]
    rows += rows_of("synthetic D = 1024", *heads.synthetic(512, 1024, 32768))
    rows += rows_of("synthetic D = 4096", *heads.synthetic(512, 4096, 16384))
    args.json.write_text(json.dumps({**environment(()), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
