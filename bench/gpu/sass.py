"""What the hot loop of a Triton kernel is made of, by its machine code; needs Triton and no GPU.

    python bench/gpu/sass.py [part of a kernel's name ...] [--target cuda:90]

For each form in the kernel files' COMPILE: instructions of the innermost loop (of the whole program where it has none)
on the way that skips what a branch can skip, and the same for an entry of a thread's blocks; of all that stands there
barriers, shuffles, special functions, and loads and stores of global memory by bits; registers and spilled bytes. Two
innermost loops are two lines.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from qempo_fast.cli.compile import build, cubin_usage, label, signatures

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ +)?([A-Z][A-Z0-9_.]*)(.*?);", re.MULTILINE)


def instructions(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, operation, operands) in order, without what fills the end up."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-c", "-hex", path], check=True, capture_output=True, text=True).stdout
    names = {}
    for name, at in re.findall(r"^(\.L_x_\d+):\s*\n\s+/\*([0-9a-f]+)\*/", text, re.MULTILINE):
        names[name] = int(at, 16)
    found = []
    for at, operation, operands in _INSTRUCTION.findall(text):
        target = re.search(r"\.L_x_\d+", operands)
        if target and target[0] in names:
            operands = f"0x{names[target[0]]:x}"
        if operation != "NOP":
            found.append((int(at, 16), operation, operands))
    return found


def loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """The bodies of the innermost loops, or all of the code where there is none."""
    spans = []
    for at, operation, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        # The trap at the end of a program branches to itself.
        if operation.startswith("BRA") and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[i for i in code if a <= i[0] <= b] for a, b in inner] or [code]


def shortest(body: list[tuple[int, str, str]]) -> int:
    """Instructions of the way through the body that skips what a forward branch can skip."""
    steps = {at: i for i, (at, _, _) in enumerate(body)}
    cost = [0, *[len(body)] * len(body)]
    for i, (_, operation, operands) in enumerate(body):
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        to = steps.get(int(target[1], 16), -1) if target else -1
        if to > i:
            cost[to] = min(cost[to], cost[i] + 1)
        cost[i + 1] = min(cost[i + 1], cost[i] + 1)
    return cost[-1]


def _entries(signature: Any) -> int:
    """Of a thread in one turn: its share of the block."""
    sizes = {n: v for n, v in signature.constexprs.items() if isinstance(v, int)}
    if "LANES" in sizes:
        # The 16-byte loads that each lane has of a row of logits.
        bits = {"*bf16": 16, "*fp16": 16, "*fp32": 32, "*fp64": 64}[signature.types["z_ptr"]]
        return int(sizes["LOADS"]) * 128 // bits
    blocks = [v for n, v in sizes.items() if n.startswith("BLOCK")]
    return max(1, math.prod(blocks) // (32 * signature.num_warps))


def line(body: list[tuple[int, str, str]], entries: int) -> str:
    count: Counter[str] = Counter()
    for _, operation, _ in body:
        kind, *more = operation.split(".")
        if kind in ("LDG", "STG"):
            bits = [m for m in more if m in ("128", "64", "U16", "S16", "16", "U8", "S8", "8")]
            kind += "." + (bits[0].strip("US") if bits else "32")
        count[kind] += 1
    memory = ", ".join(f"{n} {k}" for k, n in sorted(count.items()) if k.split(".")[0] in ("LDG", "STG", "LDGSTS"))
    least = shortest(body)
    return (
        f"{least:5} instructions, {least / entries:5.1f} an entry, {len(body)} with all branches; "
        f"{count['BAR']} barriers, {count['SHFL']} shuffles, {count['MUFU']} special; "
        f"{memory or 'no global memory'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--target", default="cuda:90")
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}, {arguments.target}")
    for signature in signatures():
        name = signature.kernel.__name__
        fits = arguments.target.startswith(signature.targets)
        if not fits or not any(part in name for part in arguments.names):
            continue
        cubin = build(signature, arguments.target).asm["cubin"]
        registers, spilled = cubin_usage(cubin)
        print(
            f"{name}: {label(signature)}; {signature.num_warps} warps, {registers} registers, {spilled} bytes spilled"
        )
        for body in loops(instructions(cubin)):
            print(f"  {line(body, _entries(signature))}")


if __name__ == "__main__":
    main()
