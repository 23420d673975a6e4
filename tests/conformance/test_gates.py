"""Gated sums of branches: every loop that attends as the first branch of a sum and as a later one."""

import functools

import pytest
import sanitizer
import torch
from shares import covering

from conformance import backends, calls, systems
from conformance.lab import same
from conformance.oracles import check
from conformance.test_latent import LANES
from conformance.test_logits import RUN, UNION
from hsgen import spec as language
from hsgen.spec import Attend, Combine

# spec, order of loops, tunables: each way to attend once
WAYS = {
    "blocks_to_rows": ("moba", (("selected", "rows"),), {}),
    "rows_to_blocks": ("moba", (("selected", "keys"),), {}),
    "a_list_each": ("dsa_gqa", (), {}),
    "a_union": ("dsa_gqa", (), UNION),
    "latents": ("sparse_mla", (), {}),
    "together": ("block_lists", (), {}),
}
# A window whose turn is before that of `selected`, and one after; a choice of blocks of rows comes first.
WINDOWS = ("near", "window")
TURNS = {"last": ("near",), "first": ("window",), "between": WINDOWS}
# another test has each of these
BETWEEN = [pytest.param(way, "between", marks=pytest.mark.full) for way in WAYS]


@functools.cache
def spec_of(way, *windows):
    """The spec with windows beside its branch, and gates."""
    spec = systems.small(WAYS[way][0], group=65 if way == "latents" else 2, dims=(48, 32))
    (own,) = spec.attend
    others = (Attend(name=name, window=5, storage=own.storage) for name in windows)
    changes = {"attend": (own, *others), "combine": Combine(gates="input")}
    return language.verify(spec.model_copy(update=changes))


def run(way, lane, call):
    _, orders, forced = WAYS[way]
    return RUN[lane](call, orders=orders, forced=forced)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("way", "turn"), [*covering([*WAYS], ["last", "first"]), *BETWEEN])
def test_sums_are_right_whatever_memory_held(way, turn, lane, seed):
    """Documents of which one is empty, rows before the first key, and outputs that start as NaN."""
    dtype = torch.float16 if lane == "cpu" else torch.bfloat16
    call, _ = calls.pack(
        spec_of(way, *TURNS[turn]),
        [9, 0, 14],
        key_lengths=[11, 4, 8],
        dtype=dtype,
        device=lane,
        seed=seed,
    )
    outcomes = []
    for fill in ("nan", "seven"):
        with sanitizer.poisoned_empty(fill):
            outcomes.append(run(way, lane, call))
    check(call, outcomes[0])
    same(*outcomes, what="two fills")


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("way", WAYS)
def test_a_choice_given_back_makes_the_same_sum(way, lane, seed):
    call = calls.make(spec_of(way, *WINDOWS), B=2, T=13, device=lane, seed=seed)
    before = run(way, lane, call)
    check(call, before)
    after = run(way, lane, call.with_options(selection=before.selection))
    assert torch.equal(before.o, after.o)


@pytest.mark.parametrize("lane", LANES)
def test_gates_may_have_any_strides(lane, seed):
    """Heads outermost, branches in another order in memory, one number for all rows."""
    call = calls.make(spec_of("blocks_to_rows", *WINDOWS), B=2, T=13, device=lane, seed=seed)
    gates = call.tensors["gates"]
    turned = gates.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    same(
        run("blocks_to_rows", lane, call),
        run("blocks_to_rows", lane, call.with_tensors(gates=turned)),
    )
    one = gates[:1, :1].contiguous()
    alike = run("blocks_to_rows", lane, call.with_tensors(gates=one.expand_as(gates)))
    copied = call.with_tensors(gates=one.expand_as(gates).contiguous())
    same(run("blocks_to_rows", lane, copied), alike)


@pytest.mark.parametrize("lane", LANES)
def test_closed_gates_leave_nothing(lane, seed):
    """A branch whose gate is 0 has no part in the sum, whichever turn it has.

    Equal but for the last bits: a GPU multiplies by the gate and adds in one step, which rounds once.
    """
    spec = spec_of("blocks_to_rows", *WINDOWS)
    call = calls.make(spec, T=13, dtype=torch.float32, device=lane, seed=seed)
    single = {}
    for i, branch in enumerate(spec.attend):
        gates = torch.zeros_like(call.tensors["gates"])
        gates[..., i] = 1
        single[branch.name] = run("blocks_to_rows", lane, call.with_tensors(gates=gates)).o
    every = call.with_tensors(gates=torch.ones_like(call.tensors["gates"]))
    turns = ("near", "selected", "window")
    expected = (single[turns[0]] + single[turns[1]]) + single[turns[2]]
    got, unit = run("blocks_to_rows", lane, every).o, 2.0**-23 if lane == "cuda" else 0.0
    assert torch.allclose(got, expected, rtol=2 * unit, atol=2 * unit * float(expected.abs().max()))


def test_choosing_needs_no_gates():
    """The first branch runs for its log-sum-exp alone; its output is nobody's."""
    call = calls.make(systems.small("nsa", group=2, dims=(48, 32)), T=29)
    chosen = backends.interpreter(call).selection
    emitted = backends.compiled(call.spec, call.dtype)
    tensors = {name: x for name, x in call.tensors.items() if name != "gates"}
    with sanitizer.enabled():
        again = emitted.driver.select(tensors, backends._batch(call), emitted.quick)
    assert torch.equal(chosen["block"], again["block"])
