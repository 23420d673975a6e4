"""What narrow beams cost: how much of an exhaustive choice survives levels above it on real attention.

    python -m benchmarks.beams .captures/smollm2_8k.safetensors
    python -m benchmarks.beams --report                     # writes docs/beams.md and docs/beams.svg

The same entries are chosen in the end, by the same scores, with all of them scored and with beams above.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.beam_structures import PANELS, STEPS, Problem, Structure
from hsgen import captures, charts, metrics
from hsgen.captures import Group
from hsgen.quality import RUN, Json, measured_rows, noise
from hsgen.reference import reference
from hsgen.spec import Spec

STRUCTURES = [structure for panel in PANELS.values() for structure in panel]
WIDTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


# Measuring ------------------------------------------------------------------------------------------


def chosen(
    spec: Spec, group: Group, position: Tensor, size: int, inputs: Mapping[str, Tensor]
) -> Tensor:
    """What the last level keeps, run of rows by run of rows.  -> bool[Hs, R, N]"""
    name, found = spec.levels[-1].name, []
    k, v = group.k[None, :, None], group.v[None, :, None]
    for run in position.split(RUN):
        a, b = int(run[0]), int(run[-1]) + 1
        rows = {"q": group.q[None, a:b], "k": k[:, :b], "v": v[:, :b], **inputs}
        result = reference(spec, rows, dtype=torch.float32, keep_scores=False)
        found.append(result.selection[name].indices[0])
    return metrics.members(torch.cat(found), -(-len(group.k) // size))


def measure(
    group: Group, position: Tensor, structure: Structure, kept: int, widths: Sequence[float]
) -> list[Json]:
    """One record a width and head: the share of the exhaustive choice that survives, and its mass.

    `first`: the share of rows that keep the first entry, and the mass that it holds.
    """
    q, size = group.q, structure.size
    heads, dim = q.shape[1:]
    problem = Problem(heads=heads, dim=dim, tokens=len(q), kept=kept)
    inputs = structure.inputs(group)
    dense = metrics.dense(q[position], group.k, group.v, position)
    whole = chosen(structure.spec(problem, None), group, position, size, inputs)
    drawn = noise(len(position), whole.shape[-1])
    best = metrics.judge(dense, metrics.choices(dense, whole, size, drawn)["oracle"], size)
    exhaustive = metrics.judge(dense, whole, size)
    first = metrics.entry_mass(dense.probs, size)[..., 0].mean(-1)
    exact = None
    if structure.exact:
        exact = chosen(structure.exact(problem), group, position, size, inputs)
    records: list[Json] = []
    for width in widths:
        found = chosen(structure.spec(problem, width), group, position, size, inputs)
        quality = metrics.judge(dense, found, size)
        recall = _recall(found, whole, heads)
        sink = found[..., 0].float().mean(-1).repeat_interleave(heads // len(found))
        recall_exact = None if exact is None else _recall(found, exact, heads)
        records += [
            {
                "levels": structure.name,
                "width": width,
                "layer": group.layer,
                "head": group.query_head(h),
                "recall": recall[h],
                "recall_exact": recall_exact and recall_exact[h],
                "first": float(sink[h]),
                "mass_first": float(first[h]),
                "mass": float(quality.mass[h].mean()),
                "mass_exhaustive": float(exhaustive.mass[h].mean()),
                "mass_oracle": float(best.mass[h].mean()),
                "error": float(quality.error[h].mean()),
                "error_exhaustive": float(exhaustive.error[h].mean()),
            }
            for h in range(heads)
        ]
    return records


def _recall(found: Tensor, goal: Tensor, heads: int) -> list[float]:
    """The share of a choice that is found, by query head.  bool[Hs, R, N], twice"""
    shares = ((found & goal).sum(-1) / goal.sum(-1)).mean(-1)
    return shares.repeat_interleave(heads // len(shares)).tolist()


def run(args: argparse.Namespace, argv: Sequence[str]) -> Json:
    """Measure every structure on every group of the capture."""
    started = time.monotonic()
    records: list[Json] = []
    for group in captures.load(args.capture):
        group = group.prefix(args.tokens)
        kept = round(args.budget * len(group.q))
        widths = [*args.widths, math.ceil(len(group.q) / kept)]  # the last one covers the text
        for structure in STRUCTURES:
            position = measured_rows(len(group.q), args.rows * structure.rows)
            found = measure(group, position, structure, kept, widths)
            records += found
            seconds = time.monotonic() - started
            recalls = "  ".join(f"{w:g}: {_mean(_at(found, w), 'recall'):.3f}" for w in widths)
            print(f"[{seconds:6.1f} s] layer {group.layer:2d}  {structure.name:24s} {recalls}")
    return {
        "made": common.provenance("benchmarks.beams", argv, "cpu"),
        "capture": {"file": args.capture.name, **captures.metadata(args.capture)},
        "tokens": len(group.q),
        "rows": len(measured_rows(len(group.q), args.rows)),
        "budget": args.budget,
        "seconds": round(time.monotonic() - started, 1),
        "records": records,
    }


def _mean(records: Sequence[Json], field: str) -> float:
    return sum(float(r[field]) for r in records) / len(records)


# Reporting ------------------------------------------------------------------------------------------


def drawing(result: Json) -> str:
    """The picture: above recall of the exhaustive choice, below mass, against beam width."""
    columns = []
    for last, structures in PANELS.items():
        of = {x.look: _of(result, x) for x in structures}
        column = []
        for field, limit, least in (("recall", None, 0.0), ("mass", "mass_exhaustive", 0.2)):
            column.append(
                charts.Panel(
                    title=f"{field}, {last}",
                    widths=_widths(result),
                    lines={
                        look: [_mean(_at(own, w), field) for w in _widths(result)]
                        for look, own in of.items()
                    },
                    limits={look: _mean(own, limit) for look, own in of.items()} if limit else {},
                    least=least,
                )
            )
        columns.append(column)
    about = (
        f"{result['capture']['file']}, {result['tokens']} tokens, {result['budget']:.0%} of them kept;"
        " means over layers and heads",
        "grey: every entry scored",
    )
    return charts.plot("what survives a beam", about, "beam width", columns)


def _of(result: Json, structure: Structure) -> list[Json]:
    return [r for r in result["records"] if r["levels"] == structure.name]


def _at(records: Sequence[Json], width: float) -> list[Json]:
    return [r for r in records if r["width"] == width]


def _widths(result: Json) -> list[float]:
    return sorted({r["width"] for r in result["records"]})


def page(results: Sequence[Json]) -> str:
    """The page docs/beams.md."""
    result = results[0]
    made = result["made"]
    widths = _widths(result)
    parts = [
        METHOD_TEXT.format(
            tokens=f"{result['tokens']:,}",
            rows=f"{result['rows']:,}",
            budget=f"{result['budget']:.0%}",
            widest=f"{widths[-1]:g}",
            steps=STEPS,
            layers=", ".join(map(str, sorted({r["layer"] for r in result["records"]}))),
        )
    ]
    for field, title in (("recall", "Recall"), ("mass", "Mass"), ("error", "Output error")):
        limit = None if field == "recall" else f"{field}_exhaustive"
        rows = [(x.name, _of(result, x)) for x in STRUCTURES]
        parts += [f"## {title}\n", _by_width(rows, widths, field, limit)]
    parts.append("## By layer: recall\n")
    by_layer = [
        (f"{key[0]}; {key[1]}", [r for r in result["records"] if (r["levels"], r["layer"]) == key])
        for key in product(BY_LAYER, sorted({r["layer"] for r in result["records"]}))
    ]
    parts.append(_by_width(by_layer, widths, "recall", head="levels; layer"))
    parts.append(EXACT_TEXT)
    rows = [(x.name, _of(result, x)) for x in STRUCTURES if x.exact]
    parts.append(_by_width(rows, widths, "recall_exact"))
    parts.append(FINDINGS_TEXT)
    parts.append("## Where the figures come from\n")
    versions = f"torch {made['torch']}, triton {made['triton']}"
    parts.append(
        f"- reference on {made['card']}, {versions}, {made['date']}, {result['seconds']:.0f} s:"
        f" `{made['command']}`\n"
    )
    return "\n".join(parts)


def _by_width(
    rows: Sequence[tuple[str, list[Json]]],
    widths: Sequence[float],
    field: str,
    limit: str | None = None,
    head: str = "levels",
) -> str:
    """A row for each of some records, and what its figures tend to."""
    names = [head, *(f"{w:g}" for w in widths), *(["every entry"] if limit else [])]
    table = []
    for name, own in rows:
        figures = [_mean(_at(own, w), field) for w in widths]
        figures += [_mean(own, limit)] if limit else []
        table.append([name, *(f"{x:.3f}" for x in figures)])
    return common.table(names, table)


BY_LAYER = ("256 > 64 > 16", "HiP, 256 > 32 > 8", "HiRouter, trained")
METHOD_TEXT = """# What a beam loses

Queries, keys and values of SmolLM2-135M on {tokens} tokens of prose (layers {layers}; one group of three
query heads each).  Every level lies inside what the level above kept, and the last one keeps {budget} of the
tokens.  This page is generated by `benchmarks/beams.py`, and `examples/three_levels.yaml` is such a spec.

![recall and mass against beam width](beams.svg)

**Beam width** is what a level above expands over what is kept in the end, in tokens: with 2, every level
above holds twice as many tokens as the last one keeps.  With one that covers the whole text, {widest} here,
nothing is lost: that the choice is then that of the last level alone is a law, and tested.

**Recall** is the share of the exhaustive choice (the last level with every entry scored) that is chosen too.
**Mass** and **output error** are as in [quality.md](quality.md); *every entry* is the exhaustive choice.
Means over {rows} rows, layers and heads; of HiP, where 64 rows choose as one, over four times as many.

- **64 > 16** and the like: mean-pooled blocks; at every level the first and the last entry are forced.
- **HiP**: `specs/hip.yaml` with the budgets and forced entries of these blocks, and without its window.  A
  block of 64 rows keeps blocks of 8 for all heads, by the best logit that halving a block comes upon.
- **HiRouter**: `specs/hirouter.yaml` with other budgets; a group keeps tokens by its summed logits, nothing
  is forced, and a node counts as its share of the text.  There are no published weights.  *k-means*: 16
  centroids of the keys of this very text, and 16 in each of those, by k-means of their directions.
  *Trained*: these after {steps} steps on the spec's own loss, dual entropy, of the same keys and queries.
  *Random*: directions that know nothing of the keys.
"""

EXACT_TEXT = """## HiP beside the blocks whose best key is best

Halving finds the best key of a block of 8 only where it is on the way: even with every block scored, some of
the blocks whose best key scores most are missed.  Recall of those:
"""

FINDINGS_TEXT = """
What to see: the coarsest level decides.  Levels between it and the last one lose nothing more, at one
width, and save most of the scores.  Blocks of 16 below blocks of 64 need a width of 2 for 0.98 of the mass
that the exhaustive choice holds, below blocks of 256 one of 4.  Single tokens are lost more easily, as the
mean of a block hides them: at a width of 4 a tenth of the mass.  Recall falls faster than mass, since what
a beam loses are the weaker ones of the choice.

HiP needs a width of 6 to 8 for the mass, of its own limit, that chains of 256 have of theirs at 3 to 4: a
chunk of 256 is judged by the 16 keys that halving it reads.  It ships with widths of 16 and 4.  Its error
does not fall beyond a width of 6: the best logit of any of 64 rows and three heads is not where most of the
mass of all of them is.

A tree that knows the keys is worth much: at a width of 4 a random one recalls a third as many tokens.  Yet
HiRouter loses more mass than blocks in place do, since nothing forces the first token: layers 14 and 20
give it half of their mass, and at a width of 4 half of their rows miss it in the k-means tree.  The loss, as
we read it, does not improve on k-means.  It asks for sharp and even shares, of keys and of queries alike, and
never whether both go the same way.
"""


# Command line ---------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Recall against beam width on real attention.")
    parser.add_argument("capture", type=Path, nargs="?", default=common.SHIPPED_CAPTURE)
    parser.add_argument("--tokens", type=int, default=8192, help="a prefix of the capture")
    parser.add_argument("--rows", type=int, default=256, help="rows measured")
    parser.add_argument("--budget", type=float, default=0.05, help="share of the tokens kept")
    parser.add_argument("--widths", type=float, nargs="+", default=WIDTHS)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument("--report", type=Path, nargs="*", help="results to write up (default: all)")
    parser.add_argument("--page", type=Path, default=common.ROOT / "docs" / "beams.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results, or write the page from results."""
    args = arguments(argv)
    if args.report is not None:
        results = [common.read_json(path) for path in common.found(args.report, "beams")]
        args.page.write_text(page(results))
        args.page.with_suffix(".svg").write_text(drawing(results[0]))
        print(args.page)
        return 0
    result = run(args, sys.argv[1:] if argv is None else argv)
    path = args.output / f"beams_cpu_{result['made']['date']}.json"
    common.write_json(path, result)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
