"""What a figure depends on beside its case: the commit, versions, the machine. Only environment() imports torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MODEL = re.compile(r"\b[A-Z]{1,3}\d{2,4}[A-Z]*\b")


def says(*words: str, cwd: Path = ROOT) -> str:
    """A program's output; nothing where it is absent or fails."""
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit(root: Path, *folders: str) -> str:
    """git's, with a mark where these folders (without one, anything) are changed; "unknown" without git or a clone."""
    head = says("git", "rev-parse", "--short", "HEAD", cwd=root) if (root / ".git").exists() else ""
    if not head:
        return "unknown"
    return head + (" with changes" if says("git", "status", "--porcelain", "--", *folders, cwd=root) else "")


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def chip(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100": the word that is letters and a number; without one the name but its maker."""
    found = _MODEL.search(name)
    words = name.split()[1:] if name.startswith(("NVIDIA ", "AMD ")) else name.split()
    return (found[0] if found else "-".join(words)).lower()


def cpu() -> str:
    """The processor's name with family and model: one name stands for processors whose ratios differ."""
    fields = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def environment(peers: Sequence[str], device: str = "cpu") -> dict[str, Any]:
    """What a row of the suite depends on beside its case."""
    import torch

    import qempo_fast as qf

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "qempo_fast": qf.__version__,
        "peers": {name: version(name) for name in peers},
        # Only what can change a timing: the kernels and the package, not the pages.
        "commit": commit(ROOT, "qempo_fast", "csrc", "kernels"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": os.getloadavg(),
    }
