"""Find the fastest configuration of a spec on the GPUs that are here; the only user of Optuna.

Verified before it is timed, timed in turn with what is used now, and adopted only where noise cannot
be the reason.  What was measured is kept at once: the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from hsgen import (
    analysis,
    backward,
    passes,
    paths,
    planner,
    report,
    resources,
    schedule,
    store,
    tuned,
)
from hsgen.configs import DType, Work
from hsgen.errors import ArgumentError, HsgenError
from hsgen.graph import Graph, Score
from hsgen.lanes import ANY, INTERPRETED, Lanes, Patience
from hsgen.measurer import Failure, Result, Shape
from hsgen.pipeline import call_jobs, compile_spec, compile_work, filling_jobs, hsgen_version
from hsgen.plan import Cached, Plan
from hsgen.pruning import Compiler, least_registers
from hsgen.resources import Compilers, Outcome, Resources
from hsgen.schedule import stepping
from hsgen.space import Point, Space, space
from hsgen.spec import Spec, dump
from hsgen.target import Target
from hsgen.tune.finals import Entrant, Verdict, confirmed, contenders, decide
from hsgen.tune.journal import Journal
from hsgen.tune.search import Judge, Lenient, Limits, Search, Status, Tell, static
from hsgen.tune.storages import reached, shown, storage_at
from hsgen.workers import JsonObject

__all__ = [
    "Limits", "Options", "Patience", "Report", "Status", "attempt", "least_us", "present_gpus", "tune",
    "tune_each",
]  # fmt: skip

FINALISTS = 8
ROUNDS = 15
EARLY = 5  # of them, after which those that are surely slower leave
NEIGHBOURS = 3  # records of other sizes and GPUs that are looked at, and
WARM = 3  # points of each
PEAK = 0.9  # of the card's arithmetic: no kernel is faster
MOST_COMPILERS = 32
COMPILING = 60.0  # seconds that one kernel may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a spec is tuned.

    Attributes:
        dtype: of the tensors.
        work: what is tuned: calls, the gradients of calls that autograd records, or steps behind a cache.
        page: of steps, tokens of a page of the cache; 0: each sequence lies in one piece.
        shapes: one search for all, a winner for each; of steps, whose kernels start by their sizes, a search
            for each, which share the limits.
        limits: of trials and seconds.
        gpus: as CUDA numbers them; `interpreter` for tests.
        seed: of the search.
        capture: that inputs are made of; without one they are drawn so that neighbours choose alike.
        storage: of studies that several processes share, see `storages`; None is in the cache.
        only: kernels whose parts move.
        command: the words that do it again.
        child: what a measuring process runs.
        patience: before it is said to hang.
        rounds: of the finals.
    """

    dtype: DType = "bf16"
    work: Work = "forward"
    page: int = 0
    shapes: tuple[Shape, ...] = (Shape(queries=8192, keys=8192), Shape(queries=32768, keys=32768))
    limits: Limits = field(default_factory=lambda: Limits(seconds=300.0))
    gpus: tuple[str, ...] = ("0",)
    seed: int = 0
    capture: Path | None = None
    storage: str | None = None
    only: tuple[str, ...] = ()
    command: tuple[str, ...] = ("hsgen", "tune")
    child: tuple[str, ...] = ("-m", "hsgen.tuning")
    patience: Patience = field(default_factory=Patience)
    rounds: int = ROUNDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """What one shape got; without a verdict, why."""

    shape: str
    verdict: Verdict | None
    record: tuned.Tuned | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a search found.

    Attributes:
        results: of all points that were looked at, those of earlier runs included.
        failed: commands that try a failed point again, one a class.
        journal: where the study is, without a password.
        stopped: by the user, before the finals.
    """

    spec: Spec
    target: Target
    dtype: DType
    start: Point
    results: Mapping[str, Result]
    finals: tuple[Final, ...]
    failed: tuple[str, ...]
    journal: str
    study: str
    stopped: bool

    @property
    def records(self) -> tuple[tuned.Tuned, ...]:
        return tuple(final.record for final in self.finals if final.record)

    @property
    def measured(self) -> int:
        return sum(not static(result) for result in self.results.values())

    @property
    def failures(self) -> dict[str, int]:
        """By class."""
        found = (r.failure.kind for r in self.results.values() if r.failure)
        return dict(Counter(found).most_common())

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "spec": self.spec.name,
            "target": self.target.name,
            "dtype": self.dtype,
            "measured": self.measured,
            "failures": self.failures,
            "stopped": self.stopped,
            "journal": self.journal,
            "study": self.study,
            "records": [json.loads(tuned.dump(record)) for record in self.records],
            "finals": [
                {"shape": each.shape, "said": str(each.verdict or each.reason)}
                for each in self.finals
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.spec.name} on {self.target.name} ({self.target.label}), {self.dtype}: "
            f"{self.measured} points measured, {len(self.results)} looked at"
        ]
        for final in self.finals:
            lines.append(f"  {final.shape}: {final.verdict or final.reason}")
            if final.verdict:
                changed = final.verdict.winner.point.changes(self.start)
                lines += [f"    {word}" for word in filter(None, changed.split(","))]
        if self.failures:
            counts = ", ".join(f"{kind} {count}" for kind, count in self.failures.items())
            lines += [f"  failed: {counts}", *(f"    {line}" for line in self.failed)]
        lines.append(f"  study: {self.study} in {self.journal}")
        if self.stopped:
            lines.append("  stopped: results are kept, and the same command goes on")
        return "\n".join(lines) + "\n"


def _quietly(status: Status) -> None:
    """Tell nobody."""


def tune(spec: Spec, options: Options, *, tell: Tell = _quietly) -> Report:
    """The same of a work that has one search: of steps, of one shape."""
    (report,) = tune_each(spec, options, tell=tell)
    return report


def tune_each(
    spec: Spec, options: Options, *, tell: Tell = _quietly
) -> Generator[Report, None, None]:
    """Search, decide, and keep what won in the cache.

    Args:
        spec: heads and head dims bound.
        options: how.
        tell: told after each result.

    Raises:
        HsgenError: no GPU, or no storage.
        PlanError: no kernel can do it, or a spec has no cache for steps.
        TuneError: nothing can run, or processes die one after the other.
    """
    parts = _parts(options)
    _refuse(spec, options)
    with _Tuning(spec, parts[0]) as work:
        for part in parts:
            work.turn_to(part)
            report = work.run(tell)
            yield report
            if report.stopped:
                return


def _parts(options: Options) -> tuple[Options, ...]:
    """Searches: of steps one a shape, whose commands say so."""
    if options.work != "decode":
        return (options,)
    count, (trials, seconds) = len(options.shapes), (options.limits.trials, options.limits.seconds)
    limits = Limits(
        trials=math.ceil(trials / count) if trials < math.inf else trials, seconds=seconds / count
    )
    return tuple(
        replace(options, shapes=(shape,), limits=limits, command=_of_shape(options.command, shape))
        for shape in options.shapes
    )


def _of_shape(command: Sequence[str], shape: Shape) -> tuple[str, ...]:
    """The words that search for one shape alone."""
    words = list(command)
    if "--shapes" in words:
        words[words.index("--shapes") + 1] = shape.name
    return tuple(words)


def _refuse(spec: Spec, options: Options) -> None:
    """Refuse steps of a spec that has none, before any process starts.

    Raises:
        PlanError: it has no cache, or no kernel decodes it.
        ArgumentError: steps with more tokens than a step has, or pages of something else.
    """
    if options.work != "decode":
        if options.page:
            raise ArgumentError(f"page: expected none of {options.work}, got {options.page}")
        return
    for shape in options.shapes:
        if shape.queries > stepping.FEW:
            raise ArgumentError(
                f"{shape.name}: expected at most {stepping.FEW} new tokens, got {shape.queries}",
                help="1/8K is a step of one token behind 8K",
            )
    graph = passes.run(planner.plan(planner.without_losses(spec)))
    cached = Cached(rows="few", page=options.page)
    schedule.schedule(graph, Target.named("h100"), options.dtype, cached=cached)


def present_gpus() -> tuple[str, ...]:
    """Every GPU that a process may use, as CUDA numbers them.

    Raises:
        HsgenError: there is none.
    """
    with Lanes({"shapes": []}, (ANY,)) as lanes:
        return tuple(map(str, range(int(lanes.describe()["gpus"]))))


def attempt(spec: Spec, options: Options, text: str) -> Result:
    """One point alone, as `--try` names it: how a failure is looked at again.

    Raises:
        ArgumentError: steps of several shapes, each of which has points of its own.
    """
    _refuse(spec, options)
    if options.work == "decode" and len(options.shapes) > 1:
        raise ArgumentError(f"shapes: expected one beside a point, got {len(options.shapes)}")
    with _Tuning(spec, options) as work:
        point = work.space.parse(text)
        failure = work.judge.failure(point)
        return Result(failure=failure) if failure else work.lanes.measure(point)


def least_us(graph: Graph, space: Space, shapes: Sequence[Shape]) -> dict[str, float]:
    """By shape, microseconds that the arithmetic takes at the card's peak; of gradients that of their calls,
    each operator once: theirs is more.  What a rule leaves to numbers may be next to nothing, and intervals
    that are halved are scored where kernels find them first.
    """
    plan, target, found = space.variants[0].plan, space.target, dict[str, float]()
    if space.sizes:  # a step is bound by what it reads, of which caches of the GPU may hold some
        return found
    unsure = {*analysis.at_most(graph)}
    unsure |= {x.name for x in graph.nodes() if isinstance(x.op, Score) and x.op.halves}
    for shape in shapes:
        if shape.queries != shape.keys:
            continue
        seconds, seen = 0.0, set[str]()
        for kernel in plan.kernels:
            if unsure.intersection(kernel.operators):
                continue
            if plan.gradients and seen.issuperset(kernel.operators):
                continue
            seen.update(kernel.operators)
            flops, _ = report.work(graph, plan, kernel, shape.keys)
            units = report.math_type(kernel, plan.dtype)
            if plan.gradients:  # of which most kernels have dots
                units = "tf32x3" if space.dtype == "fp32" else space.dtype
            seconds += resources.roofline(flops, 0.0, target, units).compute_seconds
        found[shape.name] = seconds * shape.sequences * 1e6 * PEAK
    return found


class _Tuning:
    """Everything that one run needs; leaving the block ends its processes."""

    def __init__(self, spec: Spec, options: Options) -> None:
        """The first of what is tuned; `turn_to` goes on to another."""
        self.spec, self.options = planner.without_losses(spec), options
        self.interpreted = options.gpus == (INTERPRETED,)
        # Of this run alone: Triton never checks what it reads back.  What pruning compiles is what a
        # launch would, so the GPU's process finds it there.
        self._cache = tempfile.TemporaryDirectory(
            dir=store.private_directory(), ignore_cleanup_errors=True
        )
        cache = Path(self._cache.name)
        self.lanes = Lanes(
            self._problem(Target.named("h100") if self.interpreted else None),
            options.gpus,
            command=options.child,
            patience=options.patience,
            cache=cache,
        )
        self._compilers = Compilers(_compilers(), timeout=COMPILING, cache=cache)
        try:
            told = self.lanes.describe()
            self.made: JsonObject = told["made"]
            self.target = Target.named("h100") if self.interpreted else Target(**told["target"])
            self.graph: Graph = passes.run(planner.plan(self.spec))
            self.turn_to(options)
        except BaseException:
            self.close()
            raise
        self.problem = tuned.Problem.of(self.spec, options.dtype, options.work, options.page)
        self.environment = tuned.environment(self.target, interpreted=self.interpreted)

    def turn_to(self, options: Options) -> None:
        """Go on with other shapes, in the same processes."""
        self.options = options
        sizes = None
        if options.work == "decode":
            sizes = self._bucket(options.shapes[0]).sizes(options.page)
        whole = space(self.graph, self.target, options.dtype, options.work, sizes)
        self.space: Space = whole.only(options.only) if options.only else whole
        self.compiler = Compiler(self.spec, self.space, self._compilers)
        self.judge: Judge = Lenient() if self.interpreted else self.compiler
        self.lanes.turn_to(self._problem(Target.named("h100") if self.interpreted else None))

    def _bucket(self, shape: Shape) -> tuned.Bucket:
        """Of what is tuned."""
        return shape.step_bucket if self.options.work == "decode" else shape.bucket

    def __enter__(self) -> _Tuning:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.lanes.close()
        self._compilers.close()
        self._cache.cleanup()

    def _problem(self, target: Target | None) -> JsonObject:
        return {
            "spec": dump(self.spec),
            "dtype": self.options.dtype,
            "work": self.options.work,
            "page": self.options.page,
            "target": json.dumps(asdict(target)) if target else "",
            "shapes": [shape.name for shape in self.options.shapes],
            "capture": str(self.options.capture.resolve()) if self.options.capture else "",
        }

    # --- the run

    def run(self, tell: Tell) -> Report:
        place = self.options.storage or paths.cache_dir() / "studies" / f"{self.name}.journal"
        self._compile_first()
        storage = storage_at(place)
        with reached(place):
            journal = Journal(storage, self.name, self.space)
        search = Search(
            space=self.space,
            measurer=self.lanes,
            journal=journal,
            judge=self.judge,
            limits=self.options.limits,
            seed=self.options.seed,
            floor_us={}
            if self.interpreted
            else least_us(self.graph, self.space, self.options.shapes),
            weights=self.lanes.shares(self.space.start),
            tell=tell,
        )
        with _interruptible(search), reached(place):
            search.run([point for shape in self.options.shapes for point in self._warm(shape)])
        finals = list[Final]()
        for final in () if search.stopped else self._finals(search):
            if final.record is not None:
                tuned.publish(final.record)  # at once: those of long calls take a while
            finals.append(final)
        return Report(
            spec=self.spec,
            target=self.target,
            dtype=self.options.dtype,
            start=self.space.start,
            results=dict(journal.results),
            finals=tuple(finals),
            failed=tuple(self._repros(journal)),
            journal=shown(place),
            study=self.name,
            stopped=search.stopped,
        )

    @property
    def name(self) -> str:
        """Of the study: another space, text, GPU or shape makes another."""
        texts = [
            sorted(self.compiler.artifact(v.orders).module.texts.items())
            for v in self.space.variants
        ]
        shapes = [shape.name for shape in self.options.shapes]
        capture = self.options.capture
        inputs = hashlib.sha256(capture.read_bytes()).hexdigest() if capture else "drifting"
        parts = [self.problem.said(), asdict(self.environment), shapes, self.space.digest, texts]
        parts.append(inputs)
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.spec.name}-{digest}"

    # --- what is known already

    def _warm(self, shape: Shape) -> list[Point]:
        """Points of records, nearest first: a few of a few."""
        found = []
        for candidate in self._ranked(shape)[:NEIGHBOURS]:
            found += self._points_of(candidate.kept.record)[:WARM]
        return found

    def _ranked(self, shape: Shape) -> tuple[tuned.Candidate, ...]:
        return tuned.ranked(self.problem, self._bucket(shape), self.environment)

    def _points_of(self, record: tuned.Tuned) -> list[Point]:
        """The choices of a record that this space has: what it says was best, then near-ties."""
        made = self._compiled() if self.options.work == "decode" else None
        choices = [(record.orders, record.configs)]
        choices += [(each.orders, each.kernels) for each in record.alternates]
        if made is not None:
            choices = [(x, tuned.of_size(y, record.bucket, made)) for x, y in choices]
        found = []
        for orders, configs in choices:
            try:
                found.append(self.space.point(orders, configs))
            except HsgenError:
                continue
        return found

    def _compiled(self) -> tuned.Compiled:
        """Steps of these sizes, and of any other."""
        artifact, page = self.compiler.artifact(()), self.options.page
        dtype, work = self.options.dtype, self.options.work

        def at(bucket: tuned.Bucket) -> Plan:
            sizes = bucket.sizes(page)
            return compile_work(self.spec, self.target, dtype, work, sizes=sizes).plan

        texts = artifact.module.texts
        return tuned.Compiled(plan=artifact.plan, target=self.target, texts=texts, at=at)

    def _compile_first(self) -> None:
        """What the GPU's process runs before any point, which by itself it compiles one by one: the start,
        of gradients the calls that they are of, and of steps what fills a cache.
        """
        if self.interpreted:
            return
        waiting = []
        if self.options.work == "gradients":
            apart = backward.keeps_branches(self.graph)
            calls = compile_spec(self.spec, self.target, self.options.dtype, apart=apart)
            waiting = [self._compilers.submit(job) for job in call_jobs(calls)]
        if self.space.sizes:
            filling = filling_jobs(self.spec, self.target, self.options.dtype, self.space.sizes)
            waiting = [self._compilers.submit(job) for job in filling]
        self.compiler.outcomes(self.space.start)
        wait(waiting)

    def _incumbent(self, shape: Shape) -> Point:
        """What a call of this shape gets now."""
        for candidate in self._ranked(shape):
            if candidate.rung == "exact" and (points := self._points_of(candidate.kept.record)):
                return points[0]
        return self.space.start

    # --- finals

    def _finals(self, search: Search) -> Generator[Final, None, None]:
        for shape in self.options.shapes:
            search.say(f"finals of {shape.name}")
            incumbent = self._incumbent(shape)
            points = list(dict.fromkeys([*search.finalists(FINALISTS, shape.name), incumbent]))
            entrants = self._entrants(points, shape, incumbent)
            verdict = decide(entrants, incumbent)
            if verdict is None:
                reason = "; ".join(str(e.failure) for e in entrants if e.failure)
                yield Final(shape=shape.name, verdict=None, record=None, reason=reason)
                continue
            if verdict.adopted:
                pair = [verdict.winner.point, verdict.incumbent.point]
                verdict = confirmed(verdict, self._timed(pair, shape, self.options.rounds))
            record = self._record(search, shape, entrants, verdict)
            yield Final(shape=shape.name, verdict=verdict, record=record)

    def _entrants(self, points: Sequence[Point], shape: Shape, incumbent: Point) -> list[Entrant]:
        """Right at full length, then timed in turn: after a few rounds, who may still win."""
        proven = {point: self.lanes.prove(point, shape.name).failure for point in points}
        right = [point for point in points if proven[point] is None]
        wrong = [
            Entrant(point=point, samples=(), failure=failure)
            for point, failure in proven.items()
            if failure is not None
        ]
        few = min(EARLY, self.options.rounds)
        first = self._timed(right, shape, few)
        left = contenders(first, incumbent)
        if len(left) > 1 and few < self.options.rounds:
            more = self._timed([each.point for each in left], shape, self.options.rounds - few)
            by_point = {each.point: each for each in more}
            first = [_longer(each, by_point.get(each.point)) for each in first]
        return wrong + first

    def _timed(self, points: Sequence[Point], shape: Shape, rounds: int) -> list[Entrant]:
        """All of them in turn, round by round."""
        timed = self.lanes.compare(points, shape.name, rounds) if points else []
        found: list[Entrant] = []
        for point, samples in zip(points, timed, strict=True):
            if isinstance(samples, Failure):
                found.append(Entrant(point=point, samples=(), failure=samples))
            else:
                registers = least_registers(self._outcomes(point))
                found.append(Entrant(point=point, samples=tuple(samples), registers=registers))
        return found

    def _outcomes(self, point: Point) -> dict[str, Outcome]:
        return {} if self.interpreted else self.compiler.outcomes(point)

    def _record(
        self, search: Search, shape: Shape, entrants: Sequence[Entrant], verdict: Verdict
    ) -> tuned.Tuned | None:
        """The record of a winner; what a record says already needs none."""
        winner = verdict.winner
        kept = self._incumbent(shape)
        if not verdict.adopted and kept != self.space.start:
            return None
        start = next((e for e in entrants if e.point == self.space.start and e.runs), winner)
        result = search.journal.results.get(winner.point.key, Result())
        texts, outcomes = (
            self.compiler.artifact(winner.point.orders).module.texts,
            self._outcomes(winner.point),
        )
        return tuned.Tuned(
            problem=self.problem,
            bucket=self._bucket(shape),
            environment=self.environment,
            orders=dict(winner.point.orders),
            kernels={
                name: _choice(texts[name], config, outcomes.get(name))
                for name, config in winner.point.keywords().items()
            },
            time=winner.time,
            default=start.time,
            check={**result.check, "ratio": verdict.ratio, "noise": verdict.noise},
            alternates=tuple(
                tuned.Alternate(
                    kernels=each.point.keywords(), ratio=ratio, orders=dict(each.point.orders)
                )
                for each, ratio in verdict.ties[: tuned.MAX_ALTERNATES]
            ),
            provenance=tuned.Provenance(
                hsgen=hsgen_version(),
                torch=str(self.made["torch"]),
                driver=self.made["driver"],
                cuda=self.made["cuda"],
                date=str(self.made["date"]),
                trials=search.measured,
                command=shlex.join(self.options.command),
            ),
        )

    def _repros(self, journal: Journal) -> Generator[str, None, None]:
        """Of each class, how to see one again."""
        seen = set[str]()
        for key, result in journal.results.items():
            failure = result.failure
            if failure is None or failure.kind in seen:
                continue
            seen.add(failure.kind)
            point = journal.points[key]
            variant = self.space.variant(point)
            start = variant.start if variant else self.space.start
            words = shlex.join([*self.options.command, "--try", point.changes(start)])
            yield f"{str(failure)[:160]}\n      {words}"


def _longer(each: Entrant, more: Entrant | None) -> Entrant:
    """An entrant with the rounds that came after; one that then failed has failed."""
    if more is None or not more.runs:
        return more or each
    return replace(each, samples=each.samples + more.samples)


def _choice(text: str, config: Mapping[str, int], outcome: Outcome | None) -> tuned.KernelChoice:
    cost = outcome.cost if isinstance(outcome, Resources) else None
    return tuned.KernelChoice(
        text=text,
        config=dict(config),
        shared=cost.shared_bytes if cost else 0,
        registers=cost.registers if cost else 0,
        spills=cost.spill_bytes if cost else 0,
    )


def _compilers() -> int:
    """Processes that compile; a core stays with the one that measures."""
    return max(1, min(MOST_COMPILERS, (os.cpu_count() or 2) - 1))


@contextmanager
def _interruptible(search: Search) -> Generator[None, None, None]:
    """The first Ctrl-C ends the search after what is running, the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        if search.stopped:
            raise KeyboardInterrupt
        search.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
