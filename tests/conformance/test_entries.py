"""Pooled entries that each row chose, early and of several series; an index in groups, pooled and rounded."""

import pytest
import torch

from conformance import backends, calls
from conformance.oracles import check
from conformance.test_latent import LANES
from hsgen import backward, passes, planner, schedule
from hsgen.errors import PlanError
from hsgen.plan import Cached
from hsgen.schedule import selected
from hsgen.spec import parse
from hsgen.target import H100

RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
HEAD = """
hsgen: 1
name: entries
heads: {query: 6, kv: 2}
head_dim: {qk: 48, v: 32}
causal: CAUSAL
"""
EARLY = "partition: {blocks: 6, stride: 2, before: 4}"
SERIES = "pool: {keys: gated, softmax: channel, position: learned, series: 3}"
SMALL = """
levels:
  - name: region
    partition: {blocks: 5}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 3, force: {last: 1}}
attend: [{name: selected, over: region, sink: learned}]
"""
# of which entries attention is, and what chooses them
CHOSEN = {
    "early series": f"""
levels:
  - name: entry
    {EARLY}
    kv: entry
    {SERIES}
    score: {{form: dot, share: group, reduce: max}}
    select: {{top_k: 4, force: {{first: 1, last: 1}}}}
attend:
  - {{name: selected, over: entry, values: pooled, storage: latent}}
  - {{name: window, window: 5, storage: latent}}
combine: {{softmax: union, sink: learned}}
""",
    "gates of tokens, turned in the middle": """
levels:
  - name: entry
    partition: {blocks: 7, stride: 4, before: 2}
    pool: {keys: gated, softmax: token, then: norm, rotate: {at: centre, dims: 16, base: 100.0}}
    score: {form: dot}
    select: {top_k: 3}
attend: [{name: selected, over: entry, values: pooled, storage: latent, softcap: 5.0}]
""",
    "keys and values": """
levels:
  - name: entry
    partition: {blocks: 4}
    pool: {keys: mean, values: mean}
    score: {form: dot, share: all, reduce: sum}
    select: {top_k: 3, force: {last: 1, counted: false}}
attend: [{name: selected, over: entry, values: pooled, sink: learned}]
""",
}
GROUPS = """
index: {heads: 4, dim: 32, dtype: DTYPE, keys: shared}
levels:
  - name: region
    partition: {blocks: 4}
    pool: POOL
    score: {form: relu_weighted, share: group}
    select: {top_k: 3, force: {last: 1, counted: false}}
attend: [{name: selected, over: region}]
"""


def spec_of(way, *, causal=True, **words):
    text = HEAD.replace("CAUSAL", str(causal).lower()) + CHOSEN.get(way, GROUPS)
    for word, value in words.items():
        text = text.replace(word.upper(), value)
    return parse(text)


@pytest.mark.parametrize(
    ("way", "lane"),
    [
        pytest.param(way, *lane.values, id=f"{way}-{lane.id}", marks=[*lane.marks, *more])
        for way in CHOSEN
        for lane in LANES
        for more in [[] if lane.marks or way == "early series" else [pytest.mark.full]]
    ],
)
def test_chosen_entries_are_attended(way, lane, seed):
    """In one dtype rows that are fewer than keys, in another documents, one of no row and one of one."""
    call = calls.make(spec_of(way), B=2, T=19, S=31, device=lane, seed=seed)
    check(call, RUN[lane](call))
    documents = {"key_lengths": [12, 3, 1, 21], "dtype": torch.float16, "device": lane}
    packed, _ = calls.pack(spec_of(way), [11, 0, 1, 17], seed=seed, **documents)
    check(packed, RUN[lane](packed))


@pytest.mark.parametrize("lane", LANES)
def test_all_rows_may_have_entries_where_nothing_is_causal(lane, seed):
    call = calls.make(spec_of("early series", causal=False), T=9, S=23, device=lane, seed=seed)
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_what_a_row_cannot_see_is_ignored_in_a_list(lane, seed):
    """Entries that are not complete, none, twice the same, in any order."""
    call = calls.make(spec_of("early series"), T=21, device=lane, seed=seed)
    drawn = torch.randint(-1, 10, (1, 21, 2, 4), generator=torch.Generator().manual_seed(seed))
    given = call.with_options(selection={"entry": drawn.to(torch.int32).to(lane)})
    check(given, RUN[lane](given))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("dtype", "pool"),
    [
        ("fp8_unscaled", "{keys: gated, softmax: channel}"),
        pytest.param("fp8_unscaled", "{keys: max}", marks=pytest.mark.full),
    ],
)
def test_entries_are_rounded_where_they_are_pooled(dtype, pool, lane, seed):
    """Scores of either half of an index's heads choose for a key head; a last entry may be short."""
    call = calls.make(spec_of("", dtype=dtype, pool=pool), T=29, device=lane, seed=seed)
    check(call, RUN[lane](call))
    other = spec_of("", dtype=dtype, pool=pool, causal=False)
    some = {"key_lengths": [9, 18], "dtype": torch.float16, "device": lane, "seed": seed}
    packed, _ = calls.pack(other, [7, 15], **some)
    check(packed, RUN[lane](packed))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.full)])
def test_tokens_of_small_blocks_are_gathered(causal, lane, seed, monkeypatch):
    """As where keys come in a stream; no window has any of them."""
    monkeypatch.setattr(selected, "picks", lambda *_: True)
    spec = parse(HEAD.replace("CAUSAL", str(causal).lower()).replace("entries", "small") + SMALL)
    lengths = {"key_lengths": [9, 18], "dtype": torch.float16, "device": lane, "seed": seed}
    call, _ = calls.pack(spec, [7, 15], **lengths)
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_long_rows_take_what_is_forced_on_top(lane, seed):
    """Of keys above an estimate, and where too many or too few are: many scores are 0, all alike."""
    call = calls.make(spec_of("", dtype="fp8_unscaled", pool="{keys: max}"), T=283, device=lane)
    few = call.with_tensors(w_index=call.tensors["w_index"].clamp(min=0)).rows(263, 283)
    for case in (few, few.with_tensors(w_index=few.tensors["w_index"] * 0)):
        check(case, RUN[lane](case, forced={"rank_region": {"BLOCK_N": 64}}))


REFUSED = {
    "no kernel pools by mean entries that begin before their place yet": (
        "early series",
        {"keys: gated, softmax: channel, position: learned, series: 3": "keys: mean"},
    ),
    "no kernel attends tokens of entries that begin before their place yet": (
        "early series",
        {
            ", values: pooled": "",
            ", storage: latent": "",
            "    kv: entry\n": "",
            ", series: 3": "",
        },
    ),
    "no kernel rounds pooled keys to fp8, with a scale for each yet": (
        "",
        {"DTYPE": "fp8", "POOL": "{keys: mean}"},
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_kernel_reaches_has_a_name(words):
    way, changes = REFUSED[words]
    text = HEAD.replace("CAUSAL", "true") + CHOSEN.get(way, GROUPS)
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    with pytest.raises(PlanError, match=words):
        schedule.schedule(passes.run(planner.plan(parse(text))), H100)


def test_phases_that_kernels_do_not_reach_have_a_name():
    graph = passes.run(planner.plan(spec_of("gates of tokens, turned in the middle")))
    with pytest.raises(
        PlanError, match="gradient of latents of which heads chose tokens apart yet"
    ):
        backward.plan(graph, H100)
    graph = passes.run(planner.plan(spec_of("", dtype="fp8_unscaled", pool="{keys: mean}")))
    with pytest.raises(PlanError, match="no cache keeps keys rounded to fp8_unscaled yet"):
        schedule.schedule(graph, H100, cached=Cached(rows="few"))
