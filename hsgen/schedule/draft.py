"""The plan while it grows, and what its parts ask of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeGuard

from hsgen import cols_streams, configs, rows, splits, streams
from hsgen.axes import Tiling
from hsgen.configs import DType
from hsgen.graph import (
    Attend,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Op,
    Permute,
    Pool,
    PoolRows,
    Recall,
    Rotate,
    Round,
    Score,
    Select,
    SelectSet,
    befores,
    block_of,
    short_last,
)
from hsgen.kernels import WHOLE
from hsgen.plan import Buffer, Cached, Config, Context, Kernel, Launch, Skeleton, Step
from hsgen.rows import Entries
from hsgen.schedule import text
from hsgen.target import Target

SCRATCH_BYTES = 128 << 20
SORT_LIMIT = 4096  # pairs that the index kernel sorts in registers
SORTED = 2048  # pairs up to which it does so sooner than rows set bits
LATENT_DIMS = 1024  # of a key that holds its value
LEAST_EIGHT = 32  # numbers of e4m3 that a dot takes at a time
TILE_OF_HEADS = 64  # heads of a token that fill a tile: no other row is there to share a list with


Order = Literal["rows", "keys"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A branch's turn in a sum or a union of branches, by the names of nodes."""

    reads: str | None  # gates, or at the last turn the sink of a union
    total: str
    before: str | None  # the branch that must have run
    last: bool
    how: rows.Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a branch of a step leaves for a choice, by the driver's names."""

    kernel: str  # that leaves it
    step: str  # what makes it
    buffer: str
    length: str  # of a row
    planes: int

    @property
    def lse(self) -> tuple[str, str, str]:
        """The log-sum-exps of its parts: where they are, items, and parts of a row."""
        return f"part_lse_{self.kernel}", f"items_{self.kernel}", f"splits_{self.kernel}"


@dataclass(slots=True)
class Draft:
    """The plan while it grows."""

    graph: Graph
    target: Target
    dtype: DType
    orders: Mapping[str, Order] = field(default_factory=dict[str, Order])
    kernels: list[Kernel] = field(default_factory=list[Kernel])
    steps: list[Step] = field(default_factory=list[Step])
    turns: Mapping[str, Turn] = field(
        default_factory=dict[str, Turn]
    )  # by branch, where gates or one softmax combine
    kept: bool = False  # the outputs of gated branches, which are weighed at the end
    becomes: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # by branch that is weighed where it lies, the sum that it becomes
    whole: bool = (
        False  # rounded vectors are kept as the caller's are, for gradients to be made of them
    )
    cached: Cached | None = None
    appends: list[Step] = field(default_factory=list[Step])  # to the cache
    parts: dict[str, splits.Part] = field(
        default_factory=dict[str, splits.Part]
    )  # by branch, those of steps that one launch merges
    tiling: Tiling | None = None  # entries are its tiles, which the graph then has in slots
    merged: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # nodes that the graph then has not, and which each is one with
    left: dict[str, Left] = field(
        default_factory=dict[str, "Left"]
    )  # by selection, what a branch leaves of the scores it is made of

    @property
    def steps_alone(self) -> bool:
        """Whether a call has a few rows of each sequence."""
        return self.cached is not None and self.cached.rows == "few"

    @property
    def page(self) -> int:
        """Tokens of a page of the cache; 0: they lie in one piece."""
        return self.cached.page if self.cached else 0

    def seq(self, context: rows.RowsContext) -> tuple[str, ...]:
        """What says where sequences lie, and where their pages."""
        return (*rows.page_arguments(context.page), *text.SEQ)

    @property
    def row_tiles(self) -> configs.RowTiles:
        return configs.RowTiles(target=self.target, dtype=self.dtype)

    def tiles(
        self, context: rows.RowsContext, *, limit: int, most: int = 128, block: int | None = None
    ) -> Config:
        """Tiles of an attend, whose keys come in a stream where they can."""
        if self.cached is None and streams.possible(context, self.target, self.dtype):
            config = streams.tiles(context, self.target, most=most, block=block)
            if config is not None:
                return config
        return self.row_tiles.attend(context, limit=limit, most=most, block=block)

    def picks(self, context: rows.RowsContext) -> bool:
        """Whether picked tokens can be gathered for tiles of no more rows than a word has bits."""
        if self.cached is not None or not streams.possible(context, self.target, self.dtype):
            return False
        return streams.tiles(context, self.target, most=rows.PICKING, block=rows.MARKED) is not None

    def score_tiles(self, context: rows.RowsContext) -> Config:
        """Tiles of a score, whose keys come in a stream where they can."""
        if self.cached is None and streams.possible(context, self.target, self.dtype):
            config = streams.score_tiles(context, self.target)
            if config is not None:
                return config
        return self.row_tiles.score(context)

    def gather_tiles(self, context: rows.RowsContext) -> Config:
        """Tiles of an attend to a row's own list, whose latents several warps gather where they can."""
        if self.cached is None and streams.gathered(context, self.target, self.dtype):
            config = streams.latent_config(context, self.target)
            if config is not None:
                return config
        return self.row_tiles.attend(context, tokens=1)

    def attend(self, context: rows.RowsContext, config: Config, *nodes: str) -> None:
        """A kernel that attends, in the skeleton that its tiles are of."""
        kernel = Kernel(
            name=context.name,
            skeleton="rows",
            context=context,
            config=config,
            operators=nodes,
            by_slot=context.one_token,
        )
        self.kernels.append(streams.of_tiles(kernel))

    def add(self, kernels: tuple[Kernel, ...], steps: tuple[Step, ...]) -> None:
        """Kernels and steps that were planned apart."""
        self.kernels += (streams.of_tiles(kernel) for kernel in kernels)
        self.steps += (
            replace(step, launches=tuple(map(self.launch, step.launches))) for step in steps
        )

    def launch(self, launch: Launch) -> Launch:
        """A launch as its kernel wants it."""
        (kernel,) = (k for k in self.kernels if k.name == launch.kernel)
        match kernel.context:
            case streams.StreamsContext() as context:
                return streams.launch(launch, context, kernel.follows or kernel.name)
            case cols_streams.ColsStreamsContext() as context:
                return cols_streams.launch(launch, context)
            case _:
                return launch

    @property
    def row_tiles_of_blocks(self) -> configs.RowTiles:
        """Of blocks of rows, whose queries are kept in float32."""
        return configs.RowTiles(target=self.target, dtype="fp32")

    @property
    def shape(self) -> rows.Shape:
        sizes = self.graph.sizes
        return rows.Shape(
            query_heads=sizes["Hq"],
            kv_heads=sizes["Hkv"],
            qk=sizes["Dqk"],
            v=sizes["Dv"],
            causal=self.graph.meta.causal,
            precision=self.target.dot_precision,
        )

    @property
    def held(self) -> int:
        """Bytes of a row of queries and outputs, as if of 16 bits: what scratch and lists are a share of."""
        return self.shape.query_heads * (self.shape.qk + self.shape.v) * 2

    def shape_of(self, op: Attend) -> rows.Shape:
        return replace(self.shape, latent=bool(op.latent))

    def kernel(
        self,
        skeleton: Skeleton,
        context: Context,
        config: Config,
        *nodes: str,
        follows: str | None = None,
        by_slot: bool = False,
    ) -> str:
        self.kernels.append(
            Kernel(
                name=context.name,
                skeleton=skeleton,
                context=context,
                config=config,
                operators=nodes,
                follows=follows,
                by_slot=by_slot,
            )
        )
        return context.name

    def in_eight(self, node: Node) -> bool:
        """Whether rounded vectors are kept and multiplied as e4m3 numbers, for units that take such.

        Those that read them must be scores that sum heads, which a factor of a vector may follow, and dots
        take 32 numbers at a time.  Tensors in float32 keep sums of 24 bits.
        """
        if not (isinstance(node.op, Round) and node.op.dtype in ("fp8", "fp8_unscaled")):
            return False
        summed = ("relu_weighted", "relu_sum")
        users = [user.op for user in self.graph.users(node.name)]
        return (
            not self.whole
            and self.target.dots_of_e4m3
            and self.dtype != "fp32"
            and self.size(node.type.dims[-1]) % LEAST_EIGHT == 0
            and all(isinstance(op, Score) and op.form in summed for op in users)
        )

    def power(self, node: Node) -> str:
        """The buffer of what vectors are times: powers of two of e4m3, scales of whole numbers; empty where
        there is nothing.
        """
        assert isinstance(node.op, Round)
        if node.op.dtype in WHOLE:
            return f"{text.buffer(node.name)}_scale"
        return f"{text.buffer(node.name)}_power" if node.op.dtype == "fp8" else ""

    def entries(self, op: Score | Select | Attend | Pool | Map, level: str) -> Entries:
        return Entries(size=self.reach(op, level), stride=op.stride, short=self.short(level))

    def reach(self, op: Score | Select | SelectSet | Attend | Pool | Map, level: str) -> int:
        """Tokens from an entry's place to its end: those before its place are only pooled."""
        return op.size - befores(self.graph).get(level, 0)

    def short(self, level: str) -> bool:
        """Whether the level's last entry may be short: also if causal, where rows choose together."""
        pools = (n for n in self.graph.nodes() if isinstance(n.op, Pool) and n.op.level == level)
        if any(self.tiers_of(pool) for pool in pools):
            return True
        asks = any(_asks(n.op) and n.op.level == level for n in self.graph.nodes())
        return short_last(self.graph, level, causal=asks is False and self.shape.causal)

    def finished(self, node: Node) -> tuple[Node, ...]:
        """A pool, and what norms, rotates and rounds its entries in turn."""
        chain = [node]
        while nexts := [
            x for x in self.graph.users(chain[-1].name) if isinstance(x.op, Norm | Rotate | Round)
        ]:
            assert len(nexts) == len(self.graph.users(chain[-1].name)) == 1, "keys end in one way"
            chain.append(nexts[0])
        return tuple(chain)

    def tiers_of(self, pool: Node) -> tuple[str, ...]:
        """The branches that read its means in a tier: a row may see one of fewer tokens."""
        users = self.graph.users(pool.name)
        return tuple(x.name for x in users if isinstance(x.op, Attend) and x.op.over == "tiers")

    def pool_of(self, name: str) -> Node | None:
        """The pool behind a level's keys, if they are pooled."""
        node = self.graph[name]
        while isinstance(node.op, Norm | Rotate | Round):
            node = self.graph[node.inputs[0]]
        return node if isinstance(node.op, Pool) else None

    def block(self, selection: Node) -> int:
        """Rows of a block that choose together; 0 where each chooses for itself."""
        if isinstance(selection.op, Recall):
            return selection.op.block or 0
        return block_of(selection.type.dims[1]) or 0

    def tensors(self, node: Node, op: Attend) -> tuple[str, ...]:
        """Queries, keys and values, of a latent the keys are all; the ways that sequences take; biases."""
        read = ("q", *node.inputs[1 : 2 if op.latent else 3])
        ways: tuple[str, ...] = ()
        if op.pattern and (op.pattern.by_way or op.pattern.by_head):
            ways = (text.input_of(node.inputs[3]),)
        tensors = (*(argument for name in read for argument in self.tensor(name)), *ways)
        bias = self.bias(node)
        return (*tensors, *(text.strides(text.input_of(bias)) if bias else ()))

    def bias(self, node: Node) -> str | None:
        """The biases of keys, which an attend adds to its logits."""
        assert isinstance(node.op, Attend)
        if not node.op.biased:
            return None
        roles = {x.name: x.op.role for x in self.graph.operands(node) if isinstance(x.op, Input)}
        (name,) = (name for name, role in roles.items() if role == "bias")
        return name

    @property
    def wide(self) -> bool:
        """Whether outputs of branches are kept in float32: where there are several."""
        return self.kept and sum(isinstance(x.op, Attend) for x in self.graph.nodes()) > 1

    def turn(self, node: Node) -> rows.Turn | None:
        """Of a branch that is one of several."""
        if self.kept:
            return rows.Kept(wide=self.wide)
        turn = self.turns.get(node.name)
        return turn and turn.how

    def sink(self, node: Node) -> str | None:
        """The sink of an attend, or at the last turn that of a union."""
        assert isinstance(node.op, Attend)
        turn = self.turns.get(node.name)
        if turn is not None and isinstance(turn.how, rows.Joined):
            return turn.reads
        return f"{node.op.branch}_sink" if node.op.sink else None

    def needs(self, node: Node, *names: str) -> tuple[str, ...]:
        """What an attend reads: `names`, and at a turn the gates or the sink, and what is there before."""
        turn = self.turns.get(node.name)
        if turn is None:
            return names
        return (*names, *(name for name in (turn.reads, turn.before) if name))

    def makes(self, node: Node) -> tuple[str, ...]:
        """The nodes that an attend computes: its own, and the total if it is the last one's turn."""
        turn = self.turns.get(node.name)
        total = (turn.total, *self.lse_of(self.graph[turn.total])) if turn and turn.last else ()
        merged = (name for name, one in self.merged.items() if one == node.name)
        return (node.name, *self.lse_of(node), *total, *merged)

    def output(self, node: Node) -> str:
        """The buffer that an attend writes: its own, or that of the total."""
        turn = self.turns.get(node.name)
        return text.buffer(turn.total if turn else self.becomes.get(node.name, node.name))

    def log_sum_exp(self, node: Node) -> str:
        """The buffer of the log-sum-exp that an attend writes: its own, or that of a union."""
        turn = self.turns.get(node.name)
        if turn is not None and isinstance(turn.how, rows.Joined):
            node = self.graph[turn.total]
        if not self.lse_of(node):  # it becomes another, whose that is
            node = self.graph[self.becomes[node.name]]
        return text.buffer(self.lse_of(node)[0])

    def output_buffers(self, node: Node) -> tuple[Buffer, ...]:
        """A branch's output, unless another branch brought it to life, and so its log-sum-exp."""
        rows_of = ("in_q.shape[0]", "in_q.shape[1]", str(self.shape.query_heads))
        lse_dims = ("in_q.shape[0]", str(self.shape.query_heads), "in_q.shape[1]")
        o = Buffer(
            name=self.output(node),
            dtype="f32" if self.wide else "input",
            dims=(*rows_of, str(self.shape.v)),
            role="output",
        )
        lse = Buffer(name=self.log_sum_exp(node), dtype="f32", dims=lse_dims, role="output")
        turn = self.turn(node)
        if turn is None or turn.first:
            return (o, lse)
        return (lse,) if isinstance(turn, rows.Gated) else ()

    def outputs(self, node: Node) -> tuple[str, ...]:
        """What an attend writes, behind the sink and the gates that it may read."""
        sink, turn = self.sink(node), self.turns.get(node.name)
        read = (text.input_of(sink),) if sink else ()
        if turn is not None and turn.reads and isinstance(turn.how, rows.Gated):
            x = text.input_of(turn.reads)
            read += (*text.strides(x), f"{x}.stride(3)")
        o, lse = self.output(node), self.log_sum_exp(node)
        return (*read, *text.strides(o), *text.strides(lse))

    def lse_of(self, node: Node) -> tuple[str, ...]:
        return tuple(u.name for u in self.graph.users(node.name) if isinstance(u.op, LogSumExp))

    def pooled_entries(self, keys: str) -> Entries:
        pool = self.pool_of(keys)
        assert pool is not None, "a pooled branch reads pooled keys"
        assert isinstance(pool.op, Pool)
        return self.entries(pool.op, pool.op.level)

    def chosen(self, node: Node) -> Node | None:
        """The selection that a branch over pooled entries is kept to."""
        return next((x for x in self.graph.operands(node)[3:4] if isinstance(x.op, Select)), None)

    def slots(self, selection: Node) -> str:
        """How long lists of blocks of rows are, as an expression."""
        if isinstance(selection.op, SelectSet):
            return f"width_{selection.op.level}"
        return str(self.width(selection))

    def size(self, dim: str) -> int:
        return int(dim) if dim.isdigit() else self.graph.sizes[dim]

    def width(self, selection: Node) -> int:
        assert isinstance(selection.op, Select | Recall)
        assert selection.op.width is not None, "lists that are taken over are brought"
        return selection.op.width

    def tensor(self, name: str) -> tuple[str, ...]:
        """A tensor and its batch, token and head strides."""
        node = self.graph[name]
        if isinstance(node.op, Permute):
            x = text.buffer(name)
            return x, "0", f"{x}.stride(1)", f"{x}.stride(2)"
        turned = isinstance(node.op, Rotate) and block_of(node.type.dims[1])
        if turned or isinstance(node.op, PoolRows):
            heads, dim = (self.size(of) for of in node.type.dims[2:])
            return text.buffer(name), "0", str(heads * dim), str(dim)
        if pool := self.pool_of(name):
            assert isinstance(pool.op, Pool)
            buffer, source = text.buffer(name), self.graph[pool.inputs[0]]
            of_heads = len(source.type.dims) - bool(pool.op.series) == 4
            heads = self.size(source.type.dims[2]) if of_heads else 1
            dim = self.size(source.type.dims[-1]) * (2 if pool.op.how == "minmax" else 1)
            if self.tiers_of(pool):  # which has a turn's heads
                row = f"count * {dim}"
                return buffer, f"count_{text.safe(name)} * {row}", row, str(dim)
            row = heads * dim
            return buffer, f"count_{text.safe(name)} * {row}", str(row), str(dim)
        x = text.input_of(name) if isinstance(node.op, Input) else text.buffer(name)
        if self.page and node.type.dims[:2] == ("B", "S"):
            return x, "0", f"{x}.stride(1)", f"{x}.stride(2)" if len(node.type.dims) == 4 else "0"
        if len(node.type.dims) == 3:
            return x, f"0 if batch.packed else {x}.stride(0)", f"{x}.stride(1)", "0"
        return text.strides(x)


def _asks(op: Op) -> TypeGuard[PoolRows | Score]:
    """Whether it makes one of rows that choose together."""
    halves = op.halves if isinstance(op, Score) else None
    return isinstance(op, PoolRows) or (halves is not None and halves.rows is not None)
