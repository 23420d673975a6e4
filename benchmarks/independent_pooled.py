"""The reference beside peers that choose blocks by pooled queries and keys, on CPU.

    TRITON_INTERPRET=1 python -m benchmarks.independent_pooled --sources DIR

DIR/<repository> are checkouts of the peers.  Ours are the shipped specs, with fewer heads and channels;
of theirs what is Triton runs in its interpreter, in float32.  Where attention is a GPU kernel of CUDA, it
is dense attention under the mask that they hand to it.  Only figures are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.independent import kept, tensors
from benchmarks.independent_blocks import Chosen, Comparison, compare, ours
from hsgen import standins
from hsgen.execution import interpreting
from hsgen.reference import reference
from hsgen.spec import Blocks, Spec, load

Modules = Mapping[str, ModuleType]
MERGES = (1, 2, 4, 8)  # tokens that are one, by tier of psa


def heads_first(x: Mapping[str, Tensor]) -> list[Tensor]:
    """q, k and v as most of them have it.  -> [1, H, T, D]"""
    return [x[name].transpose(1, 2) for name in ("q", "k", "v")]


def in_runs(x: Mapping[str, Tensor], *, q: int, k: int, much: float = 1.0) -> dict[str, Tensor]:
    """Queries and keys that have much in common with those of their run: means of normals alone are so
    short that all blocks would be worth the same.
    """
    made = dict(x)
    for name, size in (("q", q), ("k", k)):
        common = x[name][:, ::size].repeat_interleave(size, 1)
        made[name] = (x[name] + much * common[:, : x[name].shape[1]]) / (1 + much**2) ** 0.5
    return made


def masked(x: Mapping[str, Tensor], seen: Tensor) -> Tensor:
    """Attention under a mask; a row that sees nothing is 0.  bool[H, T, S] -> [T, H, D]"""
    q, k, v = (y[0] for y in heads_first(x))
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (p @ v).transpose(0, 1)


# --- DraftAttention


def draft_attention(peer: Modules) -> tuple[Chosen, Chosen]:
    """Three frames of 16 x 48: 18 boxes, so 324 pairs a head.  Theirs keeps a pair more than the tenth."""
    module, shipped, n = peer["draft_attention"], load("draft_attention_head"), 3 * 16 * 48
    level = shipped.levels[0]
    assert level.select is not None
    a_tenth_and_one = level.select.model_copy(update={"fraction": 34 / 324})
    levels = (level.model_copy(update={"select": a_tenth_and_one}),)
    spec = shipped.model_copy(update={"axes": (3, 16, 48), "levels": levels})
    spec = standins.bind(spec, query=4, kv=4, dim=32)
    x = in_runs(tensors(spec, n, 12), q=16, k=16)
    caught: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *more: Tensor | int | None, **_: object) -> Tensor:
        mask = more[4]
        assert isinstance(mask, Tensor)
        caught.append(mask[0])
        seen = mask[0].repeat_interleave(128, 1).repeat_interleave(128, 2)
        return masked({"q": q[None], "k": k[None], "v": v[None]}, seen)

    module.block_sparse_attn_func = kernel  # type: ignore[attr-defined]
    draft = module.Draft_Attention(latent_h=16, latent_w=48, visual_len=n)
    q, k, v = (x[name][0] for name in ("q", "k", "v"))
    ends = torch.tensor([0, n])
    o = draft(q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=n, max_seqlen_kv=n)
    scores = draft.sample_qk_attention_2d(q, k, 16, 48, 8, 16)
    result = reference(spec, x)
    first = torch.arange(n).view(3, 2, 8, 3, 16)[:, :, 0, :, 0].flatten()  # of every box
    theirs = Chosen(member=caught[0].transpose(0, 1), scores=scores.transpose(0, 1), o=o[0])
    return theirs, replace(ours(result, "box", first), o=result.o[0])


# --- FlexPrefill


def _einops() -> ModuleType:
    """What they call of it: "b h g i j -> b (h g) i j"."""
    module = ModuleType("einops")
    module.rearrange = lambda x, _pattern: x.flatten(1, 2)  # type: ignore[attr-defined]
    return module


def flex_prefill(peer: Modules) -> tuple[Chosen, Chosen]:
    """Heads that go both ways, for the threshold is half way between their distances."""
    return _flex(peer, 12 * 128)


def flex_prefill_pooled(peer: Modules) -> tuple[Chosen, Chosen]:
    """All heads pooled, of a length that 128 does not divide: there blocks of diagonals are others."""
    return _flex(peer, 12 * 128 + 77, 1.0)


def _flex(peer: Modules, T: int, threshold: float | None = None) -> tuple[Chosen, Chosen]:
    """Pairs of blocks and outputs, those of dense attention under them in plain PyTorch of theirs."""
    module = peer["flex_prefill_attention"]
    bound = standins.bind(load("flex_prefill"), query=4, kv=2, dim=32)
    x = in_runs(tensors(bound, T, 14), q=128, k=128)
    x["q"] *= 3  # or hardly a column could be left out
    q, k, v = (x[name] for name in ("q", "k", "v"))
    if threshold is None:
        threshold = float(_distances(module, q, k, v).sort().values[..., 1:3].mean())
    found = module.get_active_blocks(q, k, v, 128, 0.9, 1, 2**31, threshold)[0]
    o = torch.cat(
        [
            module.torch_block_wise_attention(
                q[:, :, h, None],
                k[:, :, h // 2, None],
                v[:, :, h // 2, None],
                pairs[None, None],
                128,
            )
            for h, pairs in enumerate(found)
        ],
        2,
    )
    N = -(-T // 128)
    member = torch.zeros(N * N, 4, dtype=torch.bool)
    for h, pairs in enumerate(found):
        member[pairs, h] = True
    earlier = torch.ones(N, N, dtype=torch.bool).tril()[:, None]
    route = bound.route
    assert route is not None
    assert route.statistic is not None
    statistic = route.statistic.model_copy(update={"threshold": threshold})
    spec = bound.model_copy(update={"route": route.model_copy(update={"statistic": statistic})})
    result = reference(spec, x, keep_seen=True)
    seen = torch.stack([*result.seen.values()]).any(0)[0]  # [T, H, S]
    last = seen[[*range(127, T, 128), T - 1][:N]]  # of every block: it sees whole blocks
    mine = last[..., ::128]
    theirs = Chosen(member=member.view(N, N, 4).transpose(1, 2) & earlier, o=o[0])
    return theirs, Chosen(member=mine, o=result.o[0])


def _distances(module: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Those that heads are told apart by."""
    far: list[Tensor] = []
    distance = module.square_root_js_divergence

    def noted(p: Tensor, q: Tensor) -> Tensor:
        far.append(distance(p, q))
        return far[-1]

    with patch.object(module, "square_root_js_divergence", noted):
        module.get_active_blocks(q, k, v, 128, 0.9, 1, 2**31)
    return far[0]


# --- PBS-Attn


def pbs_attn(peer: Modules) -> tuple[Chosen, Chosen]:
    """Six whole segments, and half of one.  A short block of theirs is a mean with zeros of padding."""
    T, spec = 6 * 256 + 128, standins.bind(load("pbs_attn"), query=4, kv=4, dim=32)
    x = in_runs(tensors(spec, T, 11), q=128, k=128)
    pbs = peer["pbs"]
    q, k, v = heads_first(x)
    sorted_keys, order = pbs.apply_permutation(q, k, 128, 256)
    rows = torch.arange(T).expand(1, 4, -1)
    scores, chosen, own = pbs.permuted_block_selection(q, sorted_keys, rows, order, 128, 256, 0.9)
    o = pbs.permuted_block_sparse_attn_fwd(q, k, v, 128, 256, 0.9, True, use_triton=False)
    result = reference(spec, x)
    mine = ours(result, "block", torch.arange(0, T, 128))
    theirs = Chosen(
        member=(chosen | own)[0].transpose(0, 1),
        scores=scores[0].nan_to_num(0.0).transpose(0, 1),
        o=o[0].transpose(0, 1),
    )
    return theirs, replace(mine, o=result.o[0])


# --- PSA


def psa(peer: Modules) -> tuple[Chosen, Chosen]:
    """Quotas of 40 blocks, in which all shares are whole."""
    return _psa(peer, load("psa"), {"mask_mode": "topk"}, (0.1, 0.15, 0.15, 0.35))


def psa_mass(peer: Modules) -> tuple[Chosen, Chosen]:
    """Bounds of mass, and at least 0.06 of 40 blocks, rounded up, whole."""
    return _psa(peer, load("psa_mass"), {"mask_mode": "thresholdbound"}, (0.4, 0.5, 0.6, 0.8))


def _psa(
    peer: Modules, spec: Spec, config: Mapping[str, str], bounds: tuple[float, ...]
) -> tuple[Chosen, Chosen]:
    """Their kernels in tiles of an eighth of a block, so that they never merge blocks: there they are wrong.

    They draw a quarter of the tokens of a block; here the draw is each fourth.  Rows of a block have so
    much in common that they agree on its best entry: each row's scores 1, and theirs sorts equals anyhow.
    """
    T, N = 8 * 128, 40
    spec = standins.bind(spec, query=4, kv=4, dim=32)
    partition = spec.level("block").partition
    assert isinstance(partition, Blocks)
    size = partition.size
    x = in_runs(tensors(spec, N * size, 13), q=128, k=size, much=8)
    x["q"] = x["q"][:, :T]
    q, k, v = (y.float() for y in heads_first(x))
    pooling, kernel = peer["attn_pooling_kernel"], peer["psa_kernel"]
    pooling.is_hip = kernel.is_hip = bool  # type: ignore[attr-defined]
    settings = peer["pyramid_sparse_attention"].AttentionConfig(
        block_m=128,
        block_n=size,
        tile_n=size // 8,
        use_sim_mask=False,
        text_length=0,
        mask_ratios={
            m: (0.0, bound) for m, bound in zip((*MERGES, 0), (*bounds, 1.0), strict=True)
        },
        **config,
    )
    caught: list[Tensor] = []
    attend = kernel.sparse_attention_factory(128, size // 8, size)

    def caught_and_attended(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, _scale: None) -> Tensor:
        caught.append(lists[0])
        return attend(q, k, v, lists)

    module = peer["pyramid_sparse_attention"]
    with patch("torch.rand", _each_fourth), patch("torch.cuda.device", contextlib.nullcontext):
        peaks, _ = module.efficient_attn_with_pooling(q, k, v, settings, 32, size // 4)
        o, *_ = module.adaptive_block_sparse_attn(q, k, v, settings, caught_and_attended)
    result = reference(spec, x)
    scores = peaks[0].transpose(0, 1).double()
    mine = ours(result, "block", torch.arange(0, T, 128))
    assert mine.scores is not None
    theirs = Chosen(member=tiers(caught[0], N), scores=scores, o=o[0].transpose(0, 1).double())
    return theirs, replace(
        mine, scores=mine.scores / mine.scores.sum(-1, keepdim=True), o=result.o[0]
    )


def _each_fourth(*shape: int, **_: object) -> Tensor:
    """Greatest where a token is to be drawn."""
    return (torch.arange(shape[-1]) % 4 == 0).float().expand(shape)


def tiers(lists: Tensor, entries: int) -> Tensor:
    """Blocks of all tiers together.  i32[H, R, N + 5], tiers end with -1 -> bool[R, H, N]"""
    tier = (lists == -1).cumsum(-1)
    kept = (tier < len(MERGES)) & (lists >= 0)
    slots = torch.where(kept, lists, entries).long()
    member = torch.zeros(*lists.shape[:2], entries + 1, dtype=torch.bool)
    return member.scatter_(-1, slots, torch.ones_like(kept))[..., :entries].transpose(0, 1)


# --- SpargeAttn


def sparge(peer: Modules) -> tuple[Chosen, Chosen]:
    """Blocks of 128 queries and 64 keys."""
    return _sparge(peer, 128, 64, causal=True)


def sparge_sm90(peer: Modules) -> tuple[Chosen, Chosen]:
    """Blocks of 64 queries and 128 keys."""
    return _sparge(peer, 64, 128, causal=True)


def sparge_not_causal(peer: Modules) -> tuple[Chosen, Chosen]:
    """As it is for videos."""
    return _sparge(peer, 128, 64, causal=False)


def _sparge(peer: Modules, rows: int, size: int, *, causal: bool) -> tuple[Chosen, Chosen]:
    """Two blocks of three are alike.  Theirs takes no short block for alike: cosines of padding are NaN."""
    T, spec = 12 * 128, standins.bind(load("sparge"), query=4, kv=4, dim=32)
    level = spec.levels[0]
    assert level.query is not None
    changes = {
        "partition": Blocks(size=size, stride=size),
        "query": level.query.model_copy(update={"block": rows}),
    }
    spec = spec.model_copy(update={"causal": causal, "levels": (level.model_copy(update=changes),)})
    x = tensors(spec, T, 15)
    alike = in_runs(x, q=rows, k=size, much=2)
    for name, run in (("q", rows), ("k", size)):
        plain = (torch.arange(T) // run % 3 == 1)[:, None, None]
        x[name] = torch.where(plain, x[name], alike[name])
    x["q"] *= 4  # or hardly a block could be left out
    q, k, _ = (y.float() for y in heads_first(x))
    chosen, *_ = peer["utils"].get_block_map_meansim_fuse_quant(
        q,
        k,
        k.mean(2, keepdim=True),
        is_causal=causal,
        BLKQ=rows,
        BLKK=size,
        simthreshd1=0.6,
        cdfthreshd=0.98,
    )
    mine = ours(reference(spec, x), "block", torch.arange(rows - 1, T, rows))
    return Chosen(member=chosen[0].transpose(0, 1)), replace(mine, scores=None)


FLEX_STAND_INS = {
    "einops": _einops(),
    "flash_attn": ("flash_attn_func",),
    "transformers.utils": ("is_flash_attn_2_available",),
}
PSA = tuple(
    f"src/psa_triton/{name}.py"
    for name in (
        "kernels/attn_pooling_kernel",
        "kernels/psa_kernel",
        "utils/transfer_attn_to_mask",
        "pyramid_sparse_attention",
    )
)
PSA_STAND_INS = {
    "einops": ("rearrange",),
    "psa_triton.kernels": (
        "_USE_TRITON_KSIM",
        "calc_k_similarity_triton",
        "calc_k_similarity_pytorch",
    ),
    "psa_triton.kernels.psa_kernel_legacy": ("sparse_attention_factory",),
    "psa_triton.utils.gilbert3d": ("gilbert3d",),
    "psa_triton.utils.tools": ("timeit",),
    "psa_triton.utils.psa_logger": ("PSALogger",),
    "psa_triton.utils.rearranger": (
        "GilbertRearranger",
        "SemanticAwareRearranger",
        "STARearranger",
        "HybridRearranger",
    ),
}
COMPARISONS: dict[str, Comparison] = {
    "draft_attention_head": Comparison(
        repository="shawnricecake/draft-attention",
        files=("draft_attention.py",),
        what="4 heads, D 32, 3 frames of 16 x 48 in boxes of 8 x 16, 34 of 324 pairs",
        run=draft_attention,
        stand_ins={"block_sparse_attn": ("block_sparse_attn_func",)},
    ),
    "flex_prefill": Comparison(
        repository="ByteDance-Seed/FlexPrefill",
        files=("flex_prefill/ops/flex_prefill_attention.py",),
        what="4/2 heads, D 32, two of them pooled; 1,536 tokens",
        run=flex_prefill,
        stand_ins=FLEX_STAND_INS,
    ),
    "flex_prefill (pooled)": Comparison(
        repository="ByteDance-Seed/FlexPrefill",
        files=("flex_prefill/ops/flex_prefill_attention.py",),
        what="4/2 heads, D 32, all of them pooled; 1,613 tokens",
        run=flex_prefill_pooled,
        stand_ins=FLEX_STAND_INS,
    ),
    "pbs_attn": Comparison(
        repository="xinghaow99/pbs-attn",
        files=(
            "pbs_attn/src/utils.py",
            "pbs_attn/src/permute_states.py",
            "pbs_attn/src/kernels/permuted_block_sparse_attention.py",
            "pbs_attn/src/pbs.py",
        ),
        what="4 heads, D 32, else as the spec; 1,664 tokens",
        run=pbs_attn,
        stand_ins={},
    ),
    "psa": Comparison(
        repository="ziplab/Pyramid-Sparse-Attention",
        files=PSA,
        what="4 heads, D 32, 1,024 rows, 40 blocks of 64 keys",
        run=psa,
        stand_ins=PSA_STAND_INS,
    ),
    "psa_mass": Comparison(
        repository="ziplab/Pyramid-Sparse-Attention",
        files=PSA,
        what="4 heads, D 32, 1,024 rows, 40 blocks of 128 keys",
        run=psa_mass,
        stand_ins=PSA_STAND_INS,
    ),
    "sparge": Comparison(
        repository="thu-ml/SpargeAttn",
        files=("spas_sage_attn/utils.py",),
        what="4 heads, D 32, else as the spec; 1,536 tokens",
        run=sparge,
        stand_ins={"einops": ("rearrange", "repeat")},
    ),
    "sparge (sm90)": Comparison(
        repository="thu-ml/SpargeAttn",
        files=("spas_sage_attn/utils.py",),
        what="4 heads, D 32, blocks of 64 by 128; 1,536 tokens",
        run=sparge_sm90,
        stand_ins={"einops": ("rearrange", "repeat")},
    ),
    "sparge (video)": Comparison(
        repository="thu-ml/SpargeAttn",
        files=("spas_sage_attn/utils.py",),
        what="4 heads, D 32, not causal; 1,536 tokens",
        run=sparge_not_causal,
        stand_ins={"einops": ("rearrange", "repeat")},
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, and keep the figures."""
    assert interpreting(), "expected TRITON_INTERPRET=1 in the environment"
    kept("benchmarks.independent_pooled", "pooled", COMPARISONS, compare, argv)


if __name__ == "__main__":
    main()
