"""Attention of a few rows: programs share the keys of a row, and its parts are merged.

One row of one sequence has too few programs to fill a GPU, so each walks a share of the keys and leaves a
part of the softmax; shares follow from the shapes of a call, so equal calls have equal bits (Flash-Decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hsgen import rows
from hsgen.kernels import tunables
from hsgen.plan import Buffer, Config, Kernel, Launch, Param, Step
from hsgen.rows import SEQ, Chunk, RowsContext, chunks, count, pointer

MOST = 64  # shares of a row
SHARE_KEYS = 128  # of a share, at least
FILLED = 2  # programs that a processor should have, about
TURNS = 16  # the same where shares are long: so many that none waits long for the last
LONG_SHARE = 2048  # keys of one whose parts are merged
SCORED = 4  # times SHARE_KEYS: the same of scores
MERGED = 16  # parts that a program of the merge takes

ITEMS = count("items", "rows * splits")
SPLITS = count("splits", "parts of a row")
PART_LSE = pointer("PART_LSE", "f32", "f32[Hq, items]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitsContext(rows.InTurn):
    """Everything `merge.py.jinja` reads to merge the parts that shares of the keys gave.

    `head_dim` of a value; 0: of log-sum-exps alone.
    """

    name: str
    header: str = ""
    pieces: str = ""
    head_dim: int
    heads: int
    sink: bool = False
    turn: rows.Turn | None = None
    how: str = "shares"

    @property
    def summary(self) -> str:
        return "one softmax from the parts that shares of its keys gave."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        outputs = rows.OUTPUTS if self.head_dim else rows.OUTPUTS[-4:]
        part_o = pointer("PART_O", "f32", f"f32[Hq, items, {self.head_dim}]")
        return (
            *((part_o,) if self.head_dim else ()),
            PART_LSE,
            *((rows.SINK,) if self.sink else ()),
            *rows.gates_of(self.turn),
            *outputs,
            ITEMS,
            SPLITS,
            *SEQ[:1],
            *tunables("BLOCK_H", "BLOCK_P"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def shares(
    name: str, *, sms: int, rows_of: str, heads: int, keys: str, long: str = "LONG_SHARE"
) -> tuple[tuple[str, str], ...]:
    """The sizes that say how many programs share the keys of a row; the last is `splits_` and the name.

    Enough to fill all processors, none with next to nothing to do; of very many keys, for several turns.

    Args:
        name: Of the kernel.
        sms: Of the target.
        rows_of: Times `heads` the programs that there are anyway.
        heads: Programs of a row or a tile of rows.
        keys: That a row may walk, as an expression.
        long: Keys of a share where there are programs enough; fewer where nothing merges shares.
    """
    return (
        (f"there_{name}", f"{rows_of} * {heads}"),
        (f"fills_{name}", f"({FILLED * sms} + there_{name} // 2) // there_{name}"),
        (f"filled_{name}", f"min(fills_{name}, {keys} // SHARE_KEYS)"),
        (f"turns_{name}", f"min({TURNS * sms} // there_{name}, {keys} // {long})"),
        (f"wanted_{name}", f"max(filled_{name}, turns_{name})"),
        (f"splits_{name}", f"max(1, min({MOST}, wanted_{name}))"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A branch whose parts are merged with those of others.

    `name`: of the kernel that leaves them; `step`: what the driver calls them all; `outputs`: the
    log-sum-exp and its strides; `sink`: the caller's tensor, empty if there is none.
    """

    name: str
    branch: str
    step: str
    column: int
    sink: str
    outputs: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    makes: tuple[str, ...]

    @property
    def lse(self) -> tuple[str, str, str]:
        """What tells of the log-sum-exps of its parts: where they are, items, and parts of a row."""
        return f"part_lse_{self.name}", f"items_{self.name}", f"splits_{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A branch in a merge of several, by the number of its arguments."""

    index: int
    name: str
    column: int
    sink: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchesContext:
    """Everything `merge.py.jinja` reads to merge the parts of branches, each times its gate, in one sum."""

    name: str
    header: str = ""
    pieces: str = ""
    head_dim: int
    heads: int
    branches: tuple[Merged, ...]
    how: str = "branches"

    @property
    def summary(self) -> str:
        return (
            "the outputs of branches, each times its gate, from the parts that shares of keys gave."
        )

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            *(param for each in self.branches for param in self._parts(each)),
            *rows.gates_of(rows.Gated(column=0, branches=len(self.branches), first=True)),
            *rows.OUTPUTS[:4],
            *(
                count(f"lse_{of}", f"LSE0 and those after it: {word} stride")
                for of, word in (("b", "batch"), ("h", "head"), ("t", "token"))
            ),
            *SEQ[:1],
            *tunables("BLOCK_H"),
            *(
                Param(name=f"BLOCK_P{each.index}", kind="constexpr", comment="its parts, at most")
                for each in self.branches
            ),
        )

    def _parts(self, of: Merged) -> tuple[Param, ...]:
        i = of.index
        return (
            pointer(f"PART_O{i}", "f32", f"f32[Hq, items, {self.head_dim}] {of.name}"),
            pointer(f"PART_LSE{i}", "f32", "f32[Hq, items]"),
            *((pointer(f"SINK{i}", "input", "[Hq]"),) if of.sink else ()),
            pointer(f"LSE{i}", "f32", "f32[B, Hq, T]"),
            count(f"items{i}", "rows * splits"),
            count(f"splits{i}", "parts of a row"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def merge(
    parts: tuple[Part, ...], *, heads: int, head_dim: int, gates: str, total: str, o: Buffer
) -> tuple[Kernel, Step]:
    """One launch that merges the parts of all branches.  `gates`: the caller's tensor; `total`: the node."""
    context = BranchesContext(
        name="merge_branches",
        head_dim=head_dim,
        heads=heads,
        branches=tuple(
            Merged(index=i, name=part.branch, column=part.column, sink=bool(part.sink))
            for i, part in enumerate(parts)
        ),
    )
    first = parts[0]
    most = tuple((f"BLOCK_P{i}", MOST) for i in range(len(parts)))
    kernel = Kernel(
        name=context.name,
        skeleton="merge",
        context=context,
        config=Config(constexprs=(("BLOCK_H", 1), *most), num_warps=4, num_stages=1),
        operators=(*(name for part in parts for name in part.makes), total),
    )
    given = f"in_{gates}"
    sinks = tuple(part.sink for part in parts if part.sink)
    packed = f"0 if batch.packed else {given}.stride(0)"
    strides = (
        f"0 if batch.packed else {o.name}.stride(0)",
        f"{o.name}.stride(1)",
        f"{o.name}.stride(2)",
    )
    widest = ", ".join(f"padded_{part.name}" for part in parts)
    arguments = tuple(
        argument
        for part in parts
        for argument in (
            f"part_o_{part.name}",
            part.lse[0],
            *((f"in_{part.sink}",) if part.sink else ()),
            part.outputs[0],
            *part.lse[1:],
        )
    )
    step = Step(
        title="merge branches",
        needs=(*(part.step for part in parts), gates, *sinks),
        makes=kernel.operators,
        sizes=(
            ("widest", f"max({widest})" if len(parts) > 1 else widest),
            ("merged", f"max(1, min({rows.next_power(heads)}, {MERGED} // widest))"),
        ),
        buffers=(o, *(buffer for part in parts for buffer in part.buffers)),
        launches=(
            Launch(
                kernel=context.name,
                grid=(
                    "batch.sequences",
                    f"({heads} + merged - 1) // merged",
                    "batch.rows // batch.sequences",
                ),
                arguments=(
                    *arguments,
                    given,
                    packed,
                    *(f"{given}.stride({i})" for i in (1, 2, 3)),
                    o.name,
                    *strides,
                    *first.outputs[1:],
                    "batch.table",
                ),
                given=(
                    ("BLOCK_H", "merged"),
                    *((f"BLOCK_P{i}", f"padded_{part.name}") for i, part in enumerate(parts)),
                ),
            ),
        ),
    )
    return kernel, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A branch in a launch of several: its loops, whose workers are told, and what calls them."""

    rows: RowsContext
    arguments: tuple[str, ...]  # names of the kernel's parameters, in the order of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideContext:
    """Everything `beside.py.jinja` reads to walk the keys of several branches in one launch."""

    name: str
    header: str = ""
    pieces: str = ""
    branches: tuple[Beside, ...]
    params: tuple[Param, ...]

    @property
    def by_row(self) -> bool:
        """Whether some branch has a program a row, where others have one a sequence."""
        return any(branch.rows.one_token for branch in self.branches)

    @property
    def summary(self) -> str:
        return "branches whose workers lie side by side."

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def _half(config: Config) -> Config:
    """Steps of half the keys: the compiler gives the keys of each branch a place of their own."""
    values = dict(config.constexprs)
    values["BLOCK_N"] = max(16, values["BLOCK_N"] // 2)
    return replace(config, constexprs=tuple(values.items()))


def side_by_side(
    kernels: Sequence[Sequence[Param]], launches: Sequence[Launch]
) -> tuple[dict[str, Param], dict[str, str], list[list[str]]]:
    """Parameters of one kernel that does what several do, and what its launch gives.

    What all call by one name and get alike is one; the number of a kernel tells the others apart.  The
    last are the names of each kernel's own, in their order, its tunables among them, which stay behind.
    """
    told = [
        dict(zip((p.name for p in own if p.kind != "constexpr"), launch.arguments, strict=True))
        for own, launch in zip(kernels, launches, strict=True)
    ]
    params: dict[str, Param] = {}
    arguments: dict[str, str] = {}
    names: list[list[str]] = []
    for i, own in enumerate(kernels):
        names.append([])
        for p in own:
            alike = p.kind == "constexpr" or all(
                each.get(p.name, told[i][p.name]) == told[i][p.name] for each in told
            )
            name = p.name if alike else f"{p.name}{i}"
            names[-1].append(name)
            if p.kind != "constexpr":
                params[name] = replace(p, name=name)
                arguments[name] = told[i][p.name]
    return params, arguments, names


def beside(kernels: tuple[Kernel, ...], steps: tuple[Step, ...]) -> tuple[Kernel, Step]:
    """One launch in place of the last one of each step.  `kernels`: those that these launch.

    Arguments that all have under one name are one; the number of a branch tells the others apart.
    """
    launches = tuple(step.launches[-1] for step in steps)
    contexts: list[RowsContext] = []
    for kernel in kernels:
        assert isinstance(kernel.context, RowsContext)
        contexts.append(kernel.context)
    params, arguments, names = side_by_side([x.params for x in contexts], launches)
    branches: list[Beside] = []
    for i, context in enumerate(contexts):
        if context.one_token:
            alone = [p.name for p in context.params].index("BLOCK_M")
            names[i][alone] = str(rows.least_rows(context.pitch))
        workers = count(f"workers{i}", f"programs that share a row of {context.name}")
        params[workers.name] = workers
        arguments[workers.name] = launches[i].grid[-1]
        setup = tuple(line for line in context.setup if line not in rows.WORKER)
        called = (*names[i], "worker", workers.name)
        branches.append(Beside(rows=replace(context, setup=setup), arguments=called))
    params |= {p.name: p for x in contexts for p in x.params if p.kind == "constexpr"}
    name = "_".join(("attend", *(x.name.removeprefix("attend_") for x in contexts)))
    made = tuple(branches)
    kernel = Kernel(
        name=name,
        skeleton="beside",
        context=BesideContext(name=name, branches=made, params=tuple(params.values())),
        config=_half(kernels[0].config),
        operators=tuple(name for kernel in kernels for name in kernel.operators),
        by_slot=any(kernel.by_slot for kernel in kernels),
    )
    by_row = [launch.grid for launch, x in zip(launches, contexts, strict=True) if x.one_token]
    step = Step(
        title=", ".join(step.title for step in steps),
        needs=tuple(dict.fromkeys(name for step in steps for name in step.needs)),
        makes=tuple(name for step in steps for name in step.makes),
        buffers=tuple(buffer for step in steps for buffer in step.buffers),
        sizes=tuple(size for step in steps for size in step.sizes),
        launches=(
            *(launch for step in steps for launch in step.launches[:-1]),
            Launch(
                kernel=kernel.name,
                grid=(
                    *(by_row or [launches[0].grid])[0][:-1],
                    " + ".join(launch.grid[-1] for launch in launches),
                ),
                arguments=tuple(arguments.values()),
            ),
        ),
    )
    return kernel, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What the step needs to know of a branch: names in the driver, arguments, numbers of the spec."""

    name: str
    title: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    buffers: tuple[Buffer, ...]  # of what is merged
    arguments: tuple[str, ...]  # of the kernel that attends, up to its outputs
    more: tuple[str, ...]  # and behind them
    outputs: tuple[
        str, ...
    ]  # of the merge: sink and gates if there are any, o and lse, and their strides
    query_heads: int
    grid: tuple[str, str]  # tiles by heads
    sizes: tuple[tuple[str, str], ...]  # that the grid needs
    alone: bool  # a tile is one row
    keys: str  # that a row may walk, as an expression
    sms: int
    sink: bool
    turn: rows.Turn | None
    lists: tuple[
        tuple[Kernel, Launch, tuple[Buffer, ...]], ...
    ] = ()  # what makes the list that is walked, the first of the buffers
    apart: bool = False  # its parts are merged with those of others, elsewhere
    computes: tuple[str, ...] = ()  # the nodes, where they are not what it makes
    logits: tuple[Buffer, ...] = ()  # that it leaves


def plan(
    context: RowsContext, branch: Branch, tiles: Callable[[RowsContext], Config]
) -> tuple[tuple[Kernel, ...], Step]:
    """The kernels of one branch and the step that launches them.  `context`: as if it were not shared."""
    name, width = context.name, sum(c.width for c in context.v_chunks)
    split = rows.with_split(context)
    kernels = (
        *(kernel for kernel, _, _ in branch.lists),
        Kernel(
            name=name,
            skeleton="rows",
            context=split,
            config=tiles(split),
            operators=branch.computes or branch.makes,
            by_slot=context.one_token and not context.united,
        ),
    )
    splits, items = f"splits_{name}", f"items_{name}"
    part_o, part_lse = f"part_o_{name}", f"part_lse_{name}"
    heads = str(branch.query_heads)
    # of a row's parts: its output lies head by head, a row's parts side by side
    o = (part_o, "0", str(width), f"{items} * {width}") if width else ()
    found = Buffer(name=part_o, dtype="f32", dims=(heads, items, str(width)), role="list")
    there = "batch.rows" if branch.alone else "batch.sequences"
    step = Step(
        title=branch.title,
        needs=branch.needs,
        makes=branch.makes,
        sizes=(
            *branch.sizes,
            *shares(
                name, sms=branch.sms, rows_of=there, heads=int(branch.grid[1]), keys=branch.keys
            ),
            (items, f"batch.rows * {splits}"),
            (f"padded_{name}", f"1 << ({splits} - 1).bit_length()"),
        ),
        buffers=(
            *(buffer for _, _, buffers in branch.lists for buffer in buffers),
            *((found,) if width else ()),
            Buffer(name=part_lse, dtype="f32", dims=(heads, items), role="list"),
            *branch.logits,
            *branch.buffers,
        ),
        launches=(
            *(launch for _, launch, _ in branch.lists),
            Launch(
                kernel=name,
                grid=(*branch.grid, splits),
                arguments=(*branch.arguments, *o, part_lse, "0", items, "1", *branch.more),
            ),
        ),
    )
    return (kernels, step) if branch.apart else _merged(kernels, step, branch, name, width)


def _merged(
    kernels: tuple[Kernel, ...], step: Step, branch: Branch, name: str, width: int
) -> tuple[tuple[Kernel, ...], Step]:
    """The same with a launch that merges the parts."""
    context = SplitsContext(
        name=f"merge_{name}",
        head_dim=width,
        heads=branch.query_heads,
        sink=branch.sink,
        turn=branch.turn,
    )
    kernel = Kernel(
        name=context.name,
        skeleton="merge",
        context=context,
        config=Config(constexprs=(("BLOCK_H", 1), ("BLOCK_P", MOST)), num_warps=4, num_stages=1),
        operators=branch.makes,
    )
    parts, merged, heads = f"padded_{name}", f"merged_{name}", branch.query_heads
    launch = Launch(
        kernel=context.name,
        grid=(
            "batch.sequences",
            f"({heads} + {merged} - 1) // {merged}",
            "batch.rows // batch.sequences",
        ),
        arguments=(
            *((f"part_o_{name}",) if width else ()),
            f"part_lse_{name}",
            *branch.outputs,
            f"items_{name}",
            f"splits_{name}",
            "batch.table",
        ),
        given=(("BLOCK_H", merged), ("BLOCK_P", parts)),
    )
    size = f"max(1, min({rows.next_power(heads)}, {MERGED} // {parts}))"
    return (*kernels, kernel), replace(
        step, sizes=(*step.sizes, (merged, size)), launches=(*step.launches, launch)
    )
