"""What of a space cannot run, said by compilers before any GPU is asked: no time is spent on it.

Every kernel is cross-compiled once for each of its configurations; a point fails with its kernels.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from hsgen import passes, pipeline, planner, report, resources
from hsgen.configs import DType, Sizes, Work
from hsgen.measurer import Failure
from hsgen.pipeline import Artifact
from hsgen.plan import Kernel
from hsgen.report import Progress
from hsgen.resources import CompileFailure, Compilers, Job, Outcome, Resources
from hsgen.space import Orders, Part, Point, Space, Variant, space
from hsgen.spec import Spec
from hsgen.target import Target

MOST_SPILLED = 256  # bytes a thread: then every turn of a loop waits for memory
MOST_COMPILERS = 8
MOST_POINTS = 20_000  # of a part that are looked at, in the order of the space
PAIRS = 64  # kernels that are compiled ahead, at most

Known = tuple[Orders, str, tuple[tuple[str, int], ...]]  # a kernel at its values


def _quietly(done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What compilers said of one part.

    Attributes:
        variant: its orders.
        part: the kernel that others follow.
        rules: combinations that break a rule.
        failures: of those that break none, by configuration of a kernel.
        kept, dropped: points, of those whose kernels were all compiled.
        left: points for which there was no time.
    """

    variant: str
    part: str
    rules: int
    failures: tuple[Failure, ...]
    kept: int
    dropped: int
    left: int

    @property
    def share(self) -> float:
        """Of all combinations, what no GPU need see, as far as was looked."""
        every = self.rules + self.kept + self.dropped + self.left
        broken = self.rules / every if every else 0.0
        seen = self.kept + self.dropped
        return broken + (1 - broken) * (self.dropped / seen if seen else 0.0)

    def record(self) -> dict[str, object]:
        """The same for machines."""
        counts = Counter(failure.kind for failure in self.failures)
        names = ("variant", "part", "rules", "kept", "dropped", "left")
        return {**{name: getattr(self, name) for name in names}, "failures": dict(counts)}

    def __str__(self) -> str:
        left = f" so far, {self.left:,} not looked at" if self.left else ""
        lines = [
            f"{self.part}: {self.kept:,} points may run; rules drop {self.rules:,}, "
            f"compilers {self.dropped:,} ({self.share:.0%}){left}"
        ]
        return "\n".join([*lines, *(f"  {line}" for line in binding(self.failures))])


def binding(failures: Iterable[Failure]) -> list[str]:
    """Of each class, how many, and the limit that bound the one that came nearest."""
    by_kind: dict[str, list[Failure]] = {}
    for failure in failures:
        by_kind.setdefault(failure.kind, []).append(failure)
    nearest = {kind: min(some, key=_excess) for kind, some in by_kind.items()}
    return [
        f"{kind} {len(by_kind[kind]):,}: {one.limit or one}"[:300] for kind, one in nearest.items()
    ]


def _excess(failure: Failure) -> int:
    """How much was needed, of failures whose limit is the same; the first number that is said."""
    found = re.search(r"(?<![\w.])\d[\d,]*(?!\w)", failure.limit)
    return int(found[0].replace(",", "")) if found else 0


@dataclass(slots=True, eq=False)
class Compiler:
    """Compiles the kernels of points, each once; remembers what came of it.

    `programs` are the emitted modules by orders.
    """

    spec: Spec
    space: Space
    compilers: Compilers
    programs: dict[Orders, Artifact] = field(default_factory=dict[Orders, Artifact])
    _known: dict[Known, Future[Outcome]] = field(default_factory=dict[Known, "Future[Outcome]"])

    def artifact(self, orders: Orders) -> Artifact:
        """The emitted module of a variant."""
        if orders not in self.programs:
            space = self.space
            self.programs[orders] = pipeline.compile_work(
                self.spec, space.target, space.dtype, space.work, dict(orders), space.sizes
            )
        return self.programs[orders]

    @property
    def early(self) -> int:
        """Points whose kernels compile at once, one new kernel each."""
        return self.compilers.workers

    def ready(self, point: Point) -> bool:
        """Whether nobody would wait for a point."""
        return all(future.done() for future in self._futures(point).values())

    def ahead(self, point: Point) -> None:
        """Begin with a point's kernels; nobody waits."""
        if sum(not future.done() for future in self._known.values()) < PAIRS:
            self._futures(point)

    def outcomes(self, point: Point) -> dict[str, Outcome]:
        """By kernel; waits for compilers."""
        return {name: future.result() for name, future in self._futures(point).items()}

    def failure(self, point: Point) -> Failure | None:
        """Why a point cannot run, or is not worth it; the start itself may spill."""
        for name, outcome in self.outcomes(point).items():
            found = failure_of(name, outcome, self.space.target)
            if found and not (found.kind == "SPILL" and point == self.space.start):
                return found
        return None

    def prune(
        self,
        variant: Variant,
        part: Part,
        *,
        budget: float,
        progress: Callable[[int, int], None] = _quietly,
    ) -> Pruned:
        """Every point of a part, as far as time allows, those nearest to the start first."""
        began = time.monotonic()
        some = itertools.islice(part.points(variant.start), MOST_POINTS)
        points = sorted(some, key=functools.partial(_distance, part, variant.start))
        wanted = {known: None for point in points for known in self._keys(part, point)}
        done, failures = dict[Known, Failure | None](), list[Failure]()
        for count, (known, future) in enumerate(self._all(variant, part, wanted, began + budget)):
            done[known] = failure_of(known[1], future.result(), self.space.target)
            if (found := done[known]) is not None:
                failures.append(found)
            progress(count + 1, len(wanted))
        unseen = part.size if len(points) == MOST_POINTS else len(points)
        kept = dropped = 0
        for point in points:
            keys = self._keys(part, point)
            if any(done.get(key) for key in keys):
                dropped += 1
            elif all(key in done for key in keys):
                kept += 1
        return Pruned(
            variant=variant.name,
            part=part.name,
            rules=part.size - unseen,
            failures=tuple(sorted(failures, key=lambda each: each.kernel)),
            kept=kept,
            dropped=dropped,
            left=unseen - kept - dropped,
        )

    def _all(
        self, variant: Variant, part: Part, wanted: Mapping[Known, None], deadline: float
    ) -> Iterator[tuple[Known, Future[Outcome]]]:
        """Compile what is wanted, PAIRS at a time, until the time is over."""
        waiting: list[tuple[Known, Future[Outcome]]] = []
        for known in wanted:
            if time.monotonic() > deadline:
                break
            waiting.append((known, self._future(variant.orders, known, part)))
            if len(waiting) >= PAIRS:
                yield waiting.pop(0)
        for known, future in waiting:
            if future.done() or time.monotonic() < deadline:
                yield known, future
            else:
                future.cancel()

    def _keys(self, part: Part, point: Point) -> list[Known]:
        return [_known(part.plan.kernel(name), point) for name in part.kernels]

    def _futures(self, point: Point) -> dict[str, Future[Outcome]]:
        plan = self.artifact(point.orders).plan
        missing = [k.name for k in plan.kernels if _known(k, point) not in self._known]
        if missing:
            jobs = self._jobs(point)
            for name in missing:
                known = _known(plan.kernel(name), point)
                self._known[known] = self.compilers.submit(jobs[name])
        return {k.name: self._known[_known(k, point)] for k in plan.kernels}

    def _future(self, orders: Orders, known: Known, part: Part) -> Future[Outcome]:
        """Of one kernel at its values, and at those of the tile that it shares."""
        if known not in self._known:
            point = _point_with(self.space, orders, known, part)
            self._known[known] = self.compilers.submit(self._jobs(point)[known[1]])
        return self._known[known]

    def _jobs(self, point: Point) -> dict[str, Job]:
        artifact = self.artifact(point.orders)
        plan = artifact.plan.with_config(dict(point.configs))
        jobs = report.jobs(replace(artifact, plan=plan), self.space.sizes)
        return {kernel.name: job for kernel, job in zip(plan.kernels, jobs, strict=True)}


def failure_of(kernel: str, outcome: Outcome, target: Target) -> Failure | None:
    """The class of a kernel that cannot run, or is not worth a try."""
    if isinstance(outcome, CompileFailure):
        kind = "COMPILE_TIMEOUT" if outcome.kind == "timeout" else "COMPILE_ERROR"
        return Failure(kind=kind, message=outcome.message, kernel=kernel)
    if outcome.blocks_per_sm == 0:
        limit = resources.excess([outcome], target)
        kind = "OVER_SMEM" if outcome.limited_by == "shared memory" else "OVER_LIMIT"
        return Failure(kind=kind, message=limit, kernel=kernel, limit=f"{kernel} {limit}")
    spilled = outcome.cost.spill_bytes
    if spilled > MOST_SPILLED:
        limit = f"spills {spilled:,} bytes a thread, more than {MOST_SPILLED}"
        return Failure(kind="SPILL", message=limit, kernel=kernel, limit=f"{kernel} {limit}")
    return None


def least_registers(outcomes: Mapping[str, Outcome]) -> int:
    """Registers of all kernels together: of two that are as fast, fewer are better."""
    found = [each.cost.registers for each in outcomes.values() if isinstance(each, Resources)]
    return sum(found)


def _known(kernel: Kernel, point: Point) -> Known:
    """What decides a kernel's binary: its values, and those that it takes from the one it follows."""
    own = point.config(kernel.name).keywords()
    values = {name: own[name] for name in own}
    if kernel.follows:
        theirs = point.config(kernel.follows).keywords()
        names = {param.name for param in kernel.params if param.kind == "constexpr"}
        values |= {name: theirs[name] for name in names if name not in own and name in theirs}
    return point.orders, kernel.name, tuple(sorted(values.items()))


def _point_with(space: Space, orders: Orders, known: Known, part: Part) -> Point:
    """The start, but for one kernel's values and what it shares."""
    variant = next(v for v in space.variants if v.orders == orders)
    values, kernel = dict(known[2]), part.plan.kernel(known[1])
    point = variant.start
    configs = dict(point.configs)
    own = configs[kernel.name]
    constexprs = tuple((name, values[name]) for name, _ in own.constexprs)
    configs[kernel.name] = replace(
        own,
        constexprs=constexprs,
        num_warps=values["num_warps"],
        num_stages=values["num_stages"],
    )
    if kernel.follows:
        theirs, taken = configs[kernel.follows], values.keys() - dict(constexprs).keys()
        shared = ((n, values[n] if n in taken else v) for n, v in theirs.constexprs)
        configs[kernel.follows] = replace(theirs, constexprs=tuple(shared))
    return replace(point, configs=tuple(configs.items()))


def _distance(part: Part, start: Point, point: Point) -> int:
    """Steps between two points of a part."""
    mine, its = part.codes(start) or (), part.codes(point) or ()
    return sum(abs(a - b) for a, b in zip(mine, its, strict=True))


# --- without a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """A space, and what compilers said of its parts as far as time allowed."""

    space: Space
    parts: tuple[Pruned, ...]
    seconds: float

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "spec": self.space.name,
            "target": self.space.target.name,
            "dtype": self.space.dtype,
            "digest": self.space.digest,
            "parts": [part.record() for part in self.parts],
            "seconds": round(self.seconds, 1),
        }

    def __str__(self) -> str:
        lines = [str(self.space).rstrip(), f"pruned without a GPU, in {self.seconds:.0f} s"]
        return "\n".join([*lines, *(str(part) for part in self.parts)]) + "\n"


def dry_run(
    spec: Spec,
    target: Target,
    dtype: DType = "bf16",
    work: Work = "forward",
    sizes: Sizes | None = None,
    *,
    only: Sequence[str] = (),
    budget: float = 300.0,
    progress: Progress,
) -> DryRun:
    """What tuning would search, and what of that cannot run.

    Raises:
        PlanError: no kernel can do it, or the spec has no cache for steps.
        BuildError: Triton is not installed, or too old.
    """
    began = time.monotonic()
    spec = planner.without_losses(spec)
    whole = space(passes.run(planner.plan(spec)), target, dtype, work, sizes)
    whole = whole.only(only) if only else whole
    parts = [(variant, part) for variant in whole.variants for part in variant.parts]
    found: list[Pruned] = []
    with Compilers(min(MOST_COMPILERS, os.cpu_count() or 2)) as compilers:
        compiler = Compiler(spec, whole, compilers)
        for place, (variant, part) in enumerate(parts):
            left = max(0.0, began + budget - time.monotonic()) / (len(parts) - place)
            tell = functools.partial(progress, f"{variant.name} {part.name}")
            found.append(compiler.prune(variant, part, budget=left, progress=tell))
    return DryRun(space=whole, parts=tuple(found), seconds=time.monotonic() - began)
