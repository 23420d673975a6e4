"""Values that are the first channels of keys: every branch over latents, on the emitted kernels."""

import functools

import pytest
import torch

from conformance import backends, calls, cases, laws, probes, systems
from conformance.lab import Lab, same
from conformance.oracles import check
from hsgen import spec as language

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
AGAIN = {"cpu": functools.partial(backends.interpreter, seed=1), "cuda": backends.cuda}
LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
# By what is attended: the spec, and the order of its loops where it has two.
BRANCHES = {
    "tokens": ("sparse_mla", ()),
    "blocks_of_a_group": ("kinetics", ()),
    "blocks_of_a_head": ("moba", (("selected", "rows"),)),
    "rows_to_blocks": ("moba", (("selected", "keys"),)),
    "window": ("small_thinker", ()),
    "everything": ("sqa", ()),
    "pooled": ("pooled", ()),
}
POOLED = """
hsgen: 1
name: pooled
causal: true
levels:
  - {name: entry, partition: {blocks: 16}, pool: {keys: mean}, score: {form: dot}}
attend: [{name: compressed, over: entry, values: pooled, storage: latent}]
"""
FACTORS = {
    "group": 7,
    "dtype": "fp16",
    "tokens": "odd",
    "layout": "packed",
    "position": "longer",
    "dims": (80, 64),
    "block": 8,
}
CASES = (
    FACTORS,
    FACTORS | {"group": 3, "dtype": "fp32", "layout": "guarded", "dims": (96, 96)},
    FACTORS | {"group": 1, "dtype": "bf16", "position": "padded", "dims": (576, 512)},
)
WIDE = FACTORS | {"group": 65, "tokens": "short", "dims": (48, 32)}  # heads of two programs
LAWS = (
    laws.everything_selected_is_dense_attention,
    laws.decode_steps_are_rows_of_prefill,
    laws.rows_before_the_first_key_are_empty,
    laws.any_selection_is_attended,
    probes.uniform_probe_reads_the_mask,
    probes.future_has_no_influence,
    probes.padding_is_never_read,
    probes.nothing_depends_on_what_memory_held,
)


def latent(spec):
    """The same spec with no values but those in its keys."""
    attend = tuple(b.model_copy(update={"storage": "latent"}) for b in spec.attend)
    return language.verify(spec.model_copy(update={"attend": attend}))


def small(name, *, block=8, **shape):
    if name == "pooled":
        return systems.bind(systems.shrink(language.parse(POOLED), block=block), **shape)
    return systems.small(name, block=block, **shape)


def call_of(name, case, lane, seed=0):
    shape = {key: case[key] for key in ("block", "group", "dims")}
    return cases.build_of(latent(small(name, **shape)), case, device=lane, seed=seed)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("case", CASES, ids=cases.case_id)
@pytest.mark.parametrize("branch", BRANCHES)
def test_outputs_and_selections_are_right(branch, case, lane, seed):
    name, orders = BRANCHES[branch]
    call = call_of(name, case, lane, seed)
    check(call, RUN[lane](call, orders=orders))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("branch", "dtype"), [("tokens", "fp16"), ("blocks_of_a_group", "fp32"), ("window", "fp16")]
)
def test_heads_of_one_token_are_those_of_several_programs(branch, dtype, lane, seed):
    name, orders = BRANCHES[branch]
    call = call_of(name, WIDE | {"dtype": dtype}, lane, seed)
    outcome, again = RUN[lane](call, orders=orders), AGAIN[lane](call, orders=orders)
    check(call, outcome)
    same(outcome, again, what="two runs")


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("claim", LAWS, ids=lambda claim: claim.name)
def test_claim(claim, lane):
    """Of the two kernels that gather, one where a tile of tokens has a list of its own as well."""
    made = _Lab(run=RUN[lane], again=AGAIN[lane], name="sparse_mla", device=lane)
    claim(made)


class _Lab(Lab):
    """On 65 heads, or as many as a check asks for; few rows, each of which is two programs."""

    T, short = 21, 11

    def spec(self, **shape):
        return systems.small(self.name, **({"group": 65, "dims": (48, 32)} | shape))


def test_no_values_are_read():
    """A caller's `v` is nothing that a kernel has."""
    call = call_of("sparse_mla", FACTORS, "cpu")
    assert set(call.tensors) == {"q", "k", "q_index", "k_index", "w_index"}
    plan = backends._plan(call.spec, torch.float16, ())
    assert not any("V" in [p.name for p in kernel.params] for kernel in plan.kernels)
    assert calls.value_side(call).keys() == {"k"}
