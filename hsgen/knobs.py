"""Knobs of one kernel, and the rules that say which of their values go together.

Every value is a power of two, or a number of stages.  Knows skeletons; no search and no compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hsgen.blockgate import GateContext
from hsgen.buckets import BucketsContext, PartsContext
from hsgen.clusters import DOTS, ClustersContext
from hsgen.cols import ColsContext
from hsgen.cols_streams import ColsStreamsContext, shared_bytes
from hsgen.entropies import EntropiesContext
from hsgen.estimates import EstimateContext
from hsgen.foretold import EitherContext
from hsgen.halved import HalvedContext
from hsgen.kernels import (
    IndexContext,
    MarksContext,
    PoolsContext,
    RankContext,
    SegmentsContext,
    ThresholdContext,
    UniteContext,
)
from hsgen.learn import LINE, LearnContext
from hsgen.maps import LastContext, MapsContext
from hsgen.picked import PickedContext
from hsgen.plan import STREAMED, Kernel, Plan
from hsgen.pyramids import TiersContext
from hsgen.rows import MARKED, PICKING, RowsContext, next_power
from hsgen.running import TILE_ROWS, RunningContext
from hsgen.schedule import SORT_LIMIT
from hsgen.sorting import SortingContext
from hsgen.splits import BesideContext
from hsgen.streams import (
    GROUPS,
    LATENT_STEP,
    LEAST_ROWS,
    SCORED_ROWS,
    WIDEST,
    StreamsContext,
    number_bytes,
    shared_bytes_of_latents,
)
from hsgen.target import Target
from hsgen.together import ListsContext
from hsgen.trees import MOST_ROOM, MOST_STEP, WORD, TreesContext
from hsgen.walks import WalkContext

VERSION = 2  # of ranges and rules: a change makes other studies
MOST_ELEMENTS = 1 << 20  # of a tile, Triton's own limit
MOST_ROWS = 256  # of a tile that dots read
ACCUMULATORS = 192  # of 32 bits a thread: more leave no registers for the operands
MOST_SCORES = 128  # a thread, of rows that are ranked: twice as many compile for minutes
LEAST_DOT = 16
GROUP_ROWS = 64  # of a dot of four warps together, Hopper's least

Values = dict[str, int]  # of one kernel: constexprs, num_warps, num_stages
# of a kernel of a step: its rows, tokens, numbers of a token; rows and heads of a program beside them; parts
OF_ROWS = ("BLOCK_T", "BLOCK_M", "BLOCK_V")
OF_STEP = (*OF_ROWS, "BLOCK_R", "BLOCK_H")
OF_PARTS = "BLOCK_P"
# tokens and nodes a step, rows a tile, and tokens whose leaves are looked at at a time, of learned trees
TREES = {
    "BLOCK_E": (16, 128),
    "BLOCK_N": (16, MOST_STEP),
    "BLOCK_T": (16, 64),
    "BLOCK_K": (MOST_STEP, 4096),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One value of one kernel: powers of two from 2^least to 2^most, or least to most themselves.

    A search moves codes, in which a step is a doubling.
    """

    kernel: str
    name: str
    least: int
    most: int
    doubling: bool = True

    @property
    def codes(self) -> range:
        return range(self.least, self.most + 1)

    @property
    def label(self) -> str:
        """Names it in studies and on the command line."""
        return f"{self.kernel}.{self.name}"

    def value(self, code: int) -> int:
        return 1 << code if self.doubling else code

    def code(self, value: int) -> int | None:
        """None for a value that is none of the knob's."""
        code = value.bit_length() - 1 if self.doubling else value
        return code if code in self.codes and self.value(code) == value else None

    def __str__(self) -> str:
        values = [str(self.value(code)) for code in self.codes]
        return f"{self.name} {' '.join(values)}"


def knobs_of(kernel: Kernel, plan: Plan) -> Iterator[Knob]:
    """A kernel's own knobs; what it starts with is always among the values."""
    start = kernel.config.keywords()
    for name, (least, most) in _ranges(kernel, plan).items():
        if name not in start or follows_step(kernel, name, plan):  # the leader's, or a step's
            continue
        low, high = min(least, start[name]), max(most, start[name])
        doubling = name not in ("num_stages", "STAGES")
        if doubling:
            low, high = low.bit_length() - 1, high.bit_length() - 1
        if low < high:
            yield Knob(kernel=kernel.name, name=name, least=low, most=high, doubling=doubling)


def follows_step(kernel: Kernel, name: str, plan: Plan) -> bool:
    """Whether a value of a kernel follows from the rows and the parts of a step."""
    if plan.cached is None or plan.cached.rows != "few":
        return False
    launches = (x for step in (*plan.appends, *plan.steps) for x in step.launches)
    given = {each for x in launches if x.kernel == kernel.name for each, _ in x.given}
    return name in OF_STEP or name.startswith(OF_PARTS) or name in given


def _ranges(kernel: Kernel, plan: Plan) -> dict[str, tuple[int, int]]:
    """By knob, the least and the most."""
    context = kernel.context
    match context:
        case RowsContext() | BesideContext():
            return _row_ranges(context, kernel, plan)
        case StreamsContext():
            return _stream_ranges(context, kernel, plan)
        case ColsStreamsContext():  # tiles are of 64 keys and rows, whatever the head dims
            return {"BLOCK_C": (16, 8192), "STAGES": (2, 8)}
        case RankContext() | ThresholdContext():
            most = _most_scores(context)
            return {"BLOCK_R": (1, 32), "BLOCK_N": (64, max(64, most)), "num_warps": (1, 16)}
        case IndexContext(how="sets") | MarksContext():
            return {**_marking(context), "num_warps": (1, 16)}
        case IndexContext() | UniteContext():
            return {"num_warps": (1, 16)}
        case BucketsContext():
            return _bucket_ranges(context)
        case MapsContext() | LastContext() | EstimateContext():
            return _map_ranges(context)
        case (
            ListsContext()
            | TiersContext()
            | PickedContext()
            | HalvedContext()
            | TreesContext()
            | EitherContext(bits=True)
        ):
            return _list_ranges(context)
        case SortingContext() | WalkContext() | ClustersContext():
            return _ordering(context, kernel)
        case SegmentsContext() | PoolsContext() | PartsContext():
            return _pooling(context)
        case _:  # of a skeleton that nothing is known of, what is near its start
            most = TILE_ROWS if isinstance(context, RunningContext) else MOST_ELEMENTS
            near = {n: (max(1, v // 8), min(most, v * 8)) for n, v in kernel.config.constexprs}
            return {**near, "num_warps": (1, 8)}


def _ordering(
    context: SortingContext | WalkContext | ClustersContext, kernel: Kernel
) -> dict[str, tuple[int, int]]:
    """Of what sorts keys, or clusters them."""
    if isinstance(context, ClustersContext):
        return _clusters(context, kernel)
    return _sorting(context)


def _sorting(context: SortingContext | WalkContext) -> dict[str, tuple[int, int]]:
    """Tiles of dots, where the last rows weigh keys; keys a step, where their mean does.

    Of a walk also how many tokens are ranked at a time.
    """
    if isinstance(context, WalkContext):
        room = max(64, next_power(context.step))
        blocks = {"BLOCK_M": (LEAST_DOT, 128), "BLOCK_N": (256, 4096)}
        return {**blocks, "BLOCK_P": (room, max(room, 8192)), "num_warps": (4, 16)}
    if context.how in ("totals", "masses"):
        blocks = {"BLOCK_T": (LEAST_DOT, 128), "BLOCK_N": (LEAST_DOT, 128)}
        return {**blocks, "num_warps": (1, 8), "num_stages": (1, 4)}
    own = {"means": {"BLOCK_N": (1, 128)}, "around": {"BLOCK_N": (64, 1024)}}.get(context.how, {})
    return {**own, "num_warps": (1, 16)}


def _clusters(context: ClustersContext, kernel: Kernel) -> dict[str, tuple[int, int]]:
    """Tiles of dots, and what a program has of rows, of centroids and of slots beside them."""
    dots = context.how in DOTS
    least = LEAST_DOT if dots else 1
    most = {"BLOCK_T": 128 if dots else 16, "BLOCK_K": 4096}
    ranges = {name: (least, most.get(name, 128)) for name, _ in kernel.config.constexprs}
    if context.how == "choose":
        ranges["BLOCK_R"] = (1, max(1, 4096 // context.padded_keys))
    staged = {"num_stages": (1, 4)} if context.how in ("assign", "attend") else {}
    return {**ranges, "num_warps": (1, 8), **staged}


def _beside(context: BesideContext, kernel: Kernel, plan: Plan) -> dict[str, tuple[int, int]]:
    """Of branches in one launch: what all of them can have."""
    blocks = (_block_of(branch.rows, kernel, plan) for branch in context.branches)
    wide = min((block for block in blocks if block is not None), default=128)
    steps = (LEAST_DOT, max(LEAST_DOT, min(128, wide)))
    return {"BLOCK_N": steps, "num_warps": (1, 8), "num_stages": (1, 5)}


def _pooling(context: SegmentsContext | PoolsContext | PartsContext) -> dict[str, tuple[int, int]]:
    """Entries and tokens of a tile; where entries are mapped, slot by slot or what sums them up, entries and
    channels of a dot.  Of several pools in one launch, what all of them can have.
    """
    if isinstance(context, PartsContext):  # which are summed up
        return {"BLOCK_R": (1, 128), "num_warps": (1, 8)}
    if isinstance(context, PoolsContext):
        each = [_pooling(pooled.pool) for pooled in context.pools]
        return {
            name: (max(x[name][0] for x in each), min(x[name][1] for x in each))
            for name in each[0]
            if all(name in x for x in each)
        }
    if context.how not in ("linear", "max_min_mean"):
        most = next_power(context.size)
        return {"BLOCK_E": (1, 64), "BLOCK_J": (1, most), "num_warps": (1, 8)}
    lowest = context.head_dim & -context.head_dim
    blocks = {"BLOCK_E": (LEAST_DOT, 128), "BLOCK_D": (LEAST_DOT, min(128, lowest))}
    if context.how == "linear":
        return {**blocks, "num_warps": (1, 8), "num_stages": (1, 4)}
    return {**blocks, "BLOCK_J": (1, next_power(context.size)), "num_warps": (1, 8)}


def _most_scores(context: RankContext | ThresholdContext) -> int:
    """Scores of a row in registers."""
    if isinstance(context, RankContext) and context.children:
        return next_power(context.slots)
    return 8192


def _marking(context: IndexContext | MarksContext) -> dict[str, tuple[int, int]]:
    """Slots of a row's list a step, and entries a step, where rows set bits."""
    dear = {"DEAR": (1, 8)} if isinstance(context, MarksContext) and not context.alone else {}
    return {"BLOCK_K": (16, max(16, next_power(context.width))), "BLOCK_N": (16, 1024), **dear}


def _bucket_ranges(context: BucketsContext) -> dict[str, tuple[int, int]]:
    if context.how == "offsets":
        return {"BLOCK_N": (64, 1024), "num_warps": (1, 8)}
    most = max(1, SORT_LIMIT // next_power(context.width))
    return {"BLOCK_T": (1, most), "num_warps": (1, 8)}


def _map_ranges(
    context: MapsContext | LastContext | EstimateContext,
) -> dict[str, tuple[int, int]]:
    if isinstance(context, EstimateContext):
        return {"BLOCK_N": (context.least, 256), "num_warps": (1, 8), "num_stages": (1, 5)}
    if isinstance(context, LastContext):
        return {"BLOCK_N": (context.least, 128), "num_warps": (1, 8), "num_stages": (1, 4)}
    if context.how == "sums":
        return {"BLOCK_N": (16, 1024), "num_warps": (1, 8)}
    most = 1 if context.last else max(1, MOST_ROWS // context.per_row)
    return {
        "BLOCK_T": (max(1, LEAST_DOT // context.per_row), most),
        "BLOCK_N": (max(LEAST_DOT, context.per_entry), max(256, context.per_entry)),
        "BLOCK_D": (LEAST_DOT, context.most_channels),
        "num_warps": (1, 8),
        "num_stages": (1, 5),
    }


def _list_ranges(
    context: ListsContext
    | TiersContext
    | PickedContext
    | HalvedContext
    | TreesContext
    | EitherContext,
) -> dict[str, tuple[int, int]]:
    match context:
        case ListsContext(how="lists") | TiersContext(given=False) | EitherContext():
            return {"BLOCK_N": (32, 512), "num_warps": (1, 4)}
        case ListsContext(how="members") | TiersContext():
            return {"BLOCK_K": (16, 512), "BLOCK_N": (32, 1024), "num_warps": (1, 8)}
        case ListsContext():
            return {"BLOCK_T": (1, 64), "BLOCK_N": (16, 256), "num_warps": (1, 8)}
        case PickedContext(width=width):
            slots = (16, max(16, next_power(width)))
            return {"BLOCK_K": slots, "BLOCK_N": (32, 1024), "num_warps": (1, 8)}
        case HalvedContext():
            return {"BLOCK_N": (LEAST_DOT, 128), "num_warps": (1, 8)}
        case TreesContext(params=params):
            own = [p.name for p in params if p.kind == "constexpr"]
            ranges = TREES | {"BLOCK_R": (1, min(LEAST_DOT, 2 * MOST_ROOM // context.room))}
            if "BLOCK_N" in own and "BLOCK_T" in own:
                ranges["BLOCK_T"] = (LEAST_DOT, WORD)
            return {**{name: ranges[name] for name in own}, "num_warps": (1, 16)}


def _row_ranges(
    context: RowsContext | BesideContext, kernel: Kernel, plan: Plan
) -> dict[str, tuple[int, int]]:
    if isinstance(context, BesideContext):
        return _beside(context, kernel, plan)
    tokens = max(1, MOST_ROWS // context.pitch)
    tokens = 1 << tokens.bit_length() - 1
    if context.together == "part":
        tokens = min(tokens, next_power(context.rows_together))
    if _picks(kernel, plan):
        tokens = min(tokens, PICKING)
    if context.most_tokens:
        tokens = min(tokens, context.most_tokens)
    wide = 128
    if (block := _block(kernel, plan)) is not None:
        wide = max(LEAST_DOT, min(wide, block))
    ranges = {
        "BLOCK_N": (max(LEAST_DOT, context.ratio if context.folded else 1), wide),
        "num_warps": (1, 8),
        "num_stages": (1, 5),
    }
    own = dict(kernel.config.constexprs)
    if "BLOCK_T" in own:
        ranges = {"BLOCK_T": (1, tokens)} | ranges
    if "BLOCK_H" in own:
        ranges["BLOCK_H"] = (LEAST_DOT, context.pitch)
    return ranges


def _stream_ranges(
    context: StreamsContext, kernel: Kernel, plan: Plan
) -> dict[str, tuple[int, int]]:
    """Rows are those of two groups; of a score they vary, and its steps are as long as a dot's tile."""
    if context.latent and context.rows.derives:
        return {}  # what there is fills shared memory
    if context.latent:
        return {"BLOCK_N": (32, LATENT_STEP), "STAGES": (2, 4)}
    if context.scores:
        pitch = context.rows.pitch
        most = 1 << (SCORED_ROWS // pitch).bit_length() - 1
        least = max(GROUPS, LEAST_ROWS // pitch)  # a token a group
        return {"BLOCK_T": (least, most), "STAGES": (2, 8)}
    return {"BLOCK_N": (32, min(128, _block(kernel, plan) or 128)), "STAGES": (2, 8)}


def _picks(kernel: Kernel, plan: Plan) -> bool:
    """Whether what follows gives each row of its tile a bit of one word."""
    return any(
        other.follows == kernel.name
        and (
            isinstance(other.context, PickedContext)
            or (isinstance(other.context, MarksContext) and other.context.how == "picked")
        )
        for other in plan.kernels
    )


def _too_many_rows(kernel: Kernel, values: Mapping[str, int], plan: Plan) -> str:
    """That a tile has rows without a bit, whose gradients would be wrong; empty if it has none."""
    tokens = values.get("BLOCK_T", 1)
    if tokens > PICKING and _picks(kernel, plan):
        return f"expected BLOCK_T of at most {PICKING}, the bits of a word, got {tokens}"
    most = kernel.context.most_tokens if isinstance(kernel.context, RowsContext) else 0
    if most and tokens > most:
        return f"expected BLOCK_T of at most {most}, the tokens of a unit, got {tokens}"
    bits = kernel.context.most_tokens if isinstance(kernel.context, ColsContext) else 0
    if bits and tokens > bits:
        return f"expected BLOCK_T of at most {bits}, the bits of a word, got {tokens}"
    if bits and values.get("BLOCK_M", tokens) != tokens:
        return f"expected BLOCK_M of as many rows as BLOCK_T has tokens, got {values['BLOCK_M']}"
    return ""


def _block(kernel: Kernel, plan: Plan) -> int | None:
    """Keys of a block that a step must not leave; None where steps may be of any length."""
    context = kernel.context
    if isinstance(context, StreamsContext):
        context = context.rows
    assert isinstance(context, RowsContext), "of the rows skeleton"
    return _block_of(context, kernel, plan)


def _block_of(context: RowsContext, kernel: Kernel, plan: Plan) -> int | None:
    """The same of loops that a kernel has."""
    if context.children:
        return next_power(context.children)
    unit = context.units or (context.stride if context.together == "part" else 0)
    if unit >= LEAST_DOT:
        return unit if unit == next_power(unit) else None
    for other in plan.kernels:
        if other.follows == kernel.name:
            match other.context:
                case (
                    MarksContext() | PickedContext()
                ):  # of picked tokens, as many as a dot's tile has
                    return MARKED
                case IndexContext(size=size) | ListsContext(size=size) | TiersContext(size=size):
                    if size == next_power(size) and size >= LEAST_DOT:
                        return size
                case _:
                    pass
    return None


# --- what follows, and rules


def derive(kernel: Kernel, values: Values, plan: Plan) -> None:
    """BLOCK_M is the rows of BLOCK_T tokens with BLOCK_H heads each, where the kernel sets these; in a step
    all follow from its rows.
    """
    if follows_step(kernel, "BLOCK_M", plan):
        return
    if isinstance(kernel.context, RowsContext) and {"BLOCK_T", "BLOCK_H"} & values.keys():
        heads = values.get("BLOCK_H", kernel.context.pitch)
        values["BLOCK_M"] = max(LEAST_DOT, next_power(values.get("BLOCK_T", 1) * heads))
    if (
        isinstance(kernel.context, StreamsContext)
        and "BLOCK_T" in values
        and not kernel.context.latent
    ):
        rows = values["BLOCK_T"] * kernel.context.rows.pitch
        one = kernel.context.scores or kernel.context.apart
        least = LEAST_ROWS if one else GROUPS * LEAST_ROWS
        values["BLOCK_M"] = max(least, next_power(rows))


def broken(kernel: Kernel, values: Mapping[str, int], target: Target, plan: Plan) -> Iterator[str]:
    """The rules that a kernel's values break, those of the tile that it shares included."""
    if values["num_warps"] > target.max_warps_per_block:
        yield f"{values['num_warps']} warps, {target.name} has {target.max_warps_per_block} a block"
    if wrong := _too_many_rows(kernel, values, plan):
        yield wrong
    largest = _elements(kernel, values)
    if largest > MOST_ELEMENTS:
        yield f"a tile of {largest:,} elements, Triton takes {MOST_ELEMENTS:,}"
    match kernel.context:
        case RowsContext() | BesideContext() as context:
            yield from _broken_loops(context, kernel, values, target, plan)
        case RankContext() | ThresholdContext() as context:
            if values["BLOCK_R"] > values["BLOCK_T"]:
                yield f"BLOCK_R {values['BLOCK_R']} must divide BLOCK_T {values['BLOCK_T']}"
            held = largest
            if isinstance(context, RankContext) and context.chunked:  # a part of a row at a time
                held = values["BLOCK_R"] * max(
                    min(context.chunk, values["BLOCK_N"]), values["BLOCK_N"] // context.group
                )
            each = held // (values["num_warps"] * target.warp_size)
            if each > MOST_SCORES:
                yield f"{each} scores a thread, at most {MOST_SCORES}"
        case MapsContext(how="tiles") as context:
            rows, wide = values["BLOCK_T"] * context.per_row, values["BLOCK_N"]
            each = rows * wide // (values["num_warps"] * target.warp_size)
            if each > ACCUMULATORS and not target.tensor_columns:
                yield f"{each} accumulators a thread, at most {ACCUMULATORS}"
        case IndexContext(width=width, how="union"):
            pairs = values["BLOCK_T"] * next_power(width)
            if pairs > SORT_LIMIT and pairs > next_power(width):
                yield f"BLOCK_T {values['BLOCK_T']}: {pairs:,} pairs to sort, at most {SORT_LIMIT:,}"
        case _:
            return


def refused(
    kernel: Kernel, given: Mapping[str, int], values: Mapping[str, int], plan: Plan, target: Target
) -> str:
    """What is wrong with a caller's values of a kernel, and what is allowed; empty where nothing is.

    Of loops of Triton's own only names are looked at, that sizes are powers of two, that each row has a bit
    where bits say which rows picked a token, and that tiles of a scratch end where its lines do.  Of a kernel
    that streams most values are layouts that its groups of warps share, so that others would not compile, or
    wait for ever.

    given: what the caller says, part of `values`, which the kernel runs with.
    """
    start = kernel.config.keywords()
    for name in given:
        if name not in start:
            leader = f"; others are those of {kernel.follows}" if shares(kernel) else ""
            return f"expected some of {', '.join(start)}, got {name!r}{leader}"
    if wrong := (
        _too_many_rows(kernel, values, plan)
        or _past_a_line(kernel, values)
        or _no_tile(kernel, values)
        or _too_few_keys(kernel, values)
        or _past_a_block(kernel, values, plan)
    ):
        return wrong
    if kernel.skeleton not in STREAMED:
        return next(filter(None, (_no_size(name, value) for name, value in given.items())), "")
    known = {knob.name: knob for knob in knobs_of(kernel, plan)}
    fixed = {name: value for name, value in start.items() if name not in known}
    derive(kernel, derived := {name: values[name] for name in known}, plan)
    fixed |= {name: value for name, value in derived.items() if name in fixed}
    for name, value in given.items():
        if name in known and known[name].code(value) is None:
            return f"expected one of {known[name]}, got {value}"
    for name, value in fixed.items():
        if values[name] != value:
            told = ", ".join(f"{each}={values[each]}" for each in known if each in given)
            return f"expected {name}={value}{f' beside {told}' if told else ''}, got {values[name]}"
    needed = _least_shared(kernel, values)
    if needed > target.smem_per_block:
        told = f"STAGES={values['STAGES']} needs {needed:,} bytes of shared memory"
        return f"{told}, {target.name} has {target.smem_per_block:,} a block"
    return ""


def _no_size(name: str, value: object) -> str:
    """That a value is no number of stages, of warps or of a tile's rows or columns; empty where it is one."""
    number = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if name in ("num_stages", "STAGES"):
        return "" if number >= 1 else f"expected {name} of at least 1, got {value!r}"
    power = number >= 1 and next_power(number) == number
    return "" if power else f"expected {name} to be a power of two, got {value!r}"


def _past_a_line(kernel: Kernel, values: Mapping[str, int]) -> str:
    """Tiles of scores are read and written whole, so none may reach beyond a row of the scratch."""
    match kernel.context:
        case LearnContext(how=how) if how != "rows" and LINE % values["BLOCK_N"]:
            return f"expected BLOCK_N to divide {LINE}, got {values['BLOCK_N']}"
        case WalkContext(step=step) if values["BLOCK_P"] < step:
            return f"expected BLOCK_P to hold a step of {step} tokens, got {values['BLOCK_P']}"
        case _:
            return ""


def _no_tile(kernel: Kernel, values: Mapping[str, int]) -> str:
    """Tiles of products have whole blocks of entries, and steps whole parts of a head."""
    match kernel.context:
        case MapsContext(how="tiles", dim=dim, per_entry=entries, per_row=rows):
            wide, step, tall = values["BLOCK_N"], values["BLOCK_D"], values["BLOCK_T"] * rows
            if wide % entries or wide < LEAST_DOT:
                least = max(LEAST_DOT, entries)
                return f"expected BLOCK_N of whole blocks of {entries} entries, at least {least}, got {wide}"
            if kernel.context.last and values["BLOCK_T"] != 1:
                return f"expected BLOCK_T=1, as a sequence has one set of last rows, got {values['BLOCK_T']}"
            if tall < LEAST_DOT:
                return f"expected BLOCK_T of at least {LEAST_DOT // rows}, got {values['BLOCK_T']}"
            return f"expected BLOCK_D to divide {dim}, got {step}" if dim % step else ""
        case GateContext(gate=gate):
            least = {"BLOCK_E": LEAST_DOT, "BLOCK_N": LEAST_DOT, "BLOCK_U": LEAST_DOT // gate.rows}
            if kernel.context.how in ("parts", "shares"):
                least = {}
            small = next((x for x, few in least.items() if values.get(x, few) < few), None)
            if small is None:
                return ""
            return f"expected {small} of at least {least[small]}, got {values[small]}"
        case EntropiesContext():
            small = [x for x in ("BLOCK_M", "BLOCK_E") if values.get(x, LEAST_DOT) < LEAST_DOT]
            return (
                f"expected {small[0]} of at least {LEAST_DOT}, got {values[small[0]]}"
                if small
                else ""
            )
        case TreesContext(how="keep" | "sift"):
            rows, most = values.get("BLOCK_T", LEAST_DOT), min(MOST_STEP, values["BLOCK_K"])
            if not LEAST_DOT <= rows <= WORD:
                return f"expected BLOCK_T of {LEAST_DOT} to {WORD}, the bits of a word, got {rows}"
            if values["BLOCK_N"] > most:
                return f"expected BLOCK_N of at most {most}, got {values['BLOCK_N']}"
            if rows % values.get("BLOCK_R", 1):
                return f"expected BLOCK_R to divide BLOCK_T {rows}, got {values['BLOCK_R']}"
            return ""
        case _:
            return ""


def _too_few_keys(kernel: Kernel, values: Mapping[str, int]) -> str:
    """Where last rows weigh diagonals, whose keys begin one further on from row to row, a tile has all; of
    estimates a step has two blocks.
    """
    if not isinstance(kernel.context, LastContext | EstimateContext):
        return ""
    least, wide = kernel.context.least, values["BLOCK_N"]
    return f"expected BLOCK_N of at least {least}, got {wide}" if wide < least else ""


def _past_a_block(kernel: Kernel, values: Mapping[str, int], plan: Plan) -> str:
    """A step of a loop over blocks masks no keys of the next one."""
    if not isinstance(kernel.context, RowsContext):
        return ""
    block = _block(kernel, plan)
    if block is None or values.get("BLOCK_N", 0) <= max(LEAST_DOT, block):
        return ""
    return f"expected BLOCK_N of at most {max(LEAST_DOT, block)}, keys of a block, got {values['BLOCK_N']}"


def past_a_tile(kernel: Kernel, config: Mapping[str, Mapping[str, int]]) -> str:
    """That a step of rows leaves the tiles of the kernel whose rows they are, so that some count twice; empty
    if none does.

    config: By kernel, of the whole plan.
    """
    match kernel.context:
        case LearnContext(how="keys"):
            assert kernel.follows is not None, "its rows are those of scores"
            step, tile = config[kernel.name]["BLOCK_R"], config[kernel.follows]["BLOCK_T"]
            beside = f"expected BLOCK_R to divide BLOCK_T={tile} of {kernel.follows}"
            return f"{beside}, got {step}" if tile % step else ""
        case _:
            return ""


def _least_shared(kernel: Kernel, values: Mapping[str, int]) -> int:
    """Bytes of the tiles that a kernel which streams keeps, in 16 bits or eight: it needs a little more."""
    match kernel.context:
        case ColsStreamsContext() as context:
            return shared_bytes(context.cols, values["STAGES"])
        case StreamsContext() as context if context.latent and context.rows.derives:
            return shared_bytes_of_latents(context.rows)
        case StreamsContext() as context if "BLOCK_N" in values:  # else it is its leader's to fit
            brought = {tile.name: tile.chunk.width for tile in (*context.keys, *context.values)}
            stages = values["STAGES"] * values["BLOCK_N"] * sum(brought.values())
            keys = {tile.name: tile.chunk.width for tile in context.keys}
            held = sum(keys.values()) + (values["BLOCK_N"] if context.latent else 0)
            if context.rows.derives:
                held = sum(brought.values())
            each = GROUPS if context.apart else 1
            return each * number_bytes(context.rows) * (stages + values["BLOCK_M"] * held)
        case _:
            return 0


def _broken_loops(
    context: RowsContext | BesideContext,
    kernel: Kernel,
    values: Mapping[str, int],
    target: Target,
    plan: Plan,
) -> Iterator[str]:
    beside = isinstance(context, BesideContext)
    for loops in [branch.rows for branch in context.branches] if beside else [context]:
        yield from _broken_rows(loops, kernel, values, target, plan)


def _broken_rows(
    context: RowsContext, kernel: Kernel, values: Mapping[str, int], target: Target, plan: Plan
) -> Iterator[str]:
    width, rows = values["BLOCK_N"], values["BLOCK_M"]
    if context.folded and width % context.ratio:
        yield f"BLOCK_N {width} must be a multiple of the {context.ratio} entries that become one"
    block = _block_of(context, kernel, plan)
    if block is not None and width > max(LEAST_DOT, block):
        yield f"BLOCK_N {width} is more than a block of {block} keys"
    apart = values.get("BLOCK_H", context.pitch) < context.pitch
    if apart and values.get("BLOCK_T", 1) > 1 and not follows_step(kernel, "BLOCK_T", plan):
        yield f"BLOCK_T {values['BLOCK_T']}: some of the heads come with one token"
    if target.tensor_columns:
        return  # accumulators have a memory of their own
    warps = values["num_warps"]
    if context.widened and target.dots_read_shared and GROUP_ROWS <= rows < 16 * warps:
        # Triton 3.6 gives each warp 16 rows of a dot of float32, and reads past a head's last chunk
        yield f"{warps} warps, at most {rows // 16} for {rows} rows whose dots are of float32"
    held = rows * (width + sum(chunk.width for chunk in context.v_chunks))
    each = held // (warps * target.warp_size)
    if each > ACCUMULATORS:
        yield f"{each} accumulators a thread, at most {ACCUMULATORS}"


def _elements(kernel: Kernel, values: Mapping[str, int]) -> int:
    """Elements of the largest tile."""
    match kernel.context:
        case RowsContext() as context:
            widths = [c.width for c in (*context.qk_chunks, *context.v_chunks)]
            widest = max(widths, default=1)
            rows, width = values["BLOCK_M"], values["BLOCK_N"]
            return max(rows * width, rows * widest, width * widest)
        case StreamsContext():
            return values["BLOCK_M"] * max(values["BLOCK_N"], WIDEST)
        case RankContext() | ThresholdContext():
            return values["BLOCK_R"] * values["BLOCK_N"]
        case IndexContext(how="sets") | MarksContext() | PickedContext():
            return values["BLOCK_T"] * max(values["BLOCK_K"], values["BLOCK_N"])
        case SegmentsContext() as context:
            widest = max((c.width for c in context.chunks), default=1)
            read = values.get("BLOCK_J", 1) * values.get("BLOCK_D", widest)
            return values["BLOCK_E"] * max(read, widest)
        case _:
            return 1


def shares(kernel: Kernel) -> bool:
    """Whether it reads a tile that it does not set."""
    own = dict(kernel.config.constexprs)
    return any(p.kind == "constexpr" and p.name not in own for p in kernel.params)
