"""Entries cut from keys that are sorted inside segments, on the emitted kernels."""

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import knobs, passes, planner, schedule
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.spec import Blocks
from hsgen.target import Target

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
# Rows, blocks and segments of which some divide no other; forced segments and first tokens; no causality.
OTHERS = {
    "rows of three segments": {"rows": 24, "size": 4, "segment": 8, "first": 1, "last": 2},
    "neither divides": {"rows": 10, "size": 4, "segment": 12, "sink": 5, "least": 3},
    "by the mean": {"rows": 8, "size": 8, "segment": 24, "by": "mean", "group": 3},
    "every row a judge": {"rows": 8, "size": 2, "segment": 6, "judges": 99, "counted": True},
    "not causal": {"rows": 6, "size": 4, "segment": 8, "causal": False},
}
NEVER_LEFT_OUT = ("neither divides", "by the mean")
CASES = [
    pytest.param(
        name,
        *lane.values,
        id=f"{name}-{lane.id}",
        marks=lane.marks
        if name in NEVER_LEFT_OUT or lane.id == "gpu"
        else (*lane.marks, pytest.mark.full),
    )
    for name in OTHERS
    for lane in LANES
]


def other(
    *,
    rows=8,
    size=8,
    segment=16,
    by="mass",
    judges=5,
    first=0,
    last=1,
    sink=1,
    least=1,
    counted=False,
    causal=True,
    **shape,
):
    """PBS-Attn with other sizes."""
    spec = systems.small("pbs_attn", **shape)
    (level,) = spec.levels
    order = level.permute.keys.model_copy(
        update={"segment": segment, "by": by, "last": judges if by == "mass" else None}
    )
    force = {"first": first, "last": last, "sink": sink, "counted": counted}
    select = level.select.model_copy(
        update={
            "force": level.select.force.model_copy(update=force),
            "top_p": level.select.top_p.model_copy(update={"min": least}),
        }
    )
    level = level.model_copy(
        update={
            "permute": level.permute.model_copy(update={"keys": order}),
            "partition": Blocks(size=size, stride=size),
            "query": level.query.model_copy(update={"block": rows}),
            "select": select,
        }
    )
    return language.verify(spec.model_copy(update={"levels": (level,), "causal": causal}))


@pytest.mark.parametrize(("name", "lane"), CASES)
def test_other_sizes_are_right(name, lane, seed):
    """Documents that begin inside a block, are shorter than a segment, or have no row at all."""
    spec = other(dims=(32, 16), **{"group": 1, "kv": 2} | OTHERS[name])
    call, _ = calls.pack(
        spec, [1, 0, 29, 5], key_lengths=[30, 9, 41, 2], dtype=torch.float32, device=lane, seed=seed
    )
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_rows_of_one_block_may_bring_lists_of_their_own(lane, seed):
    """What a row sees of an entry is told by the places of its tokens, wherever they went."""
    generator = torch.Generator().manual_seed(seed)
    spec = other(dims=(16, 16), segment=32, group=1)
    call = calls.make(spec, B=2, T=21, S=61, device=lane, seed=seed)
    picks = torch.randint(-3, 9, (2, 21, 2, 5), generator=generator).clamp(min=-1)
    picks[:, ::5] = -1
    call = call.with_options(selection={"block": picks.to(torch.int32).to(lane)})
    check(call, RUN[lane](call))


def walk(*, rows=8, segment=8, unit=8, step=3, gain=0.2, **shape):
    """S2O with other sizes."""
    spec = systems.small("s2o", **shape)
    (level,), (own, history) = spec.levels, spec.attend
    order = level.permute.keys.model_copy(update={"segment": segment})
    stop = level.select.early_stop.model_copy(update={"entries": step, "gain": gain})
    level = level.model_copy(
        update={
            "permute": level.permute.model_copy(update={"keys": order}),
            "query": level.query.model_copy(update={"block": rows}),
            "select": level.select.model_copy(update={"early_stop": stop}),
        }
    )
    own = own.model_copy(update={"static": own.static.model_copy(update={"blocks": unit})})
    return language.verify(spec.model_copy(update={"levels": (level,), "attend": (own, history)}))


# Steps that are no power of two, or longer than what is ranked at a time; walks that never stop, or at once.
WALKS = {
    "several segments a block": {"rows": 24, "segment": 12, "unit": 6, "step": 5, "gain": 0.1},
    "to the end": {"gain": 0.0, "step": 16},
    "one step": {"gain": 1.0, "step": 1, "unit": 4, "group": 1},
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", WALKS)
def test_walks_stop_where_the_reference_does(name, lane, seed):
    """The very tokens, of documents that begin inside a block, are shorter than one or have no row."""
    spec = walk(dims=(16, 32), **{"group": 2, "kv": 1} | WALKS[name])
    call, _ = calls.pack(
        spec, [1, 0, 29, 5], key_lengths=[30, 9, 41, 2], dtype=torch.float32, device=lane, seed=seed
    )
    outcome = RUN[lane](call)
    check(call, outcome)
    wanted = call.reference().selection["history"].indices
    got = outcome.selection["history"]
    assert (got[..., : wanted.shape[-1]] == wanted).all()
    assert (got[..., wanted.shape[-1] :] == -1).all()


@pytest.mark.parametrize("lane", LANES)
def test_walked_lists_may_be_a_callers(lane, seed):
    """Tokens of the own block, which the other branch has, count once."""
    generator = torch.Generator().manual_seed(seed)
    spec = walk(dims=(16, 16), unit=4, group=1)
    call = calls.make(spec, B=2, T=13, S=37, device=lane, seed=seed)
    picks = torch.randint(-3, 37, (2, 13, 2, 9), generator=generator).clamp(min=-1)
    picks[:, ::5] = -1
    call = call.with_options(selection={"history": picks.to(torch.int32).to(lane)})
    check(call, RUN[lane](call))


def test_a_step_that_no_room_holds_is_refused():
    spec = walk(step=64)
    plan = schedule.schedule(passes.run(planner.plan(spec)), Target.named("h100"))
    kernel = plan.kernel("walk_history")
    values = {**kernel.config.keywords(), "BLOCK_P": 32}
    wrong = knobs.refused(kernel, {"BLOCK_P": 32}, values, plan, Target.named("h100"))
    assert wrong == "expected BLOCK_P to hold a step of 64 tokens, got 32"


@pytest.mark.parametrize("lane", LANES)
def test_keys_of_equal_weight_stay_in_order(lane):
    """Of queries that are 0 all keys have the same mass: entries are blocks in place, chosen alike."""
    spec = other(dims=(16, 16), group=1)
    call = calls.make(spec, T=45, device=lane)
    call = call.with_tensors(q=torch.zeros_like(call.tensors["q"]))
    values = torch.arange(45, device=lane, dtype=torch.float32)[None, :, None, None]
    call = call.with_tensors(v=values.expand_as(call.tensors["v"]).contiguous())
    outcome = RUN[lane](call)
    check(call, outcome)
    first = outcome.o[0, 20, :, 0]  # 0 to 7 for their mass or for the sink, 16 to 20 as its own
    chosen = outcome.selection["block"][0, 20]
    for head in range(len(first)):
        entries = chosen[head][chosen[head] >= 0].tolist()
        seen = [t for e in entries for t in range(8 * e, 8 * e + 8) if t <= 20]
        assert float(first[head]) == pytest.approx(sum(seen) / len(seen), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segment": 8192, "size": 64}, "no kernel sorts segments of more than 4096 tokens yet"),
        ({"sink": 17}, "no kernel forces the entries of more than 16 first tokens yet"),
    ],
)
def test_what_no_program_holds_is_refused(changes, words):
    graph = passes.run(planner.plan(other(**changes)))
    with pytest.raises(PlanError, match=words):
        schedule.schedule(graph, Target.named("h100"))
