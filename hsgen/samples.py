"""Tensors to time a spec on: random ones, and ones that look like a model's.

Real-like tensors are captured heads, put together and repeated until they are large enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hsgen.captures import Group
from hsgen.drawn import drifting, read_shapes
from hsgen.measurer import Shape
from hsgen.reference import tensor_kinds
from hsgen.spec import Spec

Kind = Literal["random", "real"]

ROTATED = 256 << 20  # inputs below this many bytes are rotated, so that no cache keeps them
SETS = 3
ROPE_BASE = 1e6
NOISE = 0.05  # of the standard deviation, so that repeated text is not the same text


def make(
    spec: Spec,
    kind: Kind,
    tokens: int,
    device: str,
    seed: int,
    groups: Sequence[Group],
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Every tensor that the spec reads, for one sequence; of a kind that is "real" made of groups."""
    if kind == "real":
        shape = Shape(queries=tokens, keys=tokens)
        return for_shape(spec, shape, groups, device=device, seed=seed, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    shapes = read_shapes(spec, 1, tokens, tokens)
    return {name: _random(name, shape, generator, dtype) for name, shape in shapes.items()}


def for_shape(
    spec: Spec,
    shape: Shape,
    groups: Sequence[Group],
    *,
    device: str,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Every tensor that the spec reads, for a call of a shape, whose neighbouring rows choose alike.

    Queries are the last ones.  Without captured heads, what resembles is drawn: see `drawn`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shapes = read_shapes(spec, shape.sequences, shape.queries, shape.keys)
    kinds, made = tensor_kinds(spec), dict[str, Tensor]()
    for name, size in shapes.items():
        made[name] = _random(name, size, generator, dtype)
        if name.endswith("_weight"):
            made[name] = _mean(made[name]) if len(size) == 4 else made[name]
        if name.partition("_")[0] not in ("q", "k", "v") or kinds[name] == "parameter":
            continue
        heads = _real(name, size, spec, groups) if groups else None
        for z in range(shape.sequences):
            if heads is not None:
                rows = _extend(heads.to(device, dtype), shape.keys, generator)
            else:
                rows = drifting((shape.keys, *size[2:]), generator, dtype)
            made[name][z] = rows[shape.keys - size[1] :].reshape(size[1:])
    return made


def size_in_bytes(tensors: dict[str, Tensor]) -> int:
    """What one set of inputs weighs."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _random(
    name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Normal numbers; gates between 0 and 1; maps that keep the size of what they map; angles of RoPE."""
    if name == "route":  # the second way of each sequence
        return torch.ones(shape, dtype=torch.int32, device=generator.device)
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    if name.startswith(("cos_", "sin_")):
        return x.copy_(_angles(shape, generator.device)[name[:3]])
    if name == "gates":
        return x.sigmoid_()
    if name == "w_index":
        return x.abs_()
    if name.endswith("_weight"):
        return x.mul_((shape[1] * shape[2]) ** -0.5)
    return x


def _angles(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """cos and sin of every position, of a base as models have.  [B, S, D / 2]"""
    position = torch.arange(shape[1], device=device, dtype=torch.float64)
    pair = torch.arange(shape[2], device=device, dtype=torch.float64) / shape[2]
    angle = position[:, None] * ROPE_BASE**-pair
    return {"cos": angle.cos(), "sin": angle.sin()}


def _mean(weight: Tensor) -> Tensor:
    """The learned map that is a mean.  [H, size, D, D]"""
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return (eye / weight.shape[1]).expand(weight.shape).contiguous()


def _real(name: str, shape: tuple[int, ...], spec: Spec, groups: Sequence[Group]) -> Tensor | None:
    """Captured heads in the place of a tensor, [T', H, D], or None where nothing was captured."""
    assert spec.heads is not None, "heads must be bound"
    base, index = name.partition("_")[0], name.endswith("_index")
    heads = shape[2] if len(shape) == 4 else 1
    match base:
        case "q":
            kv = 1 if index else spec.heads.kv
            return torch.stack([_query(h, heads // kv, shape[-1], groups) for h in range(heads)], 1)
        case "k" if index:
            return _parts(0, shape[-1], [_centred(group.k) for group in groups])[:, None]
        case "k":
            return torch.stack(
                [_parts(h, shape[-1], [g.k for g in groups]) for h in range(heads)], 1
            )
        case "v":
            return torch.stack(
                [_parts(h, shape[-1], [g.v for g in groups]) for h in range(heads)], 1
            )
    return None


def _query(head: int, group: int, dim: int, groups: Sequence[Group]) -> Tensor:
    """One query head over the same captured groups as its key head.  -> [T', D]"""
    sources = [g.q[:, head % g.q.shape[1]] for g in groups]
    return _parts(head // group, dim, sources)


def _parts(head: int, dim: int, sources: Sequence[Tensor]) -> Tensor:
    """A head of `dim` numbers from as many captured heads as that takes.  -> [T', D]"""
    count = -(-dim // sources[0].shape[-1])
    chosen = [sources[(head * count + c) % len(sources)] for c in range(count)]
    return torch.cat(chosen, -1)[:, :dim]


def _centred(k: Tensor) -> Tensor:
    wide = k.float()
    return (wide - wide.mean(0)).to(k.dtype)


def _extend(x: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Repeat a text, each time with other noise, its positions as captured.  [T', ...] -> [T, ...]"""
    repeated = x[torch.arange(tokens, device=x.device) % len(x)]
    noise = torch.randn(repeated.shape, generator=generator, device=x.device, dtype=repeated.dtype)
    return repeated.add_(noise.mul_(NOISE * float(x.float().std())))
