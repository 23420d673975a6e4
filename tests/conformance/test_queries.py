"""Queries that score and are none of those that attend: of fewer heads, turned by rows or by blocks."""

import pytest
import torch

from conformance import calls
from conformance.oracles import check
from conformance.test_latent import LANES
from conformance.test_logits import RUN
from hsgen import passes, planner, schedule
from hsgen.errors import PlanError
from hsgen.spec import parse
from hsgen.target import H100

SPEC = """
hsgen: 1
name: turned_queries
heads: {query: 6, kv: 2}
head_dim: 48
causal: true
levels:
  - name: block
    partition: {blocks: 8}
    WHOSE
    pool: {keys: mean, rotate: {at: first, dims: 32, TURN}}
    query: {QUERY}
    score: {form: dot, SHARE}
    select: {top_k: 3, force: {last: 1}}
attend: [{name: selected, over: block}]
"""
GATE = "kv: gate\n    q: gate"
# whose queries and keys, how they turn, what of queries, who shares
TURNS = {
    "group": (GATE, "pairs: halves", "rotate: token", "share: group"),
    "heads": (GATE, "base: 500.0, pairs: neighbours", "rotate: token", "share: head"),
    "own": ("", "channels: last", "rotate: token", "share: group, reduce: sum"),
    "blocks": (GATE, "pairs: halves", "block: 8, pool: mean, rotate: first", "share: head"),
    "short blocks": (
        "",
        "base: 90.0, channels: last, pairs: neighbours",
        "block: 4, pool: max, rotate: centre",
        "share: group, reduce: max",
    ),
}


def spec_of(name):
    whose, turn, query, share = TURNS[name]
    text = SPEC.replace("WHOSE", whose).replace("TURN", turn).replace("QUERY", query)
    return parse(text.replace("SHARE", share).replace("select: {top_k: 3", "select: {top_k: 4"))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", TURNS)
def test_choices_and_outputs_are_right(name, lane, seed):
    """Of documents too, of which one has no key."""
    spec = spec_of(name)
    call = calls.make(spec, T=21, S=19, device=lane, seed=seed)
    check(call, RUN[lane](call))
    lengths = {"key_lengths": [30, 0, 45, 2], "dtype": torch.float16, "device": lane}
    packed, _ = calls.pack(spec, [11, 3, 13, 5], **lengths, seed=seed)
    check(packed, RUN[lane](packed))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("offset", [-3, 5])
def test_tables_have_no_row_before_the_first_key_or_behind_the_last(offset, lane, seed):
    call = calls.make(spec_of("group"), B=2, T=17, S=19, device=lane, seed=seed)
    call = call.with_options(q_offset=offset)
    check(call, RUN[lane](call))


def test_heads_that_are_pooled_do_not_turn_yet():
    text = (
        SPEC.replace("WHOSE", "").replace("TURN", "pairs: halves").replace("SHARE", "share: group")
    )
    text = text.replace("QUERY", "block: 8, pool: mean, heads: mean, rotate: first")
    graph = passes.run(planner.plan(parse(text)))
    with pytest.raises(PlanError, match="level block: no kernel pools heads yet"):
        schedule.schedule(graph, H100)
