"""The process that verifies and times points of a space on one GPU; it may be killed at any time.

Reads one JSON object a line from stdin, writes one a line to stdout, see `lanes`.  Nothing is timed
before it is right.  Without a GPU it runs in Triton's interpreter, for tests.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from hsgen import (
    batch,
    captures,
    checking,
    drawn,
    gradients,
    machine,
    measurer,
    samples,
    steps,
    timing,
    trials,
)
from hsgen.batch import Batch
from hsgen.configs import Work, for_steps
from hsgen.errors import HsgenError
from hsgen.execution import PLANNED, Program, compute_integers_once, interpreting
from hsgen.measurer import Failure, Kind, Result, Shape
from hsgen.runtime import compile_program
from hsgen.selection import ListSelection
from hsgen.spec import Spec, parse
from hsgen.target import Target
from hsgen.trials import Examination, Trial
from hsgen.tuned import Time
from hsgen.workers import JsonObject

FEW = 3  # samples after which a slow point is given up
SLOW = 3.0  # times the limit, above which longer shapes are not asked about
FEWEST, MOST = 3, 100  # calls: finals are what tells near ones apart
SECONDS = 0.15  # of timing, a shape
CALLS = 3  # a sample of a comparison, and of long calls fewer:
LONG = 10_000.0  # microseconds that are a sample
LENGTHS = {"cuda": (1537, 301), "cpu": (37, 9)}  # of checks: no multiple of anything
BLOCKS = {"cuda": 512, "cpu": 8}  # tokens of blocks that end where checks of steps begin
LAYERS = 8  # caches of a size, at most: a layer's is in no cache of the GPU when its turn comes
ROOM = 1024  # tokens that timed steps append
DISTINCT = 4  # sequences of a cache that are not alike
MESSAGE = 1500
PR_SET_PDEATHSIG = 1

Take = Callable[[timing.Call, str, int], list[float]]  # a call, a device, how often -> microseconds


def take(call: timing.Call, device: str, count: int) -> list[float]:
    """Microseconds of each of some calls."""
    return [ms * 1e3 for ms in timing.samples(call, device, count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is tuned: a bound spec, tensors, shapes; and the capture that inputs are made of, if any.

    `work`: its calls, their gradients, or its steps behind a cache, with pages of `page` tokens if not of 0.
    `seconds` of timing a shape, and never fewer calls than `fewest`.
    """

    spec: str
    dtype: str
    target: str  # as JSON; empty: that of the GPU that is here
    shapes: tuple[str, ...]
    work: Work = "forward"
    page: int = 0
    capture: str = ""
    seconds: float = SECONDS
    fewest: int = FEWEST

    @classmethod
    def of(cls, request: JsonObject) -> Problem:
        return cls(**{**request["problem"], "shapes": tuple(request["problem"]["shapes"])})


@dataclass(slots=True, eq=False)
class Bench:
    """A problem on a device: tensors, checks and programs, each made when first needed."""

    problem: Problem
    take: Take
    device: str = field(init=False)
    spec: Spec = field(init=False)
    target: Target = field(init=False)
    dtype: torch.dtype = field(init=False)
    _programs: dict[str, Program] = field(default_factory=dict[str, Program])
    _checks: list[Examination] = field(default_factory=list[Examination])
    _inputs: dict[str, list[dict[str, Tensor]]] = field(
        default_factory=dict[str, "list[dict[str, Tensor]]"]
    )
    _handed: dict[str, list[dict[str, Tensor]]] = field(
        default_factory=dict[str, "list[dict[str, Tensor]]"]
    )
    _asked: dict[str, checking.Reference] = field(default_factory=dict[str, checking.Reference])

    def __post_init__(self) -> None:
        self.device = "cpu" if interpreting() else "cuda"
        self.spec = parse(self.problem.spec)
        told = self.problem.target
        self.target = Target(**json.loads(told)) if told else Target.current()
        self.dtype = next(x for x, name in PLANNED.items() if name == self.problem.dtype)

    def measure(self, request: JsonObject) -> Result:
        """Verify a point, then time every shape."""
        began = time.monotonic()
        program = self._program(request["orders"])
        checked = self._verify(program, request["configs"])
        limits, times = request["limit"], dict[str, Time]()
        for shape in sorted(self.problem.shapes, key=lambda name: limits.get(name, 0.0)):
            limit = limits.get(shape, math.inf)
            found = self._time(program, request["configs"], shape, limit)
            times[shape] = found
            if found.median_us > SLOW * limit and len(times) < len(self.problem.shapes):
                raise _SlowError(
                    f"{shape}: {found.median_us:.4g} us, the best has {limit:.4g}; no longer calls"
                )
        return Result(times=times, check=checked, seconds=time.monotonic() - began)

    def prove(self, request: JsonObject) -> Result:
        """Hold rows of a shape, at its full length, against the reference; where no run of them says what
        they choose, all of them against the start's.
        """
        program, name = self._program(request["orders"]), request["shape"]
        shape = measurer.shape_of(name)
        if not checking.runs_tell(self.spec):
            return self._like_the_start(program, request["configs"], name)
        if shape.sequences > 1 or shape.queries != shape.keys:
            return Result()  # the rows of one whole sequence are what the reference is asked about
        tensors, given = self._sets(name)[0], self._given(name)[0]
        o, _, chosen = program.driver.forward(
            tensors, self._batch(shape), request["configs"], given
        )
        selection = {
            level: ListSelection(level=level, indices=indices)
            for level, indices in (given or chosen).items()
        }
        runs = checking.sampled(self.spec, shape.queries)
        asked = self._asked.setdefault(name, checking.Reference(self.spec, tensors))
        error = checking.compare(self.spec, tensors, o, selection, runs, asked)["error"]
        return Result(check={"error_at_length": error})

    def shares(self, request: JsonObject) -> JsonObject:
        """Milliseconds by kernel, of the longest shape."""
        if self.device == "cpu":
            return {"ms": {}}
        longest = max(self.problem.shapes, key=lambda name: measurer.shape_of(name).keys)
        program = self._program(request["orders"])
        return {"ms": timing.kernel_times(self._call(program, request["configs"], longest))}

    def compare(self, request: JsonObject) -> JsonObject:
        """Points in turn, each round in another order.  -> microseconds by point and round"""
        points, shape = request["points"], request["shape"]
        calls = [
            self._call(self._program(point["orders"]), point["configs"], shape) for point in points
        ]
        for call in calls:  # compiles
            self._took(call, 1)
        least = min(self._took(calls[0], 1))
        count = max(1, min(CALLS, math.ceil(LONG / max(least, 1.0))))
        order, generator = list(range(len(calls))), random.Random(request["seed"])
        found: list[list[float]] = [[] for _ in calls]
        for _ in range(request["rounds"]):
            generator.shuffle(order)
            for which in order:
                sampled = self._took(calls[which], count)
                found[which].append(statistics.median(sampled))
        return {"samples": found}

    # --- steps

    def _like_the_start(self, program: Program, configs: Mapping[str, Any], name: str) -> Result:
        tensors, given = self._sets(name)[0], self._given(name)[0]
        where, start = self._batch(measurer.shape_of(name)), self._program({})
        o, _, chosen = program.driver.forward(tensors, where, configs, given)
        expected, _, others = start.driver.forward(tensors, where, start.config, given)
        for level, indices in chosen.items():
            apart = (indices != others[level]).any(-1).float().mean().item()
            if apart > 1 - checking.SAME:
                raise _WrongError(f"{name}: {level}: {apart:.1%} of rows choose unlike the start")
        return Result(check={"error_at_length": checking.require_close(o, expected, f"of {name}")})

    def _program(self, orders: Mapping[str, Any]) -> Program:
        key = json.dumps(orders, sort_keys=True)
        if key not in self._programs:
            self._programs[key] = compile_program(
                self.spec, self.target, self.dtype, interpret=self.device == "cpu", orders=orders
            )
        return self._programs[key]

    def _verify(self, program: Program, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Poisoned outputs, exact scores, odd and empty sequences.

        Raises:
            _WrongError: what the reference says otherwise.
        """
        self._checks = self._checks or [Examination(t, self.device) for t in self._trials()]
        with trials.poisoned():
            for check in self._checks:
                if problems := check.problems(program, configs):
                    raise _WrongError(f"{check.trial.name}: {'; '.join(problems)}")
        return {"trials": len(self._checks), "exact": any(c.trial.exact for c in self._checks)}

    def _trials(self) -> tuple[Trial, ...]:
        long, short = LENGTHS[self.device]
        whole = Trial(
            name="one sequence",
            spec=self.spec,
            dtype=self.dtype,
            queries=(long,),
            keys=(long,),
            numbers="integers",
        )
        documents = Trial(
            name="documents, one empty",
            spec=self.spec,
            dtype=self.dtype,
            queries=(1, 0, short),
            keys=(1, 0, short + 4),
            packed=True,
        )
        return whole, documents

    def _time(self, program: Program, configs: Mapping[str, Any], shape: str, limit: float) -> Time:
        """The median of many calls; of few, where the first are far above the limit."""
        call = self._call(program, configs, shape)
        self._took(call, 1)  # compiles
        first = self._took(call, FEW)
        count = round(self.problem.seconds * 1e6 / max(statistics.median(first), 1.0))
        count = max(self.problem.fewest, min(MOST, count))
        if count <= FEW or min(first) > SLOW * limit:
            return _summary(first)
        return _summary(self._took(call, count))

    def _took(self, call: timing.Call, count: int) -> list[float]:
        """Microseconds of each of some calls."""
        return self.take(call, self.device, count)

    def _call(self, program: Program, configs: Mapping[str, Any], name: str) -> timing.Call:
        sets, where = self._sets(name), self._batch(measurer.shape_of(name))
        given = self._given(name)

        def call(number: int) -> object:
            turn = number % len(sets)
            return program.driver.forward(sets[turn], where, configs, given[turn])

        return call

    def _given(self, name: str) -> list[dict[str, Tensor] | None]:
        """What another layer could have chosen, for each set of inputs; None where this one chooses."""
        count = len(self._sets(name))
        if not self.spec.brought:
            return [None] * count
        if name not in self._handed:
            shape = measurer.shape_of(name)
            sizes = (shape.sequences, shape.queries, shape.keys)
            seeds = (torch.Generator(self.device).manual_seed(n) for n in range(count))
            self._handed[name] = [drawn.lists(self.spec, *sizes, each) for each in seeds]
        return list(self._handed[name])

    def _batch(self, shape: Shape) -> Batch:
        device = torch.device(self.device)
        return batch.dense(shape.sequences, shape.queries, shape.keys, device)

    def _sets(self, name: str) -> list[dict[str, Tensor]]:
        """Inputs enough that no call finds its own in the cache."""
        if name not in self._inputs:
            shape = measurer.shape_of(name)
            groups = captures.load(Path(self.problem.capture)) if self.problem.capture else ()
            make = functools.partial(samples.for_shape, self.spec, shape, groups, dtype=self.dtype)
            first = make(device=self.device, seed=0)
            few = samples.size_in_bytes(first) >= samples.ROTATED or self.device == "cpu"
            others = range(1, 1 if few else samples.SETS)
            self._inputs[name] = [first, *(make(device=self.device, seed=n) for n in others)]
        return self._inputs[name]


@dataclass(slots=True, eq=False)
class GradientBench(Bench):
    """The same of the gradients of calls, which are made once for each set of inputs."""

    _both: gradients.Programs | None = None
    _gradient_checks: list[gradients.Examination] = field(
        default_factory=list[gradients.Examination]
    )
    _left: dict[str, list[gradients.Left]] = field(
        default_factory=dict[str, "list[gradients.Left]"]
    )

    def prove(self, request: JsonObject) -> Result:
        """Hold them at full length against those of the start: no reference follows dk and dv there."""
        configs, name = request["configs"], request["shape"]
        program, found = self._programs_of_gradients.backward, 0.0
        tensors, where = self._sets(name)[0], self._batch(measurer.shape_of(name))
        left = self._left_by(name)[0]
        theirs, start = (
            gradients.run(program, each, tensors, where, left) for each in (configs, program.config)
        )
        for tensor, apart in gradients.differences(theirs, start):
            if not apart <= gradients.AT_LENGTH:
                raise _WrongError(
                    f"{name}: gradient of {tensor} is {apart:.3g} from the start's, "
                    f"at most {gradients.AT_LENGTH:.3g}"
                )
            found = max(found, apart)
        return Result(check={"error_at_length": found})

    # --- steps

    @property
    def _programs_of_gradients(self) -> gradients.Programs:
        if self._both is None:
            self._both = gradients.Programs.of(
                self.spec, self.target, self.dtype, interpret=self.device == "cpu"
            )
        return self._both

    def _left_by(self, name: str) -> list[gradients.Left]:
        """What calls left for their gradients, for each set of inputs."""
        if name not in self._left:
            forward = self._programs_of_gradients.forward
            where = self._batch(measurer.shape_of(name))
            given = self._given(name)
            self._left[name] = [
                gradients.left_by(forward, tensors, where, given[number], number)
                for number, tensors in enumerate(self._sets(name))
            ]
        return self._left[name]

    def _program(self, orders: Mapping[str, Any]) -> Program:  # noqa: ARG002 - they have but one
        return self._programs_of_gradients.backward

    def _verify(self, program: Program, configs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """The same of gradients: poisoned, held against the float64 reference's."""
        self._gradient_checks = self._gradient_checks or [
            gradients.Examination(
                replace(trial, numbers="real"), self._programs_of_gradients, self.device
            )
            for trial in self._trials()
        ]
        with trials.poisoned():
            for check in self._gradient_checks:
                if problems := check.problems(configs):
                    raise _WrongError(f"{check.trial.name}: {'; '.join(problems)}")
        return {"trials": len(self._gradient_checks), "gradients": True}

    def _call(self, program: Program, configs: Mapping[str, Any], name: str) -> timing.Call:
        sets, where = self._sets(name), self._batch(measurer.shape_of(name))
        left = self._left_by(name)

        def call(number: int) -> object:
            turn = number % len(sets)
            return gradients.run(program, configs, sets[turn], where, left[turn])

        return call


@dataclass(slots=True, eq=False)
class StepBench(Bench):
    """The same of steps behind a cache, of one size: whole steps, as a CUDA graph that is replayed."""

    _made: steps.Programs | None = None
    _step_checks: list[steps.StepExamination] = field(default_factory=list[steps.StepExamination])
    _steps: steps.Steps | None = None

    def prove(self, request: JsonObject) -> Result:
        """Hold a step at full length against the start's: what it chooses, and its output on one choice."""
        configs, name = request["configs"], request["shape"]
        of, start = self._of_size, self._start
        expected, theirs = of.first(start)
        o, chosen = of.first(configs)
        same = dict.fromkeys(chosen, True)
        for level, indices in chosen.items() if of.selection is None else ():
            share = checking.shared(indices.flatten(0, 1), theirs[level].flatten(0, 1))
            if share < checking.SAME:
                raise _WrongError(f"{name}: {level}: {share:.1%} of what the start chooses")
            same[level] = bool((indices == theirs[level]).all())
        if not all(same.values()):  # near scores are told apart otherwise: so on the start's choice
            (expected, _), (o, _) = (of.first(each, dict(theirs)) for each in (start, configs))
        return Result(check={"error_at_length": checking.require_close(o, expected, f"of {name}")})

    def shares(self, request: JsonObject) -> JsonObject:
        """Milliseconds by kernel."""
        if self.device == "cpu":
            return {"ms": {}}
        self._of_size.rewind()
        return {"ms": timing.kernel_times(lambda _: self._of_size(request["configs"]))}

    # --- steps

    @property
    def _shape(self) -> Shape:
        (name,) = self.problem.shapes
        return measurer.shape_of(name)

    @property
    def _programs_of_steps(self) -> steps.Programs:
        if self._made is None:
            self._made = steps.Programs.of(
                self.spec,
                self.target,
                self.dtype,
                self.problem.page,
                interpret=self.device == "cpu",
            )
        return self._made

    @property
    def _start(self) -> Mapping[str, Any]:
        sizes = self._shape.step_bucket.sizes()
        made = for_steps(self._programs_of_steps.few.plan, sizes)
        return {kernel.name: kernel.config.keywords() for kernel in made.kernels}

    @property
    def _of_size(self) -> steps.Steps:
        """Caches as full as their bucket lets them be with room for what is timed."""
        if self._steps is None:
            shape, tokens = self._shape, self._shape.queries
            capacity = shape.step_bucket.keys
            there = min(shape.keys, capacity - min(ROOM, capacity // 4)) - tokens
            few = Shape(
                queries=tokens,
                keys=there + tokens,
                sequences=min(shape.sequences, DISTINCT),
            )
            groups = captures.load(Path(self.problem.capture)) if self.problem.capture else ()
            make = functools.partial(samples.for_shape, self.spec, few, groups, dtype=self.dtype)
            first = make(device=self.device, seed=0)
            held = samples.size_in_bytes(first) / few.sequences * shape.sequences
            more = 0 if self.device == "cpu" else min(LAYERS, math.ceil(samples.ROTATED / held)) - 1
            sets = [first, *(make(device=self.device, seed=n) for n in range(1, 1 + more))]
            sizes = (shape.sequences, capacity, there)
            generator = torch.Generator(self.device).manual_seed(0)
            self._steps = steps.Steps(self._programs_of_steps, sets, sizes, generator)
        return self._steps

    def _program(self, orders: Mapping[str, Any]) -> Program:  # noqa: ARG002 - they have but one
        return self._programs_of_steps.few

    def _verify(self, program: Program, configs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """The same of steps that follow one another, of sequences long, short and empty."""
        self._step_checks = self._step_checks or [
            steps.StepExamination(trial, self._programs_of_steps, self.device)
            for trial in self._step_trials()
        ]
        with trials.poisoned():
            for check in self._step_checks:
                if problems := check.problems(configs):
                    raise _WrongError(f"{check.trial.name}: {'; '.join(problems)}")
        return {"trials": len(self._step_checks), "steps": True}

    def _step_trials(self) -> tuple[Trial, ...]:
        """Rows right behind where blocks end, and anywhere."""
        (long, short), tokens = LENGTHS[self.device], self._shape.queries
        ended = long // BLOCKS[self.device] * BLOCKS[self.device]
        kinds: tuple[tuple[str, int, trials.Numbers], ...] = (
            ("steps where blocks end", ended + tokens, "integers"),
            ("steps anywhere", long + 2 * tokens, "real"),
        )
        return tuple(
            Trial(
                name=name,
                spec=self.spec,
                dtype=self.dtype,
                queries=(tokens,) * 3,
                keys=(length, short + 2 * tokens, 2 * tokens),
                numbers=numbers,
            )
            for name, length, numbers in kinds
        )

    def _call(self, program: Program, configs: Mapping[str, Any], name: str) -> timing.Call:  # noqa: ARG002
        of = self._of_size
        of.rewind()
        of(configs)  # compiles
        replay = functools.partial(of, configs)
        if self.device == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(self._turns):
                    of(configs)
            replay = graph.replay

        def call(number: int) -> object:
            if number == 0:
                of.rewind()
            return replay()

        return call

    @property
    def _turns(self) -> int:
        """Steps behind each cache that one replay has, so that the gap before it is little of its time."""
        return max(1, LAYERS // len(self._of_size.caches)) if self.device == "cuda" else 1

    def _took(self, call: timing.Call, count: int) -> list[float]:
        """Microseconds of a step: a replay has several."""
        each = self._turns * len(self._of_size.caches)
        return [us / each for us in self.take(call, self.device, count)]


class _WrongError(Exception):
    """Kernels that do not say what the reference says."""


class _SlowError(Exception):
    """A point that shorter calls say enough about."""


def _summary(times: list[float]) -> Time:
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return Time(
        median_us=statistics.median(times), iqr_us=quarters[2] - quarters[0], runs=len(times)
    )


# --- failures


def failure_of(error: BaseException) -> Failure:
    """The class of what a kernel did."""
    text = machine.without_paths(f"{type(error).__name__}: {error}")[:MESSAGE]
    kind: Kind = "LAUNCH_ERROR"
    match error:
        case _WrongError() | checking.CheckError():
            kind = "NAN" if "not finite" in text else "WRONG_NUMERIC"
        case _SlowError():
            kind = "TOO_SLOW"
        case OutOfResources():
            kind = "OVER_SMEM" if "shared memory" in text else "OVER_LIMIT"
        case CompilationError():
            kind = "COMPILE_ERROR"
        case torch.OutOfMemoryError() | MemoryError():
            kind = "OUT_OF_MEMORY"
        case _ if re.search(r"illegal|misaligned|unspecified launch failure|device-side", text):
            kind = "ILLEGAL_ACCESS"
        case HsgenError():
            kind = "STATIC_INVALID"
        case _:
            pass
    if kind in ("LAUNCH_ERROR", "COMPILE_ERROR"):
        text += "\n" + machine.without_paths("".join(traceback.format_exception(error, limit=-3)))
    return Failure(kind=kind, message=text[:MESSAGE])


# --- the child


BENCHES = {"forward": Bench, "gradients": GradientBench, "decode": StepBench}


class Child:
    """Answers requests, one after the other; keeps the bench of the last problem."""

    def __init__(self, clock: Take = take) -> None:
        self._clock = clock
        self._bench: Bench | None = None

    def answer(self, request: JsonObject) -> JsonObject:
        """What came of a request; a failure of a point is an answer too."""
        if request["do"] == "describe":
            return describe()
        try:
            bench = self._of(request)
            match request["do"]:
                case "measure":
                    return bench.measure(request).record()
                case "prove":
                    return bench.prove(request).record()
                case "shares":
                    return bench.shares(request)
                case "compare":
                    return bench.compare(request)
                case other:
                    return {"error": f"unknown request {other!r}"}
        except Exception as error:  # noqa: BLE001 - whatever a point does is its result
            return Result(failure=failure_of(error)).record()

    def _of(self, request: JsonObject) -> Bench:
        problem = Problem.of(request)
        if self._bench is None or self._bench.problem != problem:
            self._bench = None  # whose tensors would be in the way
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
            bench = self._bench = BENCHES[problem.work](problem, self._clock)
            return bench
        return self._bench


def describe() -> JsonObject:
    """The GPU that is here, and the versions of everything."""
    if interpreting():
        return {"target": None, "gpus": 1, "made": machine.provenance([], "cpu")}
    if not torch.cuda.is_available():
        return {"error": "no GPU is present"}
    made, count = machine.provenance([], "cuda"), torch.cuda.device_count()
    return {"target": asdict(Target.current()), "gpus": count, "made": made}


def main(clock: Take = take) -> None:
    """Answer until stdin ends; what a kernel prints goes to stderr."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if interpreting():
        torch.set_num_threads(1)
        compute_integers_once()
    child = Child(clock)
    with _own_stdout() as answers:
        for line in sys.stdin:
            answers.write(json.dumps(child.answer(json.loads(line))) + "\n")
            answers.flush()


def _own_stdout() -> IO[str]:
    """Keep stdout for answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
