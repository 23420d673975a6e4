"""Heads that choose in one of two ways, as means of the last rows and of keys foretell."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.lab import same
from conformance.oracles import check, root_divergence
from conformance.test_likeness import LANES, always
from hsgen import dryrun, load_kernel
from hsgen import spec as language
from hsgen.errors import ArgumentError, PlanError
from hsgen.pipeline import compile_backward, compile_spec
from hsgen.spec import Blocks, Combine, Diagonals, Force, TopP
from hsgen.target import H100

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(*, size=8, last=8, how="sum", swapped=False, threshold=None, pairs=None, **shape):
    """The shipped spec with other blocks, other rows that choose, and another threshold or rule of pairs."""
    force = shape.pop("force", Force(first=1))
    spec = systems.small("flex_prefill", **({"group": 2, "dims": (32, 32)} | shape))
    levels = []
    for level in spec.levels:
        changes = {}
        if isinstance(level.partition, Blocks):
            changes["partition"] = Blocks(size=size, stride=size)
        if isinstance(level.partition, Diagonals) and level.partition.size > 1:
            changes["partition"] = Diagonals(size=size)
        if level.query:
            few = {"block": size} if level.query.block else {"last": last}
            few |= {"reduce": how} if level.query.reduce else {}
            changes["query"] = level.query.model_copy(update=few)
        if level.select and level.select.budget_from:
            changes["select"] = level.select.model_copy(update={"force": force})
        if level.name == "block" and pairs:
            changes["select"] = level.select.model_copy(update={"top_p": pairs})
        levels.append(level.model_copy(update=changes))
    found = spec.route.statistic
    few = {"threshold": found.threshold if threshold is None else threshold}
    levels = {level.name: level for level in levels}
    if swapped:  # heads whose means foretell where rows attend take columns and diagonals
        few |= {"below": found.above, "above": found.below}
    route = spec.route.model_copy(update={"statistic": found.model_copy(update=few)})
    return changed(spec, levels=tuple(levels.values()), route=route)


def changed(spec, **changes):
    return language.verify(spec.model_copy(update=changes))


OTHERS = {
    "long blocks, more rows than a block, their mean": lambda: other(
        size=16, last=32, how="mean", group=3
    ),
    "the other way round, forced on top": lambda: other(
        swapped=True, force=Force(first=2, counted=False), group=1
    ),
    "every head by its means": lambda: other(threshold=2.0, dims=(96, 64)),
    "every head by columns and diagonals": lambda: other(threshold=1e-6, last=1, size=4),
    "pairs up to the one that crosses": lambda: other(
        pairs=TopP(mass=0.7, boundary="keep", scope="head"), threshold=0.4
    ),
}


@pytest.mark.parametrize(("name", "lane"), always(OTHERS, 1))
def test_other_sizes_are_right(name, lane, seed):
    """Documents shorter than the rows that choose, without any row, and longer than a tile."""
    lengths, keys = [1, 0, 70, 5], [30, 9, 81, 2]
    call, _ = calls.pack(
        OTHERS[name](), lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_rows_of_several_tiles_are_right(lane):
    """More rows that choose than a tile has: all of a document's, all but a few of another's, or none."""
    spec = other(size=16, last=128, group=1, dims=(32, 16), threshold=1e-6)
    call, _ = calls.pack(
        spec, [141, 70, 0, 3], key_lengths=[150, 60, 5, 3], dtype=torch.float32, device=lane
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_both_ways_are_taken_side_by_side(lane):
    """By heads of one call; blocks of rows choose on one, the last rows for all on the other."""
    spec = other(dims=(64, 64))
    call = calls.make(spec, B=2, T=70, device=lane)
    outcome = RUN[lane](call)
    check(call, outcome)
    exact = call.reference()
    far = root_divergence(exact.scores["estimate"], exact.scores["column_block"])
    below = (far < spec.route.statistic.threshold)[:, 0]
    assert below.any() and (~below).any()
    for name, way in (("block", below), ("column_kept", ~below), ("slash_block", ~below)):
        assert torch.equal((outcome.selection[name] >= 0).any(-1).any(1), way), name


@pytest.mark.parametrize("lane", LANES)
def test_pairs_alike_go_to_earlier_rows(lane):
    """Blocks of equal keys weigh the same: earlier rows have them, and of a row earlier blocks."""
    spec = other(threshold=2.0, group=1, dims=(16, 16))
    call = calls.make(spec, T=61, device=lane)
    call.tensors["k"][:] = call.tensors["k"][:, :1]
    outcome = RUN[lane](call)
    check(call, outcome)
    forced = {"edge_block": {"BLOCK_R": 2}, "score_block": {"BLOCK_T": 2, "BLOCK_M": 16}}
    same(outcome, RUN[lane](call, forced=forced), what="other tiles")


def test_a_call_holds_a_quarter_of_what_a_caller_has():
    """Pairs of blocks grow with the square of a call; lists of rows, which only who asks for them gets, are
    not counted.
    """
    plan = compile_spec(systems.load("flex_prefill"), H100).plan
    for tokens, part in ((4096, 0.25), (32768, 0.1), (131072, 0.25)):
        run = dryrun.run(plan, tokens=tokens)
        had = run.given + run.of("output")
        assert run.given + run.peak - run.of("selection") <= (1 + part) * had, tokens


def test_no_selection_is_brought():
    """In kernels: the meaning has one."""
    spec = other()
    x = calls.make(spec, T=9).tensors
    attn = load_kernel(spec, interpret=True)
    names = [level.name for level in spec.levels if level.select]
    chosen = {name: torch.zeros(1, 9, 4, 1, dtype=torch.int32) for name in names}
    with torch.no_grad(), pytest.raises(ArgumentError, match="all rows share one list of level"):
        attn(**x, selection=chosen)


def test_gradients_hold_no_more_than_parts_and_lists():
    """Beside what a call leaves and what it is given back: dk and dv in float32, and who chose each block."""
    spec = systems.load("flex_prefill")
    plan, before = compile_backward(spec, H100).plan, compile_spec(spec, H100).plan
    for tokens in (4096, 32768, 131072):
        run = dryrun.gradients(plan, before, tokens=tokens)
        assert run.of("selection") == 0
        assert run.given + run.peak <= 1.3 * (run.given + run.of("output")), tokens


def of_level(spec, name, **changes):
    levels = (x.model_copy(update=changes) if x.name == name else x for x in spec.levels)
    return changed(spec, levels=tuple(levels))


REFUSED = {
    "blocks of rows that are no blocks of keys": (
        lambda: of_level(
            other(), "block", query=other().level("block").query.model_copy(update={"block": 16})
        ),
        "no kernel takes a route by sample_head yet",
    ),
    "the greatest of rows": (
        lambda: other(how="max"),
        "no kernel takes a route by sample_head yet",
    ),
    "blocks that are no power of two": (
        lambda: other(size=12),
        "no kernel takes a route by sample_head yet",
    ),
    "a sink of all": (
        lambda: changed(other(), combine=Combine(softmax="union", sink="learned")),
        "no kernel takes a route by sample_head yet",
    ),
    "least pairs": (
        lambda: other(pairs=TopP(mass=0.5, boundary="drop", scope="head", min=2)),
        "selects by top_p, and more",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_does_is_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(PlanError, match=words):
        backends.compiled(make(), torch.float32)
