"""What production models do, by hand or by loops written from what is published of their rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hsgen import spec as language
from hsgen.reference import reference, tensor_shapes
from hsgen.reference.rounding import stored
from hsgen.spec import Spec, parse

DSA = """
hsgen: 1
name: dsa
heads: {query: 3, kv: 1}
head_dim: {qk: 6, v: 4}
index: {heads: 2, dim: 4, dtype: fp8}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 5}
attend:
  - {name: selected, over: token, storage: latent, scale: 0.3}
"""

SUMS = """
hsgen: 1
name: sums
heads: {query: 4, kv: 2}
head_dim: 4
index: {heads: HEADS, dim: 3}
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: relu_sum, share: SHARE}
    select: {top_k: 2, force: FORCE}
attend:
  - {name: selected, over: block}
"""


def tensors(spec: Spec, T: int, *, B: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(spec, B, T, T)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def sums(share: str = "all", heads: int = 2, force: str = "{tail: true}") -> Spec:
    text = SUMS.replace("SHARE", share).replace("HEADS", str(heads)).replace("FORCE", force)
    return parse(text)


def sets(indices: Tensor) -> list[set[int]]:
    """The members of rows [..., K]; -1 is none."""
    return [{*row} - {-1} for row in indices.flatten(0, -2).tolist()]


# --- vectors in fewer bits


@pytest.mark.parametrize(
    ("vector", "kept"),
    [
        ([448.0, 1.0], [448.0, 1.0]),  # scale 1
        ([449.0, 1.0], [448.0, 1.0]),  # to bf16 it is 448 (ties to even), so scale 1 again
        ([452.0, 18.0], [448.0, 18.0]),  # scale 2: 226 goes to 224, 9 is a number of e4m3
        ([1.0, 0.0], [1.0, 0.0]),  # scale 2^-8: 256
        ([0.0, 0.0], [0.0, 0.0]),  # the least greatest number keeps the scale from being 0
        ([1.0, 2.0**-15], [1.0, 2.0**-15]),  # 2^-15 / 2^-8 = 2^-7, a normal number of e4m3
        ([1.0, 2.0**-18], [1.0, 0.0]),  # 2^-10 is half of the least subnormal: to even, 0
    ],
)
def test_fp8_takes_a_power_of_two_a_vector(vector: list[float], kept: list[float]) -> None:
    assert stored(torch.tensor(vector).double(), "fp8").tolist() == kept


def test_fp8_unscaled_saturates() -> None:
    vector = torch.tensor([1000.0, -1000.0, 17.0, 1e-9], dtype=torch.float64)
    assert stored(vector, "fp8_unscaled").tolist() == [448.0, -448.0, 16.0, 0.0]


def test_rounding_lets_gradients_pass() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    stored(x, "fp8").sum().backward()
    assert x.grad is not None and (x.grad == 1).all()


# --- DSA: a lightning indexer, all heads on one latent


def lightning(x: dict[str, Tensor], k: int) -> list[set[int]]:
    """Row by row from the published steps; the query's scale goes into its head's weight."""
    q, keys = x["q_index"][0].bfloat16().double(), x["k_index"][0].bfloat16().double()

    def eight_bits(vector: Tensor) -> tuple[Tensor, float]:
        scale = 2.0 ** math.ceil(math.log2(max(float(vector.abs().max()), 1e-4) / 448))
        return (vector / scale).float().to(torch.float8_e4m3fn).double(), scale

    rows = []
    for t in range(len(q)):
        scores = []
        for s in range(t + 1):
            key, key_scale = eight_bits(keys[s])
            total = 0.0
            for h in range(q.shape[1]):
                query, query_scale = eight_bits(q[t, h])
                weight = float(x["w_index"][0, t, h]) * query_scale
                total += weight * max(float(query @ key), 0.0)
            scores.append(total * key_scale)
        best = sorted(range(t + 1), key=lambda s: (-scores[s], s))  # noqa: B023
        rows.append({*best[:k]})
    return rows


def test_dsa_is_its_published_steps() -> None:
    spec = parse(DSA)
    x = tensors(spec, 19)
    result = reference(spec, x)
    chosen = lightning(x, 5)
    assert sets(result.selection["token"].indices) == chosen
    for t, row in enumerate(chosen):
        keys = x["k"][0, sorted(row), 0]  # [n, 6]; the first 4 channels are the value
        weights = (x["q"][0, t] @ keys.T * 0.3).softmax(-1)
        torch.testing.assert_close(result.o[0, t], weights @ keys[:, :4])


def test_latent_needs_no_values() -> None:
    assert "v" not in tensor_shapes(parse(DSA), 1, 4, 4)


def test_a_row_with_equal_scores_takes_the_earliest() -> None:
    """Relu makes plateaus of exact zeros, on which peers' choices depend on the kernel."""
    spec = parse(DSA)
    x = tensors(spec, 12)
    x["k_index"] = -x["k_index"].abs()
    x["q_index"] = x["q_index"].abs()
    chosen = sets(reference(spec, x).selection["token"].indices)
    assert chosen == [{*range(min(t + 1, 5))} for t in range(12)]


def test_dsa_of_documents_is_dsa_of_each() -> None:
    spec = parse(DSA)
    x = {name: y[0] for name, y in tensors(spec, 20).items()}
    cu = torch.tensor([0, 7, 20], dtype=torch.int32)
    packed = reference(spec, x, cu_seqlens_q=cu)
    for a, b in ((0, 7), (7, 20)):
        alone = reference(spec, {name: y[None, a:b] for name, y in x.items()})
        torch.testing.assert_close(packed.o[a:b], alone.o[0])


# --- sums of index heads


def test_heads_of_a_group_are_summed_for_it() -> None:
    """Four index heads, two key heads: heads 0 and 1 score for the first, 2 and 3 for the second."""
    spec = sums("group", 4)
    x = tensors(spec, 16)
    scores = reference(spec, x).scores["block"][0, 15]  # [2, 4]
    pooled = x["k_index"][0].unflatten(0, (4, 4)).mean(1)
    by_head = (x["q_index"][0, 15] @ pooled.T).relu()
    torch.testing.assert_close(scores, torch.stack([by_head[:2].sum(0), by_head[2:].sum(0)]))


def test_weights_of_one_are_no_weights() -> None:
    plain = sums()
    weighted = plain.model_copy(
        update={
            "levels": tuple(
                level.model_copy(
                    update={"score": level.score.model_copy(update={"form": "relu_weighted"})}
                )
                for level in plain.levels
            )
        }
    )
    x = tensors(weighted, 21)
    x["w_index"] = torch.ones_like(x["w_index"])
    torch.testing.assert_close(reference(weighted, x).o, reference(plain, x).o)


# --- the tail


def test_the_tail_is_on_top_of_k_and_ends_with_its_entry() -> None:
    """Token counts as QSA's and k-pool's: budget of 2 blocks of 4, and what is not yet a block."""
    spec = sums()
    result = reference(spec, tensors(spec, 21), keep_seen=True)
    counts = result.seen["selected"][0, :, 0].sum(-1).tolist()
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, *([8, 9, 10, 11] * 3)][:21]
    rows = sets(result.selection["block"].indices)
    assert all((t // 4 in row) or t % 4 == 3 for t, row in enumerate(rows))


def test_the_own_entry_competes_once_it_is_complete() -> None:
    """At t = 11 the query closes block 2, whose score is the least: it is not taken."""
    spec = sums()
    x = tensors(spec, 12)
    x["q_index"] = x["q_index"].abs()
    x["k_index"] = x["k_index"].abs()
    x["k_index"][:, 8:] *= -1
    rows = sets(reference(spec, x).selection["block"].indices)
    assert rows[10] == {0, 1, 2}
    assert rows[11] == {0, 1}


def test_an_own_entry_that_is_not_counted_leaves_k_others() -> None:
    """Step5: k + 1 regions, the own one among them even where the query closes it."""
    spec = sums("group", 4, "{last: 1, counted: false}")
    rows = sets(reference(spec, tensors(spec, 24)).selection["block"].indices)
    for t, row in enumerate(rows[::2]):
        assert t // 4 in row
        assert len(row) == min(t // 4, 2) + 1


# --- one softmax, capped, with a sink, gated


GATED = """
hsgen: 1
name: gated
heads: {query: 2, kv: 1}
head_dim: 2
attend:
  - {name: near, window: 2, softcap: 2, sink: learned}
combine: {output_gate: GATE}
"""


def test_cap_sink_and_gate_by_hand() -> None:
    """Two tokens with logits 2 tanh(1/2) and 0, a sink of log 3, gates of log 3 (sigmoid 3/4)."""
    spec = parse(GATED.replace("GATE", "head"))
    x = {n: torch.zeros(s, dtype=torch.float64) for n, s in tensor_shapes(spec, 1, 2, 2).items()}
    x["q"][0, 1, :, 0] = math.sqrt(2)
    x["k"][0, 0, 0, 0] = 1.0
    x["v"][0, :, 0, 0] = torch.tensor([1.0, 2.0])
    x["near_sink"] += math.log(3)
    x["output_gate"] += math.log(3)
    result = reference(spec, x)
    a = math.exp(2 * math.tanh(0.5))
    assert result.o[0, 1, 0, 0].item() == pytest.approx(0.75 * (a + 2) / (a + 1 + 3))
    assert result.o[0, 0, 0, 0].item() == pytest.approx(0.75 * 1 / (1 + 3))
    assert result.lse["near"][0, 0, 1].item() == pytest.approx(math.log(a + 1))  # no sink in it


def test_gates_of_channels_are_of_channels() -> None:
    by_head, by_channel = (parse(GATED.replace("GATE", each)) for each in ("head", "channel"))
    x = tensors(by_head, 9)
    y = x | {"output_gate": x["output_gate"].unsqueeze(-1).expand(-1, -1, -1, 2)}
    torch.testing.assert_close(reference(by_head, x).o, reference(by_channel, y).o)


def test_a_sink_of_nothing_changes_nothing() -> None:
    spec = parse(GATED.replace("GATE", "head"))
    plain = parse(GATED.replace("GATE", "head").replace(", sink: learned", ""))
    x = tensors(spec, 9)
    without = {name: y for name, y in x.items() if name != "near_sink"}
    x["near_sink"] -= math.inf
    torch.testing.assert_close(reference(spec, x).o, reference(plain, without).o)


def test_an_empty_row_with_a_sink_is_zero_and_has_no_nan() -> None:
    """The query comes before every key: o = 0, lse = -inf, gradients 0."""
    spec = parse(GATED.replace("GATE", "head"))
    x = {name: y.requires_grad_() for name, y in tensors(spec, 3).items()}
    result = reference(spec, x, q_offset=-3)
    assert (result.o == 0).all()
    assert (result.lse["near"] == -math.inf).all()
    result.o.sum().backward()
    assert all(y.grad is None or (y.grad == 0).all() for y in x.values())


# --- MiniMax-M3


def test_minimax_m3_is_as_published() -> None:
    spec = language.load("minimax_m3")
    token, block = spec.levels
    assert spec.heads is not None and spec.index is not None and block.select is not None
    assert (spec.heads.query, spec.heads.kv, spec.index.heads, spec.index.dim) == (64, 4, 4, 128)
    assert (block.partition.size, block.select.top_k, block.select.force.last) == (128, 16, 1)
    assert token.score.scale is None and spec.index.dtype == "input"  # no scale, no rounding


def test_minimax_m3_rows_by_loops() -> None:
    """The greatest q.k of a block that the row sees; own block first; 21 tokens, blocks of 4."""
    spec = language.load("minimax_m3").model_copy(
        update={
            "heads": language.Heads(query=4, kv=2),
            "head_dim": language.HeadDim(qk=4, v=4),
            "index": language.Index(heads=2, dim=4),
        }
    )
    token, block = spec.levels
    select = language.Select(top_k=3, force=language.Force(last=1))
    small = block.model_copy(
        update={"partition": language.Blocks(size=4, stride=4), "select": select}
    )
    spec = spec.model_copy(update={"levels": (token, small)})
    x = tensors(spec, 21)
    rows = sets(reference(spec, x).selection["block"].indices)
    for t in range(21):
        for h in range(2):
            dots = (x["k_index"][0, : t + 1] @ x["q_index"][0, t, h]).tolist()
            best = [max(dots[b * 4 : b * 4 + 4]) for b in range(t // 4 + 1)]
            others = sorted(range(t // 4), key=lambda b: (-best[b], b))  # noqa: B023
            assert rows[2 * t + h] == {t // 4, *others[:2]}
