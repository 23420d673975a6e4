"""Which layers of a model have which attention, and which of them take over another's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import cast

from hsgen.errors import ArgumentError, HsgenError
from hsgen.spec.fields import Fields
from hsgen.spec.model import Reuse

INDEXED, LINEAR = "indexed_attention", "linear_attention"
# versions of transformers name the same layers in several ways; older configs say full
SPARSE: Mapping[str, str] = dict.fromkeys(
    (INDEXED, "deepseek_sparse_attention", "qwen_sparse_attention"), INDEXED
)
HYBRID = {**SPARSE, "full_attention": INDEXED, LINEAR: LINEAR}


def types_of(
    config: Fields,
    known: Mapping[str, str],
    otherwise: Callable[[int], list[str]],
    *,
    key: str = "layer_types",
) -> list[str]:
    """The type of each layer: what the config says, in the words of `known`, or else."""
    total = config.count("num_hidden_layers")
    said = config.listed(key, tuple(known))
    types = otherwise(total) if said is None else [known[cast("str", word)] for word in said]
    if len(types) != total:
        raise config.wrong("num_hidden_layers", f"as many as layers are said, {len(types)}", total)
    return types


def same(*words: str) -> dict[str, str]:
    """Words that need no translation."""
    return dict(zip(words, words, strict=True))


def layers_of(
    config: Fields, types: Sequence[str], kind: str, layer: int | None
) -> tuple[int, ...]:
    """The layers of one type: all of them, or the one that is asked for."""
    found = _numbers(types, kind)
    if not found:
        raise HsgenError(f"{config.where}: expected layers of {kind}, got none of {len(types)}")
    if layer is None:
        return found
    check_layer(layer, types)
    if layer not in found:
        msg = f"layer: expected one of {kind}, got {layer}, which is {types[layer]}"
        raise ArgumentError(msg, help=f"those are {ranges(found)}")
    return (layer,)


def check_layer(layer: int, types: Sequence[str]) -> None:
    """The model has such a layer."""
    if layer >= len(types):
        raise ArgumentError(f"layer: expected a number below {len(types)}, got {layer}")


def _numbers(types: Sequence[str], kind: str) -> tuple[int, ...]:
    return tuple(i for i, each in enumerate(types) if each == kind)


def ranges(numbers: Sequence[int]) -> str:
    """0 to 2, 5; or 3, 7, ..., 39."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def others(types: Sequence[str]) -> list[str]:
    """A note of layers that no spec says."""
    if LINEAR not in types:
        return []
    return ["The other layers are linear attention, which is no softmax: no spec says it."]


# --- choices that are taken over


def reuse_of(config: Fields, level: str, types: Sequence[str]) -> tuple[Reuse, ...]:
    """How layers with an index take over the choice of one before them."""
    fresh = _fresh(config, len(types))
    letters = "".join("F" if fresh[i] else "S" for i in _numbers(types, INDEXED))
    if "S" not in letters:
        return ()
    if letters[0] == "S":
        msg = f"{config.where}: expected the first layer with an index to choose for itself, got {letters}"
        raise HsgenError(msg)
    return (_shortest(level, letters),)


def _fresh(config: Fields, total: int) -> list[bool]:
    """Whether each layer would choose for itself, said in one of three ways."""
    modes = config.listed("indexer_types", ("full", "shared"))
    pattern = config.listed("index_topk_pattern", ("F", "S"))
    every = config.count("index_topk_freq", least=0, otherwise=1)
    offset = config.count("index_skip_topk_offset", least=0, otherwise=2)
    by_pattern = [letter == "F" for letter in pattern or ()][:total]
    by_mode = [mode == "full" for mode in modes or ()][:total]
    if modes and pattern and by_mode != by_pattern:
        raise config.wrong("index_topk_pattern", "what indexer_types says", pattern)
    regular = [max(i - offset + 1, 0) % max(every, 1) == 0 for i in range(total)]
    fresh = by_mode or by_pattern or regular
    if len(fresh) < total:
        key = "indexer_types" if modes else "index_topk_pattern"
        raise config.wrong(key, f"{total} of them, one a layer", len(fresh))
    return fresh


def _shortest(level: str, letters: str) -> Reuse:
    """FFSSSFSSS as `lead` and `every`, where those say it; anything else as a pattern."""
    lead = letters.index("S") - 1
    shared = letters[lead + 1 :]
    every = 1 + len(shared) - len(shared.lstrip("S"))
    regular = Reuse(level=level, over="layers", role="final", every=every, lead=lead)
    if "".join("FS"[regular.turn(i) == "shared"] for i in range(len(letters))) == letters:
        return regular
    return Reuse(level=level, over="layers", role="final", pattern=letters)


def calls(reuse: Sequence[Reuse], types: Sequence[str]) -> list[str]:
    """A note of what the calls of `reuse` are."""
    if not reuse:
        return []
    return [f"The calls of `reuse` are layers {ranges(_numbers(types, INDEXED))}, in this order."]
