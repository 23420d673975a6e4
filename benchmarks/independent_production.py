"""The reference beside the attention modules of transformers, at tiny random sizes, on CPU.

    python -m benchmarks.independent_production          where transformers has these models

Their projections, norms and rotations of tokens make both sides' inputs; from there on each side is on its
own.  A score that is a sum of relu is exactly 0 for many entries, and which of those is taken is nobody's
rule there: choices are compared by the scores of what is chosen, and counted as sets beside.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Json
from benchmarks.independent import tensors
from hsgen.reference import Result, reference
from hsgen.spec import Spec, parse

TOKENS = 45
TOLERANCE = 1e-5  # norms and rotations of theirs are in float32

Compared = tuple[Json, str]


def module(name: str) -> Any:
    """A file of transformers: its models need no checkpoint."""
    return importlib.import_module(f"transformers.models.{name}")


def filled(made: nn.Module) -> nn.Module:
    """Every parameter drawn, since some come as torch.empty."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.eval().double()


def hidden(width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float64)


def text(spec: str) -> Spec:
    return parse(f"hsgen: 1\nname: small\n{spec}")


def rows_alike(theirs: Tensor, ours: Tensor, scores: Tensor) -> Json:
    """Sets of entries, bool[..., N] each, beside our scores of them, f64[..., N]."""
    worst = 0.0
    for a, b, s in zip(*(x.flatten(0, -2) for x in (theirs, ours, scores)), strict=True):
        left, right = s[a].sort().values, s[b].sort().values
        if len(left) != len(right):
            worst = math.inf
        else:
            finite = (left - right).masked_fill(left == right, 0.0).abs()
            worst = max([worst, *finite.tolist()])
    same = (theirs == ours).all(-1)
    return {"rows": same.numel(), "same_rows": int(same.sum()), "worst": worst}


def members(indices: Tensor, n: int) -> Tensor:
    """bool[..., n] of indices [..., K]; -1, wherever it stands, is none."""
    found = torch.zeros(*indices.shape[:-1], n + 1, dtype=torch.bool)
    return found.scatter(-1, indices.long().masked_fill(indices < 0, n), value=True)[..., :n]


# --- selections


def minimax() -> Compared:
    m = module("minimax_m3_vl.modeling_minimax_m3_vl")
    config = module("minimax_m3_vl.configuration_minimax_m3_vl").MiniMaxM3VLTextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=3,
        layer_types=["minimax_m3_sparse"],
        num_local_experts=2,
        vocab_size=64,
    )
    theirs, x = filled(m.MiniMaxM3VLIndexer(config, 0)), hidden(32)
    position = torch.arange(TOKENS)[None]
    angles = m.MiniMaxM3VLRotaryEmbedding(config)(x, position)
    chosen = theirs(x, angles, None, position)
    q = theirs.q_norm(theirs.q_proj(x).view(1, TOKENS, 2, 16)).transpose(1, 2)
    k = theirs.k_norm(theirs.k_proj(x).view(1, TOKENS, 1, 16)).transpose(1, 2)
    q, k = m.apply_rotary_pos_emb(q, k, *(y[..., :16] for y in angles))
    spec = text(
        "heads: {query: 4, kv: 2}\nhead_dim: 16\nindex: {heads: 2, dim: 16}\nlevels:\n"
        "  - {name: token, partition: tokens, score: {form: index_dot, share: group}}\n"
        "  - {name: block, partition: {blocks: 4}, score: {from: token, map: max},"
        " select: {top_k: 3, force: {last: 1}}}\nattend: [{name: selected, over: block}]\n"
    )
    ours = run(spec, {"q_index": q.transpose(1, 2), "k_index": k[:, 0]})
    n = -(-TOKENS // 4)
    left = members(chosen.transpose(1, 2), n)
    right = members(ours.selection["block"].indices, n)
    scores = ours.scores["block"].masked_fill(ours.forced["block"], 0.0)
    return rows_alike(left, right, scores), "4/2 heads, index 2 of 16, blocks of 4, top 3"


def run(spec: Spec, given: dict[str, Tensor], chosen: dict[str, Tensor] | None = None) -> Result:
    """The reference, with normal numbers for what nobody compares; on a choice of theirs, if any."""
    x = tensors(spec, TOKENS, 5) | given
    return reference(spec, x, selection=chosen, keep_seen=True)


def qsa() -> Compared:
    m = module("qwen4_exp.modeling_qwen4_exp")
    config = module("qwen4_exp.configuration_qwen4_exp").Qwen4ExpTextConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=4,
        vocab_size=64,
    )
    theirs, x = filled(m.Qwen4ExpTextQSAIndexer(config, 3)), hidden(32)
    cos, sin = m.Qwen4ExpTextRotaryEmbedding(config)(x, torch.arange(TOKENS)[None])
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    seen = theirs(x, (cos, sin), mask, None)[:, 0]
    q, k = theirs.index_qk_proj(x).split([32, 16], -1)
    q = theirs.q_layernorm(q.view(1, TOKENS, 2, 16))
    q = m.apply_rotary_pos_emb(q, cos=cos, sin=sin, unsqueeze_dim=2)
    n = cos.shape[-1]
    spec = text(
        "heads: {query: 4, kv: 2}\nhead_dim: 16\nindex: {heads: 2, dim: 16}\nlevels:\n"
        "  - name: block\n    partition: {blocks: 4}\n"
        f"    pool: {{keys: mean, then: norm, rotate: {{at: first, dims: {n}}}}}\n"
        "    score: {form: relu_sum, scale: 0.25, share: all}\n"
        "    select: {top_k: 2, force: {tail: true}}\nattend: [{name: selected, over: block}]\n"
    )
    given = {
        "q_index": q,
        "k_index": k,
        "block_key_norm": 1 + theirs.k_layernorm.weight,
        "cos_block": cos[..., : n // 2],
        "sin_block": sin[..., : n // 2],
    }
    ours = run(spec, given)
    return by_token(seen, ours, "block", 4), "4/2 heads, index 2 of 16, blocks of 4, budget 8"


def by_token(seen: Tensor, ours: Result, level: str, size: int) -> Json:
    """Tokens that a row sees, bool[1, T, S], as entries; all or none of an entry's before the row."""
    scores = ours.scores[level][:, :, 0]
    n = scores.shape[-1]
    right = members(ours.selection[level].indices[:, :, 0], n)
    padded = torch.nn.functional.pad(seen, (0, n * size - TOKENS))
    left = padded.unflatten(-1, (n, size)).any(-1)
    tokens = ours.seen["selected"][:, :, 0]
    assert torch.equal(seen.sum(-1), tokens.sum(-1)), "rows differ in how many tokens they see"
    return rows_alike(left, right, scores.masked_fill(ours.forced[level][:, :, 0], 0.0))


def kpool() -> Compared:
    m = module("glm5_next.modeling_glm5_next")
    config = module("glm5_next.configuration_glm5_next").Glm5NextTextConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=24,
        v_head_dim=8,
        qk_nope_head_dim=8,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=2,
        index_kpool=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        vocab_size=64,
    )
    theirs, x, latent = filled(m.Glm5NextTextIndexer(config, 3)), hidden(32), hidden(24, 2)
    chosen = theirs(x, latent, torch.ones(1, TOKENS, dtype=torch.bool), None)
    spec = text(
        "heads: {query: 2, kv: 1}\nhead_dim: 16\nindex: {heads: 2, dim: 16}\nlevels:\n"
        "  - name: pool\n    partition: {blocks: 4}\n"
        "    pool: {keys: gated, softmax: channel, position: learned}\n"
        "    score: {form: relu_weighted, scale: 0.25, share: all}\n"
        "    select: {top_k: 2, force: {tail: true}}\n"
        "attend: [{name: selected, over: pool, storage: latent}]\n"
    )
    given = {
        "q_index": theirs.wq_b(latent).view(1, TOKENS, 2, 16),
        "k_index": theirs.k_norm(theirs.wk(x)),
        "z_index": x @ theirs.index_kpool_compress_gate.T,
        "w_index": theirs.weights_proj(x) * 2**-0.5,
        "pool_key_position": theirs.index_kpool_compress_ape[None],
    }
    ours = run(spec, given)
    figures = by_token(members(chosen, TOKENS), ours, "pool", 4)
    return figures, "2 heads, index 2 of 16, pools of 4, top 8 tokens"


# --- whole attention


def deepseek(layer: int, spec: Spec, compress: int) -> Compared:
    """All of V4's attention: their projection of the output is applied to both."""
    m = module("deepseek_v4.modeling_deepseek_v4")
    config = module("deepseek_v4.configuration_deepseek_v4").DeepseekV4Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=3,
        vocab_size=64,
        n_routed_experts=2,
        num_experts_per_tok=1,
        _attn_implementation="eager",
    )
    config.compress_rates["heavily_compressed_attention"] = 6
    at, x = filled(m.DeepseekV4Attention(config, layer)), hidden(32)
    position = torch.arange(TOKENS)[None]
    rope = m.DeepseekV4RotaryEmbedding(config)
    angles = {
        kind: rope(x, position_ids=position, layer_type=kind) for kind in ("main", "compress")
    }
    cos, sin = angles[at.rope_layer_type]
    distance = position[0][:, None] - position[0]
    shut = (distance < 0) | (distance >= 8)
    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.float64).masked_fill(shut, -math.inf)
    theirs = at(x, angles, position, mask, None)[0]

    latent = at.q_a_norm(at.q_a_proj(x))
    q = at.q_b_norm(at.q_b_proj(latent).view(1, TOKENS, 4, 32).transpose(1, 2))
    kv = at.kv_norm(at.kv_proj(x)).view(1, TOKENS, 1, 32).transpose(1, 2)
    table = rope(x, position_ids=position, layer_type="compress")
    given = {
        "q": m.apply_rotary_pos_emb(q, cos, sin).transpose(1, 2),
        "k": m.apply_rotary_pos_emb(kv, cos, sin).transpose(1, 2),
        "sink": at.sinks,
        **compressed(at.compressor, x, "entry", table, compress),
    }
    if compress == 2:
        ix = at.compressor.indexer
        iq = ix.q_b_proj(latent).view(1, TOKENS, 2, 16).transpose(1, 2)
        given |= compressed(ix, x, "index", table, compress)
        given["q_index"] = m.apply_rotary_pos_emb(iq, *table).transpose(1, 2)
        given["w_index"] = ix.scorer.weights_proj(x) * 2**-0.5
    figures: Json = {}
    chosen = None
    if compress == 2:
        indices = at.compressor.indexer(x, latent, position, None, layer)
        chosen = {"entry": indices.unsqueeze(2)}
        figures = alike_entries(run(spec, given), indices)
    ours = run(spec, given, chosen)  # of equal scores theirs takes another entry now and then
    turned = m.apply_rotary_pos_emb(ours.o.transpose(1, 2), cos, -sin).transpose(1, 2)
    o = at.o_b_proj(at.o_a_proj(turned.reshape(1, TOKENS, 2, -1)).flatten(2))
    figures |= {
        "error": float((theirs - o).norm() / o.norm()),
        "worst": float((theirs - o).abs().amax() / o.abs().amax()),
    }
    return figures, f"4 heads of 32, window 8, entries of {2 * 4 if compress == 2 else 6} tokens"


def alike_entries(ours: Result, indices: Tensor) -> Json:
    """How their choice of entries, [1, T, K], is ours."""
    scores = ours.scores["entry"][:, :, 0]
    n = scores.shape[-1]
    right = members(ours.selection["entry"].indices[:, :, 0], n)
    alike = rows_alike(members(indices, n), right, scores)
    assert alike["worst"] < TOLERANCE, "chosen entries have other scores"
    return {"rows": alike["rows"], "same_rows": alike["same_rows"], "scores": alike["worst"]}


def compressed(c: Any, x: Tensor, name: str, table: tuple[Tensor, Tensor], series: int) -> dict:
    """Keys, gates and parameters of a compressor of theirs."""
    bias = c.position_bias  # [stride, series * D]
    stride, width = bias.shape[0], bias.shape[1] // series
    shape = (series, width) if series > 1 else (width,)
    head = () if name == "index" else (1,)
    keys, gates = (f"k_{name}", f"z_{name}")
    position = bias.view(stride, series, width).transpose(0, 1).reshape(1, series * stride, width)
    return {
        keys: c.kv_proj(x).view(1, TOKENS, *head, *shape),
        gates: c.gate_proj(x).view(1, TOKENS, *head, *shape),
        f"{name}_key_position": position,
        f"{name}_key_norm": c.kv_norm.weight,
        f"cos_{name}": table[0],
        f"sin_{name}": table[1],
    }


GATED = "keys: gated, softmax: channel, position: learned, then: norm"
ROTATE = "rotate: {at: first, dims: 8, channels: last, pairs: neighbours}"


def csa() -> Compared:
    entries = "partition: {blocks: 8, stride: 4, before: 4}"
    pool = f"pool: {{{GATED}, series: 2, {ROTATE}}}"
    spec = text(
        "heads: {query: 4, kv: 1}\nhead_dim: 32\nindex: {heads: 2, dim: 16}\nlevels:\n"
        f"  - name: index\n    {entries}\n    {pool}\n"
        "    score: {form: relu_weighted, scale: 0.25, share: all}\n"
        f"  - name: entry\n    {entries}\n    kv: entry\n    {pool}\n"
        "    score: {from: index, map: max}\n    select: {top_k: 3}\n"
        "attend:\n  - {name: selected, over: entry, values: pooled, storage: latent}\n"
        "  - {name: window, window: 8, storage: latent}\n"
        "combine: {softmax: union, sink: learned}\n"
    )
    return deepseek(3, spec, 2)


def hca() -> Compared:
    spec = text(
        "heads: {query: 4, kv: 1}\nhead_dim: 32\nlevels:\n"
        f"  - name: entry\n    partition: {{blocks: 6}}\n    kv: entry\n    pool: {{{GATED}, {ROTATE}}}\n"
        "    score: {form: dot}\n"
        "attend:\n  - {name: compressed, over: entry, values: pooled, storage: latent}\n"
        "  - {name: window, window: 8, storage: latent}\n"
        "combine: {softmax: union, sink: learned}\n"
    )
    return deepseek(0, spec, 1)


COMPARISONS: dict[str, tuple[str, Callable[[], Compared]]] = {
    "minimax_m3 (index)": ("minimax_m3_vl", minimax),
    "qwen_qsa (index)": ("qwen4_exp", qsa),
    "glm_kpool (index)": ("glm5_next", kpool),
    "deepseek_csa": ("deepseek_v4", csa),
    "deepseek_hca": ("deepseek_v4", hca),
}


def main() -> None:
    """Compare, print, and keep the figures."""
    import transformers

    result = common.provenance("benchmarks.independent_production", [], "cpu")
    result["transformers"] = transformers.__version__
    found: Json = {}
    for name, (model, compare) in COMPARISONS.items():
        with torch.no_grad():
            figures, what = compare()
        found[name] = {"model": model, "what": f"{what}; {TOKENS} tokens", **figures}
        print(f"{name:20} {figures}")
        assert figures["worst"] < TOLERANCE, f"{name} differs"
    result["comparisons"] = found
    common.write_json(common.RESULTS / f"transformers_cpu_{result['date']}.json", result)


if __name__ == "__main__":
    main()
