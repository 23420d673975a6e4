"""Entries weighed by gates, mapped, normed and rotated: pooled keys that are attended, and so are seen."""

import pytest
import torch

from conformance import backends, calls
from conformance.oracles import check
from conformance.test_latent import LANES
from hsgen import planner, schedule
from hsgen.errors import PlanError
from hsgen.spec import parse
from hsgen.target import H100

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
POOLS = {
    "gates_of_channels": "keys: gated, softmax: channel, position: learned",
    "gates_of_tokens": "keys: gated, softmax: token, position: learned",
    "gates_alone": "keys: gated, softmax: token",
    "three_maps": "keys: max_min_mean",
    "first_token": "keys: first",
    "first_normed": "keys: first, then: norm",
    "max_rotated": "keys: max, rotate: {at: first, dims: 32, base: 10000.0}",
    "mean_finished": "keys: mean, then: norm, rotate: {at: first, dims: 32, pairs: neighbours}",
    "halves_of_two_chunks": "keys: sum_rsqrt, then: norm, rotate: {at: centre, dims: 48, base: 1000.0}",
    "gates_finished": "keys: gated, softmax: channel, position: learned, then: norm,"
    " rotate: {at: first, dims: 16, channels: last, pairs: neighbours}",
    "maps_finished": "keys: max_min_mean, then: norm, rotate: {at: first, dims: 32, channels: last}",
}
SPEC = """
hsgen: 1
name: pools
heads: {query: 4, kv: 2}
head_dim: 48
causal: CAUSAL
levels:
  - name: entry
    partition: {blocks: SIZE}
    pool: {POOL}
    score: {form: dot}
attend: [{name: compressed, over: entry, values: pooled, storage: latent}]
"""


def spec_of(pool, *, size=8, causal=True):
    text = SPEC.replace("POOL", POOLS[pool]).replace("SIZE", str(size))
    return parse(text.replace("CAUSAL", str(causal).lower()))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("pool", POOLS)
def test_entries_are_right(pool, lane, seed):
    """In one dtype a sequence that ends inside an entry, in another documents."""
    call = calls.make(spec_of(pool), B=2, T=27, device=lane, seed=seed)
    check(call, RUN[lane](call))
    packed, _ = calls.pack(
        spec_of(pool, size=5), [11, 0, 1, 17], dtype=torch.float16, device=lane, seed=seed
    )
    check(packed, RUN[lane](packed))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("pool", ["gates_of_channels", "three_maps", "first_token"])
def test_a_last_entry_may_be_short(pool, lane, seed):
    call = calls.make(spec_of(pool, causal=False), B=2, T=13, S=27, device=lane, seed=seed)
    lens = torch.tensor([27, 19], dtype=torch.int32, device=lane)
    check(
        call, RUN[lane](call.with_options(kv_lens=lens, q_offset=0)) if False else RUN[lane](call)
    )


@pytest.mark.parametrize("lane", LANES)
def test_gates_of_any_size(lane):
    """Of a softmax: what they have in common changes nothing, and large ones choose a token."""
    call = calls.make(spec_of("gates_of_channels"), T=27, device=lane)
    large = call.with_tensors(z=call.tensors["z"] * 300 - 1000)
    check(large, RUN[lane](large))


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ("keys: linear, rotate: {at: first, dims: 16}", "rotates keys pooled by linear"),
        ("keys: mean, rotate: {at: token, dims: 16}", "rotates keys before it pools them"),
        ("keys: mlp, hidden: 16", "pools by mlp"),
    ],
)
def test_what_no_kernel_pools_is_refused(pool, words):
    text = SPEC.replace("POOL", pool).replace("SIZE", "8").replace("CAUSAL", "true")
    text = text.replace("score: {form: dot}", "score: {form: dot}\n    select: {top_k: 2}")
    text = text.replace("values: pooled, storage: latent", "values: raw")
    with pytest.raises(PlanError, match=words):
        schedule.schedule(planner.plan(parse(text)), H100)
