"""A causal language model of transformers: what its attention is given, and what it says when that
attention is another.

The only importer of transformers.  Nothing is fetched: a model is a folder, or a GGUF file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from hsgen.captures import Group
from hsgen.errors import HsgenError

OURS = "hsgen"  # the name of our attention inside transformers

# layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> o [T, Hq, Dv]; softmax scale 1/sqrt(D), causal
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A causal language model and its tokenizer.  `layers`: how many attend."""

    name: str
    network: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    layers: int

    def tokens(self, text: str, count: int) -> Tensor:
        """The first tokens of a text.  -> i64[count]

        Raises:
            HsgenError: it has not as many.
        """
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0, :count]
        if len(ids) < count:
            raise HsgenError(f"tokens: expected at most {len(ids)}, which is the text, got {count}")
        return ids.to(self.network.device)

    @torch.no_grad()
    def surprise(self, ids: Tensor, attention: Attention) -> Tensor:
        """Negative log-likelihood of each token after the first, in nats.  i64[T] -> f32[T - 1]"""
        with _attending(self.network, attention):
            logits = self.network(ids[None], use_cache=False).logits[0, :-1]
        return F.cross_entropy(logits.float(), ids[1:], reduction="none")

    def capture(self, ids: Tensor, layers: Sequence[int] = ()) -> list[Group]:
        """Queries, keys and values of dense attention on the CPU, by layer and key head; no layers mean
        all.
        """
        found: list[Group] = []

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not layers or layer in layers:
                grouped = q.unflatten(1, (k.shape[1], -1))
                found.extend(
                    Group(layer=layer, kv_head=h, q=grouped[:, h], k=k[:, h], v=v[:, h]).prefix(
                        len(q)
                    )
                    for h in range(k.shape[1])
                )
            return dense(layer, q, k, v)

        self.surprise(ids, attention)
        return found


def load(path: Path, device: str = "cpu") -> Model:
    """A model from a folder as transformers saves it, or from a GGUF file; weights in float32.

    Raises:
        HsgenError: there is none, or transformers cannot read it.
    """
    folder, source = path, {}
    if path.suffix == ".gguf":
        folder, source = path.parent, {"gguf_file": path.name}
    if not path.exists():
        raise HsgenError(f"{path}: expected a folder with a model, or a .gguf file, found nothing")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, **source
        )
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, **source
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise HsgenError(f"{path}: transformers cannot read this model: {error}") from error
    transformers.AttentionInterface.register(OURS, _forward)
    transformers.AttentionMaskInterface.register(OURS, _no_mask)
    network = network.eval().to(device)
    network.set_attn_implementation(OURS)
    layers = network.config.get_text_config().num_hidden_layers
    return Model(name=path.name, network=network, tokenizer=tokenizer, layers=layers)


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to every earlier token and the own."""
    del layer
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o[0].transpose(0, 1)


class _attending:
    """Within this, a network's layers attend by `attention`."""

    def __init__(self, network: Any, attention: Attention) -> None:
        self.config, self.attention = network.config.get_text_config(), attention

    def __enter__(self) -> None:
        self.config.hsgen_attention = self.attention

    def __exit__(self, *_: object) -> None:
        del self.config.hsgen_attention


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]"""
    if attention_mask is not None or len(query) > 1:
        raise HsgenError("expected one text without padding")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    width = q.shape[-1] ** -0.5
    if scaling is not None and scaling != width:
        q = q * (scaling / width)
    return module.config.hsgen_attention(module.layer_idx, q, k, v)[None], None


def _no_mask(*_: object, **__: object) -> None:
    """One text without padding needs none: attention is causal by itself."""
