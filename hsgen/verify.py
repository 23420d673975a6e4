"""Verify a spec's emitted kernels against the reference, without a GPU: small calls in a child process.

Judges nothing itself (see `trials`), and imports neither torch nor triton.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hsgen import paths
from hsgen.errors import HsgenError
from hsgen.spec import Spec, dump
from hsgen.target import Target
from hsgen.workers import JsonObject, Worker, WorkerError

Outcome = Literal["passed", "failed", "skipped"]

START_SECONDS = 60.0  # to import torch on a slow disk
COMMAND = ("-m", "hsgen.trials")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of the kernels, and what was found wrong with it."""

    name: str
    outcome: Outcome
    problems: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"  {self.outcome:<8}{self.name}  {self.seconds:.1f} s"]
        return "\n".join([*lines, *(f"          {problem}" for problem in self.problems)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was verified.

    Attributes:
        spec: its name.
        shrunk: what the shrunk copy has in small.
        cases: in the order they ran.
        seconds: all in all.
    """

    spec: str
    shrunk: str
    cases: tuple[Case, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Something ran, and nothing failed; what was skipped for want of time does not count."""
        outcomes = {case.outcome for case in self.cases}
        return "passed" in outcomes and "failed" not in outcomes

    def record(self) -> dict[str, object]:
        """This report as plain data for JSON."""
        return {
            "spec": self.spec,
            "passed": self.passed,
            "shrunk": self.shrunk,
            "seconds": round(self.seconds, 2),
            "cases": [
                {
                    "name": case.name,
                    "outcome": case.outcome,
                    "problems": list(case.problems),
                    "seconds": round(case.seconds, 2),
                }
                for case in self.cases
            ],
        }

    def __str__(self) -> str:
        ran = [case for case in self.cases if case.outcome != "skipped"]
        good = sum(case.outcome == "passed" for case in ran)
        lines = [f"verified {self.spec}: {good} of {len(ran)} calls right, in {self.seconds:.1f} s"]
        lines += [str(case) for case in self.cases]
        lines.append(f"  shrunk: {self.shrunk}")
        return "\n".join(lines) + "\n"


def verify(
    spec: Spec,
    target: Target | None = None,
    *,
    budget: float = 60.0,
    progress: Callable[[Case], None] | None = None,
) -> Report:
    """Run a spec's kernels in Triton's interpreter on small calls, and compare with the reference.

    Choices must be exact where arithmetic is; outputs are compared with float64, given the kernels'
    own choice.

    Args:
        spec: open heads and head dims are bound to small ones.
        target: whose plan is verified; default h100.
        budget: seconds; what does not fit is skipped, and the report says so.
        progress: called after each case.

    Raises:
        HsgenError: the child cannot even start.
    """
    start = time.monotonic()
    request: JsonObject = {"spec": dump(spec), "target": target.label if target else "h100"}
    worker = Worker(COMMAND, _environment)
    try:
        listed = _listed(worker, request)
        cases: list[Case] = []
        for number, name in enumerate(listed["trials"]):
            left = budget - (time.monotonic() - start)
            cases.append(_case(worker, {**request, "trial": number}, name, left))
            if progress:
                progress(cases[-1])
    finally:
        worker.close()
    return Report(
        spec=spec.name,
        shrunk=listed["shrunk"],
        cases=tuple(cases),
        seconds=time.monotonic() - start,
    )


def _listed(worker: Worker, request: JsonObject) -> JsonObject:
    try:
        return worker.ask(request, START_SECONDS)
    except WorkerError as error:
        raise HsgenError(f"cannot verify: the interpreter does not start: {error}") from error


def _case(worker: Worker, request: JsonObject, name: str, left: float) -> Case:
    """One trial within the time that is left."""
    if left <= 0:
        return Case(name=name, outcome="skipped")
    start = time.monotonic()
    try:
        problems = tuple(map(str, worker.ask(request, left)["problems"]))
    except WorkerError as error:
        if error.kind == "timeout":
            return Case(name=name, outcome="skipped", seconds=time.monotonic() - start)
        problems = (f"the process died: {error}",)
    return Case(
        name=name,
        outcome="failed" if problems else "passed",
        problems=problems,
        seconds=time.monotonic() - start,
    )


def _environment(_folder: Path) -> dict[str, str]:
    return paths.child_environment(
        remove=(),
        add={
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        },
    )
