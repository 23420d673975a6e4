"""Launches of the gradients of branches: delta, dq over the keys of the forward, dk and dv over rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsgen import buckets, cols, cols_streams, keeping, patterns, rows, sorting, streams, walks
from hsgen.backward import pyramids, sharing, sifting, slashing, tiles, together, tokens
from hsgen.backward.gathered import GRAD_O, Gradients
from hsgen.graph import Attend, Input, Node, Permute, SelectSet, Union, left_to_window
from hsgen.kernels import IndexContext
from hsgen.plan import Buffer, Config, ElementType, Kernel, Launch, Step
from hsgen.rows import Entries, RowsContext, next_power
from hsgen.schedule import SORT_LIMIT, choosing, sorted_keys, staying, text, walking
from hsgen.schedule.draft import TILE_OF_HEADS, Draft

Sizes = tuple[tuple[str, str], ...]


def attend(made: Gradients, node: Node, op: Attend) -> None:
    """All gradients of one branch."""
    branch = _Branch(made, node, op, sharing.chosen_again(made.draft, node, op))
    if op.over == "tiers":
        branch.tiers()
        return
    branch.queries()
    branch.keys()


@dataclass(slots=True)
class _Branch:
    """The steps of one branch."""

    whole: Gradients
    node: Node
    op: Attend
    shared: sharing.Chosen | None = None  # what blocks of rows chose, made again

    @property
    def draft(self) -> Draft:
        return self.whole.draft

    @property
    def name(self) -> str:
        return self.op.branch

    @property
    def shape(self) -> rows.Shape:
        return self.draft.shape_of(self.op)

    @property
    def scale(self) -> float:
        return self.op.scale if self.op.scale is not None else 1.0

    @property
    def entries(self) -> Entries:
        return Entries(size=self.op.size, stride=self.op.stride)

    # --- the selection

    @property
    def chosen(self) -> Node | None:
        """The selection that is attended, where rows have lists."""
        if self.op.over == "pooled":
            return self.draft.chosen(self.node)
        chooses = self.op.over in ("blocks", "tokens") and not self.slanted
        return self.draft.graph[self.node.inputs[3]] if chooses else None

    @property
    def kept(self) -> bool:
        """Whether heads keep tokens, as keys and as rows."""
        return keeping.attended(self.draft.graph, self.node)

    @property
    def width(self) -> int:
        return self.draft.width(self.chosen) if self.chosen and not self.together else 1

    @property
    def beside(self) -> int:
        """Tokens of a window beside it, which has those of its rows."""
        return left_to_window(self.draft.graph, self.node)

    @property
    def list_heads(self) -> int:
        return self.draft.size(self.chosen.type.dims[2]) if self.chosen else 0

    @property
    def selection(self) -> tuple[str, ...]:
        """Its tensor and strides."""
        assert self.chosen is not None
        x = text.buffer(self.chosen.name)
        return (*text.strides(x), f"{x}.stride(3)")

    @property
    def tokens(self) -> tokens.Chosen | None:
        """The same where single tokens are chosen, or pooled entries."""
        if self.op.over not in ("tokens", "pooled") or self.chosen is None or self.kept:
            return None
        keys = self.node.inputs[1]
        pool = self.draft.pool_of(keys) if self.op.over == "pooled" else None
        return tokens.Chosen(
            branch=self.name,
            node=self.node.name,
            selection=self.selection,
            heads=self.list_heads,
            width=self.width,
            keys=text.input_of(pool.inputs[0] if pool else keys),
            entries=self.draft.pooled_entries(keys) if pool else None,
            level=text.safe(keys) if pool else "",
        )

    @property
    def together(self) -> together.Chosen | None:
        """The same where blocks of rows chose blocks of keys: of tokens every row has its block's list."""
        block = self.draft.block(self.chosen) if self.chosen else 0
        of_tokens = self.op.over == "tokens" and not self.kept
        block = staying.BLOCK if self.kept else block
        if not block or of_tokens:
            return None
        assert self.chosen is not None
        walked = walks.walked(self.draft.graph, self.chosen)
        order = sorting.order_of(self.draft.graph, self.node)
        return together.Chosen(
            branch=self.name,
            node=self.node.name,
            selection=self.selection,
            heads=self.list_heads,
            share=self.chosen.type.dims[2],
            block=block,
            entries=self.entries,
            keys=text.input_of(self.node.inputs[1]),
            left=self.beside,
            order=sorting.arguments(text.buffer(order.name)) if order else (),
            segment=sorted_keys.segment(self.draft, self.chosen),
            aside=walks.own_of(self.draft.graph, self.chosen) if walked else 0,
            own=self.kept,
            bits=self.shared.bits if self.shared else None,
            shown=self.shared.shown if self.shared else None,
            shared=self._shared(),
        )

    @property
    def repeats(self) -> bool:
        """Whether a call that chose for itself chooses again."""
        return self.chosen is not None and self.chosen.name in self.whole.repeated

    def _shared(self) -> tuple[str, str] | None:
        """Bits of what blocks of rows choose again, and how many words each has."""
        chosen = self.chosen
        if chosen is None or self.kept or not self.repeats:
            return None
        assert isinstance(chosen.op, SelectSet)
        return text.buffer(choosing.chosen_of(chosen)), walking.bits(chosen.op.level)[0]

    @property
    def slanted(self) -> slashing.Chosen | None:
        """The same where the last rows chose for all."""
        return slashing.Chosen.of(self.draft, self.node, self.name)

    @property
    def bias(self) -> str | None:
        """The tensor of biases that logits have, which are learned."""
        return self.draft.bias(self.node)

    # --- what rows have

    @property
    def gates(self) -> str | None:
        """The tensor of gates that weigh the branch."""
        turn = self.draft.turns.get(self.node.name)
        return turn.reads if turn and isinstance(turn.how, rows.Gated) else None

    @property
    def gate_arguments(self) -> tuple[str, ...]:
        if self.gates is None:
            return ()
        x = text.input_of(self.gates)
        return (*text.strides(x), f"{x}.stride(3)")

    @property
    def lse(self) -> str:
        return self.draft.log_sum_exp(self.node)

    @property
    def delta(self) -> str:
        return f"delta_{self.lse}"

    @property
    def sink(self) -> str | None:
        """The tensor of one more logit a head: the branch's, or that of one softmax over all."""
        total = (
            self.draft.graph[self.draft.turns[self.node.name].total] if self.draft.turns else None
        )
        if total is not None and isinstance(total.op, Union):
            return total.inputs[-1] if total.op.sink else None
        return self.draft.sink(self.node)

    @property
    def sums(self) -> str:
        """The log-sum-exp that gradients have, which a sink is in."""
        return f"sunk_{self.lse}" if self.sink else self.lse

    @property
    def row_arguments(self) -> tuple[str, ...]:
        """The output's gradient, log-sum-exp and delta."""
        return (*text.strides(self.whole.grad_o), *text.strides(self.sums), self.delta)

    def delta_buffers(self) -> tuple[Buffer, ...]:
        dims = ("in_q.shape[0]", str(self.shape.query_heads), "in_q.shape[1]")
        return (Buffer(name=self.delta, dtype="f32", dims=dims, role="scratch"),)

    def step(
        self,
        title: str,
        *,
        buffers: tuple[Buffer, ...],
        launches: tuple[Launch, ...],
        sizes: Sizes = (),
        turns: tuple[str | None, str | None] = (None, None),
        of: Literal["own", "given"] | None = None,
    ) -> None:
        """A step that reads the branch's tensors; of: where a call chose for itself, or brought lists."""
        graph, given = self.draft.graph, of == "given" and self.repeats
        needs = [name for name in self.node.inputs if isinstance(graph[name].op, Input | Permute)]
        self.draft.steps.append(
            Step(
                title=f"{title}: {self.name}" + (", over a caller's lists" if given else ""),
                needs=(*needs, *(x for x in (self.gates, self.sink) if x)),
                makes=(self.node.name,),
                buffers=buffers,
                launches=tuple(map(self.draft.launch, launches)),
                sizes=sizes,
                tiles=turns[0],
                chunk=turns[1],
                of=of,
            )
        )

    # --- tiers

    def tiers(self) -> None:
        """delta, then all gradients, in turns of heads."""
        self._delta_of_output()
        found = pyramids.turn(self.whole, self.node, self.op, rows_=self.row_arguments)
        self.step(
            "queries and keys",
            buffers=found.buffers,
            launches=found.launches,
            sizes=found.sizes,
            turns=found.turns,
        )

    # --- rows stay

    def queries(self) -> None:
        """delta, then dq."""
        again = self.gates is not None and not self.whole.apart
        if not again:
            self._delta_of_output()
        buffers, adds = self.whole.buffer("q")
        if self.shared:
            assert not again, "refused"
            self._queries_of_shared(self.shared, buffers, adds=adds)
            return
        forward = self._forward()
        chosen = self.tokens
        leaves = self.left if self.gives else None
        dq = cols.query_gradient(
            forward, name=f"dq_{self.name}", scale=self.scale, adds=adds, leaves=leaves
        )
        by_block = self.together
        most = rows.PICKING if chosen else max(1, SORT_LIMIT // next_power(self.width))
        most = by_block.block if by_block else most
        block = self.op.size if self.chosen and not chosen else None
        most, block = dq.most_tokens or most, dq.units or block
        config = self._tiles_of_rows(dq, most=most, block=block)
        lists = self._lists_of_rows(dq, config)
        tensors = (*self.draft.tensors(self.node, self.op), *lists.arguments)
        grid = text.grid(self.shape, dq, "count" if chosen else f"tiles_{self.name}")
        seq = (*text.SEQ, "tile_first") if chosen else text.SEQ
        if by_block:
            seq = (*by_block.order, *text.SEQ, "0")
        buffers, launches = (*lists.buffers, *buffers), lists.launches
        sizes = lists.sizes if self.gives else (*lists.sizes, *text.parts(dq))
        if again:
            buffers = (*self.delta_buffers(), *self._gates_buffers(), *buffers)
            launches += (self._delta_again(forward, dq, config, tensors, (grid, seq)),)
        self.draft.attend(dq, config, self.node.name)
        grad = text.strides(self.whole.buffers["q"])
        written = (*self.row_arguments, *self.gate_arguments, *grad, *lists.left)
        arguments = (*tensors, *written, *seq)
        launches += (Launch(kernel=dq.name, grid=grid, arguments=arguments),)
        if chosen and self.gives:
            taken, brought = self._taken(dq, lists)
            buffers, launches = (*buffers, *brought), (*launches, taken)
        self.step(
            "queries",
            buffers=buffers,
            launches=launches,
            sizes=sizes,
            turns=lists.turns,
            of="given" if self.repeats else None,
        )
        if self.repeats and self.kept:
            self._queries_kept(buffers[len(lists.buffers) :], adds=adds)
        elif self.repeats:
            self._queries_again(dq, buffers[len(lists.buffers) :], written)

    def _lists_of_rows(self, dq: RowsContext, config: Config) -> tokens.Lists:
        """What tiles of rows walk, of choices that a backward is given."""
        if (chosen := self.tokens) and self.gives:
            return tokens.given(self.draft, chosen, dq, config, leaves=self.left)
        if chosen:
            return tokens.unions(self.draft, chosen, dq.name, config)
        if by_block := self.together:
            return together.listed(self.draft, by_block, dq.name)
        if self.chosen:
            return self._unions(dq, config)
        tiled = ((f"tiles_{self.name}", text.tiles_of(dq.name, text.tiles(dq))),)
        if slanted := self.slanted:
            made = slashing.listed(self.draft, slanted, dq.name, by_keys=False)
            return replace(made, sizes=(*tiled, *made.sizes))
        return tokens.Lists(buffers=(), sizes=tiled, launches=(), arguments=())

    def _queries_kept(self, grads: tuple[Buffer, ...], *, adds: bool) -> None:
        """dq of the rows that heads keep in a call that chose for itself."""
        kept = sifting.Kept.of(self.draft, self.node, self.name)
        forward = self._as_branch(
            keeping.attend(self.shape, name=f"attend_{self.name}", scale=self.scale)
        )
        dq = sifting.by_row(self.draft, kept, forward, scale=self.scale, adds=adds)
        buffers, sift = sifting.sift(self.draft, kept)
        launch = Launch(
            kernel=dq.name,
            grid=(text.tiles(), str(self.shape.query_heads)),
            arguments=(
                *self.draft.tensors(self.node, self.op),
                *kept.read(counts=not self.shape.causal),
                *self.row_arguments,
                *self.gate_arguments,
                *text.strides(self.whole.buffers["q"]),
                *text.SEQ,
            ),
        )
        self.step("queries", buffers=(*buffers, *grads), launches=(sift, launch), of="own")

    def _keys_kept(self, branch: cols.Branch, grads: tuple[Buffer, ...]) -> None:
        """dk and dv from rows of heads that keep both, in a call that chose for itself."""
        kept = sifting.Kept.of(self.draft, self.node, self.name)
        context = sifting.by_key(self.shape, branch)
        self._cols(context, self._tiles_of_cols(context))
        of = text.input_of(self.node.inputs[1])
        length, keys = f"length_{self.name}", f"keys_{self.name}"
        launch = Launch(
            kernel=context.name,
            grid=(f"{keys} // {{BLOCK_N}} + batch.sequences", str(self.shape.kv_heads)),
            arguments=(
                *self.draft.tensors(self.node, self.op),
                *kept.read(counts=True),
                *self.row_arguments,
                *self.gate_arguments,
                *self._grads(),
                length,
                *text.SEQ,
            ),
        )
        sizes: Sizes = (
            (length, f"0 if batch.packed else {of}.shape[1]"),
            (keys, f"{of}.shape[0] * {of}.shape[1]"),
        )
        self.step("keys", buffers=grads, launches=(launch,), sizes=sizes, of="own")

    def _queries_again(
        self, dq: RowsContext, buffers: tuple[Buffer, ...], written: tuple[str, ...]
    ) -> None:
        """dq over the lists of a call that chose for itself, some blocks of rows at a time."""
        chosen = self.together
        assert chosen is not None
        lists = together.listed_again(self.draft, chosen, dq.name)
        tensors = (*self.draft.tensors(self.node, self.op), *lists.arguments)
        seq = (*chosen.order, *text.SEQ, "tile_first")
        grid = text.grid(self.shape, dq, "count")
        self.step(
            "queries",
            buffers=(*lists.buffers, *buffers),
            launches=(
                *lists.launches,
                Launch(kernel=dq.name, grid=grid, arguments=(*tensors, *written, *seq)),
            ),
            sizes=(*lists.sizes, *text.parts(dq)),
            turns=lists.turns,
            of="own",
        )

    def _queries_of_shared(
        self, chosen: sharing.Chosen, buffers: tuple[Buffer, ...], *, adds: bool
    ) -> None:
        """Of what blocks of rows chose: the forward's own lists, or a caller's."""

        def gradient(forward: RowsContext) -> RowsContext:
            name = f"dq_{self.name}"
            return cols.query_gradient(forward, name=name, scale=self.scale, adds=adds)

        grad = text.strides(self.whole.buffers["q"])
        block = self.draft.block(self.draft.graph[self.node.inputs[3]])
        sharing.queries(
            self.draft,
            self.node,
            self.op,
            chosen,
            makes=gradient,
            tiles=lambda dq: self._tiles_of_rows(dq, most=block, block=self.op.size),
            read=(*self.row_arguments, *self.gate_arguments, *grad),
            buffers=buffers,
        )

    @property
    def gives(self) -> bool:
        """Whether rows that make dq leave what they give their keys: a token's heads fill a tile of dots.

        In fp32 such tiles have no room beside these.
        """
        of_tokens = self.tokens is not None and bool(self.op.latent)
        full = self.shape.group >= TILE_OF_HEADS
        return of_tokens and full and self.draft.dtype != "fp32"

    @property
    def left(self) -> ElementType:
        """In what: fp16 has no room for small ones."""
        return "input" if self.draft.dtype == "bf16" else "f32"

    def _taken(self, dq: RowsContext, lists: tokens.Lists) -> tuple[Launch, tuple[Buffer, ...]]:
        """What adds up, key by key, what the rows of a turn left; and what it brings to life."""
        k, lists_of = self.node.inputs[1], self.tokens
        assert lists_of is not None
        buffers, adds = self.whole.buffer(k)
        take = cols.TakeContext(
            name=f"dk_{self.name}",
            of=dq,
            dtype=self.left,
            kv_heads=self.shape.kv_heads,
            adds=adds,
        )
        self.draft.kernel("merge", take, tiles.take(), self.node.name, follows=dq.name)
        total, keys = f"sum_k_{self.name}", f"keys_{self.name}"
        dims = (keys, str(self.shape.kv_heads), str(self.shape.qk))
        summed = Buffer(name=total, dtype="f32", dims=dims, role="scratch", zeros=True)
        launch = Launch(
            kernel=take.name,
            grid=(keys, str(self.shape.kv_heads)),
            arguments=(
                *lists.left[:-1],
                total,
                *self.whole.grad(k),
                f"length_{lists_of.level}" if lists_of.entries else f"{lists_of.keys}.shape[1]",
                "count",
                f"tiles_{self.name} - tile_first - count",
            ),
        )
        return launch, (*buffers, summed)

    def _tiles_of_rows(self, dq: RowsContext, *, most: int, block: int | None) -> Config:
        """Tiles of dq, whose keys come in a stream where they can."""
        target, dtype = self.draft.target, self.draft.dtype
        if streams.gives(dq, target, dtype):
            return streams.latent_gradient_config(dq)
        if streams.possible(dq, target, dtype):
            config = streams.tiles(dq, target, most=most, block=block)
            if config is not None:
                return config
        return tiles.of_rows(dq, target, dtype, most=most, block=block)

    def _forward(self) -> RowsContext:
        """The loops over the keys that a row sees."""
        name = f"attend_{self.name}"
        match self.op.over:
            case "blocks" | "tokens" if self.together:
                context = together.forward(self.shape, self.together, scale=self.scale)
            case "blocks":
                assert self.chosen is not None
                context = rows.attend_blocks(
                    self.shape,
                    name=name,
                    scale=self.scale,
                    entries=self.entries,
                    width=self.width,
                    share=self.chosen.type.dims[2],
                    left=self.beside,
                )
            case "tokens" if self.slanted:
                context = slashing.forward(self.shape, self.slanted, scale=self.scale)
            case "tokens":
                assert self.chosen is not None
                share = self.chosen.type.dims[2]
                context = rows.attend_picked(
                    self.shape, name=name, scale=self.scale, share=share, alone=True
                )
            case "pooled" if self.tokens:
                assert self.chosen is not None
                context = rows.attend_picked(
                    self.shape,
                    name=name,
                    scale=self.scale,
                    share=self.chosen.type.dims[2],
                    alone=True,
                    entries=self.tokens.entries,
                )
            case "window":
                window = self.op.window or 1
                context = rows.attend_window(self.shape, name=name, scale=self.scale, window=window)
            case "all":
                context = rows.attend_all(self.shape, name=name, scale=self.scale)
            case "static":
                context = patterns.attend(self.shape, self.op, name=name)
            case "pooled":
                entries = self.draft.pooled_entries(self.node.inputs[1])
                context = rows.attend_pooled(
                    self.shape, name=name, scale=self.scale, entries=entries, values=True
                )
            case _:
                raise AssertionError("refused")
        return self._as_branch(context)

    def _as_branch(self, context: RowsContext) -> RowsContext:
        """Loops with the logits of the branch, at its turn."""
        softcap = self.op.softcap
        context = rows.with_logits(context, scale=self.scale, softcap=softcap, sink=False)
        if self.op.biased:
            context = rows.with_bias(context, scale=self.scale)
        return rows.with_turn(context, self.draft.turn(self.node))

    def _unions(self, dq: RowsContext, config: Config) -> tokens.Lists:
        """The union of the blocks that a tile's rows chose, as the forward walks them."""
        name, heads, tiled = self.name, str(self.list_heads), f"tiles_{self.name}"
        index = IndexContext(
            name=f"index_{name}",
            heads=self.list_heads,
            width=self.width,
            size=self.op.size,
            stride=self.op.stride,
            causal=self.shape.causal,
            left=self.beside,
        )
        pairs = config["BLOCK_T"] * next_power(self.width)
        listing = Config(constexprs=(), num_warps=4 if pairs <= 1024 else 8, num_stages=1)
        self.draft.kernel("index", index, listing, self.node.name, follows=dq.name)
        block_t = f'config["{dq.name}"]["BLOCK_T"]'
        slots = f"slots_{name}"
        lists = (f"counts_{name}", f"entries_{name}", f"words_{name}")
        wide = ((), (slots,), (slots, f"({block_t} + 31) // 32"))
        buffers = tuple(
            Buffer(name=x, dtype="i32", dims=(tiled, heads, *(dims or ("2",))), role="list")
            for x, dims in zip(lists, wide, strict=True)
        )
        launch = Launch(
            kernel=index.name,
            grid=(tiled, heads),
            arguments=(*self.selection, *lists, *text.SEQ),
        )
        sizes = ((tiled, text.tiles_of(dq.name)), (slots, f"{block_t} * {self.width}"))
        return tokens.Lists(buffers=buffers, sizes=sizes, launches=(launch,), arguments=lists)

    def _delta_of_output(self) -> None:
        """delta of an output that is there: a branch's own, or that of one softmax over all."""
        if self.lse in self.whole.deltas:
            return
        self.whole.deltas.add(self.lse)
        turn = self.draft.turn(self.node)
        gate = turn if isinstance(turn, rows.Gated) else None
        sink = self.sink
        context = cols.DeltaContext(
            name=f"delta_{self.name}", head_dim=self.shape.v, gate=gate, sink=sink is not None
        )
        output, grad_o = self.draft.output(self.node), GRAD_O
        if self.whole.output_gated:  # which is in both, so that their product has it once
            output = text.buffer(self.draft.graph.outputs.o)
        buffers = self.delta_buffers()
        of_gates: tuple[str, ...] = ()
        if gate is not None:
            output = self.whole.outputs[self.name] = text.buffer(self.node.name)
            grad_o = self.whole.grad_o
            buffers += self._gates_buffers()
            of_gates = (*self.gate_arguments, *self._gates_gradient())
        left, more = f"left_{self.lse}", tuple[Launch, ...]()
        if sink is not None:
            buffers += tuple(replace(buffers[0], name=x, zeros=True) for x in (self.sums, left))
            brought, more = self._sink(sink, left)
            buffers += brought
            of_gates = (self.lse, text.input_of(sink), self.sums, left)
        self.draft.kernel("merge", context, tiles.delta(), self.node.name)
        launch = Launch(
            kernel=context.name,
            grid=("batch.rows // {BLOCK_R} + batch.sequences", str(self.shape.query_heads)),
            arguments=(
                *text.strides(output),
                *text.strides(grad_o),
                *text.strides(f"grad_{self.lse}"),
                self.delta,
                *of_gates,
                *text.SEQ,
            ),
        )
        self.step("delta", buffers=buffers, launches=(launch, *more))

    def _sink(self, name: str, left: str) -> tuple[tuple[Buffer, ...], tuple[Launch, ...]]:
        """The gradient of a sink, from what all rows left."""
        buffers, _ = self.whole.buffer(name)
        heads = self.shape.query_heads
        context = cols.SinkContext(name=f"dsink_{self.name}", heads=heads)
        config = Config(constexprs=(("BLOCK_R", 1024),), num_warps=4, num_stages=1)
        self.draft.kernel("merge", context, config, self.node.name)
        sizes = (f"{left}.shape[0]", f"{left}.shape[2]")
        arguments = (left, self.whole.buffers[name], *sizes)
        return buffers, (Launch(kernel=context.name, grid=(str(heads),), arguments=arguments),)

    def _gates_buffers(self) -> tuple[Buffer, ...]:
        """The gradient of the gates, where the first branch brings it to life."""
        assert self.gates is not None
        buffers, _ = self.whole.buffer(self.gates)
        return buffers

    def _gates_gradient(self) -> tuple[str, ...]:
        """It with its strides."""
        assert self.gates is not None
        grad = self.whole.buffers[self.gates]
        return (*text.strides(grad), f"{grad}.stride(3)")

    def _delta_again(
        self,
        forward: RowsContext,
        dq: RowsContext,
        config: Config,
        tensors: tuple[str, ...],
        tiled: tuple[tuple[str, str], tuple[str, ...]],
    ) -> Launch:
        """delta where branches add to one output, each times its gate: from the logits again."""
        grid, seq = tiled
        context = cols.deltas(forward, name=f"delta_{self.name}")
        shared = Config(constexprs=(), num_warps=config.num_warps, num_stages=config.num_stages)
        kernel = Kernel(
            name=context.name,
            skeleton="rows",
            context=context,
            config=shared,
            operators=(self.node.name,),
            follows=dq.name,
        )
        self.draft.kernels.append(streams.of_tiles(kernel, config))
        return Launch(
            kernel=context.name,
            grid=tuple(x.replace("{BLOCK_T}", f'config["{dq.name}"]["BLOCK_T"]') for x in grid),
            arguments=(
                *tensors,
                *self.row_arguments,
                f"grad_{self.lse}",
                *self.gate_arguments,
                *self._gates_gradient(),
                *seq,
            ),
        )

    # --- keys stay

    def keys(self) -> None:
        """dk and dv."""
        if self.gives:
            return  # made where dq was
        k, v = self.node.inputs[1:3]
        of_keys, adds_k = self.whole.buffer(k)
        of_values, adds_v = ((), adds_k) if self.op.latent else self.whole.buffer(v)
        of_biases, adds_bias = self.whole.buffer(self.bias) if self.bias else ((), False)
        assert not adds_bias, "refused"
        buffers = (*of_keys, *of_values, *of_biases)
        branch = cols.Branch(
            name=self.name,
            scale=self.scale,
            softcap=self.op.softcap,
            turn=self.draft.turn(self.node),
            adds=(adds_k, adds_v),
            biased=bool(self.bias),
        )
        if chosen := self.tokens:
            self._keys_of_tokens(branch, buffers, chosen)
            return
        if of_blocks := self.together:
            lists = bool(self.shared and self.shared.lists)
            self._keys_of_together(branch, buffers, of_blocks, of="own" if lists else None)
            if lists:
                others = replace(of_blocks, branch=f"given_{self.name}", bits=None)
                branch = replace(branch, name=others.branch)
                self._keys_of_together(branch, buffers, others, of="given")
            return
        if self.chosen:
            self._keys_of_blocks(branch, buffers)
            return
        if slanted := self.slanted:
            self._keys_of_slants(branch, buffers, slanted)
            return
        if self.op.over == "pooled":
            self._keys_of_pool(branch, buffers)
            return
        if self.op.over == "static":
            context = cols.of_pattern(self.shape, branch, self.op)
        else:
            window = self.op.window if self.op.over == "window" else None
            context = cols.of_window(self.shape, branch, window=window)
        config = self._tiles_of_cols(context)
        self._cols(context, config)
        of = text.input_of(k)
        sizes: Sizes = (
            (f"length_{self.name}", f"0 if batch.packed else {of}.shape[1]"),
            (f"keys_{self.name}", f"{of}.shape[0] * {of}.shape[1]"),
        )
        block_n = f'config["{context.name}"]["BLOCK_N"]'
        grid = (f"keys_{self.name} // {block_n} + batch.sequences", str(self.shape.kv_heads))
        if box := context.box:
            parts = f"(({box.tokens} + {block_n} - 1) // {block_n})"
            slabs = f"keys_{self.name} // {box.slab} + batch.sequences"
            grid = (f"({slabs}) * {box.across} * {parts}", str(self.shape.kv_heads))
        arguments = (*self._col_arguments(), *self._grads(), f"length_{self.name}", *text.SEQ)
        launch = Launch(kernel=context.name, grid=grid, arguments=arguments)
        self.step("keys", buffers=buffers, launches=(launch,), sizes=sizes)

    def _keys_of_slants(
        self, branch: cols.Branch, grads: tuple[Buffer, ...], chosen: slashing.Chosen
    ) -> None:
        """Of what the last rows chose for all: parts of columns, then keys, which these parts come to."""
        tensors, given = self.draft.tensors(self.node, self.op), chosen.of_columns
        rows_of = (*self.row_arguments, *self.gate_arguments)
        made, launches = grads, tuple[Launch, ...]()
        if chosen.columns is not None:
            columns = slashing.by_column(self.shape, branch, chosen)
            self._cols(columns, self._tiles_of_cols(columns))
            parts, launch = slashing.parts(
                self.draft, chosen, columns, (*tensors, *given, *rows_of)
            )
            made, launches = (*made, *parts), (launch,)
            given = (*given, *(part.name for part in parts))
        context = slashing.by_key(self.shape, branch, chosen)
        self._cols(context, self._tiles_of_cols(context))
        lists = slashing.listed(self.draft, chosen, context.name, by_keys=True)
        slanted = lists.arguments[len(chosen.of_columns) :]
        length, keys = f"length_{self.name}", f"keys_{self.name}"
        of = text.input_of(self.node.inputs[1])
        sizes = (
            *lists.sizes,
            (length, f"0 if batch.packed else {of}.shape[1]"),
            (keys, f"{of}.shape[0] * {of}.shape[1]"),
        )
        launch = Launch(
            kernel=context.name,
            grid=(f"{keys} // {{BLOCK_N}} + batch.sequences", str(self.shape.kv_heads)),
            arguments=(*tensors, *given, *slanted, *rows_of, *self._grads(), length, *text.SEQ),
        )
        self.step(
            "keys",
            buffers=(*made, *lists.buffers),
            launches=(*lists.launches, *launches, launch),
            sizes=sizes,
        )

    def _tiles_of_cols(self, context: cols.ColsContext) -> Config:
        """Tiles of dk and dv, whose rows come in a stream where they can."""
        target, dtype = self.draft.target, self.draft.dtype
        streamed = cols_streams.config(context, target, dtype)
        return streamed or tiles.of_cols(context, target, dtype)

    def _cols(self, context: cols.ColsContext, config: Config) -> None:
        """A kernel of dk and dv, in the skeleton that its tiles are of."""
        kernel = Kernel(
            name=context.name,
            skeleton="cols",
            context=context,
            config=config,
            operators=(self.node.name,),
        )
        self.draft.kernels.append(cols_streams.of_tiles(kernel))

    def _col_arguments(self) -> tuple[str, ...]:
        return (
            *self.draft.tensors(self.node, self.op),
            *self.row_arguments,
            *self.gate_arguments,
        )

    def _grads(self) -> tuple[str, ...]:
        """The gradients of keys, values and biases with their strides."""
        names = self.node.inputs[1 : 2 if self.op.latent else 3]
        names = (*names, *((self.bias,) if self.bias else ()))
        return tuple(argument for name in names for argument in self.whole.grad(name))

    @property
    def _held(self) -> tuple[int, ...]:
        """Head dims of what keys and values have: of latents of keys alone."""
        return (self.shape.qk,) if self.op.latent else (self.shape.qk, self.shape.v)

    def _keys_of_pool(self, branch: cols.Branch, grads: tuple[Buffer, ...]) -> None:
        """Of entries, which are few and seen by many rows: rows in chunks, and the sums of their parts."""
        entries = self.draft.pooled_entries(self.node.inputs[1])
        context = cols.of_pooled(self.shape, branch, entries=entries)
        config = self._tiles_of_cols(context)
        self._cols(context, config)
        total = cols.SumContext(name=f"sum_{self.name}", of=context)
        self.draft.kernel("merge", total, tiles.sums(), self.node.name, follows=context.name)
        name, level = self.name, text.safe(self.node.inputs[1])
        heads, dims = self.shape.kv_heads, self._held
        col_tiles, block_n, parts = f"col_tiles_{name}", f"block_n_{name}", f"parts_{name}"
        sizes: Sizes = (
            (block_n, f'config["{context.name}"]["BLOCK_N"]'),
            (col_tiles, f"rows_{level} // {block_n} + batch.sequences"),
            (f"bytes_{name}", f"{col_tiles} * {block_n} * {4 * heads * sum(dims)}"),
            (parts, f"max(1, min({cols.PARTS}, SCRATCH_BYTES // bytes_{name}))"),
        )
        made = (f"part_k_{name}", f"part_v_{name}")[: len(dims)]
        rows_of = f"{heads} * {col_tiles} * {parts}"
        buffers = tuple(
            Buffer(name=part, dtype="f32", dims=(rows_of, block_n, str(dim)), role="scratch")
            for part, dim in zip(made, dims, strict=True)
        )
        launches = (
            Launch(
                kernel=context.name,
                grid=(col_tiles, str(heads), parts),
                arguments=(*self._col_arguments(), *made, f"count_{level}", *text.SEQ),
            ),
            Launch(
                kernel=total.name,
                grid=(col_tiles, str(heads)),
                arguments=(*made, *self._grads(), f"count_{level}", parts, *text.SEQ),
            ),
        )
        self.step("keys", buffers=(*grads, *buffers), launches=launches, sizes=sizes)

    def _keys_of_tokens(
        self, branch: cols.Branch, grads: tuple[Buffer, ...], chosen: tokens.Chosen
    ) -> None:
        """Of tokens that were chosen: of each block all rows that chose any, walked by one program."""
        context = cols.of_tokens(
            self.shape, branch, list_heads=self.list_heads, entries=chosen.entries
        )
        config = self._tiles_of_cols(context)
        lists = tokens.by_block(self.draft, chosen, context)
        self._cols(context, config)
        tiles_a_block, block_n = f"block_tiles_{self.name}", f"block_n_{self.name}"
        sizes = (
            *lists.sizes,
            (block_n, f'config["{context.name}"]["BLOCK_N"]'),
            (tiles_a_block, f"({context.size - 1} + {block_n}) // {block_n}"),
        )
        launch = Launch(
            kernel=context.name,
            grid=(f"count * {tiles_a_block}", str(self.shape.kv_heads)),
            arguments=(
                *self._col_arguments(),
                *self._grads(),
                *lists.arguments,
                *text.SEQ,
                "tile_first",
            ),
        )
        self.step(
            "keys",
            buffers=(*grads, *lists.buffers),
            launches=(*lists.launches, launch),
            sizes=sizes,
            turns=lists.turns,
        )

    def _keys_of_together(
        self,
        branch: cols.Branch,
        grads: tuple[Buffer, ...],
        chosen: together.Chosen,
        *,
        of: Literal["own", "given"] | None = None,
    ) -> None:
        """Of entries that blocks of rows chose: of each all blocks that did, and the sums of parts.

        of: whose choice; what a caller brings has lists of its own, others those that dq had.
        """
        context = cols.of_together(
            self.shape,
            branch,
            entries=chosen.entries,
            list_heads=chosen.heads,
            block=chosen.block,
            left=chosen.left,
            segment=chosen.segment,
            aside=chosen.aside,
            bits=chosen.bits is not None,
            shown=chosen.shown,
            shared=chosen.shared is not None,
        )
        self._cols(context, self._tiles_of_cols(context))
        read = self._col_arguments()
        ways: tuple[Literal["own", "given"] | None, ...] = (of,)
        if self.repeats and self.kept:
            self._keys_kept(branch, grads)
            ways = ("given",)
        elif self.repeats:
            ways = ("given", "own")
        for way in ways:
            again = self.repeats and way == "own"
            made = together.parts(self.draft, chosen, context, read, self._grads(), again=again)
            if way == "given" and not self.repeats:
                lists = together.members(self.draft, chosen)
                made = replace(
                    made,
                    buffers=(*lists.buffers, *made.buffers),
                    launches=(*lists.launches, *made.launches),
                    sizes=(*lists.sizes, *made.sizes),
                )
            self.step(
                "keys",
                buffers=(*grads, *made.buffers),
                launches=made.launches,
                sizes=made.sizes,
                turns=made.turns,
                of=way,
            )

    def _keys_of_blocks(self, branch: cols.Branch, grads: tuple[Buffer, ...]) -> None:
        """Of blocks that were chosen: lists of rows, parts by chunks of them, and the sums."""
        context = cols.of_blocks(
            self.shape,
            branch,
            entries=self.entries,
            list_heads=self.list_heads,
            left=self.beside,
        )
        config = self._tiles_of_cols(context)
        self._rows_by_block(context)
        self._cols(context, config)
        total = cols.SumContext(name=f"sum_{self.name}", of=context)
        self.draft.kernel("merge", total, tiles.sums(), self.node.name, follows=context.name)
        name, heads, lists = self.name, f"heads_{self.name}", context.lists
        block_n = f'config["{context.name}"]["BLOCK_N"]'
        turn, padded, capacity = f"turn_{name}", f"padded_{name}", f"capacity_{name}"
        dims = self._held
        bytes_of_head = 4 * lists * sum(dims)
        sizes: Sizes = (
            (f"block_n_{name}", block_n),
            (f"block_tiles_{name}", f"({self.op.size - 1} + block_n_{name}) // block_n_{name}"),
            (padded, f"block_tiles_{name} * block_n_{name}"),
            (heads, str(self.shape.kv_heads)),
            (f"bytes_{name}", f"{capacity} * {padded} * {bytes_of_head}"),
            *buckets.turns(name, heads, f"batch.rows * {self.draft.held // 2}"),
        )
        parts = (f"part_k_{name}", f"part_v_{name}")[: len(dims)]
        per_turn = f"{turn} * {lists}" if lists > 1 else turn
        per_count = f"count * {lists}" if lists > 1 else "count"
        rows_of = f"{per_turn} * {capacity}"
        buffers = tuple(
            Buffer(name=part, dtype="f32", dims=(rows_of, padded, str(dim)), role="scratch")
            for part, dim in zip(parts, dims, strict=True)
        )
        if self.bias:
            parts += (f"part_bias_{name}",)
            buffers += (
                Buffer(name=parts[-1], dtype="f32", dims=(rows_of, padded), role="scratch"),
            )
        shared = (f"length_{name}", f"buckets_{name}")
        launches = (
            Launch(
                kernel=context.name,
                grid=(f"{capacity} * block_tiles_{name}", per_count),
                arguments=(
                    *self._col_arguments(),
                    *parts,
                    *(f"{x}_{name}" for x in ("chunks", "chunk_counts", "ends", "list")),
                    *shared,
                    f"items_{name}",
                    capacity,
                    *text.SEQ,
                    "tile_first",
                ),
            ),
            Launch(
                kernel=total.name,
                grid=(f"buckets_{name} * block_tiles_{name}", "count"),
                arguments=(
                    *parts,
                    *self._grads(),
                    *(f"{x}_{name}" for x in ("starts", "ends", "firsts")),
                    *shared,
                    capacity,
                    *text.SEQ,
                    "tile_first",
                ),
            ),
        )
        self.step(
            "keys",
            buffers=(*grads, *buffers),
            launches=launches,
            sizes=sizes,
            turns=(heads, turn),
        )

    def _rows_by_block(self, context: cols.ColsContext) -> None:
        """The rows that chose each block, in their order."""
        name, lists = self.name, str(self.list_heads)

        def listing(how: cols.ListingHow, config: Config, follows: str | None = None) -> str:
            made = cols.ListingContext(
                name=f"{how}_rows_{name}",
                how=how,
                heads=self.list_heads,
                width=self.width,
                stride=self.op.stride,
                causal=self.shape.causal,
            )
            return self.draft.kernel("index", made, config, self.node.name, follows=follows)

        tally = listing("tally", tiles.listing(next_power(self.width)))
        before = listing("before", tiles.before())
        chunks = listing("chunks", tiles.chunks(), context.name)
        listed = listing("list", tiles.one_tile(), tally)
        length, buckets, items = f"length_{name}", f"buckets_{name}", f"items_{name}"
        spans, span_tiles, capacity = f"spans_{name}", f"span_tiles_{name}", f"capacity_{name}"
        of = f"{text.input_of(self.node.inputs[1])}.shape[1] // {self.op.stride}"
        row_tiles = f"row_tiles_{name}"
        sizes: Sizes = (
            (f"packed_{name}", f"{of} if batch.packed else 0"),
            (length, f"0 if batch.packed else {of}"),
            (buckets, f"batch.sequences * ({length} + 1) + packed_{name}"),
            (items, f"batch.rows * {self.width}"),
            (row_tiles, text.tiles_of(tally)),
            (spans, f"min({cols.SPANS}, {row_tiles})"),
            (span_tiles, f"({row_tiles} + {spans} - 1) // {spans}"),
            (capacity, f'{items} // config["{context.name}"]["BLOCK_C"] + {buckets}'),
        )
        shapes = {
            "tally": (lists, spans, buckets),
            "totals": (lists, buckets),
            "starts": (lists, buckets),
            "ends": (lists, buckets),
            "firsts": (lists, buckets),
            "chunks": (lists, capacity, "2"),
            "chunk_counts": (lists, "1"),
            "list": (lists, items),
        }
        at = {x: f"{x}_{name}" for x in shapes}
        buffers = tuple(
            Buffer(name=at[x], dtype="i32", dims=dims, role="list", zeros=x == "tally")
            for x, dims in shapes.items()
        )
        counted = (length, buckets)
        in_spans = (spans, span_tiles, *text.SEQ)
        launches = (
            Launch(
                kernel=tally,
                grid=(spans, lists),
                arguments=(*self.selection, at["tally"], *counted, *in_spans),
            ),
            Launch(
                kernel=before,
                grid=(f"{buckets} // {{BLOCK_N}} + 1", lists),
                arguments=(at["tally"], at["totals"], buckets, spans),
            ),
            Launch(
                kernel=chunks,
                grid=(lists, "1"),
                arguments=(
                    *(at[x] for x in ("totals", "starts", "ends", "firsts")),
                    at["chunks"],
                    at["chunk_counts"],
                    buckets,
                    capacity,
                ),
            ),
            Launch(
                kernel=listed,
                grid=(spans, lists),
                arguments=(
                    *self.selection,
                    *(at[x] for x in ("tally", "starts", "list")),
                    *counted,
                    items,
                    *in_spans,
                ),
            ),
        )
        self.step("rows by block", buffers=buffers, launches=launches, sizes=sizes)
