"""DeepSeek-V3.2, GLM-5 and GLM-5.3-Flash: an index chooses from the latent of absorbed MLA."""

from __future__ import annotations

from hsgen.spec.families.found import Found, sized
from hsgen.spec.families.layers import (
    HYBRID,
    INDEXED,
    LINEAR,
    SPARSE,
    calls,
    layers_of,
    others,
    reuse_of,
    types_of,
)
from hsgen.spec.families.positions import mscale_of
from hsgen.spec.fields import Fields
from hsgen.spec.model import Blocks, HeadDim


def dsa(config: Fields, layer: int | None) -> Found:
    """DeepSeek-V3.2 and GLM-5, where tokens are chosen."""
    types = types_of(config, SPARSE, lambda total: [INDEXED] * total)
    layers = layers_of(config, types, INDEXED, layer)
    reuse = reuse_of(config, "token", types)
    turned, plain = config.count("qk_rope_head_dim", least=0), config.count("qk_nope_head_dim")
    mscale = mscale_of(config, INDEXED)
    latent = _latent(config)
    spec = sized(
        "dsa",
        {
            "heads.query": _heads(config),
            "head_dim": HeadDim(qk=latent + turned, v=latent),
            "index.heads": config.count("index_n_heads"),
            "index.dim": config.count("index_head_dim"),
            "levels.0.select.top_k": config.count("index_topk"),
            "attend.0.scale": (plain + turned) ** -0.5 * mscale**2,
            "reuse": reuse,
        },
    )
    notes = [
        "Norm, RoPE and Hadamard transform of the index are the model's; w_index comes with "
        "heads^-0.5 dim^-0.5.  fp8 is the authors': without `dtype` it is as transformers has it.",
        *calls(reuse, types),
    ]
    if mscale != 1:
        notes.append(
            f"The scale is {plain + turned}^-0.5 times YaRN's mscale, {mscale:.4f}, squared."
        )
    return Found(spec=spec, presets=("dsa",), layers=layers, notes=tuple(notes))


def glm_kpool(config: Fields, layer: int | None) -> Found:
    """GLM-5.3-Flash, where pools of tokens are chosen, and nothing is turned."""
    types = types_of(
        config, HYBRID, lambda total: [INDEXED if i % 4 == 3 else LINEAR for i in range(total)]
    )
    layers = layers_of(config, types, INDEXED, layer)
    reuse = reuse_of(config, "pool", types)
    if turned := config.count("qk_rope_head_dim", least=0):
        raise config.wrong("qk_rope_head_dim", "0, since pooled keys are not turned", turned)
    pool, budget = config.count("index_kpool"), config.count("index_topk")
    if budget % pool:
        raise config.wrong("index_topk", f"a multiple of index_kpool, {pool}", budget)
    latent, dim = _latent(config), config.count("index_head_dim")
    spec = sized(
        "glm_kpool",
        {
            "heads.query": _heads(config),
            "head_dim": HeadDim(qk=latent, v=latent),
            "index.heads": config.count("index_n_heads"),
            "index.dim": dim,
            "levels.0.partition": Blocks(size=pool, stride=pool),
            "levels.0.score.scale": dim**-0.5,
            "levels.0.select.top_k": budget // pool,
            "levels.0.select.force.tail": config.flag("index_kpool_always_select_tail") or None,
            "attend.0.scale": config.count("qk_nope_head_dim") ** -0.5,
            "reuse": reuse,
        },
    )
    notes = [
        "Index keys are normed by the model before they are pooled; w_index comes with heads^-0.5.",
        *calls(reuse, types),
        *others(types),
    ]
    return Found(spec=spec, presets=("glm_kpool",), layers=layers, notes=tuple(notes))


def _heads(config: Fields) -> int:
    """Query heads; configs count a key head for each, which absorbed MLA has one of."""
    heads, kv = config.count("num_attention_heads"), config.get("num_key_value_heads")
    if kv not in (None, heads):
        raise config.wrong("num_key_value_heads", f"{heads}, as many as there are heads", kv)
    return heads


def _latent(config: Fields) -> int:
    """Numbers of the latent that are not turned; what a head makes of them is the model's."""
    config.count("v_head_dim")
    return config.count("kv_lora_rank")
