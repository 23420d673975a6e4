"""Laws: what several calls must have to do with one another.  Preconditions come from the graph."""

import torch

from conformance import calls, lab, oracles, systems
from conformance.lab import assert_same_bits, check, same
from conformance.probes import same_but_for_order
from hsgen import spec as language
from hsgen.reference import tensor_kinds


@check(applies=lambda spec: lab.laws(spec).dense_when_all_selected)
def everything_selected_is_dense_attention(lab):
    """Budgets as large as the sequence leave ordinary attention."""
    spec = lab.spec()
    spec = systems.with_budgets(spec, lambda level: systems.entries(spec, level, lab.T))
    call = lab.make(spec)
    outcome = lab.run(call)
    plain = _dense(call, torch.float32).to(call.dtype)
    exact, lse = _dense(call, torch.float64), outcome.lse
    oracles.raise_if(oracles.error_findings(call, outcome.o, exact, plain, lse=lse, given={}))


@check(applies=lambda spec: any(level.within for level in spec.levels))
def endless_beam_is_exhaustive(lab):
    """A beam that keeps everything selects what a level without parents selects."""
    spec = lab.spec(dims=(64, 32))
    parents = {level.within for level in spec.levels if level.within}
    wide = systems.with_budgets(
        spec, lambda level: systems.entries(spec, level, lab.T) if level.name in parents else None
    )
    levels = tuple(
        level.model_copy(update={"within": None})
        for level in spec.levels
        if level.name not in parents
    )
    flat = language.verify(spec.model_copy(update={"levels": levels, "loss": None}))
    call = lab.make(wide, integers=True, seed=5)
    narrowed = lab.run(call)
    known = {name: x for name, x in call.tensors.items() if name in tensor_kinds(flat)}
    exhaustive = lab.run(calls.Call(spec=flat, tensors=known))
    for name, expected in exhaustive.selection.items():
        assert_same_bits(name, expected, narrowed.selection[name], "endless beam")


@check(applies=lambda spec: all(_head_by_head(spec, level) for level in spec.levels))
def groups_are_repeated_heads(lab):
    """Key heads repeated for every query head, in a spec of groups of one, change nothing."""
    spec = lab.spec(dims=(64, 32))
    call = lab.make(spec, integers=True, seed=6)
    heads = spec.heads.model_copy(update={"kv": spec.heads.query})
    repeated = {
        name: t.repeat_interleave(spec.heads.group, 2) if t.ndim == 4 else t
        for name, t in calls.key_side(call).items()
    }
    learned = (f"{level.name}_key_{x}" for level in spec.levels for x in ("position", "weight"))
    repeated |= {
        name: call.tensors[name].repeat_interleave(spec.heads.group, 0)
        for name in learned
        if name in call.tensors
    }
    single = calls.Call(
        spec=spec.model_copy(update={"heads": heads}), tensors=call.tensors | repeated
    )
    grouped, alone = lab.checked(call), lab.checked(single)
    for name, expected in grouped.selection.items():
        assert_same_bits(name, expected, alone.selection[name], "groups of one")


@check(applies=lambda spec: lab.laws(spec).decode_equals_prefill_row)
def decode_steps_are_rows_of_prefill(lab):
    """One query on the keys up to its own selects and yields what its row of the whole does."""
    call = lab.make(lab.spec(dims=(64, 32)), integers=True, seed=7)
    whole = lab.checked(call)
    for t in (0, 7, lab.T // 2, lab.T - 1):
        keys = {name: x[:, : t + 1] for name, x in calls.key_side(call).items()}
        step = call.rows(t, t + 1).with_tensors(**keys).with_options(q_offset=t)
        for name, chosen in lab.checked(step).selection.items():
            expected = whole.selection[name][:, t : t + 1]
            assert_same_bits(name, expected, chosen, f"decode step {t}")


@check(applies=lambda spec: lab.laws(spec).future_never_changes_the_past)
def later_chunks_are_rows_of_prefill(lab):
    """A chunk of queries in the middle, given its offset, selects and yields what the whole does."""
    call = lab.make(lab.spec(dims=(64, 32)), B=2, T=lab.short + 16, integers=True, seed=8)
    whole = lab.checked(call)
    start, stop = 13, call.tokens - 7
    for offset in (start, torch.full((2,), start, dtype=torch.int32, device=lab.device)):
        chunk = call.rows(start, stop).with_options(q_offset=offset)
        for name, chosen in lab.checked(chunk).selection.items():
            expected = whole.selection[name][:, start:stop]
            assert_same_bits(name, expected, chosen, "a later chunk")


@check()
def packed_documents_are_separate(lab):
    """Every document, empty ones included, is as it would be alone."""
    spec = lab.spec(dims=(64, 32))
    packed, alone = calls.pack(
        spec, [17, 0, 1, lab.short], dtype=lab.dtype, device=lab.device, integers=True
    )
    together = lab.checked(packed)
    start = 0
    for call in alone:
        T = call.tokens
        if T:
            for name, expected in lab.checked(call).selection.items():
                chosen = together.selection[name][start : start + T]
                assert_same_bits(name, expected[0], chosen, f"the document at {start}")
        start += T


@check()
def a_sequence_is_alone_in_its_batch(lab):
    """Sequences of one batch have nothing to do with one another."""
    call = lab.make(lab.spec(dims=(64, 32)), B=3, T=lab.short, integers=True, seed=10)
    together = lab.checked(call)
    rows = {n: t[1:2] if n in calls.batched(call) else t for n, t in call.tensors.items()}
    for name, chosen in lab.checked(call.with_tensors(**rows)).selection.items():
        assert_same_bits(name, together.selection[name][1:2], chosen, "alone")


@check(applies=systems.takes_selections)
def selections_are_sets(lab):
    """-1 in any slot is ignored, a duplicate changes nothing, what does not exist is masked."""
    call = lab.make(systems.with_budgets(lab.spec(), lambda level: 8))
    generator = torch.Generator().manual_seed(4)
    clean, messy = {}, {}
    for name, chosen in lab.run(call).selection.items():
        kept = chosen.cpu()[..., :3]
        junk = torch.tensor([-1, 1 << 20, -7, -1], dtype=torch.int32).expand(*kept.shape[:-1], 4)
        width = chosen.shape[-1]
        filled = _slots(torch.cat([kept, kept[..., :1], junk], -1), width)
        order = torch.rand(filled.shape, generator=generator).argsort(-1)
        clean[name] = _slots(kept, width).to(lab.device)
        messy[name] = filled.gather(-1, order).to(lab.device)
    expected = lab.run(call.with_options(selection=clean))
    outcome = lab.run(call.with_options(selection=messy))
    same(_without_selection(expected), _without_selection(outcome), what="a messy selection")


def _slots(chosen, width):
    """Slots that say nothing, up to as many as a level has."""
    return torch.nn.functional.pad(chosen, (0, width - chosen.shape[-1]), value=-1)


@check(applies=systems.takes_selections)
def own_selection_given_back_changes_nothing(lab):
    """What a call selected, given to it, yields the same bits; so does what is attended, alone.

    Rows that a call chose to keep, or that an entry took, lie side by side, those of a caller's lists where
    they are: sums have another order.
    """
    call = lab.make()
    outcome = lab.run(call)
    over = {branch.over for branch in call.spec.attend}
    attended = {name: chosen for name, chosen in outcome.selection.items() if name in over}
    for given in (outcome.selection, attended):
        again = lab.run(call.with_options(selection=given))
        yielded = _without_selection(outcome), _without_selection(again)
        if any(branch.rows or branch.softmax for branch in call.spec.attend):
            same_but_for_order(*yielded, rows=slice(None), what="selection given back")
        else:
            same(*yielded, what="selection given back")


@check(applies=systems.takes_selections)
def any_selection_is_attended(lab):
    """Selections that the spec would never make: with holes, with rows that are empty."""
    call = lab.make(B=2, T=lab.short)
    generator = torch.Generator().manual_seed(12)
    chosen = {}
    for level in systems.selecting(call.spec):
        N = systems.entries(call.spec, level, call.keys)
        heads = systems.selection_heads(call.spec, level)
        shape = (2, lab.short, heads, systems.slots(call.spec, level, call.keys))
        picks = torch.randint(-2, N + 2, shape, generator=generator).clamp(min=-1)
        picks[:, ::4] = -1
        chosen[level.name] = picks.to(torch.int32).to(lab.device)
    lab.checked(call.with_options(selection=chosen))


@check()
def rows_before_the_first_key_are_empty(lab):
    """More queries than keys: the first see nothing, and get 0 and -inf."""
    call = lab.make(T=23, S=12)
    outcome = lab.checked(call)
    if call.spec.causal:
        assert (outcome.o[:, :11] == 0).all()
        assert all((lse[..., :11] == -torch.inf).all() for lse in outcome.lse.values())


@check()
def no_rows_make_no_outputs(lab):
    """T = 0 runs, and so do sequences without keys."""
    assert lab.run(lab.make(T=0, S=5)).o.numel() == 0
    none = torch.tensor([0, lab.T], dtype=torch.int32, device=lab.device)
    lab.checked(lab.make(B=2).with_options(kv_lens=none, q_offset=0))


@check()
def large_queries_stay_finite(lab):
    """Queries times 100: a softmax that is nearly one-hot."""
    call = lab.make()
    lab.checked(call.with_tensors(q=call.tensors["q"] * 100))


@check()
def offset_keys_stay_accurate(lab):
    """Keys and values far from 0, as real ones are in some channels."""
    call = lab.make()
    moved = {name: t + 8 for name, t in calls.key_side(call).items()}
    lab.checked(call.with_tensors(**moved))


@check()
def two_runs_have_the_same_bits(lab):
    """Whatever order the programs run in."""
    call = lab.make(B=2, T=lab.short)
    first = lab.run(call)
    same(first, lab.rerun(call), what="two runs")


@check()
def strides_are_honoured(lab):
    """Heads outside tokens in memory, as transformers hands them over."""
    call = lab.make(B=2, T=lab.short)
    same(lab.run(call), lab.run(calls.placed(call, calls.head_major)), what="strides")


@check(
    applies=lambda spec: (
        not any(
            _has_tail(level) or _walks(level) or _goes_back(level) or _estimates(spec, level)
            for level in spec.levels
        )
        and not any(map(_one_way, spec.attend))
    )
)
def non_causal_specs_see_both_sides(lab):
    """The same spec without causality, with a last block that is short."""
    for T in (lab.T, lab.T + 3):
        lab.checked(lab.make(lab.spec(causal=False), T=T))


def _goes_back(level):
    """Whether entries are counted back from a row's own."""
    return isinstance(level.partition, language.Diagonals)


def _one_way(branch):
    """Whether it sees units at distances, which no kernel does both ways."""
    return branch.static is not None and bool(branch.static.stride or branch.static.power_of_two)


@check()
def given_offsets_place_queries(lab):
    """Queries that lie before the end of the keys, and beyond it."""
    for offset in (3, 30):
        lab.checked(lab.make(T=13, S=37).with_options(q_offset=offset))


def _forces(spec):
    """Whether every level may: no tile or cluster is the first, or a row's last, no part is forced of two,
    no walk or estimate takes what is forced, what another level forces is always counted, and near anchors
    are left to a window.
    """
    selects = [x.select for x in spec.levels if x.select]
    unplaced = language.Clusters | language.Stripes
    placed = not any(isinstance(x.partition, unplaced) for x in spec.levels)
    others = any(x.apart or x.force.level or x.early_stop for x in selects)
    estimated = any(_estimates(spec, level) for level in spec.levels)
    return not spec.axes and placed and not others and not estimated


@check(applies=_forces)
def uncounted_entries_come_on_top(lab):
    """`counted: false` in every level that forces."""
    spec = lab.spec()
    levels = []
    for level in spec.levels:
        if level.select and not isinstance(level.partition, language.LearnedTree):
            near = _has_tail(level) or _goes_back(level)  # which the last entries are
            last = 0 if near else 2
            changes = {"first": 1, "last": last, "counted": False}
            force = level.select.force.model_copy(update=changes)
            select = level.select.model_copy(update={"force": force})
            level = level.model_copy(update={"select": select})
        levels.append(level)
    lab.checked(lab.make(language.verify(spec.model_copy(update={"levels": tuple(levels)}))))


def _estimates(spec, level):
    """Whether scores are held against what a branch gives a row, of tokens up to its own; none is forced."""
    return isinstance(spec.summed(level), language.Attend)


def _walks(level):
    """Whether rows take entries of segments before their own until these add little; none is forced."""
    return bool(level.select and level.select.early_stop)


def _has_tail(level):
    return bool(level.select and level.select.force.tail)


def _dense(call, dtype):
    """Ordinary causal attention.  -> [B, T, Hq, Dv]"""
    (branch, *_), group = call.spec.attend, call.spec.heads.group
    q, k = (call.tensors[name].to(dtype).transpose(1, 2) for name in "qk")
    if branch.storage:
        v = k[..., : call.spec.head_dim.v]
    else:
        v = call.tensors["v"].to(dtype).transpose(1, 2)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=call.spec.causal, scale=branch.scale).transpose(1, 2)


def _head_by_head(spec, level):
    """Whether no level makes the heads of a group agree, nor has learned weights for each key head."""
    learned = level.pool and "linear" in (level.pool.keys, level.pool.values)
    return level.score.share != "group" and not learned and level.score.source is None


def _without_selection(outcome):
    """Outputs only; what is handed back of a given selection is no law."""
    return calls.Outcome(o=outcome.o, lse=outcome.lse, selection={})


CHECKS = lab.collect(globals())
