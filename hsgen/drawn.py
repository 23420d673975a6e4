"""What stands in for a model where none is at hand: rows that drift, and lists that another layer chose.

Neighbouring rows resemble one another, so that they choose alike, as a model's do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsgen import planner
from hsgen.reference import tensor_shapes
from hsgen.spec import Level, Spec

DRIFT = 128  # tokens after which nothing is left of a row
SLOW, QUICK = 0.9, 0.4  # parts of a row that drift, and that are its own
DIM = 16  # of the vectors that lists are chosen by
AT_ONCE = 1 << 26  # scores


def drifting(size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal numbers that change from token to token as a model's do: most of a row is in the next.

    Heads share half of what drifts, or no group would want the same keys.  [T, ..., D]
    """
    knots = -(-size[0] // DRIFT) + 1
    device = generator.device
    own = torch.randn((knots, *size[1:]), generator=generator, device=device)
    shared = torch.randn(
        (knots, *[1] * (len(size) - 2), size[-1]), generator=generator, device=device
    )
    at = torch.arange(size[0], device=device) / DRIFT
    before, part = at.long(), (at % 1.0).view(-1, *[1] * (len(size) - 1))
    drift = (own + shared) * 0.5**0.5
    slow = torch.lerp(drift[before], drift[before + 1], part)
    return (SLOW * slow + QUICK * torch.randn(size, generator=generator, device=device)).to(dtype)


def read_shapes(spec: Spec, B: int, T: int, S: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what kernels read: a layer that takes over reads nothing of an index."""
    found = tensor_shapes(spec, B, T, S)
    if not spec.brought:
        return found
    read = {node.name for node in planner.plan(spec).nodes()}
    return {name: shape for name, shape in found.items() if name in read}


# --- lists of a layer that takes over


def lists(spec: Spec, B: int, T: int, S: int, generator: torch.Generator) -> dict[str, Tensor]:
    """By level that another layer chose of, what it could have chosen: the entries of the greatest of some
    scores, those that the level forces first.  The rows are the last ones.  i32[B, T, Hs, K]
    """
    found: dict[str, Tensor] = {}
    for name in spec.brought:
        level, heads = spec.level(name), _heads(spec, name)
        entries = _entries(level, S)
        width = _width(spec, level, entries)
        chosen = [_chosen(spec, level, (T, S, heads, entries, width), generator) for _ in range(B)]
        found[name] = torch.stack(chosen)
    return found


def any_lists(spec: Spec, B: int, T: int, S: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Lists in no order, with holes, with repeats, and with entries that a row cannot see."""
    found: dict[str, Tensor] = {}
    for name in spec.brought:
        level = spec.level(name)
        shape = (B, T, _heads(spec, name), _width(spec, level, _entries(level, S)))
        made = torch.randint(
            -1, _entries(level, S), shape, generator=generator, device=generator.device
        )
        found[name] = made.to(torch.int32)
    return found


def _heads(spec: Spec, level: str) -> int:
    """Heads that choose for themselves."""
    graph = planner.plan(spec)
    return graph.sizes.get(graph[f"{level}.taken"].type.dims[2], 1)


def _width(spec: Spec, level: Level, entries: int) -> int:
    """Slots of a list; where counts vary as many as a part of the entries, or as all there are."""
    if level.select is None or not level.select.counts_vary:
        return spec.width(level)
    return max(1, math.ceil((level.select.fraction or 1.0) * entries))


def _entries(level: Level, S: int) -> int:
    return max(1, math.ceil(S / level.partition.stride))


def _chosen(
    spec: Spec, level: Level, sizes: tuple[int, int, int, int, int], generator: torch.Generator
) -> Tensor:
    """Of one sequence.  i32[T, Hs, K]"""
    T, S, heads, entries, width = sizes
    stride, device = level.partition.stride, generator.device
    force = level.select.force if level.select else None
    q = drifting((S, heads, DIM), generator, torch.float32)[S - T :]
    k = drifting((S, heads, DIM), generator, torch.float32)[::stride]
    entry = torch.arange(entries, device=device)
    made = torch.full((T, heads, width), -1, dtype=torch.int32, device=device)
    step = max(1, AT_ONCE // (heads * entries))
    for start in range(0, T, step):
        scores = torch.einsum("thd,ehd->the", q[start : start + step], k)
        own = (torch.arange(start, start + len(scores), device=device) + S - T) // stride
        own = own[:, None, None] if spec.causal else own.new_full((1, 1, 1), entries - 1)
        if force:
            forced = (entry < force.first) | (entry > own - force.last)
            scores = scores.masked_fill(forced, math.inf)
        scores = scores.masked_fill(entry > own, -math.inf)
        best, index = scores.topk(min(width, entries), dim=-1)
        index = index.masked_fill(best == -math.inf, entries).sort(-1).values
        made[start : start + step, :, : index.shape[-1]] = index.masked_fill(index == entries, -1)
    return made
