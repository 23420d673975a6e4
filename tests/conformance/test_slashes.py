"""Columns and diagonals that the last rows choose for all, beside blocks and windows of other heads."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from conformance.test_likeness import always
from hsgen import dryrun, knobs, load_kernel
from hsgen import spec as language
from hsgen.errors import ArgumentError, PlanError
from hsgen.pipeline import compile_backward, compile_spec
from hsgen.spec import Combine, Force, Route
from hsgen.target import H100

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(
    *, last=8, how="sum", keep=(9, 7), force=(2, 1), ways=3, over=("columns", "slashes"), **shape
):
    """The shipped spec with other rows that choose, other budgets, and fewer ways or branches."""
    counted = shape.pop("counted", True)
    spec = systems.small("minference", **({"group": 2, "dims": (32, 32)} | shape))
    column, slash, block = spec.levels
    levels = []
    for level, top_k, first in zip((column, slash), keep, force, strict=True):
        if level.name == "column" and "columns" not in over:
            continue
        if level.name == "slash" and "slashes" not in over:
            continue
        select = level.select.model_copy(
            update={"top_k": top_k, "force": Force(first=first, counted=counted)}
        )
        query = level.query.model_copy(update={"last": last, "reduce": how})
        levels.append(level.model_copy(update={"select": select, "query": query}))
    branches = [branch for branch in spec.attend if branch.name in over or not branch.over]
    if ways == 3:
        levels.append(block)
        branches.append(spec.attend[2])
    names = ("a_shape", "vertical_slash", "block_sparse")[:ways]
    changes = {"route": Route(by="head", input=names) if ways > 1 else None}
    if ways == 1:  # all heads are on it
        levels = [level.model_copy(update={"when": None}) for level in levels]
        branches = [x.model_copy(update={"when": None}) for x in branches if x.over]
    if len(branches) == 1:
        changes["combine"] = None
    return language.verify(
        spec.model_copy(update={"levels": tuple(levels), "attend": tuple(branches)} | changes)
    )


OTHERS = {
    "more rows than a dot has, their mean": lambda: other(last=32, how="mean", group=3),
    "all heads on one way, forced on top": lambda: other(ways=1, last=1, counted=False),
    "columns and windows": lambda: other(ways=2, over=("columns",), dims=(96, 64)),
    "diagonals alone": lambda: other(ways=1, over=("slashes",), group=1, last=4),
    "nearly all diagonals": lambda: other(keep=(3, 52), force=(0, 40), dims=(192, 128)),
}


@pytest.mark.parametrize(("name", "lane"), always(OTHERS, 1))
def test_other_sizes_are_right(name, lane, seed):
    """Documents shorter than the rows that choose, without any row, and longer than a tile; each way."""
    spec = OTHERS[name]()
    lengths, keys = [1, 0, 70, 5], [30, 9, 81, 2]
    call, _ = calls.pack(
        spec, lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    if spec.route:
        ways = torch.arange(spec.heads.query) % (len(spec.route.input) + 1)  # the last is none
        call = call.with_tensors(route=ways.to(torch.int32).to(lane))
    outcome = RUN[lane](call)
    check(call, outcome)
    if spec.route:
        none = (ways == len(spec.route.input)).to(lane)
        assert none.any() or len(none) < 3
        assert (outcome.o[:, none] == 0).all() and (outcome.lse["o"][none] == -torch.inf).all()


def test_steps_have_no_more_keys_than_a_word_has_bits():
    plan = compile_spec(other(), H100).plan
    kernel = plan.kernel("attend_slashes")
    start = kernel.config.keywords()
    for name, value, most in (("BLOCK_N", 128, 64), ("BLOCK_T", 256, 128)):
        words = knobs.refused(kernel, {name: value}, start | {name: value}, plan, H100)
        assert f"{name} of at most {most}" in words


def test_steps_of_diagonals_have_as_many_keys_as_rows_choose():
    plan = compile_spec(other(last=32), H100).plan
    kernel = plan.kernel("weigh_slash")
    start = kernel.config.keywords()
    words = knobs.refused(kernel, {"BLOCK_N": 16}, start | {"BLOCK_N": 16}, plan, H100)
    assert "expected BLOCK_N of at least 32, got 16" in words


def test_a_call_holds_little_beside_what_a_caller_has():
    """Lists of rows, which only who asks for them gets, are not counted."""
    plan = compile_spec(systems.load("minference"), H100).plan
    for tokens in (4096, 32768, 131072):
        run = dryrun.run(plan, tokens=tokens)
        had = run.given + run.of("output")
        assert run.given + run.peak - run.of("selection") <= 1.1 * had, tokens


def test_no_selection_is_brought():
    """In kernels: the meaning has one."""
    spec = other()
    x = calls.make(spec, T=9).tensors
    attn = load_kernel(spec, interpret=True)
    chosen = {level.name: torch.zeros(1, 9, 4, 3, dtype=torch.int32) for level in spec.levels}
    with torch.no_grad(), pytest.raises(ArgumentError, match="all rows share one list of level"):
        attn(**x, selection=chosen)


def test_steps_of_rows_have_no_more_than_a_word_has_bits():
    plan = compile_backward(other(), H100).plan
    kernel = plan.kernel("dkv_slashes")
    start = kernel.config.keywords()
    for name, value, words in (("BLOCK_T", 128, "at most 64"), ("BLOCK_M", 64, "as many rows as")):
        assert words in knobs.refused(kernel, {name: value}, start | {name: value}, plan, H100)


def test_gradients_hold_no_lists_of_rows_but_of_blocks():
    """Of what a call leaves, and beside it; lists of columns and diagonals by row were ten times as much."""
    spec = systems.load("minference")
    plan, before = compile_backward(spec, H100).plan, compile_spec(spec, H100).plan
    for tokens in (4096, 32768):
        run = dryrun.gradients(plan, before, tokens=tokens)
        blocks = sum(x.bytes for buffer, x in run.buffers if buffer.role == "selection")
        assert blocks == tokens * 32 * 100 * 4
        assert run.peak - run.of("output") - blocks <= run.given, tokens


def changed(spec, **changes):
    return language.verify(spec.model_copy(update=changes))


REFUSED = {
    "a table of ways": (
        lambda: changed(other(ways=2), route=Route(by="head", table=("a_shape", "vertical_slash") * 2)),
        "no kernel takes a route by head yet",
    ),
    "the greatest of rows": (
        lambda: other(ways=1, how="max"),
        "no kernel reduces the scores of rows together yet",
    ),
    "a sink of all": (
        lambda: changed(other(ways=1), combine=Combine(softmax="union", sink="learned")),
        "tokens of branches columns and slashes may coincide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_does_is_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(PlanError, match=words):
        backends.compiled(make(), torch.float32)
