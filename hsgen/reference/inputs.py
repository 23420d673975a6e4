"""Which tensors a spec needs, by name, and of what shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from hsgen.spec import Gather, LearnedTree, Level, Parts, Ragged, Spec

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
    sizes |= {f"N_{level.name}": _entries(level, S) for level in spec.levels}
    return {
        name: (*lead[kind], *(sizes[n] if isinstance(n, str) else n for n in dims))
        for name, (kind, dims) in _inputs(spec).items()
    }


def _entries(level: Level, S: int) -> int:
    """How many entries a level has for S keys."""
    partition = level.partition
    if isinstance(partition, Parts):
        return partition.count
    return -(-S // partition.stride) if partition.stride else 0


def tensor_kinds(spec: Spec) -> dict[str, TensorKind]:
    """Whether each tensor has one row a query, a key or a sequence, or is a parameter of all."""
    return {name: kind for name, (kind, _) in _inputs(spec).items()}


_KEYS: _TensorInput = ("key", ("Hkv", "D"))


_VALUES: _TensorInput = ("key", ("Hkv", "Dv"))


def _inputs(spec: Spec) -> dict[str, _TensorInput]:
    """Every tensor by name: its kind, and what follows batch and time."""
    found: dict[str, _TensorInput] = {"q": ("query", ("Hq", "D"))}
    for level in spec.levels:
        found |= (
            _level_inputs(level)
            | _own_query(level)
            | _of_partition(spec, level)
            | _codebook(spec, level)
        )
    return found | _of_branches(spec) | _of_combine(spec)


def _of_branches(spec: Spec) -> dict[str, _TensorInput]:
    found: dict[str, _TensorInput] = {}
    for branch in spec.attend:
        if branch.values != "pooled":
            found[named("k", branch.kv)] = _KEYS
        if branch.values != "pooled" and branch.storage is None:
            found[named("v", branch.kv)] = _VALUES
        if branch.sink:
            found[f"{branch.name}_sink"] = ("parameter", ("Hq",))
        if branch.bias == "learned":
            found["bias"] = ("key", ("Hkv",))
    if spec.loss and spec.loss.kl:
        found[loss_keys(spec)] = _KEYS
    return found


def _codebook(spec: Spec, level: Level) -> dict[str, _TensorInput]:
    """The codewords of a level that compares codes."""
    codes = level.score.codes
    if codes is None:
        return {}
    assert spec.head_dim is not None, "a codebook is of bound heads"
    runs = spec.head_dim.qk // codes.dim
    return {f"{level.name}_codebook": ("parameter", (runs, codes.words, codes.dim))}


def _series(level: Level) -> tuple[int, ...]:
    """The dimension of keys that come in series."""
    return (level.pool.series,) if level.pool and level.pool.series else ()


def _of_pool(level: Level) -> dict[str, _TensorInput]:
    """What a pool reads besides keys and values: gates, and learned parameters."""
    pool, size = level.pool, level.partition.size
    if pool is None:
        return {}
    by_index = level.score.by_index
    found: dict[str, _TensorInput] = {}
    for side, how in (("key", pool.keys), ("value", pool.values)):
        name = f"{level.name}_{side}"
        heads, width = ("Hkv", "Dv") if side == "value" else (1, "Di") if by_index else ("Hkv", "D")
        hidden = pool.hidden or width
        if how in ("linear", "mlp", "max_min_mean"):
            rows = 3 if how == "max_min_mean" else size
            out = hidden if how == "mlp" else width
            found[f"{name}_weight"] = ("parameter", (heads, rows, width, out))
        if how == "mlp":
            found[f"{name}_out"] = ("parameter", (heads, hidden, width))
        if pool.position and how in ("linear", "mlp"):
            found[f"{name}_position"] = ("parameter", (heads, size, width))
    return found | _of_pooled_keys(level)


def _of_pooled_keys(level: Level) -> dict[str, _TensorInput]:
    """Gates, norm and rotation, which keys alone have."""
    pool = level.pool
    assert pool is not None
    by_index = level.score.by_index
    heads: tuple[str, ...] = () if by_index else ("Hkv",)
    width = "Di" if by_index else "D"
    found: dict[str, _TensorInput] = {}
    if pool.keys == "gated":
        channels = (width,) if pool.softmax == "channel" else ()
        found[gates_of(level)] = ("key", (*heads, *_series(level), *channels))
        if pool.position:
            shape = (*(heads or (1,)), level.partition.size, *channels)
            found[f"{level.name}_key_position"] = ("parameter", shape)
    if pool.then == "norm":
        found[f"{level.name}_key_norm"] = ("parameter", (width,))
    if pool.rotate and pool.rotate.base is None:
        for name in ("cos", "sin"):
            found[f"{name}_{level.name}"] = ("key", (pool.rotate.dims // 2,))
    return found


def gates_of(level: Level) -> str:
    """The input that gates a level's pool."""
    return "z_index" if level.score.by_index else named("z", level.kv)


def _of_combine(spec: Spec) -> dict[str, _TensorInput]:
    combine = spec.combine
    found: dict[str, _TensorInput] = {}
    if combine and combine.gates:
        width = ("Dv",) if combine.gates == "channel" else ()
        found["gates"] = ("query", ("Hq", len(spec.attend), *width))
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


def _level_inputs(level: Level) -> dict[str, _TensorInput]:
    """What a level scores and pools."""
    found: dict[str, _TensorInput] = {}
    by_index, by_bias = level.score.by_index, level.score.form == "bias"
    if by_index:
        found["q_index"] = ("query", ("Hi", "Di"))
        found["k_index"] = ("key", (*_series(level), "Di"))
        if level.score.form == "relu_weighted":
            found["w_index"] = ("query", ("Hi",))
    elif level.score.form in ("dot", "cosine", "code_match", "pooling_error") or (
        level.pool and level.pool.keys and not by_bias
    ):
        found[named("k", level.kv)] = ("key", ("Hkv", *_series(level), "D"))
    if level.score.form == "given":
        heads = {"head": "Hq", "group": "Hkv", "all": 1}[level.score.share]
        found[f"{level.name}_score"] = ("query", (heads, f"N_{level.name}"))
    if level.select and level.select.apart:
        found[f"{level.name}_split"] = ("sequence", ())
    if level.permute and isinstance(level.permute.keys, Gather):
        found[f"{level.name}_key_order"] = ("key", ("Hkv",))
    if level.score.by_bias:
        found["bias"] = ("key", ("Hkv",))
    if level.pool and level.pool.values:
        found[named("v", level.kv)] = _VALUES
    return found | _of_pool(level)


def _own_query(level: Level) -> dict[str, _TensorInput]:
    heads = "Hkv" if level.one_query_a_group else "Hq"
    return {} if level.q is None else {f"q_{level.q}": ("query", (heads, "D"))}


def _of_partition(spec: Spec, level: Level) -> dict[str, _TensorInput]:
    partition = level.partition
    if isinstance(partition, LearnedTree):
        N = spec.nodes(level.name)
        return {f"{level.name}_centroids": ("parameter", ("Hkv", N, "D"))}
    if isinstance(partition, Ragged) and partition.boundaries == "given":
        return {f"{level.name}_starts": ("key", ())}
    if isinstance(partition, Ragged):
        return {named("k", level.kv): _KEYS}
    return {}


def named(kind: str, kv: str | None) -> str:
    return f"{kind}_{kv}" if kv else kind


def loss_keys(spec: Spec) -> str:
    """The keys of the attention that a level learns from: those of the first branch over tokens."""
    branch = spec.learned_from
    return named("k", branch and branch.kv)


def needs_all_tokens(level: Level) -> bool:
    """Whether keys or values are pooled by a learned map of an entry's slots."""
    return level.pool is not None and bool({"linear", "mlp"} & {level.pool.keys, level.pool.values})


def some_keys(spec: Spec, x: Mapping[str, Tensor]) -> Tensor:
    """Some tensor of keys or values: [S, Hkv, D], or with a batch in front."""
    kinds = tensor_kinds(spec).items()
    named_so = ("k", "v", "k_", "v_")
    return next(
        x[name]
        for name, kind in kinds
        if kind == "key" and name != "k_index" and name in x
        if name in named_so or name[:2] in named_so
    )
