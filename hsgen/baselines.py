"""What hsgen is timed against: dense attention of PyTorch, and FlexAttention on the same selection.

Prepares everything that may be prepared outside the timed call, to the baseline's advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from hsgen.checking import NotExpressibleError
from hsgen.spec import Blocks, Level, Pool, Score, Spec, verify

QUERY_BLOCK = 128  # FlexAttention's own default
KEY_BLOCK = 128
ROWS = 64 * QUERY_BLOCK  # rows whose table is worked on at once
MASKS = 64  # that one run compiles FlexAttention for, at most
LARGEST_TABLE = 1 << 31  # FlexAttention indexes the tables that a mask reads with int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to ask PyTorch for dense attention.

    Attributes:
        name: For the tables.
        backend: Of scaled_dot_product_attention; None leaves it the choice.
        expand: Keys and values repeated beforehand, a copy for every query head.
        pad: Values padded with zeros to the length of the keys beforehand.
    """

    name: str
    backend: SDPBackend | None
    expand: bool
    pad: bool


def variants(spec: Spec, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Variant]:
    """The ways worth trying for a spec's heads: of float32 the only one with a kernel."""
    heads, dim = spec.heads, spec.head_dim
    assert heads is not None, "heads must be bound"
    assert dim is not None, "head_dim must be bound"
    backends: dict[str, SDPBackend | None]
    if device != "cuda":
        backends = {"torch": None}
    elif dtype == torch.float32:
        backends = {"efficient": SDPBackend.EFFICIENT_ATTENTION}
    else:
        backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    grouped, uneven = heads.group > 1, dim.qk > dim.v
    found = []
    for name, backend in backends.items():
        for padded in (False, True) if uneven else (False,):
            for expand in (False, True) if grouped else (False,):
                label = name + ", values padded" * padded + ", heads expanded" * expand
                found.append(Variant(name=label, backend=backend, expand=expand, pad=padded))
    return found


def contenders(variants: Sequence[Variant], shorter: Mapping[str, float]) -> list[Variant]:
    """The fastest way of each backend where a shorter input was timed, else all of them.

    Args:
        variants: All ways.
        shorter: Milliseconds by name of a variant, of those that ran.
    """

    def time(variant: Variant) -> float:
        return shorter.get(variant.name, math.inf)

    best = {
        backend: min((v for v in variants if v.backend == backend), key=time)
        for backend in dict.fromkeys(v.backend for v in variants)
    }
    timed = {backend for backend, variant in best.items() if time(variant) < math.inf}
    return [v for v in variants if v.backend not in timed or v is best[v.backend]]


def dense(
    variant: Variant, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True
) -> Callable[[int], Tensor]:
    """Attention to everything, by one variant.  [B, T, H, D] -> a call that returns [B, T, Hq, Dv]"""
    width = v.shape[-1]
    if variant.pad:
        v = pad(v, (0, q.shape[-1] - width))
    if variant.expand:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]

    def attend() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    def call(_number: int) -> Tensor:
        if variant.backend is None:
            return attend().transpose(1, 2)[..., :width]
        with sdpa_kernel(variant.backend):
            return attend().transpose(1, 2)[..., :width]

    return call


def dense_flops(tokens: int, heads: int, qk: int, v: int, *, causal: bool = True) -> float:
    """Multiplications and additions of dense attention, the diagonal's half tile not counted."""
    return float(tokens) ** 2 * heads * (qk + v) * (1 if causal else 2)


def last_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last row of dense attention in float32, to check a baseline by.  -> f32[B, Hq, Dv]"""
    B, _, Hq, D = q.shape
    grouped = q[:, -1].float().view(B, k.shape[2], -1, D)
    logits = torch.einsum("bkgd,bskd->bkgs", grouped, k.float()) * D**-0.5
    return torch.einsum("bkgs,bskd->bkgd", logits.softmax(-1), v.float()).reshape(B, Hq, -1)


# FlexAttention --------------------------------------------------------------------------------------


def selected_level(spec: Spec) -> Level:
    """The level whose selection is attended raw, in blocks that a mask can say.

    Raises:
        NotExpressibleError: there is none.
    """
    for branch in spec.attend:
        level = spec.level(branch.over) if branch.over and branch.values == "raw" else None
        partition = level.partition if level and level.select else None
        one = partition is not None and partition.size == 1
        if level and (
            one or (isinstance(partition, Blocks) and partition.size == partition.stride)
        ):
            if not spec.causal:
                raise NotExpressibleError("the mask is made for causal attention")
            return level
    raise NotExpressibleError("no branch attends chosen blocks of tokens, which a mask could say")


def selected_only(spec: Spec, name: str) -> Spec:
    """The branch over a level alone, for a selection that is given: what FlexAttention can do."""
    level = spec.level(name)
    if len(spec.attend) == 1:
        return spec
    shared = spec.level(level.score.source).score if level.score.source else level.score
    score = Score(form="dot", share=shared.share, reduce=shared.reduce)
    alone = level.model_copy(update={"score": score, "pool": Pool(keys="mean")})
    branch = next(b for b in spec.attend if b.over == level.name)
    update = {"levels": (alone,), "attend": (branch,), "combine": None}
    return verify(spec.model_copy(update={"name": f"{spec.name}_selected", **update}))


def require_table(tokens: int, heads: int, size: int) -> None:
    """Nothing, where FlexAttention can index a table of tokens × heads × entries: who selected what.

    Raises:
        NotExpressibleError: it cannot.
    """
    elements = tokens * heads * -(-tokens // size)
    if elements >= LARGEST_TABLE:
        raise NotExpressibleError(
            f"the mask would read a table of {elements:.2g} elements (who selected what, token by "
            "token), beyond what FlexAttention indexes"
        )


def flex_mask(indices: Tensor, size: int, heads: int) -> BlockMask:
    """A selection as FlexAttention takes it.

    A mask block is visited when any of its rows selected it, and needs no mask when all of them did and
    it lies wholly in their past; inside the others a table says who did.

    Args:
        indices: i32[T, Hs, K], -1 padded.
        size: Tokens an entry.
        heads: Hq.
    """
    T, Hs, _ = indices.shape
    entries = -(-T // size)
    member = _members(indices, entries)  # [T, Hs, N]
    share = heads // Hs

    def mask(_b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & member[q, h // share, k // size]

    key_block = min(size, KEY_BLOCK) if size > 1 else KEY_BLOCK
    some, every = _blocks(member, size, key_block)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every, share),
        *_ordered(every, share),
        BLOCK_SIZE=(QUERY_BLOCK, key_block),
        mask_mod=mask,
        seq_lengths=(T, T),
    )


def flex(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Callable[[int], Tensor]:
    """Compiled FlexAttention.  [B, T, H, D] -> a call that returns [B, T, Hq, Dv]"""
    torch._dynamo.config.cache_size_limit = MASKS  # by default the ninth mask would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]

    def call(_number: int) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return call


def _members(indices: Tensor, entries: int) -> Tensor:
    """i32[T, Hs, K] -> bool[T, Hs, N], ROWS rows at a time."""
    member = torch.zeros(*indices.shape[:-1], entries, dtype=torch.bool, device=indices.device)
    for rows, part in zip(member.split(ROWS), indices.split(ROWS), strict=True):
        wide = torch.zeros(*part.shape[:-1], entries + 1, dtype=torch.bool, device=part.device)
        wide.scatter_(-1, torch.where(part < 0, entries, part).long(), value=True)
        rows.copy_(wide[..., :entries])
    return member


def _blocks(member: Tensor, size: int, key_block: int) -> tuple[Tensor, Tensor]:
    """Which mask blocks hold something, and which hold everything.  -> bool[Hs, TQ, TK], twice"""
    T = len(member)
    columns = -(-T // key_block)
    some, every = [], []
    for rows in member.split(ROWS):
        tiles = pad(rows, (0, 0, 0, 0, 0, -len(rows) % QUERY_BLOCK)).unflatten(0, (-1, QUERY_BLOCK))
        some.append(_columns(tiles.any(1), size, key_block, columns, most=True))
        every.append(_columns(tiles.all(1), size, key_block, columns, most=False))
    first = torch.arange(0, T, QUERY_BLOCK, device=member.device)[:, None, None]
    start = torch.arange(0, T, key_block, device=member.device)
    reached = start <= (first + QUERY_BLOCK - 1).clamp(max=T - 1)
    past = start + key_block - 1 <= first
    found = torch.cat(some) & reached, torch.cat(every) & past
    return found[0].transpose(0, 1), found[1].transpose(0, 1)


def _columns(entries: Tensor, size: int, key_block: int, columns: int, *, most: bool) -> Tensor:
    """Entries as mask columns: one entry spans several, or a column holds several.

    bool[TQ, Hs, N] -> bool[TQ, Hs, TK]
    """
    if size >= key_block:
        return entries.repeat_interleave(size // key_block, -1)[..., :columns]
    per = key_block // size
    grouped = pad(entries, (0, columns * per - entries.shape[-1])).unflatten(-1, (columns, per))
    return grouped.any(-1) if most else grouped.all(-1)


def _ordered(blocks: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """How many columns each row of blocks has, and which, those first, for every query head.

    bool[Hs, TQ, TK] -> i32[1, Hq, TQ], i32[1, Hq, TQ, TK]
    """
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = blocks.sum(-1, dtype=torch.int32)
    return count.repeat_interleave(share, 0)[None], order.repeat_interleave(share, 0)[None]
