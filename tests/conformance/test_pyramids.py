"""Blocks of rows that read entries in tiers, on the emitted kernels, of other sizes and scores."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.lab import same
from conformance.oracles import check
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.spec import Attend, Blocks, Combine, Force, Select, Tier

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
THREE = (Tier(merge=1, fraction=0.3), Tier(merge=2, fraction=0.2), Tier(merge=4, fraction=0.3))
BY_TIER = Attend(name="pyramid", over="block", values="tiers", bias="log_count")


def scored(*, rows=8, size=16, quota=THREE, branch=BY_TIER, force=None, causal=True, **shape):
    """Means of blocks of rows against means of blocks of keys, heads of a group agreeing."""
    spec = systems.small("block_lists", **shape)
    (level,) = spec.levels
    level = level.model_copy(
        update={
            "partition": Blocks(size=size, stride=size),
            "query": level.query.model_copy(update={"block": rows}),
            "select": Select(quota=quota, force=force or Force()),
        }
    )
    changes = {"levels": (level,), "attend": (branch,), "causal": causal}
    return language.verify(spec.model_copy(update=changes))


def weighed(name, *, block=16, causal=False, force=None, **shape):
    """The shipped spec with blocks of so many tokens, under causality too."""
    spec = systems.small(name, block=block, **shape)
    *others, level = spec.levels
    select = level.select.model_copy(update={"force": force or Force()})
    levels = (*others, level.model_copy(update={"select": select}))
    return language.verify(spec.model_copy(update={"levels": levels, "causal": causal}))


OTHERS = {
    "tokens block by block": lambda: weighed("psa_mass", group=2, dims=(32, 64)),
    "under causality": lambda: weighed("psa_mass", causal=True, force=Force(last=1)),
    "causal, of few tokens": lambda: weighed("psa", block=8, causal=True, force=Force(first=1)),
    "forced on top": lambda: weighed("psa", force=Force(first=1, last=1, counted=False)),
    "a group agrees": lambda: scored(group=3, dims=(32, 32), force=Force(first=1, last=1)),
    "neither divides": lambda: scored(
        rows=12,
        size=12,
        quota=(Tier(merge=1, fraction=0.2), Tier(merge=3, fraction=0.5)),
        group=1,
    ),
    "means alone, capped": lambda: scored(
        causal=False,
        quota=(Tier(merge=2, fraction=0.3), Tier(merge=16, fraction=0.6)),
        branch=BY_TIER.model_copy(update={"softcap": 5.0, "sink": True}),
    ),
    "unweighed": lambda: scored(branch=BY_TIER.model_copy(update={"bias": None})),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_pyramids_are_right(name, lane, seed):
    """Documents that begin inside a block, are shorter than one, or have no row at all."""
    spec = OTHERS[name]()
    lengths, keys = [1, 0, 37, 5], [30, 9, 55, 5]
    call, _ = calls.pack(
        spec, lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    outcome = RUN[lane](call)
    check(call, outcome)
    again = RUN[lane](call.with_options(selection=outcome.selection))
    assert torch.equal(again.o, outcome.o), "its own choice, given back"


@pytest.mark.parametrize("lane", LANES)
def test_rows_of_one_block_may_bring_lists_of_their_own(lane, seed):
    """Entries that the block's tiers leave out are of the last one."""
    generator = torch.Generator().manual_seed(seed)
    for causal in (True, False):
        spec = scored(causal=causal, group=2, dims=(32, 32))
        call = calls.make(spec, B=2, T=27, S=61, device=lane, seed=seed)
        picks = torch.randint(-3, 5, (2, 27, 2, 5), generator=generator).clamp(min=-1)
        picks[:, ::5] = -1
        call = call.with_options(selection={"block": picks.to(torch.int32).to(lane)})
        check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_many_turns_make_what_one_does(lane, seed, monkeypatch):
    """Tiers of a chunk of blocks at a time; means and lists are always those of some of the heads."""
    spec = weighed("psa_mass", group=1, dims=(32, 32))
    call = calls.make(spec, T=67, device=lane, seed=seed)
    at_once = RUN[lane](call)
    for streams in (False, True):
        emitted = backends.compiled(spec, call.dtype, streams=streams)
        monkeypatch.setattr(emitted.driver, "SCRATCH_BYTES", 1)
    forced = {"score_block": {"BLOCK_T": 2}, "rank_block": {"BLOCK_R": 1}}
    forced |= {"attend_pyramid": {"BLOCK_T": 8, "BLOCK_M": 16}}
    again = RUN[lane](call, forced=forced)
    assert torch.equal(again.selection["block"], at_once.selection["block"])
    given = RUN[lane](call.with_options(selection=at_once.selection), forced=forced)
    same(
        calls.Outcome(o=again.o, lse=again.lse, selection={}),
        calls.Outcome(o=given.o, lse=given.lse, selection={}),
        what="turns, given",
    )


def test_others_under_the_same_softmax_are_refused():
    """A window has tokens that the first tier may have as well."""
    window = Attend(name="near", window=5)
    spec = scored().model_copy(
        update={"attend": (BY_TIER, window), "combine": Combine(softmax="union")}
    )
    words = "no kernel counts tokens of branch pyramid once with others yet"
    with pytest.raises(PlanError, match=words):
        backends.compiled(language.verify(spec), torch.float32)
