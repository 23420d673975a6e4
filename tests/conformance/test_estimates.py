"""Choices by estimates that are held against what a pattern gives a row, of other sizes."""

from dataclasses import replace

import pytest
import torch

from conformance import backends, calls, systems
from conformance.oracles import check
from hsgen import dryrun
from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.pipeline import compile_backward, compile_spec
from hsgen.spec import Blocks, Static
from hsgen.target import H100

LANES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}


def other(*, rows=16, size=8, threshold=0.1, local=None, dtype="int4", causal=True, **shape):
    """The shipped spec with other numbers."""
    spec = systems.small("sale", **({"group": 2, "kv": 1} | shape))
    token, block = spec.levels
    token = token.model_copy(update={"score": token.score.model_copy(update={"dtype": dtype})})
    changes = {
        "partition": Blocks(size=size, stride=size),
        "query": block.query.model_copy(update={"block": rows}),
        "select": block.select.model_copy(update={"threshold": threshold}),
    }
    pattern = local or Static(blocks=size, window=2, sink=1)
    near = spec.attend[0].model_copy(update={"static": pattern})
    changed = {
        "levels": (token, block.model_copy(update=changes)),
        "attend": (near, spec.attend[1]),
        "causal": causal,
    }
    return language.verify(spec.model_copy(update=changed))


OTHERS = {
    "no power of two": lambda: other(rows=10, size=6, dims=(48, 32)),
    "units inside blocks": lambda: other(
        rows=3, size=4, local=Static(blocks=2, window=5, sink=4), dims=(32, 16)
    ),
    "units of several blocks": lambda: other(
        rows=24, size=3, local=Static(blocks=9, window=1, sink=1), group=3, dims=(16, 48)
    ),
    "eight bits": lambda: other(dtype="int8", threshold=0.4, dims=(16, 16)),
    "no first keys": lambda: other(local=Static(blocks=8, window=1, sink=0), dims=(16, 16)),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_are_right(name, lane, seed):
    """Documents of more keys than rows, of fewer, or with no row at all; then what a caller brings."""
    lengths, keys = [1, 0, 37, 5, 9], [30, 9, 55, 2, 9]
    call, _ = calls.pack(
        OTHERS[name](), lengths, key_lengths=keys, dtype=torch.float32, device=lane, seed=seed
    )
    outcome = RUN[lane](call)
    check(call, outcome)
    generator = torch.Generator().manual_seed(seed)
    shape = (*outcome.selection["block"].shape[:-1], 9)
    picks = torch.randint(-3, 19, shape, generator=generator).clamp(min=-1).to(torch.int32)
    call = call.with_options(selection={"block": picks.to(lane)})
    check(call, RUN[lane](call))


@pytest.mark.parametrize("lane", LANES)
def test_what_the_pattern_shows_counts_once(lane, seed):
    """Chosen or not: a threshold that all pass gives dense attention, one that none does the pattern's."""
    call = calls.make(other(threshold=1e-30, dims=(16, 16)), T=70, device=lane, seed=seed)
    outcome = RUN[lane](call)
    q, k, v = (call.tensors[name].double() for name in ("q", "k", "v"))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    place = torch.arange(70, device=logits.device)
    before = place[:, None] >= place
    dense = logits.masked_fill(~before, -torch.inf).softmax(-1)
    assert torch.allclose(outcome.o.double(), torch.einsum("bhts,bshd->bthd", dense, v), atol=1e-5)
    few = RUN[lane](replace(call, spec=other(threshold=1e9, dims=(16, 16))))
    assert (few.selection["block"] == -1).all()
    unit = place // 8
    shown = before & ((unit[:, None] - unit < 2) | (unit == 0))
    near = logits.masked_fill(~shown, -torch.inf).softmax(-1)
    assert torch.allclose(few.o.double(), torch.einsum("bhts,bshd->bthd", near, v), atol=1e-5)


def test_calls_and_their_gradients_hold_bits_in_place_of_lists():
    """Of blocks of rows; lists of rows, which only who asks for them gets, are not counted."""
    spec = systems.load("sale")
    plan, before = compile_backward(spec, H100).plan, compile_spec(spec, H100).plan
    for tokens in (4096, 32768, 131072):
        run = dryrun.run(before, tokens=tokens)
        (bits,) = (x for made, x in run.buffers if made.name == "made_block_selection_blocks")
        assert bits.bytes == (tokens // 64 + 2) * 32 * tokens // 32 // 8
        had = run.given + run.of("output")
        assert run.given + run.peak - run.of("selection") <= 1.25 * had, tokens
        run = dryrun.gradients(plan, before, tokens=tokens)
        assert run.given + run.peak <= 1.3 * (run.given + run.of("output")), tokens


REFUSED = {
    "first keys that are no whole blocks": (
        lambda: other(local=Static(blocks=2, window=5, sink=1)),
        "tokens of branches local and selected may coincide, and no kernel counts them once yet",
    ),
    "both sides": (
        lambda: other(causal=False),
        "%k.int4: no kernel scores vectors kept in int4 yet",
    ),
    "a pattern of steps": (
        lambda: other(local=Static(blocks=8, window=2, dilation=2, sink=1)),
        "%k.int4: no kernel scores vectors kept in int4 yet",
    ),
    "vectors as they are": (
        lambda: other(dtype=None),
        "level block: no kernel reduces the scores of rows together yet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_does_is_refused(name):
    spec, words = REFUSED[name]
    with pytest.raises(PlanError, match=words):
        backends.compiled(spec(), torch.float32)
