"""A call: batches, packed sequences, prefixes, given selections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hsgen.reference.inputs import some_keys, tensor_kinds
from hsgen.reference.losses import mean
from hsgen.reference.reuse import Kept, Taken, carries_scores, kept_after, turns, with_brought
from hsgen.reference.sequence import Keep, Result, concatenate, one_sequence
from hsgen.selection import BitmapSelection, ListSelection, Selection, to_list
from hsgen.spec import Spec, Turn


def reference(
    spec: Spec,
    tensors: Mapping[str, Tensor],
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_lens: Tensor | None = None,
    selection: Mapping[str, Selection | Tensor] | None = None,
    state: Mapping[str, Kept] | None = None,
    dtype: torch.dtype = torch.float64,
    keep_scores: bool = True,
    keep_seen: bool = False,
) -> Result:
    """Compute what `spec` means.

    Args:
        spec: The attention.
        tensors: By name, as `tensor_shapes` lists them: [B, T, H, D], or packed [total, H, D].
        cu_seqlens_q: i32[Z + 1], first row of every packed sequence.
        cu_seqlens_k: The same for keys; the default is `cu_seqlens_q`.
        q_offset: Position of each sequence's query row 0, one number or [Z]; the default aligns the
            last query with the last key.
        kv_lens: [Z], how many keys each sequence really has.
        selection: By level: taken instead of the level's own choice.
        state: Of the call before, its `Result.state`; None is the first call of a pass.  A call that
            takes a level over does without the tensors that only this level reads.
        dtype: What everything is computed in.  Pooled entries are kept in the dtype of the tensors.
        keep_scores: False leaves `scores`, `candidates` and `forced` empty, and memory in peace.
        keep_seen: True fills `seen`, which is empty otherwise.
    """
    packed = tensors["q"].ndim == 3
    kinds = tensor_kinds(spec)
    spans = _spans(spec, tensors, cu_seqlens_q, cu_seqlens_k)
    given = {name: _indices(chosen) for name, chosen in (selection or {}).items()}
    state = with_brought(spec, state or {}, selection or {})
    turn = turns(spec, state)
    carried = frozenset(name for name in turn if carries_scores(spec, name))
    keep = Keep(scores=keep_scores, seen=keep_seen, carried=carried)
    parts = []
    for z, (rows, keys) in enumerate(spans):
        k_len = len(keys) if kv_lens is None else min(len(keys), int(kv_lens[z]))
        where = {"query": _at(rows, z, packed), "key": _at(keys[:k_len], z, packed)}
        place = where["query"]
        where |= {"sequence": z, "parameter": ...}
        x = {
            name: tensors[name][where[kind]].to(dtype)
            for name, kind in kinds.items()
            if name in tensors or not spec.reuse
        }
        first = k_len - len(rows) if q_offset is None else _number(q_offset, z)
        p = torch.arange(first, first + len(rows), device=x["q"].device)
        chosen = {name: indices[where["query"]] for name, indices in given.items()}
        reused = {
            name: _taken(spec, name, each, state.get(name), place) for name, each in turn.items()
        }
        parts.append(
            one_sequence(spec, x, p, chosen, reused=reused, keep=keep, stored=tensors["q"].dtype)
        )
    result = _join(parts, packed=packed)
    kept = kept_after(spec, state, result.selection, result.scores)
    return replace(result, state=kept, scores=result.scores if keep_scores else {})


def _taken(
    spec: Spec, level: str, turn: Turn, kept: Kept | None, rows: slice | tuple[int, slice]
) -> Taken:
    """A reused level in this call, for the rows of one sequence."""
    reuse = spec.reuse_of(level)
    assert reuse is not None, f"{level} is reused"
    if turn != "shared" or kept is None or kept.selection is None:
        return Taken(reuse=reuse, turn=turn)
    scores = None if kept.scores is None else kept.scores[rows]
    return Taken(reuse=reuse, turn=turn, indices=_indices(kept.selection)[rows], scores=scores)


def _indices(selection: Selection | Tensor) -> Tensor:
    """A caller's selection as indices [..., Hs, K]."""
    if isinstance(selection, BitmapSelection):
        selection = to_list(selection)
    return selection if isinstance(selection, Tensor) else selection.indices


def _spans(
    spec: Spec, tensors: Mapping[str, Tensor], cu_q: Tensor | None, cu_k: Tensor | None
) -> list[tuple[range, range]]:
    """Rows and keys of every sequence."""
    q, k = tensors["q"], some_keys(spec, tensors)
    if q.ndim == 4:
        return [(range(q.shape[1]), range(k.shape[1]))] * q.shape[0]
    assert cu_q is not None, "packed tensors need cu_seqlens_q"
    ends_q = cu_q.tolist()
    ends_k = ends_q if cu_k is None else cu_k.tolist()
    pairs = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    return [(range(a, b), range(c, d)) for a, b, c, d in pairs]


def _at(items: range, z: int, packed: bool) -> slice | tuple[int, slice]:
    """Index of a sequence's items in a packed or a dense tensor."""
    where = slice(items.start, items.stop)
    return where if packed else (z, where)


def _number(value: int | Tensor, z: int) -> int:
    return (
        value if isinstance(value, int) else int(value.reshape(-1)[z if value.numel() > 1 else 0])
    )


def _join(parts: list[Result], *, packed: bool) -> Result:
    """Sequences as the caller's layout has them; lse gets its head before its row."""
    result = concatenate(parts)
    B = len(parts)

    def shape(y: Tensor) -> Tensor:
        return y if packed else y.unflatten(0, (B, len(y) // B))

    return Result(
        o=shape(result.o),
        lse={name: shape(y).transpose(-1, -2) for name, y in result.lse.items()},
        selection={
            name: replace(s, indices=shape(s.indices))
            if isinstance(s, ListSelection)
            else replace(s, words=shape(s.words))
            for name, s in result.selection.items()
        },
        scores={name: shape(y) for name, y in result.scores.items()},
        candidates={name: shape(y) for name, y in result.candidates.items()},
        forced={name: shape(y) for name, y in result.forced.items()},
        seen={name: shape(y) for name, y in result.seen.items()},
        streams={name: shape(y) for name, y in result.streams.items()},
        loss={name: mean(y) for name, y in result.loss.items()},
        state={},
    )
