"""What a model's config.json says of its attention: a shipped spec with the model's sizes.

Knows the fields that configuration classes have, transformers' or a model's own, their defaults, which
a saved config leaves out, and the older names that checkpoints use.  Loads neither transformers nor weights.
"""

from __future__ import annotations

from dataclasses import replace

from hsgen.errors import nearest
from hsgen.spec.families.blocks import minicpm, minimax, nsa, qwen
from hsgen.spec.families.compressed import deepseek_v4
from hsgen.spec.families.found import Family, Found, pairs
from hsgen.spec.families.latent import dsa, glm_kpool
from hsgen.spec.families.layers import ranges
from hsgen.spec.fields import Fields

__all__ = ["FAMILIES", "Family", "Found", "find"]


def find(config: Fields, layer: int | None = None) -> Found:
    """The attention of a model: of one layer, or of all that a spec can say.

    Raises:
        ArgumentError: that layer has no attention that a spec says.
        HsgenError: the config says what cannot be, or is of a model that hsgen does not know.
    """
    family, said = _family(config)
    found = family.find(said, layer)
    of = f"layer{'s' * (len(found.layers) > 1)} {ranges(found.layers)}"
    notes = [
        f"{' and '.join(f'specs/{preset}.yaml' for preset in found.presets)} with the sizes of a "
        f"config.json: {family.model}, {of} of {said.count('num_hidden_layers')}.",
        *found.notes,
    ]
    if said.defaulted:
        notes.append(f"Left out there, so defaults of its class: {pairs(said.defaulted)}.")
    if said.unread:
        notes.append(f"Said there of attention, and not here: {pairs(said.unread)}.")
    return replace(found, notes=tuple(notes))


def _family(config: Fields) -> tuple[Family, Fields]:
    """How to read a config, and the part of it that is of the text."""
    inner = config.table("text_config")
    text = inner if inner.said else config
    for where in (config, text):
        model_type = where.said.get("model_type")
        if isinstance(model_type, str) and model_type.removesuffix("_text") in FAMILIES:
            family = FAMILIES[model_type.removesuffix("_text")]
            return family, replace(text, defaults=family.defaults)
    model_type = config.said.get("model_type")
    close = nearest(model_type, FAMILIES) if isinstance(model_type, str) else None
    help = f"did you mean {close!r}?" if close else "or start from a shipped spec: --from PRESET"
    raise config.wrong("model_type", f"one of {', '.join(FAMILIES)}", model_type, help=help)


_DSA: dict[str, object] = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 64,
}

FAMILIES = {
    "minimax_m3_vl": Family(
        model="MiniMax-M3",
        find=minimax,
        defaults={
            "num_hidden_layers": 60,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "index_n_heads": 4,
            "index_head_dim": 128,
            "index_block_size": 128,
            "index_topk_blocks": 16,
            "index_local_blocks": 1,
        },
    ),
    "qwen4_exp": Family(
        model="Qwen4-Exp",
        find=qwen,
        defaults={
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "full_attention_interval": 4,
        },
    ),
    "glm5_next": Family(
        model="GLM-5.3-Flash",
        find=glm_kpool,
        defaults={
            **_DSA,
            "num_hidden_layers": 45,
            "num_attention_heads": 64,
            "qk_rope_head_dim": 0,
            "v_head_dim": 256,
            "qk_nope_head_dim": 256,
            "index_n_heads": 32,
            "index_kpool": 16,
            "index_kpool_always_select_tail": True,
        },
    ),
    "glm_moe_dsa": Family(
        model="GLM-5",
        find=dsa,
        defaults={
            **_DSA,
            "num_hidden_layers": 78,
            "num_attention_heads": 64,
            "v_head_dim": 256,
            "qk_nope_head_dim": 192,
            "index_n_heads": 32,
        },
    ),
    "deepseek_v32": Family(model="DeepSeek-V3.2", find=dsa, defaults=_DSA),
    "deepseek_v4": Family(
        model="DeepSeek-V4",
        find=deepseek_v4,
        defaults={
            "num_hidden_layers": 43,
            "num_attention_heads": 64,
            "num_key_value_heads": 1,
            "head_dim": 512,
            "sliding_window": 128,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 512,
            "compress_rate_csa": 4,
            "compress_rate_hca": 128,
            "compress_rope_theta": 160000.0,
        },
    ),
    "minicpm": Family(model="MiniCPM4", find=minicpm, defaults={}),
    "nsa": Family(
        model="NSA of flash-linear-attention",
        find=nsa,
        defaults={
            "num_hidden_layers": 24,
            "num_heads": 64,
            "num_kv_heads": 4,
            "head_dim": 32,
            "block_size": 64,
            "block_counts": 16,
            "window_size": 512,
        },
    ),
}
