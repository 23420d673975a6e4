"""Selections whose counts vary, and static patterns: small cases computed by hand, and refusals."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from plan_cases import SETS, random_tensors
from plan_cases import spec as make

import hsgen
from hsgen import passes, planner, schedule
from hsgen.analysis import causality, costs, laws, not_dense_because
from hsgen.errors import PlanError
from hsgen.reference import choose, masses, reference, share_of
from hsgen.selection import BitmapSelection, members
from hsgen.spec import Attend, Force, HeadSpan, Select, Static, TopP, load, parse
from hsgen.target import H100

NAN, INF = math.nan, math.inf
BY_NAME = {spec.name: spec for spec in SETS}


def kept(select, *rows, forced=(), complete=None):
    """Entries that each row keeps; entries of `forced` are forced in every row."""
    scores = torch.tensor(rows, dtype=torch.float64).unsqueeze(1)  # [T, 1, N]
    must = torch.zeros_like(scores, dtype=torch.bool)
    must[..., list(forced)] = True
    there = torch.ones_like(must) if complete is None else torch.zeros_like(must)
    if complete is not None:
        there[..., list(complete)] = True
    chosen = choose(select, scores.masked_fill(~there, -INF), there | must, must)
    sets = [[e for e, inside in enumerate(row[0]) if inside] for row in chosen.tolist()]
    return sets if len(rows) > 1 else sets[0]


def top_p(mass, *, force=None, **more):
    return Select(top_p=TopP(mass=mass, **more), force=force or Force())


ADDED = Force(first=1, counted=False)  # of `choose`, only `counted` matters here

# --- fraction


@pytest.mark.parametrize(
    ("part", "scores", "expected"),
    [
        (0.5, [3, 1, 2, 9], [0, 3]),
        (0.5, [3, 1, 2, 9, 0], [0, 2, 3]),  # 2.5 is rounded up
        (0.25, [7, 7, 7, 7], [0]),  # ties go to the lower position
        (0.5, [NAN, -5, NAN, -6], [1, 3]),  # NaN is last
        (0.000001, [1, 2], [1]),  # at least one, where there is one
        (1.0, [1, NAN, -INF], [0, 1, 2]),
    ],
)
def test_a_fraction_is_rounded_up(part, scores, expected):
    assert kept(Select(fraction=part), scores) == expected


def test_a_fraction_is_of_what_is_visible():
    assert kept(Select(fraction=0.5), [1, 9, 3, 8], complete=[0, 2]) == [2]
    assert kept(Select(fraction=0.5), [1, 9], complete=[]) == []


def test_forced_entries_count_in_a_fraction_or_come_on_top():
    counted, added = (Select(fraction=0.5, force=f) for f in (Force(first=1), ADDED))
    assert kept(counted, [0, 5, 7, 6], forced=[0]) == [0, 2]
    assert kept(added, [0, 5, 7, 6], forced=[0]) == [0, 2, 3]
    assert kept(counted, [0, 5, 7, 6], forced=[0, 1, 3]) == [0, 1, 3]  # more than the fraction


# --- threshold


def test_a_threshold_is_what_scores_must_exceed():
    assert kept(Select(threshold=0.25), [0.25, 0.5, NAN, -1, INF]) == [1, 4]
    assert kept(Select(threshold=-0.5), [0, -0.0, -0.5]) == [0, 1]
    assert kept(Select(threshold=0.25), [0.1, 0.2]) == []


def test_forced_entries_need_not_exceed_it():
    assert kept(Select(threshold=0.25), [0.1, 0.5, 0.0], forced=[2], complete=[0, 1]) == [1, 2]


# --- top_p


@pytest.mark.parametrize(
    ("mass", "keep", "drop"),
    [
        (0.25, [0], []),
        (0.5, [0], [0]),
        (0.6, [0, 1], [0]),
        (0.75, [0, 1], [0, 1]),
        (0.8, [0, 1, 2], [0, 1]),
        (1.0, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_top_p_keeps_or_drops_what_crosses(mass, keep, drop):
    """Reached exactly is not crossed; equal masses go to the lower position."""
    scores = [0.5, 0.25, 0.25]
    assert kept(top_p(mass), scores) == keep
    assert kept(top_p(mass, boundary="drop"), scores) == drop


def test_masses_are_summed_in_whole_numbers():
    """Ten tenths: three of them are three tenths, whatever a float would say; no order matters."""
    assert masses(torch.tensor(0.1, dtype=torch.float64)).item() == 107374182
    assert kept(top_p(0.3), [0.1] * 10) == [0, 1, 2]
    values = [0.5, 0.25, 0.1875, 0.0625]
    for order in permutations(range(4)):
        chosen = kept(top_p(0.7), [values[i] for i in order])
        assert sorted(order[e] for e in chosen) == [0, 1]


def test_masses_are_never_negative_and_never_nan():
    assert masses(torch.tensor([-1.0, NAN, -INF, 0.0, 2.0**-31, 3 * 2.0**-31])).tolist() == [
        *(0, 0, 0, 0),
        *(0, 2),  # halves go to the even one
    ]
    assert kept(top_p(0.5), [NAN, 0.5, -3.0]) == [1]


def test_no_mass_keeps_nothing_but_what_is_forced():
    assert kept(top_p(0.5), [0.0, 0.0]) == []
    assert kept(top_p(0.5, min=1), [0.0, 0.0]) == [0]
    assert kept(top_p(0.5), [0.0, 0.0], forced=[1]) == [1]
    assert kept(top_p(0.5), [0.3, 0.2], complete=[]) == []


def test_parts_of_large_totals_do_not_overflow():
    for whole in (0, 1, (1 << 30) - 1, 1 << 30, (1 << 56) + 12345):
        for part in (1e-6, 0.3, 0.9, 1.0):
            least = math.floor(part * (1 << 30)) * whole
            most = math.ceil(part * (1 << 30)) * whole
            got = share_of(part, torch.tensor(whole)).item()
            assert got == -(-least >> 30), (part, whole)
            assert share_of(part, torch.tensor(whole), up=False).item() == most >> 30


def test_parts_of_counts_are_those_of_arithmetic():
    """0.4 of 10 is 4, though 2^-30 divides no tenth: up and down, as with fractions."""
    for percent in range(1, 101):
        for whole in (1, 2, 3, 7, 10, 20, 25, 50, 64, 100, 999, 1000, 4096):
            exact = Fraction(percent, 100) * whole
            number = torch.tensor(whole)
            assert share_of(percent / 100, number).item() == math.ceil(exact)
            assert share_of(percent / 100, number, up=False).item() == math.floor(exact)


def test_forced_masses_count_or_do_not():
    scores = [0.1, 0.6, 0.3]
    assert kept(top_p(0.05), scores, forced=[0]) == [0]
    assert kept(top_p(0.5), scores, forced=[0]) == [0, 1]
    assert kept(top_p(0.05, force=ADDED), scores, forced=[0]) == [0, 1]
    assert kept(top_p(0.05, boundary="drop"), scores, forced=[0]) == [0]  # crosses, and is forced


def test_an_incomplete_forced_entry_weighs_nothing():
    assert kept(top_p(0.5), [0.6, 0.3, 9.0], forced=[2], complete=[0, 1]) == [0, 2]
    uncounted = top_p(0.5, force=ADDED, min=2)
    assert kept(uncounted, [0.6, 0.3, 9.0], forced=[2], complete=[0, 1]) == [0, 1, 2]


def test_least_and_most_entries():
    scores = [0.7, 0.1, 0.2]
    assert kept(top_p(0.5, min=2), scores) == [0, 2]
    assert kept(top_p(1.0, max=2), scores) == [0, 2]
    assert kept(top_p(0.5, boundary="drop", min=1), scores) == [0]


def test_rows_of_a_head_are_ranked_together():
    rows = ([0.9, 0.1], [0.5, 0.5])
    assert kept(top_p(0.4), *rows) == [[0], [0]]
    assert kept(top_p(0.45, scope="head"), *rows) == [[0], []]  # 0.9 of 2
    assert kept(top_p(0.5, scope="head"), *rows) == [[0], [0]]
    assert kept(top_p(0.45, scope="head", min=1), *rows) == [[0], [0]]
    assert kept(top_p(0.75, scope="head"), *rows) == [[0], [0, 1]]
    assert kept(top_p(0.75, scope="head", max=1), *rows) == [[0], [0]]
    assert kept(top_p(0.2, scope="head"), [0.5, 0.5], [0.5, 0.5]) == [[0], []]  # the earlier row


# --- through the reference


@pytest.mark.parametrize("name", ["fraction", "threshold", "top_p", "top_p_head"])
def test_rows_before_the_first_key_are_empty(name):
    spec = BY_NAME[name]
    result = reference(spec, random_tensors(spec, 9, 5))
    assert not result.o[:, :4].any() and (result.lse["selected"][..., :4] == -INF).all()
    assert result.o.isfinite().all()
    assert not members(result.selection["block"], 2)[:, :4].any()


@pytest.mark.parametrize("name", ["fraction_added", "threshold", "top_p", "top_p_head"])
def test_bitmaps_of_documents_are_those_of_each_alone(name):
    spec = BY_NAME[name]
    together = random_tensors(spec, 30, 30)
    ends = [0, 7, 7, 30]
    packed = reference(
        spec, {n: x[0] for n, x in together.items()}, cu_seqlens_q=torch.tensor(ends)
    )
    chosen = packed.selection["block"]
    assert isinstance(chosen, BitmapSelection)
    for start, end in zip(ends, ends[1:], strict=False):
        alone = reference(spec, {n: x[:, start:end] for n, x in together.items()})
        expected = members(alone.selection["block"], chosen.entries)[0]
        assert torch.equal(members(chosen, chosen.entries)[start:end], expected)
        torch.testing.assert_close(packed.o[start:end], alone.o[0])


def test_a_bitmap_given_back_changes_nothing():
    spec = BY_NAME["top_p_shared"]
    x = random_tensors(spec, 21, 21, batch=2)
    first = reference(spec, x)
    again = reference(spec, x, selection=first.selection)
    assert torch.equal(first.o, again.o)
    assert torch.equal(first.selection["block"].indices, again.selection["block"].indices)


# --- patterns


def seen(static, position, head=0, *, S=None, causal=True, heads=4):
    """Tokens that one row attends to."""
    S = S or position + 1
    spec = make("pattern", [], [Attend(name="s", static=static)], causal=causal)
    x = random_tensors(spec, 1, S)
    x["v"] = torch.zeros_like(x["v"])
    found = []
    for s in range(S):
        x["v"][:] = 0
        x["v"][:, s] = 1
        if reference(spec, x, q_offset=position).o[0, 0, head].any():
            found.append(s)
    assert spec.heads is not None and spec.heads.query == heads
    return found


@pytest.mark.parametrize(("head", "strided"), [(0, [3, 7]), (1, [2, 6]), (2, [1, 5]), (3, [0, 4])])
def test_heads_take_turns_in_a_strided_pattern(head, strided):
    assert seen(Static(window=2, stride=4, shift=1), 9, head) == [*strided, 8, 9]
    assert seen(Static(window=2, stride=4), 9, head) == [3, 7, 8, 9]


def test_powers_of_two_are_distances_of_units():
    static = Static(blocks=2, window=1, sink=1, power_of_two=True)
    units = [0, 2, 6, 8, 9, 10]  # the sink, then 8, 4, 2, 1 and 0 away from unit 10
    assert seen(static, 21) == [token for unit in units for token in (2 * unit, 2 * unit + 1)]
    assert seen(static, 20)[-2:] == [19, 20]  # the own unit up to the token itself


def test_a_dilated_window_takes_every_fourth_token():
    assert seen(Static(window=3, dilation=4), 9) == [1, 5, 9]
    assert seen(Static(window=2, dilation=3), 4, S=9, causal=False) == [1, 4, 7]


@pytest.mark.parametrize(("head", "window"), [(0, 2), (1, 6), (2, 2), (3, 6)])
def test_windows_of_heads_grow_with_the_sequence(head, window):
    spans = (HeadSpan(window=2), HeadSpan(window=2, grow=0.5))  # 2 + 0.5 * (10 - 2)
    assert seen(Static(per_head=spans), 9, head) == list(range(10 - window, 10))


def test_a_sink_of_a_head_is_its_own():
    spans = (HeadSpan(window=1), HeadSpan(window=1, sink=2))
    assert seen(Static(per_head=spans), 9, 0) == [9]
    assert seen(Static(per_head=spans), 9, 1) == [0, 1, 9]


def test_heads_of_s2_attention_cover_everything_together():
    static = load("s2_attention").attend[0].static
    assert static is not None and static.stride is not None
    met = {
        n
        for h in range(static.stride)
        for n in range(64)
        if (n + 1 + h * static.shift) % static.stride == 0
    }
    assert met == set(range(64))


# --- what the graph says of them


@pytest.mark.parametrize("spec", SETS, ids=lambda spec: spec.name)
def test_causality_and_laws(spec):
    graph = planner.plan(spec)
    loose = "prompt" if spec.name in {"top_p_head", "top_p_head_added", "spans"} else "token"
    near = {
        "near_strided": "prompt",
        "near_causal": "prompt",
    }  # causal along an axis, or cut at its end
    assert causality(graph) == near.get(spec.name, loose if spec.causal else "none")
    assert laws(graph).decode_equals_prefill_row == (causality(graph) == "token")
    dense = laws(graph).dense_when_all_selected
    assert dense == (
        spec.name.startswith(("top_p_not", "all_tokens", "dma_not")) or "last=" in _forces(spec)
    )
    assert (not_dense_because(graph) is None) == dense
    assert all(cost.flops.evaluate(100) >= 0 for cost in costs(graph).values())


def _forces(spec):
    """Where the own block is always reached, and there is one softmax."""
    alike = spec.combine is None and not any(branch.bias for branch in spec.attend)
    selects = [x.select for x in spec.levels if x.select] if alike else []
    return "".join(f"last={x.force.last}" for x in selects if x.force.last)


@pytest.mark.parametrize("name", ["top_p", "top_p_drop", "fraction", "threshold", "sharded"])
def test_later_tokens_never_change_a_row_where_the_graph_says_so(name):
    _check_future(BY_NAME[name], same=True)


@pytest.mark.parametrize("name", ["top_p_head", "spans"])
def test_later_tokens_change_rows_where_the_graph_says_prompt(name):
    _check_future(BY_NAME[name], same=False)


def _check_future(spec, *, same):
    x = random_tensors(spec, 40, 40)
    whole = reference(spec, x).o[:, :23]
    start = reference(spec, {n: t[:, :23] for n, t in x.items()}).o
    assert torch.allclose(whole, start) == same


# --- what no kernel does

TEXT = """\
hsgen: 1
name: varying
heads: {query: 4, kv: 2}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot, normalise: softmax}
    select: {RULE, force: {last: 1}}
attend:
  - {name: selected, over: block}
"""


@pytest.mark.parametrize(
    "rule", ["fraction: 0.25", "threshold: 0.005", "top_p: {mass: 0.9, boundary: drop}"]
)
def test_rules_without_a_kernel_are_refused_where_they_are_written(rule):
    spec = parse(TEXT.replace("RULE", rule), "mine.yaml")
    word = rule.partition(":")[0]
    with pytest.raises(PlanError, match=f"level block: no kernel selects by {word} yet") as caught:
        schedule.schedule(passes.run(planner.plan(spec)), H100)
    assert str(caught.value.span) == "mine.yaml:10:5"
    with pytest.raises(PlanError, match=word):
        hsgen.load_kernel(spec)
