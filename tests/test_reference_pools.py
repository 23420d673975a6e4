"""Pools of production models: hand-computed, and what their peers' users tripped over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hsgen.reference import reference, tensor_shapes
from hsgen.spec import Spec, parse

KPOOL = """
hsgen: 1
name: kpool
heads: {query: 2, kv: 1}
head_dim: 4
index: {heads: 2, dim: 4}
levels:
  - name: pool
    partition: {blocks: 4}
    pool: {keys: gated, softmax: channel, position: learned}
    score: {form: relu_weighted, scale: 0.5, share: all}
    select: {top_k: 2, force: {tail: true}}
attend:
  - {name: selected, over: pool, storage: latent}
"""

CSA = """
hsgen: 1
name: csa
heads: {query: 2, kv: 1}
head_dim: 4
index: {heads: 2, dim: 2}
levels:
  - name: index
    partition: {blocks: 4, stride: 2, before: 2}
    pool: {keys: gated, softmax: channel, series: 2}
    score: {form: relu_weighted, share: all}
  - name: entry
    partition: {blocks: 4, stride: 2, before: 2}
    kv: entry
    pool: {keys: gated, softmax: channel, series: 2}
    score: {from: index, map: max}
    select: {top_k: 2}
attend:
  - {name: selected, over: entry, values: pooled, storage: latent}
  - {name: window, window: 3, storage: latent}
combine: {softmax: union, sink: learned}
"""

DOT = """
hsgen: 1
name: dot
heads: {query: 1, kv: 1}
head_dim: 4
levels:
  - name: entry
    partition: {blocks: 2}
    pool: {keys: mean, POOL}
    score: {form: dot, scale: none}
    select: {top_k: 9, force: {last: 1}}
attend:
  - {name: selected, over: entry}
"""


def tensors(spec: Spec, T: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(spec, 1, T, T)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def zeros(spec: Spec, T: int) -> dict[str, Tensor]:
    shapes = tensor_shapes(spec, 1, T, T)
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def sets(indices: Tensor) -> list[set[int]]:
    return [{*row} - {-1} for row in indices.flatten(0, -2).tolist()]


def test_gates_weigh_each_channel_by_itself() -> None:
    """Gates log 3 and 0 in channel 0 make 3/4 and 1/4 there, and a half in all others."""
    spec = parse(KPOOL.replace("blocks: 4", "blocks: 2"))
    x = zeros(spec, 2)
    x["k_index"][0] = torch.tensor([[4.0, 4, 0, 0], [8, 8, 0, 0]])
    x["z_index"][0, 0, 0] = math.log(3) / 2
    x["pool_key_position"][0, 0, 0] = math.log(3) / 2  # the rest of it
    x["w_index"] += 1.0
    for channel, pooled in ((0, 3 / 4 * 4 + 1 / 4 * 8), (1, 6.0)):
        x["q_index"].zero_()
        x["q_index"][0, 1, 0, channel] = 1.0
        score = reference(spec, x).scores["pool"][0, 1, 0, 0].item()
        assert score == pytest.approx(pooled * 0.5)


def test_kpool_rows_keep_their_budget_and_the_tail() -> None:
    """Row 2 is its tail alone, where a peer's list begins with eight times -1."""
    spec = parse(KPOOL)
    result = reference(spec, tensors(spec, 21), keep_seen=True)
    counts = result.seen["selected"][0, :, 0].sum(-1).tolist()
    assert counts == [1, 2, 3, 4, 5, 6, 7, *[8, 9, 10, 11] * 4][:21]
    assert result.seen["selected"][0, 2, 0].tolist() == [True] * 3 + [False] * 18


def test_minus_one_in_the_middle_of_a_list_is_nothing() -> None:
    """A peer's kernel stops at the first -1; k-pool puts them before the tail."""
    spec = parse(KPOOL)
    x = tensors(spec, 21)
    own = reference(spec, x)
    indices = own.selection["pool"].indices
    holes = torch.stack((indices, torch.full_like(indices, -1)), -1).flatten(-2).flip(-1)
    again = reference(spec, x, selection={"pool": holes})
    torch.testing.assert_close(again.o, own.o)


def test_what_lies_before_a_document_moves_no_pool() -> None:
    """Left padding shifts a peer's blocks: here entries begin with their document."""
    spec = parse(KPOOL)
    x = {name: y[0] if name != "pool_key_position" else y for name, y in tensors(spec, 19).items()}
    packed = reference(spec, x, cu_seqlens_q=torch.tensor([0, 3, 19], dtype=torch.int32))
    alone = {n: y if n == "pool_key_position" else y[None, 3:] for n, y in x.items()}
    torch.testing.assert_close(packed.o[3:], reference(spec, alone).o[0])


def test_a_nan_key_takes_no_place_from_numbers() -> None:
    """A peer pins blocks whose score is NaN; here NaN comes after every number."""
    spec = parse(KPOOL)
    x = tensors(spec, 17)
    x["k_index"][0, 5] = math.nan
    rows = sets(reference(spec, x).selection["pool"].indices)
    assert all(1 not in row for row in rows[15:])


def test_the_first_entry_has_no_series_before_it() -> None:
    """Entry 0 of CSA: tokens 0 and 1 in their second series; entry 1: the first series of those too."""
    spec = parse(CSA)
    x = zeros(spec, 4)
    x["k_index"][0, :, 0, 0] = torch.tensor([1.0, 2, 4, 8])  # series a
    x["k_index"][0, :, 1, 0] = torch.tensor([16.0, 32, 64, 128])  # series b
    x["q_index"][0, 3, 0, 0] = x["w_index"][0, 3, 0] = 1.0
    scores = reference(spec, x).scores["entry"][0, 3, 0].tolist()
    assert scores == pytest.approx([(16 + 32) / 2, (1 + 2 + 64 + 128) / 4])


def test_a_window_closes_with_its_last_token() -> None:
    """Entry w may be chosen from row 2 w + 1 on; before, rows have their window alone."""
    spec = parse(CSA)
    rows = sets(reference(spec, tensors(spec, 9)).selection["entry"].indices)
    assert rows[:6] == [set(), {0}, {0}, {0, 1}, {0, 1}, rows[5]]
    assert all(len(row) == min((t + 1) // 2, 2) for t, row in enumerate(rows))


def test_csa_attends_by_one_softmax_with_a_sink() -> None:
    """By hand from the published rule: a token counts raw in the window and inside an entry."""
    spec = parse(CSA)
    x = tensors(spec, 9)
    result = reference(spec, x)
    for t in range(9):
        entries = []
        for w in sorted(sets(result.selection["entry"].indices)[t]):
            tokens = [(s, 0) for s in (2 * w - 2, 2 * w - 1) if s >= 0]
            tokens += [(2 * w, 1), (2 * w + 1, 1)]
            keys = torch.stack([x["k_entry"][0, s, 0, i] for s, i in tokens])
            gates = torch.stack([x["z_entry"][0, s, 0, i] for s, i in tokens])
            entries.append((keys * gates.softmax(0)).sum(0))
        keys = torch.stack([*entries, *x["k"][0, max(0, t - 2) : t + 1, 0]])
        logits = torch.cat((x["q"][0, t] @ keys.T / 2, x["sink"][:, None]), 1)
        torch.testing.assert_close(result.o[0, t], logits.softmax(-1)[:, :-1] @ keys)


def test_decode_row_of_csa_is_its_prefill_row() -> None:
    spec = parse(CSA)
    x = tensors(spec, 11)
    last = {name: y[:, -1:] if name in ("q", "q_index", "w_index") else y for name, y in x.items()}
    torch.testing.assert_close(reference(spec, last).o, reference(spec, x).o[:, -1:])


@pytest.mark.parametrize(
    ("rotate", "place"),
    [("{at: first, dims: 2, base: 100.0}", 2.0), ("{at: centre, dims: 2, base: 100.0}", 2.5)],
)
def test_a_pooled_key_is_turned_to_its_place(rotate: str, place: float) -> None:
    """Entry 1 of two tokens lies at 2, and its centre at 2.5; the last two channels stay."""
    spec = parse(DOT.replace("POOL", f"rotate: {rotate}"))
    x = zeros(spec, 4)
    x["k"][0, 2:, 0] = torch.tensor([1.0, 0, 5, 0])
    found = []
    for channel in range(4):
        x["q"].zero_()
        x["q"][0, 3, 0, channel] = 1.0
        found.append(reference(spec, x).scores["entry"][0, 3, 0, 1].item())
    assert found == pytest.approx([math.cos(place), math.sin(place), 5.0, 0.0])


def test_norm_comes_between_pool_and_rotation() -> None:
    """Mean (3, 4, 0, 0) has a mean square of 25 / 4."""
    spec = parse(DOT.replace("POOL", "then: norm"))
    x = zeros(spec, 2)
    x["k"][0, :, 0, :2] = torch.tensor([[2.0, 4], [4, 4]])
    x["entry_key_norm"] += torch.tensor([2.0, 1, 1, 1])
    x["q"][0, 1, 0, 0] = 1.0
    score = reference(spec, x).scores["entry"][0, 1, 0, 0].item()
    assert score == pytest.approx(2 * 3 / 2.5, rel=1e-6)
