"""Any spec as an `attn_implementation` of transformers.

    name = hsgen.integrations.transformers.register("moba", dense_layers=(0, 1))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)

Registers the attention and its mask function: without the latter a padded batch comes without a mask, and is
attended as if there were no padding.  Padding is left out of what kernels see, so that the blocks of each
sequence begin at its first token, and a padded batch says what its sequences say alone.

transformers' caches keep keys and values alone: each step then pools all of them again.  `new_cache` makes
one that keeps what the spec pools too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from hsgen import spec as language
from hsgen.errors import ArgumentError, HsgenError
from hsgen.integrations import segments
from hsgen.integrations.binding import kernel_of, with_scale
from hsgen.integrations.caches import KernelLayer
from hsgen.reference import tensor_kinds
from hsgen.runtime import Kernel, load_kernel
from hsgen.spec import Spec

# layer, q [B, T, Hq, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv] -> tensors of the spec, [B, T or S, ...]
Inputs = Callable[[Any, Tensor, Tensor, Tensor], Mapping[str, Tensor]]

LEAST = (5, 6)  # from which on mask functions are told of lengths and offsets
CACHES = ("cache", "past_key_values")  # what models call one, newer ones first
UNKNOWN = (
    "softcap",
    "s_aux",
    "position_bias",
)  # what models add to logits, and no spec here is told
GIVEN = """\
hsgen: 1
name: given_blocks
causal: true
levels:
  - name: block
    partition: {{blocks: {size}}}
    pool: {{keys: mean}}
    score: {{form: dot, share: group, reduce: sum}}
    select: {{top_k: {count}}}
attend: [{{name: selected, over: block}}]
reuse: [{{level: block, over: layers, as: final, pattern: FS}}]
"""

_registered: dict[str, Attention] = {}


def register(
    spec: str | Path | Spec,
    name: str | None = None,
    *,
    dense_layers: Sequence[int] = (),
    inputs: Inputs | None = None,
    interpret: bool = False,
    check: bool | None = None,
) -> str:
    """Make a spec an `attn_implementation`.

    Heads and head dims are the model's, whatever the spec says of them; an index stays as the spec has it.
    Layers whose attention slides keep their window and those without causality their mask, both dense; so are
    those that have no number (`layer_idx`), as in the towers of other modalities.
    A layer that is given `block_indices` (MiniMax-M3) attends to these, not to what the spec would choose;
    where only other layers of the model have an indexer, a layer is dense.

    Args:
        spec: A path, the name of a shipped spec, or a Spec.
        name: Of the implementation; None takes `hsgen:` and the spec's.  Registered before, it is replaced.
        dense_layers: Numbers of layers, from 0, that attend everything.
        inputs: What the spec needs beside q, k and v; given the layer and these, after rotation.
        interpret: As of load_kernel.
        check: As of load_kernel.

    Returns:
        The name.

    Raises:
        HsgenError: this transformers calls mask functions in another way.
        SpecError: the spec is wrong.
        ArgumentError: a name that transformers would look for elsewhere; a spec without causality.
    """
    installed = version("transformers")
    if tuple(map(int, installed.split(".")[:2])) < LEAST:
        raise HsgenError(
            f"transformers {installed}: expected {'.'.join(map(str, LEAST))} or newer",
            help='pip install "hsgen[transformers]"',
        )
    loaded = spec if isinstance(spec, Spec) else language.load(spec)
    chosen = name or f"hsgen:{loaded.name}"
    if "/" in chosen or "|" in chosen:
        raise ArgumentError(
            f"name: expected one without / and |, which mean kernels of a hub and pages, got {chosen!r}"
        )
    if not loaded.causal:
        raise ArgumentError(
            f"spec {loaded.name}: expected causal attention, as layers of decoders have"
        )
    made = Attention(
        loaded,
        frozenset(dense_layers),
        inputs,
        {"interpret": interpret, "check": check},
    )
    _registered[chosen] = made
    AttentionInterface.register(chosen, made)
    AttentionMaskInterface.register(chosen, segments.segments)
    return chosen


def new_cache(model: Any, capacity: int) -> DynamicCache:
    """A cache for a model that attends by a registered spec: `model(..., cache=cache)`, `past_key_values=` in
    older versions; `keeping` says which.

    Dense layers and sliding ones have transformers' own.

    Args:
        model: Of transformers, or its config.
        capacity: Most tokens of a sequence, without padding.

    Raises:
        ArgumentError: the model attends otherwise.
    """
    config: Any = getattr(model, "config", model).get_text_config(decoder=True)
    name = config._attn_implementation
    if name not in _registered:
        shown = ", ".join(sorted(_registered)) or "none"
        raise ArgumentError(
            f"model: expected an attn_implementation that was registered, got {name!r}",
            help=f"registered are: {shown}; model.set_attn_implementation(name)",
        )
    made = DynamicCache(config=config)
    for i, layer in enumerate(made.layers):
        if type(layer) is DynamicLayer and i not in _registered[name].dense_layers:
            made.layers[i] = KernelLayer(capacity)
    return made


def keeping(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as the argument that a model of this transformers takes, for `model(...)` and `generate`.

    Raises:
        ArgumentError: neither the model's `forward` nor that of a model inside it says which.
    """
    inner = model
    while inner is not None:
        for forward in (inner.forward, type(inner).forward):  # one put over it may say nothing
            named = inspect.signature(forward).parameters  # of what a decorator wraps
            for name in CACHES:
                if name in named:
                    return {name: cache}
        inner = _inside(inner)
    kind, told = type(model).__name__, inspect.signature(model.forward)
    raise ArgumentError(
        f"model: expected a forward with an argument {' or '.join(CACHES)}, got {kind}.forward{told}",
        help="give the model inside it, or wrap its forward by functools.wraps",
    )


def _inside(model: Any) -> Any:
    """The model that a compiled one, a parallel one or one with adapters is made of; None if it is none."""
    if (base := getattr(model, "get_base_model", None)) is not None:
        return base()
    return getattr(model, "_orig_mod", None) or getattr(model, "module", None)


class Attention:
    """What transformers calls in every layer.

    Attributes:
        spec: What layers attend by.
        dense_layers: Those that do not.
    """

    def __init__(
        self,
        spec: Spec,
        dense_layers: frozenset[int],
        inputs: Inputs | None,
        options: Mapping[str, Any],
    ) -> None:
        self.spec = spec
        self.dense_layers = dense_layers
        self._inputs = inputs
        self._options = options
        self._kernels: dict[tuple[int, ...], Kernel] = {}

    def __repr__(self) -> str:
        dense = ", ".join(map(str, sorted(self.dense_layers))) or "none"
        return f"Attention({self.spec.name}; dense layers: {dense})"

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        block_indices: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query [B, Hq, T, D], key and value [B, Hkv, S, D] -> [B, T, Hq, D]"""
        layer = getattr(module, "layer_idx", None)
        where = f"layer {layer}, {type(module).__name__}"
        if wrong := [x for x in UNKNOWN if others.get(x) is not None]:
            raise HsgenError(f"{where}: no spec is told of {wrong[0]}, which this model has")
        if others.get("cache") is not None:  # a model hands on what it does not know
            raise HsgenError(
                f"{where}: the model of this transformers knows no argument cache, and keeps nothing in it",
                help="past_key_values=, or **hsgen.integrations.transformers.keeping(model, cache)",
            )
        if dropout:
            raise HsgenError(f"{where}: no attention drops weights, got dropout {dropout}")
        query = with_scale(query, scaling)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        layered: KernelLayer | None = getattr(key, "hsgen_layer", None)
        if block_indices is not None:
            if layered is not None:
                raise HsgenError(
                    f"{where}: the model keeps index keys in its own cache; call it without ours"
                )
            size, count = module.indexer.block_size, getattr(module.indexer, "topk_blocks", 1)
            spec = _given_blocks(size, max(count, block_indices.shape[-1]))
            bound = (query.shape[1], key.shape[1]), (query.shape[3], value.shape[3])
            made = load_kernel(spec, heads=bound[0], head_dim=bound[1], layer=1, **self._options)
            return _given(made, query, key, value, attention_mask, (block_indices, size)), None
        indexed = getattr(module, "indexer", self) is None  # other layers of the model have one
        if layer is None or layer in self.dense_layers or sliding_window or not causal or indexed:
            if layered is not None:
                raise HsgenError(f"{where}: a dense layer, for which our cache keeps no tokens")
            return _dense(query, key, value, attention_mask, causal=causal), None
        if attention_mask is not None and attention_mask.ndim != 2:
            raise HsgenError(
                f"{where}: expected a mask that is causal, of documents or padded, got another one",
                help="dense_layers takes any",
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        made = self._inputs(module, q, k, v) if self._inputs else {}
        tensors = {"q": q, "k": k, "v": v, **made}
        kernel = self._kernel(layer, q, k, v)
        kinds = tensor_kinds(kernel.spec)
        if layered is not None:
            of_rows = {n: x for n, x in tensors.items() if kinds.get(n) in ("query", "key")}
            rest = {n: x for n, x in tensors.items() if n not in of_rows}
            rows = None
            if attention_mask is not None:
                rows = segments.rows_of(attention_mask, q.shape[1]) > 0
            return layered.attend(kernel, of_rows, rest, rows), None
        if len(q) == 1 and (starts := others.get("cu_seq_lens_q")) is not None:
            ends, longest = others["cu_seq_lens_k"], others.get("max_length_k")
            return _of_documents(kernel, tensors, kinds, starts, ends, longest), None
        return _sparse(kernel, tensors, kinds, attention_mask), None

    def _kernel(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
        """The spec of a layer, for the model's heads."""
        key = (layer, q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        if key not in self._kernels:
            _, query, kv, qk, dv = key
            made = kernel_of(self.spec, layer, query=query, kv=kv, dims=(qk, dv), **self._options)
            self._kernels[key] = made
        return self._kernels[key]


@cache
def _given_blocks(size: int, count: int) -> Spec:
    """At most so many blocks of so many tokens, which are always brought, by key head."""
    return language.parse(GIVEN.format(size=size, count=count), "given_blocks.yaml")


def _given(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor | None,
    blocks: tuple[Tensor, int],
) -> Tensor:
    """Attend to blocks of so many slots that the model chose, i64[B, Hkv, T, K], -1 where there is none.

    Kernels count blocks from a document's first token: with padding before it, or several documents, a mask
    says what is seen, which takes as long as dense attention.
    """
    at: dict[str, Tensor] = {}
    if numbers is not None:
        if numbers.ndim != 2 or not _at_slots(numbers):
            return _dense(query, key, value, numbers, causal=True, blocks=blocks)
        lengths = (numbers != segments.ABSENT).sum(1, dtype=torch.int32)
        at = {"q_offset": lengths - query.shape[2], "kv_lens": lengths}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    chosen = {"block": blocks[0].transpose(1, 2).to(torch.int32)}
    return _called(kernel, q=q, k=k, v=v, selection=chosen, **at)


def _at_slots(numbers: Tensor) -> bool:
    """Whether every sequence is one document that begins at slot 0, padding behind it alone."""
    later = numbers[:, 1:]
    return bool(((later <= 0) | ((later == 1) & (numbers[:, :-1] == 1))).all())


def _called(kernel: Callable[..., Any], **arguments: object) -> Tensor:
    """A call that returns o alone."""
    return kernel(**arguments)


def _of_documents(
    kernel: Kernel,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    starts: Tensor,
    ends: Tensor,
    longest: int | Tensor | None,
) -> Tensor:
    """Attend by a spec in a batch that is packed already, as one sequence of documents."""
    packed = {n: x[0] if kinds.get(n) in ("query", "key") else x for n, x in tensors.items()}
    o = _called(
        kernel,
        **packed,
        cu_seqlens_q=starts.to(torch.int32),
        cu_seqlens_k=ends.to(torch.int32),
        max_seqlen_k=None if longest is None else int(longest),
    )
    return o[None]


def _sparse(
    kernel: Kernel,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    numbers: Tensor | None,
) -> Tensor:
    """Attend by a spec, padding left out.  [B, T, Hq, D] -> [B, T, Hq, Dv]"""
    tokens = tensors["q"].shape[1]
    if numbers is None:
        return _called(kernel, **tensors)
    if getattr(numbers, "hsgen_whole", False):
        lengths = (numbers != segments.ABSENT).sum(1, dtype=torch.int32)
        return _called(kernel, **tensors, q_offset=lengths - tokens, kv_lens=lengths)
    where = segments.packing(numbers, tokens)
    places = {"query": where.rows, "key": where.keys}
    packed = {n: x[places[kinds[n]]] if kinds[n] in places else x for n, x in tensors.items()}
    o = _called(
        kernel,
        **packed,
        cu_seqlens_q=where.cu_seqlens_q,
        cu_seqlens_k=where.cu_seqlens_k,
        max_seqlen_k=where.max_seqlen_k,
    )
    return where.unpacked(o)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    blocks: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attend everything that a mask allows, or of it blocks.  [B, Hq, T, D] -> [B, T, Hq, D]"""
    (B, Hq, T, _), (Hkv, S) = query.shape, key.shape[1:3]
    if (mask is not None and mask.ndim == 2) or (mask is None and causal and 1 < T < S) or blocks:
        mask = (
            mask
            if mask is not None and mask.ndim == 4
            else segments.mask(mask, B, T, S, query.device)
        )
    if blocks and mask is not None:
        indices, size = blocks
        count = -(-S // size)
        chosen = indices.new_zeros(B, indices.shape[1], T, count + 1, dtype=torch.bool)
        chosen.scatter_(-1, indices.where(indices >= 0, count), value=True)
        seen = chosen[..., :count].repeat_interleave(size, -1)[..., :S]
        mask = mask & seen.repeat_interleave(Hq // indices.shape[1], 1)
    square = causal and mask is None and T > 1
    o = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=square, enable_gqa=Hq != Hkv
    )
    if mask is not None and mask.dtype == torch.bool:  # a row that sees nothing
        o = o.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return o.transpose(1, 2).contiguous()
