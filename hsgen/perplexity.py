"""How well a model speaks when its attention is a spec's, beside dense attention and other choices of
as many tokens.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hsgen import metrics, models, quality, standins
from hsgen.captures import Group
from hsgen.errors import HsgenError
from hsgen.models import Attention, Model
from hsgen.quality import Json, Report, Subject
from hsgen.reference import reference
from hsgen.spec import Spec

RIVALS = ("oracle", "random", "recent_sink")
TOKENS = 1024
SHOWN = 4  # layers whose choices are shown head by head

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """exp of the mean surprise over the second half's tokens, by way to attend; `dense` is one.

    Attributes:
        layers: Those whose attention is exchanged; the others are dense.
        rivals_of: The choice that oracle, random and recent + sink have the budgets of.
    """

    spec: str
    model: str
    tokens: int
    layers: tuple[int, ...]
    rivals_of: str | None
    ways: dict[str, float]

    @property
    def name(self) -> str:
        """Of this section."""
        return "perplexity"

    def record(self) -> Json:
        """The same for machines."""
        return {
            "model": self.model,
            "tokens": self.tokens,
            "layers": ", ".join(map(str, self.layers)),
            "rivals_of": self.rivals_of,
            "perplexity": dict(self.ways.items()),
        }

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.layers))
        lines = [
            f"perplexity of {self.model}, {self.tokens} tokens, over those of the second half",
            f"  attention exchanged in layers {shown}; nothing is trained for it",
        ]
        if self.rivals_of:
            lines.append(f"  oracle, random, recent + sink: as many entries as {self.rivals_of}")
        dense = self.ways["dense"]
        lines += [
            f"  {quality.WAYS_TEXT.get(way, way):<14}{value:10.3f}  {value / dense:6.3f} x dense"
            for way, value in self.ways.items()
        ]
        return "\n".join(lines) + "\n"


def report(
    spec: Spec,
    folder: Path,
    text: Path | None = None,
    *,
    layers: Sequence[int] = (),
    tokens: int | None = None,
    rows: int = quality.ROWS,
    curves: bool = False,
    told: Told = lambda _what, _done, _total: None,
) -> Report:
    """Measure a spec on a model: what it recalls of the model's own attention, and the perplexity.

    Args:
        spec: The attention; its heads are exchanged for the model's.
        folder: The model; see `models.load`.
        text: What it reads; None takes the language reference that Python ships.
        layers: Whose attention is measured and exchanged; none means that all are exchanged, and
            SHOWN of them, evenly spaced, shown.
        tokens: Of the text; None takes TOKENS.
        rows: Measured, of the second half.
        curves: Also at other budgets.
        told: Hears what is done.

    Raises:
        HsgenError: model or text cannot be read or do not do, or the spec needs what they lack.
    """
    model = models.load(folder, "cuda" if torch.cuda.is_available() else "cpu")
    if wrong := [layer for layer in layers if layer >= model.layers]:
        raise HsgenError(f"layers: expected numbers below {model.layers}, got {wrong[0]}")
    ids = model.tokens(_text(text), tokens or TOKENS)
    every = max(1, model.layers // SHOWN)
    groups = model.capture(ids, layers or range(0, model.layers, every)[:SHOWN])
    origin = {"model": model.name}
    found = quality.report_on(
        spec,
        groups,
        name=text.name if text else "Python's language reference",
        origin=origin,
        rows=rows,
        curves=curves,
    )
    return replace(found, more=(perplexity(spec, model, ids, layers=layers, told=told),))


def manual() -> str:
    """Python's language reference, which every Python ships: more than 100,000 tokens of prose."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _text(file: Path | None) -> str:
    if file is None:
        return manual()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HsgenError(f"{file}: cannot read this text: {error}") from error


def perplexity(
    spec: Spec,
    model: Model,
    ids: Tensor,
    *,
    layers: Sequence[int] = (),
    told: Told = lambda _what, _done, _total: None,
) -> Perplexity:
    """Let a model read a text by dense attention, by the spec's, and by choices of the spec's budgets.

    Args:
        spec: The attention; each group of heads that shares a key head is one of its own.
        model: Causal.
        ids: i64[T], the text.
        layers: Whose attention is exchanged; none means all.
        told: Hears what is done next.

    Raises:
        HsgenError: the spec is not causal, or needs what the model lacks.
    """
    if not spec.causal:
        raise HsgenError(
            f"spec {spec.name}: expected causal attention, which the model was made for"
        )
    if len(ids) < 2 * quality.RUN:
        raise HsgenError(f"tokens: expected at least {2 * quality.RUN}, got {len(ids)}")
    where = tuple(layers) or tuple(range(model.layers))
    subject = _subject(spec)
    ways: dict[str, Attention] = {"dense": models.dense, "spec": _exchanged(spec, where, None)}
    if subject:
        ways |= {way: _exchanged(spec, where, (subject, way)) for way in RIVALS}
    found: dict[str, float] = {}
    for i, (way, attention) in enumerate(ways.items()):
        told("ways to attend", i, len(ways))
        nats = model.surprise(ids, attention)[len(ids) // 2 - 1 :]
        found[way] = math.exp(float(nats.double().mean()))
    return Perplexity(
        spec=spec.name,
        model=model.name,
        tokens=len(ids),
        layers=where,
        rivals_of=subject.name if subject else None,
        ways=found,
    )


def _subject(spec: Spec) -> Subject | None:
    """The choice that the output rests on: all branches together, or the one that reads tokens."""
    raw = quality.raw_branches(spec)
    wanted = {
        quality.TOGETHER,
        *(f"level {x.over}" for x in raw),
        *(f"branch {x.name}" for x in raw),
    }
    found = [each for each in quality.subjects(spec) if each.name in wanted]
    return found[-1] if found else None


def _exchanged(spec: Spec, layers: Sequence[int], rival: tuple[Subject, str] | None) -> Attention:
    """Attention that is dense but in some layers: there the spec's, or a rival's choice of its size."""

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer not in layers:
            return models.dense(layer, q, k, v)
        grouped = q.unflatten(1, (k.shape[1], -1))  # [T, Hkv, G, D]
        groups = [
            Group(layer=layer, kv_head=h, q=grouped[:, h], k=k[:, h], v=v[:, h])
            for h in range(k.shape[1])
        ]
        return torch.cat([_attend(spec, group, rival) for group in groups], 1).to(q.dtype)

    return attention


def _attend(spec: Spec, group: Group, rival: tuple[Subject, str] | None) -> Tensor:
    """One group by the spec, or by a rival of one of its choices.  -> [T, G, Dv]"""
    own = quality.bound(spec, group)
    gates = [1 / len(own.attend)] * len(own.attend) if own.combine and own.combine.gates else None
    q, k, v = group.q[None], group.k[None, :, None], group.v[None, :, None]
    result = reference(
        own,
        standins.tensors(own, q, k, v, gates),
        dtype=torch.float32,
        keep_scores=False,
        keep_seen=rival is not None,
    )
    if rival is None:
        return result.o[0]
    subject, way = rival
    position = torch.arange(len(group.q), device=group.q.device)
    full = metrics.dense(group.q, group.k, group.v, position)
    chosen = quality.chosen_of(result, subject, len(group.k))
    drawn = quality.noise(len(position), chosen.shape[-1]).to(group.q.device)
    ways = metrics.choices(full, chosen, subject.size, drawn, subject.stride)
    return metrics.judge(full, ways[way], subject.size, subject.stride).o.transpose(0, 1)
