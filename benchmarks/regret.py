"""How near a search comes to the best point of a measured table, by trials: search quality without a GPU.

    python -m benchmarks.regret benchmarks/results/space_*.json [--seeds 20] [-o FILE] [--page]

A table that a formula made says so, and so does what is printed of it.  `--page` writes docs/regret.md and
its plot.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import common
from hsgen import passes, planner
from hsgen.errors import ArgumentError
from hsgen.measurer import Failure, Replay, Table, names_of, read_table
from hsgen.plots import Line, Panel, draw
from hsgen.quality import Json
from hsgen.space import Space, space
from hsgen.spec import load
from hsgen.target import Target, with_streams
from hsgen.tune.journal import Journal
from hsgen.tune.search import Limits, Search
from hsgen.tune.storages import storage_at

TRIALS = (10, 20, 40, 60, 100)
NOISE, QUIET = 0.02, 0.002  # one-sided, of single timings and of finals
FINALISTS, ROUNDS = 8, 15
LEAST = 1e-4  # of regret, on a logarithmic axis

TEXT = """# How near a search comes

`hsgen tune` searches a space that is too large to be measured whole.  Each space here was, once, on the card:
every point that keeps the rules was verified and timed as a whole call (`benchmarks/spaces.py`).  A search is
then replayed on the table as often as one likes, with noise of single timings (2 %, one-sided) and of finals
(0.2 %): what wins its finals, over the best of all points.  *random* draws as many points and takes the best
of them, without noise.

![Regret by trials](regret.svg)

"""


def space_of(table: Table, target: Target) -> Space:
    """The part that a table is of, between the values that it has, in the variant that has them."""
    if version := table.made.get("triton"):
        target = with_streams(target, str(version))
    seen = dict(zip(table.names, map(set, zip(*table.entries, strict=True)), strict=True))
    found = space(passes.run(planner.plan(load(table.spec))), target)
    for variant in found.only([table.part]).variants:
        if dict(variant.orders) != table.orders:
            continue
        try:
            part = variant.parts[0].within({k: sorted(v) for k, v in seen.items()}, variant.start)
        except ArgumentError:
            continue
        if names_of(part) == table.names and table.values(variant.start) in table.entries:
            return replace(found, variants=(replace(variant, parts=(part,)),))
    raise SystemExit(f"{table.about}: the space has changed since, measure it again")


def regret(table: Table, found: Space, trials: int, seed: int) -> float:
    """The time of what wins the finals, over the least of the table."""
    replay = Replay(table, noise=NOISE, quiet=QUIET, seed=seed)
    journal = Journal(storage_at(None), "regret", found)
    search = Search(
        space=found, measurer=replay, journal=journal, seed=seed, limits=Limits(trials=trials)
    )
    search.run()
    finals = search.finalists(FINALISTS, table.shape)
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


def drawn(table: Table, trials: int, seed: int) -> float:
    """The best of as many points, drawn, over the least of the table."""
    entries = list(table.entries.values())
    some = random.Random(seed).sample(entries, min(trials, len(entries)))
    times = [entry for entry in some if isinstance(entry, float)]
    return min(times, default=max(e for e in entries if isinstance(e, float))) / table.best


def judged(table: Table, target: Target, seeds: int) -> Json:
    """A table in numbers, and regret by trials."""
    found = space_of(table, target)
    start = table.entries[table.values(found.start)]
    failed = sum(isinstance(entry, str) for entry in table.entries.values())
    times = [entry for entry in table.entries.values() if isinstance(entry, float)]
    by_trials: Json = {}
    for trials in TRIALS:
        each = [regret(table, found, trials, seed) for seed in range(seeds)]
        chance = [drawn(table, trials, seed) for seed in range(seeds)]
        mean = {"mean": statistics.fmean(each), "worst": max(each)}
        by_trials[str(trials)] = {**mean, "random": statistics.fmean(chance)}
    return {
        "about": table.about,
        "synthetic": table.synthetic,
        "made": dict(table.made),
        "shape": table.shape,
        "points": len(table.entries),
        "failed": failed,
        "best_us": table.best,
        "start": start / table.best if isinstance(start, float) else None,
        "median": statistics.median(times) / table.best,
        "seeds": seeds,
        "regret": by_trials,
    }


# --- what is written


def page(results: Json) -> str:
    """docs/regret.md."""
    head = ["space", "points", "fail", "best, us", "start", "median"]
    head += [f"{trials} trials" for trials in TRIALS]
    head += [f"worst of {TRIALS[-2]}", f"random, {TRIALS[-2]}"]
    rows, sources = [], []
    for name, each in results.items():
        cells = [f"{each['points']:,}", str(each["failed"]), common.number(each["best_us"])]
        cells += [
            f"{each[key]:.2f}" if each[key] else common.MISSING for key in ("start", "median")
        ]
        cells += [f"{each['regret'][str(trials)]['mean']:.3f}" for trials in TRIALS]
        last = each["regret"][str(TRIALS[-2])]
        rows.append([title(each), *cells, f"{last['worst']:.3f}", f"{last['random']:.3f}"])
        where = f"{each['made'].get('card')}, {each['made'].get('date')}"
        sources.append(f"- {title(each)}: `{each['made'].get('command')}`, {where}, `{name}.json`")
    seeds = max(each["seeds"] for each in results.values())
    about = f"Multiples of the best, means of {seeds} seeds.\n\n"
    return TEXT + about + common.table(head, rows) + "\n" + "\n".join(sources) + "\n"


def plot(results: Json) -> str:
    """docs/regret.svg: one panel a space."""
    panels = []
    for each in results.values():
        lines = [
            ("the search, mean", "mean"),
            ("the worst seed", "worst"),
            ("random, mean", "random"),
        ]
        panels.append(
            Panel(
                title=f"{title(each)}, {each['points']:,} points",
                lines=tuple(
                    Line(name=name, points=_curve(each, key), dashed=key != "mean")
                    for name, key in lines
                ),
                marks={},
            )
        )
    return draw("Regret by trials", ("time above the best point's, %",), ("trials", "%"), panels)


def title(result: Json) -> str:
    """What a space is of, in a word; a synthetic one says so."""
    return str(result["about"]).rpartition(",")[0] or str(result["about"])


def _curve(result: Json, key: str) -> tuple[tuple[float, float], ...]:
    pairs = ((trials, result["regret"][str(trials)][key] - 1) for trials in TRIALS)
    return tuple((float(trials), 100 * max(LEAST, over)) for trials, over in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    """Print regret by trials, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regret")
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--target", default="h100")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--page", action="store_true", help="write docs/regret.md and its plot")
    args = parser.parse_args(argv)
    results: Json = {}
    for file in args.tables:
        table = read_table(file)
        found = results[file.stem] = judged(table, Target.named(args.target), args.seeds)
        over = f"{found['start']:.3f}" if found["start"] else "a failure"
        print(f"{table.about}: {found['points']} points, the start is {over} of the best")
        for trials, each in found["regret"].items():
            print(
                f"  {trials:>4} trials: mean {each['mean']:.4f}, worst {each['worst']:.4f}", end=""
            )
            print(f", random {each['random']:.4f}")
    if args.output:
        common.write_json(args.output, results)
    if args.page:
        (common.ROOT / "docs" / "regret.md").write_text(page(results))
        (common.ROOT / "docs" / "regret.svg").write_text(plot(results))


if __name__ == "__main__":
    main()
