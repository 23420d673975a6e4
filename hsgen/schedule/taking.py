"""Launches of nodes that take keys and rows: cosines, the best of each, bits, and what rows attend there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hsgen import configs, takes
from hsgen.errors import PlanError
from hsgen.graph import Assign, Attend, Node, SelectSet
from hsgen.kernels import RankContext
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import text
from hsgen.schedule.draft import Draft
from hsgen.takes import How, TakesContext, Taking
from hsgen.together import given_of
from hsgen.trees import TreesContext

MOST_PROGRAMS = 65535  # along the second axis of a grid


def becomes(draft: Draft) -> Mapping[str, str]:
    """The branch of other heads, which is written where nodes then write theirs."""
    found = takes.taking_of(draft.graph)
    return {found.other.name: found.attend.name} if found and found.other else {}


def launched(draft: Draft, node: Node) -> bool:
    """Whether a node is one of those that attend in nodes, of which the last one gets all launches."""
    found = takes.taking_of(draft.graph)
    if found is None or node.name not in found.names:
        return False
    if node is found.attend:
        _Plan(draft, found).plan()
    return True


class _Plan:
    """What launches of one level have in common."""

    def __init__(self, draft: Draft, found: Taking) -> None:
        assert isinstance(found.assign.op, Assign)
        assert isinstance(found.attend.op, Attend)
        assert isinstance(found.select.op, SelectSet)
        self.draft, self.found = draft, found
        self.level, self.branch = found.assign.op.level, found.attend.op.branch
        shape, assign, select = draft.shape, found.assign.op, found.select.op
        self.any = TakesContext(
            name="",
            how="near",
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.qk,
            v_dim=shape.v,
            nodes=assign.nodes,
            takes=assign.takes or 0,
            width=int(select.value),
            table=found.table,
            causal=shape.causal,
            scale=found.attend.op.scale if found.attend.op.scale is not None else 1.0,
            precision=shape.precision,
        )
        self.keys, self.rows = self.any, replace(self.any, rows=True)
        level = self.level
        self.unit = text.buffer(found.keys.name)
        self.key_lists, self.key_counts = f"keys_{level}", f"key_counts_{level}"
        self.row_lists, self.row_counts = f"rows_{level}", f"row_counts_{level}"
        self.lengths, self.length = f"lengths_{level}", f"length_{level}"
        self.key_bits, self.row_bits = f"key_bits_{level}", f"row_bits_{level}"
        self.nearest = f"{found.select.name}.rows"
        self.chosen = f"{found.select.name}.blocks"
        self.marked = f"{found.assign.name}.bits"

    def plan(self) -> None:
        """Keys of nodes, rows of nodes, and what these attend; of a caller's lists row by row."""
        if self.draft.cached:
            words = f"level {self.level}: no kernel chooses rows of nodes behind a cache yet"
            raise PlanError(words, span=self.found.assign.span)
        self._refuse()
        self._unit()
        self._take(self.keys)
        self._mark(self.keys)
        self._take(self.rows)
        self._mark(self.rows)
        self._spread()
        self._attend()
        self._members()
        self._given()

    def _refuse(self) -> None:
        """Sizes that no kernel has."""
        for what, most, got in (
            ("nodes that take tokens", takes.MOST_NODES, self.any.nodes),
            ("keys of a node", takes.MOST_TAKEN, self.any.takes),
            ("rows of a node", takes.MOST_TAKEN, self.any.width),
        ):
            if got > most:
                raise PlanError(
                    f"level {self.level}: expected at most {most} {what}, got {got}",
                    span=self.found.assign.span,
                )

    def _kernel(
        self, name: str, how: How, *nodes: str, rows: bool = False, follows: str | None = None
    ) -> TakesContext:
        context = replace(self.any, name=name, how=how, rows=rows)
        config = configs.takes(context, self.draft.dtype)
        self.draft.kernel("trees", context, config, *nodes, follows=follows)
        return context

    def _unit(self) -> None:
        """Centroids at unit length."""
        shape, found, nodes = self.draft.shape, self.found, self.any.nodes
        context = TreesContext(
            name=f"unit_{self.level}",
            how="unit",
            heads=shape.kv_heads,
            group=shape.group,
            head_dim=shape.qk,
            nodes=nodes,
            branching=nodes,
            leaves=nodes,
            precision=shape.precision,
        )
        config = configs.trees(context, self.draft.dtype)
        self.draft.kernel("trees", context, config, found.keys.name)
        centroids, heads = text.input_of(found.assign.inputs[1]), str(shape.kv_heads)
        dims = (heads, str(nodes), str(shape.qk))
        self.draft.steps.append(
            Step(
                title=f"centroids: {self.level}",
                needs=(found.assign.inputs[1],),
                makes=(found.keys.name,),
                buffers=(Buffer(name=self.unit, dtype="f32", dims=dims, role="level"),),
                launches=(
                    Launch(
                        kernel=context.name,
                        grid=(f"{nodes} // {{BLOCK_E}} + 1", heads),
                        arguments=(
                            *(centroids, f"{centroids}.stride(0)", f"{centroids}.stride(1)"),
                            self.unit,
                        ),
                    ),
                ),
            )
        )

    def _take(self, side: TakesContext) -> None:
        """Cosines of tokens of a turn's sequences, and the best of each node."""
        found, level, rows = self.found, self.level, side.rows
        whose = "rows" if rows else "keys"
        made = self.nearest if rows else found.assign.name
        of = found.score.name if rows else found.assign.name
        near = self._kernel(f"near_{level}_{whose}", "near", of, rows=rows)
        ranking = RankContext(
            name=f"rank_{level}_{whose}",
            heads=side.nodes,
            k=side.taken,
            width=side.taken,
            size=1,
            stride=1,
            short=True,
            causal=False,
            first=0,
            last=0,
            counted=True,
            rows=1,
            single=True,
            lengths=True,
        )
        node = found.select.name if rows else found.assign.name
        self.draft.kernel("rank", ranking, configs.rank_alone(by_mass=False), node)
        scores, capacity = f"scores_{level}_{whose}", f"capacity_{level}_{whose}"
        turn, pairs = f"turn_{level}_{whose}", f"pairs_{level}_{whose}"
        longest = "in_q.shape[1]" if rows else "batch.keys"
        lists, counts = self._lists(rows=rows)
        lengths = self.lengths if rows else f"key_lengths_{level}"
        listed = (str(side.heads), str(side.nodes))
        buffers = [
            Buffer(name=scores, dtype="f32", dims=(turn, listed[1], capacity), role="scratch"),
            Buffer(
                name=lists,
                dtype="i32",
                dims=("batch.sequences", *listed, str(side.taken)),
                role="list",
            ),
            Buffer(name=counts, dtype="i32", dims=("batch.sequences", *listed, "2"), role="list"),
            Buffer(name=lengths, dtype="i32", dims=("batch.sequences", *listed), role="list"),
        ]
        x = "q" if rows else "k"
        self.draft.steps.append(
            Step(
                title=f"{whose} of nodes: {level}",
                needs=(x, found.keys.name, *((found.assign.name,) if rows else ())),
                makes=(made,),
                sizes=(
                    (capacity, f"max(1, {longest})"),
                    (pairs, f"batch.sequences * {side.heads}"),
                    *self._turn(f"{level}_{whose}", f"{4 * side.nodes} * {capacity}"),
                ),
                buffers=tuple(buffers),
                launches=(
                    Launch(
                        kernel=near.name,
                        grid=(f"{capacity} // {{BLOCK_N}} + 1", "count"),
                        arguments=(
                            *(*self.draft.tensor(x), self.unit, scores, capacity),
                            *((self.key_lists,) if rows else ()),
                            *(lengths, text.SEQ[0], "tile_first"),
                        ),
                    ),
                    Launch(
                        kernel=ranking.name,
                        grid=("count", str(ranking.heads)),
                        arguments=(scores, lists, counts, lengths, "tile_first", capacity),
                    ),
                ),
                tiles=pairs,
                chunk=turn,
            )
        )

    def _turn(self, tag: str, each: str) -> tuple[tuple[str, str], ...]:
        """How many heads of sequences a turn has, of which each holds so many bytes."""
        bytes_of, fit = f"bytes_{tag}", f"fit_{tag}"
        held = f"max(SCRATCH_BYTES // 4, batch.rows * {self.draft.held // 4})"
        return (
            (bytes_of, each),
            (fit, f"{held} // {bytes_of}"),
            (f"turn_{tag}", f"min(pairs_{tag}, {MOST_PROGRAMS}, max(1, {fit}))"),
        )

    def _lists(self, *, rows: bool) -> tuple[str, str]:
        return (self.row_lists, self.row_counts) if rows else (self.key_lists, self.key_counts)

    def _bits(self, side: TakesContext) -> Buffer:
        """Of every token the nodes that it is in, none at first."""
        many = "batch.rows" if side.rows else "in_k.shape[0] * in_k.shape[1]"
        name = self.row_bits if side.rows else self.key_bits
        dims = (many, str(side.heads), str(side.words))
        return Buffer(name=name, dtype="i32", dims=dims, role="list", zeros=True)

    def _mark(self, side: TakesContext) -> None:
        """Of every token the nodes that it is in."""
        found, rows = self.found, side.rows
        whose = "rows" if rows else "keys"
        node = found.select.name if rows else found.assign.name
        context = self._kernel(f"mark_{self.level}_{whose}", "mark", node, rows=rows)
        where = self.lengths if rows else self.length
        own = () if rows else ((self.length, "0 if batch.packed else in_k.shape[1]"),)
        bits = self._bits(side)
        self.draft.steps.append(
            Step(
                title=f"bits of {whose}: {self.level}",
                needs=(self.nearest,) if rows else (found.assign.name, "k"),
                makes=(self.chosen if rows else self.marked,),
                sizes=own,
                buffers=(bits,),
                launches=(
                    Launch(
                        kernel=context.name,
                        grid=(str(side.nodes), str(side.heads), "batch.sequences"),
                        arguments=(*self._lists(rows=rows), where, bits.name, text.SEQ[0]),
                    ),
                ),
            )
        )

    def _spread(self) -> None:
        """Every row's list of nodes, where anybody asks for it."""
        select = self.found.select
        context = self._kernel(f"spread_{self.level}", "spread", select.name)
        made, heads = text.buffer(select.name), str(context.query_heads)
        dims = ("in_q.shape[0]", "in_q.shape[1]", heads, str(context.nodes))
        self.draft.steps.append(
            Step(
                title=f"lists of rows: {self.level}",
                needs=(self.chosen,),
                makes=(select.name,),
                of="rows",
                buffers=(Buffer(name=made, dtype="i32", dims=dims, role="selection"),),
                launches=(
                    Launch(
                        kernel=context.name,
                        grid=(text.TILES, heads),
                        arguments=(self.row_bits, made, *text.SEQ),
                    ),
                ),
            )
        )

    def _read(self) -> tuple[str, ...]:
        """What rows that attend in nodes read of these."""
        tensors = (argument for x in ("q", "k", "v") for argument in self.draft.tensor(x))
        return (*tensors, *self._lists(rows=False), self.key_bits, self.length)

    def _needs(self) -> tuple[str, ...]:
        other = self.found.other
        before = (other.name,) if other else ()
        return ("q", "k", "v", self.found.assign.name, self.marked, *before)

    def _made(self) -> tuple[tuple[str, ...], tuple[Buffer, ...]]:
        """The nodes of the graph that a step makes, and what it brings to life for them."""
        attend, route = self.found.attend, self.found.route
        buffers = self.draft.output_buffers(attend) if self.found.other is None else ()
        return (*self.draft.makes(attend), *((route.name,) if route else ())), buffers

    def _attended(self) -> tuple[str, ...]:
        """Nodes of the graph that are rows of nodes, of which others make what is put out."""
        found = self.found
        merged = (name for name, one in self.draft.merged.items() if one == found.attend.name)
        own = tuple(merged) or (found.attend.name,)
        return (*own, *((found.route.name,) if found.route else ()))

    def _attend(self) -> None:
        """Rows of each node of a turn's sequences, and of every row the mean."""
        makes, buffers = self._made()
        attend = self._kernel(f"attend_{self.branch}", "attend", *self._attended())
        rest = (x for x in makes if x not in self._attended())
        mean = self._kernel(f"mean_{self.branch}", "mean", *rest)
        nodes = attend.nodes
        parts, sums = f"parts_{self.branch}", f"part_lse_{self.branch}"
        slots, turn, pairs = (f"{x}_{self.branch}" for x in ("slots", "turn", "pairs"))
        dims = (turn, str(nodes), slots)
        listed = (*self._lists(rows=True), self.lengths, self.row_bits)
        made = (parts, sums, slots)
        self.draft.steps.append(
            Step(
                title=f"attend: {self.branch}",
                needs=(*self._needs(), self.chosen),
                makes=makes,
                of="own",
                sizes=(
                    (slots, f"max(1, min({attend.width}, in_q.shape[1]))"),
                    (pairs, f"batch.sequences * {attend.row_heads}"),
                    *self._turn(self.branch, f"{4 * nodes * (attend.v_dim + 1)} * {slots}"),
                ),
                buffers=(
                    *buffers,
                    Buffer(
                        name=parts, dtype="f32", dims=(*dims, str(attend.v_dim)), role="scratch"
                    ),
                    Buffer(name=sums, dtype="f32", dims=dims, role="scratch"),
                ),
                launches=(
                    Launch(
                        kernel=attend.name,
                        grid=(f"(({slots} - 1) // {{BLOCK_T}} + 1) * {nodes}", "count"),
                        arguments=(*self._read(), *listed, *made, text.SEQ[0], "tile_first"),
                    ),
                    Launch(
                        kernel=mean.name,
                        grid=("in_q.shape[1] // {BLOCK_T} + 1", "count"),
                        arguments=(
                            *(*listed, *made, *self.draft.outputs(self.found.attend)),
                            *(text.SEQ[0], "tile_first"),
                        ),
                    ),
                ),
                tiles=pairs,
                chunk=turn,
            )
        )

    def _members(self) -> None:
        """A caller's lists as bits."""
        select = self.found.select
        context = self._kernel(f"members_{self.branch}", "members", self.found.attend.name)
        chosen, bits = text.buffer(select.name), self._bits(self.rows)
        self.draft.steps.append(
            Step(
                title=f"bits of the caller's lists: {self.level}",
                needs=(select.name,),
                makes=(f"{select.name}.members",),
                of="given",
                buffers=(bits,),
                launches=(
                    Launch(
                        kernel=context.name,
                        grid=(text.TILES, str(context.row_heads)),
                        arguments=(
                            *(*given_of(chosen), f"{chosen}.shape[3]", bits.name, *text.SEQ),
                        ),
                    ),
                ),
            )
        )

    def _given(self) -> None:
        """Rows over the keys of the nodes that each has in a list of its own."""
        makes, buffers = self._made()
        own = f"attend_{self.branch}"  # whose steps are the same
        context = self._kernel(f"given_{self.branch}", "given", *self._attended(), follows=own)
        self.draft.steps.append(
            Step(
                title=f"attend: {self.branch}, over a selection of the caller's",
                needs=(*self._needs(), f"{self.found.select.name}.members"),
                makes=makes,
                of="given",
                buffers=buffers,
                launches=(
                    Launch(
                        kernel=context.name,
                        grid=(text.tiles_of(own), str(context.row_heads)),
                        arguments=(
                            *(*self._read(), self.row_bits),
                            *(*self.draft.outputs(self.found.attend), *text.SEQ),
                        ),
                    ),
                ),
            )
        )
