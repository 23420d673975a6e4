"""What a kernel costs on a GPU that need not be there: registers, spills, shared memory, occupancy.

Kernels are cross-compiled by Triton in worker processes that can be killed, so a compiler that
hangs, crashes or eats memory costs one result.  Imports neither torch nor triton itself.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Literal

from hsgen import allowlist, dryrun, paths, splits, store
from hsgen.build import Module, triton_version
from hsgen.configs import Sizes
from hsgen.dryrun import Array
from hsgen.errors import BuildError, PlanError
from hsgen.plan import Kernel, Param, Plan
from hsgen.target import MathType, Target
from hsgen.workers import Failed, JsonObject, Pool, Worker, WorkerError

TOKENS = 32768  # queries and keys of the call that kernels are specialised for, batch 1
KIND = "resources"
FORMAT = 2
Kind = Literal["pointer", "tiles", "int", "float", "constexpr"]
Constant = int | float | bool | str | None
Limit = Literal[
    "registers", "scalar registers", "shared memory", "tensor memory", "warps", "blocks"
]

SCHEDULERS = 4  # of a multiprocessor, each with a quarter of its registers and warps
SCALAR_UNIT = 16  # scalar registers that a warp gets at a time
WORKER = ("-P", "-m", "hsgen.crosscompile")
DTYPES = {
    **{name: name for name in ("bf16", "fp16", "fp32", "fp64", "fp8e4nv", "fp8e5")},
    **{name: name for name in ("i1", "i8", "i16", "i32", "i64", "u8")},
    **{"f16": "fp16", "f32": "fp32", "f64": "fp64", "bool": "i1"},
    **{"int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8"},
    **{"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a kernel, in order.

    `dtype` is empty for a constexpr, else bf16, fp16, fp32, fp64, fp8e4nv, fp8e5, i1 to i64 or u8.
    `columns`: of tiles that the tensor memory accelerator brings, BLOCK_N rows of one head each, or
    so many `tokens` of so many `heads`.
    `divisible` promises a multiple of 16 (bytes for a pointer), without which nothing is pipelined.
    """

    name: str
    kind: Kind
    dtype: str = ""
    divisible: bool = False
    columns: int = 0
    heads: int = 0
    tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSignature:
    """A kernel function: its file in the module, its name, its parameters in order."""

    file: str
    function: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One kernel at one configuration for one target.

    `constants` holds a value for each constexpr parameter; one more for an int parameter bakes it
    in, as Triton does with 1.
    """

    module: Module
    signature: KernelSignature
    constants: Mapping[str, Constant]
    num_warps: int
    num_stages: int
    target: Target


def plan_jobs(plan: Plan, module: Module, target: Target) -> tuple[Job, ...]:
    """One job a kernel of a plan, at its configuration, in the plan's order.

    Strides are promised to be multiples of 16, as they are for every usual head dim; counts vary
    freely, as the kernels' `do_not_specialize` says.
    """
    return tuple(_plan_job(plan, kernel, module, target) for kernel in plan.kernels)


def call_jobs(
    plan: Plan, module: Module, target: Target, before: Plan | None = None
) -> tuple[Job, ...]:
    """The same jobs, specialised as the runtime does it for contiguous tensors of TOKENS tokens.

    before: Of gradients, the plan of the calls that they are of.
    """
    run = (
        dryrun.gradients(plan, before, tokens=TOKENS) if before else dryrun.run(plan, tokens=TOKENS)
    )
    return tuple(
        _specialised(job, kernel, run.launch(kernel.name).arguments)
        for job, kernel in zip(plan_jobs(plan, module, target), plan.kernels, strict=True)
    )


def step_jobs(plan: Plan, module: Module, target: Target, sizes: Sizes) -> tuple[Job, ...]:
    """The same of steps behind a cache; what a launch says in place of the configuration is as it says.

    Kernels that no such step launches have none of that.
    """
    run = dryrun.steps(
        plan,
        tokens=sizes.tokens,
        keys=sizes.keys,
        batch=sizes.sequences,
        numbers={"SHARE_KEYS": splits.SHARE_KEYS, "LONG_SHARE": splits.LONG_SHARE},
    )
    launched = {x.kernel: x for x in (*run.others, *run.launches)}
    found: list[Job] = []
    for job, kernel in zip(plan_jobs(plan, module, target), plan.kernels, strict=True):
        launch = launched.get(kernel.name)
        if launch is None:
            found.append(job)
            continue
        of_launch = _specialised(job, kernel, launch.arguments)
        found.append(replace(of_launch, constants={**of_launch.constants, **launch.given}))
    return tuple(found)


def _specialised(job: Job, kernel: Kernel, arguments: Mapping[str, int | Array]) -> Job:
    """Triton bakes a stride of 1 in, and promises that one is a multiple of 16 only if it is."""
    names = {param.name for param in kernel.params if param.kind == "stride"}
    strides = {k: v for k, v in arguments.items() if k in names and isinstance(v, int)}
    parameters = tuple(
        replace(p, divisible=strides[p.name] % 16 == 0) if p.name in strides else p
        for p in job.signature.parameters
    )
    ones = {name: 1 for name, value in strides.items() if value == 1}
    return replace(
        job,
        signature=replace(job.signature, parameters=parameters),
        constants={**job.constants, **ones},
    )


def _plan_job(plan: Plan, kernel: Kernel, module: Module, target: Target) -> Job:
    shared = plan.kernel(kernel.follows).config if kernel.follows else kernel.config
    constants = dict(shared.constexprs) | dict(kernel.config.constexprs)
    names = {param.name for param in kernel.params}
    return Job(
        module=module,
        signature=KernelSignature(
            file=f"{kernel.name}.py",
            function=kernel.name,
            parameters=tuple(_plan_parameter(param, plan.dtype) for param in kernel.params),
        ),
        constants={name: value for name, value in constants.items() if name in names},
        num_warps=kernel.config.num_warps,
        num_stages=kernel.config.num_stages,
        target=target,
    )


def _element(param: Param, dtype: str) -> str:
    """What a parameter points to, as Triton calls it; `dtype`: of the caller's tensors."""
    names = {None: dtype, "input": dtype, "e4m3": "fp8e4nv"}
    return names.get(param.dtype) or str(param.dtype)


def _plan_parameter(param: Param, dtype: str) -> Parameter:
    match param.kind:
        case "pointer":
            return Parameter(
                name=param.name, kind="pointer", dtype=_element(param, dtype), divisible=True
            )
        case "tiles":
            return Parameter(
                name=param.name,
                kind="tiles",
                dtype=_element(param, dtype),
                columns=param.columns,
                heads=param.heads,
                tokens=param.tokens,
            )
        case "stride":
            return Parameter(name=param.name, kind="int", dtype="i32", divisible=True)
        case "count":
            return Parameter(name=param.name, kind="int", dtype="i32")
        case "constexpr":
            return Parameter(name=param.name, kind="constexpr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the compiler says of one kernel.

    `registers` and `spill_bytes` (stack) are per thread, `scalar_registers` per warp (AMD's; 0
    elsewhere), the rest per block.  `warps` exceeds what was asked for when the compiler
    specialises warps; `tensor_columns` are of sm_100's tensor memory.  `binary` is the cubin or
    hsaco, the same bytes at each compilation.
    """

    registers: int
    scalar_registers: int = 0
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    warps: int
    seconds: float = field(compare=False)
    binary: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """A cost on a target: blocks that one multiprocessor holds (0: it cannot run), and why no more.

    `occupancy` is the share of the warps that could be resident.
    """

    cost: Cost
    blocks_per_sm: int
    occupancy: float
    limited_by: Limit
    cached: bool = field(compare=False)

    @property
    def binary_sha256(self) -> str:
        """Digest of the cubin or hsaco."""
        return hashlib.sha256(self.cost.binary).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileFailure:
    """Why a kernel has no resources: the compiler refused, died, or took too long."""

    kind: Failed
    message: str


Outcome = Resources | CompileFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The least time that arithmetic and memory allow, and which of them says so."""

    seconds: float
    bound: Literal["compute", "memory"]
    compute_seconds: float
    memory_seconds: float


def roofline(flops: float, num_bytes: float, target: Target, dtype: MathType) -> Roofline:
    """Bound a kernel by the target's peaks.

    Raises:
        PlanError: the target has no units for the dtype.
    """
    peak = target.peak(dtype)
    if peak == 0:
        raise PlanError(f"{target.name} ({target.label}) has no {dtype} matrix units")
    compute, memory = flops / peak, num_bytes / target.bandwidth
    return Roofline(
        seconds=max(compute, memory),
        bound="compute" if compute >= memory else "memory",
        compute_seconds=compute,
        memory_seconds=memory,
    )


def occupancy(
    *,
    registers: int,
    shared_bytes: int,
    tensor_columns: int,
    warps: int,
    target: Target,
    scalar_registers: int = 0,
) -> tuple[int, Limit]:
    """Blocks that one multiprocessor holds, and what stops one more.

    Registers and shared memory come in units, the latter on top of what the system keeps for each
    block; warps are spread over the schedulers.
    """
    limits: dict[Limit, int] = {
        "warps": target.max_warps_per_sm // warps,
        "blocks": target.max_blocks_per_sm,
    }
    if warps > target.max_warps_per_block:
        limits["warps"] = 0
    lanes, unit = target.warp_size, target.register_unit
    per_warp = max(_round_up(registers, unit), unit) * lanes
    limits["registers"] = _blocks_by_registers(per_warp, target.registers_per_sm, warps)
    if scalar_registers:
        per_warp = _round_up(scalar_registers, SCALAR_UNIT)
        held = _blocks_by_registers(per_warp, target.scalar_registers_per_sm, warps)
        limits["scalar registers"] = held
    shared = _round_up(shared_bytes + target.smem_reserved, target.smem_unit)
    if shared_bytes > target.smem_per_block:
        limits["shared memory"] = 0
    elif shared:
        limits["shared memory"] = target.smem_per_sm // shared
    if tensor_columns:
        limits["tensor memory"] = target.tensor_columns // tensor_columns
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _blocks_by_registers(per_warp: int, per_sm: int, warps: int) -> int:
    """Every scheduler has whole warps; those of a block may lie with any of them."""
    return per_sm // SCHEDULERS // per_warp * SCHEDULERS // warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def require_fit(kernel: str, outcomes: Sequence[Outcome], target: Target) -> tuple[Resources, ...]:
    """The outcomes that can be launched on the target.

    Raises:
        PlanError: none can; holds the smallest requirement among them, and the limit.
    """
    compiled = [outcome for outcome in outcomes if isinstance(outcome, Resources)]
    fitting = tuple(outcome for outcome in compiled if outcome.blocks_per_sm > 0)
    if fitting:
        return fitting
    if not compiled:
        failures = [outcome for outcome in outcomes if isinstance(outcome, CompileFailure)]
        reasons = "; ".join(f"{failure.kind}: {failure.message}" for failure in failures)
        raise BuildError(f"kernel {kernel} does not compile for {target.label}: {reasons}")
    place = f"{target.name} ({target.label})"
    raise PlanError(f"kernel {kernel} cannot run on {place}: {excess(compiled, target)}")


def excess(compiled: Sequence[Resources], target: Target) -> str:
    """The smallest requirement beside the limit that it breaks."""
    least = min(compiled, key=lambda result: result.cost.shared_bytes)
    cost = least.cost
    match least.limited_by:
        case "shared memory":
            needed, what, limit = cost.shared_bytes, "bytes of shared memory", target.smem_per_block
        case "tensor memory":
            needed, what = cost.tensor_columns, "columns of tensor memory"
            limit = target.tensor_columns
        case "registers":
            needed = cost.registers * cost.warps * target.warp_size
            what, limit = "registers", target.registers_per_sm
        case "scalar registers":
            needed = cost.scalar_registers * cost.warps
            what, limit = "scalar registers", target.scalar_registers_per_sm
        case "warps" | "blocks":
            needed, what, limit = cost.warps, "warps", target.max_warps_per_block
    return f"needs at least {needed:,} {what} a block, the limit is {limit:,}"


def _quietly(done: int, total: int) -> None:
    """Report no progress."""


def measure(
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    timeout: float = 120.0,
    progress: Callable[[int, int], None] = _quietly,
) -> tuple[Outcome, ...]:
    """Cross-compile kernels, in the order of the jobs.  What was measured before is looked up.

    Args:
        jobs: any number; equal ones are compiled once.
        workers: processes at once.
        timeout: seconds that one kernel may take; its whole process group is killed then.
        progress: told how many of the missing ones are done, and how many there are.

    Raises:
        BuildError: Triton is not installed, or too old for a target.
    """
    versions = {job.target.backend: triton_version(job.target.backend) for job in jobs}
    keys = [_key(job, versions[job.target.backend]) for job in jobs]
    costs = {key: entry for key in keys if (entry := _recall(key)) is not None}
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in costs}
    requests = [_request(job) for job in missing.values()]
    fresh = dict[str, Cost | CompileFailure]()
    replies = _ask_all(requests, workers=workers, timeout=timeout)
    for (key, job), reply in zip(missing.items(), replies, strict=True):
        fresh[key] = reply
        if isinstance(reply, Cost):
            _keep(job, key, reply)
        progress(len(fresh), len(missing))
    return tuple(
        _outcome(job, (costs | fresh)[key], cached=key in costs)
        for key, job in zip(keys, jobs, strict=True)
    )


class Compilers:
    """Processes that stay, for jobs that come a few at a time; leaving the block kills them.

    What a compiler refused, or could not do in time, is remembered too.

    Args:
        workers: processes at once.
        timeout: seconds that one kernel may take.
        cache: a folder for Triton's cache, of which a process on the GPU then has what was compiled
            here; None gives each process its own.
    """

    def __init__(self, workers: int = 2, timeout: float = 120.0, cache: Path | None = None) -> None:
        self._timeout = timeout
        self.workers = workers
        self._workers = [
            Worker(WORKER, lambda own: _environment(cache or own)) for _ in range(workers)
        ]
        self._idle = SimpleQueue[Worker]()
        for worker in self._workers:
            self._idle.put(worker)
        # a worker dies with the thread that started it, so threads stay as long as they do
        self._threads = ThreadPoolExecutor(workers, "hsgen-compiler")

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill them; what they were at is lost."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def submit(self, job: Job) -> Future[Outcome]:
        """The outcome of a job, once it is known.

        Raises:
            BuildError: Triton is not installed, or too old for the target.
        """
        key = _key(job, triton_version(job.target.backend))
        known = _recall(key) or _recall_failure(key, self._timeout)
        if known is not None:
            done = Future[Outcome]()
            done.set_result(_outcome(job, known, cached=True))
            return done
        return self._threads.submit(self._compile, job, key)

    def _compile(self, job: Job, key: str) -> Outcome:
        worker = self._idle.get()
        try:
            reply = _reply(worker.ask(_request(job), self._timeout))
        except WorkerError as error:
            reply = _reply(error)
        finally:
            self._idle.put(worker)
        if isinstance(reply, Cost):
            _keep(job, key, reply)
        elif reply.kind != "crash":  # which may be the machine's fault
            _keep_failure(job, key, reply, self._timeout)
        return _outcome(job, reply, cached=False)


def _keep_failure(job: Job, key: str, failure: CompileFailure, timeout: float) -> None:
    record = {"kind": failure.kind, "message": failure.message, "timeout": timeout}
    files = {"failure.json": json.dumps(record).encode()}
    store.publish(KIND, _stem(job.signature.file), files, {"failed": key})


def _recall_failure(key: str, timeout: float) -> CompileFailure | None:
    """A failure that another try would meet again; with more time, a late compiler may be done."""
    entry = store.find(KIND, {"failed": key})
    if entry is None:
        return None
    record = json.loads(entry.files["failure.json"])
    if record["kind"] == "timeout" and record["timeout"] < timeout:
        return None
    return CompileFailure(kind=record["kind"], message=record["message"])


def _outcome(job: Job, cost: Cost | CompileFailure, *, cached: bool) -> Outcome:
    if isinstance(cost, CompileFailure):
        return cost
    blocks, limit = occupancy(
        registers=cost.registers,
        scalar_registers=cost.scalar_registers,
        shared_bytes=cost.shared_bytes,
        tensor_columns=cost.tensor_columns,
        warps=cost.warps,
        target=job.target,
    )
    return Resources(
        cost=cost,
        blocks_per_sm=blocks,
        occupancy=blocks * cost.warps / job.target.max_warps_per_sm,
        limited_by=limit,
        cached=cached,
    )


def _ask_all(
    requests: Sequence[JsonObject], *, workers: int, timeout: float
) -> Iterator[Cost | CompileFailure]:
    """Spread requests over worker processes; an empty list starts none."""
    if requests:
        with Pool(WORKER, _environment, min(workers, len(requests))) as pool:
            yield from map(_reply, pool.ask_all(requests, timeout))


def _environment(folder: Path) -> dict[str, str]:
    """Compile for real, with Triton's own cache private: it never checks what it reads back."""
    return paths.child_environment(
        remove=("TRITON_INTERPRET", "TRITON_CACHE_MANAGER"),
        add={
            "TRITON_CACHE_DIR": str(folder),
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        },
    )


def _reply(answer: JsonObject | WorkerError) -> Cost | CompileFailure:
    if isinstance(answer, WorkerError):
        return CompileFailure(kind=answer.kind, message=str(answer))
    if "error" in answer:
        return CompileFailure(kind="error", message=str(answer["error"]))
    return _cost(answer, base64.b64decode(str(answer["binary"])))


def _cost(answer: JsonObject, binary: bytes) -> Cost:
    return Cost(
        registers=int(answer["registers"]),
        scalar_registers=int(answer["scalar_registers"]),
        spill_bytes=int(answer["spill_bytes"]),
        shared_bytes=int(answer["shared_bytes"]),
        tensor_columns=int(answer["tensor_columns"]),
        warps=int(answer["warps"]),
        seconds=float(answer["seconds"]),
        binary=binary,
    )


def _keep(job: Job, key: str, cost: Cost) -> None:
    record = {name: value for name, value in asdict(cost).items() if name != "binary"}
    files = {"cost.json": json.dumps(record).encode(), "kernel.bin": cost.binary}
    store.publish(KIND, _stem(job.signature.file), files, {"job": key})


def _recall(key: str) -> Cost | None:
    entry = store.find(KIND, {"job": key})
    if entry is None:
        return None
    return _cost(json.loads(entry.files["cost.json"]), entry.files["kernel.bin"])


def _key(job: Job, version: str) -> str:
    """Digest of all that decides the binary: text, signature, constants, options, compiler."""
    request = _request(job)
    request.pop("directory")
    request |= {"format": FORMAT, "triton": version, "environment": paths.compiler_environment()}
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _request(job: Job) -> JsonObject:
    signature, target = job.signature, job.target
    names = [parameter.name for parameter in signature.parameters]
    unknown = job.constants.keys() - names
    if unknown:
        raise BuildError(f"{signature.function} has no parameter {sorted(unknown)[0]!r}")
    divisible = [
        p.name for p in signature.parameters if p.divisible and p.name not in job.constants
    ]
    directory = job.module.directory
    return {
        "directory": None if directory is None else str(directory),
        "sources": _needed(job.module, signature.file),
        "file": signature.file,
        "function": signature.function,
        "types": {p.name: _type(p, job) for p in signature.parameters},
        "tiles": {p.name: _tile(p, job) for p in signature.parameters if p.kind == "tiles"},
        "constants": dict(job.constants),
        "divisible": divisible,
        "options": {"num_warps": job.num_warps, "num_stages": job.num_stages},
        "target": [target.backend, target.arch, target.warp_size],
    }


def _type(parameter: Parameter, job: Job) -> str:
    """A parameter's type as Triton writes it: *bf16, i32, fp32, constexpr."""
    if parameter.name in job.constants:
        return "constexpr"
    match parameter.kind:
        case "pointer":
            return f"*{DTYPES[parameter.dtype]}"
        case "int" | "float":
            return DTYPES[parameter.dtype]
        case "tiles":
            return "tile"  # `_tile` says of what
        case "constexpr":
            raise BuildError(f"{job.signature.function}: constexpr {parameter.name} has no value")


def _tile(parameter: Parameter, job: Job) -> list[int | str]:
    """What a tile holds, its rows, its columns and its heads."""
    rows = parameter.tokens if parameter.heads else job.constants["BLOCK_N"]
    assert isinstance(rows, int), "a tile of so many keys"
    return [DTYPES[parameter.dtype], rows, parameter.columns, parameter.heads or 1]


def _needed(module: Module, file: str) -> dict[str, str]:
    """A file's text and that of the siblings it imports, so that no other file changes the key."""
    found, waiting = dict[str, str](), [file]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = module.sources[name]
            waiting += sorted(allowlist.siblings(ast.parse(found[name])))
    return found


def _stem(file: str) -> str:
    return file.removesuffix(".py")
