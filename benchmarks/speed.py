"""The speed table: the shipped specs against dense attention and FlexAttention, in one run on one card.

    python -m benchmarks.speed --device cuda --budget 560 -o OUT
    python -m benchmarks.speed --device cuda --budget 560 -o OUT --resume OUT/speed_CARD_DATE.json
    python -m benchmarks.speed --report                                            # writes docs/speed.md

Every step of every case stands alone: what fails is written down with its text, what there was no time
for says so, and results are on disk after each step.  Nothing is timed before it was checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import hsgen
from benchmarks import baselines, common, inputs, speed_report, timing
from hsgen import captures, metrics, standins
from hsgen.captures import Group
from hsgen.quality import Json
from hsgen.reference import reference, tensor_shapes
from hsgen.selection import ListSelection
from hsgen.spec import Pool, Score, Spec, load, verify

SYSTEMS = ("moba", "nsa", "hisa")
STAGES = ("hsgen", "dense", "flex")
SMALL = 3000  # tokens of the first check, no multiple of anything
SAMPLED = 8  # consecutive rows of each of the two runs that are checked at full length
TOLERANCE = 1e-2  # |o - reference| / |reference|, bf16 outputs
ROTATED = 256 << 20  # inputs below this many bytes are rotated, so that no cache keeps them
SETS = 3
SECONDS = 1.0  # of timing, a measurement

Tensors = dict[str, Tensor]
Selected = Mapping[str, ListSelection]


class NotExpressibleError(Exception):
    """A baseline that cannot do this case, with the reason."""


class CheckError(Exception):
    """Figures that are not what the reference says."""


# Running steps, come what may -------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class Journal:
    """Results on disk, step by step.

    Attributes:
        path: The file, rewritten after each step.
        deadline: time.monotonic() after which no step is begun.
        data: What is in the file: `runs`, and `cases` by name, each with its `steps`.
    """

    path: Path
    deadline: float
    data: Json = field(default_factory=lambda: {"runs": [], "cases": {}})

    def case(self, name: str, facts: Json) -> Json:
        """The record of a case, made if it is new."""
        record = self.data["cases"].setdefault(name, {**facts, "steps": {}})
        record.update(facts)
        return record

    def done(self, name: str, step: str) -> bool:
        """Whether an earlier run has this step."""
        steps = self.data["cases"].get(name, {}).get("steps", {})
        return steps.get(step, {}).get("status") == "ok"

    def copy(self, name: str, step: str, start: str, end: str, **facts: int) -> None:
        """Take over a step that another case has already done, with the same facts."""
        for other, record in self.data["cases"].items():
            entry = record["steps"].get(step, {})
            same = all(entry.get(fact) == value for fact, value in facts.items())
            if other.startswith(start) and other.endswith(end) and same and self.done(other, step):
                self.data["cases"][name]["steps"].setdefault(step, entry)

    def run(self, name: str, step: str, action: Callable[[], Json]) -> bool:
        """Do a step of a case unless it is done, and write down how it ended.  -> whether it is done"""
        if self.done(name, step):
            return True
        started = time.monotonic()
        entry: Json
        if started > self.deadline:
            entry = {"status": "skipped", "reason": "no time left in this run (--budget)"}
        else:
            entry = _attempt(action)
            entry["seconds"] = round(time.monotonic() - started, 2)
        entry["run"] = len(self.data["runs"]) - 1
        self.data["cases"][name]["steps"][step] = entry
        common.write_json(self.path, self.data)
        print(f"{name:24s} {step:34s} {_short(entry)}", flush=True)
        return entry["status"] == "ok"


def _attempt(action: Callable[[], Json]) -> Json:
    """Run an action; a failure is a result too, with what was warned of on the way to it."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            return {"status": "ok", **action()}
        except NotExpressibleError as reason:
            return {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # noqa: BLE001 - every failure of a backend belongs into the table
            said = [f"{type(error).__name__}: {error}", *(str(each.message) for each in warned)]
            reason, trace = " / ".join(dict.fromkeys(said)), traceback.format_exc(limit=-3)
    return {"status": "failed", "reason": _without_paths(reason), "trace": _without_paths(trace)}


def _without_paths(text: str) -> str:
    """Folders of the machine that ran this say nothing to anyone else."""
    return re.sub(r"/[^\s\"']*/site-packages/", "", text.replace(f"{common.ROOT}/", ""))


def _short(entry: Json) -> str:
    if entry["status"] != "ok":
        return f"{entry['status']}: {entry['reason']}"[:150].replace("\n", " ")
    numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "run"}
    return "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())


# Cases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One system at one length on one kind of input.

    Attributes:
        system: The name of a shipped spec.
        tokens: T and S.
        kind: Of input.
        heads: (query, kv) instead of the spec's own, for trying the script out.
        dim: Likewise.
    """

    system: str
    tokens: int
    kind: inputs.Kind
    heads: tuple[int, int] | None = None
    dim: int | None = None

    @property
    def name(self) -> str:
        """The key of its record."""
        return f"{self.system}/{self.tokens}/{self.kind}"

    @property
    def spec(self) -> Spec:
        """The attention that is timed."""
        spec = load(self.system)
        if self.heads is None or self.dim is None:
            return spec
        return standins.bind(spec, query=self.heads[0], kv=self.heads[1], dim=self.dim)

    @property
    def level(self) -> str:
        """The level whose selection is attended raw."""
        return next(b.over for b in self.spec.attend if b.over and b.values == "raw")

    @property
    def size(self) -> int:
        """Tokens of one of its entries."""
        return self.spec.level(self.level).partition.size

    def facts(self) -> Json:
        """What the record of the case says beside its steps."""
        heads, dim = self.spec.heads, self.spec.head_dim
        assert heads is not None
        assert dim is not None
        return {
            "system": self.system,
            "tokens": self.tokens,
            "inputs": self.kind,
            "heads": [heads.query, heads.kv],
            "head_dim": [dim.qk, dim.v],
            "dtype": "bf16",
            "batch": 1,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """Where and on what cases run."""

    device: str
    seconds: float
    groups: Sequence[Group]
    journal: Journal

    def make(self, case: Case, seed: int, tokens: int | None = None) -> Tensors:
        """One set of inputs."""
        length = tokens or case.tokens
        return inputs.make(case.spec, case.kind, length, self.device, seed, self.groups)

    def sets(self, case: Case) -> list[Tensors]:
        """Enough sets that no call finds its inputs in the cache."""
        first = self.make(case, 0)
        few = inputs.size_in_bytes(first) >= ROTATED or self.device == "cpu"
        return [first, *(self.make(case, seed) for seed in range(1, 1 if few else SETS))]

    def time(self, call: timing.Call) -> Json:
        """Milliseconds of a call."""
        return {"ms": dataclasses.asdict(timing.time_calls(call, self.device, self.seconds))}


# hsgen itself ---------------------------------------------------------------------------------------


def run_hsgen(bench: Bench, case: Case) -> None:
    """Check, then time, the whole of a case and its parts."""
    journal, name = bench.journal, case.name
    steps = ["total", "select", "attend", "kernels", "memory"]
    steps = steps if bench.device == "cuda" else steps[:3]
    wanted = ["check small", "check", *steps]
    if all(journal.done(name, step) for step in wanted):
        return
    small = min(SMALL, case.tokens)
    journal.copy(name, "check small", f"{case.system}/", f"/{case.kind}", rows=small)
    if not journal.run(name, "check small", lambda: check_all(bench, case, small)):
        return
    sets = bench.sets(case)
    if not journal.run(name, "check", lambda: check_sampled(case, sets[0])):
        return
    kernel = hsgen.load_kernel(case.spec)
    chosen = [kernel.select(**x) for x in sets]
    calls = {
        "total": lambda n: kernel(**sets[n % len(sets)]),
        "select": lambda n: kernel.select(**sets[n % len(sets)]),
        "attend": lambda n: kernel(**sets[n % len(sets)], selection=chosen[n % len(sets)]),
    }
    for step, call in calls.items():
        journal.run(name, step, lambda call=call: bench.time(call))
    if bench.device == "cuda":
        total = calls["total"]
        journal.run(name, "kernels", lambda: {"ms": timing.kernel_times(total)})
        journal.run(name, "memory", lambda: {"bytes": timing.peak_memory(total)})


def check_all(bench: Bench, case: Case, tokens: int) -> Json:
    """Every row of a short input against the float64 reference on the kernel's own selection."""
    tensors = bench.make(case, 10, tokens)
    o, selection = _run(case, tensors)
    return _compare(case, tensors, o, selection, [(0, tokens)])


def check_sampled(case: Case, tensors: Tensors) -> Json:
    """Two runs of rows of the full length, in the middle and at the end, in the same way."""
    o, selection = _run(case, tensors)
    T = case.tokens
    runs = [(a, min(a + SAMPLED, T)) for a in (T // 2 - SAMPLED // 2, T - SAMPLED)]
    found = _compare(case, tensors, o, selection, runs)
    return found | {"density": _density(case, selection[case.level].indices[0])}


def _run(case: Case, tensors: Tensors) -> tuple[Tensor, Selected]:
    kernel = hsgen.load_kernel(case.spec)
    selection = kernel.select(**tensors)
    return kernel(**tensors), selection


def _compare(
    case: Case,
    tensors: Tensors,
    o: Tensor,
    selection: Selected,
    runs: Sequence[tuple[int, int]],
) -> Json:
    """Hold outputs and choices of some rows against the reference.

    Raises:
        CheckError: the output is further off than TOLERANCE, or not finite.
    """
    error, agreement = 0.0, 1.0
    for a, b in runs:
        part = standins.rows_of(case.spec, tensors, a, b)
        given = {
            name: ListSelection(level=name, indices=s.indices[:, a:b])
            for name, s in selection.items()
        }
        expected = reference(case.spec, part, selection=given, keep_scores=False).o
        error = max(error, _relative(o[:, a:b], expected))
        own = reference(case.spec, part, keep_scores=False).selection[case.level].indices
        entries = -(-b // case.size)
        agreement = min(agreement, _overlap(given[case.level].indices[0], own[0], entries))
    if not error < TOLERANCE:
        raise CheckError(f"relative error {error:.3g}, expected below {TOLERANCE}")
    return {"error": error, "same_choice": agreement, "rows": sum(b - a for a, b in runs)}


def _relative(o: Tensor, expected: Tensor) -> float:
    return float((o.double() - expected).norm() / expected.norm())


def _overlap(chosen: Tensor, own: Tensor, entries: int) -> float:
    """Share of the reference's own choices that the kernel made too.  i32[R, Hs, K], twice"""
    both = metrics.members(chosen, entries) & metrics.members(own, entries)
    return float(both.sum() / (own >= 0).sum().clamp(min=1))


def _density(case: Case, indices: Tensor) -> float:
    """Tokens attended in the selected branch over all causal pairs.  i32[T, Hs, K]"""
    T, Hs, _ = indices.shape
    position = torch.arange(T, device=indices.device)[:, None, None]
    start = indices.long() * case.size
    kept = (position + 1 - start).clamp(max=case.size) * (indices >= 0)
    return float(kept.sum() / (Hs * T * (T + 1) / 2))


# Baselines ------------------------------------------------------------------------------------------


def run_dense(bench: Bench, case: Case) -> None:
    """Dense causal attention on the same q, k, v, every way that PyTorch has."""
    variants = contenders(bench.journal, case, baselines.variants(case.spec, bench.device))
    steps = {f"dense {variant.name}": variant for variant in variants}
    if all(bench.journal.done(case.name, step) for step in steps):
        return
    tensors = bench.make(case, 0)
    x = tensors["q"], tensors["k"], tensors["v"]
    del tensors
    for step, variant in steps.items():
        action = functools.partial(time_dense, bench, case.tokens, variant, x)
        bench.journal.run(case.name, step, action)


def contenders(
    journal: Journal, case: Case, variants: Sequence[baselines.Variant]
) -> list[baselines.Variant]:
    """The fastest way of each backend where a shorter input was timed, else all of them."""
    shorter = [
        record["steps"]
        for record in journal.data["cases"].values()
        if record["system"] == case.system and record["tokens"] < case.tokens
    ]
    times = {
        variant: min(
            (
                steps[step]["ms"]["median"]
                for steps in shorter
                if steps.get(step := f"dense {variant.name}", {}).get("status") == "ok"
            ),
            default=math.inf,
        )
        for variant in variants
    }
    best = {
        backend: min((v for v in variants if v.backend == backend), key=times.__getitem__)
        for backend in dict.fromkeys(v.backend for v in variants)
    }
    timed = {backend for backend, variant in best.items() if times[variant] < math.inf}
    return [v for v in variants if v.backend not in timed or v is best[v.backend]]


def time_dense(
    bench: Bench, tokens: int, variant: baselines.Variant, x: tuple[Tensor, Tensor, Tensor]
) -> Json:
    """Check a variant's last row, then time it."""
    call = baselines.dense(variant, *x)
    expected = baselines.last_row(*x)
    error = _relative(call(0)[:, -1], expected.double())
    if not error < TOLERANCE:
        raise CheckError(f"relative error {error:.3g} in the last row")
    q, v = x[0], x[2]
    flops = baselines.dense_flops(tokens, q.shape[2], q.shape[3], v.shape[3])
    timed = bench.time(call)
    return timed | {"error": error, "tflops": flops / timed["ms"]["median"] / 1e9}


def run_flex(bench: Bench, case: Case) -> None:
    """FlexAttention on the blocks that hsgen selected, beside hsgen attending to the same."""
    journal, name = bench.journal, case.name
    steps = ("attend selected", "flex mask", "flex")
    if all(journal.done(name, step) for step in steps):
        return
    if not journal.done(name, "total"):
        for step in steps:
            journal.run(name, step, lambda: _not_expressible("hsgen itself has no figures here"))
        return
    tensors = bench.make(case, 0)
    selection = {case.level: hsgen.load_kernel(case.spec).select(**tensors)[case.level]}
    spec = selected_only(case)
    tensors = {name: tensors[name] for name in tensor_shapes(spec, 1, 1, 1)}
    kernel = hsgen.load_kernel(spec)

    def attend(_number: int) -> Tensor:
        return kernel(**tensors, selection=selection)

    made: list[BlockMask] = []
    indices = selection[case.level].indices[0]
    journal.run(name, steps[0], lambda: bench.time(attend))
    if journal.done(name, steps[1]):
        _time_mask(bench, case, indices, made)  # the mask is needed again, its time is not
    journal.run(name, steps[1], lambda: _time_mask(bench, case, indices, made))
    journal.run(name, steps[2], lambda: _time_flex(bench, tensors, made, attend(0)))


def _time_mask(bench: Bench, case: Case, indices: Tensor, made: list[BlockMask]) -> Json:
    """Time what turns a selection into FlexAttention's mask, and keep the mask."""
    if bench.device != "cuda":
        _not_expressible("FlexAttention is timed on GPUs only")
    table = baselines.table_elements(case.tokens, indices.shape[1], case.size)
    if table >= baselines.LARGEST_TABLE:
        _not_expressible(
            f"the mask would read a table of {table:.2g} elements (who selected what, token by "
            "token), beyond what FlexAttention indexes"
        )
    heads = case.facts()["heads"][0]
    made[:] = [baselines.flex_mask(indices, case.size, heads)]
    return bench.time(lambda _n: baselines.flex_mask(indices, case.size, heads))


def _time_flex(bench: Bench, tensors: Tensors, made: list[BlockMask], expected: Tensor) -> Json:
    """Time FlexAttention once it agrees with hsgen on the same selection."""
    if not made:
        _not_expressible("there is no mask")
    call = baselines.flex(made[0], tensors["q"], tensors["k"], tensors["v"])
    difference = _relative(call(0), expected.double())
    if not difference < TOLERANCE:
        raise CheckError(f"relative difference {difference:.3g} from hsgen on the same selection")
    return bench.time(call) | {"difference": difference, "sparsity": made[0].sparsity()}


def selected_only(case: Case) -> Spec:
    """The selected branch alone, for a selection that is given: what FlexAttention can be asked for."""
    spec, level = case.spec, case.spec.level(case.level)
    if len(spec.attend) == 1:
        return spec
    shared = spec.level(level.score.source).score if level.score.source else level.score
    score = Score(form="dot", share=shared.share, reduce=shared.reduce)
    alone = level.model_copy(update={"score": score, "pool": Pool(keys="mean")})
    branch = next(b for b in spec.attend if b.over == level.name)
    update = {"levels": (alone,), "attend": (branch,), "combine": None}
    return verify(spec.model_copy(update={"name": f"{spec.name}_selected", **update}))


def _not_expressible(reason: str) -> Never:
    raise NotExpressibleError(reason)


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every case: hsgen first, then dense attention, then FlexAttention."""
    made = common.provenance("benchmarks.speed", argv, args.device)
    path = args.output / f"speed_{common.slug(made['card'])}_{made['date']}.json"
    journal = Journal(path=path, deadline=time.monotonic() + args.budget)
    if args.resume:
        journal.data = common.read_json(args.resume)
    journal.data["runs"].append(made | {"capture": args.capture.name})
    groups = captures.load(args.capture)
    bench = Bench(device=args.device, seconds=args.seconds, groups=groups, journal=journal)
    stages = {"hsgen": run_hsgen, "dense": run_dense, "flex": run_flex}
    for stage in args.stages:
        for case in _cases(args, stage):
            journal.case(case.name, case.facts())
            try:
                stages[stage](bench, case)
            except Exception as error:  # noqa: BLE001 - outside any step: while making inputs, say
                journal.run(case.name, f"{stage} set-up", functools.partial(_raise, error))
            _forget(args.device)
    return path


def _raise(error: Exception) -> Never:
    raise error


def _cases(args: argparse.Namespace, stage: str) -> Iterator[Case]:
    """Dense attention does the same work on any input: it is timed on the random one."""
    for tokens in args.tokens:
        for system in args.systems:
            for kind in args.inputs if stage != "dense" else args.inputs[:1]:
                heads = tuple(args.heads) if args.heads else None
                yield Case(system=system, tokens=tokens, kind=kind, heads=heads, dim=args.dim)


def _forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# Command line ---------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time the shipped specs against dense attention.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument(
        "--inputs", nargs="+", choices=("random", "real"), default=["random", "real"]
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--heads", type=int, nargs=2, help="query and kv, to try the script out")
    parser.add_argument("--dim", type=int, help="of a head, with --heads")
    parser.add_argument(
        "--capture", type=Path, default=common.SHIPPED_CAPTURE, help="of real heads"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, a measurement")
    parser.add_argument(
        "--budget", type=float, default=3600.0, help="seconds, no step begins later"
    )
    parser.add_argument("--resume", type=Path, help="results whose finished steps are kept")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument("--report", type=Path, nargs="*", help="results to write up (default: all)")
    parser.add_argument("--page", type=Path, default=common.ROOT / "docs" / "speed.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results, or write the page from results."""
    args = arguments(argv)
    if args.report is not None:
        results = [common.read_json(path) for path in common.found(args.report, "speed")]
        args.page.write_text(speed_report.page(results))
        print(args.page)
        return 0
    path = run(args, sys.argv[1:] if argv is None else argv)
    print(speed_report.whole([common.read_json(path)]))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
