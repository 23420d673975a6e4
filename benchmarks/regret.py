"""How near a search comes to the best point of a measured table, by trials: search quality without a GPU.

    python -m benchmarks.regret benchmarks/results/space_*.json [--seeds 20] [-o FILE]

A table that a formula made says so, and so does what is printed of it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import common
from hsgen import passes, planner
from hsgen.measurer import Failure, Replay, Table, read_table
from hsgen.space import Space, space
from hsgen.spec import load
from hsgen.target import Target
from hsgen.tune.journal import Journal
from hsgen.tune.search import Limits, Search
from hsgen.tune.storages import storage_at

TRIALS = (10, 20, 40, 60, 100)
NOISE, QUIET = 0.02, 0.002  # one-sided, of single timings and of finals
FINALISTS, ROUNDS = 8, 15


def space_of(table: Table, target: Target) -> Space:
    """The part that a table is of, in the variant that has its values."""
    found = space(passes.run(planner.plan(load(table.spec))), target).only([table.part])
    for variant in found.variants:
        labels = tuple(knob.label for part in variant.parts for knob in part.knobs)
        if labels == table.names and table.values(variant.start) in table.entries:
            return replace(found, variants=(variant,))
    raise SystemExit(f"{table.about}: the space has changed since, measure it again")


def regret(table: Table, found: Space, trials: int, seed: int) -> float:
    """The time of what wins the finals, over the least of the table."""
    replay = Replay(table, noise=NOISE, quiet=QUIET, seed=seed)
    journal = Journal(storage_at(None), "regret", found)
    search = Search(
        space=found, measurer=replay, journal=journal, seed=seed, limits=Limits(trials=trials)
    )
    search.run()
    finals = search.finalists(FINALISTS)
    samples = replay.compare(finals, table.shape, ROUNDS)
    times = [
        (statistics.median(each), point)
        for point, each in zip(finals, samples, strict=True)
        if not isinstance(each, Failure)
    ]
    winner = min(times, key=lambda pair: pair[0])[1]
    entry = table.entries[table.values(winner)]
    assert isinstance(entry, float), "a finalist has a time"
    return entry / table.best


def main(argv: Sequence[str] | None = None) -> None:
    """Print regret by trials, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regret")
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--target", default="h100")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(argv)
    result = {}
    for file in args.tables:
        table = read_table(file)
        found = space_of(table, Target.named(args.target))
        start = table.entries[table.values(found.start)]
        over = f"{start / table.best:.3f}" if isinstance(start, float) else str(start)
        print(f"{table.about}: {len(table.entries)} points, the start is {over} of the best")
        by_trials = {}
        for trials in TRIALS:
            each = [regret(table, found, trials, seed) for seed in range(args.seeds)]
            by_trials[str(trials)] = {"mean": statistics.fmean(each), "worst": max(each)}
            print(f"  {trials:4} trials: mean {statistics.fmean(each):.4f}, worst {max(each):.4f}")
        result[file.stem] = {"synthetic": table.synthetic, "made": table.made, "regret": by_trials}
    if args.output:
        common.write_json(args.output, result)


if __name__ == "__main__":
    main()
