"""Which entries a level has, which of them a row may see, and which tokens they are."""

from __future__ import annotations

import torch
from torch import Tensor

from hsgen.reference.inputs import needs_all_tokens
from hsgen.reference.layouts import Layout, back, part_of
from hsgen.reference.partitions import anchors
from hsgen.reference.queries import Together, asked_of, together
from hsgen.reference.rows import Rows, Scored, spread
from hsgen.selection import ListSelection, members
from hsgen.spec import LearnedTree, Level, Ragged, Stripes


def complete_entries(rows: Rows, level: Level) -> Tensor:
    """Entries whose nominal end the row has reached.  -> bool[T, N]

    Without causality all that exist: also a short last one, unless entries overlap or a linear map
    needs all of its tokens.
    """
    if isinstance(level.partition, Stripes):
        return anchors(level.partition, rows.p, rows.S)[1]
    return _complete(rows, level, rows.p)


def _complete(rows: Rows, level: Level, p: Tensor) -> Tensor:
    if rows.spec.causal:
        layout = rows.layouts[level.name]
        complete = (layout.ends <= rows.S) & (layout.ends - 1 <= p[:, None])
        if layout.diagonal is None:
            return complete
        back = torch.arange(len(layout.ends), device=p.device)
        token = ((p // layout.diagonal)[:, None] - back) * layout.diagonal
        return complete & (token < rows.S)  # of a row behind the last key the nearest have none
    return _existing(rows, level).expand(len(p), -1)


def _existing(rows: Rows, level: Level) -> Tensor:
    """Entries that exist, short ones included where they have a meaning.  -> bool[N]"""
    layout = rows.layouts[level.name]
    short_too = layout.entry_of is not None and not needs_all_tokens(level)
    return (layout.ends <= rows.S) | short_too


def visible_entries(rows: Rows, level: Level, groups: Together) -> Tensor:
    """Entries that rows which choose together may choose.  -> bool[R, N]

    Of single rows those that are complete.  Of others all that exist and begin by the last of the
    rows: an entry then counts with all of its tokens, also those that a row must not see.  Of an
    order of keys, in which a segment's entries begin and end as one, those that are complete for the
    first of the rows.
    """
    if rows.spec.rows_of(level) is None:
        return complete_entries(rows, level)
    if level.permute is not None:
        return _complete(rows, level, groups.first)
    return begun_entries(rows, level, groups) & _existing(rows, level)


def begun_entries(rows: Rows, level: Level, groups: Together) -> Tensor:
    """Entries that may have a token which the last of the rows may see.  -> bool[R, N]"""
    if isinstance(level.partition, Stripes):
        return complete_entries(rows, level)
    seen = rows.layouts[level.name].starts <= groups.last[:, None]
    return seen if rows.spec.causal else torch.ones_like(seen)


def forced_entries(rows: Rows, level: Level, groups: Together) -> Tensor:
    """The first entries, and the last ones up to the own, of each of the rows.  -> bool[R, N]

    Entries of one unit come together: whole segments, where tokens are sorted inside segments.
    """
    begun = begun_entries(rows, level, groups)
    if not level.select or isinstance(level.partition, Stripes):
        return torch.zeros_like(begun)
    force, layout = level.select.force, rows.layouts[level.name]
    unit = torch.searchsorted(layout.units, layout.starts)
    first, last = (_own_unit(layout, p) for p in (groups.first, groups.last))
    near = (unit > first - force.last) & (unit <= last) & (force.last > 0)
    forced = ((unit < force.first) & begun) | near
    return forced | tail_entries(rows, level) if force.tail else forced


def tail_entries(rows: Rows, level: Level) -> Tensor:
    """The entry that each row stands in, as long as it is incomplete.  -> bool[T, N]"""
    layout = rows.layouts[level.name]
    unit = torch.searchsorted(layout.units, layout.starts)
    return (unit == _own_unit(layout, rows.p)) & ~complete_entries(rows, level)


def _own_unit(layout: Layout, p: Tensor) -> Tensor:
    """The last unit that starts at or before each position.  -> i64[R, 1]"""
    if layout.step is not None:
        return (p // layout.step)[:, None]
    return torch.searchsorted(layout.units, p, right=True)[:, None] - 1


def entries_that_fill(rows: Rows, level: Level, groups: Together) -> tuple[Tensor, Tensor]:
    """How many entries have how many tokens together, of each of the rows.  -> i64[R, 1, 1] twice"""
    parts = rows.layouts[level.name].parts
    one = torch.ones_like(groups.last).view(-1, 1, 1)
    if parts is None:
        return one, one * level.partition.size
    return one * parts, rows.seen_tokens.clamp(min=1).view(-1, 1, 1)


def sink_entries(rows: Rows, level: Level, groups: Together) -> Tensor:
    """Entries that hold one of the first tokens, as soon as they begin.  -> bool[R, H, N]"""
    sink, begun = level.select and level.select.force.sink, begun_entries(rows, level, groups)
    if not sink:
        return torch.zeros_like(begun)[:, None]
    slots = rows.layouts[level.name].slots
    holds = ((slots >= 0) & (slots < sink)).any(-1)
    return begun[:, None] & holds


def kept_entries(rows: Rows, level: Level, groups: Together | None = None) -> Tensor:
    """Entries that earlier calls have kept, as far as rows see them.  -> bool[R, Hs, N]

    groups: Rows that choose together; left out, every row for itself, and R = T.
    """
    alone = together(None, rows.p)
    groups = groups or alone
    begun = begun_entries(rows, level, groups)
    indices = rows.reused[level.name].indices
    assert indices is not None, f"nothing is kept of {level.name}"
    asked = ListSelection(level=level.name, indices=asked_of(indices, alone, groups))
    kept = members(asked, begun.shape[-1])
    return kept & begun[:, None]


def inside_beam(rows: Rows, level: Level, levels: dict[str, Scored], groups: Together) -> Tensor:
    """Entries that have a token, and whose parent was selected, if any.  -> bool[R, Hp, N]"""
    if isinstance(level.partition, Stripes):
        return complete_entries(rows, level)[:, None]
    layout = rows.layouts[level.name]
    there = layout.there.expand(len(groups.last), -1, -1)
    if layout.first is not None and rows.spec.causal:
        there = there & (layout.first <= groups.last[:, None, None])
    if level.within is None:
        return there
    parent, above = rows.spec.level(level.within), levels[level.within]
    chosen = above.chosen
    assert chosen is not None, f"{level.within} is named by `within` and must select"
    assert parent.partition.size == parent.partition.stride, "parents must not overlap"
    chosen = asked_of(chosen, above.chooser, groups)
    if isinstance(level.partition, LearnedTree):
        beam = chosen.repeat_interleave(level.partition.branching, -1)
    elif isinstance(parent.partition, LearnedTree | Ragged):  # what is inside are tokens
        beam = token_mask(rows, parent, chosen)
    else:
        first = torch.arange(there.shape[-1], device=there.device) * level.partition.stride
        beam = chosen[..., first // parent.partition.stride]
    heads = max(beam.shape[1], there.shape[1])
    return spread(beam, heads) & spread(there, heads)


def token_mask(rows: Rows, level: Level, chosen: Tensor) -> Tensor:
    """Tokens of chosen entries, each once.  bool[T, Hs, N] -> bool[T, H, S]"""
    layout = rows.layouts[level.name]
    if layout.parts is not None:
        part = part_of(layout.parts, rows.seen_tokens, rows.S)[:, None]
        return chosen.gather(-1, part.expand(-1, chosen.shape[1], -1))
    if layout.diagonal is not None:
        entry = back(layout.diagonal, rows.p, rows.S)[:, None].expand(-1, chosen.shape[1], -1)
        last = chosen.shape[-1] - 1  # beyond it there is none: rows after the last key
        return chosen.gather(-1, entry.clamp(0, last)) & (entry >= 0) & (entry <= last)
    if layout.entry_of is None and layout.first is not None:
        return _of_members(layout, chosen, rows.S)
    if layout.entry_of is None:
        return _overlapping(layout, chosen, rows.S)
    heads = max(chosen.shape[1], len(layout.entry_of))
    entry = spread(layout.entry_of[None], heads).expand(len(chosen), -1, -1)
    covers = entry >= 0
    return spread(chosen, heads).gather(-1, entry.clamp(min=0)) & covers


def own_seen(visible: Tensor, p: Tensor) -> Tensor:
    """Whether each row sees its own token.  bool[T, H, S] -> bool[T, H, 1]"""
    S = visible.shape[-1]
    there = ((p >= 0) & (p < S)).view(-1, 1, 1)
    if not S:
        return there.expand(-1, visible.shape[1], -1)
    at = p.clamp(0, S - 1).view(-1, 1, 1).expand(-1, visible.shape[1], 1)
    return visible.gather(-1, at) & there


def _of_members(layout: Layout, chosen: Tensor, S: int) -> Tensor:
    """Tokens of chosen nodes that have taken them, head by head, each once."""
    token = torch.arange(S, device=chosen.device)
    member = (layout.slots[..., None] == token).any(-2)  # [H, N, S]
    heads = max(chosen.shape[1], len(member))
    chosen, member = spread(chosen, heads), spread(member[None], heads)[0]
    return torch.einsum("thn,hns->ths", chosen.double(), member.double()) > 0


def _overlapping(layout: Layout, chosen: Tensor, S: int) -> Tensor:
    """Tokens of chosen entries in place, any number of which may have a token."""
    mask = torch.zeros(*chosen.shape[:-1], S + 1, dtype=torch.bool, device=chosen.device)
    for slot in layout.slots[0].T:  # slot by slot, no token is in two entries
        at = slot.masked_fill(slot < 0, S).expand(chosen.shape)
        mask = mask.scatter(-1, at, chosen | mask.gather(-1, at))
    return mask[..., :S]
