"""Gradients of tiers of a pyramid against float64, on the choice that the kernels made."""

import pytest
import sanitizer
import torch
from conformance import systems
from emitted import graph
from test_backward import check, i32, tensors

from hsgen import backward, dryrun, load_kernel, schedule
from hsgen.errors import PlanError
from hsgen.spec import load, parse
from hsgen.target import H100

TIERS = """
hsgen: 1
name: tiers
heads: {{query: {query}, kv: {kv}}}
head_dim: {{qk: {qk}, v: {v}}}
causal: {causal}
levels:
  - name: block
    partition: {{blocks: 16}}
    pool: {{keys: mean}}
    query: {{block: 12, pool: mean}}
    score: {{form: dot, {share}}}
    select: {{quota: [{quota}], force: {{last: {last}}}}}
attend:
  - {{name: pyramid, over: block, values: tiers, {more}}}
"""
THREE = "{merge: 1, fraction: 0.3}, {merge: 2, fraction: 0.2}, {merge: 4, fraction: 0.3}"
SMALL = {
    "qk": 32,
    "v": 16,
    "causal": "true",
    "share": "share: group, reduce: sum",
    "quota": THREE,
    "last": 1,
    "more": "bias: log_count",
}
GATED = """  - {{name: near, window: 5}}
combine: {{gates: input}}
"""


def spec(text=TIERS, **numbers):
    return parse(text.format(**(SMALL | numbers)))


def test_tiers_have_gradients(seed):
    """Of a group of 3 that agrees; documents of 1, of 0 and of odd tokens, rows in parts."""
    config = {"dq_pyramid": {"BLOCK_T": 4, "BLOCK_M": 16}, "takers_pyramid_2": {"BLOCK_N": 2}}
    with sanitizer.enabled(seed=seed):
        check(spec(query=3, kv=1), T=45, cu_seqlens_q=i32(0, 11, 11, 12, 45), config=config)


def test_means_alone_that_heads_chose_have_gradients(seed):
    """Each query head for itself, with a sink and capped; the last mean of a sequence is of fewer tokens."""
    numbers = {
        "share": "share: head",
        "causal": "false",
        "quota": "{merge: 2, fraction: 0.3}, {merge: 16, fraction: 0.6}",
        "last": 0,
        "more": "softcap: 5.0, sink: learned",
    }
    with sanitizer.enabled(seed=seed):
        check(spec(**numbers, query=4, kv=2), B=2, T=30, S=45, kv_lens=i32(45, 33))


@pytest.mark.full
@pytest.mark.parametrize("name", ["psa", "psa_mass"])
def test_systems_of_tiers_have_gradients(name, seed):
    with sanitizer.enabled(seed=seed):
        check(systems.small(name, dims=(32, 32)), T=35)


def test_rows_of_a_block_may_be_told_entries_of_their_own():
    """A caller's repeat, have -1 anywhere, and some that their block leaves out: of the last tier."""
    tiers = spec(query=2, kv=1, causal="false", last=0)
    x = tensors(tiers, 1, 26, 61, torch.float32)
    picks = torch.randint(-3, 4, (1, 26, 1, 4)).clamp(min=-1).int()
    attn = load_kernel(tiers, interpret=True)
    wide = {"selection": {"block": picks}, "dtype": torch.float64}
    exact = attn.reference(**{n: y.double() for n, y in x.items()}, **wide)
    exact = torch.autograd.grad(exact.square().sum(), list(x.values()))
    o = attn(**x, selection={"block": picks})
    found = torch.autograd.grad(o.square().sum(), list(x.values()))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_heads_have_turns_whose_means_and_lists_are_a_part_of_what_is_given():
    """Also of what is given without lists, at any length."""
    for name in ("psa", "psa_mass"):
        bound = graph(load(name))
        forward, plan = schedule.schedule(bound, H100), backward.plan(bound, H100)
        for tokens in (4096, 8192, 32768, 131072):
            run = dryrun.gradients(plan, forward, tokens=tokens)
            assert run.given + run.peak <= 1.3 * (run.given + run.of("output")), (name, tokens)


def test_tiers_under_gates_have_no_gradient():
    gated = spec(TIERS + GATED, query=2, kv=2)
    with pytest.raises(
        PlanError, match="branch pyramid: no kernel has the gradient of tiers under"
    ):
        backward.plan(graph(gated), H100)
