"""python -m fuzz [--seconds S] [--seed N], or python -m fuzz LINE to repeat one call."""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("TRITON_INTERPRET", "1")

from .judge import GOOD, judge
from .operators import CALLED
from .report import grouped, table
from .spec import Spec
from .supervisor import fuzz, reduced

_REPEAT = "PYTHONPATH=tests .venv/bin/python -P -m fuzz"


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("line", nargs="?", help="a call to repeat, as the report prints it")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--calls", type=int, default=10**9, help="at most so many")
    parser.add_argument("--at-least", type=int, default=0, help="go on until there are so many")
    parser.add_argument("--seed", type=int, default=None, help="printed; the time where not given")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", default="", help="kinds of fault that are printed and fail nothing, as opaque")
    parser.add_argument("--only", default="", help="functions whose name holds this")
    args = parser.parse_args()
    if args.line:
        spec = Spec.parse(args.line)
        for name, x in CALLED[spec.function].make(spec.seed).items():
            print(f"  {name} = {x}")
        verdict = judge(spec)
        print(verdict.kind, verdict.detail)
        return verdict.kind not in GOOD
    seed = int(time.time()) if args.seed is None else args.seed
    tally = fuzz(seed, args.seconds, args.calls, args.workers, args.only)
    while tally.calls < args.at_least:
        # A busy machine makes fewer in its time: the next seed's calls follow.
        seed += 1
        tally.join(fuzz(seed, args.seconds / 4, args.calls, args.workers, args.only))
    print(table(tally))
    for title, faults in grouped(tally.faults):
        print(f"\n{len(faults)} x {title}\n  {_REPEAT} '{reduced(faults[0])}'\n  {faults[0].detail}")
    print(f"\nseed {seed}: {tally.calls} calls in {tally.seconds:.0f} s, {len(tally.faults)} faults")
    return any(fault.kind not in args.report.split(",") for fault in tally.faults)


if __name__ == "__main__":
    sys.exit(main())
