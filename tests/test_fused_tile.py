"""The experiment of `benchmarks/fused_tile.py`, in the interpreter: what it chooses, and what it puts out."""

import pytest
import torch
import triton
import triton.language as tl

import hsgen
from benchmarks import fused_tile
from hsgen.reference import tensor_shapes
from hsgen.spec import parse, verify

SPEC = """
hsgen: 1
name: small_nsa
heads: {query: 4, kv: 1}
head_dim: {qk: 48, v: 32}
causal: true
levels:
  - name: compressed
    partition: {blocks: 8, stride: 4}
    kv: compressed
    pool: {keys: linear, values: linear, position: learned}
    score: {form: dot, normalise: softmax, share: group, reduce: sum}
  - name: block
    partition: {blocks: 16}
    score: {from: compressed, map: overlap_sum}
    select: {top_k: 4, force: {first: 1, last: 2}}
attend:
  - {name: compressed, over: compressed, values: pooled}
  - {name: selected, over: block}
  - {name: window, window: 24, kv: window}
combine: {gates: input}
"""


@triton.jit
def take(KEYS, TAKEN, WANTED: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(TAKEN + at, fused_tile.taken_keys(tl.load(KEYS + at), WANTED))


@pytest.mark.parametrize("highest", [3, 2**31 - 2])
def test_the_best_are_taken_the_lower_ones_of_those_that_are_alike(highest):
    """Some rows are forced in part, some have few candidates, one none."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-highest, highest, (8, 64), generator=generator, dtype=torch.int32)
    keys[1, ::16] = 0x7FFFFFFF
    for row, candidates in enumerate((64, 64, 0, 1, 4, 5, 40, 33)):
        keys[row, candidates:] = -0x80000000
    taken = torch.empty_like(keys)
    take[(1,)](keys, taken, 5, *keys.shape)
    for row, flags in zip(keys.tolist(), taken.tolist(), strict=True):
        candidates = [e for e, key in enumerate(row) if key > -0x80000000]
        best = sorted(candidates, key=lambda e, row=row: (-row[e], e))[:5]
        assert [e for e, flag in enumerate(flags) if flag] == sorted(best)


def test_one_program_gives_what_the_launches_give():
    """Several tiles a program; the last one has rows beyond the end."""
    spec, tokens = verify(parse(SPEC)), 78
    generator = torch.Generator().manual_seed(0)
    x = {
        name: torch.randn(shape, generator=generator)
        for name, shape in tensor_shapes(spec, 1, tokens, tokens).items()
    }
    kernel = hsgen.load_kernel(spec, interpret=True)
    o, lse = kernel(**x, return_lse=True)
    chosen = kernel.select(**x)["block"].indices
    tile = fused_tile.Tile(tokens=4, compressed=16, keys=16, warps=4, stages=1, programs=1)
    call = fused_tile.prepare(kernel, x, tile, processors=7)
    assert call.programs < call.items
    call()
    found = fused_tile.differences(call, o, lse, chosen)
    assert found["chosen_by_both"] > 0.99
    assert found["error_of_same"] < 1e-5
    assert found["error"] < 1e-2
    assert found["lse"] < 1e-5
