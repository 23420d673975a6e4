"""Graph, Target -> Plan: which operators share a launch, in which skeleton, with which buffers and tiles.

The only stage that decides on launches.  Values that tuning varies are a kernel's Config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from hsgen import buckets, configs, refusals, rows, together
from hsgen.configs import DType
from hsgen.errors import PlanError
from hsgen.graph import (
    Assign,
    Attend,
    Carry,
    Cluster,
    Delta,
    Distance,
    Divergence,
    Entropies,
    Gate,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
    OutputGate,
    Permute,
    Pool,
    PoolHeads,
    PoolRows,
    Recall,
    Reduce,
    ReduceRows,
    Rotate,
    Round,
    Route,
    Runs,
    Score,
    Select,
    SelectSet,
    Switch,
    Union,
    Unlike,
    block_of,
    own_entries,
    short_last,
)
from hsgen.kernels import (
    POOLS,
    ROUNDED,
    IndexContext,
    MarksContext,
    MergeContext,
    RankContext,
    RoundContext,
    SegmentsContext,
    Turn,
)
from hsgen.plan import Buffer, Config, Context, Kernel, Launch, Plan, Skeleton, Step
from hsgen.rows import Entries, next_power
from hsgen.target import Target

SCRATCH_BYTES = 128 << 20
SORT_LIMIT = 4096  # pairs that the index kernel sorts in registers
LATENT_DIMS = 1024  # of a key that holds its value
TILE_OF_HEADS = 64  # heads of a token that fill a tile: no other row is there to share a list with


Order = Literal["rows", "keys"]


def schedule(
    graph: Graph,
    target: Target,
    dtype: DType = "bf16",
    orders: Mapping[str, Order] | None = None,
) -> Plan:
    """Plan every launch of a spec for one GPU.

    Args:
        graph: verified and passed; heads and head dims bound.
        target: the GPU.
        dtype: of the caller's tensors; it decides tile sizes, not the kernels' text.
        orders: by branch, whether rows stay and blocks come to them, or blocks stay and rows come; of
            branches over blocks that each query head chose for itself.

    Raises:
        PlanError: an operator that no kernel does yet, a size that none can hold, or an order of a branch
            that has but one.
    """
    return _Scheduler(graph, target, dtype, orders or {}).plan()


@dataclass(slots=True)
class _Scheduler:
    """The plan while it grows."""

    graph: Graph
    target: Target
    dtype: DType
    orders: Mapping[str, Order] = field(default_factory=dict[str, Order])
    kernels: list[Kernel] = field(default_factory=list[Kernel])
    steps: list[Step] = field(default_factory=list[Step])

    # --- the whole

    def plan(self) -> Plan:
        self._refuse()
        self._require_branches()
        for node in self.graph.nodes():
            match node.op:
                case Pool() | PoolRows():
                    self._pool(node, node.op)
                case Round():
                    self._round(node, node.op)
                case Attend():
                    self._attend(node, node.op)
                case Select() | SelectSet():
                    self._select(node, node.op)
                case LogSumExp() if isinstance(self.graph[node.inputs[0]].op, Score):
                    self._log_sum_exp(node)
                case Gate():
                    self._gate(node)
                case Input() | Score() | LogSumExp() | Normalise() | Reduce() | Map():
                    pass  # fused into the launch that reads them
                case Norm() | Rotate():
                    pass  # fused into the launch that makes what they read
                case Route() | Switch() | Union() | OutputGate() | Unlike():
                    raise AssertionError("refused")
                case Cluster() | Permute() | Assign() | Runs() | Delta() | PoolHeads():
                    raise AssertionError("refused")
                case Recall() | Carry() | Divergence() | Distance() | Entropies() | ReduceRows():
                    raise AssertionError("refused")
        outputs = self.graph.outputs
        return Plan(
            name=self.graph.meta.name,
            target=self.target.label,
            dtype=self.dtype,
            inputs=tuple(
                (n.name, n.type.dims) for n in self.graph.nodes() if isinstance(n.op, Input)
            ),
            kernels=tuple(self.kernels),
            steps=tuple(self.steps),
            scratch_bytes=SCRATCH_BYTES,
            output=_buffer(outputs.o),
            lse={branch: _buffer(name) for branch, name in outputs.lse.items()},
            selection={level: _buffer(name) for level, name in outputs.selection.items()},
            sizes=dict(self.graph.sizes),
        )

    @property
    def _tiles(self) -> configs.RowTiles:
        return configs.RowTiles(target=self.target, dtype=self.dtype)

    @property
    def _tiles_of_blocks(self) -> configs.RowTiles:
        """Of blocks of rows, whose queries are kept in float32."""
        return configs.RowTiles(target=self.target, dtype="fp32")

    def _refuse(self) -> None:
        """Operators that no kernel does yet, and sizes that none holds."""
        refusals.refuse(self.graph)
        for name in ("Hq", "Hkv", "Dqk", "Dv"):
            if name not in self.graph.sizes:
                raise PlanError(
                    f"{name} is not known: give `heads` and `head_dim` in the spec or to load_kernel"
                )
        attends = [node.op for node in self.graph.nodes() if isinstance(node.op, Attend)]
        wide = LATENT_DIMS if all(op.latent for op in attends) else 256
        for name, most in (("Dqk", wide), ("Dv", wide), ("Di", 256)):
            dim = self.graph.sizes.get(name, 16)
            if dim % 16 or not 16 <= dim <= most:
                raise PlanError(
                    f"head dim {name}: expected a multiple of 16 from 16 to {most}, got {dim}"
                )

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

    def _shape_of(self, op: Attend) -> rows.Shape:
        return replace(self.shape, latent=bool(op.latent))

    def _kernel(
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

    def _entries(self, op: Score | Select | Attend | Pool | Map, level: str) -> Entries:
        return Entries(size=op.size, stride=op.stride, short=self._short(level))

    def _short(self, level: str) -> bool:
        """Whether the level's last entry may be short: also if causal, where rows choose together."""
        asks = any(isinstance(n.op, PoolRows) and n.op.level == level for n in self.graph.nodes())
        return short_last(self.graph, level, causal=asks is False and self.shape.causal)

    # --- pool

    def _pool(self, node: Node, op: Pool | PoolRows) -> None:
        if isinstance(op, PoolRows):
            self._pool_rows(node, op)
        else:
            self._pool_keys(node, op)

    def _pool_keys(self, node: Node, op: Pool) -> None:
        source, chain = self.graph[node.inputs[0]], self._finished(node)
        made = chain[-1].name
        norms = tuple(x.inputs[1] for x in chain if isinstance(x.op, Norm))
        turns = tuple(x for x in chain if isinstance(x.op, Rotate))
        dims = [self._size(dim) for dim in source.type.dims[2:]]
        heads, dim = (dims[0], dims[1]) if len(dims) == 2 else (1, dims[0])
        turn = next((_turn(x.op, dim) for x in chain if isinstance(x.op, Rotate)), None)
        short = self._entries(op, op.level).short
        assert op.how in POOLS, "refused"
        context = SegmentsContext(
            name=f"pool_{_safe(node.name)}",
            heads=heads,
            head_dim=dim,
            size=op.size,
            stride=op.stride,
            short=short,
            how=op.how,
            position=op.position,
            precision=self.target.dot_precision,
            softmax=op.softmax,
            normed=bool(norms),
            turn=turn,
        )
        count = f"count_{_safe(made)}"
        buffer = _buffer(made)
        rows_of = f"{_input(source.name)}.shape[1]"
        length = (
            f"({rows_of} + {op.stride - 1}) // {op.stride} + batch.packed * batch.sequences"
            if short
            else f"{rows_of} // {op.stride}"
        )
        config = configs.pool(op, dim, self.dtype, finishes=len(chain) > 1)
        names = tuple(x.name for x in chain)
        kernel = self._kernel("segments", context, config, *names)
        tables = tuple(name for x in turns for name in x.inputs[1:])
        gates = node.inputs[1:2] if op.how == "gated" else ()
        self.steps.append(
            Step(
                title=f"pool: {node.name}",
                needs=(*node.inputs, *norms, *tables),
                makes=names,
                sizes=(
                    (f"length_{_safe(made)}", length),
                    (count, f"{int(short)} if batch.packed else length_{_safe(made)}"),
                    (
                        f"rows_{_safe(made)}",
                        f"{_input(source.name)}.shape[0] * length_{_safe(made)}",
                    ),
                ),
                buffers=(
                    Buffer(
                        name=buffer,
                        dtype="input",
                        dims=(
                            f"{_input(source.name)}.shape[0]",
                            f"length_{_safe(made)}",
                            str(heads),
                            str(context.width),
                        ),
                        role="level",
                    ),
                ),
                launches=(
                    Launch(
                        kernel=kernel,
                        grid=(
                            f"rows_{_safe(made)} // {{BLOCK_E}} + batch.sequences",
                            str(heads),
                        ),
                        arguments=(
                            *self._tensor(source.name),
                            *(x for name in gates for x in self._gates(name, op)),
                            *(_input(name) for name in node.inputs[1 + len(gates) :]),
                            *map(_input, norms),
                            *(x for name in tables for x in self._tensor(name)[:3]),
                            buffer,
                            count,
                            *SEQ,
                        ),
                    ),
                ),
            )
        )

    def _finished(self, node: Node) -> tuple[Node, ...]:
        """A pool, and what norms and rotates its entries in turn."""
        chain = [node]
        while nexts := [
            x for x in self.graph.users(chain[-1].name) if isinstance(x.op, Norm | Rotate)
        ]:
            assert len(nexts) == len(self.graph.users(chain[-1].name)) == 1, "keys end in one way"
            chain.append(nexts[0])
        return tuple(chain)

    def _pool_of(self, name: str) -> Node | None:
        """The pool behind a level's keys, if they are pooled."""
        node = self.graph[name]
        while isinstance(node.op, Norm | Rotate):
            node = self.graph[node.inputs[0]]
        return node if isinstance(node.op, Pool) else None

    def _gates(self, name: str, op: Pool) -> tuple[str, ...]:
        """Gates and their batch, token and head strides; an index has no heads."""
        dims, x = len(self.graph[name].type.dims), _input(name)
        by_head = dims == (4 if op.softmax == "channel" else 3)
        return (*_strides(x)[:3], f"{x}.stride(2)" if by_head else "0")

    def _pool_rows(self, node: Node, op: PoolRows) -> None:
        """One query for the rows of a block, kept in float32."""
        assert op.block is not None, "refused"
        assert op.how in ("mean", "max"), "refused"
        source = self.graph[node.inputs[0]]
        heads, dim = (self._size(name) for name in source.type.dims[2:])
        context = SegmentsContext(
            name=f"pool_{_safe(node.name)}",
            heads=heads,
            head_dim=dim,
            size=op.block,
            stride=op.block,
            how=op.how,
            rows=op.block,
            precision=self.target.dot_precision,
        )
        kernel = self._kernel("segments", context, configs.pool_tokens(op.block), node.name)
        count, buffer = f"blocks_{_safe(node.name)}", _buffer(node.name)
        self.steps.append(
            Step(
                title=f"pool: {node.name}",
                needs=node.inputs,
                makes=(node.name,),
                sizes=((count, together.blocks_of(op.block)),),
                buffers=(
                    Buffer(
                        name=buffer, dtype="f32", dims=(count, str(heads), str(dim)), role="level"
                    ),
                ),
                launches=(
                    Launch(
                        kernel=kernel,
                        grid=(f"{count} // {{BLOCK_E}} + batch.sequences", str(heads)),
                        arguments=(*self._tensor(source.name), buffer, *SEQ),
                    ),
                ),
            )
        )

    # --- round

    def _round(self, node: Node, op: Round) -> None:
        """Vectors of the caller, each kept in fewer bits; by rows, whatever sequences they are of."""
        assert op.dtype in ROUNDED, "refused"
        source, buffer = node.inputs[0], _buffer(node.name)
        x, name = _input(source), _safe(node.name)
        dims = [self._size(dim) for dim in node.type.dims[2:]]
        heads = dims[0] if len(dims) == 2 else 1
        context = RoundContext(
            name=f"round_{_safe(source)}", dtype=op.dtype, heads=heads, head_dim=dims[-1]
        )
        kernel = self._kernel("segments", context, configs.rounding(dims[-1]), node.name)
        rows_of = f"{x}.shape[0] * {x}.shape[1]"
        self.steps.append(
            Step(
                title=f"round: {source}",
                needs=node.inputs,
                makes=(node.name,),
                sizes=((f"vectors_{name}", f"{rows_of} * {heads}"),),
                buffers=(
                    Buffer(
                        name=buffer,
                        dtype="input",
                        dims=(f"{x}.shape[0]", f"{x}.shape[1]", *map(str, dims)),
                        role="level",
                    ),
                ),
                launches=(
                    Launch(
                        kernel=kernel,
                        grid=(f"vectors_{name} // {{BLOCK_V}} + 1", "1"),
                        arguments=(
                            *self._tensor(source),
                            buffer,
                            f"{x}.shape[1]",
                            f"vectors_{name}",
                        ),
                    ),
                ),
            )
        )

    # --- attend

    def _attend(self, node: Node, op: Attend) -> None:
        name = f"attend_{op.branch}"
        shape = self._shape_of(op)
        scale = op.scale if op.scale is not None else 1.0
        launches: list[Launch] = []
        buffers: list[Buffer] = []
        sizes: list[tuple[str, str]] = []
        match op.over:
            case "window":
                context = rows.attend_window(shape, name=name, scale=scale, window=op.window or 1)
                config = self._tiles.attend(context, limit=128)
            case "all":
                context = rows.attend_all(shape, name=name, scale=scale)
                config = self._tiles.attend(context, limit=128)
            case "pooled":
                entries = self._pooled_entries(node.inputs[1])
                context = rows.attend_pooled(
                    shape, name=name, scale=scale, entries=entries, values=True
                )
                config = self._tiles.attend(context, limit=128)
            case "tokens":
                self._tokens(node, op, scale)
                return
            case "static" | "tiers" | "spans":
                raise AssertionError("refused")
            case "blocks" if self._block(self.graph[node.inputs[3]]):
                self._together(node, op)
                return
            case "blocks" if self._order(node, op) == "keys":
                self._by_blocks(node, op)
                return
            case "blocks":
                context, config = self._blocks(node, op, name, launches, buffers, sizes)
        context = _with_logits(context, op)
        self._kernel("rows", context, config, node.name, *self._lse_of(node))
        tiles = _tiles()
        if context.parts:
            tiles = f"row_tiles_{op.branch}"
            sizes += [(tiles, _tiles_of(name)), *_parts(context)]
        launches.append(
            Launch(
                kernel=name,
                grid=_grid(shape, context, tiles),
                arguments=(
                    *self._tensors(node, op),
                    *self._list_arguments(op),
                    *self._outputs(node),
                    *SEQ,
                ),
            )
        )
        lse = self._lse_of(node)[0]
        buffers += self._output_buffers(node)
        self.steps.append(
            Step(
                title=f"attend: {op.branch}",
                needs=node.inputs,
                makes=(node.name, lse),
                buffers=tuple(buffers),
                launches=tuple(launches),
                sizes=tuple(sizes),
            )
        )

    def _require_branches(self) -> None:
        """Orders are of branches that attend to blocks."""
        attends = [n.op for n in self.graph.nodes() if isinstance(n.op, Attend)]
        blocks = [op.branch for op in attends if op.over == "blocks"]
        if wrong := sorted(self.orders.keys() - set(blocks)):
            raise PlanError(
                f"orders: no branch over blocks is called {', '.join(wrong)}",
                help=f"branches over blocks: {', '.join(blocks) or 'none'}",
            )

    def _order(self, node: Node, op: Attend) -> Order:
        """Rows come to long blocks that few of them share; short blocks come to tiles of rows."""
        selection = self.graph[node.inputs[3]]
        alone = selection.type.dims[1:3] == ("T", "Hq")
        if alone and op.size == op.stride and self._width(selection) <= buckets.MOST_SLOTS:
            usual = "keys" if op.size >= buckets.LEAST_BLOCK else "rows"
            return self.orders.get(op.branch, usual)
        if self.orders.get(op.branch) == "keys":
            raise PlanError(
                f"branch {op.branch}: rows come to blocks only where every query head chooses at most "
                f"{buckets.MOST_SLOTS} blocks for itself",
                span=node.span,
            )
        return "rows"

    def _together(self, node: Node, op: Attend) -> None:
        """Blocks that rows chose together: a tile's rows share a list."""
        self._order(node, op)
        self._require_disjoint(node, op)
        if op.latent:
            message = f"branch {op.branch}: no kernel attends latents by blocks of rows yet"
            raise PlanError(message, span=node.span)
        selection = self.graph[node.inputs[3]]
        block = self._block(selection)
        branch = together.Branch(
            name=op.branch,
            needs=node.inputs[:3],
            makes=(node.name, self._lse_of(node)[0]),
            operators=(node.name, *self._lse_of(node)),
            selection=selection.name,
            lists=_buffer(f"{selection.name}.blocks"),
            buffers=self._output_buffers(node),
            tensors=self._tensors(node, op),
            outputs=self._outputs(node),
            block=block,
            width=self._slots(selection),
            heads=self._size(selection.type.dims[2]),
            share=selection.type.dims[2],
            entries=Entries(size=op.size, stride=op.stride),
            scale=op.scale or 1.0,
            softcap=op.softcap,
            sink=bool(op.sink),
        )
        kernels, steps = together.plan(
            self.shape,
            branch,
            lambda context: self._tiles.attend(context, limit=128, most=block, block=op.size),
        )
        self.kernels += kernels
        self.steps += steps

    def _block(self, selection: Node) -> int:
        """Rows of a block that choose together; 0 where each chooses for itself."""
        return block_of(selection.type.dims[1]) or 0

    def _require_disjoint(self, node: Node, op: Attend) -> None:
        if op.size != op.stride:
            raise PlanError(
                f"branch {op.branch}: no kernel attends raw tokens of overlapping blocks "
                f"(size {op.size}, stride {op.stride})",
                span=node.span,
            )

    def _by_blocks(self, node: Node, op: Attend) -> None:
        """Blocks of a selection, each with the rows that chose it."""
        selection = self.graph[node.inputs[3]]
        branch = buckets.Branch(
            name=op.branch,
            needs=node.inputs,
            makes=(node.name, self._lse_of(node)[0]),
            operators=(node.name, *self._lse_of(node)),
            selection=_buffer(selection.name),
            keys=_input(node.inputs[1]),
            tensors=self._tensors(node, op),
            outputs=self._outputs(node),
            buffers=self._output_buffers(node),
            width=self._width(selection),
            entries=Entries(size=op.size, stride=op.stride),
            scale=op.scale or 1.0,
            softcap=op.softcap,
            sink=bool(op.sink),
        )
        kernels, step = buckets.plan(
            self._shape_of(op), branch, lambda context: self._tiles.attend(context, limit=64)
        )
        self.kernels += kernels
        self.steps.append(step)

    def _blocks(
        self,
        node: Node,
        op: Attend,
        name: str,
        launches: list[Launch],
        buffers: list[Buffer],
        sizes: list[tuple[str, str]],
    ) -> tuple[rows.RowsContext, Config]:
        """Blocks of a selection: first the union lists of each tile, then the attend over them."""
        self._require_disjoint(node, op)
        selection = self.graph[node.inputs[3]]
        width, heads = self._width(selection), self._size(selection.type.dims[2])
        context = rows.attend_blocks(
            self._shape_of(op),
            name=name,
            scale=op.scale or 1.0,
            entries=Entries(size=op.size, stride=op.stride),
            width=width,
            share=selection.type.dims[2],
        )
        most = max(1, SORT_LIMIT // next_power(width))
        config = self._tiles.attend(context, limit=64, tokens=None, most=most, block=op.size)
        index = IndexContext(
            name=f"index_{op.branch}",
            heads=heads,
            width=width,
            size=op.size,
            stride=op.stride,
            causal=self.shape.causal,
        )
        pairs = config["BLOCK_T"] * next_power(width)
        warps = 4 if pairs <= 1024 else 8
        self._kernel(
            "index",
            index,
            Config(constexprs=(), num_warps=warps, num_stages=1),
            node.name,
            follows=name,
        )
        tiles = f"tiles_{op.branch}"
        block_t = f'config["{name}"]["BLOCK_T"]'
        sizes += [
            (tiles, f"batch.rows // {block_t} + batch.sequences"),
            (f"slots_{op.branch}", f"{block_t} * {width}"),
        ]
        dims = (tiles, str(heads))
        slots = f"slots_{op.branch}"
        words = f"({block_t} + 31) // 32"
        buffers += [
            Buffer(name=f"counts_{op.branch}", dtype="i32", dims=(*dims, "2"), role="list"),
            Buffer(name=f"entries_{op.branch}", dtype="i32", dims=(*dims, slots), role="list"),
            Buffer(name=f"words_{op.branch}", dtype="i32", dims=(*dims, slots, words), role="list"),
        ]
        chosen = _buffer(selection.name)
        launches.append(
            Launch(
                kernel=index.name,
                grid=(tiles, str(heads)),
                arguments=(
                    chosen,
                    f"0 if batch.packed else {chosen}.stride(0)",
                    f"{chosen}.stride(1)",
                    f"{chosen}.stride(2)",
                    f"{chosen}.stride(3)",
                    f"counts_{op.branch}",
                    f"entries_{op.branch}",
                    f"words_{op.branch}",
                    *SEQ,
                ),
            )
        )
        return context, config

    def _tokens(self, node: Node, op: Attend, scale: float) -> None:
        """Tokens of a selection: by tile over the union of blocks, or by row where that is dear."""
        name, gather = f"attend_{op.branch}", f"gather_{op.branch}"
        shape, selection = self._shape_of(op), self.graph[node.inputs[3]]
        width, heads = self._width(selection), self._size(selection.type.dims[2])
        share = selection.type.dims[2]
        if op.latent and share != "Hq" and shape.group >= TILE_OF_HEADS:
            self._gathered(node, op, scale)
            return
        chosen = _buffer(selection.name)
        union = rows.attend_marked(shape, name=name, scale=scale, share=share)
        by_row = rows.attend_tokens(shape, name=gather, scale=scale, width=width, share=share)
        union, by_row = _with_logits(union, op), _with_logits(by_row, op)
        config = self._tiles.attend(union, limit=64, block=rows.MARKED)
        gathering = self._tiles.attend(by_row, tokens=1).without("BLOCK_T")
        marks = MarksContext(
            name=f"index_{op.branch}", heads=heads, width=width, causal=self.shape.causal
        )
        step = max(16, 4096 // config["BLOCK_T"])
        marking = Config(
            constexprs=(("BLOCK_K", min(step, next_power(width))), ("BLOCK_N", step), ("DEAR", 2)),
            num_warps=8,
            num_stages=1,
        )
        self._kernel("index", marks, marking, node.name, follows=name)
        self._kernel("rows", union, config, node.name, *self._lse_of(node))
        self._kernel(
            "rows", by_row, gathering, node.name, *self._lse_of(node), follows=name, by_slot=True
        )
        block_t = f'config["{name}"]["BLOCK_T"]'
        tiles, chunk = f"tiles_{op.branch}", f"chunk_{op.branch}"
        capacity = f"capacity_{op.branch}"
        lists = (f"counts_{op.branch}", f"entries_{op.branch}", f"marks_{op.branch}")
        tensors = self._tensors(node, op)
        self.steps.append(
            Step(
                title=f"attend: {op.branch}",
                needs=node.inputs,
                makes=(node.name, self._lse_of(node)[0]),
                sizes=(
                    (capacity, f"max(1, (batch.keys + {rows.MARKED} - 1) // {rows.MARKED})"),
                    (tiles, f"batch.rows // {block_t} + batch.sequences"),
                    (f"bytes_{op.branch}", f"{8 * heads} * {capacity} * {block_t}"),
                    (chunk, f"min({tiles}, max(1, SCRATCH_BYTES // bytes_{op.branch}))"),
                    *_parts(union, by_row),
                ),
                buffers=(
                    Buffer(name=lists[0], dtype="i32", dims=(chunk, str(heads)), role="list"),
                    Buffer(
                        name=lists[1], dtype="i32", dims=(chunk, str(heads), capacity), role="list"
                    ),
                    Buffer(
                        name=lists[2],
                        dtype="i64",
                        dims=(f"{chunk} * {block_t}", str(heads), capacity),
                        role="list",
                    ),
                    *self._output_buffers(node),
                ),
                launches=(
                    Launch(
                        kernel=marks.name,
                        grid=("count", str(heads)),
                        arguments=(chosen, *lists, capacity, *SEQ, "tile_first"),
                    ),
                    Launch(
                        kernel=name,
                        grid=_grid(shape, union, "count"),
                        arguments=(
                            *tensors,
                            *lists,
                            capacity,
                            *self._outputs(node),
                            *SEQ,
                            "tile_first",
                        ),
                    ),
                    Launch(
                        kernel=gather,
                        grid=_grid(shape, by_row, f"count * {block_t}"),
                        arguments=(
                            *tensors,
                            chosen,
                            lists[0],
                            *self._outputs(node),
                            *SEQ,
                            "tile_first",
                        ),
                    ),
                ),
                tiles=tiles,
                chunk=chunk,
            )
        )

    def _gathered(self, node: Node, op: Attend, scale: float) -> None:
        """Tokens of a selection, where one token's heads fill a tile: each row by its own list."""
        name, tiles = f"attend_{op.branch}", f"tiles_{op.branch}"
        shape, selection = self._shape_of(op), self.graph[node.inputs[3]]
        context = rows.attend_tokens(
            shape,
            name=name,
            scale=scale,
            width=self._width(selection),
            share=selection.type.dims[2],
            alone=True,
        )
        context = _with_logits(context, op)
        config = self._tiles.attend(context, tokens=1)
        self._kernel("rows", context, config, node.name, *self._lse_of(node), by_slot=True)
        self.steps.append(
            Step(
                title=f"attend: {op.branch}",
                needs=node.inputs,
                makes=(node.name, self._lse_of(node)[0]),
                sizes=((tiles, _tiles_of(name)), *_parts(context)),
                buffers=self._output_buffers(node),
                launches=(
                    Launch(
                        kernel=name,
                        grid=_grid(shape, context, f"{tiles} * {{BLOCK_T}}"),
                        arguments=(
                            *self._tensors(node, op),
                            _buffer(selection.name),
                            *self._outputs(node),
                            *SEQ,
                        ),
                    ),
                ),
            )
        )

    def _tensors(self, node: Node, op: Attend) -> tuple[str, ...]:
        """Queries, keys and values; of a latent the keys are all."""
        read = ("q", *node.inputs[1 : 2 if op.latent else 3])
        return tuple(argument for name in read for argument in self._tensor(name))

    def _list_arguments(self, op: Attend) -> tuple[str, ...]:
        if op.over == "blocks":
            return (f"counts_{op.branch}", f"entries_{op.branch}", f"words_{op.branch}")
        return ()

    def _output_buffers(self, node: Node) -> tuple[Buffer, ...]:
        """A branch's output and its log-sum-exp."""
        rows_of = ("in_q.shape[0]", "in_q.shape[1]", str(self.shape.query_heads))
        lse = ("in_q.shape[0]", str(self.shape.query_heads), "in_q.shape[1]")
        return (
            Buffer(
                name=_buffer(node.name),
                dtype="input",
                dims=(*rows_of, str(self.shape.v)),
                role="branch",
            ),
            Buffer(name=_buffer(self._lse_of(node)[0]), dtype="f32", dims=lse, role="output"),
        )

    def _outputs(self, node: Node) -> tuple[str, ...]:
        """What an attend writes, behind the sink that it may read."""
        assert isinstance(node.op, Attend)
        sink = (_input(f"{node.op.branch}_sink"),) if node.op.sink else ()
        return (*sink, *_strides(_buffer(node.name)), *_lse_strides(_buffer(self._lse_of(node)[0])))

    def _lse_of(self, node: Node) -> tuple[str, ...]:
        return tuple(u.name for u in self.graph.users(node.name) if isinstance(u.op, LogSumExp))

    def _pooled_entries(self, keys: str) -> Entries:
        pool = self._pool_of(keys)
        assert pool is not None, "a pooled branch reads pooled keys"
        assert isinstance(pool.op, Pool)
        return self._entries(pool.op, pool.op.level)

    def _log_sum_exp(self, node: Node) -> None:
        """The softmax sum of a level's scores, where no branch computes it anyway."""
        score = self.graph[node.inputs[0]]
        assert isinstance(score.op, Score)
        if score.op.form != "dot" or score.op.within is not None or score.op.size == 1:
            message = f"level {score.op.level}: no kernel normalises these scores yet"
            raise PlanError(message, span=node.span)
        context = rows.attend_pooled(
            self.shape,
            name=f"lse_{score.op.level}",
            scale=score.op.scale or 1.0,
            entries=self._pooled_entries(score.inputs[1]),
            values=False,
        )
        config = self._tiles.attend(context, limit=64)
        self._kernel("rows", context, config, score.name, node.name)
        self.steps.append(
            Step(
                title=f"log-sum-exp: {score.op.level}",
                needs=score.inputs,
                makes=(node.name,),
                buffers=(
                    Buffer(
                        name=_buffer(node.name),
                        dtype="f32",
                        dims=("in_q.shape[0]", str(self.shape.query_heads), "in_q.shape[1]"),
                        role="level",
                    ),
                ),
                launches=(
                    Launch(
                        kernel=context.name,
                        grid=(_tiles(), str(self.shape.kv_heads)),
                        arguments=(
                            *self._tensor("q"),
                            *self._tensor(score.inputs[1]),
                            *_lse_strides(_buffer(node.name)),
                            *SEQ,
                        ),
                    ),
                ),
            )
        )

    # --- choose

    def _slots(self, selection: Node) -> str:
        """How long lists of blocks of rows are, as an expression."""
        if isinstance(selection.op, SelectSet):
            return f"width_{selection.op.level}"
        return str(self._width(selection))

    def _select(self, node: Node, op: Select | SelectSet) -> None:
        """Score into a bounded scratch and rank it, chunk of rows by chunk of rows."""
        chain = self._chain(node)
        heads = self._size(node.type.dims[2])
        kept = op if isinstance(op, Select) else None
        parent = self.graph[node.inputs[1]] if kept and kept.within else None
        block = self._block(node)
        part, slots_of = (
            part_of(self.graph, node),
            self._slots(node) if block else str(kept and kept.width),
        )
        context = self._score_context(node, chain, parent)
        tiling = self._tiles_of_blocks if block else self._tiles
        config = tiling.score(context)
        scorer = self._kernel("rows", context, config, *chain.names)
        children, slots, parent_heads, parent_group = 0, 0, 1, 1
        if parent is not None:
            assert isinstance(parent.op, Select)
            children = parent.op.size // op.size
            slots = self._width(parent) * children
            parent_heads = self._size(parent.type.dims[2])
            parent_group = heads // parent_heads
        ranking = RankContext(
            name=f"rank_{op.level}",
            heads=heads,
            k=kept.k if kept else 0,
            width=kept.width if kept else 0,
            size=op.size,
            stride=op.stride,
            short=self._short(op.level),
            causal=self.shape.causal,
            first=op.first,
            last=op.last,
            counted=op.counted,
            tail=bool(op.tail),
            children=children,
            parent_width=self._width(parent) if parent else 0,
            parent_heads=parent_heads,
            parent_group=parent_group,
            carried=context.folded if context.planes > 1 else "",
            rows=block,
            part=part.units if part else 0,
            of_all=isinstance(op, SelectSet) and op.of == "all",
        )
        ranker = self._kernel(
            "rank",
            ranking,
            configs.rank(slots, op.stride, config["BLOCK_T"]),
            node.name,
            follows=scorer,
        )
        capacity = f"capacity_{op.level}"
        scratch = f"scores_{op.level}"
        block_t = f'config["{scorer}"]["BLOCK_T"]'
        tiles, chunk = f"tiles_{op.level}", f"chunk_{op.level}"
        choosing, listed = "batch.rows", ("in_q.shape[0]", "in_q.shape[1]")
        made = node.name
        if block:
            choosing, made = f"blocks_{op.level}", f"{node.name}.blocks"
            listed = (choosing,)
        self.steps.append(
            Step(
                title=f"choose: {op.level}",
                needs=(*chain.needs, *((parent.name,) if parent else ())),
                makes=(made,),
                sizes=(
                    *(((choosing, together.blocks_of(block)),) if block else ()),
                    *(part.sizes(op.level) if part else ()),
                    (capacity, str(slots) if slots else f"max(1, batch.keys // {op.stride} + 1)"),
                    (tiles, f"{choosing} // {block_t} + batch.sequences"),
                    (f"bytes_{op.level}", f"{4 * heads * context.planes} * {capacity} * {block_t}"),
                    (chunk, f"min({tiles}, max(1, SCRATCH_BYTES // bytes_{op.level}))"),
                ),
                buffers=(
                    Buffer(
                        name=scratch,
                        dtype="f32",
                        dims=(
                            f"{chunk} * {block_t}",
                            str(heads),
                            *(("2",) if context.planes > 1 else ()),
                            capacity,
                        ),
                        role="scratch",
                    ),
                    Buffer(
                        name=_buffer(made),
                        dtype="i32",
                        dims=(*listed, str(heads), slots_of),
                        role="list" if block else "selection",
                    ),
                ),
                launches=(
                    Launch(
                        kernel=scorer,
                        grid=("count", str(heads)),
                        arguments=self._score_arguments(chain, parent, scratch, capacity),
                    ),
                    Launch(
                        kernel=ranker,
                        grid=(f"count * ({block_t} // {{BLOCK_R}})", str(heads)),
                        arguments=(
                            scratch,
                            _buffer(made),
                            *((_buffer(parent.name),) if parent else ()),
                            *SEQ,
                            "tile_first",
                            capacity,
                            *((slots_of,) if part else ()),
                        ),
                    ),
                ),
                tiles=tiles,
                chunk=chunk,
            )
        )
        if block:
            self._spread(node, op, heads, block)

    def _spread(self, node: Node, op: Select | SelectSet, heads: int, block: int) -> None:
        """Every row's copy of the list of its block."""
        kernel, step = together.spread(
            op.level,
            node.name,
            lists=_buffer(f"{node.name}.blocks"),
            width=self._slots(node),
            heads=heads,
            block=block,
        )
        self.kernels.append(kernel)
        self.steps.append(step)

    def _chain(self, node: Node) -> _Chain:
        """Back from a selection to its score: map, reduce, normalise in the fixed order of steps."""
        passed: list[Node] = []
        current = self.graph[node.inputs[0]]
        while not isinstance(current.op, Score):
            if not isinstance(current.op, Map | Reduce | Normalise):
                raise PlanError(f"no kernel chooses from %{current.name}", span=node.span)
            passed.insert(0, current)
            current = self.graph[current.inputs[0]]
        return _Chain(
            score=current,
            names=(current.name, *(n.name for n in passed)),
            lse=next((n.inputs[1] for n in passed if isinstance(n.op, Normalise)), None),
            reduce=next((n.op for n in passed if isinstance(n.op, Reduce)), None),
            map=next((n.op for n in passed if isinstance(n.op, Map)), None),
        )

    def _score_context(self, node: Node, chain: _Chain, parent: Node | None) -> rows.RowsContext:
        score = chain.score.op
        assert isinstance(score, Score)
        assert isinstance(node.op, Select | SelectSet)
        refused = ("code_match", "pooling_error", "bias", "given", "cosine")
        assert score.form not in refused, "refused"
        weighted = score.form in ("relu_weighted", "relu_sum")
        if chain.reduce is not None and chain.reduce.share == "all":
            raise PlanError(
                f"level {node.op.level}: no kernel reduces a dot score over all heads yet; "
                "share: group, or form: relu_weighted",
                span=chain.score.span,
            )
        if chain.lse is not None and parent is not None:
            message = f"level {node.op.level}: no kernel normalises scores inside a beam yet"
            raise PlanError(message, span=chain.score.span)
        share: Literal["head", "group", "all"] = (
            "all" if weighted else chain.reduce.share if chain.reduce else "head"
        )
        pooled = self._pool_of(chain.score.inputs[1]) is not None
        scoring = rows.Scoring(
            form=score.form,
            scale=score.scale if score.scale is not None else 1.0,
            entries=self._entries(score, score.level),
            pooled=pooled,
            normalise=chain.lse is not None,
            borrowed=self._is_borrowed(chain),
            share=share,
            reduce="sum" if weighted else chain.reduce.how if chain.reduce else None,
            map_how=_fused(chain.map),
            rows=self._block(node),
            target=self._entries(chain.map, node.op.level)
            if chain.map
            else Entries(size=0, stride=0),
            taps=chain.map.taps if chain.map else (),
            **self._parent(node, parent),
        )
        heads = {"head": 1, "group": self.shape.group, "all": self.graph.sizes.get("Hi", 1)}[share]
        dim = self.graph.sizes["Di"] if scoring.by_index else self.shape.qk
        return rows.score(self.shape, scoring, name=f"score_{node.op.level}", heads=heads, dim=dim)

    def _is_borrowed(self, chain: _Chain) -> bool:
        """Whether the log-sum-exp is that of another level's scores."""
        if chain.lse is None:
            return False
        summed = self.graph[self.graph[chain.lse].inputs[0]]
        return isinstance(summed.op, Score) and summed.name != chain.score.name

    def _parent(self, node: Node, parent: Node | None) -> _Parent:
        """Where a row's surviving parents are listed."""
        if parent is None:
            return {}
        assert isinstance(parent.op, Select)
        mine, theirs = self._size(node.type.dims[2]), self._size(parent.type.dims[2])
        if mine < theirs:
            raise PlanError(
                f"level {parent.op.level} selects per head, the level below it does not",
                span=node.span,
            )
        group = mine // theirs
        return {
            "parent_size": parent.op.size,
            "parent_width": self._width(parent),
            "parent_heads": theirs,
            "parent_head": "head" if group == 1 else f"head // {group}",
        }

    def _score_arguments(
        self, chain: _Chain, parent: Node | None, scratch: str, capacity: str
    ) -> tuple[str, ...]:
        queries, keys, *others = chain.score.inputs
        weighted = bool(others) and isinstance(self.graph[others[0]].op, Input)
        indexed = self.graph[queries].type.dims[-1] == "Di"
        return (
            *self._tensor(queries),
            *self._tensor(keys)[: 3 if indexed else 4],
            *(self._tensor(others[0])[:3] if weighted else ()),
            *(_lse_strides(_buffer(chain.lse)) if chain.lse else ()),
            *((_buffer(parent.name),) if parent else ()),
            scratch,
            capacity,
            *SEQ,
            "tile_first",
        )

    # --- combine

    def _gate(self, node: Node) -> None:
        branches = [self.graph[name] for name in node.inputs[1:]]
        names = tuple(b.op.branch for b in branches if isinstance(b.op, Attend))
        context = MergeContext(
            name="merge", heads=self.shape.query_heads, head_dim=self.shape.v, branches=names
        )
        config = Config(constexprs=(("BLOCK_R", 32),), num_warps=4, num_stages=1)
        kernel = self._kernel("merge", context, config, node.name)
        gates = _input(node.inputs[0])
        output = _buffer(node.name)
        items = f"batch.rows * {self.shape.query_heads}"
        self.steps.append(
            Step(
                title="combine: gates",
                needs=node.inputs,
                makes=(node.name,),
                buffers=(
                    Buffer(
                        name=output,
                        dtype="input",
                        dims=(
                            "in_q.shape[0]",
                            "in_q.shape[1]",
                            str(self.shape.query_heads),
                            str(self.shape.v),
                        ),
                        role="output",
                    ),
                ),
                launches=(
                    Launch(
                        kernel=kernel,
                        grid=(f"({items} + {{BLOCK_R}} - 1) // {{BLOCK_R}}", "1"),
                        arguments=(
                            gates,
                            *(f"{gates}.stride({i})" for i in range(4)),
                            *(_buffer(name) for name in node.inputs[1:]),
                            output,
                            "in_q.shape[1]",
                            "batch.rows",
                        ),
                    ),
                ),
            )
        )

    # --- arguments

    def _size(self, dim: str) -> int:
        return int(dim) if dim.isdigit() else self.graph.sizes[dim]

    def _width(self, selection: Node) -> int:
        assert isinstance(selection.op, Select)
        return selection.op.width

    def _tensor(self, name: str) -> tuple[str, ...]:
        """A tensor and its batch, token and head strides."""
        node = self.graph[name]
        if isinstance(node.op, PoolRows):
            heads, dim = (self._size(of) for of in node.type.dims[2:])
            return _buffer(name), "0", str(heads * dim), str(dim)
        if pool := self._pool_of(name):
            assert isinstance(pool.op, Pool)
            buffer, source = _buffer(name), self.graph[pool.inputs[0]]
            heads = self._size(source.type.dims[2]) if len(source.type.dims) == 4 else 1
            dim = self._size(source.type.dims[-1]) * (2 if pool.op.how == "minmax" else 1)
            row = heads * dim
            return buffer, f"count_{_safe(name)} * {row}", str(row), str(dim)
        x = _input(name) if isinstance(node.op, Input) else _buffer(name)
        if len(node.type.dims) == 3:
            return x, f"0 if batch.packed else {x}.stride(0)", f"{x}.stride(1)", "0"
        return _strides(x)


def part_of(graph: Graph, selection: Node) -> together.Part | None:
    """What part of the entries blocks of rows keep; None where a list has a known length, or none can be."""
    op = selection.op
    if not isinstance(op, SelectSet) or refusals.lacking(graph, selection):
        return None
    own = own_entries(selection.type.dims[1], op.stride) - 1
    return together.Part(
        units=together.Part.units_of(op.value),
        stride=op.stride,
        forced=op.first + (op.last + own if op.last else 0),
        counted=op.counted,
    )


class _Parent(TypedDict, total=False):
    """The fields of `rows.Scoring` that say where a row's surviving parents are listed."""

    parent_size: int
    parent_width: int
    parent_head: str
    parent_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    """The operators between a score and the selection made of it."""

    score: Node
    names: tuple[str, ...]
    lse: str | None
    reduce: Reduce | None
    map: Map | None

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.score.inputs, *((self.lse,) if self.lse else ()))


SEQ = ("batch.table", "batch.sequences")


def _tiles() -> str:
    return "batch.rows // {BLOCK_T} + batch.sequences"


def _tiles_of(kernel: str) -> str:
    """The same, outside of the kernel's own grid."""
    return f'batch.rows // config["{kernel}"]["BLOCK_T"] + batch.sequences'


def _turn(op: Rotate, dim: int) -> Turn:
    """Where RoPE turns which channels of pooled keys."""
    first = f"e * {op.stride}"
    return Turn(
        start=0 if op.channels == "first" else dim - op.dims,
        dims=op.dims,
        halves=op.pairs == "halves",
        position=first if op.at == "first" else f"({first} + {(op.size - 1) / 2})",
        frequency="" if op.base is None else rows.number(-2 / op.dims * math.log2(op.base)),
    )


def _with_logits(context: rows.RowsContext, op: Attend) -> rows.RowsContext:
    scale = op.scale if op.scale is not None else 1.0
    return rows.with_logits(context, scale=scale, softcap=op.softcap, sink=bool(op.sink))


def _grid(shape: rows.Shape, context: rows.RowsContext, tiles: str) -> tuple[str, str]:
    """Programs of an attend: tiles by heads, where the parts of a token's heads are next to each other."""
    if context.parts:
        return f"{tiles} * parts_{context.name}", str(shape.kv_heads)
    return tiles, str(shape.query_heads // context.heads)


def _parts(*contexts: rows.RowsContext) -> tuple[tuple[str, str], ...]:
    """The sizes that `_grid` needs: how many programs share the heads of one token."""
    sizes: list[tuple[str, str]] = []
    for context in contexts:
        if context.parts:
            heads = f"heads_{context.name}"
            sizes.append((heads, f'config["{context.name}"]["BLOCK_H"]'))
            sizes.append((f"parts_{context.name}", f"({context.heads} + {heads} - 1) // {heads}"))
    return tuple(sizes)


def _safe(name: str) -> str:
    return name.replace(".", "_")


def _input(name: str) -> str:
    return f"in_{name}"


def _buffer(name: str) -> str:
    """The driver's name for what a node makes; no input or size can be called so."""
    return f"made_{_safe(name)}"


def _strides(x: str) -> tuple[str, ...]:
    return x, f"0 if batch.packed else {x}.stride(0)", f"{x}.stride(1)", f"{x}.stride(2)"


def _lse_strides(x: str) -> tuple[str, ...]:
    return x, f"0 if batch.packed else {x}.stride(0)", f"{x}.stride(1)", f"{x}.stride(2)"


def _fused(op: Map | None) -> Literal["overlap_sum", "sum", "max"] | None:
    """How scores are carried over where they are made."""
    how = op.how if op else None
    assert how not in ("mean", "upsample"), "refused"
    return how
