"""What only a GPU shows: lengths and sizes as shipped, offsets past 2^31, graphs that are replayed."""

import math

import pytest
import torch

import hsgen
from conformance import backends, calls, systems
from conformance.lab import assert_same_bits, same
from conformance.oracles import check
from conformance.test_conformance import DTYPES
from hsgen.reference import tensor_kinds

pytestmark = pytest.mark.gpu

FAR = (1 << 31) + 4096  # elements


def as_shipped(name):
    """Blocks, budgets, head dims and groups of the file; one or two key heads, so that it is quick."""
    spec = systems.load(name)
    kv = 1 if spec.heads.group >= 8 else 2
    heads = spec.heads.model_copy(update={"query": spec.heads.group * kv, "kv": kv})
    changes = {"heads": heads}
    changes["attend"] = tuple(systems.of_heads(branch, heads.query) for branch in spec.attend)
    if spec.index_per_key_head:
        changes["index"] = spec.index.model_copy(update={"heads": kv})
    return spec.model_copy(update=changes)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("T", [1000, 4099])
@pytest.mark.parametrize("name", systems.STRUCTURES)
def test_shipped_sizes_are_right(name, T, dtype, seed):
    spec = as_shipped(name)
    call = calls.make(spec, T=placed(spec, T), dtype=DTYPES[dtype], device="cuda", seed=seed)
    check(call, backends.cuda(call))


def placed(spec, T):
    """As many tokens, or those that axes have places for."""
    lengths = spec.axes or ()
    return T if not lengths or "any" in lengths else min(T, math.prod(lengths))


@pytest.mark.parametrize("name", systems.STRUCTURES)
def test_long_documents_are_right(name, seed):
    lengths = [700, 1, 0, 1300, 513]
    packed, _ = calls.pack(
        as_shipped(name), lengths, dtype=torch.bfloat16, device="cuda", seed=seed
    )
    check(packed, backends.cuda(packed))


@pytest.mark.parametrize("name", systems.STRUCTURES)
def test_long_integers_select_the_same(name):
    spec = scaled_exactly(as_shipped(name))
    dims = systems.load(name).head_dim.model_copy(update={"qk": 64, "v": 64})
    levels = systems.turned_less(spec, dims.qk)
    spec = spec.model_copy(update={"head_dim": dims, "levels": levels})
    T = placed(spec, 4099)
    call = calls.make(spec, T=T, dtype=torch.bfloat16, device="cuda", integers=True, seed=5)
    outcome, exact = backends.cuda(call), call.reference(keep_scores=False)
    for level in systems.selecting(spec):
        expected = exact.selection[level.name].indices
        assert_same_bits(level.name, expected, outcome.selection[level.name], "long integers")


def scaled_exactly(spec):
    """Scores times a power of two: another factor rounds each head's part before they are added."""
    levels = [
        level.model_copy(update={"score": level.score.model_copy(update={"scale": 0.125})})
        if level.score.scale
        else level
        for level in spec.levels
    ]
    return spec.model_copy(update={"levels": tuple(levels)})


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("name", systems.STRUCTURES)
def test_rows_may_lie_far_apart(name, side):
    """Strides of a token that take the last row past 2^31 elements."""
    call = calls.make(systems.small(name), T=61, dtype=torch.bfloat16, device="cuda")
    expected = backends.cuda(call)
    for tensor, kind in tensor_kinds(call.spec).items():
        if kind == side:
            moved = far_apart(call.tensors[tensor])
            same(expected, backends.cuda(call.with_tensors(**{tensor: moved})), what=tensor)
            del moved
            torch.cuda.empty_cache()


def far_apart(x):
    """The same numbers with a large stride between tokens.  [B, T, ...]"""
    last = x.shape[1] - 1
    stride = FAR // last // 16 * 16
    strides = (stride * x.shape[1], stride, *x.contiguous().stride()[2:])
    span = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    room = torch.empty(span, dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("name", systems.STRUCTURES)
def test_outputs_may_be_large(name):
    """More than 2^31 elements of output; inputs are the same sequence over and over."""
    latent = any(branch.storage for branch in systems.load(name).attend)
    spec = systems.small(name, group=16, kv=1, dims=(192, 128) if latent else (64, 128))
    one = calls.make(spec, T=32, dtype=torch.bfloat16, device="cuda")
    B = FAR // (32 * 16 * 128) + 1
    kinds = tensor_kinds(spec)
    many = {
        name: t if kinds[name] == "parameter" else t.expand(B, *t.shape[1:])
        for name, t in one.tensors.items()
        if kinds[name] != "sequence"
    }
    many |= {name: t.repeat(B) for name, t in one.tensors.items() if kinds[name] == "sequence"}
    expected, outcome = backends.cuda(one), backends.cuda(one.with_tensors(**many))
    for z in (0, B // 2, B - 1):
        assert torch.equal(outcome.o[z], expected.o[0])
        for level, chosen in expected.selection.items():
            assert torch.equal(outcome.selection[level][z], chosen[0])


@pytest.mark.parametrize("name", systems.STRUCTURES)
def test_captured_graphs_follow_new_lengths(name):
    """A replay reads tensors, lengths and offsets as they are then."""
    spec = systems.small(name)
    attn = hsgen.load_kernel(spec)
    call = calls.make(spec, B=2, T=16, S=96, dtype=torch.bfloat16, device="cuda", seed=1)
    lens = torch.tensor([96, 50], dtype=torch.int32, device="cuda")
    tensors = {n: t.clone() for n, t in call.tensors.items()}
    attn.warmup(**tensors, kv_lens=lens)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o = attn(**tensors, kv_lens=lens)
    for seed, new in ((2, [96, 50]), (3, [17, 96])):
        fresh = calls.make(spec, B=2, T=16, S=96, dtype=torch.bfloat16, device="cuda", seed=seed)
        for key, t in tensors.items():
            t.copy_(fresh.tensors[key])
        lens.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(o, attn(**tensors, kv_lens=lens))


@pytest.mark.parametrize("dim", [80, 96, 160, 192, 224])
@pytest.mark.parametrize("name", systems.STRUCTURES)
def test_chunks_of_a_head_are_right_without_pipelining(name, dim, seed):
    """Dots of two widths after each other; Triton 3.6 on Hopper let their operands share memory."""
    spec = systems.small(name, dims=(dim, dim))
    call = calls.make(spec, T=150, dtype=torch.float16, device="cuda", seed=seed)
    driver = backends.compiled(spec, torch.float16).driver
    config = {kernel: values | {"num_stages": 1} for kernel, values in driver.CONFIG.items()}
    check(call, backends.run(call, driver, config))
