"""Any spec on a captured GQA group: the group's heads in place of the spec's, and stand-ins for tensors
that the model has none of.  What stands in for what is said in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hsgen.errors import HsgenError
from hsgen.reference import tensor_kinds, tensor_shapes
from hsgen.reference.layouts import part_of
from hsgen.spec import HeadDim, Heads, Index, Level, Parts, Spec


def bind(spec: Spec, *, query: int, kv: int, dim: int | tuple[int, int]) -> Spec:
    """The same attention for other heads; an index gets one index head a query head.

    Where index heads stand for key heads, it gets one a key head.  A table of ways by head goes on over
    and over, however many heads there are.

    Args:
        spec: The attention, bound or not.
        query: Query heads.
        kv: Key heads.
        dim: Of a key and a value, or one number for both.
    """
    qk, v = (dim, dim) if isinstance(dim, int) else dim
    changed = {
        "heads": Heads(query=query, kv=kv),
        "head_dim": HeadDim(qk=qk, v=v),
        "levels": tuple(_narrower(level, qk) for level in spec.levels),
        "index": spec.index and Index(heads=kv if spec.index_per_key_head else query, dim=qk),
        "route": spec.route and spec.route.of_heads(query),
    }
    return spec.model_copy(update=changed)


def _narrower(level: Level, qk: int) -> Level:
    """The same level, whose keys are turned in no more channels than they have."""
    turn = level.pool and level.pool.rotate
    if level.pool is None or turn is None or turn.dims <= qk:
        return level
    pool = level.pool.model_copy(update={"rotate": turn.model_copy(update={"dims": qk // 2 * 2})})
    return level.model_copy(update={"pool": pool})


def tensors(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """What a spec reads, made of one group.

    Args:
        spec: Bound to the group's heads.
        q: [1, T, G, D].
        k: [1, T, 1, D].
        v: [1, T, 1, Dv].
        gates: Of each branch; None opens all.

    Raises:
        HsgenError: nothing stands in for a tensor.
    """
    shapes = tensor_shapes(spec, 1, q.shape[1], k.shape[1])
    kinds = tensor_kinds(spec)
    estimates = {f"{x.name}_score": x for x in spec.levels if x.score.form == "given"}
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name in estimates:
            x = _masses(spec, estimates[name], shape, q, k)
        elif name.endswith("_split"):  # half of the text is the prompt
            x = torch.full(shape, q.shape[1] // 2, dtype=torch.int32, device=q.device)
        else:
            x = _tensor(name, kinds[name] == "parameter", shape, (q, k, v), gates)
        if x is None or tuple(x.shape) != shape:
            raise HsgenError(f"spec {spec.name}: nothing in a capture can stand in for {name}")
        made[name] = x
    return made


def _tensor(
    name: str,
    learned: bool,
    shape: tuple[int, ...],
    qkv: tuple[Tensor, Tensor, Tensor],
    gates: Sequence[float] | None,
) -> Tensor | None:
    """One tensor; None where there is no stand-in."""
    q, k, v = qkv
    if (neutral := _neutral(name)) is not None:
        return torch.full(shape, neutral, dtype=k.dtype, device=k.device)
    if learned and name not in ("layer", "route"):
        return _compression(name, shape, k)
    match name.partition("_")[0], name:
        case _, "q_index":  # of the group's queries the mean, where one index head serves them all
            return q if shape[2] == q.shape[2] else q.mean(2, keepdim=True)
        case _, "k_index":
            return _in_series(_centred(k[:, :, 0]), shape)
        case _, "w_index":
            return torch.ones_like(q[..., 0])
        case _, "gates":
            opened = torch.tensor(gates or [1.0] * shape[3], dtype=q.dtype, device=q.device)
            opened = opened if len(shape) == 4 else opened[:, None].expand(shape[3:])
            return opened.expand(shape).contiguous()
        case _, "bias":
            return _centred(v.norm(dim=-1))
        case _, _ if name.endswith("_starts"):
            at = torch.arange(k.shape[1], device=k.device)
            return (at % RUN == 0).to(k.dtype).expand(shape).contiguous()
        case "layer" | "route", _:  # the first layer; the first way
            return torch.zeros(shape, dtype=torch.int32, device=q.device)
        case "q", _:  # of a query for each group the mean of the group's
            return q if shape[2] == q.shape[2] else q.mean(2, keepdim=True)
        case "k", _:
            return _in_series(k, shape)
        case "v", _:
            return v
    return None


ROWS = 256  # whose masses are alive at once


def _masses(spec: Spec, level: Level, shape: tuple[int, ...], q: Tensor, k: Tensor) -> Tensor:
    """Of each entry what attention gives its tokens, the mean of the heads that choose as one."""
    S, (T, heads, entries) = k.shape[1], shape[1:]
    found = q.new_zeros(shape)
    token = torch.arange(S, device=q.device)
    for t in range(0, T, ROWS):
        p = torch.arange(t, min(t + ROWS, T), device=q.device)
        logits = torch.einsum("tgd,sd->tgs", q[0, t : t + ROWS], k[0, :, 0]) * k.shape[-1] ** -0.5
        seen = token <= p[:, None] if spec.causal else torch.ones_like(token <= p[:, None])
        mass = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        mass = mass.unflatten(1, (heads, -1)).mean(2)
        if isinstance(level.partition, Parts):
            entry = part_of(entries, seen.sum(-1), S)
        else:
            entry = (token // level.partition.stride).expand(len(p), -1)
        found[0, t : t + ROWS].scatter_add_(-1, entry[:, None].expand(mass.shape), mass)
    return found


RUN = 32  # tokens of a run, where a caller says where runs begin
OPEN, CLOSED = 20.0, -1e4  # a gate before its sigmoid; a sink that takes nothing


def _neutral(name: str) -> float | None:
    """The number that makes a tensor change nothing; None of one that has none.

    Equal gates of a pool make it a mean; captured keys are normed and rotated already.
    """
    if name == "output_gate":
        return OPEN
    if name == "sink" or name.endswith("_sink"):
        return CLOSED
    if name.endswith("_key_norm") or name.startswith("cos_"):
        return 1.0
    return 0.0 if name.startswith(("z_", "sin_")) else None


def _in_series(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same keys in every series, if there are several.  [1, T, ..., D] -> [1, T, ..., n, D]"""
    return keys if keys.ndim == len(shape) else keys.unsqueeze(-2).expand(shape)


def _compression(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Learned pooling that is a mean: every slot's weight is identity / size, every position 0.

    A codebook's words, and a tree's centroids, are keys, evenly spaced.
    """
    if name.endswith("_weight"):
        mean = torch.eye(shape[-1], dtype=like.dtype, device=like.device) / shape[1]
        return mean.expand(shape).contiguous()
    if name.endswith("_position"):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if name.endswith("_centroids"):  # [1, nodes, D]
        at = torch.arange(shape[1], device=like.device) * like.shape[1] // shape[1]
        return like[0, at].transpose(0, 1).contiguous()
    if name.endswith("_codebook"):  # [runs, words, dim]
        at = torch.arange(shape[1], device=like.device) * like.shape[1] // shape[1]
        return like[0, at, 0].unflatten(-1, (shape[0], shape[2])).transpose(0, 1).contiguous()
    return None


def _centred(k: Tensor) -> Tensor:
    """Minus the mean over the input: of index keys, so that ReLU cuts at a query's average score."""
    wide = k.double()  # the same bits on every device, once rounded
    return (wide - wide.mean(1, keepdim=True)).to(k.dtype)


# what a level reads besides, by how its tensor is called
_BY_LEVEL = (
    ("_codebook", ("codebooks", "keys of the input, evenly spaced")),
    ("_score", ("estimated scores", "what attention gives each entry, exactly")),
    ("_split", ("where a part that is chosen apart begins", "the middle")),
    ("_centroids", ("centroids of a tree", "keys of the input, evenly spaced")),
    ("_starts", ("where runs begin", f"every {RUN} tokens")),
)


def stated(spec: Spec, heads: int) -> list[tuple[str, str]]:
    """What the spec wants that a capture lacks, and what it was given.  heads: of the group"""
    found = [
        ("heads and head dims of its own", f"the captured group: {heads} query heads, 1 kv head")
    ]
    names = tensor_kinds(spec)
    if any(name.endswith("_weight") for name in names):
        given = "identity / size for every slot and position 0: the mean"
        found.append(("learned compression", given))
    found += [words for ending, words in _BY_LEVEL if any(x.endswith(ending) for x in names)]
    if "bias" in names:
        found.append(("a learned bias", "the norm of each value minus the mean norm"))
    others = ("k_index", "bias")
    keys = [name for name, kind in names.items() if kind == "key" and name not in others]
    if own := [name for name in keys if name not in ("k", "v")]:
        found.append((", ".join(own), "the same k and v for all"))
    if "q_index" in names:
        found.append(
            (
                "index queries, keys, weights",
                "the group's queries; its key minus its mean over the input; 1",
            )
        )
    if "route" in names or "layer" in names:
        found.append(("a route", "the first way of its list, or the way of layer 0"))
    if any(name.startswith("z_") for name in names):
        found.append(("gates of pools", "all alike: the mean, of the same keys in every series"))
    if any(name.endswith("_key_norm") or name.startswith("cos_") for name in names):
        found.append(("norm and rotation of pooled keys", "none: the keys have had both"))
    if any(name.endswith("sink") for name in names):
        found.append(("sinks", "logits so low that they take nothing"))
    if "output_gate" in names:
        found.append(("output gate", "open"))
    if "gates" in names:
        found.append(("gates", "none: every branch is measured by itself"))
    return found


def rows_of(spec: Spec, made: Mapping[str, Tensor], a: int, b: int) -> dict[str, Tensor]:
    """Inputs in which the rows from a to b are the last ones.  [1, T, ...]

    Without causality every row sees all keys, so that these must be given apart: `q_offset`.
    """
    parts = {
        "query": lambda t: t[:, a:b],
        "key": lambda t: t[:, :b] if spec.causal else t,
        "sequence": lambda t: t,
        "parameter": lambda t: t,
    }
    kinds = tensor_kinds(spec)
    return {name: parts[kinds[name]](t) for name, t in made.items() if name in kinds}
