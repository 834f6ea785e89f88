"""Launches of every loss again and again, each bitwise equal to the first: what racecheck cannot see.

    python -P bench/gpu/stress.py [--launches 2000] [--json FILE] [--device cpu]

RSPO's threads show each other their ranks through global memory between barriers, and the sum over a loss's programs
goes through a counter in global memory; compute-sanitizer's racecheck looks at shared memory only. A row is one case:
launches of it alone, and launches of it among those of the other cases, on two streams, whose counters other cases of
other sizes use in turns. Comparisons stay on the device, so that launches queue. A CPU runs it in Triton's
interpreter, small, to test the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[], Tensors]


def _offsets(sizes: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], device=device)


def cases(device: torch.device, small: bool) -> dict[str, Call]:
    """name: one launch, which gives the loss and its coefficients. Each has several programs, but RSPO's 1 x 1024."""
    from qempo_fast import _backends

    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    def call(op: str, *given: Any, **settings: Any) -> Call:
        run = _backends.kernel(op, device, "triton")

        def once() -> Tensors:
            value, coefs = run(*given, **settings)
            return value, *coefs

        return once

    groups, pairs, tokens = (9, 150, 40) if small else (4096, 4096, 2048)
    widest = 50 if small else 1024
    sizes = torch.randint(2, widest // 4, (groups // 3,), generator=draw).tolist()
    # Two that are sorted alone, at the width of the bound.
    sizes += [widest, 2, widest - 1]
    n, ragged, starts = 8 * groups, sum(sizes), _offsets(sizes, device)
    lengths = torch.randint(0, 2 * tokens, (groups // 4 + 5,), generator=draw).tolist()
    t, cu = sum(lengths), _offsets(lengths, device)
    family: dict[str, Any] = {"alpha": 0.3, "beta": 0.1}
    token: dict[str, Any] = {"ref_token_logps": normal(t), "kl": 0.1}
    pair = [normal(pairs) for _ in range(4)]
    negatives = [normal(pairs, *more) for _ in range(2) for more in ((), (2,), (5,))]
    return {
        "rspo 8 x groups": call("rspo_loss", normal(n), normal(n), k=2, group_size=8),
        "rspo one group": call("rspo_loss", normal(widest), normal(widest), k=4, group_size=widest),
        "rspo ragged": call("rspo_loss", normal(ragged), normal(ragged), k=2, offsets=starts),
        "pairs": call("pair_loss", *pair, **family, label_smoothing=0.1, reduction="mean"),
        "fewer pairs": call("pair_loss", *[x[: pairs - 70] for x in pair], **family, reduction="sum"),
        "groups": call("group_loss", normal(n), normal(n), normal(n), **family, group_size=8),
        "ragged groups": call("group_loss", normal(ragged), None, normal(ragged), **family, offsets=starts),
        "variance": call("variance_loss", normal(n), normal(n), normal(n), **family, group_size=8),
        "epa": call("epa_loss", *negatives, beta=0.1),
        "poft": call("poft_loss", normal(pairs), normal(pairs).abs() + 1, normal(pairs, 3)),
        "grpo": call("token_loss", normal(t), normal(t), normal(len(lengths)), cu, **token),
        "gspo": call("token_loss", normal(t), normal(t), normal(len(lengths)), cu, ratio="sequence"),
        "one long sequence": call("token_loss", normal(n), normal(n), normal(1), _offsets([n], device)),
    }


def _bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers: a NaN equals itself, and 0 is not -0."""
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int64)


class Compared:
    """Counts, on the device, the launches of one call that do not give what its first gave."""

    def __init__(self, call: Call) -> None:
        self.call, self.first = call, [_bits(x).clone() for x in call()]
        self.different = torch.zeros((), dtype=torch.int64, device=self.first[0].device)

    def launch(self, seen: torch.Tensor) -> None:
        """One launch; adds to seen whether it was different."""
        seen += torch.stack([(_bits(x) != a).any() for x, a in zip(self.call(), self.first, strict=True)]).any()


def _streams(device: torch.device) -> list[Any]:
    return [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [None, None]


def _on(stream: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stress(device: torch.device, launches: int, small: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each case: its launches and how many differed, alone and among the others on two streams."""
    made = {name: Compared(call) for name, call in cases(device, small).items()}
    alone = {}
    for name, case in made.items():
        for _ in range(launches):
            case.launch(case.different)
        alone[name] = int(case.different)
    streams = _streams(device)
    # A counter of its own for each stream: two may not add to one tensor.
    seen = {name: [torch.zeros_like(case.different) for _ in streams] for name, case in made.items()}
    _wait(device)
    for i in range(launches):
        for j, (name, case) in enumerate(made.items()):
            which = (i + j) % 2
            with _on(streams[which]):
                case.launch(seen[name][which])
    _wait(device)
    for name in made:
        among = sum(int(count) for count in seen[name])
        yield {"stress": name, "launches": 2 * launches, "different_alone": alone[name], "different_among": among}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=2000, help="of each case alone, and again among the others")
    parser.add_argument("--json", type=Path, help="file to which a line is added for each case")
    parser.add_argument("--device", default="cuda", help="cpu needs TRITON_INTERPRET=1 and runs small cases")
    given = parser.parse_args()
    bad = 0
    for row in stress(torch.device(given.device), given.launches, small=given.device == "cpu"):
        bad += row["different_alone"] + row["different_among"]
        line = json.dumps(row)
        print(line, flush=True)
        if given.json:
            with given.json.open("a") as file:
                file.write(line + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
