"""The reference beside SEA, SparseD, Token Sparse Attention and BiFormer, on CPU.

    python -m benchmarks.independent_odd --sources DIR     DIR/<repository> are checkouts of the peers

Their choices, masks and scatters are read from the checkouts; where theirs hands a mask to a GPU kernel, it
is dense attention under that mask.  Only figures are kept.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.independent import Answer, Comparison, compare, kept, tensors
from hsgen.reference import Result, reference
from hsgen.selection import members
from hsgen.spec import Spec, parse

Modules = Mapping[str, types.ModuleType]
HEAD = "hsgen: 1\nname: small\nheads: {query: 4, kv: 4}\nhead_dim: 16\n"
SEA = """levels:
  - {name: part, partition: {parts: 16}, score: {form: given}, select: {tokens: 6, scope: heads}}
attend: [{name: selected, over: part}]
"""
SPARSE_D = """causal: false
levels:
  - {name: mass, partition: tokens, query: {block: 16, reduce: mean},
     score: {form: dot, normalise: softmax}}
  - {name: block, partition: {blocks: 16}, score: {from: mass, map: sum}, select: {fraction: 0.35}}
attend: [{name: selected, over: block}]
"""
TOKEN_SPARSE = """levels:
  - {name: all_mass, partition: tokens, query: {last: 16, reduce: mean},
     score: {form: dot, normalise: softmax, share: all, reduce: mean}}
  - {name: all, partition: tokens, score: {from: all_mass, map: around, width: 1},
     select: {top_p: {mass: 0.8, boundary: drop, min: 8, of: rest}, force: {last: 16}}}
  - {name: mass, partition: tokens, query: {last: 16, reduce: mean},
     score: {form: dot, normalise: softmax}}
  - {name: token, partition: tokens, score: {from: mass, map: around, width: 1},
     select: {budget_from: all, force: {last: 16}}}
attend: [{name: kept, over: token, rows: chosen}]
"""
BIFORMER = """causal: false
axes: [16, 24]
levels:
  - {name: region, permute: {keys: {tile: [8, 8]}}, partition: clusters,
     query: {tile: [8, 8], pool: mean}, pool: {keys: mean},
     score: {form: dot, share: all, reduce: sum}, select: {top_k: 2}}
attend: [{name: routed, over: region}]
"""


def masked(x: Mapping[str, Tensor], seen: Tensor) -> Tensor:
    """Dense attention under a mask.  bool[1, H, T, S] -> [1, T, H, D]"""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def listed(chosen: Tensor) -> Tensor:
    """Indices of what is chosen, -1 padded.  bool[..., N] -> [..., N]"""
    n = chosen.shape[-1]
    return torch.where(chosen, torch.arange(n), -1)


def sea(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """48 tokens, every row with the same budget."""
    x = tensors(spec, 48, 1)
    x["part_score"] = x["part_score"].softmax(-1)
    probs = x["part_score"].transpose(1, 2)
    seen = torch.zeros(1, 1, 48, 48)
    alive = peer["causal_topk_masking"].causal_topk_masking(
        probs, 6, seen[:, :, :1], seen[..., :1], seen, is_causal=False
    )
    wide = _widened(peer, alive, seen[:, :, :1], causal=False)
    chosen = listed(alive.transpose(1, 2) > 0.5)
    return Answer(o=masked(x, wide), selection=chosen), reference(spec, x)


def sea_causal(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """70 tokens, and our choice: theirs are two, which round budgets differently."""
    x = tensors(spec, 70, 2)
    result = reference(spec, x)
    seen = torch.full((70, 70), -1e4).triu(1)[None, None]
    alive = members(result.selection["part"], 16).transpose(1, 2).double()
    wide = _widened(peer, alive, seen, causal=True) & (seen == 0)
    return Answer(o=masked(x, wide), selection=torch.empty(0)), result


def _widened(peer: Modules, alive: Tensor, seen: Tensor, *, causal: bool) -> Tensor:
    """Which tokens lie in the chosen cells.  -> bool[1, H, T, T]"""
    width = alive.shape[2]
    made = peer["resize_m_to_t"].resize_from_m_to_t(
        alive, 0.0, seen, target_width=width, is_causal=causal, k=6
    )
    return made > 0.5


def sparse_d(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """160 tokens in blocks of 16; one choice for prompt and generated keys."""
    x = tensors(spec, 160, 3)
    logits = torch.einsum("bthd,bshd->bhts", x["q"], x["k"]) * 16**-0.5
    mask = peer["SparseD_utils"].create_attention_block_mask(logits.softmax(-1), 16, 0.35)
    seen = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)
    chosen = listed(mask.repeat_interleave(16, 2).transpose(1, 2))
    return Answer(o=masked(x, seen), selection=chosen), reference(spec, x)


def token_sparse(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """200 tokens, the last 16 of which choose; masses as they are."""
    x = tensors(spec, 200, 4)
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    cluster = peer["sparse_cluster"].SparseCluster()
    cluster.window_size, cluster.kernel_size, cluster.min_tokens = 16, 1, 8
    cluster.coverage = 0.2
    kept = cluster.get_index(q, k)
    few = cluster.compress_qkv(q, k, v, kept)
    o = F.scaled_dot_product_attention(*few, is_causal=True).transpose(1, 2)
    o = cluster.decompress_output(o, kept).unflatten(-1, (4, 16))
    chosen = kept[:, None].expand(-1, 200, -1, -1)  # one choice, that of every row
    return Answer(o=o, selection=chosen), reference(spec, x)


def _last_masses(query_states: Tensor, key_states: Tensor, window_size: int, **_: object) -> Tensor:
    """What their GPU kernels compute: the mean mass of the tokens before the last ones.  [B, H, T - n]"""
    T = query_states.shape[2]
    logits = query_states[:, :, -window_size:] @ key_states.transpose(2, 3)
    later = torch.ones(window_size, T, dtype=torch.bool).triu(T - window_size + 1)
    mass = (logits * query_states.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
    return mass.mean(2)[..., :-window_size]


def biformer(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """An image of 16 x 24 in regions of 8 x 8, the best two for all heads."""
    x = tensors(spec, 384, 5)
    image = {n: x[n][0].view(16, 24, 64).permute(2, 0, 1)[None] for n in ("q", "k", "v")}
    q, k = (F.avg_pool2d(image[n], 8).flatten(2)[0].T for n in ("q", "k"))
    graph = (q @ k.T).topk(2).indices  # of every region
    made, _ = peer["rrsda"].regional_routing_attention_torch(
        image["q"], image["k"], image["v"], 16**-0.5, graph[None, None].expand(1, 4, -1, -1), (8, 8)
    )
    o = made[0].permute(1, 2, 0).reshape(1, 384, 4, 16)
    token = torch.arange(384)
    region = token // 24 // 8 * 3 + token % 24 // 8
    return Answer(o=o, selection=graph[region][None, :, None]), reference(spec, x)


KERNEL = types.ModuleType("sparse_attn.token_sparse.kernel")
KERNEL.triton_get_attn_cache = _last_masses  # type: ignore[attr-defined]
PACKAGES = ("sparse_attn", "sparse_attn.token_sparse")
OPS = "src/models/perlin_attention/ops/kernels"
COMPARISONS = {
    "sea": Comparison(
        repository="gmlwns2000/sea-attention",
        files=(f"{OPS}/causal_topk_masking.py", f"{OPS}/resize_m_to_t.py"),
        what="4 heads, D 16, 16 columns, 6 tokens a head, not causal; 48 tokens",
        level="part",
        spec=lambda: parse(f"{HEAD}causal: false\n{SEA}"),
        run=sea,
    ),
    "sea, causal": Comparison(
        repository="gmlwns2000/sea-attention",
        files=(f"{OPS}/resize_m_to_t.py",),
        what="4 heads, D 16, 16 columns, 6 tokens a head; 70 tokens, our choice",
        level="part",
        spec=lambda: parse(f"{HEAD}{SEA}"),
        run=sea_causal,
    ),
    "sparse_d": Comparison(
        repository="INV-WZQ/SparseD",
        files=("models/Dream/SparseD_utils.py",),
        what="4 heads, D 16, blocks of 16, 0.35 of them; 160 tokens",
        level="block",
        spec=lambda: parse(f"{HEAD}{SPARSE_D}"),
        run=sparse_d,
    ),
    "token_sparse": Comparison(
        repository="dongwonjo/Token-Sparse-Attention",
        files=("sparse_attn/token_sparse/sparse_cluster.py",),
        what="4 heads, D 16, 0.8 of the mass, the last 16 choose, not smoothed; 200 tokens",
        level="token",
        spec=lambda: parse(f"{HEAD}{TOKEN_SPARSE}"),
        run=token_sparse,
        stand_ins={name: types.ModuleType(name) for name in PACKAGES} | {KERNEL.__name__: KERNEL},
    ),
    "biformer": Comparison(
        repository="rayleizhu/BiFormer",
        files=("ops/torch/rrsda.py",),
        what="4 heads, D 16, regions of 8 x 8 of 16 x 24, top 2",
        level="region",
        spec=lambda: parse(f"{HEAD}{BIFORMER}"),
        run=biformer,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, and keep the figures."""
    kept("benchmarks.independent_odd", "odd", COMPARISONS, compare, argv)


if __name__ == "__main__":
    main()
