"""Measure a part of a spec's space in full on the GPU that is here: what search quality is judged by.

    python -m benchmarks.spaces --spec nsa --part attend_selected --hold index_selected.num_warps=1..4
    python -m benchmarks.spaces --spec moba --part attend_selected --order selected=rows \\
        --hold index_selected.num_warps

Every point that keeps the rules is verified, then timed as a whole call, the other parts at their start;
compilers, who work on all cores but one meanwhile, drop only what does not compile, so that what else pruning
would have dropped is known.  The start is timed again and again, and what it drifts is taken out.

Points are kept as they are measured, in `-o`: the same command goes on where it was stopped, `--budget`
seconds at a time; `--from` takes the points that it left elsewhere.  Once all are measured, there is a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import common
from hsgen import passes, planner
from hsgen.errors import HsgenError
from hsgen.lanes import COMMAND, INTERPRETED, Lanes, Patience
from hsgen.measurer import Measurer, Result, Table, names_of, result_of, shape_of, trusted
from hsgen.pruning import Compiler
from hsgen.resources import Compilers
from hsgen.space import Part, Point, Space, Variant, space
from hsgen.spec import dump, load
from hsgen.target import H100, Target
from hsgen.tune.search import Judge, Lenient

AHEAD = 3  # points a compiler that are begun before it is their turn
EVERY = 20  # points, then the start again
SECONDS, FEWEST = 0.08, 5  # of timing a point
POLL = 0.01
PATIENCE = Patience(first=180.0, later=40.0)
NO_LIMIT: Mapping[str, float] = {}


def chosen(
    found: Space, part: str, order: str | None, held: Sequence[str] = ()
) -> tuple[Variant, Part]:
    """The part of the variant with an order, as branch=rows; of the plan's own without.

    Args:
        found: where.
        part: a kernel of it.
        order: of a branch.
        held: knobs that stay at their start, or between two values: LABEL, or LABEL=LOW..HIGH.
    """
    orders = (tuple(order.split("=")),) if order else ()
    variant = next(v for v in found.variants if v.orders == orders)
    whole = next(p for p in variant.parts if part in p.kernels)
    values = {knob.label: [knob.value(code) for code in knob.codes] for knob in whole.knobs}
    for text in held:
        label, _, ends = text.partition("=")
        if label not in values:
            raise HsgenError(f"{whole.name} has no knob {label}", help=", ".join(values))
        low, _, high = ends.partition("..")
        values[label] = [each for each in values[label] if ends and int(low) <= each <= int(high)]
    return variant, whole.within({k: v for k, v in values.items() if v}, variant.start)


def kept(*files: Path) -> dict[str, dict[str, Any]]:
    """Lines of earlier runs by key of a point; one that a killed run left half written is none."""
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found[record["key"]] = record
    return found


def measure(
    points: Sequence[Point],
    start: Point,
    measurer: Measurer,
    judge: Judge,
    end: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[dict[str, Any]]:
    """What a GPU and what compilers say of each point, those first whose kernels are compiled, until the
    time is over.
    """
    shape, waiting, beside = measurer.shapes[0], list(points), 0.0
    for count in itertools.count():
        if not waiting or clock() > end:
            return
        if count % EVERY == 0:
            beside = _microseconds(measurer.measure(start, NO_LIMIT), shape)
        point = _next(waiting, judge)
        pruned = judge.failure(point)
        if pruned is not None and pruned.kind in ("COMPILE_ERROR", "COMPILE_TIMEOUT"):
            result = Result(failure=pruned)
        else:
            result = trusted(measurer.measure(point, {shape: beside}), {})
        yield {
            "key": point.key,
            "pruned": pruned.kind if pruned else None,
            "beside": beside,
            "result": result.record(),
        }


def _next(waiting: list[Point], judge: Judge) -> Point:
    """The first that no compiler is at; what comes after it is begun."""
    near = waiting[: AHEAD * judge.early + 1]
    for point in near:
        judge.ahead(point)
    while True:
        for place, point in enumerate(near):
            if judge.ready(point):
                return waiting.pop(place)
        time.sleep(POLL)


def _microseconds(result: Result, shape: str) -> float:
    if result.failure:
        raise HsgenError(f"the start does not run: {result.failure}")
    return result.times[shape].median_us


def tabled(
    points: Sequence[Point], known: Mapping[str, dict[str, Any]], about: Table, combinations: int
) -> dict[str, object]:
    """The table as JSON, the start's drift taken out; beside it that, and what pruning would have dropped.

    `pruned_share` is of all combinations, rules included.
    """
    entries: dict[tuple[int, ...], float | str] = {}
    pruned: dict[tuple[int, ...], object] = {}
    besides = [known[point.key]["beside"] for point in points]
    usual = statistics.median(besides)
    for point in points:
        record = known[point.key]
        result, values = result_of(record["result"]), about.values(point)
        if result.failure:
            entries[values] = result.failure.kind
        else:
            entries[values] = result.times[about.shape].median_us * usual / record["beside"]
        if record["pruned"]:
            pruned[values] = record["pruned"]
    timed = sorted(entry for entry in entries.values() if isinstance(entry, float))
    top = timed[max(0, len(timed) // 20 - 1)] if timed else 0.0
    lost = [v for v in pruned if isinstance(entry := entries[v], float) and entry <= top]
    return {
        **replace(about, entries=entries).record(),
        "start_us": {"least": min(besides), "median": usual, "most": max(besides)},
        "pruned": [[*values, kind] for values, kind in sorted(pruned.items())],
        "combinations": combinations,
        "pruned_share": 1 - (len(entries) - len(pruned)) / combinations,
        "pruned_of_the_top_twentieth": len(lost),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.spaces")
    made.add_argument("--spec", required=True)
    made.add_argument("--part", required=True, help="a kernel of it")
    made.add_argument("--order", metavar="BRANCH=ORDER")
    made.add_argument(
        "--hold",
        metavar="KNOB[=LOW..HIGH]",
        action="append",
        default=[],
        help="it stays at its start, or between two values",
    )
    made.add_argument("--shape", default="32K")
    made.add_argument("--qkv", type=Path, help="a capture that inputs are made of")
    made.add_argument("--budget", type=float, default=540, help="seconds")
    made.add_argument("--gpu", default="0", help="or interpreter, for a look without one")
    made.add_argument("--from", dest="earlier", type=Path, nargs="*", default=[], metavar="FILE")
    made.add_argument("-o", "--output", type=Path, default=common.RESULTS)
    return made


def command(args: argparse.Namespace) -> list[str]:
    """The words that say what was measured, without what says only where and how long."""
    words = ["--spec", args.spec, "--part", args.part, "--shape", args.shape]
    words += ["--order", args.order] if args.order else []
    words += [word for text in args.hold for word in ("--hold", text)]
    words += ["--qkv", args.qkv.name] if args.qkv else []
    return words


def main(argv: Sequence[str] | None = None, child: Sequence[str] = COMMAND) -> None:
    """Measure what is not measured yet; write the table once all is."""
    args = parser().parse_args(argv)
    end = time.monotonic() + args.budget
    spec, shape = load(args.spec), shape_of(args.shape)
    interpreted = args.gpu == INTERPRETED
    problem: dict[str, Any] = {"spec": dump(spec), "dtype": "bf16", "target": ""}
    problem["target"] = json.dumps(asdict(H100)) if interpreted else ""
    problem |= {"shapes": [shape.name], "seconds": SECONDS, "fewest": FEWEST}
    problem["capture"] = str(args.qkv.resolve()) if args.qkv else ""
    workers = max(1, (os.cpu_count() or 2) - 1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cache = Path(folder)  # of both: what was compiled is not compiled again by a launch
        with (
            Lanes(problem, [args.gpu], command=child, cache=cache, patience=PATIENCE) as lanes,
            Compilers(workers, cache=cache) as compilers,
        ):
            told = lanes.describe()
            target = H100 if interpreted else Target(**told["target"])
            found = space(passes.run(planner.plan(spec)), target)
            variant, part = chosen(found, args.part, args.order, args.hold)
            points = list(part.points(variant.start))
            random.Random(0).shuffle(points)  # a part of a table is a sample of it
            made = told["made"]
            words = " ".join(command(args))
            about = Table(
                about=f"{part.name} of {spec.name}, {len(points)} points",
                synthetic=interpreted,
                made={**made, "command": f"python -m benchmarks.spaces {words}"},
                spec=spec.name,
                orders=dict(variant.orders),
                part=part.name,
                shape=shape.name,
                names=names_of(part),
                entries={},
            )
            stem = f"space_{spec.name}_{part.name}_{variant.name}_{common.slug(made['card'])}"
            lines = args.output / f"{stem}.jsonl"
            lines.parent.mkdir(parents=True, exist_ok=True)
            wanted = {point.key for point in points}
            earlier = kept(*(f for f in args.earlier if f.name == lines.name), lines)
            known = {key: record for key, record in earlier.items() if key in wanted}
            lines.write_text("".join(f"{json.dumps(each)}\n" for each in known.values()))
            todo = [point for point in points if point.key not in known]
            began, before = time.monotonic(), len(known)
            with lines.open("a", encoding="utf-8") as stream:
                judge: Judge = Lenient() if interpreted else Compiler(spec, found, compilers)
                for record in measure(todo, variant.start, lanes, judge, end):
                    known[record["key"]] = record
                    stream.write(json.dumps(record) + "\n")
                    stream.flush()
    each = (time.monotonic() - began) / max(1, len(known) - before)
    print(f"{len(known)} of {len(points)} points are measured, {each:.2f} s a point")
    if len(known) == len(points):
        common.write_json(args.output / f"{stem}.json", tabled(points, known, about, part.size))
        lines.unlink()


if __name__ == "__main__":
    main()
