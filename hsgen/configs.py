"""The tile sizes that each kernel starts from: what fits the GPU and, as compiled, hardly spills.

Guesses that tuning replaces; benchmarks/starts.py says how far some are from what an H100 does best.  The
kernels' text does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsgen import rows, splits
from hsgen.appending import StoreContext
from hsgen.blockgate import GateContext
from hsgen.clusters import GRADIENTS, ClustersContext
from hsgen.entropies import EntropiesContext
from hsgen.errors import PlanError
from hsgen.estimates import EstimateContext
from hsgen.foretold import WaysContext
from hsgen.graph import Pool
from hsgen.kernels import LONG_TEXT, MOST_HELD, RankContext
from hsgen.learn import DistanceContext
from hsgen.likeness import LikenessContext
from hsgen.maps import MapsContext
from hsgen.pairs import PairsContext
from hsgen.plan import Config, Kernel, Plan
from hsgen.rows import next_power
from hsgen.running import TILE_ROWS, RunningContext
from hsgen.splits import BesideContext
from hsgen.takes import TakesContext
from hsgen.target import Target
from hsgen.trees import How, TreesContext

DType = Literal["bf16", "fp16", "fp32"]
# a call, the gradients of one, or a step behind a cache
Work = Literal["forward", "gradients", "decode"]


WIDE_DIMS = 256  # of a key and a value
SCORES = 1024  # of a warp that ranks a few rows
SCORED = 128  # of a warp that scores them first: four of each head a thread
SCORING = 4  # warps that do so, of rows that are not short
SHORT_ROW = 256  # scores
FEW_PROGRAMS = 128  # which a GPU runs at once, whatever their registers
STORED = 4096  # numbers of a warp that puts a few tokens into a cache
SUMS = 1 << 15  # numbers that a tile of outputs may have: half of a processor's registers


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of steps behind a cache, by which their kernels start.

    `tokens`: new ones of each sequence; `keys`: that each of the `sequences` has room for; `page`: tokens of
    a page, 0: in one piece.
    """

    tokens: int
    keys: int
    sequences: int
    page: int = 0

    def __str__(self) -> str:
        page = f" in pages of {self.page}" if self.page else ""
        rows, many = f"{self.tokens} new of each", f"{self.sequences} sequences"
        return f"{rows} of {many} with room for {self.keys:,} tokens{page}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTiles:
    """Tiles of the `rows` skeleton on one GPU, for tensors of one dtype."""

    target: Target
    dtype: DType

    @property
    def _bytes(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    def attend(
        self,
        context: rows.RowsContext,
        *,
        limit: int = 64,
        tokens: int | None = None,
        most: int = 128,
        block: int | None = None,
    ) -> Config:
        """Rows to fill a tile of `limit`, keys a step and stages that fit the shared memory.

        Three-pass TF32 holds each operand twice, so 32-bit operands get tiles of 32 by 32.
        """
        wide = 64 if self.target.dots_read_shared else 32
        if self._bytes == 4:
            limit = wide = 32
        elif context.heads == 1 and block:
            limit = 128
        limit = min(limit, SUMS // max(1, sum(c.width for c in context.v_chunks)))
        block_t = tokens or 1 << max(1, min(most, limit // context.heads)).bit_length() - 1
        if block and block == next_power(block):
            wide = max(16, min(wide, block))
        dims = sum(c.width for c in (*context.qk_chunks, *context.v_chunks))
        if context.latent and not self.target.tensor_columns:
            dims = sum(c.width for c in context.qk_chunks)  # a tile of keys is one of values
        deepest = 3
        if self._bytes == 4:
            deepest = 2
            if dims > 2 * WIDE_DIMS:  # queries alone fill the registers
                limit = wide = 16
        elif context.latent and dims > 2 * WIDE_DIMS:
            wide = min(wide, 32)  # two buffers rather than one that is twice as wide
        elif tokens == 1:
            # gathered rows come one by one: what counts is how many programs wait for some
            config = self._fit(context, 1, min(wide, 32), deepest, dims, limit)
            return replace(config, num_warps=1) if config["BLOCK_M"] <= 16 else config
        elif dims > WIDE_DIMS and limit <= 64:
            deepest = 2  # leaves room for two programs on a processor
        return self._fit(context, block_t, wide, deepest, dims, limit)

    def of_tokens(self, context: rows.RowsContext, *, most: int = 128) -> Config:
        """Tiles that walk a list of tokens: what looks these up leaves room for half of the registers."""
        config = self.attend(context, limit=128, most=most)
        sums = config["BLOCK_M"] * sum(c.width for c in context.v_chunks)
        many = sums >= 64 * config.num_warps * self.target.warp_size
        return replace(config, num_warps=8) if many else config

    def score(self, context: rows.RowsContext) -> Config:
        """As for attending, but with no output to hold there is room for more rows.

        With the keys first, a warpgroup's 64 keys meet all rows of the tile: four warps do.  Where rows are
        loaded again for each key head, their addresses fill the registers, so that there are fewer.
        """
        dims = sum(c.width for c in context.qk_chunks)
        limit = wide = 64
        if (
            context.by_parts
        ):  # a video has some hundred tiles: few rows a program, for many programs
            return self._fit(context, 16, 64, 3, dims)
        if context.keys_first and self._bytes == 2 and not context.children:
            if context.across:
                return self._fit(context, max(1, 64 // context.pitch), wide, 3, dims)
            config = self._fit(context, max(1, 128 // context.pitch), wide, 2, dims)
            return replace(config, num_warps=4)
        if self._bytes == 4:
            # tensor memory would be filled from registers, three times over
            limit = 32 if self.target.tensor_columns else 64
            wide = 32 if self.target.dots_read_shared and not self.target.tensor_columns else 16
        if context.children:
            wide = max(16, min(wide, next_power(context.children)))
            return replace(self._fit(context, 1, wide, 2, dims), num_warps=4 if wide >= 64 else 2)
        if context.behind:
            return self._fit(context, 1, wide, 3, dims)
        return self._fit(context, max(1, limit // context.pitch), wide, 3, dims)

    def step(self, context: rows.RowsContext) -> Config:
        """Of one row of a sequence, whose keys several programs share: many keys on their way at a time."""
        if context.latent:
            return self.attend(context, tokens=1)
        dims = sum(c.width for c in (*context.qk_chunks, *context.v_chunks))
        wide = 64 if self._bytes == 2 else 32
        if context.children:
            wide = max(16, min(wide, next_power(context.children)))
        return self._fit(context, 1, wide, 3, dims)

    def _fit(
        self,
        context: rows.RowsContext,
        block_t: int,
        wide: int,
        deepest: int,
        dims: int,
        limit: int = 0,
    ) -> Config:
        """The most rows, then the widest step, then the deepest pipeline that shared memory holds.

        Fewer stages cost least, then narrower steps; fewer rows mean that all keys are read more often.
        `limit`: rows that a tile may have, of a token whose heads are those of several programs.
        """
        need = 0
        for tokens, heads in _packings(context, block_t, limit):
            block_m = max(16, next_power(tokens * heads))
            for width in _halves(wide, 16):
                for stages in range(deepest, 0, -1):
                    need = self._shared(context, block_m, width, stages, dims)
                    if need <= self.target.smem_per_block:
                        wide_rows = block_m * sum(c.width for c in context.v_chunks) > SUMS // 2
                        warps = 8 if block_m >= 128 or wide_rows else 4
                        values = (("BLOCK_T", tokens), ("BLOCK_M", block_m), ("BLOCK_N", width))
                        values += (("BLOCK_H", heads),) if context.parts else ()
                        return Config(constexprs=values, num_warps=warps, num_stages=stages)
        raise PlanError(
            f"kernel {context.name} cannot run on {self.target.name} ({self.target.label}): needs at "
            f"least about {need:,} bytes of shared memory a block, the limit is "
            f"{self.target.smem_per_block:,}"
        )

    def _shared(
        self,
        context: rows.RowsContext,
        block_m: int,
        width: int,
        stages: int,
        dims: int,
    ) -> int:
        """A bound on the shared memory of a block: what the compiler was seen to take, or a little more.

        Queries, buffers of keys and values, a tile of probabilities.  Three-pass TF32 splits operands in
        two; keys too where tensor cores read them from shared memory, else while they are converted.
        """
        split = self._bytes == 4 and self.target.dot_precision == "tf32x3"
        queries = block_m * sum(c.width for c in context.qk_chunks) * self._bytes
        buffers = max(1, stages - 1) + (split and context.acc != "softmax")
        if self.target.dots_read_shared and block_m >= 64:
            buffers = stages + split
        probabilities = block_m * width * 4
        return (queries + probabilities) * (1 + split) + buffers * width * dims * self._bytes + 1024


def _packings(context: rows.RowsContext, block_t: int, limit: int) -> tuple[tuple[int, int], ...]:
    """Tokens a tile and heads a token: fewer tokens first, then of one token fewer heads."""
    if not context.parts:
        return tuple((tokens, context.pitch) for tokens in _halves(block_t, 1))
    heads = min(context.pitch, limit)
    fewer = tuple((1, n) for n in _halves(heads // 2, 16))
    return (*((tokens, heads) for tokens in _halves(block_t, 1)), *fewer)


def _halves(most: int, least: int) -> tuple[int, ...]:
    """64, 32, 16."""
    return tuple(most >> i for i in range((most // least).bit_length()))


def pool(op: Pool, dim: int, dtype: DType, *, finishes: bool = False) -> Config:
    """Entries a program, and slots or channels a step; `finishes`: they are normed or rotated too."""
    if op.how == "linear":
        lowest = dim & -dim
        tile = 32 if dtype == "fp32" else 64  # three-pass TF32 holds operands twice
        values = (("BLOCK_E", tile), ("BLOCK_D", min(tile, lowest)))
        return Config(constexprs=values, num_warps=4, num_stages=2)
    if op.how == "max_min_mean":
        step = (("BLOCK_D", min(32, dim & -dim)), ("BLOCK_J", min(16, next_power(op.size))))
        return Config(constexprs=(("BLOCK_E", 16), *step), num_warps=4, num_stages=1)
    if op.how == "first":  # one load an entry
        return Config(constexprs=(("BLOCK_E", 32),), num_warps=4, num_stages=1)
    if op.how == "gated" or finishes:  # a gate beside each number, sums beside those of mates
        widest = 1 << dim.bit_length() - 1
        tokens = min(16, next_power(op.size), max(1, 2048 // widest))
        values = (("BLOCK_E", max(1, 2048 // (tokens * widest))), ("BLOCK_J", tokens))
        return Config(constexprs=values, num_warps=4, num_stages=1)
    return pool_tokens(op.size)


def pool_across(width: int, dtype: DType) -> Config:
    """Of entries that a step completes, `width` columns of them: a long sum, of few numbers at a time."""
    values = (("BLOCK_E", 16), ("BLOCK_D", min(32 if dtype == "fp32" else 64, width)))
    return Config(constexprs=values, num_warps=4, num_stages=4)


def pool_tokens(size: int) -> Config:
    """The same, of entries that are pooled channel by channel."""
    tokens = min(64 if size >= 128 else 16, next_power(size))  # long entries: few of them
    values = (("BLOCK_E", max(1, 8192 // (tokens * 128))), ("BLOCK_J", tokens))
    return Config(constexprs=values, num_warps=4, num_stages=1)


def pool_rows(block: int, *, turns: bool) -> Config:
    """Of blocks of rows, each one query; `turns`: which is rotated, so that halves of pairs are all there.

    Rows of a block are read at once: 1 GB by 16 of them took 1.7 ms on an H200, where a copy reads 0.4.
    """
    found = pool_tokens(block)
    if not turns:
        return found
    values = (("BLOCK_E", 1), ("BLOCK_J", min(64, next_power(block))))
    return Config(constexprs=values, num_warps=found.num_warps, num_stages=1)


def rounding(dim: int) -> Config:
    """Vectors a program: as many as fill its registers."""
    values = (("BLOCK_V", max(1, 4096 // next_power(dim))),)
    return Config(constexprs=values, num_warps=4, num_stages=1)


def turning(dim: int) -> Config:
    """Rows a program: as many as fill its registers."""
    values = (("BLOCK_T", max(1, 4096 // next_power(dim))),)
    return Config(constexprs=values, num_warps=4, num_stages=1)


def rank(
    slots: int,
    stride: int,
    tokens: int,
    *,
    grouped: bool,
    chunked: bool = False,
    kept: int = 0,
    wide: bool = False,
) -> Config:
    """Scores of a row in registers, for up to 128K tokens; longer rows are read in each pass.

    Every pass ends in a sum over the row: within one warp that is cheap, between warps it waits.
    `grouped`: passes see few keys of a long row, `chunked`: which few registers hold.  `kept`: of a row
    that a sample tells about; `wide`: by many warps.
    """
    if kept:
        return replace(_sampled(kept), num_warps=8) if wide else _sampled(kept)
    longest = slots or LONG_TEXT // stride
    width = max(64, min(MOST_HELD if slots or chunked else 2048, next_power(longest)))
    values = (("BLOCK_R", max(1, min(tokens, 256 // width))), ("BLOCK_N", width))
    warps = 4 if width > 1024 and not grouped else 1
    return Config(constexprs=values, num_warps=warps, num_stages=1)


def rank_by_mass(stride: int) -> Config:
    """A key and a mass of each entry in registers, of texts up to 128K tokens where a warp has room."""
    width = max(64, min(1024, next_power(LONG_TEXT // stride)))
    return Config(constexprs=(("BLOCK_R", 1), ("BLOCK_N", width)), num_warps=1, num_stages=1)


def rank_alone(*, by_mass: bool) -> Config:
    """One row for a whole sequence, whose programs are few: many warps share it."""
    values = (("BLOCK_T", 1), ("BLOCK_R", 1), ("BLOCK_N", 8192 if by_mass else 4096))
    return Config(constexprs=values, num_warps=16 if by_mass else 8, num_stages=1)


def maps(context: MapsContext, target: Target, dtype: DType) -> Config:
    """Tiles of products, as large as their sums leave registers for, then as many stages as have room."""
    size, rows_of, wide, step = (4, 64, 64, 16) if dtype == "fp32" else (2, 128, 256, 64)
    if not target.dots_read_shared:  # operands are in registers too
        wide = min(wide, 128)
    tokens = 1 if context.last else max(1, rows_of // context.per_row)
    step = min(step, context.most_channels)
    deepest = {
        columns: (target.smem_per_block - 8192)
        // ((tokens * context.per_row + columns) * step * size)
        for columns in (max(width, context.per_entry) for width in _halves(wide, 32))
    }
    columns = next((each for each, stages in deepest.items() if stages >= 2), min(deepest))
    values = (("BLOCK_T", tokens), ("BLOCK_N", columns), ("BLOCK_D", step))
    return Config(constexprs=values, num_warps=8, num_stages=max(1, min(4, deepest[columns])))


def sums(context: MapsContext) -> Config:
    """Blocks of entries a step, of all rows of a block."""
    step = max(16, 2048 // context.per_row)
    return Config(constexprs=(("BLOCK_N", step),), num_warps=4, num_stages=1)


def estimate(context: EstimateContext, target: Target, dtype: DType) -> Config:
    """Blocks of keys a step, two at least, then as many stages as leave room for a second program."""
    size = 4 if dtype == "fp32" else 2
    wide = max(context.least, 32 if dtype == "fp32" else 128)
    held, step = (rows * context.head_dim * size for rows in (context.padded_rows, wide))
    stages = (target.smem_per_block // 2 - 4096 - held) // step
    return Config(
        constexprs=(("BLOCK_N", wide),),
        num_warps=4 if context.padded_rows <= 64 else 8,
        num_stages=max(1, min(3, stages)),
    )


def likeness(context: LikenessContext) -> Config:
    """Tokens of a block, or of a piece, at a time."""
    most = 64 if context.how == "sums" else max(1, 4096 // next_power(context.head_dim))
    step = min(most, next_power(context.size))
    return Config(constexprs=(("BLOCK_J", step),), num_warps=4, num_stages=1)


def halved(dtype: DType) -> Config:
    """Intervals a program: as many as a warpgroup's dot has rows; three-pass TF32 holds keys twice."""
    values = (("BLOCK_T", 1), ("BLOCK_N", 32 if dtype == "fp32" else 64))
    return Config(constexprs=values, num_warps=4, num_stages=1)


def trees(context: TreesContext, dtype: DType) -> Config:
    """Of a learned tree: tokens and nodes a step, rows a tile, tokens that are looked at at a time."""
    step = 32 if dtype == "fp32" else 64
    few = context.padded_nodes <= 64  # that many rows have no more scores than 16 of a level of 256
    values: dict[How, tuple[tuple[str, int], ...]] = {
        "unit": (("BLOCK_E", 16),),
        "assign": (("BLOCK_N", 64), ("BLOCK_E", 32)),
        "descend": (("BLOCK_T", 64 if few else 16),),
        "keep": (("BLOCK_T", 32), ("BLOCK_N", 64), ("BLOCK_K", 1024)),
        "sift": (("BLOCK_N", step), ("BLOCK_K", 1024), ("BLOCK_R", context.best_rows)),
    }
    # all nodes are in registers, of a row or a chunk, and all rows' bits of a step
    wide = context.how in ("tally", "keep") or (context.how == "descend" and not few)
    return Config(constexprs=values.get(context.how, ()), num_warps=8 if wide else 4, num_stages=1)


def takes(context: TakesContext, dtype: DType) -> Config:
    """Of nodes that take tokens: rows and tokens of dots, rows of lists, slots that are looked at a step."""
    full, wide = dtype == "fp32", max(context.head_dim, context.v_dim) > 128
    tile = 32 if full or wide else 64
    values: dict[str, tuple[tuple[str, int], ...]] = {
        "near": (("BLOCK_N", 64), ("BLOCK_E", 32)),
        "mark": (("BLOCK_N", 128),),
        "spread": (("BLOCK_T", 4),),
        "members": (("BLOCK_T", 16), ("BLOCK_K", 16)),
        "attend": (("BLOCK_T", tile), ("BLOCK_N", 32)),
        "mean": (("BLOCK_T", 32),),
    }
    return Config(constexprs=values.get(context.how, ()), num_warps=4, num_stages=1)


def clusters(context: ClustersContext, dtype: DType) -> Config:
    """Of clusters: tokens and centroids a step, rows a tile, slots that are written down at a time.

    Three-pass TF32 holds each operand twice.
    """
    full = dtype == "fp32"
    wide = max(context.head_dim, context.v_dim) > 128
    tile = 32 if full or wide else 64
    values: dict[str, tuple[tuple[str, int], ...]] = {
        "start": (("BLOCK_E", 16),),
        "assign": (
            ("BLOCK_N", 32 if full else 64 if wide else 128),
            ("BLOCK_E", 32 if full else 64),
        ),
        "update": (("BLOCK_N", 32),),
        "score": (("BLOCK_R", tile), ("BLOCK_E", tile)),
        "values": (("BLOCK_N", 32),),
        "errors": (("BLOCK_R", tile), ("BLOCK_N", 32)),
        "choose": (("BLOCK_R", 1 if context.padded_keys > 1024 else 2),),
        "attend": (("BLOCK_T", 2 * tile), ("BLOCK_N", tile), ("BLOCK_K", 1024)),
        "members": (("BLOCK_T", 4), ("BLOCK_K", 64)),
        "spread": (("BLOCK_T", 4),),
        "bits": (("BLOCK_T", 4),),
        "queries": (("BLOCK_T", tile), ("BLOCK_N", tile), ("BLOCK_K", 1024)),
        "keys": (("BLOCK_T", tile), ("BLOCK_N", tile)),
        "means": (("BLOCK_T", tile), ("BLOCK_N", tile)),
    }
    warps, stages = 4, 1
    if context.how == "assign":
        warps, stages = (4, 2) if full or wide else (8, 2)
    if context.how == "attend":
        warps, stages = 8, 2
    if context.how in GRADIENTS:
        warps = 8
    if context.how == "starts":
        warps = 8
    if context.how == "update":
        warps = 2
    follows = context.given and context.how == "attend"  # a call's own choice
    own = () if follows else values.get(context.how, ())
    return Config(constexprs=own, num_warps=warps, num_stages=stages)


def _sampled(kept: int) -> Config:
    """Room for twice the keys that are kept, so that an estimate of where they begin may be off."""
    width = max(2048, min(8192, next_power(2 * kept)))
    return Config(constexprs=(("BLOCK_R", 1), ("BLOCK_N", width)), num_warps=4, num_stages=1)


def threshold(stride: int) -> Config:
    """A row a program: scores are read twice, a tile of them at a time."""
    width = max(64, min(1024, next_power(LONG_TEXT // stride)))
    values = (("BLOCK_R", 1), ("BLOCK_N", width))
    return Config(constexprs=values, num_warps=4, num_stages=1)


def running(context: RunningContext) -> Config:
    """A point's list and as many tokens behind it, sixteen a thread."""
    values = () if context.how == "points" else (("BLOCK_T", TILE_ROWS),)
    warps = max(1, min(16, context.room // 256))
    return Config(constexprs=values, num_warps=warps, num_stages=1)


def means() -> Config:
    """Entries whose biases are added up."""
    return Config(constexprs=(("BLOCK_E", 64),), num_warps=2, num_stages=1)


def ways(context: WaysContext) -> Config:
    """A program a head: the masses of as many blocks as have 8,192 keys."""
    blocks = max(16, 8192 // context.size)
    return Config(constexprs=(("BLOCK_N", blocks),), num_warps=8, num_stages=1)


def listing() -> Config:
    """A tile's list, as long as it may be."""
    return Config(constexprs=(("BLOCK_N", 128),), num_warps=4, num_stages=1)


def pairs(context: PairsContext) -> Config:
    """Rows of a head: one a program, or all of them, many at a time."""
    width = max(64, min(1024, next_power(LONG_TEXT // context.stride)))
    if context.how != "edges":
        return Config(constexprs=(("BLOCK_N", width),), num_warps=4, num_stages=1)
    values = (("BLOCK_R", 4 if context.mass else 8), ("BLOCK_N", width))  # a mass has 64 bits
    return Config(constexprs=values, num_warps=16, num_stages=1)


def rank_steps(
    slots: int, stride: int, *, grouped: bool, kept: int = 0, scores: bool = False
) -> Config:
    """Of a few rows, whose programs find room: longer rows in registers, of more warps.

    `scores`: it makes them too, of what an attend left.
    """
    if kept:
        return _sampled(kept)
    width = max(64, min(8192 if slots else 4096, next_power(slots or LONG_TEXT // stride)))
    warps = 1 if grouped or width <= 1024 else 4 if width <= 2048 else 8
    values = (("BLOCK_R", 1), ("BLOCK_N", width))
    if scores:
        warps = max(SCORING, warps)
        values = (("BLOCK_T", 1), *values, ("BLOCK_W", SCORED * warps), ("BLOCK_P", splits.MOST))
    return Config(constexprs=values, num_warps=warps, num_stages=1)


def for_rows(plan: Plan, tokens: int, keys: int, batch: int = 1) -> Plan:
    """The same plan of a few rows for so many of a sequence: one tile has all of them.

    A kernel that walks a row's own list, or scores below it, takes one row, however many there are.
    `keys`: most of a sequence; all scores of a row are then in registers, of as few warps as hold them.
    """
    of = next_power(tokens)
    return plan.with_config({k.name: _of_rows(k, of, keys, batch * tokens) for k in plan.kernels})


def for_steps(plan: Plan, sizes: Sizes) -> Plan:
    """The same of a step's sizes."""
    return for_rows(plan, sizes.tokens, sizes.keys, sizes.sequences)


def _of_rows(kernel: Kernel, tokens: int, keys: int, all_rows: int) -> Config:
    values, warps = dict(kernel.config.constexprs), kernel.config.num_warps
    context = kernel.context
    alone = isinstance(context, rows.RowsContext) and (
        context.one_token or context.children or context.parts
    )
    if isinstance(context, rows.RowsContext) and not alone:
        block_m = max(16, next_power(tokens * context.pitch))
        values |= {"BLOCK_T": tokens, "BLOCK_M": block_m}
        warps = 8 if block_m >= 128 else warps
    if isinstance(context, rows.RowsContext) and context.one_token:
        values["BLOCK_T"] = tokens  # rows of a sequence, of which a program takes one
    if isinstance(context, BesideContext):
        pitches = [branch.rows.pitch for branch in context.branches if not branch.rows.one_token]
        block_m = max(rows.least_rows(tokens * pitch) for pitch in (1, *pitches))
        values |= {"BLOCK_T": tokens, "BLOCK_M": block_m}
        warps = 8 if block_m >= 128 else warps
    if kernel.skeleton == "rank":
        values["BLOCK_R"] = min(values["BLOCK_R"], tokens)
        assert isinstance(context, RankContext)
        if not context.children:
            width = next_power(keys // context.stride + 1)
            width = _sampled_width(context, width, all_rows) if context.sampled else width
            width = max(64, min(2 * MOST_HELD if context.sampled else MOST_HELD, width))
            values["BLOCK_N"] = width
            warps = max(1, width // max(1, context.group) // SCORES)  # or the greatest of groups
        if context.summed:
            warps = 1 if values["BLOCK_N"] <= SHORT_ROW else max(SCORING, warps)
            values |= {"BLOCK_T": tokens, "BLOCK_W": SCORED * warps}
    if isinstance(context, StoreContext):
        values["BLOCK_V"] = tokens
        warps = max(4, min(16, next_power(tokens * context.numbers) // STORED))
    return replace(kernel.config, constexprs=tuple(values.items()), num_warps=warps)


def _sampled_width(context: RankContext, width: int, all_rows: int) -> int:
    """Of a text that holds half of it in registers, else copies what a sample says, up to the whole.

    All of a row where programs are so few that none waits for another; room for four times what is kept
    where there are many, of one warp each.
    """
    if all_rows * context.heads <= FEW_PROGRAMS and width <= MOST_HELD:
        return 2 * width
    return min(2 * width, MOST_HELD, max(1024, 4 * next_power(context.kept)))


def for_interpreter(plan: Plan) -> Plan:
    """The same plan for small shapes in Triton's interpreter, where each step of a program is dear.

    Few programs with many rows each, and short steps; the emitted text stays the same.
    """
    return plan.with_config({k.name: _interpreted(plan, k) for k in plan.kernels})


def _interpreted(plan: Plan, kernel: Kernel) -> Config:
    values = dict(kernel.config.constexprs)
    if kernel.skeleton == "rank" and "BLOCK_N" in values:
        tokens = plan.kernel(kernel.follows or kernel.name).config["BLOCK_T"]
        values["BLOCK_N"] = 64
        if "BLOCK_R" in values:
            values["BLOCK_R"] = min(16, tokens)
    if kernel.skeleton == "trees" and "BLOCK_N" in values:
        small = {"BLOCK_T": 16, "BLOCK_N": 16, "BLOCK_K": 64}
        if isinstance(kernel.context, TakesContext):
            small["BLOCK_E"] = 16
        values |= {name: value for name, value in small.items() if name in values}
    if kernel.skeleton == "clusters":
        small = {"BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_E": 64, "BLOCK_R": 16, "BLOCK_K": 64}
        values = {name: small[name] for name in values}
    # a walk ranks several times, few tokens
    few = {
        "halved": {"BLOCK_N": 16},
        "sorting": {"BLOCK_N": 64, "BLOCK_P": 16} if "BLOCK_P" in values else {},
    }
    values |= few.get(kernel.skeleton, {})
    if kernel.skeleton in ("rows", "beside", "cols") and "BLOCK_N" in values:
        values["BLOCK_N"] = min(values["BLOCK_N"], 32)
    if isinstance(kernel.context, EntropiesContext):
        values |= {name: 16 * (1 + (name == "BLOCK_T")) for name in values}
    elif isinstance(kernel.context, GateContext):
        small = {"BLOCK_U": max(1, 32 // kernel.context.gate.rows), "BLOCK_E": 4}
        if kernel.context.how in ("finish", "tokens"):
            small["BLOCK_E"] = 16
        values |= {name: small.get(name, 16) for name in values}
    elif isinstance(kernel.context, DistanceContext):
        values["BLOCK_R"] = 16
    elif kernel.skeleton == "learn":
        values |= {"BLOCK_N": min(values["BLOCK_N"], 32)} | (
            {x: 32 for x in ("BLOCK_T", "BLOCK_R") if x in values}
        )
    if "BLOCK_R" in values and kernel.skeleton == "merge" and "BLOCK_P" not in values:
        values["BLOCK_R"] = 256
    return replace(kernel.config, constexprs=tuple(values.items()))
