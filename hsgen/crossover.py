"""What `hsgen gate` says: below which lengths dense or flat attention is faster than a spec as it is.

Times whole calls on the card that is here, forms in turn, each checked first.  A form wins where it is
faster beyond the noise; it is the one to take as long as no shorter length was lost.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hsgen import __version__, captures, checking, gates, machine, timing, tuned
from hsgen.configs import DType
from hsgen.errors import HsgenError
from hsgen.execution import PLANNED
from hsgen.gates import FORMS, Form, Gate
from hsgen.graph import align
from hsgen.measure import Setting, Tensors
from hsgen.reference import tensor_shapes
from hsgen.report import Progress
from hsgen.runtime import Kernel, load_kernel
from hsgen.spec import Spec
from hsgen.target import Target
from hsgen.tuned import Crossing

TOKENS = tuple(1 << n for n in range(10, 18))
SECONDS = 1.0  # of timing, a length
LEAST_GAIN = 0.01
NOISES = 2.0  # a gain must be this many times its own uncertainty
HOPELESS = 2.0  # times as slow as the spec: a form is not timed at longer lengths
LONGEST_REASON = 300

Clock = Callable[[Sequence[timing.Call], str, float], list[list[float]]]
Samples = Mapping[Form, Sequence[float]]  # milliseconds of calls in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One length, and what its calls took."""

    tokens: int
    samples: Samples

    def time(self, form: Form) -> tuned.Time:
        """The median of a form's calls."""
        us = [each * 1e3 for each in self.samples[form]]
        quarters = statistics.quantiles(us * 2, n=4)  # of one sample too
        spread = quarters[2] - quarters[0]
        return tuned.Time(median_us=statistics.median(us), iqr_us=spread, runs=len(us))

    def ratio(self, form: Form, others: Sequence[Form]) -> tuple[float, float]:
        """A form's time as a multiple of the fastest other's, and about its standard error."""
        return max(self._ratio(form, other) for other in others if other in self.samples)

    def _ratio(self, a: Form, b: Form) -> tuple[float, float]:
        pairs = [x / y for x, y in zip(self.samples[a], self.samples[b], strict=True)]
        if len(pairs) < 2:
            return pairs[0], 0.0
        quarters = statistics.quantiles(pairs, n=4)
        return statistics.median(pairs), (quarters[2] - quarters[0]) / math.sqrt(len(pairs))


def crossings(points: Sequence[Point]) -> tuple[Crossing | None, Crossing | None]:
    """Where dense calls, then flat ones, stop to be the faster ones; None where they never were."""
    dense = _crossing(points, "dense", ("flat", "own"))
    longer = [point for point in points if dense is None or point.tokens >= dense.below]
    flat = _crossing(longer, "flat", ("own",))
    if flat and dense and flat.below <= dense.below:
        flat = None
    return dense, flat


def _crossing(points: Sequence[Point], form: Form, others: Sequence[Form]) -> Crossing | None:
    wins = itertools.takewhile(
        lambda point: form in point.samples and _wins(*point.ratio(form, others)), points
    )
    won = list(wins)
    if not won:
        return None
    end = won[-1].tokens
    lost = points[len(won)] if len(won) < len(points) else None
    if lost is None or form not in lost.samples:  # as long as was timed: no more is claimed
        return Crossing(below=end + 1, least=end + 1, most=end + 1)
    (low, low_noise), (high, high_noise) = won[-1].ratio(form, others), lost.ratio(form, others)

    def at(low: float, high: float) -> int:
        """Where the line through both, in logarithms, reaches 1; a tie is not won."""
        if low >= 1 or high <= 1:
            return end + 1
        part = -math.log(low) / (math.log(high) - math.log(low))
        length = math.exp(math.log(end) + part * math.log(lost.tokens / end))
        return min(lost.tokens, max(end + 1, round(length)))

    pessimistic = at(low + NOISES * low_noise, high + NOISES * high_noise)
    below = at(low, high)
    optimistic = at(low - NOISES * low_noise, high - NOISES * high_noise)
    least, _, most = sorted((pessimistic, below, optimistic))
    return Crossing(below=below, least=least, most=most)


def _wins(ratio: float, noise: float) -> bool:
    return ratio < 1 - max(LEAST_GAIN, NOISES * noise)


# --- measuring


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A spec whose forms were timed at some lengths; `failures` by length and form."""

    spec: Spec
    made: Mapping[str, str | int | None]
    capture: str | None
    points: tuple[Point, ...]
    failures: tuple[str, ...]
    gates: tuned.Gates | None

    @property
    def passed(self) -> bool:
        """Every form ran, was right and was timed."""
        return not self.failures and self.gates is not None

    def record(self) -> dict[str, object]:
        """The same for machines."""
        times = [{f: p.time(f).median_us for f in p.samples} for p in self.points]
        return {
            "ok": self.passed,
            **self.made,
            "spec": self.spec.name,
            "digest": self.spec.digest,
            "capture": self.capture,
            "lengths": [
                {"tokens": point.tokens, "us": us}
                for point, us in zip(self.points, times, strict=True)
            ],
            "dense_below": self.gates.gate.dense_below if self.gates else None,
            "flat_below": self.gates.gate.flat_below if self.gates else None,
            "failures": list(self.failures),
        }

    def __str__(self) -> str:
        head = f"{self.spec.name} on {self.made['card']}, inputs {self.capture or 'random'}, "
        head += f"{self.made['date']}; ms, median of calls in turn"
        rows = [("tokens", *(self.spec.name if form == "own" else form for form in self._forms))]
        rows += [self._row(point) for point in self.points]
        lines = [head, "", *align(rows), ""]
        if self.gates:
            lines += [
                _sentence("dense", self.gates.dense, self.points),
                *(
                    [_sentence("flat", self.gates.flat, self.points)]
                    if "flat" in self._forms
                    else []
                ),
                f"gate: {self.gates.gate}",
            ]
        return "\n".join([*lines, *self.failures]) + "\n"

    @property
    def _forms(self) -> tuple[Form, ...]:
        return tuple(f for f in FORMS if any(f in point.samples for point in self.points))

    def _row(self, point: Point) -> tuple[str, ...]:
        cells = [f"{point.tokens:6}"]
        fastest = min((point.time(f).median_us for f in point.samples), default=0.0)
        for form in self._forms:
            us = point.time(form).median_us if form in point.samples else None
            cells.append("" if us is None else f"{us / 1e3:8.4g}{' *' if us == fastest else ''}")
        return tuple(cells)


def _sentence(form: Form, crossing: Crossing | None, points: Sequence[Point]) -> str:
    if crossing is None:
        return f"{form} is nowhere surely faster"
    if points and crossing.below > points[-1].tokens:
        return f"{form} is faster at every length that was timed; no more is claimed"
    noise = f"{crossing.least:,} to {crossing.most:,} by noise"
    return f"{form} is faster below {crossing.below:,} keys ({noise})"


def _quietly(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def measure_gates(
    spec: Spec,
    *,
    tokens: Sequence[int] = (),
    dtype: DType = "bf16",
    capture: Path | None = None,
    seconds: float = SECONDS,
    command: Sequence[str] = (),
    progress: Progress = _quietly,
) -> Report:
    """Time the forms of a spec on the GPU that is here, queries as many as keys; keep the record.

    Args:
        spec: Heads and head dims bound.
        tokens: Lengths; default 1K to 128K by powers of two.
        dtype: Of the tensors.
        capture: What inputs are made of; None is normal numbers, of one seed.
        seconds: Of timing, a length.
        command: The words that say so again.
        progress: Told of each length.

    Raises:
        HsgenError: no GPU; a capture that cannot be read.
        GateError: the spec has no other form.
    """
    gates.forms(spec, "measured")
    if not torch.cuda.is_available():
        raise HsgenError(
            "no GPU is present, and crossovers are of one",
            help="run it where torch sees a GPU; load_kernel(spec, gate=hsgen.Gate(dense_below=8192)) "
            "needs none",
        )
    setting = Setting(
        device="cuda",
        kind="real" if capture else "random",
        groups=captures.load(capture) if capture else [],
        seconds=seconds,
        dtype=next(x for x, name in PLANNED.items() if name == dtype),
    )
    points, failures = take(spec, setting, sorted(set(tokens or TOKENS)), progress)
    made = machine.provenance(command, "cuda")
    environment = tuned.environment(Target.current())
    record = None if failures else _record(spec, dtype, environment, points, made)
    if record:
        tuned.publish_gates(record)
    return Report(
        spec=spec,
        made=made,
        capture=capture.name if capture else None,
        points=points,
        failures=failures,
        gates=record,
    )


def take(
    spec: Spec,
    setting: Setting,
    lengths: Sequence[int],
    progress: Progress = _quietly,
    clock: Clock = timing.in_turn,
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """Check and time every form at every length.  -> what ran, and what did not"""
    made: dict[Form, Spec] = {**gates.forms(spec, "measured"), "own": spec}
    points: list[Point] = []
    failures: list[str] = []
    for number, length in enumerate(lengths):
        progress(f"timing {length:,} tokens", number, len(lengths))
        sets = setting.sets(spec, length)
        right = dict[Form, timing.Call]()
        for form, each in made.items():
            if _hopeless(form, points):
                continue
            kernel = _kernel(setting, spec, form, length)
            check = functools.partial(_check, setting, each, kernel, sets[0])
            found = checking.attempt(check)
            if found["status"] == "ok":
                right[form] = functools.partial(_run, kernel, sets)
            else:
                failures.append(_failure(length, form, found))
        if "own" not in right:
            continue
        timed = functools.partial(clock, list(right.values()), setting.device, setting.seconds)
        found = checking.attempt(lambda timed=timed: {"times": timed()})
        if found["status"] == "ok":
            samples = dict(zip(right, found["times"], strict=True))
            points.append(Point(tokens=length, samples=samples))
        else:
            failures.append(_failure(length, "own", found))
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return tuple(points), tuple(failures)


def _hopeless(form: Form, points: Sequence[Point]) -> bool:
    """Whether a form was so slow at a shorter length that no longer one need be waited for."""
    times = (point.ratio(form, ("own",)) for point in points if form in point.samples)
    return form != "own" and any(ratio > HOPELESS for ratio, _ in times)


def _failure(length: int, form: Form, found: checking.Figures) -> str:
    reason = " ".join(found["reason"].split())[:LONGEST_REASON]
    return f"{length} tokens, {form} {found['status']}, so nothing is claimed: {reason}"


def _kernel(setting: Setting, spec: Spec, form: Form, length: int) -> Kernel:
    """The kernel whose calls of that length are of that form."""
    always = {
        "dense": Gate(dense_below=length + 1),
        "flat": Gate(flat_below=length + 1),
        "own": None,
    }
    return load_kernel(spec, interpret=setting.interpret, gate=always[form])


def _run(kernel: Kernel, sets: Sequence[Tensors], number: int) -> object:
    return kernel(**sets[number % len(sets)])


def _check(setting: Setting, spec: Spec, kernel: Kernel, tensors: Tensors) -> checking.Figures:
    """Some rows of a gated call against the reference of its form, on the kernels' own choice."""
    o = kernel(**tensors)
    assert isinstance(o, torch.Tensor), "no log-sum-exp was asked for"
    read = {name: tensors[name] for name in tensor_shapes(spec, 1, 1, 1)}
    chosen = setting.load(spec).select(**{"k": tensors["k"], **read}) if spec.levels else {}
    return checking.compare(spec, read, o, chosen, checking.sampled(spec, o.shape[1]))


def _record(
    spec: Spec,
    dtype: DType,
    environment: tuned.Environment,
    points: Sequence[Point],
    made: Mapping[str, str | int | None],
) -> tuned.Gates:
    """What was measured, to be kept."""
    dense, flat = crossings(points)
    times: list[dict[Form, tuned.Time]]
    times = [{form: point.time(form) for form in point.samples} for point in points]
    return tuned.Gates(
        problem=tuned.Problem.of(spec, dtype),
        environment=environment,
        lengths=tuple(
            tuned.Length(tokens=point.tokens, times=each)
            for point, each in zip(points, times, strict=True)
        ),
        dense=dense,
        flat=flat,
        check={"tolerance": checking.TOLERANCE, "reference": "float64"},
        provenance=tuned.Provenance(
            hsgen=__version__,
            torch=str(made["torch"]),
            driver=None if made["driver"] is None else str(made["driver"]),
            date=str(made["date"]),
            trials=sum(time.runs for each in times for time in each.values()),
            command=str(made["command"]),
            cuda=None if made["cuda"] is None else str(made["cuda"]),
        ),
    )
