"""What `hsgen show` and `hsgen compile` say: a spec's graph and plan, and what its kernels cost.

Needs no GPU and loads neither torch nor triton: both do their work in child processes.  Prints nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from hsgen import (
    analysis,
    dryrun,
    losses,
    passes,
    pipeline,
    planner,
    resources,
    schedule,
    verify,
)
from hsgen.analysis import Cost, quantity
from hsgen.buckets import PartsContext
from hsgen.clusters import DOTS, ClustersContext
from hsgen.configs import DType, Sizes
from hsgen.errors import BuildError, PlanError
from hsgen.estimates import EstimateContext
from hsgen.graph import (
    Attend,
    Gate,
    Graph,
    Node,
    ReduceRows,
    Score,
    Select,
    Union,
    align,
    op_text,
    tensor_inputs,
)
from hsgen.kernels import SegmentsContext
from hsgen.maps import LastContext, MapsContext
from hsgen.pipeline import Artifact
from hsgen.plan import STREAMED, Kernel, Plan
from hsgen.resources import TOKENS, Job, Outcome, Resources, Roofline
from hsgen.rows import RowsContext
from hsgen.spec import Spec
from hsgen.streams import StreamsContext
from hsgen.target import MathType, Target, with_streams

MOST_WORKERS = 8


# --- show


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A spec's graph and its plan for one GPU; without a plan, or one of its losses, why there is none."""

    graph: Graph
    plan: Plan | None
    problem: str
    losses: Plan | None = None  # of a spec that has some, with their gradients
    unlearnt: str = ""  # why there is no such plan

    def __str__(self) -> str:
        if self.plan is None:
            return f"{analysis.describe(self.graph)}\nno plan: {self.problem}\n"
        text = f"{analysis.describe(self.graph)}\n{self.plan}\n{_memory_text(self.plan)}"
        if self.unlearnt:
            return f"{text}\nno plan of losses: {self.unlearnt}\n"
        return f"{text}\n{self.losses}" if self.losses else text

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "graph": _graph_record(self.graph),
            "plan": _plan_record(self.plan) if self.plan else None,
            **({"losses": _plan_record(self.losses)} if self.losses else {}),
            **({"losses_problem": self.unlearnt} if self.unlearnt else {}),
            "problem": self.problem or None,
        }


def show(spec: Spec, target: Target, dtype: DType = "bf16") -> Shown:
    """Plan a spec without emitting anything."""
    graph = passes.run(planner.plan(spec))
    try:
        plan = schedule.schedule(graph, target, dtype)
    except PlanError as error:
        return Shown(graph=graph, plan=None, problem=_with_place(error))
    if not graph.outputs.loss:
        return Shown(graph=graph, plan=plan, problem="")
    try:
        learnt = losses.plan(graph, target, dtype, gradients=True)
    except PlanError as error:
        return Shown(graph=graph, plan=plan, problem="", unlearnt=_with_place(error))
    return Shown(graph=graph, plan=plan, problem="", losses=learnt)


def _with_place(error: PlanError) -> str:
    return f"{error.message} ({error.span})" if error.span else error.message


ROLES = ("output", "level", "selection", "list", "scratch")


def _memory_text(plan: Plan) -> str:
    """What one call allocates, by what it is for, and the most that is there at a time."""
    rows: list[tuple[str, ...]] = [("  T", *ROLES, "at a time")]
    for tokens in analysis.LENGTHS:
        run = dryrun.run(plan, tokens=tokens)
        total = (*(run.of(role) for role in ROLES), run.peak)
        rows.append((f"  {tokens}", *map(quantity, total)))
    return "\n".join(["bytes that one call allocates, batch 1, S = T", *align(rows)]) + "\n"


def _graph_record(graph: Graph) -> dict[str, object]:
    known = not analysis.unbound_sizes(graph)
    costs = analysis.costs(graph) if known else {}
    return {
        "name": graph.meta.name,
        "source": graph.meta.source,
        "digest": graph.meta.digest,
        "causality": analysis.causality_text(graph),
        "laws": asdict(analysis.laws(graph)),
        "sizes": dict(graph.sizes),
        "inputs": [
            {"name": x.name, "shape": list(x.type.dims), "about": x.about}
            for x in tensor_inputs(graph)
        ],
        "nodes": [
            {
                "name": node.name,
                "operator": op_text(node.op).partition("(")[0],
                "attributes": asdict(node.op),
                "operands": list(node.inputs),
                "dtype": node.type.dtype,
                "shape": list(node.type.dims),
                "flops": _cost_record(costs[node.name].flops) if known else None,
                "bytes": _cost_record(costs[node.name].bytes) if known else None,
            }
            for node in graph.nodes()
        ],
        "outputs": {
            "o": graph.outputs.o,
            "lse": dict(graph.outputs.lse),
            "selection": dict(graph.outputs.selection),
        },
    }


def _cost_record(cost: Cost) -> list[dict[str, float]]:
    """t2 T^2 + t1 T + t0, from each T on."""
    return [{"from": start, **asdict(piece)} for start, piece in cost.pieces]


def _plan_record(plan: Plan) -> dict[str, object]:
    return {
        "target": plan.target,
        "dtype": plan.dtype,
        "scratch_bytes": plan.scratch_bytes,
        "kernels": [
            {
                "name": kernel.name,
                "skeleton": kernel.skeleton,
                "operators": list(kernel.operators),
                "config": kernel.config.keywords(),
                "follows": kernel.follows,
            }
            for kernel in plan.kernels
        ],
        "steps": [asdict(step) for step in plan.steps],
    }


# --- compile


class Progress(Protocol):
    """Told what is being done, how much of it is done, and how much there is."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def _quietly(what: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """One kernel on its target.  `flops` and `bytes` are the plan's, `limit` the time they need."""

    kernel: Kernel
    resources: Resources
    flops: float
    bytes: float
    math: MathType
    limit: Roofline
    binary: Path | None

    def record(self) -> dict[str, object]:
        """The same for machines."""
        cost = self.resources.cost
        return {
            "name": self.kernel.name,
            "file": f"{self.kernel.name}.py",
            "skeleton": self.kernel.skeleton,
            "operators": list(self.kernel.operators),
            "config": self.kernel.config.keywords(),
            "registers": cost.registers,
            "scalar_registers": cost.scalar_registers,
            "spill_bytes": cost.spill_bytes,
            "shared_bytes": cost.shared_bytes,
            "tensor_columns": cost.tensor_columns,
            "warps": cost.warps,
            "blocks_per_sm": self.resources.blocks_per_sm,
            "occupancy": round(self.resources.occupancy, 4),
            "limited_by": self.resources.limited_by,
            "binary": str(self.binary) if self.binary else None,
            "binary_sha256": self.resources.binary_sha256,
            "flops": self.flops,
            "bytes": self.bytes,
            "math": self.math,
            "limit_seconds": self.limit.seconds,
            "bound": self.limit.bound,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A compiled spec, what each kernel needs, and whether the kernels are right.

    `directory` holds the modules; None where no disk would take them.
    """

    artifact: Artifact
    directory: Path | None
    kernels: tuple[KernelReport, ...]
    verification: verify.Report | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verification is None or self.verification.passed

    @property
    def unverified(self) -> tuple[str, ...]:
        """Kernels that stream keys: the interpreter, which has no Gluon, ran the loops they stand for."""
        plan = self.artifact.plan
        return tuple(kernel.name for kernel in plan.kernels if kernel.skeleton in STREAMED)

    def record(self) -> dict[str, object]:
        """The same for machines."""
        plan, target = self.artifact.plan, self.artifact.target
        return {
            "ok": self.passed,
            "spec": self.artifact.spec.name,
            "digest": self.artifact.spec.digest,
            "target": {"name": target.name, "arch": target.label},
            "dtype": plan.dtype,
            "directory": str(self.directory) if self.directory else None,
            "files": sorted(self.artifact.sources),
            "tokens": TOKENS,
            "kernels": [kernel.record() for kernel in self.kernels],
            "verification": self.verification.record() if self.verification else None,
            "verified_as_rows": list(self.unverified) if self.verification else [],
            "seconds": round(self.seconds, 2),
        }

    def __str__(self) -> str:
        plan, target = self.artifact.plan, self.artifact.target
        lines = [
            f"{plan.name} for {target.name} ({target.label}), {plan.dtype}: "
            f"{len(self.kernels)} kernels in {self.seconds:.1f} s",
            f"in {self.directory or 'memory: the cache cannot be written'}",
            "",
            *_table(self.kernels),
            "",
            f"registers and bytes of stack (spills) a thread, shared memory a block; limits at B = 1, "
            f"T = S = {TOKENS}",
            _dense_text(self.artifact.graph, target, plan.dtype),
            "",
        ]
        if self.verification is None:
            return "\n".join(lines) + "not verified\n"
        told = str(self.verification)
        if self.unverified:
            names = ", ".join(self.unverified)
            told += f"  as `rows`, for the interpreter has no Gluon: {names}\n"
        return "\n".join(lines) + told


def report(
    spec: Spec,
    target: Target,
    dtype: DType = "bf16",
    *,
    output: Path | None = None,
    verified: bool = True,
    progress: Progress = _quietly,
) -> Report:
    """Compile a spec for a GPU that need not be there, look at each kernel's binary, verify it.

    Args:
        spec: heads and head dims bound.
        target: the GPU.
        dtype: of the caller's tensors.
        output: the package is also written to output/<spec name>, with the binaries in it.
        verified: run the kernels in Triton's interpreter, and compare with the reference.
        progress: told of each kernel compiled and each case verified.

    Raises:
        PlanError: no kernel can do it, or one does not fit the target.
        BuildError: a kernel does not compile, or a file cannot be written.
    """
    start = time.monotonic()
    artifact = pipeline.compile_spec(spec, with_streams(target), dtype)
    folder = output / spec.name if output else None
    if folder:
        _write(folder, {name: text.encode() for name, text in artifact.sources.items()})
    found = _measure(artifact, progress)
    binaries = _write_binaries(folder, artifact, found) if folder else {}
    kernels = tuple(
        _kernel_report(artifact, kernel, one, binaries.get(kernel.name))
        for kernel, one in zip(artifact.plan.kernels, found, strict=True)
    )
    seconds = time.monotonic() - start
    return Report(
        artifact=artifact,
        directory=folder or artifact.module.directory,
        kernels=kernels,
        verification=_verify(spec, target, progress) if verified else None,
        seconds=seconds,
    )


def _verify(spec: Spec, target: Target, progress: Progress) -> verify.Report:
    done: list[verify.Case] = []

    def tell(case: verify.Case) -> None:
        done.append(case)
        progress("verifying", len(done), 0)

    progress("verifying", 0, 0)
    return verify.verify(spec, target, progress=tell)


# --- resources


def _measure(artifact: Artifact, progress: Progress) -> tuple[Resources, ...]:
    """Cross-compile every kernel at its default configuration."""
    found = resources.measure(
        (planned := jobs(artifact)),
        workers=min(MOST_WORKERS, os.cpu_count() or 2),
        progress=lambda done, total: progress("compiling", done, total),
    )
    return tuple(map(_fitting, artifact.plan.kernels, planned, found))


def jobs(artifact: Artifact, sizes: Sizes | None = None) -> tuple[Job, ...]:
    """One job a kernel, specialised as the runtime does it for contiguous tensors of TOKENS tokens; of steps,
    for `sizes`.
    """
    return pipeline.call_jobs(artifact, sizes)


def _fitting(kernel: Kernel, job: Job, outcome: Outcome) -> Resources:
    """The outcome, if the target can hold it.

    Raises:
        PlanError: it cannot; says what the smallest tile needs, or that it would fit.
    """
    name = f"{kernel.name} (for {', '.join(f'%{node}' for node in kernel.operators)})"
    tried = [outcome]
    too_large = isinstance(outcome, Resources) and outcome.blocks_per_sm == 0
    if too_large and kernel.skeleton == "rows":
        tried += resources.measure([_smallest(job)])
    fitting = resources.require_fit(name, tried, job.target)
    if fitting[0] is not outcome:
        tile = " ".join(f"{key}={value}" for key, value in _smallest(job).constants.items())
        raise PlanError(
            f"kernel {name} cannot run on {job.target.name} ({job.target.label}) as configured",
            help=f"a smaller tile fits: {tile} num_stages=1",
        )
    return fitting[0]


def _smallest(job: Job) -> Job:
    """The smallest tile of a kernel: one token, 16 keys, no pipeline."""
    sizes = {name: int(value) for name, value in job.constants.items() if value is not None}
    smallest = {
        "BLOCK_T": 1,
        "BLOCK_M": max(16, sizes["BLOCK_M"] // sizes["BLOCK_T"]),
        "BLOCK_N": 16,
    }
    return replace(job, constants={**job.constants, **smallest}, num_stages=1)


# --- limits


def _kernel_report(
    artifact: Artifact, kernel: Kernel, found: Resources, binary: Path | None
) -> KernelReport:
    target, dtype = artifact.target, artifact.plan.dtype
    flops, moved = work(artifact.graph, artifact.plan, kernel)
    units = math_type(kernel, dtype)
    return KernelReport(
        kernel=kernel,
        resources=found,
        flops=flops,
        bytes=moved,
        math=units,
        limit=resources.roofline(flops, moved, target, units),
        binary=binary,
    )


def work(graph: Graph, plan: Plan, kernel: Kernel, tokens: int = TOKENS) -> tuple[float, float]:
    """FLOPs and bytes of one call: arithmetic of all its operators, values from outside read once,
    values that others read written once.  Scores count where they are visible.  A kernel that another
    stands in for in some tiles is counted as if it did all of them, and of heads on several ways as if all
    were on the costliest.
    """
    if kernel.follows and plan.kernel(kernel.follows).operators == kernel.operators:
        return 0.0, 0.0
    input_bytes = 4 if plan.dtype == "fp32" else 2
    if kernel.skeleton == "index":  # sorts what the operator after it attends to
        operands = graph.operands(graph[kernel.operators[0]])
        read = [node.name for node in operands if isinstance(node.op, Select)]
        return 0.0, analysis.moved(graph, read).evaluate(tokens)
    made = graph[kernel.operators[0]]
    if kernel.skeleton == "segments" and isinstance(made.op, Attend):  # means of a tier
        read = made.inputs[2 if "values" in kernel.name else 1]
        return 0.0, analysis.moved(graph, (read,), input_bytes=input_bytes).evaluate(tokens)
    costs = analysis.costs(graph)
    by_way: dict[str | None, float] = {}
    for name in kernel.operators:
        op = graph[name].op
        way = op.when if isinstance(op, Attend) else None
        by_way[way] = by_way.get(way, 0.0) + costs[name].flops.evaluate(tokens)
    flops = by_way.pop(None, 0.0) + max(by_way.values(), default=0.0)
    operands = {name for node in kernel.operators for name in _operands(graph[node])}
    if isinstance(kernel.context, LastContext):
        values = _of_last_rows(graph, kernel)
        return flops, analysis.moved(graph, values, input_bytes=input_bytes).evaluate(tokens)
    values = sorted(operands - set(kernel.operators)) + _written(graph, plan, kernel)
    if _adds(plan, kernel):  # the sum so far is as large as what is added
        values.append(kernel.operators[0])
    return flops, analysis.moved(graph, values, input_bytes=input_bytes).evaluate(tokens)


def _of_last_rows(graph: Graph, kernel: Kernel) -> list[str]:
    """The keys that a few rows read, and a number a key, where they leave any."""
    nodes = [graph[name] for name in kernel.operators]
    score = nodes[0] if isinstance(nodes[0].op, Score) else graph[nodes[0].inputs[0]]
    return [score.inputs[1], *(node.name for node in nodes if isinstance(node.op, ReduceRows))]


def _operands(node: Node) -> tuple[str, ...]:
    """What a kernel reads for a node; of a sum the gates: what other branches gave is in the sum."""
    match node.op:
        case Gate():
            return node.inputs[:1]
        case Union(sink=sink):
            return node.inputs[-1:] if sink else ()
        case _:
            return node.inputs


def _adds(plan: Plan, kernel: Kernel) -> bool:
    """Whether a kernel, or one that ends its work, adds to the outputs of branches before."""
    contexts = [each.context for each in plan.kernels if each.operators == kernel.operators]
    return any(
        each.turn is not None and not each.turn.first
        for each in (x.rows if isinstance(x, StreamsContext) else x for x in contexts)
        if isinstance(each, RowsContext | PartsContext)
    )


def _written(graph: Graph, plan: Plan, kernel: Kernel) -> list[str]:
    """What leaves a kernel: outputs, and values that another reads without computing them itself."""
    others = [other for other in plan.kernels if other is not kernel]
    read = {
        name
        for other in others
        for node in other.operators
        for name in graph[node].inputs
        if name not in other.operators
    }
    return [name for name in kernel.operators if name in read or name in graph.outputs.names()]


def math_type(kernel: Kernel, dtype: str) -> MathType:
    """The units that bound a kernel's arithmetic: those of its dots, else ordinary ones."""
    match kernel.context:
        case RowsContext(eight=True) | StreamsContext(rows=RowsContext(eight=True)):
            return "fp8"
        case (
            RowsContext(precision=precision) | StreamsContext(rows=RowsContext(precision=precision))
        ):
            return _dot_type(dtype, precision)
        case (
            SegmentsContext(how="linear", precision=precision)
            | MapsContext(how="tiles", precision=precision)
            | LastContext(precision=precision)
            | EstimateContext(precision=precision)
        ):
            return _dot_type(dtype, precision)
        case ClustersContext(how=how, precision=precision) if how in DOTS:
            return _dot_type(dtype, precision)
        case _:
            return "fp32"


def _dot_type(dtype: str, precision: str) -> MathType:
    """`precision` is of dots of float32 only."""
    if dtype == "fp32":
        return "tf32x3" if precision == "tf32x3" else "fp32"
    return "bf16" if dtype == "bf16" else "fp16"


# --- text


def _table(kernels: Sequence[KernelReport]) -> list[str]:
    head = (
        "kernel",
        " regs",
        "spills",
        "   shared",
        "occupancy",
        " FLOPs",
        " bytes",
        "  at least",
        "bound by",
    )
    total = sum(each.limit.seconds for each in kernels)
    rows = [
        (
            each.kernel.name,
            f"{each.resources.cost.registers:5}",
            f"{each.resources.cost.spill_bytes:6}",
            f"{each.resources.cost.shared_bytes / 1024:5.1f} KiB",
            f"{each.resources.occupancy:4.0%}, {each.resources.limited_by}",
            f"{quantity(each.flops):>6}",
            f"{quantity(each.bytes):>6}",
            _milliseconds(each.limit.seconds),
            f"{each.limit.bound}{f', {each.math}' if each.limit.bound == 'compute' else ''}",
        )
        for each in kernels
    ]
    flops, moved = (sum(getattr(each, what) for each in kernels) for what in ("flops", "bytes"))
    last = (
        "all",
        *[""] * 4,
        f"{quantity(flops):>6}",
        f"{quantity(moved):>6}",
        _milliseconds(total),
        "",
    )
    return align([head, *rows, last])


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:7.3f} ms"


def _dense_text(graph: Graph, target: Target, dtype: str) -> str:
    dense = analysis.dense(graph)
    flops, moved = dense.flops.evaluate(TOKENS), dense.bytes.evaluate(TOKENS)
    units = _dot_type(dtype, target.dot_precision)
    limit = resources.roofline(flops, moved, target, units)
    return (
        f"dense attention of these heads: {quantity(flops)} FLOPs, {quantity(moved)} bytes, "
        f"at least {limit.seconds * 1e3:.3f} ms"
    )


# --- files


def _write_binaries(
    folder: Path, artifact: Artifact, found: Sequence[Resources]
) -> dict[str, Path]:
    """Those of several targets may lie side by side.  -> each kernel's file"""
    suffix = f"{artifact.target.label}.{artifact.target.binary}"
    kernels = [kernel.name for kernel in artifact.plan.kernels]
    names = {kernel: f"{kernel}.{suffix}" for kernel in kernels}
    _write(folder, {names[k]: one.cost.binary for k, one in zip(kernels, found, strict=True)})
    return {kernel: folder / name for kernel, name in names.items()}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error.strerror}") from error
