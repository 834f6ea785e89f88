"""The file of a study's results: what it ran on, then a row a line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def record(path: Path, provenance: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Print and write each row as it is made; provenance gets the seconds that they took so far."""
    start, made = time.monotonic(), list[dict[str, Any]]()
    for row in rows:
        made.append(row)
        provenance["seconds"] = round(time.monotonic() - start)
        print(f"{provenance['seconds']} s  {json.dumps(row)}", flush=True)
        write(path, provenance, made)


def write(path: Path, provenance: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write {"provenance": ..., "rows": [...]}, numbers to seven digits."""
    lines = ",\n".join(map(_compact, rows))
    path.write_text(f'{{"provenance":{_compact(provenance)},\n"rows":[\n{lines}\n]}}\n')


def _compact(x: dict[str, Any]) -> str:
    return json.dumps(_short(x), separators=(",", ":"))


def _short(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_short(value) for value in x]
    return float(f"{x:.7g}") if isinstance(x, float) else x
