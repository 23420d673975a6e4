"""The speed table: the shipped specs against dense attention and FlexAttention, in one run on one card.

    python -m benchmarks.speed --device cuda --budget 560 -o OUT
    python -m benchmarks.speed --device cuda --budget 560 -o OUT --resume OUT/speed_CARD_DATE.json
    python -m benchmarks.speed --report                                            # writes docs/speed.md

Every step of every case stands alone: what fails is written down with its text, what there was no time
for says so, and results are on disk after each step.  Nothing is timed before it was checked.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Never

import torch
from torch import Tensor

from benchmarks import common, front, speed_report
from hsgen import baselines, captures, checking, measure, samples, standins
from hsgen.measure import Setting, Step, Tensors
from hsgen.quality import Json
from hsgen.spec import Spec, load

SYSTEMS = ("moba", "nsa", "hisa")
STAGES = ("hsgen", "dense", "flex")
SECONDS = 1.0  # of timing, a measurement


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
            entry = checking.attempt(action)
            entry["seconds"] = round(time.monotonic() - started, 2)
        entry["run"] = len(self.data["runs"]) - 1
        self.data["cases"][name]["steps"][step] = entry
        common.write_json(self.path, self.data)
        print(f"{name:24s} {step:34s} {_short(entry)}", flush=True)
        return entry["status"] == "ok"


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
        layer: That it is, of a system that differs by layer.
    """

    system: str
    tokens: int
    kind: samples.Kind
    heads: tuple[int, int] | None = None
    dim: int | None = None
    layer: int | None = None

    @property
    def name(self) -> str:
        """The key of its record."""
        return f"{self.system}/{self.tokens}/{self.kind}"

    @property
    def spec(self) -> Spec:
        """The attention that is timed."""
        spec = load(self.system).bind(layer=self.layer)
        if self.heads is None or self.dim is None:
            return spec
        return standins.bind(spec, query=self.heads[0], kv=self.heads[1], dim=self.dim)

    @property
    def level(self) -> str:
        """The level whose selection is attended raw: of no mask's blocks, the last one that is attended."""
        try:
            return baselines.selected_level(self.spec).name
        except checking.NotExpressibleError:
            return [branch.over for branch in self.spec.attend if branch.over][-1]

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

    setting: Setting
    journal: Journal

    def of(self, case: Case) -> Setting:
        """The same for a case's kind of input."""
        return replace(self.setting, kind=case.kind)


# hsgen itself ---------------------------------------------------------------------------------------


def run_hsgen(bench: Bench, case: Case) -> None:
    """Check, then time, the whole of a case and its parts."""
    journal, name, setting, spec = bench.journal, case.name, bench.of(case), case.spec
    steps = ["total", "select", "attend", "configs", "kernels", "memory"]
    steps = steps if setting.device == "cuda" else steps[:4]
    wanted = ["check small", "check", *steps]
    if all(journal.done(name, step) for step in wanted):
        return
    small = min(measure.SMALL, case.tokens)
    journal.copy(name, "check small", f"{case.system}/", f"/{case.kind}", rows=small)
    if not journal.run(name, "check small", lambda: measure.check_all(setting, spec, small)):
        return
    sets = setting.sets(spec, case.tokens)
    if not journal.run(name, "check", lambda: check_sampled(setting, case, sets[0])):
        return
    _run_steps(journal, name, measure.kernel_steps(setting, spec, sets))


def _run_steps(journal: Journal, name: str, steps: Iterator[Step]) -> None:
    for step, action in steps:
        journal.run(name, step, action)


def check_sampled(setting: Setting, case: Case, tensors: Tensors) -> Json:
    """Two runs of rows of the full length, in the middle and at the end, against the reference."""
    o, selection = measure.run(setting, case.spec, tensors)
    found = checking.compare(
        case.spec, tensors, o, selection, checking.sampled(case.spec, case.tokens)
    )
    return found | {"density": _density(case, selection[case.level].indices[0])}


def _density(case: Case, indices: Tensor) -> float:
    """Tokens of the entries that rows chose, in the selected branch, over all pairs.  i32[T, Hs, K]

    Of a causal spec those up to the row.
    """
    T, Hs, _ = indices.shape
    position = torch.arange(T, device=indices.device)[:, None, None]
    seen = position + 1 if case.spec.causal else torch.full_like(position, T)
    start = indices.long() * case.size
    kept = (seen - start).clamp(0, case.size) * (indices >= 0)
    return float(kept.sum() / (Hs * seen.sum()))


# Baselines ------------------------------------------------------------------------------------------


def run_dense(bench: Bench, case: Case) -> None:
    """Dense causal attention on the same q, k, v, every way that PyTorch has."""
    journal, setting = bench.journal, bench.of(case)
    variants = contenders(journal, case, baselines.variants(case.spec, setting.device))
    if all(journal.done(case.name, f"dense {variant.name}") for variant in variants):
        return
    made = setting.make(case.spec, case.tokens, 0)
    tensors = {name: made[name] for name in "qkv"}
    del made
    _run_steps(journal, case.name, measure.dense_steps(setting, case.spec, variants, tensors))


def contenders(
    journal: Journal, case: Case, variants: Sequence[baselines.Variant]
) -> list[baselines.Variant]:
    """The fastest way of each backend where a shorter input was timed, else all of them."""
    times: dict[str, float] = {}
    for record in journal.data["cases"].values():
        if record["system"] == case.system and record["tokens"] < case.tokens:
            for step, entry in record["steps"].items():
                if step.startswith("dense ") and entry.get("status") == "ok":
                    name, ms = step.removeprefix("dense "), entry["ms"]["median"]
                    times[name] = min(ms, times.get(name, ms))
    return baselines.contenders(variants, times)


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
    setting, masked = bench.of(case), journal.done(name, "flex mask")
    tensors = setting.make(case.spec, case.tokens, 0)
    _run_steps(journal, name, measure.flex_steps(setting, case.spec, tensors, masked=masked))


def _not_expressible(reason: str) -> Never:
    raise checking.NotExpressibleError(reason)


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every case: hsgen first, then dense attention, then FlexAttention."""
    made = common.provenance("benchmarks.speed", argv, args.device)
    path = args.output / f"speed_{common.slug(made['card'])}_{made['date']}.json"
    journal = Journal(path=path, deadline=time.monotonic() + args.budget)
    if args.resume:
        journal.data = common.read_json(args.resume)
    journal.data["runs"].append(made | {"capture": args.capture.name})
    groups = captures.load(args.capture)
    setting = Setting(device=args.device, kind="random", groups=groups, seconds=args.seconds)
    bench = Bench(setting=setting, journal=journal)
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
    parser.add_argument(
        "--systems", nargs="+", choices=front.SYSTEMS + front.OTHERS, default=SYSTEMS
    )
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
