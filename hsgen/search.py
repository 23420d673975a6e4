"""What a spec could be instead: variants on the front of time against output error.

A variant's error is that of its choice on a capture, by the reference; its time is measured on the card
that is here, once its kernels are right, their tiles turned with the spec, or the least that a card could
take, which no one measured.  One study has both: any number of processes share it, and go on with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
import torch
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import Trial, TrialState
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from hsgen import (
    captures,
    checking,
    machine,
    measure,
    passes,
    planner,
    plots,
    quality,
    report,
    resources,
    schedule,
    tiles,
)
from hsgen.captures import Group
from hsgen.configs import DType
from hsgen.errors import HsgenError, PlanError, SpecError
from hsgen.execution import PLANNED
from hsgen.graph import align
from hsgen.measure import Setting
from hsgen.pruning import MOST_COMPILERS, Compiler
from hsgen.quality import Json
from hsgen.report import Progress
from hsgen.resources import Compilers
from hsgen.spec import Spec, dump
from hsgen.target import Target
from hsgen.tiles import Configs
from hsgen.tune.presence import Presence
from hsgen.tune.storages import reached, storage_at
from hsgen.variants import Value, Variants

TRIALS = 60
ROWS = 256  # of a capture that errors are means over
STALE = 200  # points in a row that were seen before, and the search has nothing left to say
SEED = 1
NONE = 1e-4  # an error below is rounding
SECONDS = 0.3  # of timing, a variant

Source = Literal["measured", "least"]


class Clock(Protocol):
    """Says how long a call of a spec takes."""

    @property
    def source(self) -> Source: ...

    @property
    def about(self) -> str: ...

    @property
    def turns_tiles(self) -> bool:
        """Whether it times kernels, whose tiles may be turned."""
        ...

    def configs(self, spec: Spec, choice: Mapping[str, Value]) -> Configs:
        """By kernel, the values that a choice of tiles replaces.

        Raises:
            HsgenError: they do not go together.
        """
        ...

    def milliseconds(self, spec: Spec, config: Configs) -> float:
        """Of a forward call.

        Raises:
            HsgenError: it has none: no kernel does it, or it is wrong.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """The least time of every kernel by arithmetic and memory, summed: what needs no card."""

    target: Target
    tokens: int
    dtype: DType = "bf16"

    @property
    def source(self) -> Source:
        return "least"

    @property
    def about(self) -> str:
        return f"least time on {self.target.name} by its roofline, {self.tokens:,} tokens"

    @property
    def turns_tiles(self) -> bool:
        return False

    def configs(self, spec: Spec, choice: Mapping[str, Value]) -> Configs:  # noqa: ARG002 - of none
        return {}

    def milliseconds(self, spec: Spec, config: Configs) -> float:  # noqa: ARG002 - whatever tiles are
        graph = passes.run(planner.plan(spec))
        plan = schedule.schedule(graph, self.target, self.dtype)
        total = 0.0
        for kernel in plan.kernels:
            flops, moved = report.work(graph, plan, kernel, self.tokens)
            units = report.math_type(kernel, plan.dtype)
            total += resources.roofline(flops, moved, self.target, units).seconds
        return total * 1e3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Medians on the card that is here, of kernels that were checked first."""

    setting: Setting
    tokens: int

    @property
    def source(self) -> Source:
        return "measured"

    @property
    def about(self) -> str:
        return f"measured on {machine.card(self.setting.device)}, {self.tokens:,} tokens"

    @property
    def turns_tiles(self) -> bool:
        return True

    def configs(self, spec: Spec, choice: Mapping[str, Value]) -> Configs:
        """All kernels are compiled at once, where a launch finds them: one after the other takes long."""
        target, dtype = Target.current(), PLANNED[self.setting.dtype]
        found, point = tiles.point_of(spec, target, dtype, choice)
        workers = max(1, min(MOST_COMPILERS, (os.cpu_count() or 2) - 1))
        with Compilers(workers, cache=Path(knobs.cache.dir)) as compilers:
            failure = Compiler(spec, found, compilers).failure(point)
        if failure is not None and failure.kind != "SPILL":
            raise HsgenError(str(failure))
        return tiles.configs(spec, target, dtype, choice)

    def milliseconds(self, spec: Spec, config: Configs) -> float:
        setting = replace(self.setting, config=config)
        try:
            with _variants_are_not_tuned():
                measure.check_all(setting, spec, min(measure.SMALL, self.tokens))
                kernel, sets = setting.load(spec), setting.sets(spec, self.tokens)
                found = setting.time(lambda n: kernel(**sets[n % len(sets)]))
        except (checking.CheckError, torch.cuda.OutOfMemoryError) as error:
            raise HsgenError(str(error)) from error
        except (OutOfResources, CompilationError) as error:
            raise HsgenError(f"kernels do not run: {type(error).__name__}") from error
        return float(found["ms"]["median"])


@contextmanager
def _variants_are_not_tuned() -> Generator[None, None, None]:
    """No line for each variant that it has no record: none has."""

    def other(line: logging.LogRecord) -> bool:
        return "hsgen tune" not in line.getMessage()

    logger = logging.getLogger("hsgen")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def clock(capture: Path, target: Target | None, *, tokens: int | None = None) -> Clock:
    """The roofline of a target; without one the card that is here, whose inputs are of the capture.

    Args:
        capture: Captured heads.
        target: None measures.
        tokens: Of a call; None takes as many as were captured.

    Raises:
        HsgenError: no GPU is present, or the capture cannot be read.
    """
    groups = captures.load(capture)
    tokens = tokens or min(len(group.q) for group in groups)
    if target:
        return Least(target=target, tokens=tokens)
    if not torch.cuda.is_available():
        raise HsgenError(
            "no GPU is present, and times are of one",
            help="--least takes the least time that --target could take by its roofline instead",
        )
    setting = Setting(device="cuda", kind="real", groups=groups, seconds=SECONDS)
    return Measured(setting=setting, tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One variant: what was turned, and what came of it."""

    choice: dict[str, Value]
    spec: Spec = field(repr=False)
    config: Configs  # by kernel, what is not as it starts
    changed: str
    ms: float
    error: float
    mass: float
    density: float

    def beats(self, other: Point) -> bool:
        """Whether it is better in one thing and no worse in the other."""
        mine, theirs = (self.ms, self.error), (other.ms, other.error)
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]

    def record(self) -> Json:
        """The same for machines."""
        return {
            "changed": self.changed,
            "choice": dict(self.choice),
            "digest": self.spec.digest,
            "config": {name: dict(values) for name, values in self.config.items()},
            "ms": self.ms,
            "error": self.error,
            "mass": self.mass,
            "density": self.density,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Every variant that was tried, and why others were not."""

    variants: Variants
    clock: str
    source: Source
    capture: str
    tokens: int
    points: tuple[Point, ...]
    refused: dict[str, int]  # by reason, how many

    @property
    def own(self) -> Point | None:
        """The spec as it is; none where it has no kernels."""
        return next((p for p in self.points if p.choice == self.variants.own), None)

    @property
    def front(self) -> tuple[Point, ...]:
        """Those that no other beats, the quickest first; of equal ones the first."""
        kept: dict[tuple[float, float], Point] = {}
        for point in self.points:
            if not any(other.beats(point) for other in self.points):
                kept.setdefault((point.ms, point.error), point)
        return tuple(sorted(kept.values(), key=lambda point: point.ms))

    def record(self) -> dict[str, object]:
        """The same for machines."""
        spec = self.variants.spec
        return {
            "spec": spec.name,
            "digest": spec.digest,
            "time": self.clock,
            "source": self.source,
            "capture": self.capture,
            "tokens": self.tokens,
            "variants": len(self.variants),
            "knobs": {knob.name: list(knob.values) for knob in self.variants.knobs},
            "own": self.own.record() if self.own else None,
            "front": [point.record() for point in self.front],
            "points": [point.record() for point in self.points],
            "refused": self.refused,
        }

    def __str__(self) -> str:
        tried = f"{len(self.points)} of {len(self.variants):,} variants tried"
        lines = [f"{self.variants.spec.name} on {self.capture}: {tried}; time is the {self.clock}"]
        rows = [("", "      ms", " error", "  mass", "density", "what is turned")]
        rows += [_row(str(i), point) for i, point in enumerate(self.front, 1)]
        rows += [_row("own", self.own)] if self.own else []
        lines += ["", *align(rows), ""]
        if self.own and self.own not in self.front:
            better = sum(point.beats(self.own) for point in self.front)
            lines.append(f"{better} of the front beat the spec as it is in time and error both")
        lines += [f"left out, {count}: {reason}" for reason, count in self.refused.items()]
        return "\n".join(lines).rstrip() + "\n"


def _row(name: str, point: Point) -> tuple[str, ...]:
    numbers = (f"{point.ms:8.4g}", f"{point.error:6.4f}", f"{point.mass:6.3f}")
    return (name, *numbers, f"{point.density:7.3f}", point.changed)


def _quietly(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def search(
    variants: Variants,
    capture: Path,
    clock: Clock,
    *,
    layers: Sequence[int] = (),
    tokens: int | None = None,
    rows: int = ROWS,
    trials: int = TRIALS,
    budget: float = math.inf,
    storage: Path | str | None = None,
    progress: Progress = _quietly,
) -> Found:
    """Try variants; all of them where there are few.

    Args:
        variants: What may be turned.
        capture: Real queries, keys and values, on which errors are measured.
        clock: Says how long a call takes.
        layers: Only these of the capture; none means all.
        tokens: A prefix of the capture; None takes all.
        rows: Measured, of the second half.
        trials: Variants that are tried, not counting those that are no spec or have no kernel.
        budget: Seconds after which none is begun.
        storage: What was tried is kept there, and not tried again: a journal, a URL, see `storages`.
        progress: Told of each.

    Raises:
        HsgenError: the capture does not do, or no variant can be measured.
    """
    if not variants.knobs:
        raise HsgenError(f"{variants.spec.name}: nothing in it can be turned without retraining")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    groups = [group.prefix(tokens or len(group.q)) for group in captures.load(capture, layers)]
    tries = _Tries(
        variants=variants,
        groups=groups,
        clock=clock,
        rows=rows,
        key=_key(variants, clock, capture, rows, tokens, layers),
    )
    place = storage or "memory"
    opened = storage_at(storage)
    with reached(place):
        study = optuna.create_study(
            study_name=tries.key,
            storage=opened,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        # whoever comes later draws otherwise: alike, they would ask for the same
        seed = SEED + len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=16
        )
    deadline = time.monotonic() + budget
    with (
        reached(place),
        _present(study) as presence,
        closing(_asked(study, tries, trials, presence)) as asked,
    ):
        for choice in asked:
            if time.monotonic() > deadline or len(tries.points) >= trials:
                break
            progress(f"trying variants of {variants.spec.name}", len(tries.points), trials)
            tries.run(choice)
    if not tries.points:
        reasons = "; ".join(tries.refused) or "no time left (--budget)"
        raise HsgenError(f"{variants.spec.name}: no variant could be tried: {reasons}")
    return Found(
        variants=variants,
        clock=clock.about,
        source=clock.source,
        capture=capture.name,
        tokens=min(len(group.q) for group in groups),
        points=tuple(tries.points.values()),
        refused=dict(tries.refused),
    )


def _key(
    variants: Variants,
    clock: Clock,
    capture: Path,
    rows: int,
    tokens: int | None,
    layers: Sequence[int],
) -> str:
    """All that a point depends on but its choice."""
    data = hashlib.sha256(capture.read_bytes()).hexdigest()
    parts = (variants.spec.digest, str(variants), clock.about, data, rows, tokens, tuple(layers))
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return f"{variants.spec.name}-{digest[:16]}"


@contextmanager
def _present(study: optuna.Study) -> Generator[Presence, None, None]:
    """This process, as others at the study see it."""
    presence = Presence(study._storage, study._study_id)
    presence.begin()
    try:
        yield presence
    finally:
        presence.end()


@dataclass(slots=True, kw_only=True, eq=False)
class _Tries:
    """What was tried so far: by digest of a spec and steps of tiles, its point."""

    variants: Variants
    groups: Sequence[Group]
    clock: Clock
    rows: int
    key: str
    points: dict[str, Point] = field(default_factory=dict[str, Point])
    refused: dict[str, int] = field(default_factory=dict[str, int])
    _lost: set[str] = field(default_factory=set[str])
    _errors: dict[str, dict[str, float]] = field(default_factory=dict[str, "dict[str, float]"])
    _seen: set[int] = field(default_factory=set[int])
    _deaths: Counter[str] = field(default_factory=Counter[str])

    def run(self, choice: dict[str, Value]) -> Point | None:
        """Try a choice, or say what came of it before; None where there is nothing to measure."""
        try:
            spec = self.variants.make(choice)
        except SpecError:
            return self._refuse(repr(choice), "the rules of a spec refuse it")
        name = _name(spec, choice)
        if name in self._lost:
            return None
        if name not in self.points:
            try:
                self.points[name] = self._measure(spec, choice)
            except PlanError as error:
                return self._refuse(name, error.message)
            except HsgenError as error:
                return self._refuse(name, f"{type(error).__name__}: {error.message}")
        return self.points[name]

    def _refuse(self, name: str, reason: str) -> None:
        if name not in self._lost:
            self._lost.add(name)
            self.refused[reason] = self.refused.get(reason, 0) + 1

    def _measure(self, spec: Spec, choice: dict[str, Value]) -> Point:
        config = self.clock.configs(spec, choice)
        ms = self.clock.milliseconds(spec, config)
        return Point(
            choice=choice,
            spec=spec,
            config=config,
            changed=self.variants.changed(choice),
            ms=ms,
            **self._error(spec),
        )

    def _error(self, spec: Spec) -> dict[str, float]:
        """What the spec's choice loses, whatever its tiles."""
        if spec.digest not in self._errors:
            of_all = [each for g in self.groups for each in quality.measure(spec, g, self.rows)]
            subject = quality.subjects(spec)[-1].name
            own = [each for each in of_all if each.subject == subject]
            self._errors[spec.digest] = {
                "error": _mean([float(str(each.ways["selected"]["error"])) for each in own]),
                "mass": _mean([float(str(each.ways["selected"]["mass"])) for each in own]),
                "density": _mean([each.density for each in own]),
            }
        return self._errors[spec.digest]

    def take_over(self, study: optuna.Study, presence: Presence) -> None:
        """What other processes have found, earlier ones too; what ended two of them is not tried again."""
        for trial in study.get_trials(deepcopy=False):
            if trial.number in self._seen or not trial.params:
                continue
            choice = _choice(self.variants, trial.params)
            if trial.state == TrialState.COMPLETE:
                self._note(choice, trial.user_attrs)
            elif trial.state == TrialState.RUNNING:
                worker = trial.user_attrs.get(WORKER)
                if presence.is_me(worker) or presence.alive(worker, trial):
                    continue
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                self._died(choice)
            elif WORKER in trial.user_attrs and REFUSED not in trial.user_attrs:
                self._died(choice)
            self._seen.add(trial.number)

    def _note(self, choice: dict[str, Value], said: Mapping[str, Any]) -> None:
        spec = self.variants.make(choice)
        figures = {name: float(said[name]) for name in KEPT}
        self._errors.setdefault(spec.digest, {n: figures[n] for n in KEPT if n != "ms"})
        config: Configs = json.loads(said[CONFIG])
        changed = self.variants.changed(choice)
        point = Point(choice=choice, spec=spec, config=config, changed=changed, **figures)
        self.points.setdefault(_name(spec, choice), point)

    def _died(self, choice: dict[str, Value]) -> None:
        try:
            name = _name(self.variants.make(choice), choice)
        except SpecError:
            return
        self._deaths[name] += 1
        if self._deaths[name] >= DEATHS:
            self._refuse(name, "processes ended while they were at it")


def _name(spec: Spec, choice: Mapping[str, Value]) -> str:
    """What a point is about: choices that make the same spec, with the same tiles, are one."""
    return f"{spec.digest} {sorted(tiles.steps_of(choice).items())}"


KEPT = ("ms", "error", "mass", "density")
CONFIG, WORKER, REFUSED = "config", "worker", "refused"  # of a trial, beside these
DEATHS = 2  # of processes at one point


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _asked(
    study: optuna.Study, tries: _Tries, trials: int, presence: Presence
) -> Generator[dict[str, Value], None, None]:
    """Choices to try: all, the spec itself first, or what the study asks for.  Tells it what came of each."""
    spaces = _spaces(tries.variants)
    tries.take_over(study, presence)
    if len(tries.variants) <= trials:
        for choice in tries.variants.choices():
            known = len(tries.points)
            yield choice
            if len(tries.points) > known:
                _note(study, tries, choice, spaces)
        return
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(_params(tries.variants, tries.variants.own))
    stale = 0
    while stale < STALE:
        known = len(tries.points)
        trial = study.ask(spaces)
        trial.set_user_attr(WORKER, presence.me)
        choice = _choice(tries.variants, trial.params)
        try:
            yield choice
        except GeneratorExit:  # nobody was at it
            _tell(study, trial, None)
            raise
        _tell(study, trial, tries.run(choice))  # known by now
        stale = 0 if len(tries.points) > known else stale + 1
        tries.take_over(study, presence)


def _tell(study: optuna.Study, trial: Trial, point: Point | None) -> None:
    """What a trial has come to."""
    if point is None:
        trial.set_user_attr(REFUSED, True)
        study.tell(trial, state=TrialState.FAIL)
        return
    for name, value in _attributes(point).items():
        trial.set_user_attr(name, value)
    study.tell(trial, (point.ms, point.error))


def _attributes(point: Point) -> dict[str, float | str]:
    return {**{name: getattr(point, name) for name in KEPT}, CONFIG: json.dumps(point.config)}


def _note(
    study: optuna.Study,
    tries: _Tries,
    choice: dict[str, Value],
    spaces: dict[str, BaseDistribution],
) -> None:
    """Keep what a choice that no one asked for has come to."""
    point = tries.run(choice)
    if point is not None:
        study.add_trial(
            optuna.trial.create_trial(
                params=_params(tries.variants, choice),
                distributions=spaces,
                values=(point.ms, point.error),
                user_attrs=_attributes(point),
            )
        )


def _spaces(variants: Variants) -> dict[str, BaseDistribution]:
    """Values by their number in order, so that neighbours are near."""
    return {knob.name: IntDistribution(0, len(knob.values) - 1) for knob in variants.knobs}


def _choice(variants: Variants, params: dict[str, int]) -> dict[str, Value]:
    return {knob.name: knob.values[params[knob.name]] for knob in variants.knobs}


def _params(variants: Variants, choice: dict[str, Value]) -> dict[str, int]:
    return {knob.name: knob.values.index(choice[knob.name]) for knob in variants.knobs}


# --- what is kept of it


def texts(found: Found) -> dict[str, str]:
    """The front as spec files, by file name, quickest first."""
    made = {}
    for i, point in enumerate(found.front, 1):
        name = f"{found.variants.spec.name}_{i}"
        about = (
            f"# {found.variants.spec.name} with {point.changed}: {point.ms:.4g} ms ({found.clock}),",
            f"# error {point.error:.4f}, mass {point.mass:.3f} on {found.capture}.",
            *([f"# load_kernel(..., config={json.dumps(point.config)})"] if point.config else []),
        )
        text = dump(point.spec.model_copy(update={"name": name}))
        made[f"{name}.yaml"] = "\n".join(about) + "\n" + text
    return made


def outdated(found: Found, folder: Path) -> Iterator[Path]:
    """Spec files that an earlier search of the same spec left in a folder, when its front was longer."""
    name, made = found.variants.spec.name, texts(found)
    for path in sorted(folder.glob(f"{name}_*.yaml")):
        if path.name not in made and path.read_text().startswith(f"# {name} with "):
            yield path


def draw(found: Found) -> str:
    """Output error against time: every variant, the front as a line, the spec as it is."""
    floor = min((p.error for p in found.points if p.error > NONE), default=NONE) / 2
    line = tuple((point.ms, max(point.error, floor)) for point in found.front)
    marks = {"a variant": [_mark(p, floor) for p in found.points if p not in found.front]}
    if found.own:
        marks["the spec as it is"] = [_mark(found.own, floor, size=3.0)]
    panel = plots.Panel(
        title=found.variants.spec.name,
        lines=(plots.Line(name="the front", points=line),),
        marks={name: points for name, points in marks.items() if points},
    )
    about = (found.clock, f"error on {found.capture}, {found.tokens:,} tokens")
    return plots.draw("Time against output error", about, ("ms", "error"), [panel])


def _mark(point: Point, floor: float, size: float = 0.0) -> plots.Mark:
    """No error at all lies on the lowest line of a logarithmic axis."""
    return plots.Mark(x=point.ms, y=max(point.error, floor), size=size)
