"""What the graph of every shipped spec promises holds for the reference: also where no kernel reaches."""

import functools

import pytest
import torch
from conformance import systems
from plan_cases import random_tensors

from hsgen import planner
from hsgen.analysis import causality, laws
from hsgen.reference import reference, tensor_kinds

T = 61  # several blocks of 8, the last one incomplete
NAMES = sorted(systems.FILES)
LAST = {"query", "key"}  # tensors with a dimension of tokens, [B, T, H, D]


@functools.cache
def small(name):
    return systems.small(name)


@functools.cache
def promised(name):
    graph = planner.plan(small(name))
    return causality(graph), laws(graph)


def by_causality(*kinds):
    return [name for name in NAMES if promised(name)[0] in kinds]


def tensors(spec, rows, keys, *, seed=0):
    return random_tensors(spec, rows, keys, seed=seed)


def cut(spec, x, rows=slice(None), keys=slice(None)):
    """Some rows and keys of every tensor."""
    parts = {"query": rows, "key": keys}
    kinds = tensor_kinds(spec)
    return {n: y[:, parts[kinds[n]]] if kinds[n] in parts else y for n, y in x.items()}


def changed_after(spec, x, t):
    """Other numbers in every row of a tensor after token t."""
    other = tensors(spec, T, T, seed=1)
    kinds = tensor_kinds(spec)
    return {
        n: torch.cat((y[:, : t + 1], other[n][:, t + 1 :]), 1) if kinds[n] in LAST else y
        for n, y in x.items()
    }


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_twice_gives_the_same_bits_and_numbers(name):
    spec = small(name)
    x = tensors(spec, T, T)
    once, again = reference(spec, x), reference(spec, x)
    assert once.o.isfinite().all()
    assert torch.equal(once.o, again.o)
    for level, selection in once.selection.items():
        assert torch.equal(selection.indices, again.selection[level].indices)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_are_numbers(name, rows):
    spec = small(name)
    assert reference(spec, tensors(spec, rows, rows)).o.isfinite().all()


@pytest.mark.parametrize("name", by_causality("token"))
def test_later_tokens_never_change_a_row(name):
    spec = small(name)
    x = tensors(spec, T, T)
    before = reference(spec, x).o
    for t in (0, 20, T - 2):
        same(reference(spec, changed_after(spec, x, t)).o[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("name", by_causality("token"))
def test_a_decode_step_is_a_row_of_prefill(name):
    spec = small(name)
    x = tensors(spec, T, T)
    whole = reference(spec, x).o
    for t in (0, 17, T - 1):
        step = reference(spec, cut(spec, x, slice(t, t + 1), slice(t + 1))).o
        same(step[:, 0], whole[:, t])


def last_of_two(spec, x):
    """The output of a call, of the second one where a call takes over from the one before."""
    found = reference(spec, x)
    return (reference(spec, x, state=found.state) if spec.reuse else found).o


@pytest.mark.parametrize("name", by_causality("prompt", "none"))
def test_later_tokens_do_change_a_row(name):
    """Or the graph promises too little."""
    spec = small(name)
    for seed in range(4):
        x = tensors(spec, T, T, seed=seed + 2)
        early = slice(41)
        before = last_of_two(spec, x)[:, early]
        others = (changed_after(spec, x, 40), cut(spec, x, early, early))  # other tokens, or none
        if any(not torch.allclose(last_of_two(spec, y)[:, early], before) for y in others):
            return
    raise AssertionError(f"{name} is said to be {promised(name)[0]}, and no row looks ahead")


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_are_separate_ones(name):
    spec = small(name)
    lengths = [13, 0, 29, 1]
    parts = [tensors(spec, n, n, seed=i) for i, n in enumerate(lengths)]
    kinds = tensor_kinds(spec)
    packed = {n: _packed(kinds[n], [part[n] for part in parts]) for n in kinds}
    same_parameters = [
        {**part, **{n: parts[0][n] for n in part if kinds[n] == "parameter"}} for part in parts
    ]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    found = reference(spec, packed, cu_seqlens_q=cu).o
    alone = [reference(spec, part).o[0] for part in same_parameters]
    same(found, torch.cat(alone))


def _packed(kind, parts):
    """What each document has of a tensor, as a packed batch has it."""
    if kind == "parameter":
        return parts[0]
    return torch.cat([part[0] for part in parts] if kind in LAST else parts)
