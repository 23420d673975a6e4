"""Exact probes: inputs made so that a wrong mask, index or normaliser shows in the bits.

Statistical bounds miss a single leaking key; these do not.
"""

from functools import partial

import sanitizer
import torch
from tolerances import tolerance

from conformance import calls, lab, oracles, systems
from conformance.lab import assert_same_bits, check, same
from hsgen.reference.grids import tile_of
from hsgen.spec import Clusters, KMeans, Ragged, SortInSegment


def _values_as_they_are(spec):
    """Whether 1 stays 1: no branch has values that are normed or turned, as pooled keys may be."""
    latent = [spec.level(b.over).pool for b in spec.attend if b.storage and b.values == "pooled"]
    return not any(pool.then or pool.rotate for pool in latent)


def _uniform(spec):
    """Whether weights may be alike and 1 stays 1: none is of a cluster, whose logarithm is rounded."""
    counted = [
        spec.level(b.over).partition for b in spec.attend if b.bias == "log_count" and b.over
    ]
    return _values_as_they_are(spec) and not any(isinstance(x, Clusters) for x in counted)


@check(applies=_uniform)
def uniform_probe_reads_the_mask(lab):
    """q = 0 and one-hot values: the output is 1/n where a key is seen and 0 elsewhere.

    Every value head has its own order of channels, so that a wrong head shows.
    """
    spec = lab.spec(dims=(64, 64))
    call = lab.make(spec)
    tensors = {"q": torch.zeros_like(call.tensors["q"]), **_first_tokens(call)}
    for name, t in calls.value_side(call).items():
        S, H, D = t.shape[-3:]
        token, head = torch.arange(S)[:, None], torch.arange(H)
        channel = (5 * token + 7 * head) % D  # 5 and 64 have no divisor in common
        one_hot = torch.nn.functional.one_hot(channel, D)
        tensors[name] = one_hot.expand(t.shape).to(t)
    if "gates" in call.tensors:
        tensors["gates"] = _one_branch_a_row(call.tensors["gates"])
    if "bias" in call.tensors:
        tensors["bias"] = torch.zeros_like(call.tensors["bias"])
    for name in _that_weigh_spans(spec):  # of which none is so light that it is lost
        tensors[name] = call.tensors[name] / 16
    if "output_gate" in call.tensors:  # whose sigmoid is 1
        tensors["output_gate"] = torch.full_like(call.tensors["output_gate"], 100.0)
    call = call.with_tensors(**tensors)
    outcome = lab.run(call)
    exact = call.reference(selection=outcome.selection).o
    bound = 2 * tolerance(call.dtype, lab.device).output * exact
    wrong = (outcome.o.double() - exact).abs() > bound
    assert not outcome.o.isnan().any(), "o has NaN"
    at = oracles._where(wrong)
    assert not wrong.any(), f"at {at}: expected {exact[at]}, got {outcome.o[at]}"
    oracles.raise_if(
        oracles.selection_findings(call, outcome, call.reference(selection=outcome.selection))
    )


@check(applies=lambda spec: lab.laws(spec).future_never_changes_the_past)
def future_has_no_influence(lab):
    """Huge keys and values after a row leave it as it was: selections, and outputs but for the order of sums.

    A later row of its tile may choose other blocks, so that the tile walks the row's own in another order.
    """
    call = lab.make()
    before = lab.run(call)
    for last in (lab.T // 2, lab.T - 9):
        future = {n: _huge(t, slice(last + 1, None)) for n, t in calls.key_side(call).items()}
        after = lab.run(call.with_tensors(**future))
        same_but_for_order(before, after, rows=slice(0, last + 1), what=f"tokens after {last}")


@check(applies=lambda spec: systems.takes_selections(spec) and bool(_private_branches(spec)))
def unselected_blocks_have_no_influence(lab):
    """Huge keys and values in entries that no row selects change no bit.

    The selection is given, and only tensors that no other branch attends are touched.
    """
    spec = lab.spec()
    call = lab.make(spec)
    muted = slice(16, 24)  # a block, or a few tokens
    call = call.with_options(selection=_avoiding(call, muted))
    before = lab.run(call)
    names = [f"{side}_{kv}" if kv else side for kv in _private_branches(spec) for side in "kv"]
    touched = {n: _huge(call.tensors[n], muted) for n in names if n in call.tensors}
    same(before, lab.run(call.with_tensors(**touched)), what="unselected tokens")


@check()
def padding_is_never_read(lab):
    """What lies after kv_lens may be NaN."""
    S = lab.T
    lens = torch.tensor([S - 11, S], dtype=torch.int32, device=lab.device)
    call = lab.make(B=2, T=lab.short, S=S).with_options(kv_lens=lens)
    before = lab.run(call)
    padded = {}
    for name, t in calls.key_side(call).items():
        padded[name] = t.clone()
        padded[name][0, S - 11 :] = torch.nan
    same(before, lab.run(call.with_tensors(**padded)), what="padding")


@check(applies=_values_as_they_are)
def ones_stay_ones(lab):
    """V = 1 gives 1: the normaliser counts what the values count."""
    call = lab.make()
    ones = {name: torch.ones_like(t) for name, t in calls.value_side(call).items()}
    call = call.with_tensors(**ones, **_first_tokens(call, sides=("value",)))
    if "gates" in call.tensors:
        call = call.with_tensors(gates=_one_branch_a_row(call.tensors["gates"]))
    outcome = lab.run(call)
    exact = call.reference(selection=outcome.selection).o
    error = (outcome.o.double() - exact).abs().max()
    limit = tolerance(call.dtype, lab.device)
    assert error <= 2 * limit.output + 8 * limit.arithmetic, f"1 is off by {error:.3g}"


def _exactly(spec):
    """Whether scores of integers are exact: no block of rows adds up the masses of so many tokens, no walk
    asks for a part of a softmax, and no key is divided by the root of a length that is no square.
    """
    return not any(
        level.score.map == "around"
        or isinstance(level.partition, Ragged)
        or (level.select and (level.select.apart or level.select.early_stop))
        for level in spec.levels
    )


@check(applies=_exactly)
def integers_select_the_same_everywhere(lab):
    """Where all arithmetic is exact the sets are the reference's, ties included."""
    call = lab.make(lab.spec(dims=(64, 32)), integers=True, seed=3)
    outcome = lab.run(call)
    exact = call.reference()
    for level in systems.selecting(call.spec):
        expected = exact.selection[level.name].indices
        assert_same_bits(level.name, expected, outcome.selection[level.name], "integers")


@check(
    applies=lambda spec: _exactly(spec) and not any(level.score.normalise for level in spec.levels)
)
def large_scores_keep_their_low_bits(lab):
    """Scores and pooled keys that share a large part differ in bits that 16-bit formats lack.

    All sums stay below 2^24 steps, so float32 is exact.
    """
    call = lab.make(lab.spec(dims=(64, 32)), integers=True, seed=4)
    step = 4 if lab.dtype == torch.bfloat16 else 1  # what the inputs' format resolves there
    names = [name for name in ("k", "k_index") if name in call.tensors]
    moved = {name: 960 + step * call.tensors[name] for name in names}
    call = call.with_tensors(**moved)
    outcome, exact = lab.run(call), call.reference()
    for level in systems.selecting(call.spec):
        expected = exact.selection[level.name].indices
        assert_same_bits(level.name, expected, outcome.selection[level.name], "large integers")


@check(applies=lambda spec: any(level.score.normalise for level in spec.levels))
def close_masses_are_told_apart(lab):
    """Small queries: softmax masses so alike that 16-bit formats hold many of them equal."""
    call = lab.make(T=61)  # of few entries none are
    lab.checked(call.with_tensors(q=call.tensors["q"] / 256))


@check()
def nothing_depends_on_what_memory_held(lab):
    """Outputs and buffers that start as NaN and as 7 end the same."""
    call = lab.make(B=2, T=lab.short)
    with sanitizer.poisoned_empty("nan"):
        before = lab.run(call)
    with sanitizer.poisoned_empty("seven"):
        same(before, lab.run(call), what="two fills")


@check()
def neighbours_in_memory_have_no_influence(lab):
    """Views inside tensors of NaN, at odd strides, give the bits of tensors of their own.

    On a card another kernel may run where rows begin at 16 bytes: then those of views inside zeros, and at
    such strides those of tensors of their own.
    """
    call = lab.make(B=2, T=lab.short)
    alone, around = lab.run(call), lab.run(calls.placed(call, calls.guarded))
    if lab.device != "cpu":
        even = calls.placed(call, partial(calls.guarded, extra=16))
        same(alone, lab.run(even), what="guard bands at even strides")
        alone = lab.run(calls.placed(call, partial(calls.guarded, fill=0.0)))
    same(alone, around, what="guard bands")


# --- the inputs


def same_but_for_order(expected, outcome, *, rows, what):
    """The same selections, and numbers that differ by no more than the order of a few sums."""
    for name, x in expected.tensors().items():
        y, at = outcome.tensors()[name], -1 if name.startswith("lse") else 1
        x, y = (t.movedim(at, 0)[rows] for t in (x, y))
        if not x.is_floating_point():
            assert_same_bits(name, x, y, what)
            continue
        assert torch.equal(x.isfinite(), y.isfinite()), f"{what}: {name} is finite elsewhere"
        x, y = (torch.where(t.isfinite(), t, 0.0).double() for t in (x, y))
        unit = torch.finfo(expected.tensors()[name].dtype).eps
        wrong = (x - y).abs() > 8 * unit * (1 + x.abs())
        assert not wrong.any(), f"{what}: {name} differs at {oracles._where(wrong)}"


def _first_tokens(call, sides=("key", "value")):
    """Learned pools that hand on each entry's first token."""
    names = [
        f"{level.name}_{side}_{what}"
        for level in call.spec.levels
        for side in sides
        for what in ("weight", "position")
    ]
    return {
        name: calls.slot_zero(name, call.tensors[name].shape).to(call.tensors[name])
        for name in names
        if name in call.tensors
    }


def _that_weigh_spans(spec):
    """Queries of anchors, whose scores say what their spans weigh."""
    levels = {spec.level(branch.over) for branch in spec.attend if branch.spans}
    return {f"q_{level.q}" if level.q else "q" for level in levels}


def _one_branch_a_row(gates):
    """Gates that open one branch for every row and head, in turns."""
    T, H, C = gates.shape[-3:]
    turn = (torch.arange(T)[:, None] + torch.arange(H)) % C
    return torch.nn.functional.one_hot(turn, C).expand(gates.shape).to(gates)


def _huge(t, tokens):
    """The same tensor with huge numbers of both signs at some tokens.  [B, S, ...]"""
    t = t.clone()
    signs = torch.randint(0, 2, t[:, tokens].shape, generator=torch.Generator().manual_seed(9))
    t[:, tokens] = ((2 * signs - 1) * calls.HUGE[t.dtype]).to(t)
    return t


def _private_branches(spec):
    """kv names, None for `k` and `v`, that only branches over selections attend.

    None where entries are cut from an order of keys that follows from these: other keys have another.  Spans
    are of more than what is selected.
    """
    orders = [level.permute.keys for level in spec.levels if level.permute]
    if any(isinstance(order, SortInSegment | KMeans) for order in orders):
        return set()
    opened = {each.level for each in spec.reuse if each.attend == "given"}
    over = {b.kv for b in spec.attend if b.over and b.values == "raw" and b.over not in opened}
    others = {b.kv for b in spec.attend if b.window or b.static or b.spans}
    others |= {spec.level(b.over).kv for b in spec.attend if b.values == "pooled"}
    return over - others


def _avoiding(call, muted):
    """Random selections of every level that hold no token of `muted`."""
    generator = torch.Generator().manual_seed(11)
    B = call.tensors["q"].shape[0]
    chosen = {}
    for level in systems.selecting(call.spec):
        stride, size = (
            level.partition.stride or 1,
            level.partition.size,
        )  # of nodes any may be chosen
        N = systems.entries(call.spec, level, call.keys)
        if call.spec.axes:
            tokens = torch.arange(muted.start, muted.stop)
            held = tile_of(tokens, call.spec.axes, level.permute.keys.tile)
            allowed = torch.tensor([e for e in range(N) if e not in held])
        else:
            starts = torch.arange(N) * stride
            allowed = starts[(starts + size <= muted.start) | (starts >= muted.stop)] // stride
        shape = (
            B,
            call.tokens,
            systems.selection_heads(call.spec, level),
            systems.slots(call.spec, level, call.keys),
        )
        picks = torch.randint(0, len(allowed), shape, generator=generator)
        chosen[level.name] = allowed[picks].to(torch.int32).to(call.device)
    return chosen


CHECKS = lab.collect(globals())
