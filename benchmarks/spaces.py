"""Measure a part of a spec's space in full on the GPU that is here: what search quality is judged by.

    python -m benchmarks.spaces --spec nsa --part attend_selected --shape 32K
    python -m benchmarks.spaces --spec moba --part attend_selected --order selected=rows --shape 32K

Every point that keeps the rules is verified, then timed as a whole call, the other parts at their start;
compilers are asked too, but drop nothing, so that what pruning would have dropped is known.  Points are
kept as they are measured: the same command goes on where it was stopped, `--budget` seconds at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from hsgen import passes, planner
from hsgen.lanes import Lanes
from hsgen.measurer import Result, Table, names_of, result_of, shape_of, trusted
from hsgen.pruning import Compiler
from hsgen.resources import Compilers
from hsgen.space import Part, Point, Space, Variant, space
from hsgen.spec import dump, load
from hsgen.target import Target

AHEAD = 16  # points whose kernels compile while one is measured
NO_LIMIT: Mapping[str, float] = {}


def chosen(found: Space, part: str, order: str | None) -> tuple[Variant, Part]:
    """The part of the variant with an order, as branch=rows; of the plan's own without."""
    orders = (tuple(order.split("=")),) if order else ()
    variant = next(v for v in found.variants if v.orders == orders)
    return variant, next(p for p in variant.parts if part in p.kernels)


def kept(file: Path) -> dict[str, dict[str, object]]:
    """Lines of earlier runs by key of a point; one that a killed run left half written is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"]] = record
    return found


def measure(
    points: Sequence[Point], lanes: Lanes, compiler: Compiler, end: float
) -> Iterator[dict[str, object]]:
    """What a GPU and what compilers say of each point, until the time is over."""
    for place, point in enumerate(points):
        if time.monotonic() > end:
            return
        for other in points[place : place + AHEAD]:
            compiler.ahead(other)
        pruned = compiler.failure(point)
        result: Result = trusted(lanes.measure(point, NO_LIMIT), {})
        yield {
            "key": point.key,
            "pruned": pruned.kind if pruned else None,
            "result": result.record(),
        }


def tabled(
    points: Sequence[Point], known: Mapping[str, dict[str, object]], about: Table
) -> dict[str, object]:
    """The table as JSON, and beside it what pruning would have dropped."""
    entries: dict[tuple[int, ...], float | str] = {}
    pruned: dict[tuple[int, ...], object] = {}
    for point in points:
        record = known[point.key]
        result, values = result_of(record["result"]), about.values(point)  # type: ignore[arg-type]
        failure = result.failure
        entries[values] = failure.kind if failure else result.times[about.shape].median_us
        if record["pruned"]:
            pruned[values] = record["pruned"]
    timed = sorted(entry for entry in entries.values() if isinstance(entry, float))
    top = timed[max(0, len(timed) // 20 - 1)] if timed else 0.0
    lost = [v for v in pruned if isinstance(entries[v], float) and entries[v] <= top]
    return {
        **Table(**{**asdict_of(about), "entries": entries}).record(),
        "pruned": [[*values, kind] for values, kind in sorted(pruned.items())],
        "pruned_share": len(pruned) / len(entries),
        "pruned_of_the_top_twentieth": len(lost),
    }


def asdict_of(table: Table) -> dict[str, object]:
    """A table's fields as they are."""
    return {name: getattr(table, name) for name in Table.__dataclass_fields__}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet; write the table once all is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spaces")
    parser.add_argument("--spec", required=True)
    parser.add_argument("--part", required=True, help="a kernel of it")
    parser.add_argument("--order", metavar="BRANCH=ORDER")
    parser.add_argument("--shape", default="32K")
    parser.add_argument("--qkv", type=Path, help="a capture that inputs are made of")
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--gpu", default="0")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    end = time.monotonic() + args.budget
    spec, shape = load(args.spec), shape_of(args.shape)
    problem: dict[str, Any] = {"spec": dump(spec), "dtype": "bf16", "target": ""}
    problem["shapes"] = [shape.name]
    problem["capture"] = str(args.qkv.resolve()) if args.qkv else ""
    with Lanes(problem, [args.gpu]) as lanes, Compilers(os.cpu_count() or 2) as compilers:
        told = lanes.describe()
        found = space(passes.run(planner.plan(spec)), Target(**told["target"]))
        variant, part = chosen(found, args.part, args.order)
        points = list(part.points(variant.start))
        random.Random(0).shuffle(points)  # a part of a table is a sample of it
        words = ["--spec", args.spec, "--part", args.part, "--shape", args.shape]
        words += ["--order", args.order] if args.order else []
        words += ["--qkv", args.qkv.name] if args.qkv else []
        about = Table(
            about=f"{part.name} of {spec.name}, {len(points)} points",
            synthetic=False,
            made={**told["made"], "command": f"python -m benchmarks.spaces {' '.join(words)}"},
            spec=spec.name,
            part=part.name,
            shape=shape.name,
            names=names_of(part),
            entries={},
        )
        stem = f"space_{spec.name}_{part.name}_{variant.name}_{common.slug(told['made']['card'])}"
        lines = args.output / f"{stem}.jsonl"
        known = kept(lines)
        todo = [point for point in points if point.key not in known]
        compiler = Compiler(spec, found, compilers)
        with lines.open("a", encoding="utf-8") as stream:
            for record in measure(todo, lanes, compiler, end):
                known[str(record["key"])] = record
                stream.write(json.dumps(record) + "\n")
                stream.flush()
    print(f"{len(known)} of {len(points)} points are measured")
    if len(known) == len(points):
        common.write_json(args.output / f"{stem}.json", tabled(points, known, about))
        lines.unlink()


if __name__ == "__main__":
    main()
