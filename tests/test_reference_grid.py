"""Tokens along axes: windows of neighbours, regions, and buckets that choose their tokens."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import near, random_tensors
from plan_cases import spec as make

from hsgen import passes
from hsgen.analysis import causality
from hsgen.errors import ArgumentError
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.spec import Attend, GridWindow, Spec, Static


def seen(spec: Spec, S: int) -> list[set[int]]:
    """Which tokens each row attends to: those whose value reaches it."""
    x = random_tensors(spec, S, S)
    x["v"] = torch.eye(S, dtype=torch.float64).reshape(1, S, 1, S).expand(1, S, 2, S)
    x["q"] = torch.zeros_like(x["q"])  # every key that is seen gets one weight
    o = reference(spec, x).o[0, :, 0]
    return [{s for s in range(S) if row[s] > 0} for row in o]


def line(window: int, n: int, **more: int | bool) -> list[list[int]]:
    """What the rows of one axis see."""
    lists = {key: (value,) for key, value in more.items()}
    spec = make("line", [], [near((window,), **lists)], causal=False, axes=(n,))
    return [sorted(row) for row in seen(spec, n)]


def test_a_window_is_moved_inside_at_a_border_and_keeps_its_length() -> None:
    """By hand: w = 3 reaches one back and one on; at the ends it stays three long."""
    assert line(3, 5) == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]


def test_an_even_window_reaches_further_back() -> None:
    assert line(4, 6) == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
        [2, 3, 4, 5],
    ]


def test_rows_of_a_stride_have_the_window_of_their_leader() -> None:
    """Leaders of rows 0-1, 2-3, 4-5, 6 are 1, 3, 5 and, cut short by the end, 6."""
    two, five = [0, 1, 2, 3], [4, 5, 6]
    assert line(3, 7, stride=2) == [
        *[two[:3]] * 2,
        *[[2, 3, 4]] * 2,
        *[five] * 2,
        five,
    ]


def test_a_stride_as_long_as_the_window_is_blocked_attention() -> None:
    assert line(3, 6, stride=3) == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3


def test_a_causal_axis_ends_at_the_row_and_is_cut_short_not_moved() -> None:
    """The leader of a causal stride is its last row: windows begin at leader - w + 1."""
    assert line(3, 5, causal=True) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert line(3, 6, stride=2, causal=True) == [[0], [0, 1], [1, 2], [1, 2, 3], [3, 4], [3, 4, 5]]


def test_a_dilated_window_stays_in_its_residue_class() -> None:
    """n = 7, dilation 2: the even class has 4 steps, the odd one 3, each with borders of its own."""
    odd = [1, 3, 5]
    assert line(3, 7, dilation=2) == [[0, 2, 4], odd, [0, 2, 4], odd, [2, 4, 6], odd, [2, 4, 6]]


def rule_of_the_card(i, n, w, s, d, causal):
    """The published rule, word for word: leader, start with the border's correction, keys."""
    r, at = i % d, i // d
    size = len(range(r, n, d))
    left, right = w // 2, w // 2 + (w % 2) - 1
    if causal:
        leader = min((at // s) * s + s - 1, size - 1)
        keys = range(max(leader - left - right, 0), at + 1)
    else:
        leader = min((at // s) * s + s // 2, size - 1)
        start = max(leader - left, 0)
        start += (size - right - leader - 1) if leader + right >= size else 0
        keys = range(start, start + w)
    return {r + key * d for key in keys}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_every_window_and_stride_is_as_published(dilation: int, causal: bool) -> None:
    for n in (6, 7, 11):
        for window in range(1, n // dilation + 1):
            for stride in range(1, window + 1):
                ours = line(window, n, stride=stride, dilation=dilation, causal=causal)
                theirs = [
                    sorted(rule_of_the_card(i, n, window, stride, dilation, causal))
                    for i in range(n)
                ]
                assert ours == theirs, (n, window, stride)


def test_axes_are_independent_and_the_last_one_is_fastest() -> None:
    """3 x 4, window 1 x 3: a row sees its own line only."""
    spec = make("grid", [], [near((1, 3))], causal=False, axes=(3, 4))
    for t, row in enumerate(seen(spec, 12)):
        y, x = divmod(t, 4)
        start = min(max(x - 1, 0), 1)
        assert row == {4 * y + start + j for j in range(3)}


def test_three_axes_with_everything_at_once() -> None:
    axes, window, stride, dilation, causal = (4, 5, 6), (2, 3, 2), (2, 1, 2), (1, 1, 3), (1, 0, 0)
    spec = make(
        "video",
        [],
        [near(window, stride=stride, dilation=dilation, causal=tuple(map(bool, causal)))],
        causal=False,
        axes=axes,
    )
    for t, row in enumerate(seen(spec, 120)):
        at = (t // 30, t // 6 % 5, t % 6)
        sides = [
            rule_of_the_card(*each)
            for each in zip(at, axes, window, stride, dilation, causal, strict=True)
        ]
        assert row == {(z * 5 + y) * 6 + x for z in sides[0] for y in sides[1] for x in sides[2]}


def test_an_open_axis_is_as_long_as_the_tokens_need() -> None:
    """11 tokens along [any, 4] have 3 lines, the last of 3 tokens; what is not there is not seen."""
    spec = make("open", [], [near((3, 2))], causal=False, axes=("any", 4))
    rows = seen(spec, 11)
    assert rows[7] == {2, 3, 6, 7, 10}  # and not 11, which no token is


def test_axes_that_do_not_fit_are_errors() -> None:
    spec = make("fixed", [], [near((2, 2))], causal=False, axes=(2, 3))
    with pytest.raises(ArgumentError, match="at most 6 tokens"):
        reference(spec, random_tensors(spec, 7, 7))
    unbound = make("unbound", [], [near((2, 2))], causal=False, axes=("any", "any"))
    with pytest.raises(ArgumentError, match="all but the first"):
        reference(unbound, random_tensors(unbound, 7, 7))
    assert unbound.bind(axes=(2, 4)).axes == (2, 4)
    with pytest.raises(ArgumentError, match=r"expected \[2, 3\] as the spec 'fixed' says"):
        spec.bind(axes=(2, 4))


@pytest.mark.parametrize(
    ("causal", "axes", "stride", "by_token", "expected"),
    [
        (False, (4, 4), 1, (False, False), "none"),
        (False, (4, 4), 1, (True, False), "query_block"),
        (False, (4, 4), 1, (False, True), "none"),
        (False, (4, 4), 2, (True, True), "token"),
        (False, ("any", 4), 1, (True, True), "token"),
        (False, ("any", 4), 2, (True, True), "prompt"),  # the end of an open axis moves its leader
        (True, (4, 4), 2, (False, False), "token"),
        (True, ("any", 4), 1, (False, False), "prompt"),
    ],
)
def test_causality_is_read_off_the_axes(causal, axes, stride, by_token, expected) -> None:
    branch = near((2, 2), stride=(stride, 1), causal=by_token)
    graph = passes.run(plan(make("window", [], [branch], causal=causal, axes=axes)))
    assert causality(graph) == expected


def test_causality_token_means_that_later_tokens_change_nothing() -> None:
    spec = make("past", [], [near((3, 2), stride=(2, 2), causal=(True, True))], axes=(5, 4))
    spec = spec.model_copy(update={"causal": False})
    x = random_tensors(spec, 20, 20)
    before = reference(spec, x).o
    for name in ("k", "v"):
        x[name] = torch.cat((x[name][:, :9], torch.full_like(x[name][:, 9:], 1e3)), 1)
    assert torch.equal(reference(spec, x).o[:, :9], before[:, :9])


def test_windows_that_see_everything_are_dense_attention() -> None:
    spec = make("all", [], [near((4, 5))], causal=False, axes=(4, 5))
    dense = make("dense", [], [Attend(name="near", window="all")], causal=False)
    x = random_tensors(spec, 20, 20)
    torch.testing.assert_close(reference(spec, x).o, reference(dense, x).o)


def test_documents_have_axes_of_their_own() -> None:
    """Packed documents equal the same ones one by one."""
    spec = make("packed", [], [near((2, 3))], causal=False, axes=("any", 4))
    x = random_tensors(spec, 24, 24)
    ends = torch.tensor([0, 10, 11, 24])
    packed = reference(spec, {name: y[0] for name, y in x.items()}, cu_seqlens_q=ends).o
    for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        alone = reference(spec, {name: y[:, a:b] for name, y in x.items()}).o[0]
        torch.testing.assert_close(packed[a:b], alone)


def test_windows_beside_other_rules_are_a_union() -> None:
    static = Static(sink=2, grid=GridWindow(window=(1, 1)))
    spec = make("sink", [], [Attend(name="s", static=static)], causal=False, axes=("any", 3))
    assert seen(spec, 7) == [{0, 1, t} for t in range(7)]


def test_gradients_are_finite_where_a_window_is_short() -> None:
    spec = make("grads", [], [near((3, 3), causal=(True, True))], causal=False, axes=("any", 5))
    x = {name: y.requires_grad_() for name, y in random_tensors(spec, 13, 13).items()}
    reference(spec, x).o.sum().backward()
    assert all(y.grad is not None and math.isfinite(y.grad.abs().sum()) for y in x.values())
