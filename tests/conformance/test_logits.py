"""Logits that are capped, and sinks: in every loop that attends, on the emitted kernels."""

import functools

import pytest
import torch

from conformance import backends, calls, cases, systems
from conformance.lab import same
from conformance.oracles import check
from conformance.test_latent import LANES, WIDE
from hsgen import spec as language

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
UNION = {"index_selected": {"DEAR": 0}}
# spec, order of loops, tunables: each way to attend once
WAYS = {
    "branches": ("nsa", (), {}),
    "rows_to_blocks": ("moba", (("selected", "keys"),), {}),
    "a_list_each": ("dsa_gqa", (), {}),
    "a_union": ("dsa_gqa", (), UNION),
    "latents": ("sparse_mla", (), {}),
}


def with_logits(spec, *, sink=True, softcap=1.5):
    changes = {"sink": "learned" if sink else None, "softcap": softcap}
    attend = tuple(branch.model_copy(update=changes) for branch in spec.attend)
    return language.verify(spec.model_copy(update={"attend": attend}))


@functools.cache
def spec_of(way):
    name, _, _ = WAYS[way]
    group = 65 if way == "latents" else 2
    return with_logits(systems.small(name, group=group, dims=(48, 32)))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_right(way, lane, seed):
    _, orders, forced = WAYS[way]
    case = WIDE | {"group": spec_of(way).heads.group, "dtype": "fp16" if lane == "cpu" else "bf16"}
    call = cases.build_of(spec_of(way), case, device=lane, seed=seed)
    check(call, RUN[lane](call, orders=orders, forced=forced))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("way", ["branches", "rows_to_blocks"])
def test_logits_reach_the_cap_and_no_further(way, lane):
    """Rows before the first key stay empty, whatever the sink."""
    _, orders, _ = WAYS[way]
    call = calls.make(spec_of(way), T=23, S=12, device=lane)
    call = call.with_tensors(q=call.tensors["q"] * 5)
    check(call, RUN[lane](call, orders=orders))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("way", ["branches", "rows_to_blocks"])
def test_a_sink_of_nothing_and_one_of_all(way, lane):
    _, orders, _ = WAYS[way]
    spec = with_logits(spec_of(way), softcap=None)
    call = calls.make(spec, T=17, device=lane)
    sinks = [name for name in call.tensors if name.endswith("_sink")]
    assert sinks
    none, all_of_it = (
        call.with_tensors(**{n: torch.full_like(call.tensors[n], x) for n in sinks})
        for x in (-torch.inf, 1e6)
    )
    assert (RUN[lane](all_of_it, orders=orders).o == 0).all()
    others = {name: x for name, x in call.tensors.items() if name not in sinks}
    plain = calls.Call(spec=with_logits(spec, sink=False, softcap=None), tensors=others)
    same(RUN[lane](plain, orders=orders), RUN[lane](none, orders=orders), what="no sink")
