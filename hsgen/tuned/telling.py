"""What records say, for people: lists of them, and the ladder of one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from hsgen import pipeline
from hsgen.errors import HsgenError
from hsgen.pipeline import Artifact
from hsgen.schedule import Order
from hsgen.spec import Spec
from hsgen.target import Target, with_streams
from hsgen.tuned import files
from hsgen.tuned.files import Kept
from hsgen.tuned.ladder import (
    RUNGS,
    Candidate,
    Compiled,
    Found,
    look_up,
    ranked,
    refusals,
)
from hsgen.tuned.records import Bucket, DType, Problem, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Records, a line each."""

    kept: tuple[Kept, ...]

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {"records": [{"where": k.where, **asdict(k.record)} for k in self.kept]}

    def __str__(self) -> str:
        if not self.kept:
            return "no records: `hsgen tune SPEC` makes some\n"
        rows = [("gpu", "triton", "problem", "bucket", "time", "start", "gain", "where")]
        for kept in self.kept:
            record = kept.record
            rows.append(
                (
                    record.environment.gpu,
                    record.environment.triton,
                    str(record.problem),
                    str(record.bucket),
                    f"{record.time.median_us:.4g} us",
                    f"{record.default.median_us:.4g} us",
                    f"{record.speedup:.2f}x",
                    kept.where,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines) + "\n"


def listing(content: Iterable[Kept], *, spec: str | None, gpu: str | None) -> Listing:
    """The records of one spec, or on one GPU, or all."""
    kept = [
        each
        for each in content
        if spec in (None, each.record.problem.spec) and gpu in (None, each.record.environment.gpu)
    ]
    kept.sort(key=lambda k: (k.record.environment.gpu, k.record.problem.spec, k.record.place))
    return Listing(kept=tuple(kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A candidate of the ladder, and why kernels would not take it."""

    candidate: Candidate
    why: tuple[str, ...]

    def __str__(self) -> str:
        record = self.candidate.kept.record
        date, gain = record.provenance.date, f"{record.speedup:.2f}x the start"
        head = f"  {self.candidate.rung:<15}{self.candidate.kept.where}  {record.bucket}, {gain}, {date}"
        return "\n".join([head, *(f"{'':17}{reason}" for reason in self.why)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Which records a call could have had, in order, and what it gets."""

    found: Found
    steps: tuple[Step, ...]

    def record(self) -> dict[str, object]:
        """The same for machines."""
        found = self.found
        return {
            "problem": asdict(found.problem),
            "bucket": asdict(found.bucket),
            "environment": asdict(found.environment),
            "rung": found.rung,
            "orders": dict(found.orders),
            "configs": {name: dict(config) for name, config in found.configs.items()},
            "origins": dict(found.origins),
            "candidates": [
                {"rung": s.candidate.rung, "where": s.candidate.kept.where, "refused": list(s.why)}
                for s in self.steps
            ],
            "note": found.note,
        }

    def __str__(self) -> str:
        found = self.found
        lines = [f"{found.problem}", f"{found.bucket}, on {found.environment}"]
        lines += [str(step) for step in self.steps]
        used = {step.candidate.rung for step in self.steps}
        lines += [f"  {rung:<15}none" for rung in RUNGS[:-1] if rung not in used]
        lines.append(f"it gets: {found.rung}")
        lines += [f"  {branch}: {order} stay" for branch, order in found.orders.items()]
        for name, config in found.configs.items():
            words = " ".join(f"{what}={value}" for what, value in config.items())
            lines.append(f"  {name}: {words}  ({found.origins[name]})")
        lines += [found.note] if found.note else []
        return "\n".join(lines) + "\n"


def explain(
    spec: Spec,
    target: Target,
    dtype: DType,
    bucket: Bucket,
    work: Work = "forward",
    page: int = 0,
) -> Ladder:
    """The ladder of a call of a bound spec, on tensors that can come in a stream, of its gradients, or of a
    step behind a cache with pages of `page` tokens, or with none.

    Raises:
        HsgenError: the spec has no kernels.
    """
    compiled: dict[str, Compiled] = {}
    target = with_streams(target)

    def made_with(orders: Mapping[str, Order], size: Bucket) -> Artifact:
        return pipeline.compile_work(spec, target, dtype, work, orders, size.sizes(page))

    def compile_with(orders: Mapping[str, Order]) -> Compiled:
        key = str(sorted(orders.items()))
        if key not in compiled:
            artifact = made_with(orders, bucket)
            compiled[key] = Compiled(
                plan=artifact.plan,
                target=target,
                texts=artifact.module.texts,
                at=(lambda other: made_with(orders, other).plan) if work == "decode" else None,
            )
        return compiled[key]

    problem, environment = Problem.of(spec, dtype, work, page), files.environment(target)
    steps: list[Step] = []
    for candidate in ranked(problem, bucket, environment):
        try:
            made = compile_with(candidate.kept.record.orders)
            why = tuple(map(str, refusals(candidate, made, environment).values()))
        except HsgenError as error:
            why = (error.message,)
        steps.append(Step(candidate=candidate, why=why))
    found = look_up(problem, bucket, environment, compile_with)
    return Ladder(found=found, steps=tuple(steps))
