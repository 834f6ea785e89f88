"""The library inside other people's training code: ``hf`` (transformers), ``trl``, ``verl``, ``openrlhf``.

Import the module you need. ``methods`` has the losses that they know by name.
"""

from __future__ import annotations

from typing import Any

from .. import _check


def missing(error: ModuleNotFoundError, extra: str) -> ImportError:
    """What to raise where a framework is not installed."""
    return ImportError(f'{error.name} is not installed: pip install "qempo-fast[{extra}]"', name=error.name)


def sampling(grad: Any, tau: Any) -> dict[str, Any]:
    """linear_logps' choice of gradient, checked when a framework's slot is filled and not at its first step."""
    _check.gradient(grad, tau)
    return {"grad": grad, "tau": tau}
