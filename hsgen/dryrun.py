"""A plan on paper: the grids, buffers and arguments of one call, without tensors or a GPU.

Works out the expressions that the driver will; decides nothing.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hsgen.plan import Buffer, ElementType, Launch, Plan, Step

Value = object  # a number, an Array, or what an expression names on the way to one


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """A tensor of which only the shape exists, contiguous unless it has other strides."""

    shape: tuple[int, ...]
    itemsize: int
    strides: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def stride(self, dim: int) -> int:
        return self.strides[dim] if self.strides else math.prod(self.shape[dim + 1 :])

    def part(self, places: Sequence[int | None]) -> Array:
        """Of some dimensions one place, of others (None) all."""
        kept = [i for i in range(len(self.shape)) if i >= len(places) or places[i] is None]
        return replace(
            self,
            shape=tuple(self.shape[i] for i in kept),
            strides=tuple(self.stride(i) for i in kept),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """One launch: its grid, how often it is repeated, arguments by parameter, and constants that it gives."""

    kernel: str
    grid: tuple[int, ...]
    repeats: int
    arguments: Mapping[str, int | Array]
    given: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What one call allocates and launches; `others`: what one with a selection launches instead.

    `given`: bytes of what the caller brings.  `peak`: the most bytes that the buffers have at a time.
    """

    buffers: tuple[tuple[Buffer, Array], ...]
    launches: tuple[Launched, ...]
    given: int
    peak: int
    others: tuple[Launched, ...] = ()

    def launch(self, kernel: str) -> Launched:
        return next(x for x in (*self.launches, *self.others) if x.kernel == kernel)

    def of(self, *roles: str) -> int:
        """Bytes of all buffers of some roles."""
        return sum(array.bytes for buffer, array in self.buffers if buffer.role in roles)


def run(plan: Plan, *, tokens: int, batch: int = 1, packed: bool = False) -> DryRun:
    """One call with `batch` sequences of `tokens` queries on as many keys, all tensors contiguous.

    `packed`: they are documents that lie one behind another, and how long the longest is, is known.
    """
    names = _call(plan, batch, tokens, packed=packed)
    return _Run(plan=plan, names=names, given=_bytes(names)).run()


def gradients(plan: Plan, forward: Plan, *, tokens: int, batch: int = 1) -> DryRun:
    """One backward of such a call; `given` is what autograd kept of `forward`, and the output's gradient."""
    names = _call(plan, batch, tokens)
    made = {
        buffer.name: array for buffer, array in run(forward, tokens=tokens, batch=batch).buffers
    }
    o = made[forward.output]
    kept = {plan.output: o, "grad_o": o}
    for branch, name in plan.lse.items():
        kept[name] = made[forward.lse[branch]]
    chosen = {name: made[forward.selection[level]] for level, name in plan.selection.items()}
    kept |= {} if plan.either else chosen
    for name in plan.apart.values():
        kept[name] = replace(o, itemsize=4) if len(plan.apart) > 1 else o
    given = _bytes(names) + _bytes(kept)
    names |= chosen | kept | {f"grad_{name}": kept[name] for name in plan.lse.values()}
    return _Run(plan=plan, names=names, given=given).run()


def steps(plan: Plan, *, tokens: int, keys: int, batch: int, numbers: Mapping[str, int]) -> DryRun:
    """One step of `batch` sequences, with room for `keys` tokens each, behind one of `new_cache`;
    `given`: bytes of the cache and of what comes with the new tokens.

    `numbers`: by name, those that its driver has beside those of every driver.
    """
    assert plan.storage is not None, "a plan behind a cache"
    page = plan.cached.page if plan.cached else 0
    known = {**plan.sizes, "B": batch, "T": tokens, "S": tokens, "Z": batch}
    size = _itemsize(plan, "input")
    names: dict[str, Value] = {
        f"in_{name}": Array(shape=tuple(_dim(dim, known) for dim in dims), itemsize=size)
        for name, dims in plan.inputs
    }
    kept = {stream.name for stream in plan.storage.streams}
    names |= {f"new_{name}": names[f"in_{name}"] for name in kept}
    pages = -(-keys // page) if page else 0
    for stream in plan.storage.streams:
        *heads, dim = stream.dims
        if page:
            shape = (batch * pages, page, *stream.dims)
            names[f"in_{stream.name}"] = Array(shape=shape, itemsize=size)
            continue
        room = Array(shape=(batch, *heads, keys, dim), itemsize=size)
        order = (0, len(heads) + 1, *range(1, len(heads) + 1), len(heads) + 2)
        names[f"in_{stream.name}"] = Array(
            shape=tuple(room.shape[i] for i in order),
            strides=tuple(room.stride(i) for i in order),
            itemsize=size,
        )
    for level in plan.storage.levels:
        entries = max(1, keys // level.stride)
        shape = (batch, entries, level.heads, level.width)
        made = f"made_{level.name.replace('.', '_')}"
        names[made] = Array(shape=shape, itemsize=size)
        names[made.replace("made_", "count_", 1)] = entries
    names |= {
        name: Array(shape=tuple(_dim(dim, known) for dim in dims), itemsize=4)
        for name, dims in plan.brought.items()
    }
    count = Array(shape=(batch,), itemsize=4)
    given = _bytes(names)
    names |= {
        "lengths": count,
        "new": count,
        "batch": _Batch(
            table=Array(shape=(batch, 6), itemsize=4),
            sequences=batch,
            rows=batch * tokens,
            keys=keys,
            from_start=False,
            processors=PROCESSORS,
            pages=Array(shape=(batch, pages), itemsize=4),
            page_rows=page,
            pool=batch * pages,
        ),
        **_numbers_of(plan),
        **numbers,
    }
    return _Run(plan=plan, names=names, given=given).run()


def _numbers_of(plan: Plan) -> dict[str, Value]:
    """What every driver knows."""
    return {
        "config": {kernel.name: kernel.config.keywords() for kernel in plan.kernels},
        "SCRATCH_BYTES": plan.scratch_bytes,
        "tile_first": 0,
    }


def _bytes(names: Mapping[str, Value]) -> int:
    """Of all that is a tensor."""
    return sum(x.bytes for x in names.values() if isinstance(x, Array))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What the driver reads of a batch."""

    table: Array
    sequences: int
    rows: int
    keys: int
    packed: bool = False
    from_start: bool = True
    processors: int = 0
    pages: Array | None = None
    page_rows: int = 0
    pool: int = 0

    @property
    def squares(self) -> int:
        return math.isqrt(self.keys)

    def laid(self, table: Array, rows: int, keys: int) -> _Batch:
        return replace(self, table=table, rows=rows, keys=keys)

    def tile_of(self, x: Array, *_: int) -> Array:
        """A tile is of the tensor that it is cut from."""
        return x


def _call(plan: Plan, batch: int, tokens: int, *, packed: bool = False) -> dict[str, Value]:
    """The names that the driver's expressions start from."""
    total = batch * tokens if packed else tokens
    known = {**plan.sizes, "B": 1 if packed else batch, "T": total, "S": total, "Z": batch}
    size = _itemsize(plan, "input")
    inputs = {
        f"in_{name}": Array(shape=tuple(_dim(dim, known) for dim in dims), itemsize=size)
        for name, dims in plan.inputs
    }
    brought = {
        name: Array(shape=tuple(_dim(dim, known) for dim in dims), itemsize=4)
        for name, dims in plan.brought.items()
    }
    table = Array(shape=(batch, 6), itemsize=4)
    return {
        **inputs,
        **brought,
        "batch": _Batch(
            table=table,
            sequences=batch,
            rows=batch * tokens,
            keys=tokens,
            packed=packed,
            processors=PROCESSORS,
        ),
        **_numbers_of(plan),
    }


def _dim(dim: str, known: Mapping[str, int]) -> int:
    return int(dim) if dim.isdecimal() else known[dim]


def _itemsize(plan: Plan, dtype: ElementType) -> int:
    sizes = {"input": 4 if plan.dtype == "fp32" else 2, "e4m3": 1, "i64": 8}
    return sizes.get(dtype, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The steps, one after the other; each adds names for the next."""

    plan: Plan
    names: dict[str, Value]
    given: int
    buffers: list[tuple[Buffer, Array]] = field(default_factory=list[tuple[Buffer, Array]])
    launches: list[Launched] = field(default_factory=list[Launched])

    def run(self) -> DryRun:
        for step in (*self.plan.appends, *self.plan.usual):
            self._step(step)
        found = DryRun(
            buffers=tuple(self.buffers),
            launches=tuple(self.launches),
            given=self.given,
            peak=self._peak(),
        )
        self.launches.clear()
        for step in self.plan.steps:
            if step.of == "given":
                self._step(step)
        return replace(found, others=tuple(self.launches))

    def _peak(self) -> int:
        """What stays to the end, and what the step has beside it that has most."""
        sizes = {buffer.name: array.bytes for buffer, array in self.buffers}
        passing = [sum(sizes[name] for name in self.plan.passing(step)) for step in self.plan.usual]
        return sum(sizes.values()) - sum(passing) + max(passing, default=0)

    def _step(self, step: Step) -> None:
        for name, text in step.sizes:
            self.names[name] = evaluate(text, self.names)
        for buffer in step.buffers:
            shape = tuple(self._number(dim) for dim in buffer.dims)
            array = Array(shape=shape, itemsize=_itemsize(self.plan, buffer.dtype))
            self.names[buffer.name] = array
            self.buffers.append((buffer, array))
        repeats = 1
        if step.tiles and step.chunk:
            tiles, chunk = self._number(step.tiles), self._number(step.chunk)
            self.names["count"], repeats = chunk, -(-tiles // chunk)
        self.launches.extend(self._launch(launch, repeats) for launch in step.launches)

    def _launch(self, launch: Launch, repeats: int) -> Launched:
        kernel = self.plan.kernel(launch.kernel)
        own = dict(kernel.config.constexprs)
        names = [param.name for param in kernel.params if param.kind != "constexpr"]
        arguments = dict[str, int | Array]()
        for name, text in zip(names, launch.arguments, strict=True):
            value = evaluate(text, self.names)
            assert isinstance(value, int | Array), f"{launch.kernel}: {name} is {text}"
            arguments[name] = value
        return Launched(
            kernel=launch.kernel,
            grid=tuple(self._number(text.format_map(own)) for text in launch.grid),
            repeats=repeats,
            arguments=arguments,
            given={name: self._number(text) for name, text in launch.given},
        )

    def _number(self, text: str) -> int:
        value = evaluate(text, self.names)
        assert isinstance(value, int), f"{text} is not a number"
        return value


# --- the expressions of a plan: a corner of Python, so that a driver can hold them as they are

ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
}
FUNCTIONS: Mapping[str, Callable[..., int]] = {"min": min, "max": max}
PROCESSORS = 132  # of an H100, for kernels that run one program on each
READABLE = (
    *("shape", "stride", "table", "sequences", "rows", "keys", "packed", "from_start"),
    *("pages", "page_rows", "pool", "processors", "squares", "tile_of", "laid", "bit_length"),
)  # attributes


def evaluate(text: str, names: Mapping[str, Value]) -> Value:
    """The value of one expression of a plan.

    Raises:
        ValueError: a construct that plans do not use.
    """
    return _value(ast.parse(text, mode="eval").body, {**FUNCTIONS, **names})


def _value(node: ast.expr, names: Mapping[str, Value]) -> Value:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.Attribute(value=of, attr=attr) if attr in READABLE:
            return getattr(_value(of, names), attr)
        case ast.Subscript(value=of, slice=ast.Tuple(elts=elts)):
            array = _value(of, names)
            assert isinstance(array, Array), f"{ast.unparse(node)} is no part of a tensor"
            return array.part([x.value if isinstance(x, ast.Constant) else None for x in elts])  # type: ignore[misc]
        case ast.Subscript(value=of, slice=key):
            return _value(of, names)[_value(key, names)]  # type: ignore[index]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](_value(left, names), _value(right, names))  # type: ignore[arg-type]
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Call(func=function, args=arguments, keywords=[]):
            return _value(function, names)(*(_value(each, names) for each in arguments))  # type: ignore[operator]
        case _:
            raise ValueError(f"a plan has no such expression: {ast.unparse(node)}")
