"""The file of a study's results: what it ran on, then a row a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(path: Path, provenance: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write {"provenance": ..., "rows": [...]}, numbers to seven digits."""
    lines = ",\n".join(json.dumps(_short(row)) for row in rows)
    path.write_text(f'{{"provenance": {json.dumps(_short(provenance))},\n"rows": [\n{lines}\n]}}\n')


def _short(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_short(value) for value in x]
    return float(f"{x:.7g}") if isinstance(x, float) else x
