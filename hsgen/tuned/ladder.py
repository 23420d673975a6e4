"""Which configuration a call gets: the first rung of a ladder that has one, or the starting one.

    exact             this problem, bucket, GPU and Triton
    nearest bucket    of this GPU and Triton, by steps of two
    other Triton      of this GPU, newest first
    other GPU         of this architecture, the most similar first
    start             what the plan starts from

On a rung the cache comes before the committed folder if its record is newer.  A record is used as far
as it still holds: kernels whose text has changed, and those that share tiles with them, start as if it
were not there.  Of a step that is larger or smaller than what was tuned, values that start otherwise at that
size stay where they start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, cast

from hsgen import knobs
from hsgen.errors import HsgenError
from hsgen.plan import Kernel, Plan
from hsgen.target import Target
from hsgen.tuned import files
from hsgen.tuned.files import Kept
from hsgen.tuned.records import Bucket, Environment, KernelChoice, Order, Problem, Tuned

Rung = Literal["exact", "nearest bucket", "other Triton", "other GPU", "start"]
WORKS = {"gradients": "gradients", "decode": "steps"}  # as people call them
RUNGS: tuple[Rung, ...] = ("exact", "nearest bucket", "other Triton", "other GPU", "start")
START = "default"  # the origin of a kernel that no record speaks for
MOST_RANKED = 64  # candidates that are looked at, nearest first


class UntunedError(HsgenError):
    """HSGEN_REQUIRE_TUNED is set, and a kernel would start untuned, of a call, its gradients or a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A plan, with its starting configurations, whose GPU, and the digests of its kernels' texts.

    `at`: of steps, whose starts follow from sizes, the same plan at the sizes of another bucket.
    """

    plan: Plan
    target: Target
    texts: Mapping[str, str]
    at: Callable[[Bucket], Plan] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a kernel cannot have what a record says.

    `changed`: the record is of another text; else it never held.
    """

    text: str
    changed: bool = False

    def __str__(self) -> str:
        return self.text


Compile = Callable[[Mapping[str, Order]], Compiled]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A record that may serve a call, and how far it is from it."""

    rung: Rung
    kept: Kept
    steps: int

    @property
    def origin(self) -> str:
        """In words, for `explain`."""
        record = self.kept.record
        match self.rung:
            case "nearest bucket":
                rung = f"tuned, nearest bucket: {record.bucket}"
            case "other Triton":
                rung = f"tuned with Triton {record.environment.triton}"
            case "other GPU":
                rung = f"tuned on {record.environment.gpu}"
            case _:
                rung = "tuned"
        return f"{rung}; {self.kept.where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a call gets.

    Attributes:
        configs: by kernel of the plan, keyword arguments of a launch.
        origins: by kernel, where its config came from.
        orders: that the plan was made with.
        rung: of the record.
        record: None on the last rung.
        refused: of candidates that were nearer, and kernels of the record, why they do not serve.
    """

    configs: Mapping[str, Mapping[str, int]]
    origins: Mapping[str, str]
    orders: Mapping[str, Order]
    rung: Rung
    record: Tuned | None
    refused: tuple[str, ...] = ()
    problem: Problem = field(repr=False)
    bucket: Bucket = field(repr=False)
    environment: Environment = field(repr=False)

    @property
    def tuned(self) -> bool:
        """Every kernel has what was measured on this GPU with this Triton."""
        own = self.rung in ("exact", "nearest bucket")
        return own and not any(origin.startswith(START) for origin in self.origins.values())

    @property
    def note(self) -> str:
        """One line about a call that gets less than could be measured; empty if it does not."""
        if self.tuned:
            return ""
        name, record = self.problem.spec, self.record
        command = f"hsgen tune {name}{self._words}"
        if record is None:
            used = "no tuned configuration, so kernels start with tiles that are known to fit"
        elif self.rung in ("other Triton", "other GPU"):
            whose = record.environment
            used = f"tuned on {whose.gpu} with Triton {whose.triton} only"
        else:
            started = [n for n, origin in self.origins.items() if origin.startswith(START)]
            used = f"changed since it was tuned: {', '.join(started)}"
        gain = f" (what it was tuned with was {record.speedup:.2f} times as fast)" if record else ""
        where = f"{self.environment.gpu}, Triton {self.environment.triton}"
        of = f"{name}'s {WORKS[self.problem.work]}" if self.problem.work != "forward" else name
        return f"{of} on {where}, {self.bucket}: {used}{gain}; {command}"

    @property
    def _words(self) -> str:
        """What `hsgen tune` is told beside the spec."""
        work, page, keys = self.problem.work, self.problem.page, _tokens(self.bucket.keys)
        if work != "decode":
            said = "" if work == "forward" else f" --work {work}"
            return f"{said} --shapes {keys}"
        sizes = self.bucket.sizes(page)
        rows = f"{sizes.tokens}/" if sizes.tokens > 1 else ""
        paged = f" --page {page}" if page else ""
        return f" --work decode --shapes {rows}{keys} --batch {sizes.sequences}{paged}"

    def tell(self) -> None:
        """Log the note, once for a problem and an environment."""
        key = (self.problem, self.environment)
        if self.note and key not in _told:
            _told.add(key)
            level = logging.INFO if self.rung.startswith("other") else logging.WARNING
            logging.getLogger("hsgen").log(level, "%s", self.note)

    def require(self) -> None:
        """Nothing, if the call is tuned.

        Raises:
            UntunedError: it is not; says what the nearest record has otherwise.
        """
        if not self.tuned:
            what = {"forward": "this call is", "decode": "this step is"}.get(
                self.problem.work, "these gradients are"
            )
            raise UntunedError(
                f"{self.problem.spec}: HSGEN_REQUIRE_TUNED is set, and {what} not tuned\n"
                + "\n".join(f"  {line}" for line in self._lacking()),
                help=self.note.rpartition("; ")[2],
            )

    def _lacking(self) -> list[str]:
        if self.record is not None and self.rung in ("exact", "nearest bucket"):
            return list(self.refused)
        closest = self.record or nearest(self.problem, self.bucket, self.environment)
        if closest is None:
            return [f"no record of {self.problem.spec} anywhere", *self.refused]
        asked = (self.problem, self.environment, self.bucket)
        had = (closest.problem, closest.environment, closest.bucket)
        lines = [
            f"{field}: expected {a!r}, nearest record has {b!r}"
            for field, a, b in _differences(asked, had)
        ]
        return lines + list(self.refused)


_told = set[tuple[Problem, Environment]]()


def look_up(problem: Problem, bucket: Bucket, environment: Environment, compiled: Compile) -> Found:
    """The configurations of a call.

    Args:
        problem: what it computes.
        bucket: how large it is.
        environment: where it runs, see `environment`.
        compiled: plans and builds with these orders; asked once for each that a candidate has.

    Raises:
        HsgenError: of `compiled`, without orders.
    """
    key = ("found", problem, bucket, environment)
    known = files.recall(key)
    if isinstance(known, tuple):
        found, made = cast("tuple[Found, Compiled]", known)
        again = compiled(found.orders)
        if again.plan is made.plan and again.texts is made.texts:
            return found
    found, made = _look_up(problem, bucket, environment, compiled)
    files.remember(key, (found, made))
    return found


def _look_up(
    problem: Problem, bucket: Bucket, environment: Environment, compiled: Compile
) -> tuple[Found, Compiled]:
    refused = list[str]()
    for candidate in ranked(problem, bucket, environment):
        record = candidate.kept.record
        try:
            made = compiled(record.orders)
        except HsgenError as error:
            refused.append(f"{candidate.kept.where}: orders: {error.message}")
            continue
        record = _sized(record, made)
        why = unusable(record, made, environment)
        if len(why) == len(made.plan.kernels):
            refused += [f"{candidate.kept.where}: {reason}" for reason in why.values()]
            continue
        origin = candidate.origin
        found = Found(
            configs={
                k.name: k.config.keywords() if k.name in why else record.kernels[k.name].config
                for k in made.plan.kernels
            },
            origins={
                k.name: f"{START}: {why[k.name]}" if k.name in why else origin
                for k in made.plan.kernels
            },
            orders=record.orders,
            rung=candidate.rung,
            record=record,
            refused=(*refused, *map(str, why.values())),
            problem=problem,
            bucket=bucket,
            environment=environment,
        )
        return found, made
    made = compiled({})
    configs = {kernel.name: kernel.config.keywords() for kernel in made.plan.kernels}
    found = Found(
        configs=configs,
        origins=dict.fromkeys(configs, START),
        orders={},
        rung="start",
        record=None,
        refused=tuple(refused),
        problem=problem,
        bucket=bucket,
        environment=environment,
    )
    return found, made


def of_size(
    configs: Mapping[str, Mapping[str, int]], bucket: Bucket, made: Compiled
) -> dict[str, dict[str, int]]:
    """Configurations of steps of a bucket as steps of a plan's own sizes have them: values that start
    otherwise at those sizes start so.
    """
    assert made.at is not None, "of steps"
    starts = {kernel.name: kernel.config.keywords() for kernel in made.plan.kernels}
    others = {kernel.name: kernel.config.keywords() for kernel in made.at(bucket).kernels}
    return {
        kernel: {
            name: here
            if (here := starts.get(kernel, {}).get(name)) is not None
            and here != others[kernel][name]
            else value
            for name, value in values.items()
        }
        for kernel, values in configs.items()
    }


def _sized(record: Tuned, made: Compiled) -> Tuned:
    """A record as it says something of a plan of its own or, of steps, of other sizes."""
    if made.at is None:
        return record
    sized = of_size(record.configs, record.bucket, made)
    kernels = {name: replace(x, config=sized[name]) for name, x in record.kernels.items()}
    return replace(record, kernels=kernels)


def refusals(candidate: Candidate, made: Compiled, environment: Environment) -> dict[str, Refusal]:
    """By kernel of the plan that a candidate says nothing good of: why, as a call is told."""
    return unusable(_sized(candidate.kept.record, made), made, environment)


def ranked(problem: Problem, bucket: Bucket, environment: Environment) -> tuple[Candidate, ...]:
    """Candidates for a call, best first, from memory after the first time."""
    key = ("ranked", problem, bucket, environment)
    return files.remembered(key, lambda: tuple(_ranking(problem, bucket, environment)))


def nearest(problem: Problem, bucket: Bucket, environment: Environment) -> Tuned | None:
    """The record of the spec that differs least, on whatever GPU."""
    asked = (problem, environment, bucket)
    records = [each.record for gpu in files.gpus() for each in files.entries(gpu, problem.spec)]
    return min(
        records,
        key=lambda r: (len(_differences(asked, (r.problem, r.environment, r.bucket))), r.key),
        default=None,
    )


def unusable(record: Tuned, made: Compiled, environment: Environment) -> dict[str, Refusal]:
    """By kernel of the plan that a record says nothing good of: why."""
    why = {
        kernel.name: reason
        for kernel in made.plan.kernels
        if (reason := _unusable(kernel, record, made, environment))
    }
    # kernels that share tiles start together
    followers = [(k.name, k.follows) for k in made.plan.kernels if k.follows]
    spread = True
    while spread:
        spread = False
        for pair in (*followers, *((leader, name) for name, leader in followers)):
            name, other = pair
            if name not in why and other in why:
                text = f"{name} shares tiles with {other}"
                why[name] = Refusal(text=text, changed=why[other].changed)
                spread = True
    return why


def _unusable(
    kernel: Kernel, record: Tuned, made: Compiled, environment: Environment
) -> Refusal | None:
    name = kernel.name
    choice = record.kernels.get(name)
    if choice is None:
        return Refusal(text=f"{name} is not in the record", changed=True)
    if choice.text != made.texts.get(name):
        return Refusal(text=f"{name} has another text since it was tuned", changed=True)
    if choice.shared > environment.shared_memory:
        limit = f"the limit is {environment.shared_memory:,}"
        return Refusal(text=f"{name} needs {choice.shared:,} bytes of shared memory, {limit}")
    known = kernel.config.keywords()
    if choice.config.keys() != known.keys():
        other = ", ".join(sorted(choice.config.keys() ^ known.keys()))
        return Refusal(text=f"{name} has other parameters: {other}")
    if wrong := _broken(kernel, choice, record, made):
        return Refusal(text=f"{name}: {wrong}")
    return None


def _broken(kernel: Kernel, choice: KernelChoice, record: Tuned, made: Compiled) -> str:
    """The rule of `knobs` that a configuration breaks: such kernels would compute something else."""
    values = dict(choice.config)
    for knob in knobs.knobs_of(kernel, made.plan):
        if knob.code(values[knob.name]) is None:
            return f"expected one of {knob}, got {values[knob.name]}"
    derived = dict(values)
    knobs.derive(kernel, derived, made.plan)
    for name, start in kernel.config.keywords().items():
        if knobs.follows_step(kernel, name, made.plan):
            derived[name] = start
    for parameter, value in derived.items():
        if values[parameter] != value:
            return f"expected {parameter}={value}, as other values say, got {values[parameter]}"
    leader = record.kernels.get(kernel.follows or "")
    shared = dict(leader.config) if leader else {}
    if kernel.follows and leader is None:
        return ""  # it starts, whatever its values
    return next(knobs.broken(kernel, shared | values, made.target, made.plan), "")


# --- order


def _ranking(problem: Problem, bucket: Bucket, environment: Environment) -> Iterator[Candidate]:
    found = [
        candidate
        for gpu in files.gpus()
        for kept in files.entries(gpu, problem.spec)
        if (candidate := _candidate(kept, problem, bucket, environment))
    ]
    found.sort(key=lambda c: (c.kept.record.provenance.date, not c.kept.committed), reverse=True)
    found.sort(key=lambda candidate: _closeness(candidate, environment))
    yield from found[:MOST_RANKED]


def _candidate(
    kept: Kept, problem: Problem, bucket: Bucket, environment: Environment
) -> Candidate | None:
    """A record of the same problem, on its rung."""
    record, own = kept.record, kept.record.environment
    if record.problem != problem or own.sm != environment.sm:
        return None
    steps = bucket.distance(record.bucket)
    if own.card != environment.card:
        rung: Rung = "other GPU"
    elif own.triton != environment.triton:
        rung = "other Triton"
    else:
        rung = "nearest bucket" if steps else "exact"
    return Candidate(rung=rung, kept=kept, steps=steps)


def _closeness(candidate: Candidate, environment: Environment) -> tuple[object, ...]:
    """Sorts candidates; of how calls were timed only the last word."""
    own = candidate.kept.record.environment
    newest = tuple(-number for number in own.triton_numbers)
    same = own.triton == environment.triton
    processors = abs(own.processors - environment.processors)
    timed = (own.policy != environment.policy) + (own.l2 != environment.l2)
    rung = RUNGS.index(candidate.rung)
    if candidate.rung == "other GPU":
        return rung, processors, own.gpu, not same, newest, candidate.steps, timed
    return rung, *(newest if candidate.rung == "other Triton" else ()), candidate.steps, timed


Asked = tuple[Problem, Environment, Bucket]


def _differences(asked: Asked, had: Asked) -> list[tuple[str, object, object]]:
    """Fields that differ, and both values."""
    return [
        (f"{type(a).__name__.lower()}.{each.name}", getattr(a, each.name), getattr(b, each.name))
        for a, b in zip(asked, had, strict=True)
        for each in fields(a)
        if getattr(a, each.name) != getattr(b, each.name)
    ]


def _tokens(number: int) -> str:
    return f"{number >> 10}K" if number >= 1 << 10 else str(number)
