"""Results of a run on a GPU as JSON lines, each written whole and at once: a run may be cut at any second.

Several processes append to the same file; GPU_RESULTS names it, GPU_BEGAN is the second at which the run began.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A reason's length at most: one write of a page or less goes to the file whole, also where the process is killed in it,
# but for one that crosses a page of the file, of which a kill may leave the first part (seen on a busy machine).
_REASON, _LINE = 400, 4000
_FIRST = '{"kind": '
_KILL, _PARENT_DEATH_SIGNAL = 9, 1


def began() -> float:
    return float(os.environ.get("GPU_BEGAN", 0)) or time.time()


def since(start: float) -> float:
    return round(time.time() - start, 2)


def reason(error: BaseException) -> str:
    """One line: the type and the first line of the message, or the last where that is what says it."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:_REASON] if lines else repr(error)[:_REASON]


def _plain(value: Any) -> Any:
    """Figures with four digits: enough, and a line that a person can read."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


class Lines:
    """Appends to the results file, and says the same in short on standard output."""

    def __init__(self, path: str | Path, start: float | None = None) -> None:
        self.path, self.start = Path(path), began() if start is None else start
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, kind: str, *, quiet: bool = False, **columns: Any) -> dict[str, Any]:
        row = {"kind": kind, "s": since(self.start), **_plain(columns)}
        line = json.dumps(row, ensure_ascii=False)
        if len(line.encode()) > _LINE:
            # Longest text first; what is cut off is in the log.
            for key in sorted(row, key=lambda k: -len(str(row[k]))):
                row[key] = str(row[key])[:_REASON]
                line = json.dumps(row, ensure_ascii=False)
                if len(line.encode()) <= _LINE:
                    break
        os.write(self._file, (line + "\n").encode())
        os.fsync(self._file)
        if not quiet:
            print(short(row), flush=True)
        return row


def short(row: dict[str, Any]) -> str:
    # The item's name is made of the others.
    skip = ("kind", "s", "item", "took_s") if "provider" in row or "what" in row else ("kind", "s")
    told = " ".join(f"{k}={v}" for k, v in row.items() if k not in skip and v is not None)
    return f"{row['s']:7.1f} {row['kind']:<11} {told}"[:300]


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file; of one that a kill has cut, what another process wrote behind it."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(errors="replace").split("\n"):
            for start in dict.fromkeys((0, max(0, line.rfind(_FIRST)))):
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line[start:]))
                    break
    return rows


def gpu_is_lost() -> bool:
    """Whether an illegal access has cost this process its GPU: what is to come needs another. It imports no torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def die_with_parent() -> None:
    """Linux kills this process when the one that started it goes: a cut run leaves nothing running on the GPU."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PARENT_DEATH_SIGNAL, _KILL)


@contextlib.contextmanager
def standard_error_as_lines(take: Any) -> Iterator[None]:
    """Within it each line written to sys.stderr goes to take(line) too, as soon as it is whole."""

    class Tee:
        def __init__(self, under: Any) -> None:
            self.under, self.rest = under, ""

        def write(self, text: str) -> int:
            *whole, self.rest = (self.rest + text).split("\n")
            for line in whole:
                take(line)
            return int(self.under.write(text))

        def flush(self) -> None:
            self.under.flush()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.under, name)

    before = sys.stderr
    sys.stderr = Tee(before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = before


def digest(rows: list[dict[str, Any]]) -> list[str]:
    """What to look at first, in a few lines: they are the last of the output, of which only the end may be kept."""
    of = {
        kind: [r for r in rows if r["kind"] == kind] for kind in ("kernel", "test", "tests", "smoke", "stress", "time")
    }
    out = []
    for kind, good in (
        ("kernel", lambda r: r["ok"]),
        *((k, lambda r: not r.get("reason")) for k in ("smoke", "stress")),
    ):
        bad = [r for r in of[kind] if not good(r)]
        out.append(f"{kind}: {len(of[kind]) - len(bad)} of {len(of[kind])} right")
        out += [f"  {r.get('check') or r.get('item')}: {r.get('reason')}"[:160] for r in bad[:8]]
    counts = {r["run"]: r for r in of["tests"]}
    out += [f"{name}: {short(r)[20:]}" for name, r in counts.items()]
    out += [f"  {r['test']}: {r['message']}"[:200] for r in of["test"][:12]]
    case = None
    for r in of["time"]:
        title = f"{r.get('item', '').split('/')[0]}: {r.get('case')}"
        if title != case:
            case = title
            out.append(title)
        shown = [
            f"{key} {r[key]}" for key in ("forward_ms", "full_ms", "wall_ms", "f", "gemms", "memory_mib") if r.get(key)
        ]
        out.append(f"  {r.get('provider', '')[:40]:<40} {'  '.join(shown) or r.get('reason')}"[:170])
    return out
