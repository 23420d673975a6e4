"""What a choice is worth: against figures by hand, brute force, and torch's attention."""

from pathlib import Path

import pytest
import torch

from hsgen import captures, metrics

CAPTURE = Path(__file__).parent / "data" / "smollm2_layer05.safetensors"
POSITION = torch.tensor([0, 5, 11])


@pytest.fixture(scope="module")
def group():
    (group,) = captures.load(CAPTURE)
    return group


@pytest.fixture
def uniform():
    """Twelve keys, three rows, two heads, every visible key as good as any other."""
    return metrics.dense(torch.zeros(3, 2, 4), torch.randn(12, 4), torch.randn(12, 8), POSITION)


def test_mass_of_uniform_attention_is_the_kept_share(uniform):
    chosen = torch.zeros(1, 3, 3, dtype=torch.bool)
    chosen[0, :, 1] = True  # tokens 4..7: none, two and four of them are visible
    found = metrics.judge(uniform, chosen, 4)
    torch.testing.assert_close(found.mass[1], torch.tensor([0.0, 2 / 6, 4 / 12]))
    assert found.kept[0].tolist() == [0, 2, 4]
    torch.testing.assert_close(found.o[0, 2], uniform.v[4:8].mean(0))


def test_everything_kept_is_dense_attention(uniform):
    found = metrics.judge(uniform, torch.ones(2, 3, 3, dtype=torch.bool), 4)
    torch.testing.assert_close(found.mass, torch.ones(2, 3))
    torch.testing.assert_close(found.error, torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_error_is_relative_to_the_dense_output():
    v = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    dense = metrics.dense(torch.zeros(1, 1, 4), torch.zeros(2, 4), v, torch.tensor([1]))
    chosen = torch.tensor([[[True, False]]])
    error = metrics.judge(dense, chosen, 1).error  # |(3, 0) - (1.5, 2)| / |(1.5, 2)|
    torch.testing.assert_close(error, torch.tensor([[1.0]]))


def test_dense_agrees_with_torch(group):
    q, k, v = (x[:70].float() for x in (group.q, group.k, group.v))
    found = metrics.dense(q[60:], k, v, torch.arange(60, 70)).o
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k, v, is_causal=True
    )
    torch.testing.assert_close(found, expected[:, 60:], atol=1e-5, rtol=1e-5)


def test_keep_best_is_limited_to_what_is_visible():
    scores = torch.tensor([[[1.0, 2.0, 9.0], [1.0, 2.0, 9.0]]])
    visible = torch.tensor([[True, True, False], [True, True, True]])
    kept = metrics.keep_best(scores, visible, torch.tensor([[2, 1]]))
    assert kept.tolist() == [[[True, True, False], [False, False, True]]]


@pytest.mark.parametrize(
    ("count", "kept"), [(1, {4}), (2, {0, 4}), (3, {0, 3, 4}), (9, {0, 1, 2, 3, 4})]
)
def test_recent_and_sink_blocks(count, kept):
    found = metrics.keep_recent(torch.tensor([19]), 4, 6, torch.tensor([[count]]))
    assert set(found[0, 0].nonzero().flatten().tolist()) == kept


def test_recent_and_sink_tokens():
    found = metrics.keep_recent(torch.tensor([99]), 1, 128, torch.tensor([[20]]))
    assert found[0, 0].nonzero().flatten().tolist() == [*range(16), *range(96, 100)]


def test_members_ignore_padding():
    found = metrics.members(torch.tensor([[[0, 2, -1]]], dtype=torch.int32), 4)
    assert found.tolist() == [[[True, False, True, False]]]


def test_choices_have_one_budget_and_the_oracle_is_best(group):
    position = torch.arange(300, 364)
    dense = metrics.dense(group.q[position], group.k[:400], group.v[:400], position)
    chosen = metrics.keep_recent(position, 16, 25, torch.full((3, 64), 5))
    ways = metrics.choices(dense, chosen, 16, torch.rand(64, 25))
    for way in ways.values():
        assert (way.sum(-1) == 5).all()
    mass = {name: metrics.judge(dense, way, 16).mass for name, way in ways.items()}
    for other in mass.values():
        assert (mass["oracle"] >= other - 1e-6).all()


def test_overlapping_entries_share_tokens():
    chosen = torch.tensor([True, False, True, False])
    tokens = metrics.tokens_of(chosen, 4, 2, 7)
    assert tokens.tolist() == [True, True, True, True, True, True, True]
    alone = metrics.tokens_of(torch.tensor([False, True, False, False]), 4, 2, 7)
    assert alone.nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_mass_of_overlapping_entries_counts_shared_tokens_twice():
    mass = metrics.entry_mass(torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.0]]]), 4, 2)
    torch.testing.assert_close(mass, torch.tensor([[[1.0, 0.7, 0.0]]]))


def test_without_causality_every_token_is_seen():
    full = metrics.dense(
        torch.zeros(3, 2, 4), torch.randn(12, 4), torch.randn(12, 8), POSITION, causal=False
    )
    torch.testing.assert_close(full.probs, torch.full((2, 3, 12), 1 / 12))
    chosen = torch.tensor([True, False, False, True, False, False]).expand(1, 3, 6)
    ways = metrics.choices(full, chosen, 2, torch.rand(3, 6))
    assert all((way.sum(-1) == 2).all() for way in ways.values())
    near = ways["recent_sink"][0].nonzero()[:, 1].unflatten(0, (3, 2)).tolist()
    assert near == [[0, 1], [0, 2], [0, 5]]
    torch.testing.assert_close(metrics.judge(full, chosen, 2).mass, torch.full((2, 3), 1 / 3))


def test_row_that_takes_nothing_has_no_mass(uniform):
    nothing = torch.zeros(1, 3, 3, dtype=torch.bool)
    ways = metrics.choices(uniform, nothing, 4, torch.rand(3, 3))
    assert not any(way.any() for way in ways.values())
    assert metrics.judge(uniform, nothing, 4).mass.tolist() == [[0.0] * 3] * 2


def test_overlap_is_both_over_either():
    a, b = torch.tensor([[[1, 1, 0, 0]]]).bool(), torch.tensor([[[0, 1, 1, 0]]]).bool()
    assert metrics.overlap(a, b).item() == pytest.approx(1 / 3)
    assert metrics.overlap(a, a).item() == 1
