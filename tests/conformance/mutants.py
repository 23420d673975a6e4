"""Wrong backends, one bug each: the suite has to notice every one of them.

Each is the stand-in with one function of the reference replaced, or its inputs or outputs bent.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from conformance import backends
from hsgen import reference


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mutant:
    """A wrong backend, a spec on which it is wrong, and the checks that must say so."""

    name: str
    run: Callable
    spec: str
    caught_by: tuple[str, ...]


@contextlib.contextmanager
def _replaced(name, make):
    """Put make(old) in the place of a function of the reference, wherever it is used."""
    modules = [
        module for path, module in sys.modules.items() if path.startswith(f"{reference.__name__}.")
    ]
    users = [module for module in modules if hasattr(module, name)]
    (old,) = {getattr(module, name) for module in users}
    for module in users:
        setattr(module, name, make(old))
    try:
        yield
    finally:
        for module in users:
            setattr(module, name, old)


def bent(name, make):
    """The stand-in while a function of the reference is another."""

    def run(call):
        with _replaced(name, make):
            return backends.stand_in(call)

    return run


def asked(change):
    """The stand-in for another call than was asked."""
    return lambda call: backends.stand_in(change(call))


def told(change):
    """The stand-in, whose output is bent: change(call, o) -> o."""

    def run(call):
        outcome = backends.stand_in(call)
        return replace(outcome, o=change(call, outcome.o.clone()))

    return run


# --- bugs


def one_key_leaks(old):
    """The row at position 20 sees one key after it."""

    def branch(rows, *arguments):
        keys = old(rows, *arguments)
        if keys.visible.shape[-1] <= 21 or not keys.source.startswith("raw"):
            return keys
        visible = keys.visible.clone()
        visible[rows.p == 20, :, 21] = True
        return replace(keys, visible=visible)

    return branch


def own_key_is_missing(old):
    """Rows see what is strictly before them."""

    def branch(rows, *arguments):
        keys = old(rows, *arguments)
        if not keys.source.startswith("raw"):
            return keys
        token = torch.arange(keys.visible.shape[-1])
        return replace(keys, visible=keys.visible & (token < rows.p[:, None]).unsqueeze(1))

    return branch


def window_has_one_more(old):
    """w + 1 tokens."""

    def branch(rows, attend, *arguments):
        if attend.window:
            attend = attend.model_copy(update={"window": attend.window + 1})
        return old(rows, attend, *arguments)

    return branch


def entries_are_scored_early(old):
    """An entry counts one token before it is complete."""

    def complete(rows, level):
        return old(replace(rows, p=rows.p + 1), level)

    return complete


def last_forced_is_forgotten(old):
    """`last: n` forces n - 1."""

    def forced(rows, level, groups):
        if level.select:
            force = level.select.force
            force = force.model_copy(update={"last": max(0, force.last - 1)})
            select = level.select.model_copy(update={"force": force})
            level = level.model_copy(update={"select": select})
        return old(rows, level, groups)

    return forced


def ties_go_up(old):
    """Equal scores: the higher position wins."""

    def order(scores, candidates, forced):
        flipped = old(scores.flip(-1), candidates.flip(-1), forced.flip(-1))
        return scores.shape[-1] - 1 - flipped

    return order


def worst_pick_is_lost(old):
    """One entry fewer than there is room for."""

    def choose(select, *arguments, **tail):
        return old(_with_budget(select, select.budget - 1), *arguments, **tail)

    return choose


def last_pick_is_the_next_best(old):
    """Rank k + 1 is taken in place of rank k."""

    def choose(select, *arguments, **tail):
        best = old(_with_budget(select, max(1, select.budget - 1)), *arguments, **tail)
        more = old(_with_budget(select, select.budget + 1), *arguments, **tail)
        full = old(select, *arguments, **tail)
        enough = more.sum(-1, keepdim=True) > full.sum(-1, keepdim=True)
        return torch.where(enough, best | (more & ~full), full)

    return choose


def forced_entries_always_count(old):
    """`counted: false` is ignored."""

    def choose(select, *arguments, **tail):
        counted = select.force.model_copy(update={"counted": True})
        return old(select.model_copy(update={"force": counted}), *arguments, **tail)

    return choose


def _with_budget(select, budget):
    return select.model_copy(update={"top_k" if select.top_k else "beam": budget})


def beams_are_ignored(old):
    """Children of every parent are candidates."""
    return lambda *arguments: torch.ones_like(old(*arguments))


def maps_have_no_weights(old):
    """Every source counts once, however much it overlaps."""

    def mapped(rows, level, source, _groups, N):
        count = level.partition.stride // rows.spec.level(level.score.source).partition.stride
        empty = torch.zeros_like(source.scores)
        scores = torch.where(source.complete[:, None], source.scores, empty)
        offsets = range(-1, count)
        return sum(reference.scores._shifted(scores, count, o, N, 0.0) for o in offsets)

    return mapped


def maps_start_late(old):
    """The source that straddles the start of an entry is forgotten."""

    def shifted(scores, ratio, offset, N, empty):
        result = old(scores, ratio, offset, N, empty)
        return result if offset >= 0 else torch.full_like(result, empty)

    return shifted


def scores_are_rounded_to(dtype):
    """Scores are kept in a short format."""
    return lambda old: lambda *arguments: old(*arguments).to(dtype).float()


def masses_are_rounded_to(dtype):
    """Softmax masses are kept in a short format on their way to a map."""

    def make(old):
        def mapped(rows, level, source, groups, N):
            short = source.scores.to(dtype).float()
            return old(rows, level, replace(source, scores=short), groups, N)

        return mapped

    return make


def pools_are_rounded_to(dtype):
    """Pooled keys are kept in a short format."""

    def make(old):
        def pooled(*arguments):
            return {name: y.to(dtype).float() for name, y in old(*arguments).items()}

        return pooled

    return make


def pools_are_cut_short(old):
    """The last token of an entry is not pooled."""

    def pool(level, layout, how, y, x, side):
        if how == "linear":
            x = dict(x)
            name = f"{level.name}_{side}_weight"
            x[name] = torch.cat([x[name][:, :-1], torch.zeros_like(x[name][:, -1:])], 1)
            return old(level, layout, how, y, x, side)
        return old(level, replace(layout, slots=layout.slots[..., :-1]), how, y, x, side)

    return pool


def positions_are_forgotten(old):
    """Learned positions are not added."""

    def pool(level, layout, how, y, x, side):
        without = {name: t for name, t in x.items() if not name.endswith("_position")}
        return old(level, layout, how, y, without, side)

    return pool


def heads_are_strided(old):
    """Query head h takes key head h % Hkv."""

    def dot(q, k):
        group = q.shape[1] // k.shape[1]
        order = torch.arange(q.shape[1]).reshape(group, k.shape[1]).T.flatten()
        back = order.argsort()
        return old(q[:, order], k)[:, back]

    return dot


def maximum_is_not_subtracted(old):
    """exp of the scores as they are."""

    def softmax(logits, visible):
        weights = logits.masked_fill(~visible, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        return weights / total, total.log().masked_fill(empty, -torch.inf).squeeze(-1)

    return softmax


def empty_rows_divide_by_zero(old):
    """0 / 0 where nothing is seen."""

    def softmax(logits, visible):
        weights, lse = old(logits, visible)
        none = ~visible.any(-1, keepdim=True)
        return weights.masked_fill(none, torch.nan), lse

    return softmax


def short_blocks_do_not_exist(old):
    """Without causality the last block must be whole."""

    def complete(rows, level):
        ends = rows.layouts[level.name].ends
        return old(rows, level) & (ends <= rows.S)

    return complete


def lists_end_at_minus_one(call):
    """What follows the first -1 of a given selection is not read."""
    given = call.options.get("selection")
    if given is None:
        return call
    cut = {n: torch.where((s == -1).cumsum(-1) > 0, -1, s) for n, s in given.items()}
    return call.with_options(selection=cut)


def documents_are_joined(call):
    """One document from the first row to the last."""
    ends = {n: t[[0, -1]] for n, t in call.options.items() if n.startswith("cu_seqlens")}
    return call.with_options(**ends)


def lengths_are_ignored(call):
    """kv_lens has no effect, nor have the offsets that follow from it."""
    return replace(call, options={n: v for n, v in call.options.items() if n != "kv_lens"})


def offsets_are_ignored(call):
    """Queries are always the last ones."""
    return replace(call, options={n: v for n, v in call.options.items() if n != "q_offset"})


def first_offset_is_everyones(call):
    """All sequences have the offset of the first."""
    offset = call.options.get("q_offset")
    return (
        call if not isinstance(offset, torch.Tensor) else call.with_options(q_offset=int(offset[0]))
    )


def keys_of_the_first_sequence(call):
    """Every sequence of a batch reads the keys of the first."""
    if call.packed:
        return call
    k = call.tensors["k"]
    return call.with_tensors(k=k[:1].expand_as(k))


def strides_are_assumed(call):
    """Tensors are read as if they lay in memory without gaps."""
    q = call.tensors["q"]
    dense = torch.empty(q.shape, dtype=q.dtype).stride()
    return call.with_tensors(q=q.as_strided(q.shape, dense))


def gates_are_turned(call):
    """Gates belong to other branches."""
    return call.with_tensors(gates=call.tensors["gates"].roll(1, -1))


def budgets_are_capped(call):
    """No more than four entries, whatever the spec says."""
    levels = []
    for level in call.spec.levels:
        if level.select and level.select.budget > 4:
            level = level.model_copy(update={"select": _with_budget(level.select, 4)})
        levels.append(level)
    return replace(call, spec=call.spec.model_copy(update={"levels": tuple(levels)}))


def scaled_by(factor):
    """Every output times a number."""
    return lambda call, o: (o.float() * factor).to(o)


def one_row_is_zero(call, o):
    """One row and head is never computed."""
    o[..., o.shape[-3] // 2, 0, :] = 0
    return o


def last_row_is_not_written(call, o):
    """The last row holds what memory held."""
    o[..., -1:, :, :] = o.new_empty(o[..., -1:, :, :].shape)
    return o


def heads_are_swapped_in_a_tile(call, o):
    """The first rows of two key heads change places."""
    o[..., :8, [0, -1], :] = o[..., :8, [-1, 0], :]
    return o


def late_rows_lose_bits(call, o):
    """The second half is rounded to bf16."""
    half = o.shape[-3] // 2
    o[..., half:, :, :] = o[..., half:, :, :].to(torch.bfloat16).to(o)
    return o


def noisy(call, o):
    """The last bit is another in every run."""
    noise = torch.randint(0, 2, o.shape, generator=_noise).to(o)
    return o * (1 + noise * torch.finfo(o.dtype).eps)


_noise = torch.Generator().manual_seed(0)


def sums_are_in_base_2(call):
    """lse is a binary logarithm."""
    outcome = backends.stand_in(call)
    return replace(outcome, lse={n: t / 0.6931471805599453 for n, t in outcome.lse.items()})


def sums_are_16_bit(call):
    """lse went through the inputs' short format."""
    outcome = backends.stand_in(call)
    return replace(outcome, lse={n: t.half().float() for n, t in outcome.lse.items()})


def padding_comes_first(call):
    """-1 stands before the entries."""
    outcome = backends.stand_in(call)
    turned = {n: s.flip(-1).sort(-1).values.to(s) for n, s in outcome.selection.items()}
    return replace(outcome, selection=turned)


ERRORS = "errors"  # the covering cases
UNIFORM, FUTURE = "uniform_probe_reads_the_mask", "future_has_no_influence"
INTEGERS, ONES = "integers_select_the_same_everywhere", "ones_stay_ones"
SETS, DECODE = "selections_are_sets", "decode_steps_are_rows_of_prefill"
MASSES = "close_masses_are_told_apart"
LOW_BITS = "large_scores_keep_their_low_bits"
half, bf16 = torch.float16, torch.bfloat16


def _mutant(spec, run, *caught_by, name=None):
    return Mutant(name=name, run=run, spec=spec, caught_by=caught_by)


def _bent(spec, target, make, *caught_by, name=None):
    return Mutant(
        name=name or make.__name__, run=bent(target, make), spec=spec, caught_by=caught_by
    )


def _asked(spec, change, *caught_by):
    return Mutant(name=change.__name__, run=asked(change), spec=spec, caught_by=caught_by)


def _told(spec, change, *caught_by, name=None):
    return Mutant(name=name or change.__name__, run=told(change), spec=spec, caught_by=caught_by)


MUTANTS = (
    _bent("moba", "_branch", one_key_leaks, UNIFORM),
    _bent("nsa", "_branch", one_key_leaks, UNIFORM, name="one_key_leaks_in_nsa"),
    _bent("moba", "_branch", own_key_is_missing, UNIFORM, ERRORS),
    _bent("nsa", "_branch", window_has_one_more, UNIFORM, ERRORS),
    _bent("nsa", "complete_entries", entries_are_scored_early, FUTURE, UNIFORM, ERRORS),
    _bent("moba", "forced_entries", last_forced_is_forgotten, INTEGERS, ERRORS),
    _bent("moba", "order", ties_go_up, INTEGERS),
    _bent("hisa", "order", ties_go_up, INTEGERS, name="ties_go_up_in_hisa"),
    _bent("nsa", "order", ties_go_up, INTEGERS, name="ties_go_up_in_nsa"),
    _bent("moba", "choose", worst_pick_is_lost, INTEGERS, ERRORS),
    _bent("moba", "choose", last_pick_is_the_next_best, INTEGERS, ERRORS),
    _bent("hisa", "choose", last_pick_is_the_next_best, ERRORS, name="next_best_in_hisa"),
    _bent("nsa", "choose", last_pick_is_the_next_best, ERRORS, name="next_best_in_nsa"),
    _bent("moba", "choose", forced_entries_always_count, "uncounted_entries_come_on_top"),
    _bent("hisa", "inside_beam", beams_are_ignored, ERRORS),
    _bent("nsa", "mapped", maps_have_no_weights, ERRORS),
    _bent("nsa", "_shifted", maps_start_late, ERRORS),
    _bent("moba", "raw_scores", scores_are_rounded_to(half), LOW_BITS, name="scores_are_fp16"),
    _bent(
        "hisa", "raw_scores", scores_are_rounded_to(half), LOW_BITS, name="scores_are_fp16_in_hisa"
    ),
    _bent("nsa", "mapped", masses_are_rounded_to(half), MASSES, name="masses_are_fp16"),
    _bent("moba", "pooled_entries", pools_are_rounded_to(half), LOW_BITS, name="pools_are_fp16"),
    _bent(
        "hisa",
        "pooled_entries",
        pools_are_rounded_to(bf16),
        LOW_BITS,
        name="pools_are_bf16_in_hisa",
    ),
    _bent("moba", "_pool", pools_are_cut_short, ERRORS),
    _bent("nsa", "_pool", pools_are_cut_short, ERRORS, name="pools_are_cut_short_in_nsa"),
    _bent("nsa", "_pool", positions_are_forgotten, ERRORS),
    _bent("hisa", "dot", heads_are_strided, ERRORS),
    _bent("moba", "softmax", maximum_is_not_subtracted, "large_queries_stay_finite"),
    _bent(
        "nsa", "softmax", empty_rows_divide_by_zero, ERRORS, "rows_before_the_first_key_are_empty"
    ),
    _bent("moba", "complete_entries", short_blocks_do_not_exist, "non_causal_specs_see_both_sides"),
    _asked("moba", lists_end_at_minus_one, SETS, "any_selection_is_attended"),
    _asked("moba", documents_are_joined, "packed_documents_are_separate", ERRORS),
    _asked("hisa", lengths_are_ignored, "padding_is_never_read", ERRORS),
    _asked("nsa", offsets_are_ignored, "given_offsets_place_queries", ERRORS),
    _asked("nsa", first_offset_is_everyones, ERRORS),
    _asked("moba", keys_of_the_first_sequence, "a_sequence_is_alone_in_its_batch"),
    _asked("moba", strides_are_assumed, "strides_are_honoured"),
    _asked("nsa", gates_are_turned, UNIFORM, ERRORS),
    _asked("moba", budgets_are_capped, "everything_selected_is_dense_attention"),
    _told("moba", scaled_by(1.01), ONES, ERRORS, name="outputs_are_1_percent_larger"),
    _told("moba", scaled_by(1.004), ONES, ERRORS, name="outputs_are_0.4_percent_larger"),
    _told("hisa", one_row_is_zero, ONES, ERRORS),
    _told("moba", last_row_is_not_written, "nothing_depends_on_what_memory_held"),
    _told("moba", heads_are_swapped_in_a_tile, UNIFORM, ERRORS),
    _told("nsa", late_rows_lose_bits, ERRORS),
    _told("hisa", noisy, "two_runs_have_the_same_bits"),
    _mutant("nsa", sums_are_in_base_2, ERRORS, name="sums_are_in_base_2"),
    _mutant("moba", sums_are_16_bit, ERRORS, name="sums_are_16_bit"),
    _mutant("moba", padding_comes_first, ERRORS, INTEGERS, name="padding_comes_first"),
)
