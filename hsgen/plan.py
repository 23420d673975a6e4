"""The Plan: kernels with their parameters, buffers with symbolic sizes, launches in order; it prints.

Values only.  `schedule` makes them, `emit` turns them into text; nothing here knows a GPU or a template.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

from hsgen.storage import Storage

ParamKind = Literal["pointer", "tiles", "stride", "count", "constexpr"]
Skeleton = Literal[
    "rows",
    "beside",
    "streams",
    "latents",
    "latents_gradient",
    "cols",
    "cols_streams",
    "halved",
    "rank",
    "maps",
    "sorting",
    "segments",
    "trees",
    "clusters",
    "index",
    "merge",
    "learn",
]
LINE = 114  # letters of the line that says what a launch is, before it is indented
# in Gluon: texts of `rows`, and of `cols`
STREAMED: tuple[Skeleton, ...] = ("streams", "latents", "latents_gradient", "cols_streams")
ElementType = Literal["input", "e4m3", "f32", "i32", "i64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter of a kernel: a pointer, a stride, a count that varies freely, or a tunable."""

    name: str
    kind: ParamKind
    comment: str
    dtype: ElementType | None = None  # of what a pointer points to, or a tile holds
    columns: int = 0  # of a tile
    heads: int = 0  # of a token, which a tile then has; 0: BLOCK_N tokens of one head
    tokens: int = 1  # of a tile that has such heads

    @property
    def declaration(self) -> str:
        return f"{self.name}: tl.constexpr" if self.kind == "constexpr" else self.name


class Context(Protocol):
    """What a skeleton's template reads, a dataclass: every field is an already computed value."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def params(self) -> tuple[Param, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Tuned values of one kernel: constexpr parameters, warps, pipeline stages."""

    constexprs: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __getitem__(self, name: str) -> int:
        return dict(self.constexprs)[name]

    def without(self, name: str) -> Config:
        """The same values but one, which the kernel takes from another."""
        return replace(self, constexprs=tuple(pair for pair in self.constexprs if pair[0] != name))

    def keywords(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return dict(self.constexprs) | {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.keywords().items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One emitted module: a skeleton, what fills it, and the configuration it starts from."""

    name: str
    skeleton: Skeleton
    context: Context
    config: Config
    operators: tuple[str, ...]  # graph nodes that this kernel computes
    follows: str | None = None  # the kernel whose BLOCK_T this one must share
    by_slot: bool = False  # it walks a selection slot by slot, so order and repeats matter

    @property
    def params(self) -> tuple[Param, ...]:
        return self.context.params


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Device memory that the driver allocates; dimensions are expressions of the call's sizes."""

    name: str
    dtype: ElementType
    dims: tuple[str, ...]
    role: Literal["output", "level", "selection", "list", "scratch"]
    zeros: bool = False  # of what is added to

    def __str__(self) -> str:
        return f"{self.name} = {self.dtype}[{', '.join(self.dims)}] ({self.role})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel launch; arguments in the order of the kernel's parameters, constexprs left out.

    `given`: constexprs that follow from the sizes of a call, in place of the configuration's.
    """

    kernel: str
    grid: tuple[str, ...]
    arguments: tuple[str, ...]
    given: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Launches that run together, with the buffers they bring to life and the sizes they need.

    With `chunk`, the launches are repeated over chunks of the row tiles, so that a scratch stays
    small: `tiles` and `chunk` name the sizes that count them.
    `needs` and `makes` are names of buffers and of the caller's tensors.
    `of`: where a call makes the same in two ways, the one over its own choice or over a caller's; `rows`
    gives each row what was chosen together, or what is chosen and not attended, where anybody asks for it.
    """

    title: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    sizes: tuple[tuple[str, str], ...] = ()  # local names the expressions use, with their values
    tiles: str | None = None
    chunk: str | None = None
    of: Literal["own", "given", "rows"] | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Every name in the step's expressions that it does not bring to life itself."""
        texts = [text for _, text in self.sizes]
        texts += [dim for buffer in self.buffers for dim in buffer.dims]
        for launch in self.launches:
            texts += (*launch.grid, *launch.arguments, *(text for _, text in launch.given))
        names = {name for text in texts for name in re.findall(r"[A-Za-z_]\w*", text)}
        return frozenset(names - {buffer.name for buffer in self.buffers})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """What a plan behind a cache is for: many rows of a sequence at a time, or a few.

    `page`: its tokens lie in pages of so many; 0: in one piece.
    """

    rows: Literal["many", "few"]
    page: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one spec runs on one GPU."""

    name: str
    target: str
    dtype: str
    inputs: tuple[tuple[str, tuple[str, ...]], ...]  # the caller's tensors and their dimensions
    kernels: tuple[Kernel, ...]
    steps: tuple[Step, ...]
    scratch_bytes: int
    output: str
    lse: Mapping[str, str]
    selection: Mapping[str, str]
    gates: str | None = (
        None  # the caller's tensor that weighs branches, which choosing goes without
    )
    sizes: Mapping[str, int] = field(default_factory=dict)
    # selections that no step makes, and their dimensions: another layer chose them
    brought: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gradients: Mapping[str, str] = field(
        default_factory=dict
    )  # of a backward: by tensor, its buffer
    losses: Mapping[str, str] = field(
        default_factory=dict
    )  # of a plan of losses: by name, the buffer of what each row adds
    # by branch, the buffer of its own output, which its gradient is made from
    apart: Mapping[str, str] = field(default_factory=dict)
    again: tuple[str, ...] = ()  # of a backward: kernels of the forward's, that choose as it did
    cached: Cached | None = None
    storage: Storage | None = None  # what the cache keeps
    appends: tuple[Step, ...] = ()  # what puts new tokens into it
    alone: str = ""  # a level that all rows have one list of, so that no caller's is attended

    @property
    def kept(self) -> Mapping[str, tuple[str, ...]]:
        """Entries that are not pooled, but given: nodes, with their buffers' dimensions."""
        levels = self.storage.levels if self.storage else ()
        return {x.name: ("B", f"S // {x.stride}", str(x.heads), str(x.width)) for x in levels}

    @property
    def either(self) -> bool:
        """Whether a call's own choice is made where no caller brings one."""
        return any(step.of == "own" for step in self.steps)

    @property
    def usual(self) -> tuple[Step, ...]:
        """The steps of a call that chooses for itself."""
        return tuple(step for step in self.steps if step.of != "given")

    def passing(self, step: Step) -> tuple[str, ...]:
        """Buffers that a step makes and that no other one reads: what comes behind may have their memory."""
        others = (x for x in (*self.appends, *self.steps) if x is not step)
        read = {name for other in others for name in other.reads}
        return tuple(
            buffer.name
            for buffer in step.buffers
            if buffer.role in ("list", "scratch") and buffer.name not in read
        )

    def kernel(self, name: str) -> Kernel:
        return {kernel.name: kernel for kernel in self.kernels}[name]

    def with_config(self, configs: Mapping[str, Config]) -> Plan:
        """The same plan with other tuned values."""
        return replace(
            self,
            kernels=tuple(replace(k, config=configs.get(k.name, k.config)) for k in self.kernels),
        )

    def __str__(self) -> str:
        return dump(self)


def dump(plan: Plan) -> str:
    """The plan as text: which operators share a launch, in which skeleton, with which buffers."""
    launches = sum(len(step.launches) for step in (*plan.appends, *plan.usual))
    lines = [
        f"plan {plan.name} for {plan.target}, {plan.dtype}: {launches} launches",
        "  Z sequences, rows = all their queries: Z = B, rows = B * T, or packed documents (B = 1)",
    ]
    for step in (*plan.appends, *plan.steps):
        lines += ["", f"  {step.title}", *(f"    {line}" for line in _step_lines(plan, step))]
    return "\n".join(lines) + "\n"


def _step_lines(plan: Plan, step: Step) -> list[str]:
    lines = [f"{name} = {readable(plan, text)}" for name, text in step.sizes]
    for buffer in step.buffers:
        lines.append(f"buffer {readable(plan, str(buffer))}")
    if step.chunk:
        lines.append(
            f"in turns of {step.chunk} tiles out of {step.tiles}; count: the tiles of a turn"
        )
    for launch in step.launches:
        lines += [f"{'  ' if step.chunk else ''}{line}" for line in _launch_lines(plan, launch)]
    return lines


def _launch_lines(plan: Plan, launch: Launch) -> list[str]:
    kernel = plan.kernel(launch.kernel)
    tuned = [name for name, _ in kernel.config.constexprs]
    shared = [p.name for p in kernel.params if p.kind == "constexpr" and p.name not in tuned]
    borrowed = f"{' '.join(shared)} of {kernel.follows}, " if shared else ""
    grid = ", ".join(readable(plan, text) for text in launch.grid)
    computed = ", ".join(f"%{name}" for name in kernel.operators)
    given = "".join(f", {name}={value}" for name, value in launch.given)
    first = f"launch {kernel.name} ({kernel.skeleton}) for {computed}"
    return [
        *textwrap.wrap(first, LINE, subsequent_indent="    ", break_on_hyphens=False),
        f"  grid   [{grid}]",
        f"  config {borrowed}{kernel.config}{given}",
    ]


def readable(plan: Plan, text: str) -> str:
    """An expression of the driver in the words of the spec: B, T, S; kernel.BLOCK_T for a tunable."""

    def dim(match: re.Match[str]) -> str:
        return dict(plan.inputs)[match[1]][int(match[2])]

    text = re.sub(r"in_(\w+)\.shape\[(\d)\]", dim, text)
    text = re.sub(r'config\["(\w+)"\]\["(\w+)"\]', r"\1.\2", text)
    text = re.sub(r"\{(\w+)\}", r"\1", text)
    for attribute, word in (
        ("rows", "rows"),
        ("sequences", "Z"),
        ("keys", "S"),
        ("packed", "packed"),
    ):
        text = text.replace(f"batch.{attribute}", word)
    return text.replace("SCRATCH_BYTES", str(plan.scratch_bytes))
