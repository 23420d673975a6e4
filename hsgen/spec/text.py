"""A Spec -> YAML text, in one canonical layout: `parse(dump(spec)) == spec`."""

from __future__ import annotations

import json
from typing import cast

from hsgen.errors import Span
from hsgen.spec import syntax
from hsgen.spec.model import Blocks, Gather, HeadDim, Level, Node, Partition, Spec

_PLACE = Span(file="", line=1, column=1)


def dump(spec: Spec) -> str:
    """Write a spec, leaving out what is the default."""
    lines = [f"hsgen: {spec.hsgen}", f"name: {_word(spec.name)}"]
    lines += [f"source: {_word(spec.source)}"] if spec.source is not None else []
    lines += [f"heads: {_flow(spec.heads)}"] if spec.heads else []
    lines += [f"head_dim: {_head_dim(spec.head_dim)}"] if spec.head_dim else []
    lines.append(f"causal: {_word(spec.causal)}")
    lines += [f"axes: {_value(spec.axes)}"] if spec.axes is not None else []
    lines += [f"index: {_flow(spec.index)}"] if spec.index else []
    lines += [f"route: {_flow(spec.route)}"] if spec.route else []
    lines += (
        ["levels:", *(line for level in spec.levels for line in _level(level))]
        if spec.levels
        else []
    )
    lines += ["attend:", *(f"  - {_flow(branch)}" for branch in spec.attend)]
    lines += [f"combine: {_flow(spec.combine)}"] if spec.combine else []
    lines += ["reuse:", *(f"  - {_flow(reuse)}" for reuse in spec.reuse)] if spec.reuse else []
    lines += [f"loss: {_flow(spec.loss)}"] if spec.loss else []
    return "\n".join(lines) + "\n"


def _level(level: Level) -> list[str]:
    parts = [f"name: {_word(level.name)}"]
    parts += [f"within: {_word(level.within)}"] if level.within else []
    parts += [f"when: {_word(level.when)}"] if level.when else []
    parts += [f"permute: {_flow(level.permute)}"] if level.permute else []
    parts.append(f"partition: {_partition(level.partition)}")
    parts += [f"kv: {_word(level.kv)}"] if level.kv else []
    parts += [f"q: {_word(level.q)}"] if level.q else []
    parts += [f"pool: {_flow(level.pool)}"] if level.pool else []
    parts += [f"query: {_flow(level.query)}"] if level.query else []
    parts.append(f"score: {_flow(level.score)}")
    parts += [f"select: {_flow(level.select)}"] if level.select else []
    return [f"  {'-' if i == 0 else ' '} {part}" for i, part in enumerate(parts)]


def _partition(partition: Partition) -> str:
    """The word of its kind, or its keys; a stride that is the size goes without saying."""
    if isinstance(partition, Blocks):
        stride = f", stride: {partition.stride}" if partition.stride != partition.size else ""
        before = f", before: {partition.before}" if partition.before else ""
        return f"{{blocks: {partition.size}{stride}{before}}}"
    return _flow(partition) if len(type(partition).model_fields) > 1 else partition.kind


def _head_dim(head_dim: HeadDim) -> str:
    return str(head_dim.qk) if head_dim.qk == head_dim.v else _flow(head_dim)


def _flow(node: Node) -> str:
    """A mapping on one line; fields that have their default are left out."""
    parts: list[str] = []
    keys = {field: key for key, field in type(node).renamed.items()}
    for field, info in type(node).model_fields.items():
        value = getattr(node, field)
        if not info.is_required() and value == info.get_default():
            continue
        if field == "kind":
            continue  # the keys say it
        key = keys.get(field, field)
        parts.append(f"{key}: {_value(value)}")
    return f"{{{', '.join(parts)}}}"


def _value(value: object) -> str:
    if isinstance(value, Node):
        return value.kind if isinstance(value, Gather) else _flow(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in cast('tuple[object, ...]', value))}]"
    return _word(cast("str | float | bool", value))


def _word(value: str | float | bool) -> str:
    """A single value, in quotes where it would be read as something else without."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    safe = value.isascii() and value.isidentifier()
    plain = safe and syntax.value(syntax.Word(text=value, plain=True, span=_PLACE)) == value
    return value if plain else json.dumps(value, ensure_ascii=False)
