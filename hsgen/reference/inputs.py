"""Which tensors a spec needs, by name, and of what shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from hsgen.spec import Gather, Level, Spec

TensorKind = Literal["query", "key", "sequence", "parameter"]


_TensorInput = tuple[TensorKind, tuple[str | int, ...]]  # what follows batch and time


def tensor_shapes(spec: Spec, B: int, T: int, S: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that `spec` needs, by name: shapes for B sequences of T queries and S keys."""
    assert spec.heads is not None, "heads must be bound"
    assert spec.head_dim is not None, "head_dim must be bound"
    sizes = {
        "Hq": spec.heads.query,
        "Hkv": spec.heads.kv,
        "D": spec.head_dim.qk,
        "Dv": spec.head_dim.v,
    }
    if spec.index:
        sizes |= {"Hi": spec.index.heads, "Di": spec.index.dim}
    lead = {"query": (B, T), "key": (B, S), "sequence": (B,), "parameter": ()}
    return {
        name: (*lead[kind], *(sizes[n] if isinstance(n, str) else n for n in dims))
        for name, (kind, dims) in _inputs(spec).items()
    }


def tensor_kinds(spec: Spec) -> dict[str, TensorKind]:
    """Whether each tensor has one row a query, a key or a sequence, or is a parameter of all."""
    return {name: kind for name, (kind, _) in _inputs(spec).items()}


def _inputs(spec: Spec) -> dict[str, _TensorInput]:
    """Every tensor by name: its kind, and what follows batch and time."""
    found: dict[str, _TensorInput] = {"q": ("query", ("Hq", "D"))}
    keys: _TensorInput = ("key", ("Hkv", "D"))
    values: _TensorInput = ("key", ("Hkv", "Dv"))
    for level in spec.levels:
        by_index = level.score.by_index
        if by_index:
            found["q_index"] = ("query", ("Hi", "Di"))
            found["k_index"] = ("key", ("Di",))
            if level.score.form == "relu_weighted":
                found["w_index"] = ("query", ("Hi",))
        elif level.score.form in ("dot", "code_match", "pooling_error") or (
            level.pool and level.pool.keys
        ):
            found[named("k", level.kv)] = keys
        found |= _codebook(spec, level)
        if level.permute and isinstance(level.permute.keys, Gather):
            found[f"{level.name}_key_order"] = ("key", ("Hkv",))
        if level.pool and level.pool.values:
            found[named("v", level.kv)] = values
        for side in linear_sides(level):
            heads, width = (
                ("Hkv", "Dv") if side == "value" else (1, "Di") if by_index else ("Hkv", "D")
            )
            size = level.partition.size
            found[f"{level.name}_{side}_weight"] = ("parameter", (heads, size, width, width))
            if level.pool and level.pool.position:
                found[f"{level.name}_{side}_position"] = ("parameter", (heads, size, width))
    for branch in spec.attend:
        if branch.values != "pooled":
            found[named("k", branch.kv)] = keys
        if branch.values != "pooled" and branch.storage is None:
            found[named("v", branch.kv)] = values
        if branch.sink:
            found[f"{branch.name}_sink"] = ("parameter", ("Hq",))
    return found | _of_combine(spec)


def _codebook(spec: Spec, level: Level) -> dict[str, _TensorInput]:
    """The codewords of a level that compares codes."""
    codes = level.score.codes
    if codes is None:
        return {}
    assert spec.head_dim is not None, "a codebook is of bound heads"
    runs = spec.head_dim.qk // codes.dim
    return {f"{level.name}_codebook": ("parameter", (runs, codes.words, codes.dim))}


def _of_combine(spec: Spec) -> dict[str, _TensorInput]:
    combine = spec.combine
    found: dict[str, _TensorInput] = {}
    if combine and combine.gates:
        found["gates"] = ("query", ("Hq", len(spec.attend)))
    if combine and combine.sink:
        found["sink"] = ("parameter", ("Hq",))
    if combine and combine.output_gate:
        width = ("Dv",) if combine.output_gate == "channel" else ()
        found["output_gate"] = ("query", ("Hq", *width))
    return found | _route(spec)


def _route(spec: Spec) -> dict[str, _TensorInput]:
    """What the caller says of ways: which is taken, or the number of the layer."""
    if spec.route and spec.route.input:
        kind = "sequence" if spec.route.by.startswith("sample") else "parameter"
        return {"route": (kind, _WAYS[spec.route.by])}
    if spec.route and spec.route.by == "layer":
        return {"layer": ("parameter", (1,))}
    return {}


# what takes a way of its own, within one sequence
_WAYS: Mapping[str, tuple[str | int, ...]] = {
    "layer": (1,),
    "head": ("Hq",),
    "sample": (),
    "sample_head": ("Hq",),
}


def named(kind: str, kv: str | None) -> str:
    return f"{kind}_{kv}" if kv else kind


def linear_sides(level: Level) -> list[str]:
    """Which of key and value are pooled by a learned map."""
    if level.pool is None:
        return []
    sides = {"key": level.pool.keys, "value": level.pool.values}
    return [side for side, how in sides.items() if how == "linear"]


def some_keys(spec: Spec, x: Mapping[str, Tensor]) -> Tensor:
    """Some tensor of keys or values: [S, Hkv, D], or with a batch in front."""
    kinds = tensor_kinds(spec).items()
    return next(x[name] for name, kind in kinds if kind == "key" and name != "k_index")
