"""The gradients of tiers: one softmax over tokens and means of some, whose lists are those of blocks of rows.

A tier is a branch of its own as far as keys go: each block of keys has the blocks of rows that read it so,
and gradients of means go back to their tokens.  Heads have turns, each with its means, their gradients in
float32, lists, and parts of gradients, which one tier has after the other.  Which tier an entry has in a
block of rows no selection says: it is ranked again (`again`), as for a selection of a caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from hsgen import cols, pyramids, rows, streams, together
from hsgen.backward import tiles
from hsgen.backward.gathered import Gradients
from hsgen.backward.together import LEAST_ROOM, MARKING
from hsgen.backward.tokens import Lists
from hsgen.graph import Attend, Node, Pool
from hsgen.plan import Buffer, Config, Launch
from hsgen.rows import next_power
from hsgen.schedule import choosing, laid, text, vectors
from hsgen.schedule.draft import Draft
from hsgen.unpool import UnpoolContext

SHARE = Fraction(1, 2)  # of what a call is given, that a turn may have


def turn(made: Gradients, node: Node, op: Attend, *, rows_: tuple[str, ...]) -> Lists:
    """What a turn of heads does.

    rows_: the output's gradient, log-sum-exp and delta, as kernels take them.
    """
    return _Turn(made, node, op, rows_).plan()


@dataclass(slots=True)
class _Turn:
    """What it has, while it grows."""

    whole: Gradients
    node: Node
    op: Attend
    of_rows: tuple[str, ...]
    stored: set[str] = field(
        default_factory=set[str]
    )  # tensors that have a gradient, which is added to
    sizes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    buffers: list[Buffer] = field(default_factory=list[Buffer])
    launches: list[Launch] = field(default_factory=list[Launch])

    @property
    def draft(self) -> Draft:
        return self.whole.draft

    @property
    def shape(self) -> rows.Shape:
        return self.draft.shape_of(self.op)

    @property
    def scale(self) -> float:
        return self.op.scale if self.op.scale is not None else 1.0

    @property
    def merges(self) -> tuple[int, ...]:
        assert self.op.merges is not None, "tiers are attended by merges"
        return self.op.merges

    @property
    def chosen(self) -> Node:
        return self.draft.graph[self.node.inputs[3]]

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.draft.block(self.chosen)

    @property
    def list_heads(self) -> int:
        return self.draft.size(self.chosen.type.dims[2])

    @property
    def tiers(self) -> str:
        return text.buffer(choosing.chosen_of(self.chosen))

    @property
    def capacity(self) -> str:
        return choosing.slots_of(self.draft, self.chosen)

    @property
    def means(self) -> tuple[Node, ...]:
        """Keys and values of each merge."""
        return tuple(x for x in self.draft.graph.operands(self.node) if isinstance(x.op, Pool))

    @property
    def turns(self) -> together.Turns:
        """How many heads have one, and which come first."""
        return together.Turns(
            heads=self.shape.kv_heads,
            sizes=(),
            turn=f"turn_{self.op.branch}",
            buffers=(),
            launches=(),
            makes=(),
        )

    def of(self, *names: str) -> tuple[str, ...]:
        """Names in the driver."""
        return tuple(f"{name}_{self.op.branch}" for name in names)

    def plan(self) -> Lists:
        of_keys = self._of_keys()
        dq = self._queries()
        made = {
            node.name: vectors.means_of_turn(self.draft, node, self.turns.turn)
            for node in self.means
        }
        self._sizes(dq, of_keys, made)
        self.buffers += (of.buffer for of in made.values())
        self.launches += (of.launch for of in made.values())
        self._lists()
        self._attend(dq)
        self._parts(of_keys)
        for tier, context in enumerate(of_keys):
            self._keys(tier, context)
        for node in self.means:
            self._unpool(node)
        return Lists(
            buffers=tuple(self.buffers),
            sizes=tuple(self.sizes),
            launches=tuple(self.launches),
            arguments=(),
            turns=(str(self.shape.kv_heads), self.turns.turn),
        )

    # --- kernels

    def _queries(self) -> rows.RowsContext:
        """dq, in the loops of the forward."""
        forward = pyramids.attend(
            self.shape,
            name=f"attend_{self.op.branch}",
            scale=self.scale,
            size=self.op.size,
            merges=self.merges,
            counted=bool(self.op.counted),
            share=self.chosen.type.dims[2],
            block=self.block,
            given=True,
        )
        forward = together.of_whole(forward, block=self.block, heads=self.list_heads, in_turn=True)
        forward = rows.with_logits(forward, scale=self.scale, softcap=self.op.softcap, sink=False)
        buffers, adds = self.whole.buffer("q")
        self.buffers += buffers
        dq = cols.query_gradient(forward, name=f"dq_{self.op.branch}", scale=self.scale, adds=adds)
        target, dtype = self.draft.target, self.draft.dtype
        config = None
        if streams.possible(dq, target, dtype):
            config = streams.tiles(dq, target, most=self.block, block=self.op.size)
        config = config or tiles.of_rows(dq, target, dtype, most=self.block, block=self.op.size)
        self.draft.attend(dq, config, self.node.name)
        return dq

    def _of_keys(self) -> tuple[cols.ColsContext, ...]:
        """dk and dv, tier by tier: of tokens as the caller has them, of means as theirs are."""
        for name in self.node.inputs[1:3]:
            buffers, adds = self.whole.buffer(name)
            self.buffers += buffers
            if adds:
                self.stored.add(name)
        k, v = self.node.inputs[1:3]
        found: list[cols.ColsContext] = []
        for merge in self.merges:
            branch = cols.Branch(
                name=self.op.branch,
                scale=self.scale,
                softcap=self.op.softcap,
                turn=None,
                adds=(k in self.stored, v in self.stored) if merge == 1 else (False, False),
            )
            context = cols.of_tier(
                self.shape,
                branch,
                size=self.op.size,
                merge=merge,
                counted=bool(self.op.counted),
                list_heads=self.list_heads,
                block=self.block,
            )
            config = tiles.of_cols(context, self.draft.target, self.draft.dtype)
            self.draft.kernel("cols", context, config, self.node.name)
            found.append(context)
        return tuple(found)

    # --- how many heads have a turn

    def _sizes(
        self,
        dq: rows.RowsContext,
        of_keys: tuple[cols.ColsContext, ...],
        made: Mapping[str, vectors.Made],
    ) -> None:
        """Of a head of keys: means and their gradients, lists, and parts of the longest tier."""
        blocks, words, tokens, parts, tiled, held = self.of(
            "row_blocks", "num_words", "tokens", "parts", "tiles", "held"
        )
        length, buckets, most = self.of("length", "buckets", "most")
        lists = max(1, self.list_heads // self.shape.kv_heads)
        wide = self.shape.qk + self.shape.v
        of = f"{text.input_of(self.node.inputs[1])}.shape[1] // {self.op.size}"
        self.sizes += (
            (blocks, f"batch.rows // {self.block} + 3 * {text.SEQ[1]}"),
            (words, str(cols.words_of(self.block))),
            (tokens, f'config["{dq.name}"]["BLOCK_T"]'),
            (parts, f"({self.block} + {tokens} - 1) // {tokens}"),
            (tiled, f"{blocks} * {parts}"),
            (f"packed_{self.op.branch}", f"{of} if batch.packed else 0"),
            (length, f"0 if batch.packed else {of}"),
            (buckets, f"{text.SEQ[1]} * ({length} + 1) + packed_{self.op.branch}"),
            (most, f"(in_q.shape[1] // {self.block} + 2) * {of_keys[0].lists}"),
            (held, f"{blocks} * {self.capacity} * ({words} + 1) * {4 * lists}"),
            (held, f"{held} + {buckets} * ({most} + 1) * 4"),
        )
        for name, each in made.items():
            means = f"rows_{text.safe(name)}"
            self.sizes += (
                *each.sizes,
                (held, f"{held} + {means} * {each.bytes + 4 * self._dim(name)}"),
            )
        longest: list[str] = []
        for context in of_keys:
            block_n, of_block = self.of_tier(context, "block_n", "block_tiles")
            self.sizes += (
                (block_n, f'config["{context.name}"]["BLOCK_N"]'),
                (of_block, f"({context.size - 1} + {block_n}) // {block_n}"),
            )
            longest.append(f"{of_block} * {block_n}")
        key_rows, heavy = self.of("key_rows", "heavy_rows")
        self.sizes += (
            (key_rows, _most(longest)),
            (
                heavy,
                f"{text.SEQ[1]} * {max(x.heavy for x in of_keys)} * {key_rows}",
            ),
            (held, f"{held} + {buckets} * {key_rows} * {4 * wide}"),
            *laid.of_heads(self.draft, self.op.branch, held, SHARE),
        )
        room, number = self.of("room_of_parts", "key_parts")
        bytes_of_heavy = f"({heavy} * {self.turns.turn} * {4 * wide})"
        most_room = f"min(SCRATCH_BYTES // 4, batch.rows * {self.draft.held // 8})"
        self.sizes += (
            (room, f"max({LEAST_ROOM}, {most_room})"),
            (number, f"1 + min({cols.PARTS - 1}, {room} // {bytes_of_heavy})"),
        )

    def of_tier(self, context: cols.ColsContext, *names: str) -> tuple[str, ...]:
        """Names in the driver of what a tier has."""
        return tuple(f"{name}_{context.name.removeprefix('dkv_')}" for name in names)

    def _dim(self, mean: str) -> int:
        return self.draft.size(self.draft.graph[mean].type.dims[3])

    # --- lists

    def _lists(self) -> None:
        """The entries of each block of rows, tier by tier, and which of its rows chose them."""
        members = pyramids.TiersContext(
            name=f"members_{self.op.branch}",
            heads=self.list_heads,
            rows=self.block,
            size=self.op.size,
            causal=self.shape.causal,
            tiers=len(self.merges),
            whole=False,
            given=True,
        )
        tile = next_power(self.block)
        values = (("BLOCK_T", tile), ("BLOCK_K", max(16, MARKING // tile)), ("BLOCK_N", 512))
        config = Config(constexprs=values, num_warps=4, num_stages=1)
        self.draft.kernel("index", members, config, self.node.name)
        counts, entries, words, blocks, number = self.of(
            "counts", "entries", "words", "row_blocks", "num_words"
        )
        heads = self.turns.of(self.list_heads, self.turns.turn)
        listed = (blocks, heads)
        shapes = {
            counts: (*listed, str(len(self.merges) + 1)),
            entries: (*listed, self.capacity),
            words: (*listed, self.capacity, number),
        }
        self.buffers += (
            Buffer(name=name, dtype="i32", dims=dims, role="list") for name, dims in shapes.items()
        )
        selection = text.buffer(self.chosen.name)
        self.launches.append(
            Launch(
                kernel=members.name,
                grid=(blocks, self.turns.of(self.list_heads, "count")),
                arguments=(
                    *together.given_of(selection),
                    self.tiers,
                    *shapes,
                    f"{selection}.shape[3]",
                    self.capacity,
                    *text.SEQ,
                    self.turns.first(self.list_heads),
                ),
            )
        )

    def _attend(self, dq: rows.RowsContext) -> None:
        """dq over these."""
        programs = self.shape.query_heads // dq.heads
        grad = text.strides(self.whole.buffers["q"])
        self.launches.append(
            Launch(
                kernel=dq.name,
                grid=(self.of("tiles")[0], self.turns.of(programs, "count")),
                arguments=(
                    *self.draft.tensors(self.node, self.op),
                    *(x for node in self.means for x in self.draft.tensor(node.name)),
                    *self.of("counts", "entries", "words"),
                    self.capacity,
                    *self.of_rows,
                    *grad,
                    *text.SEQ,
                    self.turns.first(programs),
                ),
            )
        )

    # --- keys stay

    def _parts(self, of_keys: tuple[cols.ColsContext, ...]) -> None:
        """Lists of the blocks of rows of a tier, parts of its gradients, and the gradients of means."""
        counts, listed, buckets, most, number = self.of(
            "row_counts", "row_lists", "buckets", "most", "key_parts"
        )
        key_rows, heavy = self.of("key_rows", "heavy_rows")
        lists = self.turns.of(self.list_heads // of_keys[0].lists, self.turns.turn)
        rows_of = f"{self.turns.turn} * ({buckets} * {key_rows} + {heavy} * ({number} - 1))"
        dims = (self.shape.qk, self.shape.v)
        self.buffers += (
            Buffer(name=counts, dtype="i32", dims=(lists, buckets), role="list"),
            Buffer(name=listed, dtype="i32", dims=(lists, buckets, most), role="list"),
            *(
                Buffer(name=part, dtype="f32", dims=(rows_of, str(dim)), role="scratch")
                for part, dim in zip(self.of("part_k", "part_v"), dims, strict=True)
            ),
        )
        for node in self.means:
            name = text.safe(node.name)
            x = text.input_of(node.inputs[0])
            self.whole.levels[node.name] = f"grad_{name}"
            self.buffers.append(
                Buffer(
                    name=f"grad_{name}",
                    dtype="f32",
                    dims=(
                        f"{x}.shape[0]",
                        f"length_{name}",
                        self.turns.turn,
                        str(self._dim(node.name)),
                    ),
                    role="scratch",
                )
            )

    def _keys(self, tier: int, context: cols.ColsContext) -> None:
        """dk and dv of what a tier has, from the blocks of rows that read it, and the sums of all parts."""
        suffix = context.name.removeprefix("dkv_")
        made = cols.TakersContext(
            name=f"takers_{suffix}",
            heads=self.list_heads,
            lists=context.lists,
            rows=self.block,
            size=self.op.size,
            several=1,
            causal=self.shape.causal,
            tier=tier,
            last=tier == len(self.merges) - 1,
        )
        stepping = Config(constexprs=(("BLOCK_N", 256),), num_warps=4, num_stages=1)
        self.draft.kernel("index", made, stepping, self.node.name)
        total = cols.SumContext(name=f"sum_{suffix}", of=context)
        self.draft.kernel("merge", total, tiles.sums(), self.node.name, follows=context.name)
        counts, listed, length, buckets, most, number = self.of(
            "row_counts", "row_lists", "length", "buckets", "most", "key_parts"
        )
        (words,), parts = self.of("words"), self.of("part_k", "part_v")
        (of_block,) = self.of_tier(context, "block_tiles")
        sizes = (length, buckets, most, self.capacity)
        lists, heads = self.list_heads // context.lists, self.shape.kv_heads
        names = self.node.inputs[1:3]
        if context.merge > 1:
            names = tuple(x.name for x in self.means if x.op.stride == context.merge)  # type: ignore[union-attr]
        read = (*self.draft.tensor("q"), *(x for name in names for x in self.draft.tensor(name)))
        first = (self.turns.first(heads),)
        self.launches += (
            Launch(
                kernel=made.name,
                grid=(buckets, self.turns.of(lists, "count")),
                arguments=(
                    words,
                    self.tiers,
                    counts,
                    listed,
                    *sizes,
                    *text.SEQ,
                    self.turns.first(lists),
                ),
            ),
            Launch(
                kernel=context.name,
                grid=(f"{buckets} * {of_block}", "count", number),
                arguments=(
                    *read,
                    *self.of_rows,
                    *parts,
                    *(counts, listed, words, *sizes),
                    *text.SEQ,
                    *first,
                ),
            ),
            Launch(
                kernel=total.name,
                grid=(f"{buckets} * {of_block}", "count"),
                arguments=(
                    *parts,
                    *(x for name in names for x in self.whole.grad(name)),
                    *(length, number),
                    *text.SEQ,
                    *(first if context.merge == 1 else ()),
                ),
            ),
        )
        if context.merge == 1:
            self.stored |= set(names)

    # --- back to tokens

    def _unpool(self, node: Node) -> None:
        """From gradients of means to those of their tokens."""
        assert isinstance(node.op, Pool), "means are pools"
        (source,), name = node.inputs, text.safe(node.name)
        x = text.input_of(source)
        heads, dim = self.shape.kv_heads, self._dim(node.name)
        context = UnpoolContext(
            name=f"unpool_{name}",
            how="unpool",
            pool="mean",
            heads=heads,
            head_dim=dim,
            size=node.op.size,
            stride=node.op.stride,
            short=True,
            precision=self.draft.target.dot_precision,
            adds=source in self.stored,
            by_turns=True,
        )
        self.stored.add(source)
        config = tiles.unpool("unpool", dim, self.draft.dtype)
        self.draft.kernel("segments", context, config, self.node.name)
        block_v = f"block_v_{name}"
        self.sizes += (
            (f"tokens_{name}", f"0 if batch.packed else {x}.shape[1]"),
            (f"token_rows_{name}", f"{x}.shape[0] * {x}.shape[1]"),
            (block_v, f'config["{context.name}"]["BLOCK_V"]'),
        )
        self.launches.append(
            Launch(
                kernel=context.name,
                grid=(f"token_rows_{name} // {block_v} + {text.SEQ[1]}", "count"),
                arguments=(
                    self.whole.levels[node.name],
                    *text.strides(self.whole.buffers[source]),
                    *(f"count_{name}", f"tokens_{name}"),
                    *text.SEQ,
                    self.turns.first(heads),
                ),
            )
        )


def _most(texts: list[str]) -> str:
    """The greatest of them."""
    return texts[0] if len(texts) == 1 else f"max({', '.join(texts)})"
