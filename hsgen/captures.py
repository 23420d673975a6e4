"""Queries, keys and values of a real model, as a safetensors file keeps them.

A file holds one set a layer and kv head: `layer05.kv1.q` [1, T, G, D], `layer05.kv1.k` [1, T, 1, D] and
`layer05.kv1.v` [1, T, 1, Dv], after RoPE, of a causal model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import Tensor

from hsgen.errors import HsgenError

NAME = re.compile(r"layer(\d+)\.kv(\d+)\.q")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """One captured GQA group.  q: [T, G, D], k: [T, D], v: [T, Dv]"""

    layer: int
    kv_head: int
    q: Tensor
    k: Tensor
    v: Tensor

    def query_head(self, index: int) -> int:
        """The model's number of the group's query head `index`."""
        return self.kv_head * self.q.shape[1] + index

    def prefix(self, tokens: int, device: str = "cpu") -> Group:
        """The first tokens, on a device."""
        q, k, v = (x[:tokens].to(device) for x in (self.q, self.k, self.v))
        return Group(layer=self.layer, kv_head=self.kv_head, q=q, k=k, v=v)


def load(path: Path, layers: Sequence[int] = ()) -> list[Group]:
    """Every group of a file, by layer and kv head.

    Args:
        path: The file.
        layers: Only these; none means all.

    Raises:
        HsgenError: it cannot be read, or holds no such group.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = sorted(name for name in file.keys() if NAME.fullmatch(name))  # noqa: SIM118
            there = {int(NAME.findall(name)[0][0]) for name in names}
            found = [_group(name, file.get_tensor) for name in names]
    except (OSError, safetensors.SafetensorError) as error:
        raise HsgenError(f"{path}: cannot read this capture: {error}") from error
    if not names:
        raise HsgenError(
            f"{path}: expected tensors layer<number>.kv<number>.q, .k and .v, found none"
        )
    if missing := sorted(set(layers) - there):
        raise HsgenError(
            f"{path}: expected layers {', '.join(map(str, missing))}",
            help=f"it has layers {', '.join(map(str, sorted(there)))}",
        )
    return [group for group in found if not layers or group.layer in layers]


def metadata(path: Path) -> dict[str, str]:
    """What a file says of itself."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _group(name: str, get: Callable[[str], Tensor]) -> Group:
    """One set of tensors, by the name of its queries."""
    layer, kv_head = NAME.findall(name)[0]
    q, k, v = (get(name[:-1] + x)[0] for x in "qkv")
    return Group(layer=int(layer), kv_head=int(kv_head), q=q, k=k[:, 0], v=v[:, 0])
