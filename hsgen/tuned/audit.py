"""Whether records still hold, without a GPU: their place, their spec, their kernels, as compiled.

`broken` is what no one may use: a line that is no record, a configuration that does not compile or fit.
`stale` is what starts as if it were not there: another spec of that name by now, or another text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from hsgen import paths, pipeline, resources
from hsgen.errors import ArgumentError, HsgenError
from hsgen.gates import forms
from hsgen.plan import Config
from hsgen.resources import CompileFailure, Job, Outcome
from hsgen.spec import Spec, load
from hsgen.target import with_streams
from hsgen.tuned.files import Content, Flaw, Kept, environment, known_gpus, target_of
from hsgen.tuned.gates import GatesContent, KeptGates
from hsgen.tuned.ladder import Compiled, unusable
from hsgen.tuned.records import LAUNCH, Environment, KernelChoice, Problem, Tuned

Status = Literal["ok", "stale", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One record, and what is wrong with it."""

    kept: Kept | KeptGates
    stale: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        return "broken" if self.broken else "stale" if self.stale else "ok"

    def __str__(self) -> str:
        lines = [f"{self.status:<8}{self.kept.where}"]
        lines += [f"        {what}" for what in (*self.broken, *self.stale)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was looked at."""

    entries: tuple[Entry, ...]
    flaws: tuple[Flaw, ...]
    kernels: int

    @property
    def passed(self) -> bool:
        """Nothing is broken; what is stale harms no one."""
        return not self.flaws and all(entry.status != "broken" for entry in self.entries)

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "passed": self.passed,
            "kernels": self.kernels,
            "flaws": [str(flaw) for flaw in self.flaws],
            "records": [
                {
                    "where": entry.kept.where,
                    "key": entry.kept.record.key,
                    "status": entry.status,
                    "broken": list(entry.broken),
                    "stale": list(entry.stale),
                }
                for entry in self.entries
            ],
        }

    def __str__(self) -> str:
        counts = [
            sum(e.status == status for e in self.entries) for status in ("ok", "stale", "broken")
        ]
        lines = [f"broken  {flaw}" for flaw in self.flaws]
        lines += [str(entry) for entry in self.entries if entry.status != "ok"]
        number = len(self.entries) + len(self.flaws)
        summary = "{} ok, {} stale, {} broken".format(*counts[:2], counts[2] + len(self.flaws))
        lines.append(f"{number} records: {summary}; {self.kernels} kernels compiled")
        return "\n".join(lines) + "\n"


@dataclass(slots=True, kw_only=True)
class _Judged:
    """A record while it is judged; `jobs` are the kernels that are still to be compiled."""

    kept: Kept
    stale: list[str] = field(default_factory=list[str])
    broken: list[str] = field(default_factory=list[str])
    jobs: tuple[tuple[str, Job], ...] = ()


def _quietly(done: int, total: int) -> None:
    """Report no progress."""


def check(
    content: Content,
    gates: GatesContent | None = None,
    *,
    progress: Callable[[int, int], None] = _quietly,
) -> Audit:
    """Check the records of some files; every kernel that is not stale is cross-compiled.

    Raises:
        BuildError: no Triton, or one that is too old.
    """
    judged = [_judge(kept) for kept in content.kept]
    for one, wrong in zip(judged, _misplaced(content.kept), strict=True):
        one.broken += wrong
    jobs = [job for one in judged for _, job in one.jobs]
    outcomes = iter(resources.measure(jobs, progress=progress))
    for one in judged:
        record = one.kept.record
        for name, job in one.jobs:
            one.broken += _misfit(name, record.kernels[name], record, job, next(outcomes))
    entries = tuple(
        Entry(kept=one.kept, stale=tuple(one.stale), broken=tuple(one.broken)) for one in judged
    )
    gates = gates or GatesContent()
    entries += tuple(
        _judge_gates(each, wrong)
        for each, wrong in zip(gates.kept, _misplaced(gates.kept), strict=True)
    )
    return Audit(entries=entries, flaws=content.flaws + gates.flaws, kernels=len(jobs))


def _judge_gates(kept: KeptGates, misplaced: Sequence[str]) -> Entry:
    """A record of gates: its place, its GPU, its spec, and that this has the forms."""
    record = kept.record
    broken = [*misplaced, *_other_card(record.environment)]
    stale: list[str] = []
    spec = _spec(record.problem)
    if spec is None:
        stale.append(f"no shipped {record.problem.spec} means the same")
    else:
        try:
            forms(spec, record.gate)
        except HsgenError as error:
            broken.append(error.message)
    return Entry(kept=kept, stale=tuple(stale), broken=tuple(broken))


def _other_card(environment: Environment) -> list[str]:
    gpu = known_gpus().get(environment.gpu)
    if gpu and gpu.card != environment.card:
        return [f"environment: gpus.yaml has {gpu.card}, got {environment.card}"]
    return []


def _misplaced(kept: Sequence[Kept] | Sequence[KeptGates]) -> list[list[str]]:
    """By record, whether its line is where it belongs."""
    wrong: list[list[str]] = [[] for _ in kept]
    for i, (before, after) in enumerate(pairwise(kept), 1):
        if before.committed and before.file == after.file:
            if before.record.key == after.record.key:
                wrong[i].append("the line before has the same key: hsgen tuned merge keeps one")
            elif before.record.place > after.record.place:
                wrong[i].append("belongs before the line above it: hsgen tuned merge sorts")
    return wrong


def _judge(kept: Kept) -> _Judged:
    """All that needs no compiler."""
    one = _Judged(kept=kept)
    record = kept.record
    one.broken += _other_card(record.environment)
    try:
        spec = _spec(record.problem)
        if spec is None:
            one.stale.append(f"no shipped {record.problem.spec} means the same")
            return one
        target = with_streams(target_of(record.environment))
        dtype, work = record.problem.dtype, record.problem.work
        sizes = record.bucket.sizes(record.problem.page) if work == "decode" else None
        artifact = pipeline.compile_work(spec, target, dtype, work, record.orders, sizes)
    except HsgenError as error:
        one.broken.append(error.message)
        return one
    made = Compiled(plan=artifact.plan, target=target, texts=artifact.module.texts)
    why = unusable(record, made, record.environment)
    for reason in why.values():
        (one.stale if reason.changed else one.broken).append(str(reason))
    plan = artifact.plan.with_config(
        {
            kernel.name: _config(record.kernels[kernel.name])
            for kernel in artifact.plan.kernels
            if kernel.name not in why
        }
    )
    jobs = zip(plan.kernels, pipeline.call_jobs(replace(artifact, plan=plan), sizes), strict=True)
    one.jobs = tuple((kernel.name, job) for kernel, job in jobs if kernel.name not in why)
    return one


def _spec(problem: Problem) -> Spec | None:
    """The shipped spec of a record, bound; where layers take ways, that of its layer."""
    shipped = {path.stem: path for path in paths.data_dir("specs").glob("*.yaml")}
    if problem.spec not in shipped:
        return None
    spec = load(str(shipped[problem.spec]))
    try:
        ways = [None, *range(len(spec.route.table) if spec.route else 0)]
        bound = (
            spec.bind(heads=problem.heads, head_dim=problem.head_dim, layer=way) for way in ways
        )
        return next(
            (x for x in bound if Problem.of(x, problem.dtype).digest == problem.digest), None
        )
    except ArgumentError:  # other heads by now
        return None


def _config(choice: KernelChoice) -> Config:
    values = dict(choice.config)
    warps, stages = (values.pop(name) for name in LAUNCH)
    return Config(constexprs=tuple(values.items()), num_warps=warps, num_stages=stages)


def _misfit(
    name: str, choice: KernelChoice, record: Tuned, job: Job, outcome: Outcome
) -> list[str]:
    """What the compiler says against a kernel's configuration."""
    if isinstance(outcome, CompileFailure):
        return [f"{name} does not compile: {outcome.kind}: {outcome.message.strip()[:300]}"]
    cost = outcome.cost
    if not outcome.blocks_per_sm:
        return [f"{name} cannot run: {outcome.limited_by}, {cost.shared_bytes:,} bytes shared"]
    if record.environment.triton != environment(job.target).triton:
        return []  # another compiler may take more or less
    return [
        f"kernels.{name}.{what}: expected {now:,}, as compiled, got {then:,}"
        for what, now, then in (
            ("shared", cost.shared_bytes, choice.shared),
            ("registers", cost.registers, choice.registers),
            ("spills", cost.spill_bytes, choice.spills),
        )
        if now != then
    ]
