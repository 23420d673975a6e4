"""Blocks of rows that choose together, one list a block, on the emitted kernels."""

import pytest
import torch

from conformance import backends, calls, cases, laws, probes, systems
from conformance.lab import Lab, same
from conformance.oracles import check
from hsgen import spec as language

NAME = "block_lists"
RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
# Some of the pairs of laws and dtypes on the CPU, of these two thirds each run, all on a GPU.
CLAIMS = [
    pytest.param(
        claim,
        word,
        lane,
        id=f"{claim.name}-{word}-{lane}",
        marks=marks or (pytest.mark.full if i % 3 == 0 else ()),
    )
    for i, claim in enumerate((*laws.CHECKS, *probes.CHECKS))
    if claim.applies(systems.small(NAME))
    for j, word in enumerate(("fp32", "fp16", "bf16"))
    for lane, marks in (("cpu", ()), ("cuda", (pytest.mark.gpu,)))
    if lane == "cuda" or j == i % 2
]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Blocks of rows and of keys that are not alike, heads that choose for themselves, other pools and scores.
OTHERS = {
    "rows over keys": {"rows": 16, "share": "head"},
    "keys over rows": {"rows": 4, "pool": "max", "share": "head"},
    "neither divides": {"rows": 12, "share": "head", "first": 0, "last": 2},
    "bounds": {"rows": 8, "form": "bound", "keys": "minmax", "share": "head"},
    "greatest of a group": {"rows": 8, "reduce": "max", "last": 0},
}


def other(
    *,
    rows,
    pool="mean",
    keys="mean",
    form="dot",
    share="group",
    reduce="sum",
    first=1,
    last=1,
    **shape,
):
    """The example with other blocks of rows, pools and heads that agree."""
    spec = systems.small(NAME, **shape)
    (level,) = spec.levels
    force = level.select.force.model_copy(update={"first": first, "last": last})
    level = level.model_copy(
        update={
            "query": level.query.model_copy(update={"block": rows, "pool": pool}),
            "pool": level.pool.model_copy(update={"keys": keys}),
            "score": level.score.model_copy(
                update={
                    "form": form,
                    "share": share,
                    "reduce": reduce if share == "group" else None,
                }
            ),
            "select": level.select.model_copy(update={"top_k": 7, "force": force}),
        }
    )
    return language.verify(spec.model_copy(update={"levels": (level,)}))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("case", cases.FEW, ids=cases.case_id)
def test_outputs_and_selections_are_right(case, lane, seed):
    call = cases.build(NAME, case, device=lane, seed=seed)
    check(call, RUN[lane](call))


@pytest.mark.parametrize(("claim", "dtype", "lane"), CLAIMS)
def test_claim(claim, dtype, lane):
    run = RUN[lane]
    group = {"fp32": 3, "fp16": 2, "bf16": 1}[dtype]
    claim(Lab(run=run, again=run, name=NAME, dtype=DTYPES[dtype], device=lane, group=group))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_blocks_of_other_sizes_are_right(name, lane, seed):
    """Documents that begin inside a block, are shorter than one, or have no row at all."""
    spec = other(**OTHERS[name], dims=(32, 32))
    call, _ = calls.pack(
        spec, [1, 0, 37, 5], key_lengths=[30, 9, 55, 2], dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_parts_of_a_block_walk_the_same_list(lane, seed):
    """Tiles of fewer rows than a block has, and of which a block is no multiple."""
    spec = other(rows=12, dims=(32, 32))
    call = calls.make(spec, T=41, S=90, device=lane, seed=seed)
    for tokens in (1, 8):
        forced = {"attend_selected": {"BLOCK_T": tokens, "BLOCK_M": 16}}
        check(call, RUN[lane](call, forced=forced))


@pytest.mark.parametrize("lane", LANES)
def test_rows_of_one_block_may_bring_lists_of_their_own(lane, seed):
    """Of rows that the spec would let choose together, under causality and without it."""
    generator = torch.Generator().manual_seed(seed)
    for causal in (True, False):
        spec = other(rows=8, causal=causal, dims=(32, 32))
        call = calls.make(spec, B=2, T=27, S=61, device=lane, seed=seed)
        picks = torch.randint(-3, 9, (2, 27, 2, 5), generator=generator).clamp(min=-1)
        picks[:, ::5] = -1
        call = call.with_options(selection={"block": picks.to(torch.int32).to(lane)})
        check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_many_turns_make_what_one_does(lane, seed, monkeypatch):
    """Scores of a chunk of blocks at a time, and members of a chunk of tiles."""
    spec = other(rows=8, share="head", dims=(32, 32))
    call = calls.make(spec, T=67, device=lane, seed=seed)
    at_once = RUN[lane](call)
    given = call.with_options(selection=at_once.selection)
    for streams in (False, True):
        emitted = backends.compiled(spec, call.dtype, streams=streams)
        monkeypatch.setattr(emitted.driver, "SCRATCH_BYTES", 1)
    forced = {"score_block": {"BLOCK_T": 2, "BLOCK_M": 16}, "rank_block": {"BLOCK_R": 2}}
    same(at_once, RUN[lane](call, forced=forced), what="turns")
    again = RUN[lane](given)
    same(
        calls.Outcome(o=at_once.o, lse=at_once.lse, selection={}),
        calls.Outcome(o=again.o, lse=again.lse, selection={}),
        what="turns, given",
    )
