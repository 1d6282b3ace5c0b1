"""``python -m tests.fuzz --cases 5000 --seed 7``: malformed inputs, and what became of them."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.pool import run_cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--only", type=int, nargs="*", help="run these cases of the seed alone")
    parser.add_argument("--keep", type=Path, help="a folder for the sandboxes of failed cases")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    args = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    failed = 0
    began = time.perf_counter()
    numbers = range(args.cases) if args.only is None else args.only
    for result in run_cases(numbers, args.seed, workers=args.workers, keep=args.keep):
        counts[result.kind, "failed" if result.faults else f"exit {result.code}"] += 1
        if args.verbose:
            print(f"{result.number} {result.kind}: {result.what}: {result.code} ({result.seconds:.2f} s) {result.line}")
        if result.faults:
            failed += 1
            print(f"FAILED {result.number} {result.kind}: {result.what}: {'; '.join(result.faults)}")
            print(
                f"    {' '.join(result.argv)!r:.600}\n    " + result.report[-1500:].replace("\n", "\n    "), flush=True
            )
    ends = sorted({end for _, end in counts})
    print(f"{'':<12}" + "".join(f"{end:>10}" for end in ends))
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(f"{kind:<12}" + "".join(f"{counts[kind, end]:>10}" for end in ends))
    print(f"{sum(counts.values())} cases of seed {args.seed} in {time.perf_counter() - began:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
