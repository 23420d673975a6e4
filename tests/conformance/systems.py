"""The shipped specs, made small and bound to heads and head dims, so that a case takes seconds."""

import functools
import math
from fractions import Fraction
from pathlib import Path

from hsgen import spec as language
from hsgen.spec import (
    Blocks,
    Diagonals,
    Halving,
    HeadDim,
    Heads,
    KMeans,
    LearnedTree,
    Parts,
    SortInSegment,
    Tile,
)

SPECS = Path(__file__).parents[2] / "specs"
FILES = {path.stem: path for path in sorted(SPECS.glob("*.yaml"))}
# Of no published system: three levels of blocks, each in the one above, see test_nesting; `dsa` with the
# index as it comes, see test_latent; and blocks of rows that choose together, see test_together.
NAMES = ("three_levels", "sparse_mla", "block_lists")
EXAMPLES = {n: SPECS.parent / "examples" / f"{n}.yaml" for n in NAMES}
# Specs that no kernel reaches yet, and what the plan error says of the operator that is in the way.
# Their meaning is tested by the reference's, the planner's and the graph's own tests.
REFUSED: dict[str, str] = {
    "sea": "level part: no kernel takes scores as they are given yet",
    "delta_llm": "no kernel reads keys from their changes yet",
    "spatten": "level token: no kernel takes over a selection yet",
    "spt": "level token: no kernel compares codes yet",
    "index_cache": "level token: no kernel takes over a selection yet",
}
# Specs whose layers differ, and the layer whose kernels are tested.
LAYERS: dict[str, int] = {
    "delta": 0,
    "hylra": 0,
    "small_thinker": 1,
    "token_sparse": 15,
    "s2_attention": 0,
    "power_attention": 1,
}
# Specs whose branches are apart, and the one whose kernels are tested.
STREAMS: dict[str, str] = {"ssa": "sparse"}
# Specs whose steps differ, and the step whose kernels are tested.
STEPS: dict[str, int] = {"sparse_d": 205}
# Specs whose structure is that of another and only their numbers differ, which shrinking makes the
# same: what is tested of the other is not tested again, but for a few of the covering cases.
# `dsa` is an example that has tests of its own, and rounds the index as test_stored has it.
PRESETS: dict[str, str] = {
    "flash_moba": "moba",
    "fsa": "nsa_xunhao",
}
# Specs put together from loops that another has too: on the CPU each run has two of the covering cases,
# every tenth probe and every fourteenth law, one at least; the other specs have half of the probes, laws and
# cases.  `-m "not gpu"` and a GPU have all.
ALIKE: dict[str, str] = {
    "delta": "nsa",
    "hip": "block_lists",
    "hylra": "nsa",
    "hirouter": "hisa",
    "hydra": "moba",
    "deepseek_csa": "nsa",
    "deepseek_hca": "nsa",
    "dsa": "sparse_mla",
    "dhsa_released": "block_lists",
    "dsa_gqa": "hisa",
    "glm_kpool": "moba",
    "infllm_v2": "nsa",
    "kinetics": "moba",
    "minimax_m3": "hisa",
    "nosa": "nsa",  # but for its choice and biases, which test_biases has beside
    "nsa_fla": "nsa",
    "nsa_xunhao": "nsa",
    "quest": "moba",
    "qwen_qsa": "moba",
    "seer_attention": "block_lists",
    "seer_attention_r": "moba",
    "small_thinker": "nsa",
    "sparse_d": "block_lists",
    "sqa": "nsa",
    "ssa": "moba",
    "step_csa": "moba",
    "vsa": "block_lists",
    "psa": "psa_mass",
    "sparge": "block_lists",  # but for what is forced, which test_likeness has beside
    "proxy_attn": "block_lists",  # but for its scores, which test_last has beside
    "xattention": "block_lists",  # but for its scores, which test_pieces_mass has beside
    "dma": "sparse_mla",  # but for its choice and biases, which test_biases has beside
    "draft_attention": "block_lists",
    "draft_attention_head": "block_lists",  # but for pairs, which test_pairs has beside
    "biformer": "block_lists",
    "biformer_released": "block_lists",
    "s2_attention": "nsa",  # but for which keys they walk, which test_patterns has
    "moa": "nsa",
    "flux_attention": "nsa",
    "power_attention": "nsa",
    "pbs_attn": "block_lists",  # but for the order of its keys, which test_orders has beside
    "gna": "nsa",  # likewise
    "svg2": "block_lists",  # but for clusters, which test_clusters has beside
    "svg_ear": "block_lists",  # likewise
    "minference": "block_lists",  # but for columns and diagonals, which test_slashes has beside
    "flex_prefill": "block_lists",  # but for its two ways, which test_foretold has beside
    "s2o": "block_lists",  # and its walks as well
    "token_sparse": "block_lists",  # and what heads keep, which test_kept has beside
    "dhsa": "block_lists",  # but for its runs, which test_runs has beside
    "routing_transformer": "block_lists",  # but for nodes that take tokens, which test_takes has beside
}
KERNELS = [name for name in FILES if name not in REFUSED]
STRUCTURES = [name for name in KERNELS if name not in PRESETS]


@functools.cache
def load(name):
    """The shipped spec of that name; a layer of it, or a branch, where these differ or are apart."""
    path = (FILES | EXAMPLES)[name]
    spec = language.parse(path.read_text(encoding="utf-8"), str(path))
    spec = spec.stream(STREAMS[name]) if name in STREAMS else spec
    return spec.bind(layer=LAYERS.get(name), step=STEPS.get(name))


def shrink(spec, *, block=16):
    """The same structure with blocks of at most `block` tokens, and budgets that still bite.

    Sizes and strides are divided by one number, so that partitions nest and overlap as before.
    """
    sizes = [level.partition.size for level in spec.levels]
    if max(sizes, default=0) == 1:  # rows then say what is large
        sizes += [level.query.block or 1 for level in spec.levels if level.query]
    factor = max([1, *sizes]) // block or 1
    levels = []
    for level in spec.levels:
        levels.append(_shrunk_level(spec, level, factor, {one.name: one.select for one in levels}))
    changes = {"levels": tuple(levels)}
    units = {}  # of branches that walks go on from: what rows of a block have of their own
    for level in levels:
        if level.select and level.select.early_stop:
            units[level.select.early_stop.after] = level.query.block
        if level.score.lse_from:  # blocks that estimates keep are whole units
            units[level.score.lse_from] = _mapped_size(levels, level)
    changes["attend"] = tuple(_shrunk_branch(x, units.get(x.name, 2)) for x in spec.attend)
    grids = any(branch.static and branch.static.grid for branch in spec.attend)
    if spec.axes and (grids or any(level.permute for level in spec.levels)):
        changes["axes"] = (
            64,
            *(3, 5)[-len(spec.axes) + 1 :],
        )  # the last tiles of an axis are cut off
    return language.verify(spec.model_copy(update=changes))


def _mapped_size(levels, level):
    """Tokens of the greatest blocks that a level's scores are carried to."""
    return max((x.partition.size for x in levels if x.score.source == level.name), default=2)


def _shrunk_branch(branch, most):
    """A window of at most 21 tokens; a pattern of units of at most so many."""
    changes = {}
    if isinstance(branch.window, int):
        changes["window"] = min(branch.window, 21)
    if branch.delta:
        near = min(branch.delta.window, 9)
        changes["delta"] = branch.delta.model_copy(update={"window": near, "threshold": 0.5})
    if branch.static:
        units = min(branch.static.blocks, most)
        few = {"blocks": units}
        if branch.static.power_of_two:  # no tile has more rows than a unit
            few = {"blocks": min(branch.static.blocks, 8), "window": 1}
        if branch.static.window and units == 1:
            few |= {"window": min(branch.static.window, 13), "sink": min(branch.static.sink, 3)}
        if branch.static.grid:
            lengths = {"window": (3, 2, 4), "stride": (2, 1, 2)}
            few = {"grid": branch.static.grid.model_copy(update=lengths)}
        changes["static"] = branch.static.model_copy(update=few)
    return branch.model_copy(update=changes)


def _shrunk_level(spec, level, factor, above):
    """A level, given the selections of those before it; what had several rows or tokens has two."""
    changes = {}
    if isinstance(level.partition, Blocks):
        lengths = (level.partition.size, level.partition.stride, level.partition.before or 0)
        size, stride, before = (_part(n, factor) for n in lengths)
        changes["partition"] = Blocks(size=size, stride=stride, before=before or None)
    if isinstance(level.partition, LearnedTree):
        few = {"branching": min(level.partition.branching, 5)}
        few |= {"takes": 17} if level.partition.takes else {}
        changes["partition"] = level.partition.model_copy(update=few)
    if isinstance(level.partition, Diagonals):
        changes["partition"] = Diagonals(size=_part(level.partition.size, factor))
    if isinstance(level.partition, Halving):
        interval = _part(level.partition.interval, factor)
        changes["partition"] = level.partition.model_copy(update={"interval": interval})
    if level.query and level.query.block:
        changes["query"] = level.query.model_copy(
            update={"block": _part(level.query.block, factor)}
        )
    if level.query and level.query.last:
        changes["query"] = level.query.model_copy(update={"last": min(level.query.last, 8)})
    if level.query and level.query.tile:
        few = tuple(min(steps, 2) for steps in level.query.tile)
        changes["query"] = level.query.model_copy(update={"tile": few})
    if level.permute:
        changes["permute"] = _shrunk_orders(level.permute, factor)
    if isinstance(level.partition, Parts):
        changes["partition"] = Parts(count=min(level.partition.count, 6))
    if level.select and level.select.counts_vary:
        changes["select"] = _shrunk_set(level.select)
    if level.pool and level.pool.rotate:  # heads are small as well
        changes["pool"] = _turned_less(level.pool, 64)
    if level.select and level.select.min:
        changes["select"] = level.select.model_copy(update={"min": min(level.select.min, 2)})
    if level.select and not level.select.counts_vary:
        first, last = min(level.select.force.first, 2), min(level.select.force.last, 2)
        force = level.select.force.model_copy(update={"first": first, "last": last})
        forced = force.first + force.last + (above[force.level].width if force.level else 0)
        if force.last:
            forced += spec.own_entries(level) - 1  # as many as in the full size, or more
        few = isinstance(level.partition, Blocks | Halving)
        rows = spec.rows_of(level)
        own = (
            _part(rows.block, factor) if rows and rows.block else 1
        )  # tokens of a block's own rows
        room = max(3, forced + 1) if few else max(11, own + 5 if own > 1 else 0)
        key = "top_k" if level.select.top_k else "beam"
        budget = min(level.select.budget, room)
        changes["select"] = level.select.model_copy(update={key: budget, "force": force})
    return level.model_copy(update=changes)


def _turned_less(pool, dims):
    """The same pool, that turns `dims` channels at most."""
    dims = min(pool.rotate.dims, dims)
    return pool.model_copy(update={"rotate": pool.rotate.model_copy(update={"dims": dims})})


def _shrunk_orders(permute, factor):
    """Segments as many blocks long as before, and a few clusters."""
    made = {}
    for side, order in permute:
        if isinstance(order, SortInSegment):
            made[side] = order.model_copy(
                update={
                    "segment": order.segment // factor,
                    "last": order.last and min(order.last, 8),
                }
            )
        if isinstance(order, Tile):
            made[side] = order.model_copy(update={"tile": tuple(min(x, 2) for x in order.tile)})
        if isinstance(order, KMeans):
            made[side] = order.model_copy(
                update={"clusters": min(order.clusters, 5), "iterations": 2}
            )
    return permute.model_copy(update=made)


def _shrunk_set(select):
    """A rule that lets counts vary, with few entries whatever the data."""
    changes = {"force": select.force.model_copy(update={"last": min(select.force.last, 2)})}
    if select.fraction and (select.force.first or select.force.last):
        changes["fraction"] = max(select.fraction, 0.4)  # more than is forced
    if select.force.where:  # so that of random tokens some blocks are alike, and others are not
        where = select.force.where.model_copy(update={"similarity": 0.06})
        changes["force"] = select.force.model_copy(update={"where": where})
    if select.scope == "entry":
        changes["top_k"] = min(select.budget, 13)
    if select.tokens:
        changes["tokens"] = min(select.tokens, 11)
    if select.threshold:
        changes["threshold"] = max(select.threshold, 0.1)  # of few entries
    if select.top_p:
        top_p = select.top_p
        less = {"mass": min(top_p.mass, 0.6), "min": min(top_p.min, 2)}  # of few entries
        changes["top_p"] = top_p.model_copy(update=less)
    if select.early_stop:
        less = {"entries": 3, "gain": 0.2}
        changes["early_stop"] = select.early_stop.model_copy(update=less)
    return select.model_copy(update=changes)


def _part(n, factor):
    return max(min(n, 2), n // factor)


def bind(spec, *, group=2, kv=None, dims=(64, 64)):
    """Heads and head dims; an index gets the dim of queries, and as many heads as a group has.

    Where index heads stand for key heads it gets as many as those.
    """
    kv = kv or (2 if group <= 4 else 1)
    changes = {
        "heads": Heads(query=group * kv, kv=kv),
        "head_dim": HeadDim(qk=dims[0], v=dims[1]),
    }
    changes["levels"] = turned_less(spec, dims[0])
    changes["attend"] = tuple(of_heads(branch, group * kv) for branch in spec.attend)
    if spec.route:
        changes["route"] = spec.route.of_heads(group * kv)
    if spec.index:
        heads = kv if spec.index_per_key_head else group
        if any(x.score.sums_index and x.score.share == "group" for x in spec.levels):
            heads *= kv  # as many of each group
        few = {"heads": heads, "dim": min(dims[0], 256)}
        changes["index"] = spec.index.model_copy(update=few)
    return language.verify(spec.model_copy(update=changes))


def of_heads(branch, heads):
    """Windows of as many kinds of heads as the heads are a multiple of."""
    if branch.static is None or not branch.static.per_head:
        return branch
    kinds = branch.static.per_head[: math.gcd(heads, len(branch.static.per_head))]
    return branch.model_copy(
        update={"static": branch.static.model_copy(update={"per_head": kinds})}
    )


def small(name, *, block=8, causal=True, **shape):
    """A shipped spec, shrunk and bound."""
    spec = load(name).model_copy(update={"causal": causal and load(name).causal})
    return bind(shrink(spec, block=block), **shape)


def turned_less(spec, dim):
    """The levels, where keys of `dim` channels, or of an index as wide, are turned in as many at most."""

    def less(level):
        turns = level.pool and level.pool.rotate
        pool = _turned_less(level.pool, dim) if turns else level.pool
        return level.model_copy(update={"pool": pool})

    return tuple(less(level) for level in spec.levels)


def with_budgets(spec, budget):
    """Every selecting level keeps budget(level) entries; None leaves a level as it is."""
    changed = []
    for level in spec.levels:
        number = budget(level) if level.select else None
        if number and level.select.fraction:
            select = level.select.model_copy(update={"fraction": 1.0})
            level = level.model_copy(update={"select": select})
        elif number and level.select.top_p and level.select.top_p.scope == "head":
            top_p = level.select.top_p.model_copy(update={"mass": 1.0})  # each row all that it has
            select = level.select.model_copy(update={"top_p": top_p})
            level = level.model_copy(update={"select": select})
        elif number and level.select.top_p:
            top_p = level.select.top_p.model_copy(update={"min": number})
            select = level.select.model_copy(update={"top_p": top_p})
            level = level.model_copy(update={"select": select})
        elif number and level.select.budget_from and not level.select.min:
            pass  # as many as another level
        elif number and level.select.early_stop:  # of which each step is long enough
            stop = level.select.early_stop.model_copy(update={"gain": 0.0})
            select = level.select.model_copy(update={"early_stop": stop})
            level = level.model_copy(update={"select": select})
        elif number and level.select.budget_from:
            select = level.select.model_copy(update={"min": number})
            level = level.model_copy(update={"select": select})
        elif number and level.select.quota:
            level = level.model_copy(update={"select": _whole(level.select)})
        elif number and level.select.threshold:
            select = level.select.model_copy(update={"threshold": 1e-30 if number > 1 else 1.0})
            level = level.model_copy(update={"select": select})
        elif number:
            key = "top_k" if level.select.top_k else "beam"
            select = level.select.model_copy(update={key: number})
            level = level.model_copy(update={"select": select})
        changed.append(level)
    return language.verify(spec.model_copy(update={"levels": tuple(changed)}))


def _whole(select):
    """A quota whose last tier has all that others leave."""
    *others, last = select.quota
    key = "mass" if last.fraction is None else "fraction"
    rest = 1.0 - sum(getattr(tier, key) for tier in others)
    return select.model_copy(update={"quota": (*others, last.model_copy(update={key: rest}))})


def selecting(spec):
    """Levels that select, in order."""
    return [level for level in spec.levels if level.select]


def takes_selections(spec):
    """Whether calls may bring a selection: not where rows share one list, in whose place none is taken."""
    rows = {level.name: spec.rows_of(level) for level in selecting(spec)}
    shared = {name for name, query in rows.items() if query and query.last}
    return not shared & {branch.over for branch in spec.attend}


def selection_heads(spec, level):
    """Hs of a level: heads that choose for themselves, or have numbers of their own."""
    if level.select and level.select.budget_from:
        of = spec.level(level.select.budget_from)
        level = level.model_copy(update={"select": None})
        return max(selection_heads(spec, of), selection_heads(spec, level))
    if level.score.source and level.score.reduce is None:
        return selection_heads(spec, spec.level(level.score.source))
    if level.score.sums_index and level.score.share != "group":
        return 1
    share = {"head": spec.heads.query, "group": spec.heads.kv, "all": 1}[level.score.share]
    if level.score.source:
        share = min(share, selection_heads(spec, spec.level(level.score.source)))
    return share


def slots(spec, level, keys):
    """Slots of a row of a level's selection: of a part of the entries as many as the keys have use for."""
    select = level.select
    if select.top_p or select.budget_from or select.early_stop or select.scope == "entry":
        return max(1, entries(spec, level, keys))
    if select.threshold and level.score.source:  # of estimates, which are parts of no whole
        return max(1, entries(spec, level, keys))
    if select.threshold:  # of which there are no more than that many in a whole
        most = math.floor(1 / select.threshold) + 1 + spec.most_forced(level)
        return max(1, min(entries(spec, level, keys), most))
    fraction = 1.0 if select.scope == "head" else select.fraction
    if select.quota:
        if select.quota[0].fraction is None:  # by masses, so perhaps of all
            return max(1, entries(spec, level, keys))
        fraction = sum(tier.fraction for tier in select.quota)
    if not fraction:
        return spec.width(level)
    part = Fraction(math.floor(fraction * 2**30), 2**30) * entries(spec, level, keys)
    part = math.ceil(part + 1 - Fraction(1, 2**30) if select.apart else part)  # of each side
    forced = spec.most_forced(level)
    most = max(part, forced) if select.force.counted else part + forced
    return max(1, min(entries(spec, level, keys), most))


def entries(spec, level, keys):
    """Entries of a level that may have a token: of tiles all of a slab that has any, or of the strips of two
    axes that have, where these are fewer.
    """
    if isinstance(level.partition, LearnedTree):  # nodes, of trees of one or two levels
        return level.partition.branching ** (2 if level.within else 1)
    order = level.permute and level.permute.keys
    if isinstance(order, KMeans):
        return order.clusters
    if not isinstance(order, Tile):
        return math.ceil(keys / level.partition.stride)
    across = math.prod(math.ceil(n / t) for n, t in zip(spec.axes[1:], order.tile[1:], strict=True))
    slabs = math.ceil(keys / (order.tile[0] * math.prod(spec.axes[1:]))) * across
    line, side = (spec.axes[-1], order.tile[-1]) if len(spec.axes) > 1 else (1, 1)
    high, long = (order.tile[1], spec.axes[1]) if len(spec.axes) > 2 else (1, 1)
    slab = order.tile[0] * math.prod(spec.axes[1:])
    strip = min(high * line, slab // math.ceil(long / high))
    return min(slabs, math.ceil(keys / strip) * math.ceil(line / side))
