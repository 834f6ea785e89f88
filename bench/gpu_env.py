"""The first line of a run on a GPU, and the check of its kit; no torch here, so it is written within a second.

python -P bench/gpu_env.py --out OUT [--kit .gpu] [--rehearse]     status 2, with one line, where the kit will not do
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import gpu_kit
import gpu_lines

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch", "triton", "transformers", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "trl", "liger-kernel",
    "cut-cross-entropy",
)  # fmt: skip
# As found: nothing here sets any of them.
_ASKED = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.limit", "temperature.gpu", "persistence_mode", "compute_mode", "mig.mode.current",
)  # fmt: skip
_MODEL = re.compile(r"\b[A-Z]{1,3}\d{2,4}[A-Z]*\b")


def chip(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100": the word that is letters and a number; without one the name but its maker."""
    found = _MODEL.search(name)
    words = name.split()[1:] if name.startswith(("NVIDIA ", "AMD ")) else name.split()
    return (found[0] if found else "-".join(words)).lower()


def _says(*words: str) -> str:
    """A program's output; nothing where it is absent or fails."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit(kit: dict[str, Any]) -> str:
    """git's, or the kit's where git or .git is absent."""
    head = _says("git", "rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else ""
    if not head:
        return str(kit.get("commit", "unknown"))
    changed = _says("git", "status", "--porcelain", "--", "qempo_fast", "csrc", "kernels", "bench", "tests")
    return head + (" with changes" if changed else "")


def card() -> dict[str, Any]:
    """The GPU as nvidia-smi finds it."""
    told = _says("nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader")
    if not told:
        return {"device": "none", "chip": "none"}
    values = [x.strip() for x in told.splitlines()[0].split(",")]
    found = dict(zip(_ASKED, values, strict=False))
    return {"device": found["name"], "chip": chip(found["name"]), **{k: v for k, v in found.items() if k != "name"}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(folder: Path | None, call: str, rehearse: bool) -> dict[str, Any]:
    kit = {} if folder is None else json.loads((folder / "kit.json").read_text())
    return {
        "call": call,
        "rehearsal": rehearse,
        **card(),
        "commit": commit(kit),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "kit": {k: v for k, v in kit.items() if k in ("commit", "date", "python", "torch", "triton", "cuda", "bytes")},
        # Its parts that hold other sources than lie here: what is measured is then not what one reads.
        "stale": [] if folder is None else gpu_kit.stale(folder, ROOT),
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
        print(f"gpu_run: {why}", file=sys.stderr)
        return 2
    told = environment(args.kit, args.call, args.rehearse)
    gpu_lines.Lines(args.out / "results.jsonl").write("environment", **told)
    if told["stale"]:
        print(f"kit: built from other sources than these: {', '.join(told['stale'])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
