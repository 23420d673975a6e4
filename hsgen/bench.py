"""What `hsgen bench` says: what a spec costs on the card that is here, beside what else would do it.

Nothing is timed before it was checked, and what fails is said with its reason.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from hsgen import (
    analysis,
    baselines,
    captures,
    checking,
    execution,
    machine,
    measure,
    passes,
    planner,
    refusals,
    report,
    resources,
    runtime,
    schedule,
    trials,
)
from hsgen.checking import CheckError, Figures
from hsgen.configs import DType
from hsgen.errors import HsgenError
from hsgen.graph import Graph, align
from hsgen.measure import Setting, Step
from hsgen.plan import Plan
from hsgen.report import Progress
from hsgen.spec import Spec
from hsgen.target import Target

Peer = Literal["dense", "flex"]

TOKENS = {"cuda": (8192, 32768), "cpu": (64,)}
MOST_INTERPRETED = 1024  # tokens, of minutes
SECONDS = 1.0  # of timing, a measurement
LONGEST_REASON = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One length.  `steps` has figures by name of a step, or why it has none; `limits` by kernel."""

    tokens: int
    flops: float
    limits: Mapping[str, Figures]
    steps: Mapping[str, Figures]

    def figure(self, step: str) -> float | None:
        """Milliseconds of a step that has them."""
        entry = self.steps.get(step, {})
        return entry["ms"]["median"] if entry.get("status") == "ok" else None

    @property
    def passed(self) -> bool:
        """The spec's own kernels are right, and were timed."""
        return all(
            entry["status"] == "ok" for name, entry in self.steps.items() if not _of_peer(name)
        )

    @property
    def dense(self) -> str | None:
        """The step of the fastest dense attention."""
        ran = [name for name in self.steps if name.startswith("dense ") and self.figure(name)]
        return min(ran, key=lambda name: self.figure(name) or math.inf, default=None)

    def dense_times(self) -> dict[str, float]:
        """Milliseconds of the dense variants that ran, by name of a variant."""
        names = [name for name in self.steps if name.startswith("dense ")]
        times = {name.removeprefix("dense "): self.figure(name) for name in names}
        return {name: ms for name, ms in times.items() if ms is not None}

    def record(self) -> Figures:
        """The same for machines."""
        limits, steps = dict(self.limits), dict(self.steps)
        return {"tokens": self.tokens, "flops": self.flops, "limits": limits, "steps": steps}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A spec timed at some lengths.  `shrunk` says what its small copy has, for the interpreter."""

    spec: Spec
    arch: str
    dtype: DType
    capture: str | None
    made: Mapping[str, str | int | None]
    shrunk: str | None
    cases: tuple[Case, ...]

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)

    def record(self) -> dict[str, object]:
        """The same for machines."""
        heads, dim = self.spec.heads, self.spec.head_dim
        assert heads is not None, "only bound specs are timed"
        assert dim is not None, "only bound specs are timed"
        return {
            "ok": self.passed,
            **self.made,
            "spec": self.spec.name,
            "digest": self.spec.digest,
            "shrunk": self.shrunk,
            "heads": [heads.query, heads.kv],
            "head_dim": [dim.qk, dim.v],
            "dtype": self.dtype,
            "batch": 1,
            "inputs": "real" if self.capture else "random",
            "capture": self.capture,
            "cases": [case.record() for case in self.cases],
        }

    def __str__(self) -> str:
        parts = [_header(self), align(list(_rows(self)))]
        parts += [_kernel_table(case) for case in self.cases[-1:] if "kernels" in case.steps]
        notes = [*_checks(self), *_configs(self), *_growth(self), *_failures(self)]
        return "\n\n".join("\n".join(part) for part in (*parts, notes) if part) + "\n"


def _quietly(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def bench(
    spec: Spec,
    *,
    tokens: Sequence[int] = (),
    against: Sequence[Peer] = ("dense",),
    dtype: DType | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    capture: Path | None = None,
    seconds: float = SECONDS,
    command: Sequence[str] = (),
    progress: Progress = _quietly,
) -> Report:
    """Time a spec on the GPU that is here; on "cpu" a small copy of it, in Triton's interpreter.

    Args:
        spec: Heads and head dims bound.
        tokens: T and S of each case.
        against: What else is timed.
        dtype: Of the tensors; None is bf16, of which the interpreter makes fp32.
        device: Where.
        capture: What inputs are made of; None is normal numbers, of one seed.
        seconds: Of timing, a measurement.
        command: The words that say so again.
        progress: Told of each step.

    Raises:
        HsgenError: no GPU; what the interpreter cannot do; a capture that cannot be read.
        PlanError: no kernel can do it.
    """
    lengths = sorted(set(tokens or TOKENS[device]))
    target = _target(device, lengths, dtype)
    dtype = dtype or ("bf16" if device == "cuda" else "fp32")
    shrunk = None
    if device == "cpu":
        refusals.refuse(passes.run(planner.plan(spec)))  # by its own line, not by that of a copy
        spec, shrunk = trials.shrink(spec), trials.differences(spec)
    graph = passes.run(planner.plan(spec))
    plan = schedule.schedule(graph, target, dtype)
    groups = captures.load(capture) if capture else []
    setting = Setting(
        device=device,
        kind="real" if capture else "random",
        groups=groups,
        seconds=seconds,
        dtype=next(x for x, name in runtime.PLANNED.items() if name == dtype),
        interpret=device == "cpu",
    )
    cases: list[Case] = []
    for T in lengths:
        found = _Steps(tokens=T, tell=progress)
        _measure(setting, spec, found, against, cases[-1:])
        cases.append(
            Case(
                tokens=T,
                flops=analysis.total(graph).flops.evaluate(T),
                limits=_limits(graph, plan, target, T) if device == "cuda" else {},
                steps=found.done,
            )
        )
    return Report(
        spec=spec,
        arch=target.label,
        dtype=dtype,
        capture=capture.name if capture else None,
        made=machine.provenance(command, device),
        shrunk=shrunk,
        cases=tuple(cases),
    )


def _target(device: str, lengths: Sequence[int], dtype: DType | None) -> Target:
    """The card that is here, or the one whose plan the interpreter runs."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise HsgenError(
                "no GPU is present, and times are of one",
                help="run it where torch sees a GPU; `hsgen compile` says the least times without "
                "one, and `--device cpu` tries the command out in Triton's interpreter",
            )
        return Target.current()
    if lengths[-1] > MOST_INTERPRETED:
        raise HsgenError(
            f"tokens: expected at most {MOST_INTERPRETED} with --device cpu, got {lengths[-1]}",
            help="the interpreter is slow, and its times mean nothing",
        )
    if dtype == "bf16":
        raise HsgenError("dtype: the interpreter computes no bf16", help="--dtype fp16 or fp32")
    return Target.named(execution.INTERPRETED_TARGET)


# --- steps


@dataclass(slots=True, kw_only=True, eq=False)
class _Steps:
    """Runs the steps of one length, and keeps how each ended."""

    tokens: int
    tell: Progress
    done: dict[str, Figures] = field(default_factory=dict[str, Figures])

    def run(self, name: str, action: Callable[[], Figures]) -> bool:
        """-> whether it went well"""
        self.tell(f"timing {self.tokens:,} tokens", len(self.done), 0)
        self.done[name] = checking.attempt(action)
        return self.done[name]["status"] == "ok"

    def run_all(self, name: str, steps: Iterator[Step]) -> None:
        """Steps that are made one after another; where making one fails, that is step `name`."""

        def run() -> Figures:
            for step, action in steps:
                self.run(step, action)
            return {}

        if (entry := checking.attempt(run))["status"] != "ok":
            self.done[name] = entry


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Length:
    """What may be timed at one length; makes inputs only where steps are asked for."""

    setting: Setting
    spec: Spec
    tokens: int

    def check_small(self) -> Figures:
        """Every row of a short input."""
        return measure.check_all(self.setting, self.spec, min(measure.SMALL, self.tokens))

    def check(self) -> Figures:
        """Two runs of rows at full length; where rows that are far apart choose together no run of them
        says what they choose, and all are to be the same in a second call.
        """
        tensors = self.setting.make(self.spec, self.tokens, 0)
        o, selection = measure.run(self.setting, self.spec, tensors)
        if not checking.runs_tell(self.spec):
            again, _ = measure.run(self.setting, self.spec, tensors)
            if not (o.isfinite().all() and o.equal(again)):
                raise CheckError("the output is not finite, or another one in a second call")
            return {"rows_twice": self.tokens}
        return checking.compare(
            self.spec, tensors, o, selection, checking.sampled(self.spec, self.tokens)
        )

    def kernels(self) -> Iterator[Step]:
        sets = self.setting.sets(self.spec, self.tokens)
        yield from measure.kernel_steps(self.setting, self.spec, sets)

    def dense(self, shorter: Sequence[Case]) -> Iterator[Step]:
        """Every way; where a shorter input was timed, the fastest of each backend."""
        variants = baselines.variants(self.spec, self.setting.device, self.setting.dtype)
        for case in shorter:
            variants = baselines.contenders(variants, case.dense_times())
        made = self.setting.make(self.spec, self.tokens, 0)
        made = {name: made[name] for name in "qkv" if name in made}  # a latent has no v
        yield from measure.dense_steps(self.setting, self.spec, variants, made)

    def flex(self) -> Iterator[Step]:
        made = self.setting.make(self.spec, self.tokens, 0)
        yield from measure.flex_steps(self.setting, self.spec, made)


def _measure(
    setting: Setting, spec: Spec, found: _Steps, against: Sequence[Peer], shorter: Sequence[Case]
) -> None:
    """The spec's own kernels, if they are right; then the others."""
    length = _Length(setting=setting, spec=spec, tokens=found.tokens)
    right = found.run("check small", length.check_small)
    if right and found.tokens > measure.SMALL:
        right = found.run("check", length.check)
    if right:
        found.run_all("set-up", length.kernels())
    _forget(setting)
    if "dense" in against:
        found.run_all("dense", length.dense(shorter))
        _forget(setting)
    if "flex" in against and right:
        found.run_all("flex", length.flex())
        _forget(setting)


def _forget(setting: Setting) -> None:
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()


def _of_peer(step: str) -> bool:
    return step.startswith(("dense", "flex")) or step == "attend selected"


def _limits(graph: Graph, plan: Plan, target: Target, tokens: int) -> dict[str, Figures]:
    """The least time of each kernel."""
    found: dict[str, Figures] = {}
    for kernel in plan.kernels:
        flops, moved = report.work(graph, plan, kernel, tokens)
        units = report.math_type(kernel, plan.dtype)
        limit = resources.roofline(flops, moved, target, units)
        found[kernel.name] = {
            "ms": limit.seconds * 1e3,
            "bound": limit.bound,
            "math": units,
            "flops": flops,
            "bytes": moved,
        }
    return found


# --- text


def _header(found: Report) -> list[str]:
    made, kind = found.made, found.capture or "random"
    heads, dim = found.spec.heads, found.spec.head_dim
    assert heads is not None, "only bound specs are timed"
    assert dim is not None, "only bound specs are timed"
    versions = [f"torch {made['torch']}", f"triton {made['triton']}"]
    for name in ("cuda", "cudnn", "driver"):
        versions += [f"{name} {made[name]}"] if made[name] else []
    lines = [
        f"{found.spec.name} on {made['card']}, kernels for {found.arch}, {found.dtype}: "
        f"heads {heads.query}/{heads.kv} of {dim.qk}/{dim.v}, batch 1, inputs {kind}",
        f"{', '.join(versions)}, {made['date']}",
    ]
    if found.shrunk:
        lines += [
            "in Triton's interpreter, whose times mean nothing: they say that the command runs",
            f"shrunk: {found.shrunk}",
        ]
    return lines


PARTS = {"select": "  choosing", "attend": "  attending"}
FLEX = {
    "attend selected": "chosen branch alone",
    "flex": "FlexAttention, the same",
    "flex mask": "  its mask",
}


def _rows(found: Report) -> Iterator[tuple[str, ...]]:
    """The table: whole call and halves, the best dense attention, FlexAttention."""
    yield ("tokens", "what", "      ms", "TFLOP/s", "x dense", "peak MiB")
    for case in found.cases:
        steps = {"total": found.spec.name} | PARTS
        steps |= {case.dense: case.dense} if case.dense else {}
        shown = {step: label for step, label in (steps | FLEX).items() if case.figure(step)}
        for number, (step, label) in enumerate(shown.items()):
            yield (f"{case.tokens:6}" if number == 0 else "", label, *_cells(found, case, step))
        if not shown:
            yield (f"{case.tokens:6}", "nothing was timed", "", "", "", "")


def _cells(found: Report, case: Case, step: str) -> tuple[str, ...]:
    """The figures of a step: its parts have time only, and so has the interpreter."""
    ms, entry, ratio = case.figure(step), case.steps[step], ""
    assert ms is not None, "only what was timed is shown"
    if found.shrunk:
        return f"{ms:8.4g}", "", "", ""
    rate = entry.get("tflops")
    if step == "total":
        rate, entry = case.flops / ms / 1e9, case.steps.get("memory", {})
        dense = case.figure(case.dense) if case.dense else None
        ratio = f"{dense / ms:6.2f}x" if dense else ""
    peak = f"{entry['bytes'] / 2**20:8,.0f}" if "bytes" in entry else ""
    return f"{ms:8.4g}", f"{rate:7.3g}" if rate else "", ratio, peak


def _kernel_table(case: Case) -> list[str]:
    """Each kernel's time beside the least that arithmetic and memory allow."""
    entry = case.steps["kernels"]
    if entry["status"] != "ok":
        return []
    times: Mapping[str, float] = entry["ms"]
    rows = [(f"kernels at {case.tokens}", "      ms", "at least", "reached", "bound by")]
    for name, ms in times.items():
        limit = case.limits.get(name)
        least = limit["ms"] if limit else 0.0
        if not least or not limit:
            rows.append((name, f"{ms:8.4g}", "", "", "" if limit else "not of the plan"))
            continue
        bound = f"compute, {limit['math']}" if limit["bound"] == "compute" else "memory"
        rows.append((name, f"{ms:8.4g}", f"{least:8.4g}", f"{least / ms:7.0%}", bound))
    total, least = sum(times.values()), sum(limit["ms"] for limit in case.limits.values())
    rows.append(("all", f"{total:8.4g}", f"{least:8.4g}", f"{least / total:7.0%}", ""))
    return align(rows)


def _checks(found: Report) -> Iterator[str]:
    """What was held against the reference, before it was timed."""
    checked = [
        entry
        for case in found.cases
        for name, entry in case.steps.items()
        if name.startswith("check") and entry["status"] == "ok"
    ]
    twice = sum(entry.get("rows_twice", 0) for entry in checked)
    checked = [entry for entry in checked if "error" in entry]
    if checked:
        error = max(entry["error"] for entry in checked)
        same = min(entry["same_choice"] for entry in checked)
        rows = sum(entry["rows"] for entry in checked)
        choice = f", {same:.1%} of its choice the same" if measure.chooses(found.spec) else ""
        yield (
            f"checked before timing: {rows:,} rows, output at most {error:.2g} from the float64 "
            f"reference{choice}" + f"; {twice:,} more the same twice" * bool(twice)
        )


def _configs(found: Report) -> Iterator[str]:
    """Where the kernels' configurations came from, by length; their values are the record's."""
    for case in found.cases:
        entry = case.steps.get("configs", {})
        by_origin: dict[str, list[str]] = {}
        for name, chosen in entry.get("kernels", {}).items():
            by_origin.setdefault(chosen["origin"], []).append(name)
        for origin, names in by_origin.items():
            of = "every kernel" if len(by_origin) == 1 else ", ".join(names)
            yield f"configs of {case.tokens} tokens: {origin}: {of}"


def _growth(found: Report) -> Iterator[str]:
    """How time grows with the length, beside how arithmetic does."""
    ran = [case for case in found.cases if case.figure("total")]
    if len(ran) < 2 or found.shrunk:
        return
    lengths = [case.tokens for case in ran]
    time = exponent(lengths, [case.figure("total") or 0.0 for case in ran])
    text = f"from {lengths[0]} to {lengths[-1]} tokens time grows as T^{time:.2f}, its arithmetic "
    text += f"as T^{exponent(lengths, [case.flops for case in ran]):.2f}"
    dense = [case.figure(case.dense) if case.dense else None for case in ran]
    known = [ms for ms in dense if ms]
    if len(known) == len(ran):
        text += f"; dense attention as T^{exponent(lengths, known):.2f}"
    yield text


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of the line nearest to the logarithms."""
    x, y = [math.log(n) for n in lengths], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def _failures(found: Report) -> Iterator[str]:
    """Every step that has no figures, with the reason."""
    for case in found.cases:
        for step, entry in case.steps.items():
            if entry["status"] != "ok":
                reason = " ".join(entry["reason"].split())
                short = reason[:LONGEST_REASON] + "..." * (len(reason) > LONGEST_REASON)
                mark = ", so its time was not taken" if step.startswith("check") else ""
                yield f"{case.tokens} tokens, {step} {entry['status']}{mark}: {short}"
