"""Launches of the gradients of branches of tiles of axes, all of whose rows and keys are in slots.

Queries, keys, values and the output's gradient are copied into slots, of which loops over lists of tiles
make dq, dk and dv as those of blocks do, and tokens get the gradients of their slots, and of their tile's
mean: heads in turns, since what lies in slots is more than what a call is given.  A branch of tiles' means is
dense attention over tiles, in float32, and comes before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction

from hsgen import axes, cols, rows, streams, together
from hsgen.axes import ChoosersContext, PlaceContext, UndoContext
from hsgen.backward import tiles as sizes_of
from hsgen.backward.gathered import GRAD_O, Gradients
from hsgen.graph import Attend, Cluster, Node
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import Entries, next_power
from hsgen.schedule import laid, text
from hsgen.schedule.draft import Draft

SHARE = Fraction(2, 3)  # of what a call is given, that a turn's slots and lists may have


def plan(made: Gradients) -> None:
    """All gradients of a graph in slots."""
    attends = [node for node in made.draft.graph.nodes() if isinstance(node.op, Attend)]
    fine = next(node for node in attends if not laid.is_coarse(made.draft, node))
    coarse = next((node for node in attends if laid.is_coarse(made.draft, node)), None)
    _Branches(made, fine, coarse).plan()
    laid.in_slots(made.draft)


@dataclass(slots=True)
class _Turn:
    """What a turn of heads has, while it grows."""

    sizes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    buffers: list[Buffer] = field(default_factory=list[Buffer])
    launches: list[Launch] = field(default_factory=list[Launch])


@dataclass(slots=True)
class _Branches:
    """A branch over tiles that rows chose, and perhaps one over their means."""

    whole: Gradients
    fine: Node
    coarse: Node | None
    turn: _Turn = field(default_factory=_Turn)

    @property
    def draft(self) -> Draft:
        return self.whole.draft

    @property
    def tiling(self) -> axes.Tiling:
        assert self.draft.tiling is not None, "asked of tiles"
        return self.draft.tiling

    @property
    def slots(self) -> int:
        return self.tiling.slots

    @property
    def op(self) -> Attend:
        assert isinstance(self.fine.op, Attend)
        return self.fine.op

    @property
    def scale(self) -> float:
        return self.op.scale if self.op.scale is not None else 1.0

    @property
    def chosen(self) -> Node:
        return self.draft.graph[self.fine.inputs[3]]

    @property
    def list_heads(self) -> int:
        return self.draft.size(self.chosen.type.dims[2])

    def plan(self) -> None:
        order = next(x for x in self.draft.graph.nodes() if isinstance(x.op, Cluster))
        laid.order(self.draft, order, whole=True)
        if self.coarse is not None:
            self._means(self.coarse)
        self._turns()
        self._copies()
        self._lists()
        if self.again:
            self._outputs()
        self._undo()
        self._queries()
        self._keys()
        self._place()
        self._step(
            f"a turn of heads: {self.op.branch}",
            buffers=tuple(self.turn.buffers),
            launches=tuple(self.turn.launches),
            sizes=tuple(self.turn.sizes),
            turns=True,
        )

    def _step(
        self,
        title: str,
        *,
        buffers: tuple[Buffer, ...] = (),
        launches: tuple[Launch, ...],
        sizes: tuple[tuple[str, str], ...] = (),
        turns: bool = False,
    ) -> None:
        self.draft.steps.append(
            Step(
                title=title,
                needs=("q", "k", "v", *self._gates),
                makes=(self.fine.name,),
                buffers=buffers,
                launches=tuple(map(self.draft.launch, launches)),
                sizes=sizes,
                tiles=str(self.draft.shape.kv_heads) if turns else None,
                chunk=self._at_once if turns else None,
            )
        )

    @property
    def again(self) -> bool:
        """Whether outputs of branches under gates, which nobody kept, are made again."""
        return bool(self._gates) and not self.whole.apart

    # --- turns

    @property
    def _at_once(self) -> str:
        """How many heads of keys have a turn."""
        return f"turn_{self.op.branch}"

    def _of(self, heads: int, count: str) -> str:
        """How many of so many heads as many heads of keys have; what is of one head, is of all."""
        each = heads // self.draft.shape.kv_heads
        return "1" if heads == 1 else count if each == 1 else f"{count} * {each}"

    def _room(self, heads: int) -> str:
        return self._of(heads, self._at_once)

    def _count(self, heads: int) -> str:
        return self._of(heads, "count")

    def _first(self, heads: int) -> str:
        return "0" if heads == 1 else self._of(heads, "tile_first")

    def _turns(self) -> None:
        """How many heads have a turn: in slots each has queries, keys, values, the output's gradient, theirs,
        and lists of tiles.
        """
        shape, name = self.draft.shape, self.op.branch
        group, dims = shape.group, shape.qk + shape.v
        rows_held = group * (2 * (shape.qk + dims) + 8 + (4 * shape.v if self.again else 0))
        keys_held = 2 * (1 + group) * dims
        lists = -(-self.list_heads // shape.kv_heads)
        words = 4 * lists * (1 + axes.words_of(self.tiling))
        tiled, capacity, most, of_keys = self._sizes_of_lists
        listed = f"listed_{name}"
        held = f"row_slots * {rows_held} + key_slots * {keys_held} + {listed}"
        self.turn.sizes += (
            (tiled, f"row_slots // {self.slots} + 3 * {text.SEQ[1]}"),
            (capacity, f"max(1, keys_slots // {self.slots})"),
            (most, "row_tiles"),
            (of_keys, "key_tiles"),
            (listed, f"{tiled} * {capacity} * {words} + {of_keys} * {most} * {4 * lists}"),
            *laid.of_heads(self.draft, name, held, SHARE),
        )

    # --- what is read

    @property
    def _gates(self) -> tuple[str, ...]:
        total = self.draft.graph[self.draft.graph.outputs.o]
        return total.inputs[:1] if total.name != self.fine.name else ()

    def _copies(self) -> None:
        """Queries, keys and values in slots."""
        for name in "qkv":
            buffers, launch = laid.copied(
                self.draft,
                name,
                into=f"made_{name}_slots",
                turn=self._at_once,
                of_rows=name == "q",
                operators=(self.fine.name,),
            )
            self.turn.buffers += buffers
            self.turn.launches.append(launch)

    def _in_slots(self, x: str) -> tuple[str, str, str, str]:
        return x, "0", f"{x}.stride(1)", f"{x}.stride(2)"

    @property
    def _rows(self) -> tuple[str, ...]:
        """Of rows: the output's gradient, log-sum-exp and delta."""
        return (*self._in_slots("slot_do"), "slot_lse", "0", "row_slots", "1", "slot_delta")

    def _undo_of(self, node: Node) -> tuple[UndoContext, tuple[str, ...]]:
        """What leads back to a branch from the output's gradient; the gates that it is given, and theirs."""
        draft, gates = self.draft, self._gates
        branches = draft.graph[draft.graph.outputs.o].inputs[1:] if gates else ()
        assert isinstance(node.op, Attend)
        context = UndoContext(
            name=f"undo_{node.op.branch}",
            tiling=self.tiling,
            heads=draft.shape.query_heads,
            head_dim=draft.shape.v,
            branches=len(branches),
            column=branches.index(node.name) if gates else 0,
            coarse=node is not self.fine,
            again=self.again and node is self.fine,
        )
        draft.kernel("merge", context, laid.of_tile(self.tiling, draft.shape.v), node.name)
        given: list[str] = []
        for gate in gates:
            for x in (text.input_of(gate), self.whole.buffers[gate]):
                given += [*text.strides(x), f"{x}.stride(3)"]
        return context, tuple(given)

    def _undo(self) -> None:
        """What each row needs of its output's gradient."""
        draft, heads, dim = self.draft, self.draft.shape.query_heads, self.draft.shape.v
        if self._gates and self.coarse is None:
            self.turn.buffers += self.whole.buffer(self._gates[0])[0]
        context, gates = self._undo_of(self.fine)
        room = self._room(heads)
        dims = (room, "row_slots")
        self.turn.buffers += (
            Buffer(
                name="slot_do",
                dtype="input",
                dims=("1", "row_slots", room, str(dim)),
                role="scratch",
            ),
            Buffer(name="slot_lse", dtype="f32", dims=dims, role="scratch"),
            Buffer(name="slot_delta", dtype="f32", dims=dims, role="scratch"),
        )
        o = text.strides(text.buffer(self.fine.name))
        if self.again:
            o = self._in_slots("slot_o")
        elif self._gates:
            self.whole.outputs[self.op.branch] = text.buffer(self.fine.name)
        lse = draft.log_sum_exp(self.fine)
        self.turn.launches.append(
            Launch(
                kernel=context.name,
                grid=("row_tiles", self._count(heads)),
                arguments=(
                    *o,
                    *("slot_do", "slot_do.stride(1)", "slot_lse", "slot_delta", "row_slots"),
                    *text.strides(GRAD_O),
                    *text.strides(lse),
                    f"grad_{lse}",
                    *gates,
                    axes.MADE_ORDER,
                    *text.SEQ,
                    self._first(heads),
                ),
            )
        )

    def _undo_means(self, node: Node) -> None:
        """What each tile needs of its rows' outputs' gradients."""
        draft, heads, dim = self.draft, self.draft.shape.query_heads, self.draft.shape.v
        assert isinstance(node.op, Attend)
        buffers = self.whole.buffer(self._gates[0])[0]
        context, gates = self._undo_of(node)
        tile_o, lse = text.buffer(node.name), draft.log_sum_exp(node)
        if not self.again:
            self.whole.outputs[node.op.branch] = tile_o
        made = ("tile_do", "tile_lse", "tile_delta")
        by_head = (str(heads), "row_blocks")
        shapes = (("row_blocks", str(heads), str(dim)), by_head, by_head)
        launch = Launch(
            kernel=context.name,
            grid=("row_tiles", str(heads)),
            arguments=(
                *(tile_o, *made, "row_blocks"),
                *text.strides(GRAD_O),
                *text.strides(lse),
                f"grad_{lse}",
                *gates,
                axes.MADE_ORDER,
                *text.SEQ,
            ),
        )
        scratch = (
            Buffer(name=name, dtype="f32", dims=dims, role="scratch")
            for name, dims in zip(made, shapes, strict=True)
        )
        self._step(
            f"back to tiles: {node.op.branch}",
            sizes=(("row_blocks", together.blocks_of(self.slots)),),
            buffers=(*buffers, *scratch),
            launches=(launch,),
        )

    def _forward(self) -> rows.RowsContext:
        """The loops over the tiles that a tile's rows chose."""
        return together.attend(
            self.draft.shape,
            name=f"attend_{self.op.branch}",
            scale=self.scale,
            entries=Entries(size=self.slots, stride=self.slots),
            share=self.chosen.type.dims[2],
            block=self.slots,
            slotted=True,
        )

    def _outputs(self) -> None:
        """Outputs of a branch over tiles, as the forward had them."""
        draft, heads = self.draft, self.draft.shape.query_heads
        context = rows.with_turn(self._forward(), rows.Kept())
        context = _by_tile(context, slots=self.slots, heads=self.list_heads)
        config = draft.tiles(context, limit=128, most=self.slots, block=self.slots)
        draft.attend(context, config, self.fine.name)
        room = self._room(heads)
        dims = ("1", "row_slots", room, str(draft.shape.v))
        self.turn.sizes += self._parts(context.name)
        self.turn.buffers += (
            Buffer(name="slot_o", dtype="f32", dims=dims, role="scratch"),
            Buffer(name="lse_again", dtype="f32", dims=(room, "row_slots"), role="scratch"),
        )
        self.turn.launches.append(
            self._by_lists(context, *self._in_slots("slot_o"), "lse_again", "0", "row_slots", "1")
        )

    def _parts(self, kernel: str) -> tuple[tuple[str, str], ...]:
        """How many programs share the rows of a tile."""
        return (
            (f"tokens_{kernel}", f'config["{kernel}"]["BLOCK_T"]'),
            (f"parts_{kernel}", f"({self.slots} + tokens_{kernel} - 1) // tokens_{kernel}"),
        )

    def _by_lists(self, context: rows.RowsContext, *arguments: str) -> Launch:
        """A launch that walks the lists of tiles; `arguments`: between lists and where sequences lie."""
        name, shape = self.op.branch, self.draft.shape
        return Launch(
            kernel=context.name,
            grid=(
                f"tiles_{name} * parts_{context.name}",
                self._count(shape.query_heads // context.heads),
            ),
            arguments=(
                *(x for of in "qkv" for x in self._in_slots(f"made_{of}_slots")),
                *(f"{x}_{name}" for x in ("counts", "entries", "words", "capacity")),
                str(axes.words_of(self.tiling)),
                *arguments,
                axes.MADE_TOKENS,
                *text.SEQ,
            ),
        )

    # --- means of tiles

    def _means(self, node: Node) -> None:
        """Dense attention over tiles, in float32."""
        draft, shape = self.draft, self.draft.shape
        assert isinstance(node.op, Attend)
        for source, pooled in zip("qkv", node.inputs[:3], strict=True):
            laid.means(
                draft,
                source,
                pooled,
                of_rows=source == "q",
                operators=(node.name,),
                wide=source != "q",
            )
        if self.again:
            laid.attend(draft, node, node.op)
        self._undo_means(node)
        name, scale = node.op.branch, node.op.scale if node.op.scale is not None else 1.0
        forward = rows.attend_all(shape, name=f"attend_{name}", scale=scale)
        dq = cols.query_gradient(forward, name=f"dq_{name}", scale=scale, adds=False)
        dq = replace(dq, params=rows.in_float32(dq.params))
        config = sizes_of.of_rows(dq, draft.target, "fp32")
        draft.kernel("rows", dq, config, node.name)
        branch = cols.Branch(name=name, scale=scale, turn=None, adds=(False, False))
        dkv = replace(cols.of_window(shape, branch, window=None), wide=True)
        widths = sizes_of.of_cols(dkv, draft.target, "fp32")
        draft.kernel("cols", dkv, widths, node.name)
        queries, keys, values = (text.buffer(x) for x in node.inputs[:3])
        row = str(shape.query_heads * shape.qk)
        read = (
            *(queries, "0", row, str(shape.qk)),
            *self._in_slots(keys),
            *self._in_slots(values),
            *("tile_do", "0", str(shape.query_heads * shape.v), str(shape.v)),
            *("tile_lse", "0", "row_blocks", "1", "tile_delta"),
        )
        tables = ("made_tiles", text.SEQ[1])
        grads = ("grad_means_q", "grad_means_k", "grad_means_v")
        of_queries = ("row_blocks", str(shape.query_heads), str(shape.qk))
        of_keys = [("1", "key_tiles", str(shape.kv_heads), str(x)) for x in (shape.qk, shape.v)]
        self._step(
            f"queries and keys: {name}",
            buffers=tuple(
                Buffer(name=x, dtype="f32", dims=dims, role="scratch")
                for x, dims in zip(grads, (of_queries, *of_keys), strict=True)
            ),
            launches=(
                Launch(
                    kernel=dq.name,
                    grid=(f"row_blocks // {{BLOCK_T}} + {text.SEQ[1]}", str(shape.kv_heads)),
                    arguments=(*read, grads[0], "0", row, str(shape.qk), *tables),
                ),
                Launch(
                    kernel=dkv.name,
                    grid=(f"key_tiles // {{BLOCK_N}} + {text.SEQ[1]}", str(shape.kv_heads)),
                    arguments=(
                        *read,
                        *(x for grad in grads[1:] for x in self._in_slots(grad)),
                        "0",
                        *tables,
                    ),
                ),
            ),
        )

    # --- tiles that were chosen

    @property
    def _sizes_of_lists(self) -> tuple[str, str, str, str]:
        """Tiles of rows, entries of one, tiles of rows of a list, and tiles of keys."""
        name = self.op.branch
        return f"tiles_{name}", f"capacity_{name}", f"most_{name}", f"of_keys_{name}"

    def _lists(self) -> None:
        """The tiles that the rows of a tile chose between them, and the tiles of rows that chose a tile."""
        name, words = self.op.branch, axes.words_of(self.tiling)
        members = together.ListsContext(
            name=f"members_{name}",
            how="members",
            heads=self.list_heads,
            rows=self.slots,
            size=self.slots,
            stride=self.slots,
            causal=False,
            slotted=True,
        )
        tile = next_power(self.slots)
        values = (("BLOCK_T", tile), ("BLOCK_K", max(16, 4096 // tile)), ("BLOCK_N", 512))
        listing = Config(constexprs=values, num_warps=4, num_stages=1)
        self.draft.kernel("index", members, listing, self.fine.name)
        choosers = ChoosersContext(name=f"rows_{name}", tiling=self.tiling)
        stepping = Config(constexprs=(("BLOCK_N", 256),), num_warps=4, num_stages=1)
        self.draft.kernel("index", choosers, stepping, self.fine.name)
        selection = text.buffer(self.chosen.name)

        def made(what: str, *dims: str) -> Buffer:
            return Buffer(name=f"{what}_{name}", dtype="i32", dims=dims, role="list")

        tiled, capacity, most, of_keys = self._sizes_of_lists
        room, count = self._room(self.list_heads), self._count(self.list_heads)
        self.turn.buffers += (
            made("counts", tiled, room, "2"),
            made("entries", tiled, room, capacity),
            made("words", tiled, room, capacity, str(words)),
            made("row_counts", room, of_keys),
            made("row_lists", room, of_keys, most),
        )
        self.turn.launches += (
            Launch(
                kernel=members.name,
                grid=(tiled, count),
                arguments=(
                    *text.strides(selection),
                    f"{selection}.stride(3)",
                    *(f"{x}_{name}" for x in ("counts", "entries", "words")),
                    f"{selection}.shape[3]",
                    capacity,
                    axes.MADE_ORDER,
                    axes.MADE_TOKENS,
                    *text.SEQ,
                    self._first(self.list_heads),
                ),
            ),
            Launch(
                kernel=choosers.name,
                grid=("key_tiles", count),
                arguments=(
                    *(f"{x}_{name}" for x in ("words", "row_counts", "row_lists")),
                    *(capacity, of_keys, most),
                    *text.SEQ,
                ),
            ),
        )

    def _queries(self) -> None:
        """dq, in slots."""
        name, draft, shape = self.op.branch, self.draft, self.draft.shape
        dq = _by_tile(
            cols.query_gradient(self._forward(), name=f"dq_{name}", scale=self.scale, adds=False),
            slots=self.slots,
            heads=self.list_heads,
        )
        config = None
        if streams.possible(dq, draft.target, draft.dtype):
            config = streams.tiles(dq, draft.target, most=self.slots, block=self.slots)
        if config is None:
            config = sizes_of.of_rows(
                dq, draft.target, draft.dtype, most=self.slots, block=self.slots
            )
        draft.attend(dq, config, self.fine.name)
        dims = ("1", "row_slots", self._room(shape.query_heads), str(shape.qk))
        self.turn.sizes += self._parts(dq.name)
        self.turn.buffers.append(
            Buffer(name="slot_dq", dtype="input", dims=dims, role="scratch"),
        )
        self.turn.launches.append(self._by_lists(dq, *self._rows, *self._in_slots("slot_dq")))

    def _keys(self) -> None:
        """dk and dv, in slots, one query head at a time."""
        name, draft, shape = self.op.branch, self.draft, self.draft.shape
        branch = cols.Branch(name=name, scale=self.scale, turn=None, adds=(False, False))
        context = cols.of_tiles(shape, branch, tiling=self.tiling, list_heads=self.list_heads)
        config = sizes_of.of_tiles(context, draft.target, draft.dtype)
        draft.kernel("cols", context, config, self.fine.name)
        parts = f"key_parts_{name}"
        heads = shape.query_heads
        dims = [("1", "key_slots", self._room(heads), str(x)) for x in (shape.qk, shape.v)]
        self.turn.sizes += (
            (f"keys_{name}", f'config["{context.name}"]["BLOCK_N"]'),
            (parts, f"({self.slots} + keys_{name} - 1) // keys_{name}"),
        )
        self.turn.buffers += (
            Buffer(name=x, dtype="input", dims=of, role="scratch")
            for x, of in zip(("slot_dk", "slot_dv"), dims, strict=True)
        )
        self.turn.launches.append(
            Launch(
                kernel=context.name,
                grid=(f"key_tiles * {parts}", self._count(heads)),
                arguments=(
                    *(x for of in "qkv" for x in self._in_slots(f"made_{of}_slots")),
                    *self._rows,
                    *self._in_slots("slot_dk"),
                    *self._in_slots("slot_dv"),
                    *(f"{x}_{name}" for x in ("row_counts", "row_lists", "words", "of_keys")),
                    f"most_{name}",
                    f"capacity_{name}",
                    *text.SEQ,
                ),
            ),
        )

    # --- back to tokens

    def _place(self) -> None:
        """Gradients of tokens: those of their slots, and of their tile's mean."""
        draft, shape = self.draft, self.draft.shape
        for name in "qkv":
            heads, dim = (draft.size(of) for of in draft.graph[name].type.dims[2:])
            context = PlaceContext(
                name=f"place_{name}",
                tiling=self.tiling,
                heads=heads,
                head_dim=dim,
                group=1 if name == "q" else shape.group,
                means=self.coarse is not None,
                rows=name == "q",
            )
            draft.kernel("segments", context, laid.of_tile(self.tiling, dim), self.fine.name)
            self.turn.buffers += self.whole.buffer(name)[0]
            self.turn.launches.append(
                Launch(
                    kernel=context.name,
                    grid=(laid.programs(of_rows=name == "q"), self._count(heads)),
                    arguments=(
                        *(f"slot_d{name}", f"slot_d{name}.stride(1)"),
                        *((f"grad_means_{name}",) if self.coarse else ()),
                        *text.strides(self.whole.buffers[name]),
                        "made_order" if name == "q" else "made_key_order",
                        *text.SEQ,
                        self._first(heads),
                    ),
                )
            )


def _by_tile(context: rows.RowsContext, *, slots: int, heads: int) -> rows.RowsContext:
    """The same loops over lists of whole tiles, whose rows are in slots: a program has a part of a tile's."""
    kept = tuple(p for p in context.params if p != axes.TOKENS)  # which a gradient's have not
    at = [p.name for p in kept].index("SEQ")
    context = together.of_whole(context, block=slots, heads=heads, in_turn=True)
    return replace(context, params=(*kept[:at], axes.TOKENS, *kept[at:]))
