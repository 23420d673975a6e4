"""Scores in few bits, and masses by the sum of what a branch attends anyway."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import MEAN, SELECTED, UNION, blocks, random_tensors
from plan_cases import spec as make
from plan_cases_estimates import ESTIMATES, LOCAL, proxy, sale

from hsgen.analysis import causality_text, costs, laws
from hsgen.errors import SpecError
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.reference.rounding import stored
from hsgen.selection import members
from hsgen.spec import (
    Attend,
    Force,
    HeadDim,
    Heads,
    Level,
    Score,
    Select,
    Spec,
    Tokens,
    TopP,
    load,
    parse,
)


def test_whole_numbers_of_a_vectors_greatest() -> None:
    """Steps of 1 and of 2: halves go to the even one; a vector of zeros stays."""
    x = torch.tensor([[7.0, 3.5, -2.5, 0.4], [14.0, 5.0, -7.0, -0.9], [0.0, 0.0, 0.0, 0.0]])
    kept = torch.tensor([[7.0, 4.0, -2.0, 0.0], [14.0, 4.0, -8.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(stored(x, "int4"), kept)
    assert torch.equal(stored(x.double(), "int4"), kept.double())


def test_eight_bits_have_steps_of_a_127th() -> None:
    x = torch.tensor([127.0, -63.4, 63.5, 64.5, 1e-3], dtype=torch.float64)
    assert stored(x, "int8").tolist() == [127.0, -63.0, 64.0, 64.0, 0.0]


def test_whole_numbers_are_not_of_bf16() -> None:
    """1.0009765625 = 1 + 2^-10 has no bf16; it is the greatest of its vector, and kept."""
    x = torch.tensor([1.0009765625, 0.0], dtype=torch.float64)
    assert torch.equal(stored(x, "int8"), x)


def test_gradients_pass_rounding() -> None:
    x = torch.tensor([7.0, 3.4], requires_grad=True)
    (stored(x, "int4") * torch.tensor([2.0, 5.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 5.0]


def one_head(levels: list[Level], attend: list[Attend], S: int) -> Spec:
    dims = {"heads": Heads(query=1, kv=1), "head_dim": HeadDim(qk=1, v=S)}
    return make("tiny", levels, attend, combine=UNION, **dims)


def test_a_mass_is_measured_by_what_is_near() -> None:
    """Logits of row 3 are 1 2 0 0 and its window holds tokens 2, 3: their sum is 2, masses e/2, e^2/2.

    Row 0 sees itself alone, a mass of 1; nothing of it is above 1.2.
    """
    token = Level(
        name="block",
        partition=Tokens(),
        score=Score(form="dot", scale="none", normalise="softmax", lse_from="near"),
        select=Select(threshold=1.2),
    )
    spec = one_head([token], [Attend(name="near", window=2, scale=1.0), SELECTED], 4)
    x = {
        "q": torch.ones(1, 4, 1, 1, dtype=torch.float64),
        "k": torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64).view(1, 4, 1, 1),
        "v": torch.eye(4, dtype=torch.float64)[None, :, None],
    }
    result = reference(spec, x)
    scores = result.scores["block"][0, :, 0]
    e = math.e
    torch.testing.assert_close(scores[3], scores.new_tensor([e / 2, e * e / 2, 0.5, 0.5]))
    assert scores[0].tolist() == [1.0, -math.inf, -math.inf, -math.inf]
    chosen = members(result.selection["block"], 4)[0, :, 0]
    assert chosen.tolist() == [
        [False] * 4,
        [False] * 4,  # sees both: e / (e + e^2), e^2 / (e + e^2)
        [False] * 4,  # 1 / (e^2 + 1) e, e^2 / (e^2 + 1): below 1
        [True, True, False, False],
    ]


def by_hand(spec: Spec, x: dict, block: int, rows: int, tau: float) -> torch.Tensor:
    """The card of SALE, one query head after another: any(exp(s4 - m) / l > tau).  -> bool[T, H, N]"""
    q, k = x["q"][0], x["k"][0]
    T, H, D = q.shape
    group = H // k.shape[1]
    kept = torch.zeros(T, H, -(-T // block), dtype=torch.bool)
    for h in range(H):
        for t in range(T):
            exact = (k[: t + 1, h // group] @ q[t, h]) / D**0.5
            near = [s for s in range(t + 1) if s // 2 < 1 or t // 2 - s // 2 < 2]
            m = max(exact[near])
            total = sum((exact[s] - m).exp() for s in near)
            for s in range(t + 1):
                cheap = float(four_bits(q[t, h]) @ four_bits(k[s, h // group])) / D**0.5
                if math.exp(cheap - m) / total > tau:
                    first = t // rows * rows
                    kept[first : first + rows, h, s // block] = True
    return kept


def four_bits(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().max() / 7
    return (x / step).round() * step


def test_blocks_are_kept_as_the_card_has_it() -> None:
    spec = make("sale", sale(), [LOCAL, SELECTED], combine=UNION)
    x = random_tensors(spec, 22, 22)
    result = reference(spec, x)
    found = members(result.selection["block"], 6)[0]
    assert torch.equal(found, by_hand(spec, x, 4, 8, 0.3))
    assert 0 < found.float().mean() < 1


def test_near_tokens_stay_whatever_is_chosen() -> None:
    """Nothing is above the threshold: what is left is the local branch."""
    levels = sale()
    levels[1] = levels[1].model_copy(update={"select": Select(threshold=1e6)})
    spec = make("sale", levels, [LOCAL, SELECTED], combine=UNION)
    x = random_tensors(spec, 22, 22)
    local = reference(make("local", [], [LOCAL]), x)
    torch.testing.assert_close(reference(spec, x).o, local.o)


def test_all_kept_is_dense() -> None:
    levels = sale()
    levels[1] = levels[1].model_copy(update={"select": Select(threshold=-1.0)})
    spec = make("sale", levels, [LOCAL, SELECTED], combine=UNION)
    assert laws(plan(spec)).dense_when_all_selected
    x = random_tensors(spec, 22, 22)
    dense = make("dense", [], [Attend(name="dense", window="all")])
    torch.testing.assert_close(reference(spec, x).o, reference(dense, x).o)


def test_a_union_counts_a_near_token_of_a_kept_block_once() -> None:
    spec = make("sale", sale(), [LOCAL, SELECTED], combine=UNION)
    x = random_tensors(spec, 22, 22)
    x["v"] = torch.ones_like(x["v"])
    torch.testing.assert_close(reference(spec, x).o, torch.ones(1, 22, 4, 5).double())


@pytest.mark.parametrize("spec", ESTIMATES, ids=lambda spec: spec.name)
def test_packed_documents_are_separate_ones(spec: Spec) -> None:
    parts = [random_tensors(spec, n, n, seed=n) for n in (5, 1, 13)]
    tokens = {n for n in parts[0] if n[0] in "qkv" or n == "gates"}
    packed = {
        n: torch.cat([x[n][0] for x in parts]) if n in tokens else parts[0][n] for n in parts[0]
    }
    cu = torch.tensor([0, 5, 6, 19], dtype=torch.int32)
    alone = torch.cat([reference(spec, x).o[0] for x in parts])
    torch.testing.assert_close(reference(spec, packed, cu_seqlens_q=cu).o, alone)


def test_a_level_goes_before_a_branch_of_its_name() -> None:
    named = Level(name="local", partition=blocks(2), pool=MEAN, score=Score(form="dot"))
    spec = make("both", [named, *sale()], [LOCAL, SELECTED], combine=UNION)
    assert plan(spec)["token.mass"].inputs[1] == "local.score_lse"


def test_shipped() -> None:
    spec = load("sale")
    graph = plan(spec)
    assert causality_text(graph) == "query_block(64)"
    assert {"q.int4", "k.int4"} <= {node.name for node in graph.nodes()}
    local = costs(graph)["local.o"].flops.evaluate(131072)
    assert local == pytest.approx(2 * 32 * 256 * (160 * 131072), rel=0.2)  # 32 + 97 to 128 a row


def test_an_unknown_sum_is_a_level_or_a_branch() -> None:
    text = """\
hsgen: 1
name: slip
levels:
  - name: block
    partition: {blocks: 32}
    pool: {keys: mean}
    score: {form: dot, normalise: softmax, lse_from: lokal}
    select: {threshold: 0.01}
attend:
  - {name: local, window: 128}
  - {name: selected, over: block}
combine: {softmax: union}
"""
    with pytest.raises(SpecError) as caught:
        parse(text)
    (found,) = caught.value.diagnostics
    assert (found.code, found.message) == ("HS054", "unknown level or branch 'lokal'")
    assert found.help is not None and found.help.startswith("did you mean 'local'?")


# --- a ranking that heads share, and numbers that they do not


def test_a_head_keeps_the_part_that_the_last_rows_need() -> None:
    """Head 0 looks at one of four blocks, head 1 at all alike: 1/4 and, of 0.9, 4/4 of what a row sees."""
    levels = proxy(4, force=Force(last=1))
    levels[1] = levels[1].model_copy(update={"select": Select(top_p=TopP(mass=0.9))})
    dims = {"heads": Heads(query=2, kv=1), "head_dim": HeadDim(qk=1, v=16)}
    spec = make("tiny", levels, [SELECTED], **dims)
    k = torch.zeros(1, 16, 1, 1, dtype=torch.float64)
    k[:, 4:8] = 1.0
    q = torch.zeros(1, 16, 2, 1, dtype=torch.float64)
    q[:, :, 0] = 50.0
    v = torch.eye(16, dtype=torch.float64)[None, :, None]
    result = reference(spec, {"q": q, "k": k, "v": v})
    chosen = members(result.selection["block"], 4)[0]
    assert members(result.selection["budget"], 4)[0, 15].sum(-1).tolist() == [1, 4]
    assert chosen[:, 0].sum(-1)[::4].tolist() == [1, 1, 1, 1]
    assert chosen[:, 1].sum(-1)[::4].tolist() == [1, 2, 3, 4]
    assert result.scores["block"].shape == (1, 16, 2, 4)
    assert torch.equal(result.scores["block"][:, :, 0], result.scores["block"][:, :, 1])


def test_parts_are_rounded_up_and_no_less_than_the_least() -> None:
    """As the card has it: max(least, ceil(kept of all * seen))."""
    spec = make("proxy", proxy(4, min=2, force=Force(last=1)), [SELECTED])
    x = random_tensors(spec, 40, 40)
    result = reference(spec, x)
    kept = members(result.selection["budget"], 10)[0, -1].sum(-1).tolist()
    chosen = members(result.selection["block"], 10)[0].sum(-1)
    for h, number in enumerate(kept):
        for block in range(10):
            want = max(-(-number * (block + 1) // 10), 2)
            assert chosen[4 * block, h] == min(want, block + 1)
    assert len({*kept}) > 1


def test_heads_of_a_group_rank_alike() -> None:
    """What the head with the smaller number keeps, the other one keeps as well."""
    spec = make("proxy", proxy(4), [SELECTED])
    chosen = members(reference(spec, random_tensors(spec, 40, 40)).selection["block"], 10)[0]
    for a, b in ((0, 1), (2, 3)):
        less, more = chosen[:, a], chosen[:, b]
        assert (less <= more).all() or (more <= less).all()


def test_proxy_attn_ranks_by_strided_means_of_heads() -> None:
    """Softmax over every second key of every second row's mean query, blocks by their greatest."""
    spec = make("proxy", proxy(8), [SELECTED])
    x = random_tensors(spec, 24, 24)
    q = x["q"][0].unflatten(1, (2, 2)).mean(2)[::2]  # [12, Hkv, D]
    k = x["k"][0][::2]
    logits = torch.einsum("thd,shd->ths", q, k) / 6**0.5
    later = torch.arange(12) > torch.arange(12)[:, None]
    mass = logits.masked_fill(later[:, None], -math.inf).softmax(-1)
    worth = mass.unflatten(2, (6, 2)).amax(-1).unflatten(0, (3, 4)).amax(1)  # [3, Hkv, 6]
    found = reference(spec, x).scores["block"][0]
    for block in range(3):
        seen = 2 * block + 2
        torch.testing.assert_close(found[8 * block, ::2, :seen], worth[block, :, :seen])


def test_proxy_attn_is_of_the_prompt() -> None:
    spec = load("proxy_attn")
    graph = plan(spec)
    assert causality_text(graph) == "prompt"
    assert graph["block.selection"].type.dims == ("B", "T/128", "Hq", "W_block")
    assert graph["block.together"].type.dims[2] == "Hkv"


def test_scores_of_heads_with_numbers_of_their_own_are_no_others() -> None:
    levels = proxy()
    more = Level(
        name="more",
        partition=blocks(8),
        score=Score(source="block", map="max"),
        select=Select(threshold=0.1),
    )
    with pytest.raises(
        SpecError, match="'more' reads scores of heads that keep numbers of their own"
    ):
        plan(make("reader", [*levels, more], [Attend(name="selected", over="more")]))
