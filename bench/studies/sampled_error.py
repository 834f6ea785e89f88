"""Kept share and gradient error of grad="sampled" against tau: SmolLM2-135M's real hidden states, synthetic heads.

    python -P bench/studies/sampled_error.py --json bench/results             (two minutes)

Errors are relative Frobenius norms against the float64 gradient; "plain" rows are plain torch in the same dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.progress import track

import qempo_fast as qf
from qempo_fast import reference
from suite import heads
from suite.interleave import console, relative
from suite.logps import EVERY, kept_share, truth
from suite.provenance import environment
from suite.results import result_path, save

TAUS = [2.0**-7, 2.0**-8, 2.0**-9, 2.0**-10, 2.0**-11]


def rows_of(name: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[dict]:
    with torch.no_grad():
        entropy = float(qf.linear_logps(hidden, weight, targets, entropy=True).entropy.mean())
    sizes = {"source": name, "n": len(targets), "d": weight.shape[1], "v": weight.shape[0]}
    coefficients = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        exact = truth(h.detach(), w.detach(), targets, coefficients)
        short = str(dtype).removeprefix("torch.")
        case = {"op": "sampled_error", "case": f"{name} {short}", **sizes, "dtype": short, "entropy_nats": entropy}
        providers: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
            ("plain torch", reference.linear_logps, {}),
            ("qempo_fast exact", qf.linear_logps, {"grad": "exact"}),
            *(("qempo_fast sampled", qf.linear_logps, {"grad": "sampled", "tau": tau}) for tau in TAUS),
        ]
        for provider, function, keywords in track(providers, f"{name}, {dtype}", console=console):
            torch.manual_seed(0)
            logps = function(h, w, targets, **keywords).logps
            tau = keywords.get("tau")
            drawn = {} if tau is None else {"tau": tau, "kept": kept_share(logps, len(w))}
            dh, dw = torch.autograd.grad(logps, (h, w), coefficients.to(logps.dtype))
            rows.append(
                {**case, "provider": provider, "kind": "peer" if provider == "plain torch" else "ours", "mode": "error",
                 **drawn, "error_hidden": relative(dh, exact[0]), "error_weight": relative(dw[::EVERY], exact[1])}
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--json", type=Path, required=True, help="table of results, or the folder of this device's")
    args = parser.parse_args()
    rows = [
        r
        for source in (heads.ENGLISH, heads.SAMPLED, heads.TRAINED)
        for r in rows_of(source, *heads.real(source, args.n))
    ]
    rows += rows_of("synthetic D = 1024", *heads.synthetic(512, 1024, 32768))
    rows += rows_of("synthetic D = 4096", *heads.synthetic(512, 4096, 16384))
    header = environment(())
    save(result_path(args.json, header["device"]), header, rows)


if __name__ == "__main__":
    main()
