import math

import pytest
import torch

from hsgen.reference import Result, order, reference, tensor_kinds, tensor_shapes
from hsgen.selection import BitmapSelection, to_bitmap
from hsgen.spec import (
    Attend,
    Blocks,
    Combine,
    Force,
    HeadDim,
    Heads,
    Index,
    Level,
    Pool,
    Score,
    Select,
    Spec,
    Tokens,
)

NAN, INF = math.nan, math.inf


def blocks(size: int, stride: int | None = None) -> Blocks:
    return Blocks(size=size, stride=stride or size)


def moba(*, chunk: int = 4, top_k: int = 2, group: int = 1, causal: bool = True) -> Spec:
    return Spec(
        name="moba",
        heads=Heads(query=2 * group, kv=2),
        head_dim=HeadDim(qk=3, v=2),
        causal=causal,
        levels=(
            Level(
                name="chunk",
                partition=blocks(chunk),
                pool=Pool(keys="mean"),
                score=Score(form="dot", scale="none"),
                select=Select(top_k=top_k, force=Force(last=1)),
            ),
        ),
        attend=(Attend(name="selected", over="chunk"),),
    )


def nsa(*, top_k: int = 3) -> Spec:
    linear = Pool(keys="linear", values="linear", position="learned")
    mass = Score(form="dot", normalise="softmax", share="group", reduce="sum")
    return Spec(
        name="nsa",
        heads=Heads(query=4, kv=2),
        head_dim=HeadDim(qk=3, v=2),
        levels=(
            Level(name="cmp", partition=blocks(4, 2), kv="cmp", pool=linear, score=mass),
            Level(
                name="block",
                partition=blocks(8),
                score=Score(source="cmp", map="overlap_sum"),
                select=Select(top_k=top_k, force=Force(first=1, last=2)),
            ),
        ),
        attend=(
            Attend(name="cmp", over="cmp", values="pooled"),
            Attend(name="selected", over="block"),
            Attend(name="window", window=5, kv="win"),
        ),
        combine=Combine(gates="input"),
    )


def hisa(*, beam: int = 2, top_k: int = 5) -> Spec:
    score = Score(form="relu_weighted", share="all")
    return Spec(
        name="hisa",
        heads=Heads(query=4, kv=2),
        head_dim=HeadDim(qk=3, v=2),
        index=Index(heads=3, dim=4),
        levels=(
            Level(
                name="block",
                partition=blocks(4),
                pool=Pool(keys="mean"),
                score=score,
                select=Select(beam=beam, force=Force(first=1, last=1)),
            ),
            Level(
                name="token",
                within="block",
                partition=Tokens(),
                score=score,
                select=Select(top_k=top_k),
            ),
        ),
        attend=(Attend(name="selected", over="token"),),
    )


SYSTEMS = {"moba": moba(), "nsa": nsa(), "hisa": hisa()}


def random(spec: Spec, T: int, S: int | None = None, B: int = 1, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(spec, B, T, S or T)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def with_level(spec: Spec, index: int = 0, **changes) -> Spec:
    level = spec.levels[index].model_copy(update=changes)
    levels = (*spec.levels[:index], level, *spec.levels[index + 1 :])
    return spec.model_copy(update={"levels": levels})


def chosen_sets(result: Result, level: str) -> list[list[int]]:
    """Selected entries of every row of the first sequence and head."""
    rows = result.selection[level].indices[0, :, 0].tolist()
    return [[e for e in row if e >= 0] for row in rows]


def dense(x: dict, *, causal: bool = True) -> torch.Tensor:
    """Ordinary attention of q, k, v: [B, T, H, D]."""
    G = x["q"].shape[2] // x["k"].shape[2]
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return o.transpose(1, 2)


# --- systems against loops written from the papers, on plain Python numbers


def attend(q: list, keys: list, values: list) -> tuple[list, float]:
    if not keys:
        return [0.0] * 2, -INF
    logits = [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)) for k in keys]
    weights = [math.exp(s) for s in logits]
    total = sum(weights)
    columns = zip(*values, strict=True)
    return [
        sum(w * c for w, c in zip(weights, col, strict=True)) / total for col in columns
    ], math.log(total)


def dot(a: list, b: list) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def best(scores: dict[int, float], k: int) -> list[int]:
    return sorted(sorted(scores, key=lambda e: (-scores[e], e))[:k])


def test_moba_equals_the_papers_loop():
    T, B, k = 11, 4, 2
    x = random(moba(chunk=B, top_k=k, group=2), T)
    result = reference(moba(chunk=B, top_k=k, group=2), x)
    q, keys, values = (x[n][0].tolist() for n in "qkv")
    for t in range(T):
        for h in range(4):
            gate = {t // B: INF}
            for c in range((t + 1) // B):
                mean = [sum(keys[c * B + j][h // 2][d] for j in range(B)) / B for d in range(3)]
                gate.setdefault(c, dot(q[t][h], mean))
            mine = best(gate, k)
            seen = [s for s in range(t + 1) if s // B in mine]
            o, lse = attend(
                q[t][h], [keys[s][h // 2] for s in seen], [values[s][h // 2] for s in seen]
            )
            assert [
                e for e in result.selection["chunk"].indices[0, t, h].tolist() if e >= 0
            ] == mine
            torch.testing.assert_close(result.o[0, t, h], torch.tensor(o, dtype=torch.float64))
            assert math.isclose(result.lse["selected"][0, h, t], lse, rel_tol=1e-12)


def compressed(x: dict, side: str, head: int, T: int) -> list:
    """NSA eq. 7 with one linear map: blocks of 4, stride 2."""
    name = "k_cmp" if side == "key" else "v_cmp"
    weight, position = x[f"cmp_{side}_weight"][head], x[f"cmp_{side}_position"][head]
    tokens = x[name][0, :, head]
    return [
        sum((tokens[2 * i + j] + position[j]) @ weight[j] for j in range(4)).tolist()
        for i in range((T - 4) // 2 + 1)
    ]


def test_nsa_equals_the_papers_loop():
    T = 29
    x = random(nsa(), T)
    result = reference(nsa(), x)
    q = x["q"][0].tolist()
    for g in range(2):
        ck, cv = compressed(x, "key", g, T), compressed(x, "value", g, T)
        k, v, kw, vw = (x[n][0, :, g].tolist() for n in ("k", "v", "k_win", "v_win"))
        for t in range(T):
            n = (t + 1 - 4) // 2 + 1 if t + 1 >= 4 else 0
            mass = [0.0] * n
            for h in (2 * g, 2 * g + 1):
                e = [math.exp(dot(q[t][h], ck[i]) / math.sqrt(3)) for i in range(n)]
                mass = [m + a / sum(e) for m, a in zip(mass, e, strict=True)]
            score = {}
            for j in range(t // 8 + 1):  # eq. 9, from 0
                pairs = [4 * j + m - o for m in range(4) for o in range(2)]
                score[j] = sum(mass[i] for i in pairs if 0 <= i < n)
            score.update({j: INF for j in (0, t // 8, t // 8 - 1) if j >= 0})
            mine = best(score, 3)
            assert chosen_rows(result, t, g) == mine
            for h in (2 * g, 2 * g + 1):
                seen = [s for s in range(t + 1) if s // 8 in mine]
                parts = [
                    attend(q[t][h], ck[:n], cv[:n]),
                    attend(q[t][h], [k[s] for s in seen], [v[s] for s in seen]),
                    attend(q[t][h], kw[max(0, t - 4) : t + 1], vw[max(0, t - 4) : t + 1]),
                ]
                gates = x["gates"][0, t, h].tolist()
                o = [
                    sum(w * part[0][d] for w, part in zip(gates, parts, strict=True))
                    for d in (0, 1)
                ]
                torch.testing.assert_close(result.o[0, t, h], torch.tensor(o, dtype=torch.float64))
                for name, part in zip(("cmp", "selected", "window"), parts, strict=True):
                    assert math.isclose(result.lse[name][0, h, t], part[1], rel_tol=1e-12)


def chosen_rows(result: Result, t: int, head: int) -> list[int]:
    return [e for e in result.selection["block"].indices[0, t, head].tolist() if e >= 0]


def test_hisa_equals_the_papers_loop():
    T, B = 22, 4
    x = random(hisa(), T)
    result = reference(hisa(), x)
    qi, ki, w = (x[n][0].tolist() for n in ("q_index", "k_index", "w_index"))
    q, k, v = (x[n][0].tolist() for n in "qkv")
    means = [[sum(ki[B * c + j][d] for j in range(B)) / B for d in range(4)] for c in range(T // B)]

    def index_score(t: int, key: list) -> float:
        return sum(w[t][i] * max(0.0, dot(qi[t][i], key)) for i in range(3))

    for t in range(T):
        gate = {c: index_score(t, means[c]) for c in range((t + 1) // B)}
        gate.update({0: INF, t // B: INF})
        beam = best(gate, 2)
        assert chosen_sets(result, "block")[t] == beam
        tokens = {s: index_score(t, ki[s]) for s in range(t + 1) if s // B in beam}
        seen = best(tokens, 5)
        assert chosen_sets(result, "token")[t] == seen
        for h in range(4):
            o, _ = attend(q[t][h], [k[s][h // 2] for s in seen], [v[s][h // 2] for s in seen])
            torch.testing.assert_close(result.o[0, t, h], torch.tensor(o, dtype=torch.float64))


# --- numbers worked out by hand


def one_head(k: list, v: list, q: list, **changes) -> tuple[Spec, dict]:
    """A chunk spec with one head of width 1, and its tensors."""
    spec = moba(**changes).model_copy(
        update={"heads": Heads(query=1, kv=1), "head_dim": HeadDim(qk=1, v=1)}
    )
    x = {
        name: torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)
        for name, values in {"q": q, "k": k, "v": v}.items()
    }
    return spec, x


def test_two_tokens_by_hand():
    # weights e^0 : e^ln3 = 1 : 3, so o = (1 * 4 + 3 * 8) / 4 = 7 and lse = ln 4
    spec, x = one_head(k=[0, 1], v=[4, 8], q=[0, math.log(3)], chunk=2)
    result = reference(spec, x)
    torch.testing.assert_close(result.o.flatten(), torch.tensor([4.0, 7.0], dtype=torch.float64))
    assert result.lse["selected"].flatten().tolist() == pytest.approx([0.0, math.log(4)])


def test_best_chunk_by_hand():
    # means of complete chunks: 1, 5, 3; row 6 keeps its own (3, incomplete) and the best (1)
    spec, x = one_head(k=[0, 2, 5, 5, 3, 3, 9], v=[0, 0, 1, 1, 0, 0, 1], q=[1] * 7, chunk=2)
    result = reference(spec, x)
    assert chosen_sets(result, "chunk") == [[0], [0], [0, 1], [0, 1], [1, 2], [1, 2], [1, 3]]
    assert result.scores["chunk"][0, 6, 0].tolist() == [1.0, 5.0, 3.0, -INF]
    assert result.candidates["chunk"][0, 6, 0].tolist() == [True, True, True, True]
    assert result.forced["chunk"][0, 6, 0].tolist() == [False, False, False, True]
    assert result.o[0, 6].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("source", "target", "taps"),
    [
        ((32, 16), 64, {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}),
        ((32, 32), 64, {0: 1, 1: 1}),
        ((64, 16), 64, {-3: 1, -2: 2, -1: 3, 0: 4, 1: 3, 2: 2, 3: 1}),
        ((16, 16), 64, {0: 1, 1: 1, 2: 1, 3: 1}),
        ((16, 16), 16, {0: 1}),
    ],
)
def test_overlap_sum_has_the_weights_of_eq_9(source, target, taps):
    spec = nsa(top_k=3).model_copy(
        update={"heads": Heads(query=1, kv=1), "head_dim": HeadDim(qk=1, v=1)}
    )
    spec = with_level(spec, 0, partition=blocks(*source))
    spec = with_level(spec, 1, partition=blocks(target))
    T = 4 * target
    x = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec, 1, T, T).items()}
    result = reference(spec, x, q_offset=0)
    n = (T - source[0]) // source[1] + 1  # q = 0: every complete entry has mass 1 / n
    for j in range(4):
        gathered = [w for o, w in taps.items() if 0 <= j * target // source[1] + o < n]
        assert result.scores["block"][0, -1, 0, j].item() == pytest.approx(sum(gathered) / n)


def test_overlap_max_takes_entries_that_touch():
    # means of (0..3), (2..5), (4..7): 1, 5, 6; the second is incomplete for row 3
    spec, x = one_head(k=[1, 1, 1, 1, 9, 9, 3, 3], v=[0] * 8, q=[1] * 8)
    source = Level(
        name="source",
        partition=blocks(4, 2),
        pool=Pool(keys="mean"),
        score=Score(form="dot", scale="none"),
    )
    target = Level(
        name="chunk",
        partition=blocks(4),
        score=Score(source="source", map="overlap_max"),
        select=Select(top_k=1),
    )
    result = reference(spec.model_copy(update={"levels": (source, target)}), x)
    assert result.scores["chunk"][0, 3, 0].tolist() == [1.0, -INF]
    assert result.scores["chunk"][0, 6, 0].tolist() == [5.0, -INF]
    assert result.scores["chunk"][0, 7, 0].tolist() == [5.0, 6.0]


def test_index_heads_choose_for_their_key_heads():
    """Two key heads, index queries 1 and -1: one takes the block of the greatest key, one of the least."""
    spec, x = one_head(k=[0] * 6, v=[0] * 6, q=[0] * 6)
    token = Level(name="token", partition=Tokens(), score=Score(form="index_dot", share="group"))
    block = Level(
        name="chunk",
        partition=blocks(2),
        score=Score(source="token", map="max"),
        select=Select(top_k=1),
    )
    changes = {
        "levels": (token, block),
        "heads": Heads(query=4, kv=2),
        "index": Index(heads=2, dim=1),
    }
    spec = spec.model_copy(update=changes)
    x = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec, 1, 6, 6).items()}
    assert "w_index" not in x
    x["k_index"][0, :, 0] = torch.tensor([1.0, 2.0, 5.0, 0.0, -3.0, 3.0])
    x["q_index"][0, :, 0], x["q_index"][0, :, 1] = 1.0, -1.0
    result = reference(spec, x)
    assert result.scores["chunk"][0, 5].tolist() == [[2.0, 5.0, 3.0], [-1.0, 0.0, 3.0]]
    assert result.selection["chunk"].indices[0, 5].tolist() == [[1], [2]]


def test_masses_by_the_sum_of_another_level():
    """Coarse means 0 and ln 2: the sum is of nothing, then 1, then 1 + 2; tokens weigh 1, 1, 2, 2."""
    log2 = math.log(2)
    spec, x = one_head(k=[0, 0, log2, log2], v=[0] * 4, q=[1] * 4)
    plain = Score(form="dot", scale="none")
    coarse = Level(name="coarse", partition=blocks(2), pool=Pool(keys="mean"), score=plain)
    borrowed = plain.model_copy(update={"normalise": "softmax", "lse_from": "coarse"})
    fine = Level(name="chunk", partition=Tokens(), score=borrowed, select=Select(top_k=4))
    x = {name: t.requires_grad_() for name, t in x.items()}
    result = reference(spec.model_copy(update={"levels": (coarse, fine)}), x)
    scores = result.scores["chunk"][0, :, 0]
    assert scores[0].tolist() == [0.0, -INF, -INF, -INF]
    assert scores[1].tolist() == [1.0, 1.0, -INF, -INF]
    assert scores[2].tolist() == pytest.approx([1.0, 1.0, 2.0, -INF])
    assert scores[3].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    scores[scores.isfinite()].sum().backward()
    assert x["q"].grad.isfinite().all()


@pytest.mark.parametrize(("how", "expected"), [("max", [2.0, 5.0]), ("sum", [3.0, 9.0])])
def test_map_takes_entries_inside(how, expected):
    # tokens score 1 2 5 4; row 3 has both blocks, row 2 lacks the last token of the second
    spec, x = one_head(k=[1, 2, 5, 4], v=[0] * 4, q=[1] * 4)
    token = Level(name="token", partition=Tokens(), score=Score(form="dot", scale="none"))
    block = Level(
        name="chunk",
        partition=blocks(2),
        score=Score(source="token", map=how),
        select=Select(top_k=1),
    )
    result = reference(spec.model_copy(update={"levels": (token, block)}), x)
    assert result.scores["chunk"][0, 3, 0].tolist() == expected
    assert result.scores["chunk"][0, 2, 0].tolist() == [expected[0], -INF]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [2.0, 6.0]),
        ("max", [3.0, 7.0]),
        ("sum_rsqrt", [4 / 2**0.5, 12 / 2**0.5]),
        ("linear", [23.0, 43.0]),
    ],
)
def test_pooling_by_hand(how, expected):
    # linear, position 10 and 0, weight 1 and 4: (1 + 10) * 1 + (3 + 0) * 4, (5 + 10) * 1 + (7 + 0) * 4
    spec, x = one_head(k=[1, 3, 5, 7], v=[0] * 4, q=[1] * 4, chunk=2)
    spec = with_level(spec, pool=Pool(keys=how, position="learned" if how == "linear" else None))
    x["chunk_key_weight"] = torch.tensor([1.0, 4.0]).reshape(1, 2, 1, 1)
    x["chunk_key_position"] = torch.tensor([10.0, 0.0]).reshape(1, 2, 1)
    result = reference(spec, x)
    assert result.scores["chunk"][0, 3, 0].tolist() == pytest.approx(expected)


def test_sum_by_the_root_counts_the_tokens_there_are():
    """A short last entry, which counts where nothing is causal, of 1 token: 9 / sqrt(1)."""
    spec, x = one_head(k=[1, 3, 5, 7, 9], v=[0] * 5, q=[1] * 5, chunk=2)
    spec = with_level(spec, pool=Pool(keys="sum_rsqrt")).model_copy(update={"causal": False})
    assert reference(spec, x).scores["chunk"][0, 0, 0].tolist() == pytest.approx(
        [4 / 2**0.5, 12 / 2**0.5, 9.0]
    )


def test_bound_by_hand():
    """Pages (1, -4), (3, 2) and (-1, 0), (-5, 6), queries (2, 3), (-1, 1) and (0, -2).

    Page 0 lies in [1, 3] x [-4, 2], page 1 in [-5, -1] x [0, 6].
    """
    spec, x = one_head(k=[0] * 4, v=[0] * 4, q=[0] * 4, chunk=2, top_k=2)
    spec = with_level(spec, pool=Pool(keys="minmax"), score=Score(form="bound", scale="none"))
    spec = spec.model_copy(update={"head_dim": HeadDim(qk=2, v=1), "causal": False})
    keys = [[1.0, -4.0], [3.0, 2.0], [-1.0, 0.0], [-5.0, 6.0]]
    x["k"] = torch.tensor(keys).reshape(1, 4, 1, 2)
    x["q"] = torch.tensor([[2.0, 3.0], [-1.0, 1.0], [0.0, -2.0], [0.0, 0.0]]).reshape(1, 4, 1, 2)
    scores = reference(spec, x).scores["chunk"][0, :, 0]
    # 2 * 3 + 3 * 2, 2 * -1 + 3 * 6; -1 * 1 + 2, -1 * -5 + 6; -2 * -4, -2 * 0
    assert scores.tolist() == [[12.0, 16.0], [1.0, 11.0], [8.0, 0.0], [0.0, 0.0]]


def test_no_key_scores_above_the_bound_of_its_page():
    spec, x = one_head(k=[0] * 32, v=[0] * 32, q=[0] * 32, chunk=4, top_k=8)
    bounded = with_level(spec, pool=Pool(keys="minmax"), score=Score(form="bound"))
    dims = {"head_dim": HeadDim(qk=6, v=1)}
    x["k"], x["q"] = torch.randn(1, 32, 1, 6), torch.randn(1, 32, 1, 6)
    bounds = reference(bounded.model_copy(update=dims), x).scores["chunk"][0, -1, 0]
    logits = (x["q"][0, -1, 0].double() @ x["k"][0, :, 0].double().T) * 6**-0.5
    best = logits.reshape(8, 4).amax(-1)
    assert (bounds >= best).all()
    assert (bounds > best).any()


@pytest.mark.parametrize(("how", "expected"), [("sum", 7.0), ("mean", 3.5), ("max", 4.0)])
def test_heads_of_a_group_agree(how, expected):
    spec, x = one_head(k=[1], v=[0], q=[0], chunk=1)
    spec = with_level(spec, score=Score(form="dot", scale="none", share="group", reduce=how))
    spec = spec.model_copy(update={"heads": Heads(query=2, kv=1)})
    x["q"] = torch.tensor([3.0, 4.0]).reshape(1, 1, 2, 1)
    result = reference(spec, x)
    assert result.scores["chunk"].shape == (1, 1, 1, 1)
    assert result.scores["chunk"].item() == expected


# --- what is visible


def test_block_counts_from_its_last_token_on():
    spec, x = one_head(k=[1] * 9, v=[0] * 9, q=[1] * 9, chunk=4, top_k=8)
    candidates = reference(with_level(spec, select=Select(top_k=8)), x).candidates["chunk"][0, :, 0]
    assert candidates.sum(-1).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_rows_before_the_first_block_are_empty():
    spec, x = one_head(k=[1] * 3, v=[5] * 3, q=[1] * 3, chunk=4)
    x = {name: t.requires_grad_() for name, t in x.items()}
    result = reference(with_level(spec, select=Select(top_k=1)), x)
    assert result.o.flatten().tolist() == [0.0] * 3
    assert result.lse["selected"].flatten().tolist() == [-INF] * 3
    result.o.sum().backward()
    assert all(t.grad.flatten().tolist() == [0.0] * 3 for t in x.values())


def test_short_last_block_counts_without_causality():
    spec, x = one_head(k=[2, 2, 6], v=[0] * 3, q=[1] * 3, chunk=2, causal=False)
    result = reference(spec, x)
    assert result.scores["chunk"][0, 0, 0].tolist() == [2.0, 6.0]


@pytest.mark.parametrize(("first", "last", "row"), [(1, 0, 5), (0, 2, 5), (1, 2, 0), (3, 0, 2)])
def test_forced_entries_reach_up_to_the_row(first, last, row):
    spec, x = one_head(k=[0] * 8, v=[0] * 8, q=[0] * 8, chunk=2)
    force = Force(first=first, last=last)
    spec = with_level(spec, select=Select(top_k=4, force=force))
    own = row // 2
    expected = {e for e in range(first) if e <= own} | {e for e in range(own - last + 1, own + 1)}
    forced = reference(spec, x).forced["chunk"][0, row, 0]
    assert {e for e in range(4) if forced[e]} == {e for e in expected if e >= 0}


@pytest.mark.parametrize(("counted", "expected"), [(True, [0, 3]), (False, [0, 1, 2, 3])])
def test_uncounted_entries_come_on_top(counted, expected):
    spec, x = one_head(k=[9, 9, 2, 2, 1, 1, 0], v=[0] * 7, q=[1] * 7, chunk=2)
    force = Force(first=1, last=1, counted=counted)
    result = reference(with_level(spec, select=Select(top_k=2, force=force)), x)
    assert chosen_sets(result, "chunk")[6] == expected
    assert result.selection["chunk"].indices.shape[-1] == (2 if counted else 4)


def test_forced_twice_frees_its_slot():
    spec, x = one_head(k=[1, 5, 3], v=[0] * 3, q=[1] * 3, chunk=1)
    spec = with_level(spec, select=Select(top_k=2, force=Force(first=1, last=1)))
    assert chosen_sets(reference(spec, x), "chunk") == [[0], [0, 1], [0, 2]]


def test_window_has_exactly_its_tokens():
    spec, x = one_head(k=[0] * 6, v=[1, 2, 4, 8, 16, 32], q=[0] * 6)
    spec = spec.model_copy(update={"levels": (), "attend": (Attend(name="window", window=2),)})
    assert reference(spec, x).o.flatten().tolist() == [1.0, 1.5, 3.0, 6.0, 12.0, 24.0]


def test_window_looks_both_ways_without_causality():
    spec, x = one_head(k=[0] * 3, v=[3, 6, 12], q=[0] * 3, causal=False)
    spec = spec.model_copy(update={"levels": (), "attend": (Attend(name="window", window=2),)})
    assert reference(spec, x).o.flatten().tolist() == [4.5, 7.0, 9.0]


@pytest.mark.parametrize("spec", SYSTEMS.values(), ids=SYSTEMS)
def test_no_rows_make_no_outputs(spec):
    result = reference(spec, random(spec, 0))
    assert result.o.shape == (1, 0, spec.heads.query, 2)


# --- the order


def test_order_is_by_class_value_position():
    scores = torch.tensor([0.0, NAN, 3.0, -0.0, 1e-42, -INF, 3.0, 7.0, INF])
    candidates = torch.tensor([True] * 7 + [False, True])
    forced = torch.tensor([False] * 5 + [True] + [False] * 3)
    assert order(scores, candidates, forced).tolist() == [5, 8, 2, 6, 0, 3, 4, 1, 7]


def test_float64_scores_are_not_flushed():
    scores = torch.tensor([0.0, 1e-300], dtype=torch.float64)
    everything, nothing = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    assert order(scores, everything, nothing).tolist() == [1, 0]


def test_ties_go_to_the_lower_position():
    spec, x = one_head(k=[0] * 12, v=[0] * 12, q=[1] * 12, chunk=2, top_k=3)
    assert chosen_sets(reference(spec, x), "chunk")[11] == [0, 1, 5]


# --- laws


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_everything_selected_is_dense_attention(group, causal):
    spec = moba(top_k=4, group=group, causal=causal)
    x = random(spec, 13, B=2)
    torch.testing.assert_close(reference(spec, x).o, dense(x, causal=causal))


def test_endless_beam_is_exhaustive():
    x = random(hisa(), 22)
    token = hisa().levels[1].model_copy(update={"within": None})
    flat = hisa().model_copy(update={"levels": (token,)})
    mine = reference(hisa(beam=6), x)
    assert chosen_sets(mine, "token") == chosen_sets(reference(flat, x), "token")


@pytest.mark.parametrize("spec", SYSTEMS.values(), ids=SYSTEMS)
def test_packed_documents_are_separate(spec):
    lengths = [5, 0, 1, 12]
    parts = [random(spec, n, seed=7) for n in lengths]
    kinds = tensor_kinds(spec)
    packed = {
        name: parts[0][name]
        if kind == "parameter"
        else torch.cat([part[name][0] for part in parts])
        for name, kind in kinds.items()
    }
    parts = [{n: packed[n] if kinds[n] == "parameter" else t for n, t in p.items()} for p in parts]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    result = reference(spec, packed, cu_seqlens_q=ends)
    separate = [reference(spec, part) for part in parts]
    torch.testing.assert_close(result.o, torch.cat([r.o[0] for r in separate]))
    for name, selection in result.selection.items():
        alone = torch.cat([r.selection[name].indices[0] for r in separate])
        assert torch.equal(selection.indices, alone)


@pytest.mark.parametrize("spec", SYSTEMS.values(), ids=SYSTEMS)
def test_later_rows_are_rows_of_the_whole(spec):
    x = random(spec, 21)
    tail = {n: t[:, 13:] if tensor_kinds(spec)[n] == "query" else t for n, t in x.items()}
    whole = reference(spec, x)
    for options in ({}, {"q_offset": 13}, {"q_offset": torch.tensor([13])}):
        torch.testing.assert_close(reference(spec, tail, **options).o, whole.o[:, 13:])


@pytest.mark.parametrize("spec", SYSTEMS.values(), ids=SYSTEMS)
def test_keys_past_kv_lens_do_not_exist(spec):
    x = random(spec, 21, B=2)
    kinds = tensor_kinds(spec)
    result = reference(spec, x, kv_lens=torch.tensor([21, 14]), q_offset=0)
    short = {n: t[1:, :14] if kinds[n] == "key" else t for n, t in x.items()}
    short = {n: t[1:] if kinds[n] == "query" else t for n, t in short.items()}
    torch.testing.assert_close(result.o[1:], reference(spec, short, q_offset=0).o)


@pytest.mark.parametrize("spec", SYSTEMS.values(), ids=SYSTEMS)
def test_chunks_of_rows_change_nothing(spec, monkeypatch):
    x = random(spec, 21)
    whole = reference(spec, x)
    monkeypatch.setattr("hsgen.reference.sequence.CHUNK_ELEMENTS", 4 * 21 * 5)
    chunked = reference(spec, x)
    torch.testing.assert_close(chunked.o, whole.o, rtol=1e-13, atol=1e-13)
    assert chunked.scores.keys() == whole.scores.keys()


@pytest.mark.parametrize("spec", SYSTEMS.values(), ids=SYSTEMS)
def test_gradients_are_right(spec):
    x = random(spec, 13)
    chosen = reference(spec, x).selection
    names = list(x)

    def run(*tensors):
        result = reference(spec, dict(zip(names, tensors, strict=True)), selection=chosen)
        return (result.o, *(lse.clamp(min=-1e3) for lse in result.lse.values()))

    assert torch.autograd.gradcheck(run, [x[n].requires_grad_() for n in names], fast_mode=True)


@pytest.mark.parametrize("spec", SYSTEMS.values(), ids=SYSTEMS)
def test_own_selection_given_back_changes_nothing(spec):
    x = random(spec, 21)
    result = reference(spec, x)
    again = reference(spec, x, selection=result.selection)
    assert torch.equal(again.o, result.o)


def test_given_selections_are_sets():
    x = random(moba(), 13)
    plain = torch.tensor([0, 2, -1, -1], dtype=torch.int32).expand(1, 13, 2, 4)
    messy = torch.tensor([-1, 2, 7, 0, 2, -5, 0], dtype=torch.int32).expand(1, 13, 2, 7)
    expected = reference(moba(), x, selection={"chunk": plain})
    result = reference(moba(), x, selection={"chunk": messy})
    assert torch.equal(result.o, expected.o)
    bitmap = to_bitmap(expected.selection["chunk"], 4)
    assert isinstance(bitmap, BitmapSelection)
    assert torch.equal(reference(moba(), x, selection={"chunk": bitmap}).o, expected.o)


def test_given_selection_never_shows_the_future():
    x = random(moba(), 13)
    everything = torch.arange(4, dtype=torch.int32).expand(1, 13, 2, 4)
    result = reference(moba(), x, selection={"chunk": everything})
    torch.testing.assert_close(result.o, dense(x))


def test_union_counts_a_raw_token_once():
    spec = moba(top_k=4)
    twice = spec.model_copy(
        update={
            "attend": (*spec.attend, Attend(name="window", window=6)),
            "combine": Combine(softmax="union"),
        }
    )
    x = random(spec, 13)
    result = reference(twice, x)
    torch.testing.assert_close(result.o, dense(x))
    assert list(result.lse) == ["o"]


def test_union_counts_pooled_entries_as_keys_of_their_own():
    # keys are 0: the row sees 4 raw tokens of value 1 and 2 pooled entries of value 7
    spec, x = one_head(k=[0] * 4, v=[1] * 4, q=[0] * 4, chunk=2)
    level = spec.levels[0].model_copy(
        update={"kv": "other", "pool": Pool(keys="mean", values="mean"), "select": None}
    )
    branches = (Attend(name="pooled", over="chunk", values="pooled"), Attend(name="w", window=9))
    spec = spec.model_copy(
        update={"levels": (level,), "attend": branches, "combine": Combine(softmax="union")}
    )
    x |= {"k_other": x["k"], "v_other": torch.full_like(x["v"], 7.0)}
    assert reference(spec, x).o[0, 3].item() == pytest.approx((4 * 1 + 2 * 7) / 6)


def test_three_levels_narrow_one_another():
    def level(name, within, partition, select):
        return Level(
            name=name,
            within=within,
            partition=partition,
            pool=Pool(keys="mean"),
            score=Score(form="dot"),
            select=select,
        )

    levels = (
        level("top", None, blocks(8), Select(beam=2, force=Force(last=1))),
        level("middle", "top", blocks(2), Select(beam=3, force=Force(last=1))),
        level("token", "middle", Tokens(), Select(top_k=4)),
    )
    spec = moba().model_copy(
        update={"levels": levels, "attend": (Attend(name="selected", over="token"),)}
    )
    result = reference(spec, random(spec, 37))
    top, middle, token = (chosen_sets(result, name) for name in ("top", "middle", "token"))
    for t in range(37):
        assert {e // 4 for e in middle[t]} <= set(top[t])
        assert {e // 2 for e in token[t]} <= set(middle[t])
        assert t // 2 in middle[t]
        assert len(token[t]) == min(4, sum(min(2, t - 2 * e + 1) for e in middle[t]))


def test_tensor_names_follow_from_the_spec():
    assert set(tensor_shapes(nsa(), 1, 5, 7)) == {
        *("q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "gates"),
        *("cmp_key_weight", "cmp_key_position", "cmp_value_weight", "cmp_value_position"),
    }
    shapes = tensor_shapes(hisa(), 2, 5, 7)
    assert shapes["q_index"] == (2, 5, 3, 4)
    assert shapes["k_index"] == (2, 7, 4)
    assert shapes["w_index"] == (2, 5, 3)
    assert set(shapes) == {"q", "k", "v", "q_index", "k_index", "w_index"}
