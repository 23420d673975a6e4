"""DeepSeek-V4: entries of several tokens, the best of them (CSA) or all (HCA), beside a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from hsgen.spec.families.found import Found, sized
from hsgen.spec.families.layers import check_layer
from hsgen.spec.families.positions import rope_of
from hsgen.spec.fields import Fields, shown
from hsgen.spec.model import Attend, Blocks, HeadDim, Level, Route, Spec

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
SLIDING = "sliding_attention"
WAYS = {CSA: "csa", HCA: "hca", SLIDING: "sliding"}  # as the route calls them
PRESETS = {CSA: "deepseek_csa", HCA: "deepseek_hca"}
RATIOS = {0: SLIDING, 4: CSA, 128: HCA}  # as checkpoints say the types of layers


def deepseek_v4(config: Fields, layer: int | None) -> Found:
    """The layers take up to three ways: a spec with a route, or that of one layer."""
    types = _types(config)
    if layer is not None:
        check_layer(layer, types)
    if (keys := config.count("num_key_value_heads")) != 1:
        raise config.wrong("num_key_value_heads", "1, whose keys are the values too", keys)
    csa, hca = _csa(config), _hca(config)
    taken = types if layer is None else [types[layer]]
    layers = tuple(range(len(types))) if layer is None else (layer,)
    presets = tuple(PRESETS[kind] for kind in PRESETS if kind in taken) or tuple(PRESETS.values())
    if len(set(taken)) > 1:
        spec = _routed([WAYS[kind] for kind in taken], csa, hca)
    else:
        spec = {CSA: csa, HCA: hca, SLIDING: _sliding(csa)}[taken[0]]
    return Found(spec=spec, presets=presets, layers=layers, notes=(_note(config),))


def _note(config: Fields) -> str:
    rope, kind = rope_of(config, "compress")
    scaling = "not stretched" if kind == "default" else f"{kind} by {shown(rope.get('factor'))}"
    base = shown(config.get("compress_rope_theta"))
    return (
        f"cos and sin of entries and of the index are inputs: base {base}, {scaling}.  w_index comes "
        "with heads^-0.5; the model turns the output's channels back."
    )


def _types(config: Fields) -> list[str]:
    """The type of each layer; lists may go on, for layers that predict further tokens."""
    total = config.count("num_hidden_layers")
    ratios = config.listed("compress_ratios", tuple(RATIOS))
    by_ratio = [RATIOS[cast("int", ratio)] for ratio in ratios or ()][:total]
    said = config.listed("layer_types", (CSA, HCA, SLIDING))
    types = cast("list[str]", said or by_ratio)[:total] or [
        CSA if i > 1 and i % 2 else HCA for i in range(total)
    ]
    if ratios and types != by_ratio:
        raise config.wrong("layer_types", "the types that compress_ratios says", said)
    if len(types) != total:
        raise config.wrong("num_hidden_layers", f"as many as layers are said, {len(types)}", total)
    return types


def _rate(config: Fields, kind: str, name: str) -> int:
    """Tokens from one entry to the next, said in one of two places."""
    config.known_as(name, config.table("compress_rates"), kind)
    rate = config.count(name)
    if config.get("compress_ratios") is not None and RATIOS.get(rate) != kind:
        raise config.wrong(name, "one of the compress_ratios", rate)
    return rate


def _turned(config: Fields) -> int:
    """How many channels of an entry are turned; older configs say their number."""
    dims, part = config.get("qk_rope_head_dim"), config.get("partial_rotary_factor")
    if part is None and dims is not None:
        return config.count("qk_rope_head_dim")
    found = int(config.count("head_dim") * config.number("partial_rotary_factor", 64 / 512))
    if dims not in (None, found):
        raise config.wrong("qk_rope_head_dim", f"{found}, by partial_rotary_factor", dims)
    return found


def _csa(config: Fields) -> Spec:
    rate, dim = _rate(config, CSA, "compress_rate_csa"), config.count("index_head_dim")
    windows = Blocks(size=2 * rate, stride=rate, before=rate)
    return sized(
        PRESETS[CSA],
        {
            **_shared(config),
            "index.heads": config.count("index_n_heads"),
            "index.dim": dim,
            "levels.0.partition": windows,
            "levels.0.score.scale": dim**-0.5,
            "levels.1.partition": windows,
            "levels.1.pool.rotate.dims": _turned(config),
            "levels.1.select.top_k": config.count("index_topk"),
        },
    )


def _hca(config: Fields) -> Spec:
    rate = _rate(config, HCA, "compress_rate_hca")
    return sized(
        PRESETS[HCA], {**_shared(config), "levels.0.partition": Blocks(size=rate, stride=rate)}
    )


def _shared(config: Fields) -> dict[str, object]:
    """What both have at the same places."""
    head = config.count("head_dim")
    return {
        "heads.query": config.count("num_attention_heads"),
        "head_dim": HeadDim(qk=head, v=head),
        "levels.0.pool.rotate.dims": _turned(config),
        "attend.1.window": config.count("sliding_window"),
    }


def _sliding(csa: Spec) -> Spec:
    """What is left where nothing is compressed."""
    return csa.model_copy(update={"index": None, "levels": (), "attend": csa.attend[1:]})


def _routed(ways: Sequence[str], csa: Spec, hca: Spec) -> Spec:
    """One spec whose layers go several ways; the entries of HCA have a name of their own in it."""
    levels: list[Level] = []
    branches: list[Attend] = []
    if "csa" in ways:
        levels += [level.model_copy(update={"when": "csa"}) for level in csa.levels]
        branches.append(csa.attend[0].model_copy(update={"when": "csa"}))
    if "hca" in ways:
        named = {"when": "hca", "name": "heavy", "kv": "heavy"}
        levels.append(hca.levels[0].model_copy(update=named))
        branches.append(hca.attend[0].model_copy(update={"when": "hca", "over": "heavy"}))
    return csa.model_copy(
        update={
            "route": Route(by="layer", table=tuple(ways)),
            "index": csa.index if "csa" in ways else None,
            "levels": tuple(levels),
            "attend": (*branches, csa.attend[1]),
        }
    )
