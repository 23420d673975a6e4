"""Launches of the gradients of branches of tiles of axes, all of whose rows and keys are in slots.

Queries, keys, values and the output's gradient are copied into slots, of which loops over lists of tiles
make dq, dk and dv as those of blocks do; a branch of tiles' means is dense attention over tiles, in float32.
At the end tokens get the gradients of their slots, and of their tile's mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsgen import axes, cols, rows, streams, together
from hsgen.axes import ChoosersContext, PlaceContext, UndoContext
from hsgen.backward import tiles as sizes_of
from hsgen.backward.gathered import Gradients
from hsgen.graph import Attend, Cluster, Node
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import Entries, next_power
from hsgen.schedule import laid, text
from hsgen.schedule.draft import Draft

GRAD_O = "grad_o"


def plan(made: Gradients) -> None:
    """All gradients of a graph in slots."""
    attends = [node for node in made.draft.graph.nodes() if isinstance(node.op, Attend)]
    fine = next(node for node in attends if not laid.is_coarse(made.draft, node))
    coarse = next((node for node in attends if laid.is_coarse(made.draft, node)), None)
    _Branches(made, fine, coarse).plan()
    laid.in_slots(made.draft)


@dataclass(slots=True)
class _Branches:
    """A branch over tiles that rows chose, and perhaps one over their means."""

    whole: Gradients
    fine: Node
    coarse: Node | None

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
        self._copies()
        self._lists()
        if self.again:
            self._outputs()
        self._undo()
        if self.coarse is not None:
            self._means(self.coarse)
        self._queries()
        self._keys()
        self._place()

    def _step(
        self,
        title: str,
        *,
        buffers: tuple[Buffer, ...] = (),
        launches: tuple[Launch, ...],
        sizes: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.draft.steps.append(
            Step(
                title=title,
                needs=("q", "k", "v", *self._gates),
                makes=(self.fine.name,),
                buffers=buffers,
                launches=tuple(map(self.draft.launch, launches)),
                sizes=sizes,
            )
        )

    @property
    def again(self) -> bool:
        """Whether outputs of branches under gates, which nobody kept, are made again."""
        return bool(self._gates) and not self.whole.apart

    # --- what is read

    @property
    def _gates(self) -> tuple[str, ...]:
        total = self.draft.graph[self.draft.graph.outputs.o]
        return total.inputs[:1] if total.name != self.fine.name else ()

    def _copies(self) -> None:
        """Queries, keys and values in slots, and means of tiles as the branch over them had them."""
        pooled = self.coarse.inputs[:3] if self.coarse else ("", "", "")
        for name, means in zip("qkv", pooled, strict=True):
            laid.tiles(
                self.draft,
                name,
                copied=f"made_{name}_slots",
                pooled=means,
                of_rows=name == "q",
                makes=(f"{name}.slots", *((means,) if means else ())),
                operators=(self.fine.name,),
                wide=name != "q",
            )

    def _in_slots(self, x: str) -> tuple[str, str, str, str]:
        return x, "0", f"{x}.stride(1)", f"{x}.stride(2)"

    @property
    def _rows(self) -> tuple[str, ...]:
        """Of rows: the output's gradient, log-sum-exp and delta."""
        return (*self._in_slots("slot_do"), "slot_lse", "0", "row_slots", "1", "slot_delta")

    def _undo(self) -> None:
        """What each row needs of its output's gradient, and each tile of its rows'."""
        draft, heads, dim = self.draft, self.draft.shape.query_heads, self.draft.shape.v
        gates = self._gates
        branches = draft.graph[draft.graph.outputs.o].inputs[1:] if gates else ()
        context = UndoContext(
            name="undo_branches",
            tiling=self.tiling,
            heads=heads,
            head_dim=dim,
            branches=len(branches),
            fine=branches.index(self.fine.name) if gates else -1,
            coarse=branches.index(self.coarse.name) if self.coarse else -1,
            again=self.again,
        )
        config = laid.of_tile(self.tiling, dim)
        draft.kernel("merge", context, config, self.fine.name)

        def scratch(name: str, *dims: str, dtype: str = "f32") -> Buffer:
            return Buffer(name=name, dtype=dtype, dims=dims, role="scratch")  # type: ignore[arg-type]

        buffers = [
            scratch("slot_do", "1", "row_slots", str(heads), str(dim), dtype="input"),
            scratch("slot_lse", str(heads), "row_slots"),
            scratch("slot_delta", str(heads), "row_slots"),
        ]
        o = text.strides(text.buffer(self.fine.name))
        arguments: list[str] = []
        if self.again:
            o = self._in_slots("slot_o")
        elif gates:
            self.whole.outputs[self.op.branch] = text.buffer(self.fine.name)
        if gates:
            made, _ = self.whole.buffer(gates[0])
            buffers += made
            for x in (text.input_of(gates[0]), self.whole.buffers[gates[0]]):
                arguments += [*text.strides(x), f"{x}.stride(3)"]
        if self.coarse is not None:
            assert isinstance(self.coarse.op, Attend)
            tile_o = text.buffer(self.coarse.name)
            if not self.again:
                self.whole.outputs[self.coarse.op.branch] = tile_o
            lse = draft.log_sum_exp(self.coarse)
            buffers += [
                scratch("tile_do", "row_tiles", str(heads), str(dim)),
                scratch("tile_lse", str(heads), "row_tiles"),
                scratch("tile_delta", str(heads), "row_tiles"),
            ]
            arguments += [tile_o, lse, f"grad_{lse}", "tile_do", "tile_lse", "tile_delta"]
            arguments.append("row_tiles")
        lse = draft.log_sum_exp(self.fine)
        launch = Launch(
            kernel=context.name,
            grid=laid.programs(self.tiling, heads, of_rows=True),
            arguments=(
                *o,
                *text.strides(GRAD_O),
                *text.strides(lse),
                f"grad_{lse}",
                "slot_do",
                "slot_lse",
                "slot_delta",
                "row_slots",
                *arguments,
                "made_order",
                text.SEQ[0],
            ),
        )
        sizes = (("row_tiles", together.blocks_of(self.slots)),)
        self._step("back to branches", buffers=tuple(buffers), launches=(launch,), sizes=sizes)

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
        """Outputs of branches, as the forward had them."""
        name, draft, heads = self.op.branch, self.draft, self.draft.shape.query_heads
        context = rows.with_turn(self._forward(), rows.Kept())
        context = _by_tile(context, slots=self.slots, heads=self.list_heads)
        config = draft.tiles(context, limit=128, most=self.slots, block=self.slots)
        draft.attend(context, config, self.fine.name)
        dims = ("1", "row_slots", str(heads), str(draft.shape.v))
        self._step(
            f"attend again: {name}",
            sizes=self._parts(context.name),
            buffers=(
                Buffer(name="slot_o", dtype="f32", dims=dims, role="scratch"),
                Buffer(
                    name="lse_again", dtype="f32", dims=(str(heads), "row_slots"), role="scratch"
                ),
            ),
            launches=(
                self._by_lists(
                    context, *self._in_slots("slot_o"), "lse_again", "0", "row_slots", "1"
                ),
            ),
        )
        if self.coarse is not None:
            assert isinstance(self.coarse.op, Attend)
            laid.attend(draft, self.coarse, self.coarse.op)

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
                str(shape.query_heads // context.heads),
            ),
            arguments=(
                *(x for of in "qkv" for x in self._in_slots(f"made_{of}_slots")),
                *(f"{x}_{name}" for x in ("counts", "entries", "words", "capacity")),
                str(axes.words_of(self.tiling)),
                *arguments,
                axes.MADE_TOKENS,
                *text.SEQ,
                "0",
            ),
        )

    # --- means of tiles

    def _means(self, node: Node) -> None:
        """Dense attention over tiles, in float32."""
        draft, shape = self.draft, self.draft.shape
        assert isinstance(node.op, Attend)
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
            *("tile_lse", "0", "row_tiles", "1", "tile_delta"),
        )
        tables = ("made_tiles", text.SEQ[1])
        grads = ("grad_means_q", "grad_means_k", "grad_means_v")
        of_queries = ("row_tiles", str(shape.query_heads), str(shape.qk))
        of_keys = [("1", "key_tiles", str(shape.kv_heads), str(x)) for x in (shape.qk, shape.v)]
        self._step(
            f"queries and keys: {name}",
            sizes=(("key_tiles", f"key_slots // {self.slots}"),),
            buffers=tuple(
                Buffer(name=x, dtype="f32", dims=dims, role="scratch")
                for x, dims in zip(grads, (of_queries, *of_keys), strict=True)
            ),
            launches=(
                Launch(
                    kernel=dq.name,
                    grid=(f"row_tiles // {{BLOCK_T}} + {text.SEQ[1]}", str(shape.kv_heads)),
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

    def _lists(self) -> None:
        """The tiles that the rows of a tile chose between them, and the tiles of rows that chose a tile."""
        name, heads, words = self.op.branch, str(self.list_heads), axes.words_of(self.tiling)
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
        choosers = ChoosersContext(name=f"rows_{name}", tiling=self.tiling, heads=self.list_heads)
        stepping = Config(constexprs=(("BLOCK_N", 256),), num_warps=4, num_stages=1)
        self.draft.kernel("index", choosers, stepping, self.fine.name)
        selection = text.buffer(self.chosen.name)

        def made(what: str, *dims: str) -> Buffer:
            return Buffer(name=f"{what}_{name}", dtype="i32", dims=dims, role="list")

        tiled, capacity, most = f"tiles_{name}", f"capacity_{name}", f"most_{name}"
        self._step(
            f"lists: {name}",
            sizes=(
                (tiled, f"row_slots // {self.slots} + 3 * {text.SEQ[1]}"),
                (capacity, f"max(1, keys_slots // {self.slots})"),
                (most, f"row_slabs * {self.tiling.across}"),
                (f"of_keys_{name}", f"key_slots // {self.slots}"),
            ),
            buffers=(
                made("counts", tiled, heads, "2"),
                made("entries", tiled, heads, capacity),
                made("words", tiled, heads, capacity, str(words)),
                made("row_counts", heads, f"of_keys_{name}"),
                made("row_lists", heads, f"of_keys_{name}", most),
            ),
            launches=(
                Launch(
                    kernel=members.name,
                    grid=(tiled, heads),
                    arguments=(
                        *text.strides(selection),
                        f"{selection}.stride(3)",
                        *(f"{x}_{name}" for x in ("counts", "entries", "words")),
                        f"{selection}.shape[3]",
                        capacity,
                        axes.MADE_ORDER,
                        axes.MADE_TOKENS,
                        *text.SEQ,
                        "0",
                    ),
                ),
                Launch(
                    kernel=choosers.name,
                    grid=laid.programs(self.tiling, self.list_heads, of_rows=False),
                    arguments=(
                        *(f"{x}_{name}" for x in ("words", "row_counts", "row_lists")),
                        capacity,
                        f"of_keys_{name}",
                        most,
                        text.SEQ[0],
                    ),
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
        dims = ("1", "row_slots", str(shape.query_heads), str(shape.qk))
        self._step(
            f"queries: {name}",
            sizes=self._parts(dq.name),
            buffers=(Buffer(name="slot_dq", dtype="input", dims=dims, role="scratch"),),
            launches=(self._by_lists(dq, *self._rows, *self._in_slots("slot_dq")),),
        )

    def _keys(self) -> None:
        """dk and dv, in slots, one query head at a time."""
        name, draft, shape = self.op.branch, self.draft, self.draft.shape
        branch = cols.Branch(name=name, scale=self.scale, turn=None, adds=(False, False))
        context = cols.of_tiles(shape, branch, tiling=self.tiling, list_heads=self.list_heads)
        config = sizes_of.of_tiles(context, draft.target, draft.dtype)
        draft.kernel("cols", context, config, self.fine.name)
        parts = f"key_parts_{name}"
        tiles, heads, sequences = laid.programs(self.tiling, shape.query_heads, of_rows=False)
        dims = [("1", "key_slots", heads, str(x)) for x in (shape.qk, shape.v)]
        self._step(
            f"keys: {name}",
            sizes=(
                (f"keys_{name}", f'config["{context.name}"]["BLOCK_N"]'),
                (parts, f"({self.slots} + keys_{name} - 1) // keys_{name}"),
            ),
            buffers=tuple(
                Buffer(name=x, dtype="input", dims=of, role="scratch")
                for x, of in zip(("slot_dk", "slot_dv"), dims, strict=True)
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(f"{tiles} * {parts}", heads, sequences),
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
            ),
        )

    # --- back to tokens

    def _place(self) -> None:
        """Gradients of tokens: those of their slots, and of their tile's mean."""
        draft, shape = self.draft, self.draft.shape
        buffers: list[Buffer] = []
        launches: list[Launch] = []
        for name in "qkv":
            heads, dim = (draft.size(of) for of in draft.graph[name].type.dims[2:])
            context = PlaceContext(
                name=f"place_{name}",
                tiling=self.tiling,
                heads=heads,
                head_dim=dim,
                group=1 if name == "q" else shape.group,
                slots=True,
                means=self.coarse is not None,
                rows=name == "q",
            )
            draft.kernel("segments", context, laid.of_tile(self.tiling, dim), self.fine.name)
            made, _ = self.whole.buffer(name)
            buffers += made
            launches.append(
                Launch(
                    kernel=context.name,
                    grid=laid.programs(self.tiling, heads, of_rows=name == "q"),
                    arguments=(
                        f"slot_d{name}",
                        *((f"grad_means_{name}",) if self.coarse else ()),
                        *text.strides(self.whole.buffers[name]),
                        "made_order" if name == "q" else "made_key_order",
                        text.SEQ[0],
                    ),
                )
            )
        self._step("back to tokens", buffers=tuple(buffers), launches=tuple(launches))


def _by_tile(context: rows.RowsContext, *, slots: int, heads: int) -> rows.RowsContext:
    """The same loops over lists of whole tiles, whose rows are in slots: a program has a part of a tile's."""
    kept = tuple(p for p in context.params if p not in (axes.ORDER, axes.TOKENS))
    at = [p.name for p in kept].index("SEQ")
    params = (*kept[:at], axes.TOKENS, *kept[at:])
    context = together.of_whole(context, block=slots, heads=heads)
    return replace(context, params=params, slotted=False)
