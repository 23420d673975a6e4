"""A model's config.json, field by field: what it says, what it leaves out, and what nobody read of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hsgen.errors import HsgenError, printable

MAX_BYTES = 1 << 20  # of a config.json

# what a key has in its name that says something of attention, and what it has that does not: experts,
# projections, layers that are no attention, positions that the model itself gives to its heads
_ATTENTION = (
    *("attention", "attn", "index", "spars", "topk", "top_k", "block", "window", "sliding"),
    *("compress", "kv_", "qk_", "v_head", "sink", "softcap", "logit", "pool", "gate"),
)
_ELSEWHERE = (
    *("linear_", "mlp_", "moe_", "router", "norm_topk", "topk_group", "topk_method", "gated_norm"),
    *(
        "attention_bias",
        "qkv_bias",
        "output_gate_type",
        "_attn_implementation",
        "use_cache",
        "image_",
        "video_",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A mapping of the file; remembers what was read of it."""

    where: str  # the file, and the keys that lead here
    said: Mapping[str, object]
    defaults: Mapping[str, object] = field(
        default_factory=dict[str, object]
    )  # of what it leaves out
    read: set[str] = field(default_factory=set[str])
    older: dict[str, object] = field(default_factory=dict[str, object])  # said by an older name

    def get(self, key: str) -> object:
        """A value or its default; None where there is neither, as null is nothing."""
        self.read.add(key)
        value = self._said(key)
        return self.defaults.get(key) if value is None else value

    def _said(self, key: str) -> object:
        return self.older.get(key) if self.said.get(key) is None else self.said[key]

    def count(self, key: str, *, least: int = 1, otherwise: int | None = None) -> int:
        """A whole number; `otherwise` where nothing is said, which no class has as a default."""
        value = otherwise if self.get(key) is None else self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(key, f"a whole number of at least {least}", value)
        return value

    def number(self, key: str, default: float) -> float:
        """Any number."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, "a number", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def listed(self, key: str, known: Sequence[object]) -> list[object] | None:
        """A list of known values, or a string of known letters."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | str):
            raise self.wrong(key, "a list", value)
        items = list(cast("list[object]", value))
        for item in items:
            if item not in known or isinstance(item, bool):
                raise self.wrong(key, f"{' or '.join(map(shown, known))} in it", item)
        return items

    def table(self, key: str, **defaults: object) -> Fields:
        """A mapping inside this one; an empty one where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "a mapping", value)
        inner = cast("dict[str, object]", value or {})
        return Fields(where=f"{self.where}: {key}", said=inner, defaults=defaults)

    def known_as(self, key: str, former: Fields, old: str) -> None:
        """Take over what another mapping says by an older name; they must not say two things."""
        value, other = self.said.get(key), former.get(old)
        if value is not None and other is not None and value != other:
            raise self.wrong(key, f"{shown(other)}, which {old} says", value)
        if other is not None:
            self.older[key] = other

    def wrong(
        self, key: str, expected: str, value: object, *, help: str | None = None
    ) -> HsgenError:
        """What to raise about a value."""
        got = "nothing" if value is None else shown(value)
        return HsgenError(f"{self.where}: {key}: expected {expected}, got {got}", help=help)

    @property
    def defaulted(self) -> Mapping[str, object]:
        """What was read, and said by the defaults only."""
        return {
            key: value
            for key, value in self.defaults.items()
            if key in self.read and self._said(key) is None
        }

    @property
    def unread(self) -> Mapping[str, object]:
        """What is said of attention, and was not read."""
        return {
            key: value
            for key, value in self.said.items()
            if key not in self.read and value not in (None, False, 0, "", [], {}) and _concerns(key)
        }


def _concerns(key: str) -> bool:
    return any(word in key for word in _ATTENTION) and not any(word in key for word in _ELSEWHERE)


def shown(value: object) -> str:
    """A value as the file would say it, on one line and not too long."""
    text = printable(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def read(path: Path) -> Fields:
    """What a config.json says; a folder stands for the one in it.

    Raises:
        HsgenError: it cannot be read, is no mapping, or says a key twice.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        said: object = json.loads(text, object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        reason = printable(getattr(error, "strerror", None) or str(error))
        raise HsgenError(f"{path}: cannot read this config: {reason}") from error
    if not isinstance(said, dict):
        raise HsgenError(f"{path}: expected the fields of a model, got {shown(said)}")
    return Fields(where=str(path), said=cast("dict[str, object]", said))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found
