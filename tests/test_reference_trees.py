"""Trees, runs, halved intervals, samples and stripes: by hand, and the peers' mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from conformance.systems import small
from plan_cases import MEAN, blocks, random_tensors, top
from plan_cases import spec as make

from hsgen import spec as language
from hsgen.reference import reference
from hsgen.reference.partitions import drawn
from hsgen.selection import members
from hsgen.spec import (
    Attend,
    DualEntropy,
    Force,
    Halving,
    LearnedTree,
    Level,
    Loss,
    Pool,
    Query,
    Ragged,
    Score,
    Select,
    Spans,
    Spec,
    Stripes,
    Tokens,
)

SELECTED = Attend(name="selected", over="token")
RAW = Score(form="dot", scale="none", share="group", reduce="max")


def line(keys: list[float], spec: Spec, rows: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors where q . k of token s is keys[s], whatever the row and head."""
    x = random_tensors(spec, rows or len(keys), len(keys))
    for name in [name for name in x if name.startswith("q")]:
        x[name] = torch.zeros_like(x[name])
        x[name][..., 0] = 1.0
    x["k"][..., 0] = torch.tensor(keys, dtype=torch.float64)[:, None]
    return x


def picked(spec: Spec, x: dict[str, torch.Tensor], level: str, row: int = -1) -> list[int]:
    found = reference(spec, x).selection[level].indices[0, row, 0].tolist()
    return [e for e in found if e >= 0]


# --- halving


def halved(interval: int, until: int = 1, k: int = 1, **more: object) -> Spec:
    level = Level(
        name="token",
        partition=Halving(interval=interval, until=until),
        score=RAW,
        select=top(k),
    )
    return make("halved", [level], [SELECTED], **more)


def scores(spec: Spec, keys: list[float], row: int = -1) -> list[float]:
    return reference(spec, line(keys, spec)).scores["token"][0, row, 0].tolist()


def test_an_interval_is_halved_towards_its_better_middle() -> None:
    """Of [0, 8): tokens 2 and 6, 3 against 5; of [4, 8): 5 and 7, 1 against 4; of [6, 8): 6 and 7."""
    assert scores(halved(8), [9, 9, 3, 9, 9, 1, 5, 4]) == [5.0]


def test_the_search_never_looks_back_at_the_half_that_lost() -> None:
    """The largest key, 9, lies in the half whose middle is small."""
    assert scores(halved(4), [9, 0, 1, 2]) == [2.0]  # 1 and 3: 0 < 2; then 2 and 3: 1 < 2


def test_a_search_ends_at_intervals_of_until() -> None:
    assert scores(halved(8, until=4), [9, 9, 3, 9, 9, 9, 5, 9]) == [5.0]
    assert scores(halved(8, until=2), [9, 9, 3, 9, 9, 7, 5, 8]) == [8.0]


def test_of_equal_halves_the_later_is_searched() -> None:
    """Theirs takes the left half only where it is strictly better; ours says so and is tested."""
    assert scores(halved(4), [7, 1, 0, 1]) == [1.0]  # tokens 1 and 3 tie: [2, 4) is searched
    assert scores(halved(4), [7, 1, 8, 1]) == [8.0]


def test_of_equal_intervals_the_earlier_is_kept() -> None:
    """Theirs leaves it to topk, whose ties are undefined."""
    spec = halved(4, k=2)
    assert picked(spec, line([1.0] * 16, spec), "token") == [0, 1]


def test_a_sequence_shorter_than_an_interval_is_selected_by_force_alone() -> None:
    """Theirs falls back to dense below 8192 tokens and cannot run what is shorter than a chunk."""
    spec = halved(8, k=2)
    assert picked(spec, line([1, 2, 3], spec), "token") == []
    assert (reference(spec, line([1, 2, 3], spec)).o == 0).all()
    level = spec.levels[0].model_copy(update={"select": top(2, last=1)})
    forced = spec.model_copy(update={"levels": (level,)})
    assert picked(forced, line([1, 2, 3], spec), "token") == [0]


def test_a_short_last_interval_is_searched_where_it_is_there() -> None:
    """Without causality: of [4, 8) only 4 and 5 exist; token 5 against 7, which is not there."""
    assert scores(halved(4, causal=False), [0, 0, 0, 3, 1, 2]) == [3.0, 2.0]


def test_intervals_in_intervals_keep_what_their_parents_kept() -> None:
    levels = [
        Level(name="chunk", partition=Halving(interval=8), score=RAW, select=Select(beam=1)),
        Level(
            name="token",
            within="chunk",
            partition=Halving(interval=2),
            score=RAW,
            select=top(2),
        ),
    ]
    spec = language.verify(make("stages", levels, [SELECTED]))
    keys = [9, 0, 1, 0, 0, 0, 0, 0, 1, 1, 2, 3, 1, 1, 1, 5]
    x = line(keys, spec)
    assert picked(spec, x, "chunk") == [1]  # the 9 is never probed
    assert picked(spec, x, "token") == [5, 7]


# --- one token drawn


def test_the_hash_is_what_the_decisions_say() -> None:
    """Word by word in Python's integers."""

    def slot(seed: int, head: int, entry: int, count: int) -> int:
        h = (seed * 0x9E3779B1 + head * 0x85EBCA6B + entry * 0xC2B2AE35) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return (h ^ h >> 16) * count // 2**32

    for seed in (0, 1, 7, 1 << 20):
        for head in (0, 1, 63):
            for entry in (0, 1, 5, 99_999):
                for count in (1, 3, 64, 1 << 20):
                    whole = (torch.tensor(value) for value in (head, entry, count))
                    found = int(drawn(seed, *whole))
                    assert found == slot(seed, head, entry, count)
                    assert 0 <= found < count


def test_a_sampled_block_is_one_of_its_tokens_and_no_token_is_favoured() -> None:
    entry = torch.arange(4096)
    slots = drawn(0, torch.tensor(0), entry, torch.tensor(8))
    assert (torch.bincount(slots, minlength=8) - 512).abs().max() < 100
    spec = make(
        "sampled",
        [
            Level(
                name="token",
                partition=blocks(4),
                pool=Pool(keys="sample", seed=3),
                score=RAW,
                select=top(1),
            )
        ],
        [SELECTED],
    )
    x = line([0, 1, 2, 3, 4, 5, 6, 7], spec)
    found = reference(spec, x).scores["token"][0, -1]
    for head in range(2):
        for entry in range(2):
            slot = int(drawn(3, torch.tensor(head), torch.tensor(entry), torch.tensor(4)))
            assert found[head, entry] == 4 * entry + slot


# --- runs


def runs(spec_select: Select, pool: str = "mean", **partition: object) -> Spec:
    given = {"boundaries": "given"} | partition
    level = Level(
        name="token",
        partition=Ragged(**given),
        pool=Pool(keys=pool),
        score=RAW,
        select=spec_select,
    )
    return make("runs", [level], [SELECTED])


def with_starts(x: dict[str, torch.Tensor], *starts: int) -> dict[str, torch.Tensor]:
    begins = torch.zeros_like(x["token_starts"])
    begins[:, list(starts)] = 1
    return x | {"token_starts": begins}


def test_runs_of_any_length_are_pooled_by_their_own() -> None:
    """Runs [0], [1 2 3], [4 5]: means 8, 2, 5; sums over roots 8, 6 / sqrt 3, 10 / sqrt 2."""
    keys = [8, 1, 2, 3, 4, 6, 0]
    for pool, expected in (
        ("mean", [8, 2, 5]),
        ("max", [8, 3, 6]),
        ("sum_rsqrt", [8, 6 / 3**0.5, 10 / 2**0.5]),
    ):
        spec = runs(top(2), pool)
        x = with_starts(line(keys, spec), 1, 4, 6)
        found = reference(spec, x).scores["token"][0, -1, 0]
        assert found[:3].tolist() == pytest.approx(expected), pool
        assert found[3] == -math.inf  # has begun, and nobody knows where it ends


def test_a_run_is_complete_once_the_next_has_begun() -> None:
    """Row 3 is the last of its run, and cannot know it: a start at 4 is later than the row."""
    spec = runs(top(3))
    x = with_starts(line([1, 2, 3, 4, 5, 6], spec), 2, 4)
    found = [picked(spec, x, "token", row) for row in range(6)]
    assert found == [[], [], [0], [0], [0, 1], [0, 1]]


def test_the_own_run_is_reached_raw_by_force() -> None:
    spec = runs(top(2, last=1))
    x = with_starts(line([1, 2, 3, 4, 5, 6], spec), 2, 4)
    seen = reference(spec, x, keep_seen=True).seen["selected"][0, :, 0]
    assert seen[3].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert seen[5].nonzero().flatten().tolist() == [2, 3, 4, 5]  # of runs 0 and 1 the better one


def test_runs_begin_where_keys_change() -> None:
    """Keys 1 0 | 0 1: at token 4 the cosine of the sides is 0, and 1 further away."""
    spec = runs(top(4), boundaries="similarity", span=2, threshold=0.9)
    x = random_tensors(spec, 8, 8)
    x["k"] = torch.zeros_like(x["k"])
    x["k"][:, :4, :, 0] = 1.0
    x["k"][:, 4:, :, 1] = 1.0
    found = reference(spec, x).scores["token"][0, -1, 0]
    assert len(found) == 2  # tokens 3 and 5 are below the threshold too, and not the least


def test_no_run_begins_where_nothing_is_below_the_threshold() -> None:
    spec = runs(top(4), boundaries="similarity", span=2, threshold=-0.99)
    assert reference(spec, random_tensors(spec, 9, 9)).scores["token"].shape[-1] == 1


def upsampled(k: int) -> Spec:
    return make(
        "upsampled",
        [
            Level(
                name="chunk",
                partition=Ragged(boundaries="given"),
                pool=Pool(keys="sum_rsqrt"),
                score=RAW,
            ),
            Level(
                name="token",
                partition=Tokens(),
                score=Score(source="chunk", map="upsample"),
                select=top(k, last=1),
            ),
        ],
        [SELECTED],
    )


def test_tokens_have_the_scores_of_their_runs() -> None:
    """Runs [0 1], [2 3 4]: 6 / sqrt 2 is less than 9 / sqrt 3; a budget cuts a run from its start."""
    spec = language.verify(upsampled(3))
    x = line([3, 3, 3, 3, 3, 9], spec)
    begins = torch.zeros_like(x["chunk_starts"])
    begins[:, [2, 5]] = 1
    x["chunk_starts"] = begins
    assert reference(spec, x).scores["token"][0, -1, 0].tolist() == pytest.approx(
        [6 / 2**0.5] * 2 + [9 / 3**0.5] * 3 + [-math.inf]
    )
    assert picked(spec, x, "token") == [2, 3, 5]  # the last is forced


@pytest.mark.parametrize("source", [2, 4])
def test_blocks_are_upsampled_and_averaged(source: int) -> None:
    coarse = Level(name="coarse", partition=blocks(4), pool=MEAN, score=RAW)
    fine = Level(
        name="token",
        partition=blocks(source // 2),
        score=Score(source="coarse", map="upsample"),
        select=top(8),
    )
    spec = language.verify(make("up", [coarse, fine], [SELECTED]))
    found = reference(spec, line([1, 1, 1, 1, 3, 3, 3, 3], spec)).scores["token"][0, -1, 0]
    assert found.tolist() == [1.0] * (len(found) // 2) + [3.0] * (len(found) // 2)


def test_averages_are_of_complete_entries() -> None:
    """Blocks of 2, then of 4 over them; the last block of 4 is not complete for row 6."""
    fine = Level(name="fine", partition=blocks(2), pool=MEAN, score=RAW)
    coarse = Level(
        name="token",
        partition=blocks(4),
        score=Score(source="fine", map="avg_pool"),
        select=top(1),
    )
    spec = language.verify(make("avg", [fine, coarse], [SELECTED]))
    x = line([1, 1, 3, 3, 5, 5, 7, 7], spec)
    assert reference(spec, x).scores["token"][0, -1, 0].tolist() == [2.0, 6.0]
    assert reference(spec, x).scores["token"][0, -2, 0].tolist() == [2.0, -math.inf]


# --- trees


def router(*, beam: int = 1, k: int = 4, capacity: float | None = None, kv: int = 2) -> Spec:
    pool = Pool(keys="centroid")
    group = Score(form="dot", scale="none", share="group", reduce="max")
    levels = [
        Level(
            name="branch",
            partition=LearnedTree(branching=2),
            pool=pool,
            score=group,
            select=Select(beam=beam),
        ),
        Level(
            name="leaf",
            within="branch",
            partition=LearnedTree(branching=2, capacity=capacity),
            pool=pool,
            score=group,
            select=Select(beam=beam),
        ),
        Level(name="token", within="leaf", partition=Tokens(), score=group, select=top(k)),
    ]
    return language.verify(make("router", levels, [SELECTED], kv=kv))


def planted(spec: Spec, leaves: list[int]) -> dict[str, torch.Tensor]:
    """Keys that lie on the axis of their leaf: leaf n is axis n, branch b between its two axes."""
    x = random_tensors(spec, len(leaves), len(leaves))
    for name, axes in (("branch", [[0, 1], [2, 3]]), ("leaf", [[0], [1], [2], [3]])):
        x[f"{name}_centroids"] = torch.zeros_like(x[f"{name}_centroids"])
        for node, each in enumerate(axes):
            x[f"{name}_centroids"][:, node, each] = 2.0
    x["k"] = torch.zeros_like(x["k"])
    for s, leaf in enumerate(leaves):
        x["k"][:, s, :, leaf] = 1.0 + s
    x["q"] = torch.zeros_like(x["q"])
    x["q"][..., :4] = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    return x


def test_a_beam_goes_down_the_tree() -> None:
    """Branch scores (1 + 3) / sqrt 2 and 2.5 / sqrt 2; of its leaves 1 and 3."""
    spec = router()
    x = planted(spec, [0, 1, 2, 3, 1, 2])
    assert picked(spec, x, "branch") == [0]
    assert picked(spec, x, "leaf") == [1]
    assert picked(spec, x, "token") == [1, 4]


def test_a_wider_beam_reaches_other_branches() -> None:
    spec = router(beam=2)
    x = planted(spec, [0, 1, 2, 3, 1, 2])
    assert picked(spec, x, "branch") == [0, 1]
    assert picked(spec, x, "leaf") == [1, 2]
    assert picked(spec, x, "token") == [1, 2, 4, 5]


def test_a_node_exists_once_a_token_is_in_it() -> None:
    """No row is sent where nothing is: row 0 sees the first token's path alone."""
    spec = router()
    x = planted(spec, [2, 0, 1])
    assert [picked(spec, x, "leaf", row) for row in range(3)] == [[2], [0], [1]]
    assert [picked(spec, x, "token", row) for row in range(3)] == [[0], [1], [2]]


def test_key_heads_have_trees_of_their_own() -> None:
    spec = router()
    x = planted(spec, [0, 1, 2, 3])
    x["leaf_centroids"][1] = x["leaf_centroids"][1][[1, 0, 2, 3]]
    found = reference(spec, x).selection["token"].indices[0, -1]
    assert found[0, 0] == 1
    assert reference(spec, x).selection["leaf"].indices[0, -1].tolist() == [[1], [0]]


def test_ties_of_assignment_go_to_the_lower_node() -> None:
    spec = router()
    x = planted(spec, [0, 0, 0])
    x["leaf_centroids"][:, 1] = x["leaf_centroids"][:, 0]
    assert picked(spec, x, "leaf") == [0]


def test_a_full_node_keeps_its_nearest_tokens() -> None:
    """6 tokens, 4 leaves, capacity 1: two a leaf; of three in leaf 0 the one that is off its axis goes."""
    spec = router(capacity=1.0, k=6)
    x = planted(spec, [1, 1, 1, 2, 3, 0])
    x["k"][:, 0, :, 2] = 0.4
    assert picked(spec, x, "leaf") == [1]
    assert picked(spec, x, "token") == [1, 2]


def test_an_unbounded_beam_of_a_tree_is_exhaustive() -> None:
    spec = router(beam=8, k=5)
    flat = make("flat", [spec.levels[2].model_copy(update={"within": None})], [SELECTED])
    x = random_tensors(spec, 20, 24)
    expected = reference(flat, {name: x[name] for name in "qkv"}).selection["token"]
    assert torch.equal(reference(spec, x).selection["token"].indices, expected.indices)


# --- what a tree learns from


def learning(balance: float = 1.0, *, kv: int = 2) -> Spec:
    loss = Loss(dual_entropy=DualEntropy(tree="branch", temperature=1.0, balance=balance))
    levels = router(kv=kv).levels
    flat = (levels[0], levels[2].model_copy(update={"within": "branch"}))
    return language.verify(make("learning", list(flat), [SELECTED], kv=kv, loss=loss))


def on_axes(spec: Spec, keys: list[int], queries: list[int]) -> dict[str, torch.Tensor]:
    """Centroid n of two lies on axis n, and so does every key and query that is said to."""
    x = random_tensors(spec, len(queries), len(keys))
    axes = torch.eye(6, dtype=torch.float64)
    x["branch_centroids"] = 3.0 * axes[:2].expand_as(x["branch_centroids"])
    x["k"] = 2.0 * axes[keys][None, :, None].expand_as(x["k"])
    x["q"] = 0.5 * axes[queries][None, :, None].expand_as(x["q"])
    return x


def entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares)


def test_dual_entropy_by_hand() -> None:
    """Cosines 1 and 0: p = (s, 1 - s), s = e / (e + 1); keys go both ways, queries one way only."""
    spec = learning(balance=0.5)
    found = reference(spec, on_axes(spec, [0, 1], [0, 0])).loss["dual_entropy"]
    s = math.e / (math.e + 1)
    keys = entropy(s, 1 - s) - 0.5 * entropy(0.5, 0.5)
    queries = entropy(s, 1 - s) - 0.5 * entropy(s, 1 - s)
    assert float(found) == pytest.approx((keys + queries) / 2)


def test_balance_prefers_even_trees() -> None:
    """The same doubts; all in one node costs more than half in each."""
    spec = learning()
    even = reference(spec, on_axes(spec, [0, 1, 0, 1], [0, 1, 0, 1])).loss["dual_entropy"]
    uneven = reference(spec, on_axes(spec, [0, 0, 0, 0], [0, 0, 0, 0])).loss["dual_entropy"]
    assert float(even) < float(uneven)


def test_the_second_level_asks_only_siblings() -> None:
    """A leaf of another branch is no rival: the loss is blind to its centroid's direction."""
    loss = Loss(dual_entropy=DualEntropy(tree="leaf", temperature=0.5, balance=1e-9))
    spec = language.verify(router().model_copy(update={"loss": loss}))
    x = planted(spec, [0, 1, 0])
    x["q"] = x["k"].repeat_interleave(2, 2)[:, :3]
    before = reference(spec, x).loss["dual_entropy"]
    x["leaf_centroids"] = x["leaf_centroids"].clone()
    x["leaf_centroids"][:, 2:] = x["leaf_centroids"][:, :2]
    after = reference(spec, x).loss["dual_entropy"]
    assert float(after) == pytest.approx(float(before), abs=1e-8)


def test_dual_entropy_teaches_centroids_keys_and_queries() -> None:
    loss = Loss(dual_entropy=DualEntropy(tree="leaf", temperature=0.3))
    spec = language.verify(router().model_copy(update={"loss": loss}))
    x = {name: y.requires_grad_() for name, y in random_tensors(spec, 9, 11).items()}
    found = reference(spec, x).loss["dual_entropy"]
    grads = torch.autograd.grad(
        found, [x[n] for n in ("branch_centroids", "leaf_centroids", "k", "q")]
    )
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_dual_entropy_of_documents_is_the_mean_by_their_keys() -> None:
    spec = learning()
    x = random_tensors(spec, 12, 12)
    packed = {n: y if n.endswith("centroids") else y[0] for n, y in x.items()}
    together = reference(spec, packed, cu_seqlens_q=torch.tensor([0, 4, 12])).loss["dual_entropy"]
    parts = [
        reference(spec, {n: y if n.endswith("centroids") else y[:, a:b] for n, y in x.items()})
        for a, b in ((0, 4), (4, 12))
    ]
    first, second = (float(part.loss["dual_entropy"]) for part in parts)
    assert float(together) == pytest.approx((4 * first + 8 * second) / 12)


# --- stripes


def striped(k: int = 2, first: int = 1, power: int = 2, **spans: float) -> Spec:
    level = Level(
        name="anchor",
        q="search",
        partition=Stripes(power=power, first=first),
        score=Score(form="dot", scale="none"),
        select=top(k),
    )
    given = {"factor": 1.0, "power": 0.5, "window": 1} | spans
    branch = Attend(name="spans", over="anchor", spans=Spans(**given))
    return language.verify(make("striped", [level], [branch], kv=4))


def test_anchors_lie_at_squares_behind_the_query() -> None:
    """Row 9: i = 1, 2, 3 give tokens 9, 6, 1, the oldest first."""
    spec = striped(k=3)
    found = reference(spec, line([float(s) for s in range(10)], spec)).scores["anchor"][0, :, 0]
    assert found[9].tolist() == [1.0, 6.0, 9.0]
    assert found[3].tolist() == [0.0, 3.0, -math.inf]
    assert found[0].tolist() == [0.0, -math.inf, -math.inf]


def test_the_nearest_stripes_may_be_left_to_the_window() -> None:
    spec = striped(k=3, first=2)
    found = reference(spec, line([float(s) for s in range(10)], spec)).scores["anchor"][0, :, 0]
    assert found[9].tolist() == [1.0, 6.0]
    assert found[2].tolist() == [-math.inf] * 2


def test_of_equal_anchors_the_older_wins() -> None:
    """Theirs scans from the oldest and replaces only by what is strictly greater."""
    spec = striped(k=2)
    assert picked(spec, line([1.0] * 17, spec), "anchor") == [0, 1]  # i = 4 and 3 of 4


def test_spans_end_at_their_anchor_and_begin_no_earlier_than_the_document() -> None:
    """Row 9: reach ceil(sqrt 10) = 4; anchors 1 and 6 show 0..1 and 2..6, and the row itself."""
    spec = striped(k=2)
    keys = [0.0] * 10
    keys[1], keys[6] = 2.0, 1.0
    seen = reference(spec, line(keys, spec), keep_seen=True).seen["spans"][0, 9, 0]
    assert seen.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 9]


def test_spans_are_softmaxes_of_their_own_weighed_by_their_anchors() -> None:
    """q = 0: each span is a mean of its values; the weights are the softmax of 2 and 1."""
    spec = striped(k=2)
    keys = [0.0] * 10
    keys[1], keys[6] = 2.0, 1.0
    x = line(keys, spec)
    x["q"] = torch.zeros_like(x["q"])
    v = x["v"][0, :, 0]
    old, new = v[[0, 1, 9]].mean(0), v[[2, 3, 4, 5, 6, 9]].mean(0)
    share = torch.tensor([2.0, 1.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(reference(spec, x).o[0, 9, 0], share[0] * old + share[1] * new)
    assert reference(spec, x).lse["spans"][0, 0, 9] == pytest.approx(math.log(8))


def test_the_window_of_spans_is_what_it_says_whatever_the_power() -> None:
    """Cubes from 2 on leave 2 ** 3 - 1 tokens to the window; a mask of theirs squares, and has 3."""
    spec = striped(k=1, first=2, power=3, window=7)
    seen = reference(spec, line([0.0] * 6, spec), keep_seen=True).seen["spans"][0, 5, 0]
    assert seen.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_row_without_anchors_attends_to_its_window() -> None:
    spec = striped(k=2, first=3, window=2)
    x = line([0.0] * 9, spec)
    seen = reference(spec, x, keep_seen=True).seen["spans"][0, :, 0]
    assert seen[4].nonzero().flatten().tolist() == [3, 4]
    x["q"] = torch.zeros_like(x["q"])
    torch.testing.assert_close(reference(spec, x).o[0, 4, 0], x["v"][0, 3:5, 0].mean(0))


def test_every_token_is_within_reach_of_some_anchor() -> None:
    """With factor 2 and one stripe left out for each token of the window."""
    for n in (1, 2, 17, 100, 1000):
        shown = set(range(n - 3, n))
        reach = math.ceil(2 * n**0.5)
        for i in range(2, n + 1):
            if i * i <= n:
                shown |= set(range(max(0, n - i * i - reach), n - i * i + 1))
        assert shown >= set(range(n)), n


def test_gradients_reach_the_queries_that_search() -> None:
    spec = striped(k=2)
    x = {name: y.requires_grad_() for name, y in random_tensors(spec, 12, 12).items()}
    reference(spec, x).o.square().sum().backward()
    assert x["q_search"].grad.abs().sum() > 0
    assert all(y.grad.isfinite().all() for y in x.values())


# --- all of them


FAMILIES = {
    "halved": halved(4, k=2),
    "runs": runs(top(2, last=1)),
    "found": runs(top(2, last=1), boundaries="similarity", span=2, threshold=0.3),
    "upsampled": upsampled(5),
    "router": router(beam=2),
    "capacity": router(beam=2, capacity=1.25),
    "striped": striped(k=2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_are_separate(name: str) -> None:
    """Packed documents equal the same ones one by one."""
    spec = FAMILIES[name]
    x = random_tensors(spec, 24, 24)
    x |= {key: (y > 0.5).double() for key, y in x.items() if key.endswith("_starts")}
    ends = torch.tensor([0, 9, 10, 24])
    packed = {n: y if n.endswith("centroids") else y[0] for n, y in x.items()}
    together = reference(spec, packed, cu_seqlens_q=ends)
    for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        part = {n: y if n.endswith("centroids") else y[:, a:b] for n, y in x.items()}
        torch.testing.assert_close(together.o[a:b], reference(spec, part).o[0])


# what tokens are in depends on later ones
PROMPT = {"found", "capacity"}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PROMPT])
def test_decode_rows_are_rows_of_prefill(name: str) -> None:
    """Where no row depends on the whole prompt."""
    spec = FAMILIES[name]
    x = random_tensors(spec, 19, 19)
    x |= {key: (y > 0.5).double() for key, y in x.items() if key.endswith("_starts")}
    whole = reference(spec, x)
    for t in (0, 7, 18):
        step = {
            n: y[:, t : t + 1] if n.startswith("q") else y if "centroids" in n else y[:, : t + 1]
            for n, y in x.items()
        }
        torch.testing.assert_close(reference(spec, step).o[0, 0], whole.o[0, t])


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_before_the_first_key_are_empty(name: str) -> None:
    spec = FAMILIES[name]
    result = reference(spec, random_tensors(spec, 7, 4))
    assert (result.o[:, :3] == 0).all()
    assert result.o.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_spec_is_read_as_it_is_written(name: str) -> None:
    spec = FAMILIES[name]
    assert language.parse(language.dump(spec)) == spec


def test_force_of_two_kinds_is_a_union() -> None:
    """A run that is both first and own counts once."""
    level = (
        FAMILIES["runs"]
        .levels[0]
        .model_copy(update={"select": Select(top_k=2, force=Force(first=1, last=1))})
    )
    spec = FAMILIES["runs"].model_copy(update={"levels": (level,)})
    x = with_starts(line([1, 2, 3, 4], spec), 2)
    assert picked(spec, x, "token", 1) == [0]
    assert picked(spec, x, "token", 3) == [0, 1]


# --- rows that search as one, and the systems


def together(how: str) -> Spec:
    level = Level(
        name="token",
        query=Query(block=2, reduce=how),
        partition=Halving(interval=4),
        score=RAW,
        select=top(1),
    )
    return language.verify(make("together", [level], [SELECTED]))


def two_queries(spec: Spec, first: list[float], second: list[float]) -> dict[str, torch.Tensor]:
    """Rows 6 and 7 of one block have the logits `first` and `second`; other rows see nothing worth it."""
    x = random_tensors(spec, 8, 8)
    x["q"], x["k"] = torch.zeros_like(x["q"]), torch.zeros_like(x["k"])
    x["q"][:, 6, :, 0] = x["q"][:, 7, :, 1] = 1.0
    x["k"][..., 0] = torch.tensor(first, dtype=torch.float64)[:, None]
    x["k"][..., 1] = torch.tensor(second, dtype=torch.float64)[:, None]
    return x


def test_rows_search_by_the_greatest_of_their_logits() -> None:
    """Row 6 alone would go left to token 0, 9; by 1 against 5 of the other both go right, to 3 and 6."""
    spec = together("max")
    x = two_queries(spec, [0, 2, 0, 1, 0, 0, 0, 0], [0, 0, 6, 5, 0, 0, 0, 0])
    found = reference(spec, x).scores["token"][0, 6:, 0, 0].tolist()
    assert found == [6.0, 6.0]  # of halves tokens 1 and 3, then 2 and 3


def test_rows_search_by_the_mean_of_their_logits() -> None:
    """Tokens 1 and 3: 4 against 3; then 0 and 1: 4 and 4."""
    spec = together("mean")
    x = two_queries(spec, [8, 8, 0, 1, 0, 0, 0, 0], [0, 0, 6, 5, 0, 0, 0, 0])
    assert reference(spec, x).scores["token"][0, 6:, 0, 0].tolist() == [4.0, 4.0]


def test_a_token_that_no_row_of_a_block_sees_is_not_searched() -> None:
    spec = together("mean")
    x = two_queries(spec, [1.0] * 8, [1.0] * 8)
    x["k"][:, 6:] = 100.0
    assert reference(spec, x).scores["token"][0, 5, 0, 1] <= 0.0


def unbounded(spec: Spec) -> Spec:
    """The same levels with room for every entry in each beam, but for the last."""
    wide = [
        level.model_copy(update={"select": level.select.model_copy(update={"beam": 4096})})
        if level.select and level.select.beam
        else level
        for level in spec.levels
    ]
    return language.verify(spec.model_copy(update={"levels": tuple(wide)}))


@pytest.mark.parametrize("name", ["hip", "hirouter"])
def test_an_unbounded_beam_is_exhaustive(name: str) -> None:
    """Halved intervals and a learned tree alike: what the last level keeps of all is what it keeps."""
    spec = unbounded(small(name))
    last = spec.levels[-1].model_copy(update={"within": None})
    flat = language.verify(spec.model_copy(update={"levels": (last,), "loss": None}))
    x = random_tensors(spec, 61, 61, seed=3)
    expected = reference(flat, {n: y for n, y in x.items() if "centroids" not in n})
    found = reference(spec, x)
    chosen = (result.selection[last.name].indices for result in (found, expected))
    assert torch.equal(*chosen)
    torch.testing.assert_close(found.o, expected.o)


@pytest.mark.parametrize("name", ["hip", "hirouter"])
def test_wider_beams_find_no_less(name: str) -> None:
    """Of what an unbounded beam keeps, on average over rows."""
    spec, x = small(name), random_tensors(small(name), 61, 61, seed=4)
    goal = chosen_tokens(unbounded(spec), x)
    shares = []
    for beam in (1, 3, 64):
        narrow = [
            level.model_copy(
                update={"select": level.select.model_copy(update={"beam": beam, "force": Force()})}
            )
            if level.select and level.select.beam
            else level
            for level in spec.levels
        ]
        found = chosen_tokens(spec.model_copy(update={"levels": tuple(narrow)}), x)
        shares.append(float((found & goal).sum() / goal.sum()))
    assert shares == sorted(shares) and shares[0] < shares[-1]


def chosen_tokens(spec: Spec, x: dict[str, torch.Tensor]) -> torch.Tensor:
    return reference(spec, x, keep_seen=True).seen["selected"]


def test_dhsa_keeps_whole_runs_before_it_cuts_one() -> None:
    """Of every block of rows one run at most is cut, and that from its start on; own tokens aside."""
    spec = small("dhsa")
    block = spec.levels[0].query.block if spec.levels[0].query else None
    assert block
    x = random_tensors(spec, 61, 61, seed=5)
    result = reference(spec, x, keep_seen=True)
    of_run = result.scores["token"][0]  # the score of the run that each token is in
    picked = result.selection["token"].indices[0]
    for t, h in ((t, h) for t in (20, 40, 60) for h in range(picked.shape[1])):
        own = t // block * block
        kept = {int(s) for s in picked[t, h] if 0 <= s < own}
        by_run: dict[float, list[int]] = {}
        for s in range(own):
            by_run.setdefault(float(of_run[t, h, s]), []).append(s)
        cut = [run for run in by_run.values() if 0 < len(kept & set(run)) < len(run)]
        assert len(cut) <= 1
        assert all(kept & set(run) == set(run[: len(kept & set(run))]) for run in cut)


def test_dhsa_released_keeps_a_part_of_all_blocks_in_every_row() -> None:
    """A half of 8 blocks: also where half of them is more than a row sees."""
    spec = small("dhsa_released")
    level = spec.levels[0]
    half = level.select.model_copy(update={"fraction": 0.5}) if level.select else None
    spec = spec.model_copy(update={"levels": (level.model_copy(update={"select": half}),)})
    result = reference(spec, random_tensors(spec, 61, 61, seed=6))
    kept = members(result.selection["block"], 8)[0].sum(-1)
    assert level.partition.size == 8
    assert (kept[-1] == 4).all() and (kept[16:].float().mean() >= 3).all()
