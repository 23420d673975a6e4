"""One softmax over branches without a key in common: every loop as the first turn and as a later one."""

import functools
import math

import pytest
import sanitizer
import torch
from shares import covering

from conformance import calls, systems
from conformance.lab import same
from conformance.oracles import check
from conformance.test_gates import WAYS
from conformance.test_latent import LANES
from conformance.test_logits import RUN
from hsgen import spec as language
from hsgen.spec import Attend, Combine

# another test has most of these
BETWEEN = [pytest.param(way, "between", marks=pytest.mark.full) for way in ("pooled", *WAYS)]
TURNS = {"last": ("window",), "first": ("near",), "between": ("near", "window")}
POOLED = """
hsgen: 1
name: pooled
causal: true
levels:
  - {name: entry, partition: {blocks: 8}, pool: {keys: mean, values: mean}, score: {form: dot}}
attend: [{name: compressed, over: entry, values: pooled}]
"""


@functools.cache
def spec_of(way, windows, *, sink=True):
    """The spec with windows beside its branch; those beside raw tokens have keys of their own."""
    shape = {"group": 65 if way == "latents" else 2, "dims": (48, 32)}
    if way == "pooled":
        spec = systems.bind(language.parse(POOLED, "pooled"), **shape)
    else:
        spec = systems.small(WAYS[way][0], **shape)
    (own,) = spec.attend
    kv = {x: None if way == "pooled" and len(windows) == 1 else x for x in windows}
    alike = {"scale": own.scale, "storage": own.storage}
    others = (Attend(name=x, window=5, kv=kv[x], **alike) for x in windows)
    combine = Combine(softmax="union", sink="learned" if sink else None)
    return language.verify(spec.model_copy(update={"attend": (own, *others), "combine": combine}))


def run(way, lane, call):
    _, orders, forced = WAYS.get(way, ("", (), {}))
    return RUN[lane](call, orders=orders, forced=forced)


def packed(spec, lane, seed):
    """Documents of which one is empty, and rows before the first key."""
    dtype = torch.float16 if lane == "cpu" else torch.bfloat16
    lengths = {"key_lengths": [11, 4, 8], "dtype": dtype, "device": lane, "seed": seed}
    return calls.pack(spec, [9, 0, 14], **lengths)[0]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("way", "turn"), [*covering(["pooled", *WAYS], ["last", "first"]), *BETWEEN]
)
def test_unions_are_right_whatever_memory_held(way, turn, lane, seed):
    call = packed(spec_of(way, TURNS[turn]), lane, seed)
    outcomes = []
    for fill in ("nan", "seven"):
        with sanitizer.poisoned_empty(fill):
            outcomes.append(run(way, lane, call))
    check(call, outcomes[0])
    same(*outcomes, what="two fills")


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("way", ["pooled", "blocks_to_rows"])
def test_without_a_sink_unions_are_right(way, lane, seed):
    call = packed(spec_of(way, TURNS["between"], sink=False), lane, seed)
    check(call, run(way, lane, call))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("way", WAYS)
def test_a_choice_given_back_makes_the_same_union(way, lane, seed):
    call = calls.make(spec_of(way, TURNS["between"]), B=2, T=13, device=lane, seed=seed)
    before = run(way, lane, call)
    check(call, before)
    after = run(way, lane, call.with_options(selection=before.selection))
    assert torch.equal(before.o, after.o)
    assert torch.equal(before.lse["o"], after.lse["o"])


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("turn", ["last", "first"])
def test_an_empty_branch_changes_nothing(turn, lane, seed):
    """No entry is complete before token 7: rows then see the window alone."""
    spec = spec_of("pooled", TURNS[turn], sink=False)
    call = calls.make(spec, T=7, dtype=torch.float32, device=lane, seed=seed)
    alone = spec.model_copy(update={"levels": (), "attend": spec.attend[1:], "combine": None})
    single = calls.make(language.verify(alone), T=7, dtype=torch.float32, device=lane)
    single = single.with_tensors(**{name: call.tensors[name] for name in single.tensors})
    union, window = run("pooled", lane, call), run("", lane, single)
    assert torch.allclose(union.o, window.o, rtol=1e-6, atol=1e-6)
    (lse,) = window.lse.values()
    assert torch.allclose(union.lse["o"], lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("turn", ["last", "first"])
def test_a_sink_of_nothing_and_one_of_all(turn, lane, seed):
    """The log-sum-exp is of keys alone; what the sink leaves to them is."""
    spec = spec_of("pooled", TURNS[turn])
    call = calls.make(spec, T=21, dtype=torch.float32, device=lane, seed=seed)
    sink = call.tensors["sink"]
    outcomes = [
        run("pooled", lane, call.with_tensors(sink=torch.full_like(sink, value)))
        for value in (-math.inf, -1e4, 1e4)
    ]
    plain = spec_of("pooled", TURNS[turn], sink=False)
    without = {name: x for name, x in call.tensors.items() if name != "sink"}
    single = calls.make(plain, T=21, dtype=torch.float32, device=lane).with_tensors(**without)
    assert torch.equal(outcomes[0].o, run("pooled", lane, single).o)
    assert torch.equal(outcomes[0].o, outcomes[1].o)
    assert torch.equal(outcomes[2].o, torch.zeros_like(outcomes[2].o))
    assert torch.equal(outcomes[0].lse["o"], outcomes[2].lse["o"])


@pytest.mark.parametrize("lane", LANES)
def test_a_union_of_one_branch_has_its_sink(lane, seed):
    call = calls.make(spec_of("pooled", ()), B=2, T=21, device=lane, seed=seed)
    check(call, run("pooled", lane, call))
