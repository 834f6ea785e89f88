"""The first line of a run on a GPU, and the check of its kit; no torch here, so it is written within a second.

python -P bench/gpu/env.py --out OUT [--kit .gpu] [--rehearse]     status 2, with one line, where the kit will not do
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.kit import stale
from gpu.lines import Lines
from suite.provenance import ROOT, chip, commit, says, version

PACKAGES = (
    "torch", "triton", "transformers", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "trl", "liger-kernel",
    "cut-cross-entropy",
)  # fmt: skip
# As found: nothing here sets any of them.
_ASKED = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.limit", "temperature.gpu", "persistence_mode", "compute_mode", "mig.mode.current",
)  # fmt: skip


def card() -> dict[str, Any]:
    """The GPU as nvidia-smi finds it."""
    told = says("nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader")
    if not told:
        return {"device": "none", "chip": "none"}
    values = [x.strip() for x in told.splitlines()[0].split(",")]
    found = dict(zip(_ASKED, values, strict=False))
    return {"device": found["name"], "chip": chip(found["name"]), **{k: v for k, v in found.items() if k != "name"}}


def environment(folder: Path | None, call: str, rehearse: bool) -> dict[str, Any]:
    kit = {} if folder is None else json.loads((folder / "kit.json").read_text())
    found = commit(ROOT, "qempo_fast", "csrc", "kernels", "bench", "tests")
    return {
        "call": call,
        "rehearsal": rehearse,
        **card(),
        "commit": kit.get("commit", found) if found == "unknown" else found,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "kit": {k: v for k, v in kit.items() if k in ("commit", "date", "python", "torch", "triton", "cuda", "bytes")},
        # Its parts that hold other sources than lie here: what is measured is then not what one reads.
        "stale": [] if folder is None else stale(folder, ROOT),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
    }


def refusal(kit: Path) -> str | None:
    """Why this kit will not do here, or None."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    own = sorted(kit.glob("wheels/qempo_fast-*.whl"))
    if not own or not (kit / "kit.json").is_file():
        return f"kit: wanted wheels/qempo_fast-*.whl and kit.json in {kit}, found none; make gpu-kit builds it"
    fitting = [w for w in own if w.name.split("-")[-3] == tag]
    if len(own) > 1 or not fitting:
        return f"kit: wanted one wheel of qempo_fast for {tag}, found {', '.join(w.name for w in own)} in {kit}/wheels"
    try:
        json.loads((kit / "kit.json").read_text())
    except ValueError as error:
        return f"kit: wanted JSON in {kit}/kit.json: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kit", type=Path)
    parser.add_argument("--call", default="first")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    why = None if args.kit is None else refusal(args.kit)
    if why:
        print(f"gpu/run: {why}", file=sys.stderr)
        return 2
    told = environment(args.kit, args.call, args.rehearse)
    Lines(args.out / "results.jsonl").write("environment", **told)
    if told["stale"]:
        print(f"kit: built from other sources than these: {', '.join(told['stale'])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
