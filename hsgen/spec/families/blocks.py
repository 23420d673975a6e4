"""MiniMax-M3, Qwen4-Exp, MiniCPM4 and fla's NSA: blocks of tokens that are read raw."""

from __future__ import annotations

from hsgen.spec.families.found import Found, pairs, sized
from hsgen.spec.families.layers import (
    HYBRID,
    INDEXED,
    LINEAR,
    layers_of,
    others,
    same,
    types_of,
)
from hsgen.spec.families.positions import rope_of
from hsgen.spec.fields import Fields
from hsgen.spec.model import Blocks, HeadDim

# what a checkpoint of MiniMax-M3 has in a mapping of its own
OLD_MINIMAX = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
_OLD_DEFAULTS = {"use_sparse_attention": True, "sparse_init_block": 0, "sparse_score_type": "max"}
SPARSE, FULL = "minimax_m3_sparse", "full_attention"


def minimax(config: Fields, layer: int | None) -> Found:
    """MiniMax-M3, some of whose layers are sparse."""
    old = config.table("sparse_attention_config", **_OLD_DEFAULTS)
    for key, older in OLD_MINIMAX.items():
        config.known_as(key, old, older)
    types = _types_minimax(config, old)
    layers = layers_of(config, types, SPARSE, layer)
    silent = old.listed("sparse_disable_index_value", (0, 1)) or [1] * len(types)
    if len(silent) != len(types) or not all(silent[i] for i in layers):
        raise old.wrong(
            "sparse_disable_index_value", "1 in sparse layers: no index has values", silent
        )
    if (how := old.get("sparse_score_type")) != "max":
        raise old.wrong("sparse_score_type", '"max"', how)
    head, block = config.count("head_dim"), config.count("index_block_size")
    spec = sized(
        "minimax_m3",
        {
            "heads.query": config.count("num_attention_heads"),
            "heads.kv": config.count("num_key_value_heads"),
            "head_dim": HeadDim(qk=head, v=head),
            "index.heads": config.count("index_n_heads"),
            "index.dim": config.count("index_head_dim"),
            "levels.1.partition": Blocks(size=block, stride=block),
            "levels.1.select.top_k": config.count("index_topk_blocks"),
            "levels.1.select.force.first": old.count("sparse_init_block", least=0),
            # one at least: theirs can score a part of the own block, ours takes it by force alone
            "levels.1.select.force.last": config.count("index_local_blocks"),
        },
    )
    notes = ["Norm and RoPE of q, k and the index are the model's, whose blocks begin at slot 0."]
    if FULL in types:
        notes.append("The other layers attend to everything: `window: all`.")
    if old.unread:
        notes.append(f"Said of sparse attention there, and not here: {pairs(old.unread)}.")
    return Found(spec=spec, presets=("minimax_m3",), layers=layers, notes=tuple(notes))


def _types_minimax(config: Fields, old: Fields) -> list[str]:
    """The class has all layers full where nothing is said."""
    on = old.listed("sparse_attention_freq", (0, 1)) if old.flag("use_sparse_attention") else None
    switched = [SPARSE if one else FULL for one in on or ()]
    types = types_of(config, same(SPARSE, FULL), lambda total: switched or [FULL] * total)
    if switched and switched != types:
        raise old.wrong("sparse_attention_freq", "the sparse layers of layer_types", on)
    return types


def qwen(config: Fields, layer: int | None) -> Found:
    """Qwen4-Exp, whose class has no sizes of an index: a model without them has none."""
    period = config.count("full_attention_interval")
    types = types_of(
        config,
        HYBRID,
        lambda total: [LINEAR if (i + 1) % period else INDEXED for i in range(total)],
    )
    layers = layers_of(config, types, INDEXED, layer)
    if (keys := config.count("indexer_kv_heads")) != 1:
        raise config.wrong("indexer_kv_heads", "1, which all heads of the index share", keys)
    ratio, budget = config.count("indexer_compress_ratio"), config.count("indexer_budget")
    if budget % ratio:
        raise config.wrong("indexer_budget", f"a multiple of the compress ratio, {ratio}", budget)
    head, dim = config.count("head_dim"), config.count("indexer_head_dim")
    rope, kind = rope_of(config, INDEXED)
    plain = kind == "default"
    spec = sized(
        "qwen_qsa",
        {
            "heads.query": config.count("num_attention_heads"),
            "heads.kv": config.count("num_key_value_heads"),
            "head_dim": HeadDim(qk=head, v=head),
            "index.heads": config.count("indexer_n_heads"),
            "index.dim": dim,
            "levels.0.partition": Blocks(size=ratio, stride=ratio),
            "levels.0.pool.rotate.dims": int(head * rope.number("partial_rotary_factor", 1.0)),
            "levels.0.pool.rotate.base": rope.number("rope_theta", 10000.0) if plain else None,
            "levels.0.score.scale": dim**-0.5,
            "levels.0.select.top_k": budget // ratio,
        },
    )
    notes = [
        "k_index are raw keys; norm and RoPE of q, k and q_index are the model's.  The norm's weight "
        "comes as 1 + w.",
        *others(types),
    ]
    if not plain:
        notes.append(f"RoPE is {kind}: cos and sin of every position are inputs.")
    elif rope.get("mrope_section"):
        notes.append(
            "Tokens of images have three positions each (mrope_section): leave `base` out for them, "
            "and cos and sin are inputs."
        )
    return Found(spec=spec, presets=("qwen_qsa",), layers=layers, notes=tuple(notes))


def minicpm(config: Fields, layer: int | None) -> Found:
    """MiniCPM4, whose config has a mapping for InfLLM-V2 where it is to be used."""
    sparse = config.table("sparse_config", **_INFLLM)
    kinds = {"minicpm4": "minicpm4", "lightning-attn": LINEAR}
    types = types_of(config, kinds, lambda total: ["minicpm4"] * total, key="mixer_types")
    layers = layers_of(config, types if sparse.said else [FULL] * len(types), "minicpm4", layer)
    heads, block = config.count("num_attention_heads"), sparse.count("block_size")
    head = config.count(
        "head_dim", otherwise=config.count("hidden_size", least=0, otherwise=0) // heads
    )
    window = sparse.count("window_size", least=0)
    if window % block:
        raise sparse.wrong("window_size", f"a multiple of block_size, {block}", window)
    if sparse.flag("use_nope"):
        raise sparse.wrong("use_nope", "false: no spec chooses by keys without their RoPE", True)
    size, stride = sparse.count("kernel_size"), sparse.count("kernel_stride")
    spec = sized(
        "infllm_v2",
        {
            "heads.query": heads,
            "heads.kv": config.count("num_key_value_heads", otherwise=heads),
            "head_dim": HeadDim(qk=head, v=head),
            "levels.0.partition": Blocks(size=4 * size, stride=4 * stride),
            "levels.1.partition": Blocks(size=size, stride=stride),
            "levels.2.partition": Blocks(size=block, stride=block),
            # the window is so many blocks on top of the budget, and the own one
            "levels.2.select.top_k": sparse.count("topk") + window // block,
            "levels.2.select.force.first": sparse.count("init_blocks", least=0),
            "levels.2.select.force.last": window // block + 1,
        },
    )
    notes = [
        f"Texts of less than {sparse.count('dense_len', least=-1)} tokens are the model's to attend to "
        "in full.",
        *others(types),
    ]
    return Found(spec=spec, presets=("infllm_v2",), layers=layers, notes=tuple(notes))


_INFLLM = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}


def nsa(config: Fields, layer: int | None) -> Found:
    """flash-linear-attention's NSA, in all layers; without a window it has two branches."""
    types = ["nsa"] * config.count("num_hidden_layers")
    head, block = config.count("head_dim"), config.count("block_size")
    window = config.count("window_size", least=0)
    spec = sized(
        "nsa_fla",
        {
            "heads.query": config.count("num_heads"),
            "heads.kv": config.count("num_kv_heads"),
            "head_dim": HeadDim(qk=head, v=head),
            "levels.0.partition": Blocks(size=block, stride=block),
            "levels.1.partition": Blocks(size=block, stride=block),
            "levels.1.select.top_k": config.count("block_counts"),
            "attend.2.window": window,
        },
    )
    if not window:
        spec = spec.model_copy(update={"attend": spec.attend[:2]})
    layers = layers_of(config, types, "nsa", layer)
    return Found(spec=spec, presets=("nsa_fla",), layers=layers)
