"""The table of what was called, and faults of one kind together."""

from __future__ import annotations

import re
from collections import Counter

from .judge import GOOD
from .spec import Spec
from .supervisor import Fault, Tally

_BAD = ("unwilling", "opaque", "accepted", "wrong", "modified", "hang", "crash")


def table(tally: Tally) -> str:
    """Calls by function, by mode and by change: how many returned right, were refused by name, and were faults."""
    parts = []
    for title, counts in (("function", tally.verdicts), ("mode", tally.modes), ("change", tally.changes)):
        columns = [kind for kind in (*GOOD, *_BAD) if any(k == kind for _, k in counts)]
        lines = [f"{title:24}{'calls':>8}" + "".join(f"{c:>11}" for c in columns)]
        totals: Counter[str] = Counter()
        for (name, _), n in counts.items():
            totals[name] += n
        for name, n in sorted(totals.items()):
            lines.append(f"{name:24}{n:>8}" + "".join(f"{counts[name, c] or '':>11}" for c in columns))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _title(fault: Fault) -> tuple[str, ...]:
    spec = Spec.parse(fault.spec)
    # Numbers and shapes differ from call to call.
    said = re.sub(r"-?\d[\d.e+-]*", "#", fault.detail.split("\n")[0])[:90]
    return (fault.kind, said) if fault.kind in ("opaque", "unwilling") else (fault.kind, spec.function, said[:40])


def grouped(faults: list[Fault], most: int = 40) -> list[tuple[str, list[Fault]]]:
    """Faults that look alike, the most frequent first, each group's shortest call first."""
    groups: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        groups.setdefault(_title(fault), []).append(fault)
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))[:most]
    return [(" ".join(title), sorted(found, key=lambda f: len(f.spec))) for title, found in ranked]
