"""Seconds and memory of sorting a pool anew by its ledger, at sizes up to a million problems with eight rollouts each.

    python -m benchmarks.ledger --out benchmarks/results/ledger.json

There is no peer to compare with. What is timed is all that an epoch boundary does: the bands of every problem by its
newest evidence or by the posterior, how many moved, the Acquisition Set and the Consolidation Set. Reading the ledger's
file, once at a resume, is timed apart.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import save, timed
from slmreason.data.ledger import Ledger
from slmreason.data.strata import Bands, acquisition_set, consolidation_set, stratify
from slmreason.records import Evidence, Place, Problem

ATTEMPTS = 8


def measure(size: int, bands: Bands) -> dict[str, float | str]:
    """One size, in this process."""
    rng = random.Random(0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = [Problem(f"p{i:07d}", f"Question {i}?", str(i % 97), source="x") for i in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder, bands.fading)
        for version in range(2):
            shown = (Evidence(p.id, ATTEMPTS, rng.randint(0, ATTEMPTS), version) for p in problems)
            ledger.take(shown, Place(1, "grpo", version))
        before = stratify(ledger, problems, bands).band_of

        def boundary() -> None:
            strata = stratify(ledger, problems, bands)
            strata.moves_from(before)
            acquisition_set(strata)
            consolidation_set(strata, 0.1, rng)

        seconds = min(timed(boundary) for _ in range(3))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reading = timed(lambda: Ledger(folder, bands.fading))
    return {"evidence_model": bands.evidence_model,
            "problems": size, "rollouts": 2 * ATTEMPTS * size, "restratify_s": seconds, "read_file_s": reading,
            "memory_mb": (peak - base) / 1024}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=int, help="measure this size in this process")
    parser.add_argument("--model", choices=["newest", "posterior"], default="newest", help="of `--one`")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, Bands(evidence_model=options.model))))
        return
    rows = []
    for model in ("newest", "posterior"):
        for size in options.sizes:  # each in a process of its own: its peak is its own
            one = [sys.executable, "-m", "benchmarks.ledger", "--one", str(size), "--model", model]
            done = subprocess.run(one, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
    save(options.out, rows)


if __name__ == "__main__":
    main()
