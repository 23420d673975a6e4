"""Vectors kept in fewer bits, by kernels in Triton's interpreter: the reference's numbers, bit by bit."""

import math

import pytest
import torch
from emitted import graph, sources, tensors

from hsgen import build, schedule, trials
from hsgen.errors import PlanError
from hsgen.reference import reference
from hsgen.reference.rounding import stored
from hsgen.spec import parse
from hsgen.target import H100

SPEC = """\
hsgen: 1
name: stored
heads: {query: 4, kv: 2}
head_dim: 16
causal: true
index: {heads: 3, dim: 48, dtype: DTYPE, keys: shared}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 8}
attend:
  - {name: selected, over: token}
"""
DTYPES = ("bf16", "fp8", "fp8_unscaled")
EVERY_BF16 = (
    torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
)


def of(dtype):
    return parse(SPEC.replace("DTYPE", dtype))


def rounded(dtype, x):
    """x [B, T, 3, 48] as the kernel keeps it, in its own dtype."""
    plan = schedule.schedule(graph(of(dtype)), H100)
    module = build.load(build.build("stored", sources(plan), {"test": dtype}))
    made = torch.full(x.shape, math.nan, dtype=x.dtype)
    B, T, H, _ = x.shape
    vectors, block = B * T * H, 512
    kernel = module.round_q_index.round_q_index
    strides = x.stride()[:3]
    kernel[(-(-vectors // block), 1)](x, *strides, made, T, vectors, BLOCK_V=block)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bf16_number(dtype):
    numbers = EVERY_BF16[EVERY_BF16.isfinite()].float()
    spread = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))]
    size = 3 * 48
    # vectors of numbers of all sizes, and of neighbours, whose scale is just theirs
    for x in (spread, numbers):
        x = torch.nn.functional.pad(x, (0, -len(x) % size)).view(1, -1, 3, 48)
        assert torch.equal(rounded(dtype, x), stored(x, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_of_every_dtype(dtype, number):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1e-6, 3e-5, 1.0, 448.0, 3e4])[:, None, None]
    x = (torch.randn(2, 5, 3, 48, generator=generator) * scale).clamp(-65504, 65504).to(number)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)  # strides that are no order of dimensions
    kept = rounded(dtype, x)
    greatest = torch.finfo(number).max  # where rounding goes beyond it, as pooled entries
    expected = stored(x.double(), dtype).clamp(-greatest, greatest)
    assert torch.equal(kept.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_between(dtype):
    """Ties go to the even one, what is too great becomes the greatest, no number stays none."""
    x = torch.zeros(1, 1, 3, 48)
    x[0, 0, 0, :8] = torch.tensor([1.0625, 1.1875, -1.0625, 447.0, 448.0, 460.0, 464.0, 500.0])
    x[0, 0, 1, :6] = torch.tensor([2.0**-9, 2.0**-10, 3 * 2.0**-10, -(2.0**-10), 2.0**-6, 2.0**-7])
    x[0, 0, 2, :2] = torch.tensor([math.nan, 1.0])
    kept, expected = rounded(dtype, x), stored(x, dtype)
    assert torch.equal(kept[0, 0, :2], expected[0, 0, :2])
    assert kept[0, 0, 2, 0].isnan()


@pytest.mark.parametrize("dtype", ["fp8", "fp8_unscaled"])
@pytest.mark.usefixtures("sanitized")
def test_choices_are_of_the_kept_numbers(dtype):
    trial = trials.trials(of(dtype))[3]  # with a prefix
    assert trial.numbers == "real"
    assert trials.judge(trial, H100) == []


def test_choices_of_all_bits_are_others():
    """So that the test above would see kernels that round nothing."""
    kept, given = (reference(of(dtype), tensors(of("fp8"), 64)) for dtype in ("fp8", "input"))
    assert not torch.equal(*(x.selection["token"].indices for x in (kept, given)))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_whole_numbers_are_refused(dtype):
    with pytest.raises(PlanError, match=f"no kernel scores vectors kept in {dtype} yet"):
        schedule.schedule(graph(of(dtype)), H100)


def test_pooled_keys_with_scales_are_refused():
    chunks = "partition: {blocks: 4}\n    pool: {keys: mean}"
    spec = parse(SPEC.replace("DTYPE", "fp8").replace("partition: tokens", chunks))
    with pytest.raises(
        PlanError, match="no kernel rounds pooled keys to fp8, with a scale for each"
    ):
        schedule.schedule(graph(spec), H100)
