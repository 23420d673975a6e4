"""Rows that choose together: by hand, by loops written from the papers, and the laws that they keep."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import MEAN, SELECTED, TOGETHER, blocks, random_tensors, together, top, xattention
from plan_cases import spec as make

from hsgen.analysis import causality, causality_text, costs, laws, not_dense_because, query_block
from hsgen.errors import PlanError
from hsgen.planner import plan
from hsgen.reference import reference, sequence
from hsgen.reference.queries import groups_of
from hsgen.reference.queries import together as groups
from hsgen.schedule import schedule
from hsgen.selection import members
from hsgen.spec import (
    Attend,
    Force,
    HeadDim,
    Heads,
    Level,
    Pool,
    Query,
    Score,
    Select,
    Spec,
    Tokens,
    TopP,
)
from hsgen.target import Target

NAMES = [case.name for case in TOGETHER]
CAUSAL = [case for case in TOGETHER if case.causal]


def chosen(spec: Spec, tensors: dict, level: str = "block", **more) -> torch.Tensor:
    """bool[T, Hs, N] of the first sequence."""
    selection = reference(spec, tensors, **more).selection[level]
    N = -(-tensors["k"].shape[1] // spec.level(level).partition.stride)
    return members(selection, N)[0]


# --- by hand


def test_rows_belong_to_blocks_at_absolute_positions() -> None:
    found = groups(Query(block=4, pool="mean"), torch.arange(6, 13))
    assert found.row.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert (found.first.tolist(), found.last.tolist()) == ([4, 8, 12], [7, 11, 15])
    assert found.members.tolist() == [[-1, -1, 0, 1], [2, 3, 4, 5], [6, -1, -1, -1]]


def test_the_last_rows_stand_for_all() -> None:
    found = groups(Query(last=3, pool="mean"), torch.arange(5))
    assert (found.row.tolist(), found.members.tolist()) == ([0] * 5, [[2, 3, 4]])
    assert groups(Query(last=9, pool="mean"), torch.arange(2)).members.tolist() == [[0, 1]]


def test_blocks_of_blocks_are_asked_once_each() -> None:
    p = torch.arange(11)
    fine, coarse = groups(Query(block=2), p), groups(Query(block=8), p)
    assert groups_of(fine, coarse).tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]]


def one_channel(q: list[float], k: list[float]) -> dict[str, torch.Tensor]:
    """One head of one channel; values are one-hot, so that outputs are weights."""
    values = torch.eye(len(k), dtype=torch.float64)[None, :, None]
    return {
        "q": torch.tensor(q, dtype=torch.float64).view(1, -1, 1, 1),
        "k": torch.tensor(k, dtype=torch.float64).view(1, -1, 1, 1),
        "v": values,
    }


def one_head(levels: list[Level], attend: list[Attend], S: int, **more) -> Spec:
    dims = {"heads": Heads(query=1, kv=1), "head_dim": HeadDim(qk=1, v=S)}
    return make("tiny", levels, attend, **dims, **more)


def test_a_block_may_choose_all_that_begins_by_its_last_row_and_attends_token_by_token() -> None:
    """Queries 0..3 choose together among key blocks 01 and 23; the mean query is 1, block 23 wins.

    Rows 0 and 1 see none of its tokens: they are empty.  Row 2 sees token 2 only.
    """
    level = Level(
        name="block",
        partition=blocks(2),
        pool=MEAN,
        query=Query(block=4, pool="mean"),
        score=Score(form="dot", scale="none"),
        select=Select(top_k=1),
    )
    spec = one_head([level], [SELECTED], 4)
    result = reference(spec, one_channel([4, 0, 0, 0], [1, 1, 2, 2]))
    assert result.selection["block"].indices.flatten().tolist() == [1, 1, 1, 1]
    assert result.scores["block"][0, 0, 0].tolist() == [1.0, 2.0]
    o = result.o[0, :, 0]
    assert o[:2].eq(0).all() and result.lse["selected"][0, 0, :2].eq(-math.inf).all()
    assert torch.equal(o[2], torch.tensor([0.0, 0, 1, 0], dtype=torch.float64))
    assert torch.equal(o[3], torch.tensor([0.0, 0, 0.5, 0.5], dtype=torch.float64))


def test_the_own_entries_of_every_row_are_forced() -> None:
    """Blocks of 8 rows over key blocks of 2: `last: 1` forces the own block of each row, four of them."""
    level = together(
        Query(block=8, pool="mean"), 2, select=Select(top_k=1, force=Force(last=1, counted=False))
    )
    spec = make("own", level, [SELECTED])
    assert (spec.most_forced(level[0]), spec.width(level[0])) == (4, 5)
    took = chosen(spec, random_tensors(spec, 16, 16))
    assert took[8:, :, 4:8].all()
    assert (took.sum(-1)[8:] == 5).all()


def test_a_short_last_block_counts_with_the_tokens_that_it_has() -> None:
    """Five keys in blocks of 4: block 1 is token 4 alone."""
    spec = one_head(
        [
            Level(
                name="block",
                partition=blocks(4),
                pool=MEAN,
                query=Query(block=8, pool="mean"),
                score=Score(form="dot", scale="none"),
                select=Select(top_k=1),
            )
        ],
        [SELECTED],
        5,
    )
    result = reference(spec, one_channel([1] * 5, [1, 1, 1, 1, 7]))
    assert result.scores["block"][0, 0, 0].tolist() == [1.0, 7.0]


def test_antidiagonal_is_the_mean_of_the_logits_on_the_antidiagonal() -> None:
    """Stride 2: (q1 k0 + q0 k1) / 2."""
    levels = [
        Level(
            name="strided",
            partition=blocks(2),
            pool=Pool(keys="antidiagonal"),
            query=Query(block=2, pool="antidiagonal"),
            score=Score(form="dot", scale="none"),
            select=Select(top_k=1, force=Force(last=1)),
        )
    ]
    spec = one_head(levels, [Attend(name="selected", over="strided")], 4)
    result = reference(spec, one_channel([1, 2, 3, 4], [10, 20, 30, 40]))
    scores = result.scores["strided"][0, :, 0]
    assert scores[2].tolist() == [(4 * 10 + 3 * 20) / 2, (4 * 30 + 3 * 40) / 2]
    assert scores[0].tolist() == [(2 * 10 + 1 * 20) / 2, -math.inf]


# --- XAttention (arXiv:2503.16428), in loops from its description


def xattention_masses(q: torch.Tensor, k: torch.Tensor, stride: int, rows: int, cols: int):
    """[T, H, D], [S, H, D] -> [H, row blocks, key blocks]; T = S, all multiples."""
    T, H, D = q.shape
    n = T // stride
    logits = torch.full((H, n, n), -math.inf, dtype=q.dtype)
    for h in range(H):
        for i in range(n):
            for j in range(i + 1):
                total = sum(
                    q[i * stride + stride - 1 - s, h] @ k[j * stride + s, h] for s in range(stride)
                )
                logits[h, i, j] = total / (math.sqrt(D) * stride)
    a = logits.softmax(-1)
    a = a.unflatten(1, (-1, rows // stride)).sum(2)
    return a.unflatten(2, (-1, cols // stride)).sum(3)


def test_xattention_is_the_papers() -> None:
    spec = make("x", xattention(), [SELECTED], kv=4)
    tensors = random_tensors(spec, 32, 32)
    result = reference(spec, tensors)
    want = xattention_masses(tensors["q"][0], tensors["k"][0], 2, 8, 4)
    took = chosen(spec, tensors)
    for h in range(4):
        for m in range(4):
            mass = want[h, m]
            seen = range(0, (m + 1) * 2)
            got = result.scores["block"][0, m * 8, h]
            torch.testing.assert_close(got[: len(seen)], mass[: len(seen)])
            first = [e for e in seen if e == 0 or e >= 2 * m]  # the sink is a column, the own ones
            rest = sorted((e for e in seen if e not in first), key=lambda e: -mass[e])
            kept, sums = [], 0.0
            for e in [*first, *rest]:
                if sums < 0.6 * mass.sum() or e in first:
                    kept.append(e)
                sums += float(mass[e])
            assert took[m * 8 + 3, h].nonzero().flatten().tolist() == sorted(kept)


def test_the_sink_of_xattention_is_a_column_not_a_row() -> None:
    """Peer bug: `keep_sink` there forces row 0 of the block mask, not key block 0."""
    spec = make("x", xattention(), [SELECTED])
    tensors = random_tensors(spec, 64, 64)
    tensors["k"][:, :4] = -9 * tensors["q"].mean((1, 2), keepdim=True)[..., :6]  # nobody wants it
    assert chosen(spec, tensors)[:, :, 0].all()


def test_any_group_size_needs_no_repeated_keys() -> None:
    """Peer bug: XAttention asserts as many key heads as query heads, and one sequence."""
    spec = make("x", xattention(), [SELECTED], kv=2)
    wide = make("x", xattention(), [SELECTED], kv=4)
    tensors = random_tensors(spec, 24, 24, batch=2)
    repeated = {n: t if n == "q" else t.repeat_interleave(2, 2) for n, t in tensors.items()}
    one, other = reference(spec, tensors), reference(wide, repeated)
    torch.testing.assert_close(one.o, other.o)


# --- laws


@pytest.mark.parametrize("spec", TOGETHER, ids=NAMES)
def test_documents_are_on_their_own(spec: Spec) -> None:
    lengths = [9, 1, 14]
    parts = [random_tensors(spec, n, n) for n in lengths]
    ends = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    packed = {name: torch.cat([part[name][0] for part in parts]) for name in parts[0]}
    whole = reference(spec, packed, cu_seqlens_q=ends)
    each = torch.cat([reference(spec, part).o[0] for part in parts])
    torch.testing.assert_close(whole.o, each)


@pytest.mark.parametrize("spec", CAUSAL, ids=lambda spec: spec.name)
def test_a_row_depends_on_nothing_past_its_block(spec: Spec) -> None:
    """Cut, or changed, where a block ends; a spec of the last rows depends on all of the prompt."""
    graph = plan(spec)
    asks_last = any(level.query and level.query.last for level in spec.levels)
    if asks_last:
        assert causality(graph) == "prompt"
        return
    if spec.name == "heads_alone":
        assert causality(graph) == "token"
        return
    unit = query_block(graph)
    assert causality_text(graph) == f"query_block({unit})"
    assert not laws(graph).decode_equals_prefill_row
    tensors = random_tensors(spec, 3 * unit, 3 * unit)
    before = reference(spec, tensors).o[:, : 2 * unit]
    short = {name: t[:, : 2 * unit] for name, t in tensors.items()}
    torch.testing.assert_close(reference(spec, short).o, before)
    later = {name: t.clone() for name, t in tensors.items()}
    for t in later.values():
        t[:, 2 * unit :] = 1e3
    torch.testing.assert_close(reference(spec, later).o[:, : 2 * unit], before)


@pytest.mark.parametrize("spec", CAUSAL, ids=lambda spec: spec.name)
def test_a_token_never_attends_to_a_later_one(spec: Spec) -> None:
    """Peer bug: SpargeAttn's block map is causal, its tokens are not: they see to the end of a block."""
    tensors = random_tensors(spec, 21, 21)
    before = reference(spec, tensors)
    tensors["v"][:, 12:] += 1e6
    after = reference(spec, tensors)
    assert torch.equal(before.o[:, :12], after.o[:, :12])


@pytest.mark.parametrize("spec", TOGETHER, ids=NAMES)
def test_chunks_of_rows_change_nothing(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(spec, 37, 45)
    whole = reference(spec, tensors)
    monkeypatch.setattr(sequence, "CHUNK_ELEMENTS", 4 * 45 * 5)
    parts = reference(spec, tensors)
    torch.testing.assert_close(whole.o, parts.o)
    for name, scores in whole.scores.items():
        torch.testing.assert_close(scores, parts.scores[name])


@pytest.mark.parametrize("spec", CAUSAL, ids=lambda spec: spec.name)
def test_prefill_by_whole_blocks_is_prefill_at_once(spec: Spec) -> None:
    graph = plan(spec)
    if causality(graph) != "query_block":
        return
    at = 2 * query_block(graph)
    tensors = random_tensors(spec, at + 7, at + 7)
    late = {n: t[:, at:] if n in ("q", "q_index") else t for n, t in tensors.items()}
    torch.testing.assert_close(reference(spec, late).o, reference(spec, tensors).o[:, at:])


def test_all_entries_selected_is_dense() -> None:
    spec = make("all", together(Query(block=4, pool="mean"), select=top(99)), [SELECTED])
    assert not_dense_because(plan(spec)) is None
    dense = make("dense", [], [Attend(name="selected", window="all")])
    tensors = random_tensors(spec, 19, 19)
    torch.testing.assert_close(reference(spec, tensors).o, reference(dense, tensors).o)


def test_a_selection_that_is_given_is_each_rows_own() -> None:
    spec = make("given", together(Query(block=4, pool="mean")), [SELECTED])
    tensors = random_tensors(spec, 12, 12)
    indices = torch.full((1, 12, 4, 3), -1, dtype=torch.int32)
    indices[:, ::2, :, 0] = 0
    result = reference(spec, tensors, selection={"block": indices})
    assert result.o[:, 1::2].eq(0).all() and not result.o[:, ::2].eq(0).any()


@pytest.mark.parametrize("spec", TOGETHER, ids=NAMES)
def test_empty_calls_and_gradients(spec: Spec) -> None:
    tensors = {name: t.requires_grad_() for name, t in random_tensors(spec, 11, 11).items()}
    reference(spec, tensors).o.sum().backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in tensors.values())


# --- what the graph says


def test_pairs_of_blocks_are_counted_once_a_block() -> None:
    """Blocks of 8 rows and 4 keys, 64 tokens: block m sees 2 (m + 1) entries, 72 in all."""
    spec = make("cost", together(Query(block=8, pool="mean"), 4), [SELECTED])
    graph = plan(spec)
    assert costs(graph)["block.score"].flops.evaluate(64) == 72 * 4 * 2 * 6
    assert costs(graph)["block.queries"].flops.evaluate(64) == 64 * 4 * 6


def test_no_kernel_reduces_their_scores_yet() -> None:
    spec = make("k", together(Query(last=4, reduce="mean")), [SELECTED])
    with pytest.raises(
        PlanError, match="level block: no kernel reduces the scores of rows together yet"
    ):
        schedule(plan(spec), Target.named("h100"))


def test_head_scope_ranks_blocks_of_rows_once() -> None:
    """All (row block, key block) pairs of a head against one total."""
    level = together(
        Query(block=4, pool="mean"),
        score=Score(form="dot", normalise="softmax"),
        select=Select(top_p=TopP(mass=0.5, scope="head")),
    )
    spec = make("scope", level, [SELECTED])
    result = reference(spec, random_tensors(spec, 16, 16))
    masses = result.scores["block"][0, ::4].clamp(min=0)  # [4, H, N]
    took = chosen(spec, random_tensors(spec, 16, 16))[::4]
    for h in range(4):
        assert (masses * took)[:, h].sum() >= 0.5 * masses[:, h].sum() - 1e-6
        assert masses[:, h][took[:, h]].min() >= masses[:, h][~took[:, h]].max()


def test_tokens_of_single_rows_feed_blocks() -> None:
    """The greatest mass of any row and token: SALE's rule and SeerAttention's target."""
    levels = [
        Level(name="token", partition=Tokens(), score=Score(form="dot", normalise="softmax")),
        Level(
            name="block",
            partition=blocks(2),
            query=Query(block=4, reduce="max"),
            score=Score(source="token", map="max"),
            select=top(3, last=1),
        ),
    ]
    spec = make("max", levels, [SELECTED])
    result = reference(spec, random_tensors(spec, 12, 12))
    token = result.scores["token"][0].clamp(min=0)  # [T, H, S]
    want = token.unflatten(2, (6, 2)).amax(3).unflatten(0, (3, 4)).amax(1)
    got = result.scores["block"][0, ::4]
    seen = got > -math.inf
    assert torch.equal(got[seen], want[seen])
