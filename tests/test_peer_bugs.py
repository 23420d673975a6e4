"""What went wrong in implementations by others, each with the smallest case that would show it here.

docs/peer_bugs.md lists them all, also those that tests elsewhere show; what it says of tests is held here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsgen import passes, planner, schedule
from hsgen.reference import Result, reference, tensor_shapes
from hsgen.spec import Spec, load, parse
from hsgen.target import Target

INF = float("inf")
TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "peer_bugs.md"

CHUNKS = """
hsgen: 1
name: chunks
heads: {query: QUERY, kv: KV}
head_dim: DIM
causal: CAUSAL
levels:
  - name: chunk
    partition: {blocks: 2}
    pool: {POOL}
    score: {form: dot, scale: 1}
    select: SELECT
attend: [{name: selected, over: chunk}]
"""

MASSES = """
hsgen: 1
name: masses
heads: {query: 2, kv: 1}
head_dim: 1
levels:
  - name: compressed
    partition: {blocks: 2}
    pool: {keys: mean}
    score: {form: dot, normalise: softmax, share: group, reduce: sum}
  - name: block
    partition: {blocks: 2}
    score: {from: compressed, map: sum}
    select: {top_k: BUDGET}
attend:
  - {name: selected, over: block}
"""

TOKENS = """
hsgen: 1
name: tokens
heads: {query: 2, kv: 1}
head_dim: {qk: 2, v: 1}
index: {heads: 2, dim: 1}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: BUDGET}
attend: [{name: selected, over: token, storage: latent}]
"""

MAXIMA = """
hsgen: 1
name: maxima
heads: {query: 2, kv: 1}
head_dim: 1
index: {heads: 1, dim: 1}
levels:
  - name: token
    partition: tokens
    score: {form: index_dot, share: group}
  - name: block
    partition: {blocks: 2}
    score: {from: token, map: max}
    select: {top_k: 3, force: {last: 2}}
attend: [{name: selected, over: block}]
"""


def chunks(
    select: str,
    *,
    query: int = 1,
    kv: int = 1,
    dim: int = 1,
    causal: bool = True,
    pool: str = "keys: mean",
) -> Spec:
    return parse(
        CHUNKS.replace("SELECT", select)
        .replace("QUERY", str(query))
        .replace("KV", str(kv))
        .replace("DIM", str(dim))
        .replace("CAUSAL", str(causal).lower())
        .replace("POOL", pool)
    )


def zeros(spec: Spec, T: int, S: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a call, all of them 0."""
    shapes = tensor_shapes(spec, 1, T, S or T)
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def of(spec: Spec, T: int, S: int | None = None, **given: list[float] | float) -> dict[str, Tensor]:
    """A call of one number a token, the same for all heads; the others are 0."""
    x = zeros(spec, T, S)
    for name, numbers in given.items():
        column = torch.tensor(numbers, dtype=torch.float64).reshape(
            1, -1, *[1] * (x[name].ndim - 2)
        )
        x[name] = column.expand(x[name].shape).clone()
    return x


def chosen(result: Result, level: str) -> list[list[int]]:
    """The slots of each row of head 0, as they are handed out."""
    return result.selection[level].indices[0, :, 0].tolist()


def slope(x: Tensor) -> Tensor:
    """The gradient that has reached a tensor."""
    assert x.grad is not None
    return x.grad


TIERS = """
hsgen: 1
name: tiers
heads: {query: 1, kv: 1}
head_dim: 1
causal: false
levels:
  - name: block
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot}
    select: {quota: [{merge: MERGE, fraction: 1.0}]}
attend: [{name: pyramid, over: block, values: tiers, bias: log_count}]
"""

SHARES = """
hsgen: 1
name: shares
heads: {query: 1, kv: 1}
head_dim: DIM
causal: false
levels:
  - name: block
    partition: {blocks: 2}
    pool: {keys: mean}
    score: {form: dot, scale: 0.5, normalise: softmax}
    select: SELECT
attend: [{name: selected, over: block, scale: 0.5}]
"""

# What is chosen -----------------------------------------------------------------------------------


def test_a_past_block_without_mass_is_not_lost():
    """XunhaoLai's NSA: masses that underflow to 0 tie with blocks to come, which are struck out."""
    spec = parse(MASSES.replace("BUDGET", "3"))
    x = of(spec, 10, q=1.0, k=[900, 900, -900, -900, -900, -900, -900, -900, -900, -900])
    rows = chosen(reference(spec, x), "block")
    assert rows[7] == rows[9] == [0, 1, 2]
    assert rows[5] == [0, 1, 2]
    assert rows[3] == [0, 1, -1]


def test_a_chosen_block_is_attended_however_small_its_mass():
    """lucidrains' NSA: a chosen block counts only where its probability is above 1e-10."""
    spec = parse(MASSES.replace("BUDGET", "2"))
    # block 1 has the least mean, and the token that matters most
    x = of(spec, 4, q=1.0, k=[0, 0, -900, 100], v=[1, 1, 1, 5])
    assert reference(spec, x).o[0, 3].flatten().tolist() == pytest.approx([5.0, 5.0])


@pytest.mark.parametrize("budget", [1, 3, 5])
def test_a_budget_that_is_no_power_of_two_is_that_budget(budget: int):
    """fla's NSA: with an int, as many blocks are attended as the next power of two."""
    spec = parse(MASSES.replace("BUDGET", str(budget)))
    result = reference(spec, of(spec, 16, q=0.0, v=[*range(16)]), keep_seen=True)
    assert chosen(result, "block")[15] == [*range(budget)]
    assert result.seen["selected"][0, 15].sum(-1).tolist() == [2 * budget]


def test_a_budget_of_one_is_the_own_chunk():
    """MoBA (pull request 26): top-k 1 falls through to full attention."""
    spec = chunks("{top_k: 1, force: {last: 1}}")
    o = reference(spec, of(spec, 6, q=0.0, v=[1, 3, 10, 30, 100, 300])).o.flatten().tolist()
    assert o == [1, 2, 10, 20, 100, 200]


@pytest.mark.parametrize("best", [0, 1])
def test_means_are_not_rounded_before_they_choose(best: int):
    """FlashMoBA: means are stored in bf16, which has nothing between 1 and 1 + 2^-7."""
    spec = chunks("{top_k: 1}")
    keys = [1.0] * 6
    keys[2 * best] += 2.0**-7  # of bf16 itself; the mean, 1 + 2^-8, is not
    x = of(spec, 6, q=1.0, k=keys)
    assert chosen(reference(spec, x, dtype=torch.float32), "chunk")[5] == [best]


def test_local_blocks_before_the_first_are_no_duplicates():
    """MiniMax-M3: of two local blocks the second is clamped to block 0, which then comes twice."""
    spec = parse(MAXIMA)
    result = reference(spec, of(spec, 6, q=0.0, v=[1, 2, 3, 4, 5, 6]))
    assert chosen(result, "block")[:4] == [[0, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, -1]]
    assert result.o[0, :, 0, 0].tolist() == [1, 1.5, 2, 2.5, 3, 3.5]


def test_a_choice_is_ascending_whatever_the_scores():
    """MiniMax-M3 and fla's NSA list the best first: what stops at the first -1 reads a part of it."""
    spec = parse(MAXIMA)
    x = of(spec, 8, q_index=1.0, k_index=[9, 9, 1, 1, 5, 5, 3, 3])
    assert chosen(reference(spec, x), "block")[7] == [0, 2, 3]


# Tokens by an index -------------------------------------------------------------------------------


def test_rows_shorter_than_the_budget_have_no_token_twice():
    """tilelang's selector: its output begins as zeros, so a short row has token 0 over and over."""
    spec = parse(TOKENS.replace("BUDGET", "4"))
    x = of(spec, 3)
    x["k"][0, :, 0, 0] = torch.tensor([0.0, 6.0, 12.0])  # latent: its first channel is the value
    result = reference(spec, x)
    assert chosen(result, "token") == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]
    assert result.o[0, :, 0, 0].tolist() == pytest.approx([0.0, 3.0, 6.0])


def test_a_plateau_of_thousands_keeps_exactly_the_budget():
    """sglang (30645), tilelang: a buffer for 4096 ties overflows; indices are what memory held."""
    spec = parse(TOKENS.replace("BUDGET", "7"))
    result = reference(spec, of(spec, 1, 6000))
    assert chosen(result, "token") == [[*range(7)]]


def test_scores_that_half_precision_cannot_tell_apart():
    """sgl-kernel (sglang 37591): winners that share an fp16 bucket with too many others are dropped."""
    spec = parse(TOKENS.replace("BUDGET", "3"))
    keys = [1 + 2.0**-20 * (i * 7 % 500) for i in range(500)]
    x = of(spec, 1, 500, q_index=1.0, w_index=1.0, k_index=keys)
    best = sorted(sorted(range(500), key=lambda i: -keys[i])[:3])
    assert chosen(reference(spec, x, dtype=torch.float32), "token") == [best]


def test_weights_of_heads_change_the_order():
    """fla's naive DSA says of its weights that they do not: true of a single head only."""
    spec = parse(TOKENS.replace("BUDGET", "1"))
    x = zeros(spec, 1, 2)
    x["q_index"][0, 0, :, 0] = torch.tensor([1.0, -1.0])
    x["k_index"][0, :, 0] = torch.tensor([2.0, -3.0])  # head 0 has 2 and 0, head 1 has 0 and 3
    for weights, best in (([1.0, 1.0], 1), ([2.0, 1.0], 0), ([1.0, -1.0], 0)):
        x["w_index"][0, 0] = torch.tensor(weights)
        assert chosen(reference(spec, x), "token") == [[best]]


def test_heads_are_cut_at_zero_before_they_are_summed():
    """mlx-lm (531): no ReLU, and no sum over heads."""
    spec = parse(TOKENS.replace("BUDGET", "1"))
    x = zeros(spec, 1, 2)
    x["q_index"][0, 0, :, 0] = torch.tensor([1.0, -4.0])
    x["k_index"][0, :, 0] = torch.tensor([2.0, 1.0])  # 2 - 8 and 1 - 4, but 2 + 0 and 1 + 0
    x["w_index"][:] = 1.0
    assert chosen(reference(spec, x), "token") == [[0]]


def test_a_row_without_keys_has_a_sum_of_nothing():
    """FlashMLA: a row with no valid key has a log-sum-exp of +inf, which outweighs every other part."""
    spec = parse(TOKENS.replace("BUDGET", "2"))
    nothing = torch.full((1, 2, 1, 2), -1, dtype=torch.int32)
    result = reference(spec, of(spec, 2, k=1.0), selection={"token": nothing})
    assert result.lse["selected"].flatten().tolist() == [-INF] * 4
    assert result.o.flatten().tolist() == [0.0] * 4


def test_a_part_of_a_heads_pairs_keeps_no_pair_more():
    """DraftAttention: the pair at the percentile is kept as well, so that a tenth of 100 is 11."""
    spec = parse(SHARES.replace("DIM", "1").replace("SELECT", "{fraction: 0.1, scope: head}"))
    x = of(spec, 20, q=[1.0] * 20, k=[*range(20)])
    x["q"] = x["q"][:, :10] * torch.linspace(0.1, 1.0, 10).view(1, 10, 1, 1).double()
    kept = reference(spec, x).selection["block"].indices
    assert (kept >= 0).sum() == 10


def test_channels_of_zeros_change_no_choice():
    """SpargeAttn, FlexPrefill: heads padded to their sizes, and a `scale` that only attention hears of."""
    select = "{top_p: {mass: 0.7}}"
    narrow, wide = (parse(SHARES.replace("DIM", d).replace("SELECT", select)) for d in ("4", "16"))
    generator = torch.Generator().manual_seed(3)
    shapes = tensor_shapes(narrow, 1, 12, 12)
    x = {n: 3 * torch.randn(s, generator=generator).double() for n, s in shapes.items()}
    padded = {n: torch.nn.functional.pad(y, (0, 12)) for n, y in x.items()}
    one, other = reference(narrow, x), reference(wide, padded)
    assert chosen(one, "block") == chosen(other, "block")
    torch.testing.assert_close(one.o, other.o[..., :4])


# Softmax ------------------------------------------------------------------------------------------


def test_no_row_leans_on_the_maximum_of_another():
    """FSA: the running maxima of all rows are those of token 0, so rows far below are 0 / 0."""
    spec = chunks("{top_k: 4, force: {last: 1}}")
    x = of(spec, 4, q=[1000.0, -1000.0, 3.0, 1000.0], k=1.0, v=[1, 3, 5, 7])
    result = reference(spec, x, dtype=torch.float32)
    assert result.o.flatten().tolist() == [1, 2, 3, 4]
    expected = [1000, -1000 + torch.tensor(2.0).log().item()]
    assert result.lse["selected"].flatten()[:2].tolist() == pytest.approx(expected)


def test_a_leading_block_that_no_row_sees_makes_no_nan():
    """vLLM (48364): the first chunk of a list is masked as a whole, and exp(-inf + inf) is NaN."""
    spec = chunks("{top_k: 2}")
    x = of(spec, 2, 8, q=1.0, k=1.0, v=[*range(8)])
    later_first = torch.tensor([3, 0], dtype=torch.int32).expand(1, 2, 1, 2)
    x |= {name: each.requires_grad_() for name, each in x.items()}
    result = reference(spec, x, q_offset=0, selection={"chunk": later_first})
    assert result.o.flatten().tolist() == [0.0, 0.5]
    result.o.sum().backward()
    assert all(torch.isfinite(slope(each)).all() for each in x.values())


def test_without_a_mask_only_what_is_chosen_is_attended():
    """pytorch (188484): where no token is masked, block sparsity is ignored."""
    spec = chunks("{top_k: 1}", causal=False)
    x = of(spec, 6, q=1.0, k=[0, 0, 1, 1, 0, 0], v=[9, 9, 2, 4, 9, 9])
    assert reference(spec, x).o.flatten().tolist() == [3.0] * 6


@pytest.mark.parametrize("merge", [1, 2, 4, 8])
def test_the_last_token_of_a_short_block_counts_once(merge: int):
    """PSA: it fills up its block, and in means it counts once more for each place that it fills."""
    spec = parse(TIERS.replace("MERGE", str(merge)))
    x = of(spec, 1, 11, k=0.0, v=[*range(10), 1000])
    assert reference(spec, x).o.item() == pytest.approx(1045 / 11)


# Gradients ----------------------------------------------------------------------------------------


def test_a_key_of_many_rows_gets_all_their_gradients_and_a_duplicate_adds_none():
    """cudnn-frontend (384, 385, 676): wrong where rows share keys or a list has one twice; NaN at -1."""
    spec = chunks("{top_k: 3}", query=3)
    x = of(spec, 4, q=0.0, v=1.0)
    x["v"].requires_grad_()
    lists = torch.tensor([[0, 0, -1], [-1, 0, 0], [0, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    given = lists[None, :, None].expand(1, 4, 3, 3)
    reference(spec, x, selection={"chunk": given}).o.sum().backward()
    # row 0 sees token 0, rows 1 and 2 half of each; three heads each
    assert slope(x["v"]).flatten().tolist() == [6.0, 3.0, 0.0, 0.0]


def test_gradients_of_a_key_head_are_summed_over_its_group():
    """XunhaoLai's NSA (27): query heads interleaved with key heads, so gradients reach other heads."""
    grouped = chunks("{top_k: 2, force: {last: 1}}", query=6, kv=2)
    repeated = chunks("{top_k: 2, force: {last: 1}}", query=6, kv=6)
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(grouped, 1, 7, 7)
    x = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    y = {n: each.clone() if n == "q" else each.repeat_interleave(3, 2) for n, each in x.items()}
    for spec, tensors in ((grouped, x), (repeated, y)):
        for each in tensors.values():
            each.requires_grad_()
        (reference(spec, tensors).o ** 2).sum().backward()
    torch.testing.assert_close(slope(x["q"]), slope(y["q"]))
    for name in ("k", "v"):
        torch.testing.assert_close(slope(x[name]), slope(y[name]).unflatten(2, (2, 3)).sum(3))


# Pooled keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "other"), [("halves", 2), ("neighbours", 1)])
def test_channels_are_turned_in_the_pairs_that_are_said(pairs: str, other: int):
    """DeepSeek's own demo of V3.2: the index turned neighbours where the weights have halves."""
    turned = f"keys: mean, rotate: {{at: first, dims: 4, base: 10.0, pairs: {pairs}}}"
    spec = chunks("{top_k: 1}", dim=4, pool=turned)
    x = zeros(spec, 4)
    x["k"][0, 2:, 0, 0] = 1.0
    found = []
    for channel in range(4):
        x["q"].zero_()
        x["q"][0, 3, 0, channel] = 1.0
        found.append(reference(spec, x).scores["chunk"][0, 3, 0, 1].item())
    expected = torch.zeros(4, dtype=torch.float64)
    place = torch.tensor(2.0, dtype=torch.float64)  # block 1 begins at token 2
    expected[0], expected[other] = place.cos(), place.sin()
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


# Launches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nsa", "moba", "hisa", "infllm_v2", "quest"])
def test_only_the_first_axis_of_a_grid_grows_with_the_call(name: str):
    """flashinfer (3125), fla (172): the others end at 65535, beyond which nothing is launched."""
    spec = load(name).bind(heads=None if load(name).heads else (32, 8))
    bound = spec if spec.head_dim else spec.bind(head_dim=128)
    plan = schedule.schedule(passes.run(planner.plan(bound)), Target.named("h100"))
    grids = [(step, launch.grid) for step in plan.steps for launch in step.launches]
    assert len(grids) >= len(plan.kernels) > 0
    for step, grid in grids:
        turns = dict(step.sizes).get(step.tiles or "", "")  # of which `count` is a part
        assert all(size.isdecimal() or size == "count" and turns.isdecimal() for size in grid[1:])


# The page -----------------------------------------------------------------------------------------

REFERENCE = re.compile(r"`([\w/]+\.py)::(\w+)`")


def listed() -> list[tuple[str, str]]:
    """The tests that the page names: file and function."""
    return REFERENCE.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", sorted({file for file, _ in listed()}))
def test_page_names_tests_that_exist(file: str):
    module = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    there = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    assert {name for other, name in listed() if other == file} <= there


def test_page_names_every_test_of_this_file():
    mine = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    tests = [node.name for node in mine if isinstance(node, ast.FunctionDef)]
    own = {name for file, name in listed() if file == Path(__file__).name}
    assert own == {n for n in tests if n.startswith("test_") and not n.startswith("test_page_")}


def test_page_has_a_test_in_every_line():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert not [row for row in rows[2:] if not REFERENCE.search(row)]
