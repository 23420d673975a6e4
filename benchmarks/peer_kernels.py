"""GPU kernels of peers as calls on hsgen's tensors: their layouts, and their forms of a selection.

What may be prepared is prepared before a call, to their advantage.  Times nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hsgen.spec import Blocks, Spec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calls:
    """What a peer does with one set of inputs; None: it has no such call.

    Attributes:
        given: hsgen's selection in its form.  i32[1, T, Hs, K] ->
        listed: and back.
        attend: its form of a selection -> o of the selected branch alone.
        choose: -> its form of a selection, and nothing else.
        compress: -> o of the compressed branch, and its form of a selection.
        whole: -> o of both branches, gated; it chooses what `compress` does.
    """

    given: Callable[[Tensor], Tensor]
    listed: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor], Tensor]
    choose: Callable[[], Tensor] | None = None
    compress: Callable[[], tuple[Tensor, Tensor]] | None = None
    whole: Callable[[], Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One peer.

    Attributes:
        title: for the tables.
        repository: as GitHub names it; its checkout is DIR/<last part>.
        module: that is imported of it.
        bare: packages that are entered without their `__init__`.
        systems: the specs that it has all of, not the selected branch alone.
        make: (module, spec, tensors) -> its calls.
    """

    title: str
    repository: str
    module: str
    bare: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    make: Callable[[ModuleType, Spec, Mapping[str, Tensor]], Calls]


# --- selections


def padded_last(indices: Tensor) -> Tensor:
    """The same sets, ascending, -1 at the end: some read a list up to its first -1.  [..., K]"""
    last = torch.iinfo(indices.dtype).max
    ordered = torch.where(indices < 0, last, indices).sort(-1).values
    return torch.where(ordered == last, -1, ordered).to(torch.int32)


def by_head(indices: Tensor) -> Tensor:
    """[1, T, Hs, K] -> [Hs, T, K]"""
    return padded_last(indices)[0].transpose(0, 1).contiguous()


def by_token(chosen: Tensor) -> Tensor:
    """[Hs, T, K] -> [1, T, Hs, K]"""
    return padded_last(chosen).transpose(0, 1).contiguous()[None]


# --- numbers of a spec


def _blocks(spec: Spec, level: str) -> Blocks:
    partition = spec.level(level).partition
    assert isinstance(partition, Blocks)
    return partition


def _budget(spec: Spec) -> int:
    select = spec.level("block").select
    assert select is not None
    assert select.top_k is not None
    return select.top_k


# --- peers


def xunhao(module: ModuleType, spec: Spec, x: Mapping[str, Tensor]) -> Calls:
    """XunhaoLai's operators, put together as their module does."""
    q, k, v = (x[name][0] for name in ("q", "k", "v"))
    T, size, topk = len(q), _blocks(spec, "block").size, _budget(spec)
    cu = torch.tensor([0, T], dtype=torch.int32, device=q.device)

    def attend(chosen: Tensor) -> Tensor:
        return module.topk_sparse_attention(q, k, v, chosen, size, cu, None)[None]

    if "compressed_key_weight" not in x:
        return Calls(given=by_head, listed=by_token, attend=attend)
    length, stride = (getattr(_blocks(spec, "compressed"), n) for n in ("size", "stride"))
    apart = "_compressed" if "k_compressed" in x else ""
    k_source, v_source = (x[name + apart][0] for name in ("k", "v"))
    k_weight, v_weight = (x[f"compressed_{n}_weight"].flatten(1, 2) for n in ("key", "value"))
    position, entries = x["compressed_key_position"], (T - length) // stride + 1
    gates = [gate.contiguous()[..., None] for gate in x["gates"][0].unbind(-1)]

    def compress() -> tuple[Tensor, Tensor]:
        pooled, cu_pooled = module.linear_compress(k_source, k_weight, cu, length, stride, position)
        values, _ = module.linear_compress(v_source, v_weight, cu, length, stride, None)
        lengths = (cu, cu_pooled, T, entries)
        o, chosen = module.compressed_attention(
            q, pooled, values, length, stride, size, topk, *lengths, None, 1, 2
        )
        return o[None], chosen

    def whole() -> Tensor:
        o, chosen = compress()
        return gates[0] * o + gates[1] * attend(chosen)

    return Calls(given=by_head, listed=by_token, attend=attend, compress=compress, whole=whole)


def fla(module: ModuleType, spec: Spec, x: Mapping[str, Tensor]) -> Calls:
    """flash-linear-attention's `parallel_nsa`, whole and in its parts."""
    q, k, v = (x[name] for name in ("q", "k", "v"))
    T, size, topk = q.shape[1], _blocks(spec, "block").size, _budget(spec)
    scale = q.shape[-1] ** -0.5
    gates = [gate.contiguous() for gate in x["gates"].unbind(-1)] if "gates" in x else []

    def attend(chosen: Tensor) -> Tensor:
        return module.parallel_nsa_fwd(q, k, v, chosen, topk, size, scale)[0]

    def choose() -> Tensor:
        pooled = module.mean_pooling(k, size)
        return module.parallel_nsa_topk(q, pooled, T, None, topk, size, scale)

    def compress() -> tuple[Tensor, Tensor]:
        pooled, values = (module.mean_pooling(y, size) for y in (k, v))
        o, lse = module.parallel_nsa_compression(q, pooled, values, T, size, scale)
        return o, module.parallel_nsa_topk(q, pooled, T, lse, topk, size, scale)

    def whole() -> Tensor:
        return module.parallel_nsa(
            q, k, v, g_cmp=gates[0], g_slc=gates[1], block_counts=topk, block_size=size
        )

    return Calls(
        given=padded_last,
        listed=padded_last,
        attend=attend,
        choose=choose,
        compress=compress,
        whole=whole,
    )


def fsa(module: ModuleType, spec: Spec, x: Mapping[str, Tensor]) -> Calls:
    """FlashSparseAttention, which has the selected branch only."""
    q, k, v = (x[name][0] for name in ("q", "k", "v"))
    size = _blocks(spec, "block").size
    cu = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)

    def attend(chosen: Tensor) -> Tensor:
        return module.FSA_topk_sparse_attention(q, k, v, chosen, size, cu)[None]

    return Calls(given=by_head, listed=by_token, attend=attend)


PEERS = {
    "xunhao": Peer(
        title="XunhaoLai",
        repository="XunhaoLai/native-sparse-attention-triton",
        module="native_sparse_attention.ops",
        systems=("nsa_xunhao", "nsa"),
        make=xunhao,
    ),
    "fla": Peer(
        title="fla",
        repository="fla-org/flash-linear-attention",
        module="fla.ops.nsa.parallel",
        bare=("fla", "fla.ops"),
        systems=("nsa_fla",),
        make=fla,
    ),
    "fsa": Peer(
        title="FSA",
        repository="Relaxed-System-Lab/Flash-Sparse-Attention",
        module="fsa.ops",
        make=fsa,
    ),
}
