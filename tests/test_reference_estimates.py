"""Scores in few bits, and masses by the sum of what a branch attends anyway."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import MEAN, SELECTED, UNION, blocks, random_tensors
from plan_cases import spec as make
from plan_cases_estimates import ESTIMATES, LOCAL, gate, learns, proxy, sale

from hsgen.analysis import causality_text, costs, laws
from hsgen.errors import SpecError
from hsgen.planner import plan
from hsgen.reference import reference, tensor_kinds
from hsgen.reference.rounding import stored
from hsgen.selection import members
from hsgen.spec import (
    Attend,
    Force,
    HeadDim,
    Heads,
    Level,
    Query,
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
    kinds, parts = tensor_kinds(spec), [random_tensors(spec, n, n, seed=n) for n in (5, 1, 13)]
    same = {n: y for n, y in parts[0].items() if kinds[n] == "parameter"}
    parts = [x | same for x in parts]
    packed = {n: torch.cat([x[n][0] for x in parts]) for n in kinds if n not in same}
    packed |= same
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


# --- gates that learn the map of attention


def turned(x: torch.Tensor, place: torch.Tensor, base: float = 10.0) -> torch.Tensor:
    """RoPE of the first 4 channels, halves.  [N, H, D], [N]"""
    angle = place[:, None, None] * torch.tensor([1.0, base**-0.5], dtype=x.dtype)
    a, b = x[..., :2], x[..., 2:4]
    first = a * angle.cos() - b * angle.sin()
    return torch.cat((first, a * angle.sin() + b * angle.cos(), x[..., 4:]), -1)


def pooled_keys(x: dict, size: int) -> torch.Tensor:
    """concat(max, min, mean) of a block's keys, mapped head by head.  -> [N, Hkv, D]"""
    k, weight = x["k_gate"][0].unflatten(0, (-1, size)), x["block_key_weight"]
    parts = torch.stack((k.amax(1), k.amin(1), k.mean(1)), 2)  # [N, Hkv, 3, D]
    return torch.einsum("nhsd,hsde->nhe", parts, weight)


def true_map(x: dict) -> torch.Tensor:
    """[T, Hq, S]"""
    q, k = x["q"][0], x["k"][0].repeat_interleave(2, 1)
    logits = torch.einsum("thd,shd->ths", q, k) / 6**0.5
    T = len(q)
    later = torch.arange(T) > torch.arange(T)[:, None]
    return logits.masked_fill(later[:, None], -math.inf).softmax(-1)


def kl(target: torch.Tensor, share: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Mean over rows that see something of KL(target / its sum || share).  [R, H, N], bool[R, 1, N]"""
    target = target * inside
    some = target.sum(-1) > 0
    target, share = (target / target.sum(-1, keepdim=True))[some], share[some]
    return torch.xlogy(target, target / share.clamp(min=1e-300)).sum(-1).mean()


def test_a_prefill_gate_is_its_authors() -> None:
    """Queries by their mean and keys by three maps, turned by the block's first token; softmax, 2-D max."""
    query = Query(block=4, pool="mean", rotate="first")
    spec = make("gate", gate(query, base=10.0), [SELECTED], loss=learns(rows="max"))
    x = random_tensors(spec, 24, 24)
    q = x["q_gate"][0].unflatten(0, (6, 4)).mean(1)
    place = torch.arange(0, 24, 4, dtype=q.dtype)
    k = turned(pooled_keys(x, 4), place).repeat_interleave(2, 1)
    logits = torch.einsum("rhd,nhd->rhn", turned(q, place), k) / 6**0.5
    inside = torch.ones(6, 6, dtype=torch.bool).tril()[:, None]
    mass = logits.masked_fill(~inside, -math.inf).softmax(-1)
    result = reference(spec, x)
    found = result.scores["block"][0, ::4]
    torch.testing.assert_close(found.masked_fill(~inside, 0.0), mass)
    own = torch.eye(6, dtype=torch.bool)[:, None]
    chosen = members(result.selection["block"], 6)[0, ::4]
    assert torch.equal(chosen, ((mass > 0.3) & inside) | own)
    target = true_map(x).unflatten(0, (6, 4)).unflatten(-1, (6, 4)).amax((1, -1))
    torch.testing.assert_close(result.loss["kl"], kl(target, mass, inside))


def test_a_decode_gate_is_its_authors() -> None:
    """A query for each group; keys normed, then turned; of heads and tokens the maximum, row by row."""
    spec = make(
        "gate",
        gate(Query(rotate="token"), share=True, then="norm", base=10.0),
        [SELECTED],
        loss=learns(),
    )
    x = random_tensors(spec, 24, 24)
    assert x["q_gate"].shape == (1, 24, 2, 6)
    k = pooled_keys(x, 4)
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * x["block_key_norm"]
    k = turned(k, torch.arange(0, 24, 4, dtype=k.dtype))
    q = turned(x["q_gate"][0], torch.arange(24, dtype=k.dtype))
    logits = torch.einsum("thd,nhd->thn", q, k) / 6**0.5
    inside = (torch.arange(3, 24, 4) <= torch.arange(24)[:, None])[:, None]
    mass = logits.masked_fill(~inside, -math.inf).softmax(-1).nan_to_num(0.0)
    result = reference(spec, x)
    torch.testing.assert_close(result.scores["block"][0].masked_fill(~inside, 0.0), mass)
    best = true_map(x).unflatten(1, (2, 2)).amax(2).unflatten(-1, (6, 4)).amax(-1)
    torch.testing.assert_close(result.loss["kl"], kl(best, mass, inside))


def test_only_the_gate_learns() -> None:
    spec = make("gate", gate(Query(block=4, pool="mean", rotate="first")), [SELECTED])
    spec = spec.model_copy(update={"loss": learns(rows="max")})
    x = {n: y.requires_grad_() for n, y in random_tensors(spec, 24, 24).items()}
    reference(spec, x).loss["kl"].backward()
    learnt = {n for n, y in x.items() if y.grad is not None and y.grad.abs().sum() > 0}
    assert {"q_gate", "k_gate", "block_key_weight"} <= learnt
    assert not learnt & {"q", "k", "v"}


def test_a_block_is_turned_alike_whether_a_call_ends_with_it_or_not() -> None:
    """Their cache turns a block that a decoding step completes by its last token, others by their first."""
    spec = make("gate", gate(Query(rotate="token"), share=True, base=10.0), [SELECTED])
    x = random_tensors(spec, 24, 24)
    whole = reference(spec, x).scores["block"][0, 11]
    cut = {n: y[:, :12] if y.shape[:2] == (1, 24) else y for n, y in x.items()}
    step = {n: y[:, 11:] if n in ("q", "q_gate") else y for n, y in cut.items()}
    torch.testing.assert_close(reference(spec, step).scores["block"][0, 0], whole[:, :3])


def test_shipped_gates() -> None:
    assert causality_text(plan(load("seer_attention"))) == "query_block(64)"
    assert causality_text(plan(load("seer_attention_r"))) == "token"
