"""The reference beside peers that learn what to choose by, on CPU: centroids, searches, gates.

    python -m benchmarks.independent_trained --sources DIR

DIR/<repository> are checkouts of the peers; `pip install --no-deps --target DIR superlinear==0.1.0` puts
there what is read as PyPI has it.  Ours are the shipped specs with smaller sizes.  Where theirs hands what
it chose to a GPU kernel, it is dense attention under that mask.  Only figures are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from benchmarks.independent import Answer, Comparison, compare, kept, tensors
from benchmarks.independent_odd import listed, masked
from benchmarks.peers import Missing
from hsgen import standins
from hsgen.reference import Result, reference
from hsgen.reference.partitions import taken_by_nodes
from hsgen.selection import ListSelection
from hsgen.spec import LearnedTree, Select, Spec, load

Modules = Mapping[str, ModuleType]


def spread(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v, with a key head for every query head."""
    group = x["q"].shape[2] // x["k"].shape[2]
    return {name: x[name].repeat_interleave(1 if name == "q" else group, 2) for name in "qkv"}


def parameter(x: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(x, requires_grad=False)


# --- Routing Transformer

CLUSTERS, TAKES = 8, 32


def routed(*, causal: bool) -> Spec:
    """Its heads that are not local."""
    shipped = standins.bind(load("routing_transformer"), query=4, kv=4, dim=16)
    few = {
        "when": None,
        "partition": LearnedTree(branching=CLUSTERS, takes=TAKES),
        "select": Select(top_k=TAKES, scope="entry"),
    }
    buckets = shipped.attend[1].model_copy(update={"when": None})
    changed = {
        "causal": causal,
        "route": None,
        "levels": (shipped.levels[0].model_copy(update=few),),
        "attend": (buckets,),
    }
    return shipped.model_copy(update=changed)


def routing_transformer(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """256 tokens; the buckets of every row, and then the keys of every bucket."""
    T, theirs = 256, peer["routing_transformer"]
    x = tensors(spec, T, 1)
    if spec.causal:  # or a row has no key in a bucket, and theirs attends to what it must not see
        x["q"] = x["k"]
    caught: list[Tensor] = []
    distribution = theirs.distribution

    def caught_on_the_way(likeness: Tensor, size: int) -> Tensor:
        caught.append(distribution(likeness, size))
        return caught[-1]

    theirs.distribution = caught_on_the_way  # type: ignore[attr-defined]
    theirs.scatter_mean = partial(theirs.scatter_mean, eps=1e-30)  # type: ignore[attr-defined]
    attention = theirs.KmeansAttention(CLUSTERS, TAKES, 4, 16, causal=spec.causal).double().eval()
    attention.num_mem_kv = 0
    for name in ("mem_key", "mem_value"):
        setattr(attention, name, parameter(torch.zeros(4, CLUSTERS, 0, 16)))
    attention.kmeans.means.copy_(F.normalize(x["bucket_centroids"], dim=-1))
    attention.kmeans.initted.fill_(True)
    o, _ = attention(*(x[name].transpose(1, 2) for name in ("q", "k", "v")))
    rows, keys = (each.view(4, CLUSTERS, TAKES) for each in caught)
    buckets = torch.zeros(4, CLUSTERS, T, dtype=torch.bool).scatter_(2, rows, True)
    chosen = both(listed(buckets.permute(2, 0, 1)), keys)
    result = reference(spec, x)
    one = {"k": x["k"][0], "bucket_centroids": x["bucket_centroids"]}
    mine = both(result.selection["bucket"].indices[0], taken_by_nodes(spec.levels[0], TAKES, one))
    selection = {"bucket": ListSelection(level="bucket", indices=mine)}
    return Answer(o=o.transpose(1, 2), selection=chosen), replace(result, selection=selection)


def both(buckets: Tensor, keys: Tensor) -> Tensor:
    """The buckets of rows, [T, H, N], and the keys of buckets, [H, N, M], one after the other."""
    width = max(buckets.shape[-1], keys.shape[-1])
    parts = (buckets, keys.transpose(0, 1))
    return torch.cat([F.pad(x.long(), (0, width - x.shape[-1]), value=-1) for x in parts])


# --- superlinear


def superlinear(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """400 tokens; a row that has no anchor has its window, which theirs weighs alike for every span."""
    T = 400
    x = tensors(spec, T, 2)
    q, k, v = (each.transpose(1, 2) for each in spread(x).values())
    starts, ends, scores = peer["_reference"].get_spans(
        x["q_search"].transpose(1, 2), k, torch.arange(T), sw_index=3, topk=3
    )
    heads, rows, tokens = torch.arange(4)[:, None, None], torch.arange(T)[:, None], torch.arange(T)
    weights = scores.softmax(-1).nan_to_num(1 / 3)
    o = torch.zeros_like(q)
    for i in range(3):
        mask = peer["masks"].create_span_mask(starts, ends, k=i, sw_index=3)
        seen = mask(torch.tensor(0), heads, rows, tokens)[None]
        o += weights[..., i, None] * F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    # the i-th anchor of row t is i^2 - 1 tokens before it, and its entry counts from the farthest
    at = torch.arange(T)[:, None]
    entry = (at + 1).double().sqrt().floor() - (at + 1 - ends).double().sqrt()
    chosen = entry.long().masked_fill(ends < 0, -1).transpose(1, 2)
    return Answer(o=o.transpose(1, 2), selection=chosen), reference(spec, x)


# --- SeerAttention

SIZE, D = 16, 32


def gated(name: str, **select: object) -> Spec:
    """The shipped spec with blocks of 16 tokens, for rows as for keys."""
    spec = common.with_blocks(standins.bind(load(name), query=4, kv=2, dim=D), "block", SIZE)
    level = spec.levels[0]
    assert level.query is not None
    assert level.select is not None
    changed = {"select": level.select.model_copy(update=select)}
    if level.query.block:
        changed["query"] = level.query.model_copy(update={"block": SIZE})
    return spec.model_copy(update={"levels": (level.model_copy(update=changed),)})


def turned(x: dict[str, Tensor], T: int) -> tuple[Tensor, Tensor]:
    """The angles of every token, into x and as theirs has them.  -> cos, sin: [1, T, D]"""
    angles = torch.arange(T)[:, None] * 10_000 ** (-torch.arange(0, D, 2).double() / D)
    x["cos_block"], x["sin_block"] = angles.cos()[None], angles.sin()[None]
    cos, sin = (torch.cat((x[name], x[name]), -1) for name in ("cos_block", "sin_block"))
    return cos, sin


def drawn(seed: int, *shape: int) -> Tensor:
    """What a gate has beside the spec's tensors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def seer_attention(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """250 tokens, so that the last block is short."""
    T, blocks = 250, 16
    select = spec.levels[0].select
    assert select is not None
    x = tensors(spec, T, 3)
    cos, sin = turned(x, T)
    raw = 8 * drawn(4, 1, T, 4, D)  # means of blocks are short, and masses would be alike
    maps = drawn(5, 4, D, D) / D**0.5
    x["q_gate"] = torch.einsum("bthd,hde->bthe", raw, maps)
    gates = peer["attn_gate"].ATTNGATE_CLASSES
    gate = gates["Qavg_Kmaxminavg"](SIZE, D, D, 2, 4, force_double=True)
    gate.mask_linear_q.weight = parameter(maps)
    gate.mask_linear_k.weight = parameter(x["block_key_weight"].flatten(1, 2))
    earlier = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    masses = gate(raw, x["k_gate"], earlier, (cos[:, ::SIZE], sin[:, ::SIZE]))
    chosen = peer["common"].get_sparse_attn_mask_from_threshold(masses, select.threshold)
    chosen |= torch.eye(blocks, dtype=torch.bool)
    masses, chosen = (y.repeat_interleave(SIZE, 2)[:, :, :T] for y in (masses, chosen))
    o = masked(spread(x), chosen.repeat_interleave(SIZE, 3)[..., :T].tril())
    selection, scores = listed(chosen.transpose(1, 2)), masses.transpose(1, 2)
    return Answer(o=o, selection=selection, scores=scores), reference(spec, x)


def seer_attention_r(spec: Spec, peer: Modules) -> tuple[Answer, Result]:
    """Decoding steps, each after a prompt; those that complete a block are left out."""
    T = 170
    x = tensors(spec, T, 6)
    angles = turned(x, T)
    raw = drawn(7, 1, T, 4, D)
    gates = peer["attn_gate_inf"].ATTNGATE_CLASSES
    gate = gates["Kmaxminavg"](SIZE, D, D, 2, 4, "Qproj", use_qk_norm=True).double()
    gate.attngate_linear_k.weight = parameter(x["block_key_weight"].flatten(1, 2))
    gate.attngate_knorm.weight = parameter(x["block_key_norm"])
    gate.attngate_linear_q.weight = parameter(drawn(8, 2, 2, D, D) / D**0.5)
    gate.attngate_qnorm.weight = parameter(drawn(9, D))
    x["q_gate"] = gate.attngate_qnorm(gate.attngate_linear_q(raw))
    rows = [t for t in range(48, T) if (t + 1) % SIZE]
    chosen = torch.zeros(1, T, 2, -(-T // SIZE), dtype=torch.bool)
    for t in rows:
        step = partial(
            gate, layer_idx=0, k_compressed_cache=peer["cache_utils"].KCompressionCache(1, SIZE)
        )
        chosen[0, t, :, : t // SIZE + 1] = decoded(step, raw, x["k_gate"], angles, t)
    seen = chosen.transpose(1, 2).repeat_interleave(2, 1).repeat_interleave(SIZE, 3)
    o = masked(spread(x), seen[..., :T].tril())[:, rows]
    result = reference(spec, x)
    selection = ListSelection(level="block", indices=result.selection["block"].indices[:, rows])
    ours = replace(result, o=result.o[:, rows], selection={"block": selection})
    return Answer(o=o, selection=listed(chosen[:, rows])), ours


def decoded(
    gate: Callable[..., Tensor], q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], t: int
) -> Tensor:
    """Blocks of one step after t tokens: three that are complete, and the own one.  -> bool[H, N]"""
    now, firsts = slice(t, t + 1), slice(0, t, SIZE)
    cos, sin = angles
    gate(
        k=k[:, :t],
        max_cache_len=t,
        block_position_embeddings=(cos[:, firsts], sin[:, firsts]),
    )
    complete = torch.arange(t // SIZE + 1) < t // SIZE
    chosen = gate(
        k=k[:, now],
        q=q[:, now],
        attention_mask=complete[None, None],
        max_cache_len=t + 1,
        position_embeddings=(cos[:, now], sin[:, now]),
        block_budget=3,
        sparsity_method="token_budget",
    )
    return chosen[0]


CACHE = ModuleType("transformers.cache_utils")
CACHE.Cache = object  # type: ignore[attr-defined]
FLASH: dict[str, Missing] = {
    "flash_attn.bert_padding": (
        "index_first_axis",
        "index_put_first_axis",
        "pad_input",
        "unpad_input",
    ),
    "flash_attn.layers.rotary": ("apply_rotary_emb_func",),
}
ROUTING = "routing_transformer/routing_transformer.py"
IMPORTED: dict[str, Missing] = {
    "einops": ("rearrange", "repeat"),
    "einops.layers.torch": ("Rearrange",),
    "local_attention": ("LocalAttention",),
    "product_key_memory": ("PKM",),
    "mixture_of_experts": ("MoE",),
    "routing_transformer.reversible": ("ReversibleSequence", "SequentialSequence"),
}
SEARCH = "superlinear/kernels"
SEER = "seer_attn"
MEAN = "1e-30 for the 1e-5 that its mean over buckets adds to their number (8e-6 of the output)"
COMPARISONS = {
    "routing_transformer": Comparison(
        repository="lucidrains/routing-transformer",
        files=(ROUTING,),
        what="4 heads, D 16, 8 buckets of 32, queries are keys; 256 tokens; rows' buckets, buckets' keys",
        adapted=f"{MEAN}; no memory keys; no local heads; its option of shared queries and keys, "
        "which hides a row's own key from it, is off",
        level="bucket",
        spec=lambda: routed(causal=True),
        run=routing_transformer,
        stand_ins=IMPORTED,
    ),
    "routing_transformer, not causal": Comparison(
        repository="lucidrains/routing-transformer",
        files=(ROUTING,),
        what="4 heads, D 16, 8 buckets of 32; 256 tokens; rows' buckets, buckets' keys",
        adapted=f"{MEAN}; no memory keys; no local heads",
        level="bucket",
        spec=lambda: routed(causal=False),
        run=routing_transformer,
        stand_ins=IMPORTED,
    ),
    "superlinear": Comparison(
        package="superlinear",
        files=(
            f"{SEARCH}/common/power.py",
            f"{SEARCH}/superlinear/search/_reference.py",
            f"{SEARCH}/superlinear/span/masks.py",
        ),
        what="4/2 heads, D 32, best 3 anchors from the fourth on, windows of 15; 400 tokens",
        adapted="where it calls GPU kernels, attention is dense under its mask of each span, and weighed by "
        "the softmax of its anchors' scores",
        level="anchor",
        spec=lambda: standins.bind(load("superlinear"), query=4, kv=2, dim=32),
        run=superlinear,
    ),
    "seer_attention": Comparison(
        repository="microsoft/SeerAttention",
        files=(f"{SEER}/modules/common.py", f"{SEER}/prefill_sparse/attn_gate.py"),
        what="4/2 heads, D 32, blocks of 16, 0.05 of the mass each; 250 tokens",
        adapted="the own block is added to its choice; of its options, the last two blocks of rows are not "
        "dense, and its gate maps queries; attention is dense under its mask",
        level="block",
        spec=lambda: gated("seer_attention", threshold=0.05),
        run=seer_attention,
        stand_ins=FLASH,
    ),
    "seer_attention_r": Comparison(
        repository="microsoft/SeerAttention",
        files=(
            f"{SEER}/modules/common.py",
            f"{SEER}/decode_sparse/cache_utils.py",
            f"{SEER}/decode_sparse/attn_gate_inf.py",
        ),
        what="4/2 heads, D 32, blocks of 16, the own and the best 3; steps after prompts of 48 to 169 tokens",
        adapted="the own block is masked in its gate and beside its budget; no steps that complete a block; "
        "attention is dense under its mask",
        level="block",
        spec=lambda: gated("seer_attention_r", top_k=4),
        run=seer_attention_r,
        stand_ins={
            **FLASH,
            CACHE.__name__: CACHE,
            "seer_attn.kernels.varlen.oracle_sparse": ("oracle_sparse",),
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, and keep the figures."""
    kept("benchmarks.independent_trained", "trained", COMPARISONS, compare, argv)


if __name__ == "__main__":
    main()
