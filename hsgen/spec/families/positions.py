"""What a config says of RoPE, as far as a spec depends on it."""

from __future__ import annotations

import math
from dataclasses import replace

from hsgen.spec.fields import Fields


def rope_of(config: Fields, which: str) -> tuple[Fields, str]:
    """What is said of RoPE, by its new name or the older one, and of what kind it is.

    Some have one mapping for all layers, others one for each type of layer: `which`.
    """
    new, old = config.table("rope_parameters"), config.table("rope_scaling")
    rope = old if old.said else new
    if which in rope.said:
        rope = rope.table(which)
    around = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    said = {key: value for key, value in around.items() if value is not None}
    rope = replace(rope, said={**said, **rope.said})
    return rope, str(rope.get("rope_type") or rope.get("type") or "default")


def mscale_of(config: Fields, which: str) -> float:
    """By what YaRN multiplies queries and keys whose positions it stretches."""
    rope, kind = rope_of(config, which)
    strength, factor = rope.number("mscale_all_dim", 0.0), rope.number("factor", 1.0)
    if kind == "default" or factor <= 1:
        return 1.0
    return 0.1 * strength * math.log(factor) + 1.0
