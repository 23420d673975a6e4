"""What fills the `streams` skeleton: `rows` whose keys one warp streams into shared memory, on Hopper.

Two groups of four warps attend, each with half of a tile's rows, while the tensor memory accelerator brings
their keys and values: a dot of one group runs beside the exponentials of the other, and in each group the
scores of one step beside the sums of the step before.  Triton's own loops do neither, so these are in Gluon.

Of latents (`latents.py.jinja`) a token's heads are the rows of both groups, each of which has half of the
value: one scores, and gives the other its weights.  Four warps gather the tokens of the list.  Of their
gradients (`latents_gradient.py.jinja`) one group scores, the other finds what weights are to change by, and
each sums about half of the columns of dq and of what the token gives its keys.

Decides what a rows kernel needs to be written so.  Loops, addresses and masks stay those of `rows`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hsgen.plan import Config, Kernel, Launch, Param
from hsgen.rows import BLOCKS, WORKER, Chunk, Kept, Phase, RowsContext, Warped
from hsgen.target import Target

GROUPS = 2  # of four warps, which share a tile's rows
LEAST_ROWS = 64  # of a group: what its dots take
MERGED = 16  # tokens whose candidates are read as one list
SCORED_ROWS = 256  # that meet a tile of 64 keys
REGISTERS = 240  # of a thread of a group
STREAM_REGISTERS = 24  # of a thread of the stream's warp
LATENT_REGISTERS = 208
GATHER_REGISTERS = 72  # of a thread of the four warps that gather
LATENT_STEP = 64  # keys
HANDED = ("p_shared", "rescale_shared", "full", "free", "p_full", "p_free")
COLUMNS = 64  # of a tile where gradients of latents are made
MOST_COLUMNS = 5  # such tiles of dq that a group's registers hold
LATENT_GRADIENT = ("q_shared", "do_shared", "k_shared", "p_shared", "ds_shared")
# barriers, and who arrives at them: groups, but threads of a gather
ARRIVALS = {"rows_full": 2, "full": 128, "free": 2, "p_full": 1, "p_free": 2, "ds_full": 1}
# registers of a thread for a gradient, scores, what they change by and its operand
MOST_DERIVED = 208
NARROWEST = 64  # columns that one swizzled row of shared memory holds
WIDEST = 128
Group = Literal["score", "derive", "attend"]
LEFT_OUT = re.compile(r"if (\w+ < 0):")  # of a tile whose union another kernel finds too dear
BOUND = re.compile(r"n < (\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A buffer of tiles, [BLOCK_N, width] each: columns [offset, offset + width) of keys or values."""

    chunk: Chunk
    of: str  # K or V

    @property
    def name(self) -> str:
        """Of the buffer: k0."""
        return f"{self.of.lower()}{self.chunk.index}"

    @property
    def source(self) -> str:
        """Of the descriptor: K0."""
        return f"{self.of}{self.chunk.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamsContext(Warped):
    """Everything `streams.py.jinja` reads; `rows` is what `rows.py.jinja` would."""

    rows: RowsContext
    params: tuple[Param, ...]
    header: str = ""
    pieces: str = ""

    @property
    def name(self) -> str:
        return self.rows.name

    @property
    def summary(self) -> str:
        return self.rows.summary

    @property
    def latent(self) -> bool:
        """Whether values are the first channels of keys, half of them each group's."""
        return self.rows.latent

    @property
    def apart(self) -> bool:
        """Whether each group has tiles of its own: rows that share a list are no more than it has."""
        return apart(self.rows)

    @property
    def owns(self) -> tuple[str, ...]:
        """What tells buffers of keys apart: those of one stream, or of each group's."""
        return self.suffixes if self.apart else ("",)

    @property
    def half(self) -> str:
        """The rows of a group."""
        return "BLOCK_M" if self.apart else "BLOCK_M // 2"

    @property
    def items(self) -> str:
        """Which items a program's groups take, or one of them."""
        if self.apart:
            return f"gl.program_id(0) * {GROUPS} + GROUP, items, gl.num_programs(0) * {GROUPS}"
        return "gl.program_id(0), items, gl.num_programs(0)"

    @property
    def key_columns(self) -> range:
        """Tiles of COLUMNS columns that a latent has."""
        return range(sum(c.width for c in self.rows.qk_chunks) // COLUMNS)

    @property
    def value_columns(self) -> range:
        """Those of them that are a value too."""
        return range(sum(c.width for c in self.rows.v_chunks) // COLUMNS)

    def own_columns(self, group: int, made: Literal["dq", "given"]) -> tuple[int, ...]:
        """Tiles that a group sums: half of the value each; the first, which has one step less to do, dq's
        other columns, the second those of what keys are given.
        """
        half = (len(self.value_columns) + 1) // 2
        rest = self.key_columns[len(self.value_columns) :] if made == "dq" else ()
        first = (*range(half), *rest)
        return first if group == 0 else tuple(i for i in self.key_columns if i not in first)

    @property
    def barriers(self) -> Mapping[str, int]:
        """Of a gradient of latents: who arrives at each."""
        return ARRIVALS

    @property
    def listing(self) -> tuple[str, ...]:
        """Where a token's list is; no word says which of a tile's rows chose what: there is one."""
        return tuple(x for x in map(self._of_program, self.rows.setup) if "own_bit" not in x)

    @property
    def keys(self) -> tuple[Tile, ...]:
        if self.latent:
            return tuple(Tile(chunk=chunk, of="K") for chunk in latent_tiles(self.rows))
        return tuple(Tile(chunk=chunk, of="K") for chunk in self.rows.qk_chunks)

    @property
    def values(self) -> tuple[Tile, ...]:
        if self.latent:
            return self.keys[:GROUPS]
        return tuple(Tile(chunk=chunk, of="V") for chunk in self.rows.v_chunks)

    @property
    def tile(self) -> str:
        return self._of_program(self.rows.tile or "tl.program_id(0)")

    @property
    def kv_head(self) -> str:
        """The key/value head of a tile's rows; keys of an index have but one."""
        if not self.rows.key_head:
            return "0"
        found = re.search(r"\+ \(?((?:turn_)?head(?: // \d+)?)\)?\.to", self.rows.key_head)
        assert found is not None
        return found[1]

    @property
    def stream_setup(self) -> tuple[str, ...]:
        """What the stream must know: which tiles, but nothing of rows."""
        known = [self._of_program(line) for line in self._later]
        if self.latent:
            return tuple(known)
        phases = () if self.rows.children else self.rows.phases
        needed = {word for p in phases for word in _words(p.start, p.stop, *p.at)}
        needed |= {"list_base", "TILES"} if self.listed or self.rows.children else set()
        kept: list[str] = []
        for line in reversed(known):
            made = line.split(" = ")[0].split(":")[0]
            if made in needed:
                kept.append(line)
                needed |= _words(line.split(" = ", 1)[1])
        return tuple(reversed(kept))

    @property
    def bounds(self) -> tuple[str, ...]:
        """What a group that reads no list must know of how long it is."""
        asked = {word for p in self.rows.phases for word in _words(p.start, p.stop)}
        return tuple(line for line in self.stream_setup if line.split(" = ")[0] in asked)

    @property
    def setup(self) -> tuple[str, ...]:
        lines = (self._of_group(self._of_program(line)) for line in self._later)
        if self.rows.children:  # a list ends where it says so
            lines = (line for line in lines if not line.startswith("parents = "))
        first = f"tokens = GROUP * (HALF // {self.rows.pitch}) + token_at("
        return tuple(line.replace("tokens = token_at(", first) for line in lines)

    @property
    def _later(self) -> tuple[str, ...]:
        """Setup but for what an item says: whether the tile is another kernel's, which share it is."""
        return tuple(line for line in _later(self.rows) if line not in WORKER)

    @property
    def present(self) -> str:
        """Whether the tile has a row."""
        absent = self.rows.absent
        if self.early:
            (left_out,) = re.findall(LEFT_OUT, self.rows.setup[_end_of_early(self.rows)])
            return f"({absent.replace('>=', '<')}) & ({left_out.replace('<', '>=')})"
        return "t0 < q_len" if absent == "t0 >= q_len" else f"not ({absent})"

    @property
    def early(self) -> tuple[str, ...]:
        """Lines of setup that tell whether another kernel has the tile."""
        return tuple(map(self._of_program, self.rows.setup[: _end_of_early(self.rows)]))

    def body(self, phase: Phase) -> tuple[str, ...]:
        """What is known of a step before its dots."""
        keys = "gl.arange(0, BLOCK_N, layout=by_key)"
        return tuple(line.replace("tl.arange(0, BLOCK_N)", keys) for line in phase.body)

    @property
    def listed(self) -> bool:
        return any(phase.kind in ("list", "picked") for phase in self.rows.phases)

    @property
    def gathers(self) -> bool:
        """Whether four warps gather tokens, each for itself, where else one brings whole tiles."""
        return picks(self.rows)

    def bytes(self, tiles: Iterable[Tile]) -> str:
        """Of one step's tiles."""
        return " + ".join(f"{tile.source}.block_type.nbytes" for tile in tiles)

    @property
    def members(self) -> bool:
        """Whether it passes over steps that no row of a group chose."""
        return any(phase.members for phase in self.rows.phases)

    @property
    def store(self) -> str:
        """The piece that writes outputs, or a gradient."""
        r = self.rows
        adds = r.adds if r.derives else r.store == "add_outputs"
        return "add_packed" if adds else "store_packed"

    def alive(self, suffix: str) -> str:
        """Which (token, head) pairs there are, of vectors that have a suffix."""
        return re.sub(r"\b(rows|token|place)\b", rf"\1{suffix}", self._of_group(self.rows.alive))

    def token_in_tile(self, rows: str) -> str:
        """As of `rows`; where tokens are scored, a group's rows are numbered by themselves."""
        if not self.scores:
            return self.rows.token_in_tile(rows)
        own = self._of_group(self.rows.token_in_tile(rows))
        return f"GROUP * (HALF // {self.rows.pitch}) + {own}"

    def head_in_token(self, rows: str) -> str:
        """As of `rows`, likewise."""
        return self._of_group(self.rows.head_in_token(rows))

    def value(self, s: str) -> str:
        """What becomes of scores that are called `s`."""
        return re.sub(r"\bs\b", s, self.rows.value)

    @property
    def reduced(self) -> str:
        """A tile of scores, over heads."""
        return self._of_group(self.rows.reduced)

    def _of_group(self, text: str) -> str:
        return text.replace("BLOCK_M", "HALF") if self.scores else text

    def written(self, phase: Phase) -> str:
        """Which scores are kept, of slots that are called `at`."""
        text = phase.inside if phase.written == "inside" else phase.written
        return re.sub(r"\b(slot|n)\b", "at", text)

    def bound(self, phase: Phase) -> str:
        """The first key that is not there, of a phase whose tiles may reach beyond; else empty."""
        found = BOUND.fullmatch(phase.inside)
        return found[1] if found else ""

    def stream_reads(self, name: str) -> bool:
        lines = [*self.stream_setup]
        if self.latent:
            lines += [text for p in self.rows.phases for text in (p.start, p.stop, p.inside)]
        return any(name in _words(line) for line in lines)

    def _of_program(self, line: str) -> str:
        of_heads = "items // tiles // workers" if self.rows.by_shares else "items // tiles"
        for rows, streams in (
            ("tl.program_id(0)", "program"),
            ("tl.num_programs(1)", f"({of_heads})"),
            ("tl.arange", "gl.arange"),
        ):
            line = line.replace(rows, streams)
        return line

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of what groups and stream share in shared memory."""
        if self.latent and self.rows.derives:
            return (*LATENT_GRADIENT, *self.barriers)
        if self.latent:
            return (*(tile.name for tile in self.keys), *HANDED)
        return (
            *(tile.name for tile in (*self.keys, *self.values)),
            *(f"{of}_{state}" for of in self.streams for state in ("full", "free")),
        )

    def shared_of(self, group: int) -> tuple[str, ...]:
        """The same, as a group or its stream is given them."""
        own = self.suffixes[group] if self.apart else ""
        return tuple(f"{name}{own}" for name in self.shared)

    @property
    def scores(self) -> bool:
        """Whether it scores, so that one tile's dots run beside another's sums."""
        return self.rows.acc == "score"

    @property
    def group(self) -> Group:
        """What the two groups of warps do."""
        return "score" if self.scores else "derive" if self.rows.derives else "attend"

    @property
    def streams(self) -> str:
        """What is streamed, a letter each."""
        return "kv" if self.values else "k"

    @property
    def queries(self) -> tuple[str, ...]:
        """Buffers of one group's queries."""
        return tuple(f"q{tile.chunk.index}" for tile in self.keys)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of buffers of queries: each group's own."""
        return tuple(f"_{group}" for group in range(GROUPS))

    @property
    def operands(self) -> tuple[str, ...]:
        """Buffers of one group's rows: queries, and for a gradient those of outputs."""
        values = self.values if self.rows.derives else ()
        return (*self.queries, *(f"do{tile.chunk.index}" for tile in values))

    def operands_of(self, group: int) -> tuple[str, ...]:
        return tuple(f"{name}{self.suffixes[group]}" for name in self.operands)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of tiles that are summed, times what becomes of scores, each once."""
        summed = self.keys if self.rows.derives else self.values
        return tuple(sorted({tile.chunk.width for tile in summed}))

    @property
    def registers(self) -> int:
        return LATENT_REGISTERS if self.latent or self.gathers else REGISTERS

    @property
    def stream_registers(self) -> int:
        return GATHER_REGISTERS if self.latent or self.gathers else STREAM_REGISTERS

    @property
    def descriptors(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.params if p.kind == "tiles")


def _end_of_early(context: RowsContext) -> int:
    """How many lines of setup come before the one that leaves a tile to another kernel; 0: none does."""
    found = (i for i, line in enumerate(context.setup) if LEFT_OUT.fullmatch(line))
    return next(found, 0)


def _later(context: RowsContext) -> tuple[str, ...]:
    """Lines of setup behind those that tell whether the tile is another kernel's."""
    end = _end_of_early(context)
    return context.setup[end + 2 :] if end else context.setup


def _words(*texts: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))


# --- what can be streamed


def gathered(context: RowsContext, target: Target, dtype: str) -> bool:
    """Whether latents of a list can be gathered: two halves of a value, and what more their keys have."""
    kinds = [phase.kind for phase in context.phases]
    (widest, *more) = (c.width for c in context.qk_chunks)
    return (
        target.streams
        and dtype != "fp32"
        and context.acc == "softmax"
        and context.latent
        and context.parts
        and not (context.gate or context.joins or context.page or context.split)
        and not isinstance(context.turn, Kept)
        and kinds == ["gather"]
        and len(context.v_chunks) == 1
        and WIDEST <= widest // GROUPS <= 256
        and all(NARROWEST <= width <= 256 for width in more)
    )


def gives(context: RowsContext, target: Target, dtype: str) -> bool:
    """Whether gradients of latents can be made so: of one token's heads, in tiles of 64 columns."""
    keys, values = (sum(c.width for c in cut) for cut in (context.qk_chunks, context.v_chunks))
    return (
        target.streams
        and dtype != "fp32"
        and context.gives
        and context.latent
        and context.parts
        and context.gate is None
        and not context.cap
        and keys % COLUMNS == values % COLUMNS == 0
        and (values // COLUMNS + 1) // 2 + (keys - values) // COLUMNS <= MOST_COLUMNS
        and shared_bytes_of_latents(context) <= target.smem_per_block
    )


def shared_bytes_of_latents(context: RowsContext) -> int:
    """Of queries, outputs' gradients, one step of keys, weights and what they are to change by."""
    keys, values = (sum(c.width for c in cut) for cut in (context.qk_chunks, context.v_chunks))
    return 2 * LEAST_ROWS * (2 * keys + values + 2 * LATENT_STEP) + 1024


def latent_gradient_config(context: RowsContext) -> Config:
    """One token's heads, and a step of 64 keys."""
    heads = min(LEAST_ROWS, context.pitch)
    values = (("BLOCK_T", 1), ("BLOCK_M", LEAST_ROWS), ("BLOCK_N", LATENT_STEP), ("BLOCK_H", heads))
    return Config(constexprs=(*values, ("STAGES", 1)), num_warps=4, num_stages=1)


def latent_tiles(context: RowsContext) -> tuple[Chunk, ...]:
    """Columns of keys: a half of the value each group's, then those that are only keys'."""
    first, *more = context.qk_chunks
    half = first.width // GROUPS
    halves = (replace(first, index=g, width=half, offset=g * half, source=g * half) for g in (0, 1))
    return (*halves, *(replace(c, index=c.index + 1) for c in more))


def latent_config(context: RowsContext, target: Target) -> Config | None:
    """One token's heads, and as many steps as there is room for: two of 64 keys on Hopper."""
    dims = sum(c.width for c in context.qk_chunks)
    fixed = LEAST_ROWS * (dims + LATENT_STEP) * 2 + 1024
    stages = (target.smem_per_block - fixed) // (LATENT_STEP * dims * 2)
    if stages < 2:
        return None
    heads = min(LEAST_ROWS, context.pitch)
    values = (("BLOCK_T", 1), ("BLOCK_M", LEAST_ROWS), ("BLOCK_N", LATENT_STEP), ("BLOCK_H", heads))
    values += (("STAGES", min(4, stages)),)
    return Config(constexprs=values, num_warps=4, num_stages=1)


def possible(context: RowsContext, target: Target, dtype: str) -> bool:
    """Whether a kernel's keys can come in a stream: tiles of whole rows, at places that are known."""
    chunks = (*context.qk_chunks, *context.v_chunks)
    kinds = {phase.kind for phase in context.phases}
    setups = any(line.lstrip().startswith(("if ", "return")) for line in _later(context))
    return (
        target.streams
        and dtype != "fp32"
        and (bool(context.v_chunks) if context.reads_values else _scores(context))
        and not (
            context.latent
            or context.parts
            or context.width_of_list
            or (context.joins and not context.derives)
            or (context.derives and context.cap)
            or context.page
            or context.ordered
            or context.bias_scale
        )
        and kinds <= {"range", "steps", "list", "children", "picked"}
        and context.together in ("", "part")
        and not setups
        and all(NARROWEST <= chunk.width <= WIDEST and not chunk.clip for chunk in chunks)
        and all(
            BOUND.fullmatch(p.inside) or not p.inside or context.children for p in context.phases
        )
        and context.heads <= GROUPS * LEAST_ROWS
    )


def apart(context: RowsContext) -> bool:
    """Whether rows share a list, and are so few that one group has all of them."""
    shared = context.rows_together * context.heads
    return context.together == "part" and shared < GROUPS * LEAST_ROWS


def picks(context: RowsContext) -> bool:
    """Whether keys are tokens that a tile's rows picked, of any place."""
    return any(phase.kind == "picked" for phase in context.phases)


def _scores(context: RowsContext) -> bool:
    """Whether it scores many entries by whole tiles, keys first, whose heads some group reduces."""
    kinds = {phase.kind for phase in context.phases}
    reduced = context.spread and not (context.together or context.across)
    whole = kinds == {"range"} or (kinds == {"children"} and context.children % LEAST_ROWS == 0)
    return context.acc == "score" and reduced and whole and context.many_keys


def streamed(context: RowsContext) -> StreamsContext:
    """The same kernel with its keys and values in a stream."""
    params: list[Param] = []
    plain = context.latent or picks(context)
    for param in context.params:
        if param.name in ("K", "V") and not plain:
            chunks = context.qk_chunks if param.name == "K" else context.v_chunks
            of = "Dqk" if param.name == "K" else "Dv"
            params += (
                Param(
                    name=f"{param.name}{chunk.index}",
                    kind="tiles",
                    dtype=param.dtype,
                    columns=chunk.width,
                    comment=f"[B, S, Hkv, {of}], {chunk.width} columns a tile",
                )
                for chunk in chunks
            )
        elif re.fullmatch(r"[kv]_[bth]", param.name) and not plain:
            continue  # the descriptor's
        elif param.kind == "constexpr":
            continue
        else:
            params.append(param)
    at = [p.name for p in params].index("num_sequences") + 1
    counts = (
        Param(
            name="whose",
            kind="count",
            comment="1: each sequence has keys of its own; 0: all lie in one",
        ),
        Param(name="tiles", kind="count", comment="of a head"),
        Param(
            name="items",
            kind="count",
            comment="shares of tiles of all heads" if context.by_shares else "tiles of all heads",
        ),
    )
    if context.by_shares:
        counts += (Param(name="workers", kind="count", comment="shares of a tile's keys"),)
    tunables = [p for p in context.params if p.kind == "constexpr"] if context.latent else BLOCKS
    deep = Param(name="STAGES", kind="constexpr", comment="steps that are in flight")
    counts = counts[1:] if plain else counts
    return StreamsContext(
        rows=context, params=(*params[:at], *counts, *params[at:], *tunables, deep)
    )


def tiles(context: RowsContext, target: Target, *, most: int, block: int | None) -> Config | None:
    """Rows of two groups, or of each with a stream, and the widest steps of which two or more fit."""
    rings = GROUPS if apart(context) else 1
    group_rows = GROUPS * LEAST_ROWS // rings
    tokens = 1 << (group_rows // context.heads).bit_length() - 1
    keys, values = (sum(c.width for c in cut) for cut in (context.qk_chunks, context.v_chunks))
    dims = keys + values
    rows = GROUPS * LEAST_ROWS * (dims if context.derives else keys) * 2
    if tokens > most:
        return None
    for width in (128, 64, 32, 16):
        if block and block % width:
            continue
        if context.derives and keys // 2 + width // 2 * 2 + width // 4 > MOST_DERIVED:
            continue
        stages = (target.smem_per_block - rows - 2048) // (rings * width * dims * 2)
        if stages >= 2:
            values = (
                ("BLOCK_T", tokens),
                ("BLOCK_M", group_rows),
                ("BLOCK_N", width),
                ("STAGES", min(4, stages)),
            )
            return Config(constexprs=values, num_warps=4, num_stages=1)
    return None


def number_bytes(context: RowsContext) -> int:
    """Of a number of queries and keys."""
    return 1 if context.eight else 2


def score_tiles(context: RowsContext, target: Target) -> Config | None:
    """As many rows as the registers of a group have room for, beside 64 keys that are read once for all."""
    tokens = 1 << (SCORED_ROWS // context.pitch).bit_length() - 1
    # of candidates that are read for all rows, more are read the more rows there are
    if context.children:
        tokens = min(tokens, MERGED)
    dims = sum(c.width for c in context.qk_chunks) * number_bytes(context)
    while tokens >= GROUPS:
        rows = tokens * context.pitch
        stages = (target.smem_per_block - rows * dims - 4096) // (LEAST_ROWS * dims)
        if stages >= 3 and rows >= LEAST_ROWS:
            values = (("BLOCK_T", tokens), ("BLOCK_M", rows), ("BLOCK_N", LEAST_ROWS))
            values += (("STAGES", min(6, stages)),)
            return Config(constexprs=values, num_warps=4, num_stages=1)
        tokens //= 2
    return None


def of_tiles(kernel: Kernel, leader: Config | None = None) -> Kernel:
    """The same kernel in the skeleton that its tiles are of, or those of the kernel that it follows."""
    tiles = leader or kernel.config
    if "STAGES" not in dict(tiles.constexprs) or not isinstance(kernel.context, RowsContext):
        return kernel
    skeleton = "streams"
    if kernel.context.latent:
        skeleton = "latents_gradient" if kernel.context.derives else "latents"
    return replace(kernel, skeleton=skeleton, context=streamed(kernel.context))


def launch(launch: Launch, context: StreamsContext, leader: str) -> Launch:
    """The same launch by one program a processor, each for one tile after another; tiles are the leader's."""
    tiles_, heads, *workers = launch.grid
    tiles_ = tiles_.replace("{BLOCK_T}", f'config["{leader}"]["BLOCK_T"]')
    names = [p.name for p in context.rows.params if p.kind != "constexpr"]
    given = dict(zip(names, launch.arguments, strict=True))
    made: list[str] = []
    for param in context.params:
        if param.kind == "tiles":
            rows = f'config["{leader}"]["BLOCK_N"]'
            made.append(f"batch.tile_of({given[param.name[0]]}, {rows}, {param.columns})")
        elif param.name == "whose":
            alone = given["k_b"] == "0"  # of one sequence alone, or of all that a batch has
            made.append("0" if alone else "0 if batch.packed else 1")
        elif param.name == "tiles":
            made.append(tiles_)
        elif param.name == "items":
            made.append(" * ".join((f"({tiles_})", heads, *workers)))
        elif param.name == "workers":
            made += workers
        elif param.kind != "constexpr":
            made.append(given[param.name])
    return replace(launch, grid=("batch.processors",), arguments=tuple(made))
