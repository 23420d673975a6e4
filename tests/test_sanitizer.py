"""Each fault that the sanitizer knows is planted in a toy kernel; clean kernels raise no alarm."""

import contextlib
import itertools

import numpy as np
import pytest
import sanitizer
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from sanitizer import numerics

pytestmark = pytest.mark.skipif(
    not hasattr(triton.jit(lambda: None), "rewriter"), reason="needs TRITON_INTERPRET=1"
)


@triton.jit
def copy_rows(X, OUT, rows, width, x_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(X + row.to(tl.int64) * x_stride + columns, mask=mask, other=0.0)
    tl.store(OUT + row.to(tl.int64) * out_stride + columns, x, mask=mask)


@triton.jit
def copy_fours(X, OUT, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(X + columns, mask=columns // 4 * 4 < width, other=0.0)  # four at once
    tl.store(OUT + columns, x)


@triton.jit
def gather_rows(X, INDEX, OUT, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    source = tl.load(INDEX + row).to(tl.int64)
    x = tl.load(X + source * BLOCK + columns)
    tl.store(OUT + row * BLOCK + columns, x)


@triton.jit
def store_at(OUT, offset):
    tl.store(OUT + offset, 1.0)


@triton.jit
def store_one_row(OUT, BLOCK: tl.constexpr):
    tl.store(OUT + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32))


@triton.jit
def read_neighbour(X, n):
    row = tl.program_id(0)
    x = tl.load(X + (row + 1) % n)
    tl.store(X + row, x)


@triton.jit
def lanes_collide(OUT, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(OUT + lanes // 2, lanes.to(tl.float32))


@triton.jit
def lanes_agree(OUT, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(OUT + lanes // 2, (lanes // 2).to(tl.float32))


@triton.jit
def narrow_offset(X, OUT, stride):
    row = tl.program_id(0)
    tl.store(OUT + row, tl.load(X + row * stride))


@triton.jit
def wide_offset(X, OUT, stride):
    row = tl.program_id(0)
    tl.store(OUT + row, tl.load(X + row.to(tl.int64) * stride))


@triton.jit
def sum_integers(X, OUT):
    tl.store(OUT, tl.sum(tl.load(X + tl.arange(0, 16)), 0))


@triton.jit
def scan_integers(X, OUT):
    lanes = tl.arange(0, 16)
    tl.store(OUT + lanes, tl.cumsum(tl.load(X + lanes), 0))


@triton.jit
def sum_without_other(X, OUT, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(X + lanes, mask=lanes < n)
    tl.store(OUT, tl.sum(x.to(tl.float32), 0))


@triton.jit
def add_floats(OUT):
    tl.atomic_add(OUT, 1.0)


@triton.jit
def count_programs(OUT, ORDER):
    ticket = tl.atomic_add(OUT, 1)
    tl.store(ORDER + tl.program_id(0), ticket)


@triton.jit
def read_back(OUT, BARRIER: tl.constexpr):
    lanes = tl.arange(0, 16)
    tl.store(OUT + lanes, lanes)
    if BARRIER:
        tl.debug_barrier()
    tl.store(OUT + 16 + lanes, tl.load(OUT + 15 - lanes))


@triton.jit
def set_bits(WORDS, OUT, BARRIER: tl.constexpr):
    lanes = tl.arange(0, 16)
    tl.store(WORDS + lanes, tl.zeros([16], tl.int32))
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_or(WORDS + lanes // 4, 1 << (lanes % 4))
    if BARRIER:
        tl.debug_barrier()
    tl.store(OUT + lanes, tl.load(WORDS + lanes))


@triton.jit
def matmul(A, B, OUT, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + k[:, None] * N + n[None, :])
    product = tl.dot(a, b, input_precision=PRECISION)
    tl.store(OUT + m[:, None] * N + n[None, :], product)


@triton.jit
def bf16_arithmetic(X, Y, OUT, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x, y = tl.load(X + lanes), tl.load(Y + lanes)
    tl.store(OUT + lanes, x + y)
    tl.store(OUT + BLOCK + lanes, x * y)
    tl.store(OUT + 2 * BLOCK + lanes, x - y)
    tl.store(OUT + 3 * BLOCK + lanes, tl.where(x < y, x, y))
    tl.store(OUT + 4 * BLOCK + lanes, -x)
    tl.store(OUT + 5 * BLOCK + lanes, (lanes * 77).to(tl.bfloat16))


@triton.jit
def bf16_reductions(X, OUT, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    tl.store(OUT, tl.max(x, 0))
    tl.store(OUT + 1, tl.sum(x, 0))
    tl.store(OUT + 2, tl.min(x, 0))


@triton.jit
def cast(X, OUT, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(OUT + lanes, tl.load(X + lanes).to(OUT.dtype.element_ty))


@triton.jit
def double(x):
    return x * 2


@triton.jit
def call_helper(X, OUT):
    tl.store(OUT + tl.program_id(0), double(tl.load(X + tl.program_id(0) + 1)))


def run_fault(kind, kernel, grid, *args, **constants):
    """Launch under the sanitizer and return the fault, which must be of `kind`."""
    with pytest.raises(sanitizer.Fault) as caught, sanitizer.enabled(seed=1):
        kernel[grid](*args, **constants)
    assert caught.value.kind == kind
    assert caught.value.kernel == kernel.fn.__name__
    return caught.value


def run_clean(kernel, grid, *args, **constants):
    with sanitizer.enabled(seed=1):
        kernel[grid](*args, **constants)


# bounds


def test_clean_copy_raises_no_alarm():
    x, out = torch.randn(6, 24), torch.empty(6, 24)
    run_clean(copy_rows, (6,), x, out, 6, 24, 24, 24, BLOCK=32)
    assert torch.equal(x, out)


def test_index_minus_one_is_out_of_bounds():
    x, out = torch.randn(4, 16), torch.empty(3, 16)
    index = torch.tensor([0, -1, 2], dtype=torch.int32)
    fault = run_fault("out of bounds load", gather_rows, (3,), x, index, out, BLOCK=16)
    assert fault.program == (1, 0, 0)
    assert "x = tl.load(X + source * BLOCK + columns)" in fault.line
    assert "X (shape [4, 16], strides [16, 1]), the first at element -16" in str(fault)


def test_pointer_into_another_argument_is_out_of_bounds():
    both = torch.randn(8, 16)
    x, out = both[4:], both[:3]
    index = torch.tensor([-1, 0, 0], dtype=torch.int32)
    run_fault("out of bounds load", gather_rows, (3,), x, index, out, BLOCK=16)


def test_missing_tail_mask_is_out_of_bounds():
    x, out = torch.randn(2, 24), torch.empty(2, 24)
    run_fault("out of bounds load", copy_rows, (2,), x, out, 2, 32, 24, 24, BLOCK=32)


def test_gap_between_rows_of_a_view_is_out_of_bounds():
    x, out = torch.randn(4, 32)[:, :16], torch.empty(4, 32)
    run_fault("out of bounds load", copy_rows, (4,), x, out, 4, 32, 32, 32, BLOCK=32)


def test_out_of_bounds_store_is_reported_before_it_happens():
    out = torch.zeros(4)
    fault = run_fault("out of bounds store", store_at, (1,), out, 4)
    assert fault.line == "tl.store(OUT + offset, 1.0)"


def test_empty_tensor_has_no_element():
    run_fault("out of bounds store", store_at, (1,), torch.empty(0), 0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x[::2, :, 1:],
        lambda x: x.expand(3, 4, 8, 16),
        lambda x: x.as_strided((5, 3), (2, 1)),
        lambda x: x[:, 1],
        lambda x: x[..., :1],
    ],
)
def test_view_has_exactly_its_elements(view):
    x = view(torch.arange(4 * 8 * 16).reshape(4, 8, 16))
    described = sanitizer.memory.make_view("x", x)
    start = x.data_ptr()
    inside = {int(v) * 8 + x.untyped_storage().data_ptr() - start for v in x.flatten()}
    offsets = np.arange(-64, 8 * 8 * 16 * 4, 8)
    assert set(offsets[~sanitizer.memory.outside(described, offsets, 8)]) == inside


# races


def test_two_programs_storing_one_row_race():
    fault = run_fault("write-write race", store_one_row, (2,), torch.empty(16), BLOCK=16)
    assert "OUT" in str(fault)


def test_reading_what_another_program_writes_is_a_race():
    run_fault("read-write race", read_neighbour, (8,), torch.zeros(8), 8)


@pytest.mark.parametrize("order", range(4))
def test_races_are_found_in_any_order(order):
    with pytest.raises(sanitizer.Fault), sanitizer.enabled(seed=order):
        read_neighbour[(8,)](torch.zeros(8), 8)


def test_race_through_an_alias_is_found():
    x = torch.randn(4, 16)
    index = torch.tensor([1, 2, 3, 0], dtype=torch.int32)
    run_fault("read-write race", gather_rows, (4,), x, index, x, BLOCK=16)


def test_interleaved_views_do_not_race():
    both = torch.randn(4, 2, 16)
    run_clean(copy_rows, (4,), both[:, 0], both[:, 1], 4, 16, 32, 32, BLOCK=16)
    assert torch.equal(both[:, 0], both[:, 1])


def test_integer_atomics_are_exempt():
    count, order = torch.zeros(1, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    run_clean(count_programs, (8,), count, order)
    assert sorted(order.tolist()) == list(range(8)) and count.item() == 8


def test_float_atomic_is_a_determinism_fault():
    run_fault("float atomic", add_floats, (2,), torch.zeros(1))


def test_lanes_that_store_different_values_conflict():
    run_fault("conflicting stores", lanes_collide, (1,), torch.empty(8), BLOCK=16)


def test_lanes_that_store_one_value_do_not_conflict():
    run_clean(lanes_agree, (1,), torch.empty(8), BLOCK=16)


@pytest.mark.parametrize("kernel", [read_back, set_bits])
def test_missing_barrier_is_found(kernel):
    x, y = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    args = (x,) if kernel is read_back else (x, y)
    run_clean(kernel, (1,), *args, BARRIER=True)
    run_fault("missing barrier", kernel, (1,), *args, BARRIER=False)


# values


def test_int32_offset_overflow_is_found_and_int64_is_clean():
    x = torch.empty_strided((3, 1), (1 << 30, 1), dtype=torch.float16)  # 4 GB reserved, not touched
    x.fill_(3.0)
    fault = run_fault("int32 overflow", narrow_offset, (3,), x, torch.zeros(3), 1 << 30)
    assert "multiply gives 2147483648" in str(fault)
    out = torch.zeros(3)
    run_clean(wide_offset, (3,), x, out, 1 << 30)
    assert out.tolist() == [3.0] * 3


@pytest.mark.parametrize("kernel", [sum_integers, scan_integers])
def test_overflow_of_sums_is_found(kernel):
    out = torch.zeros(16, dtype=torch.int32)
    run_clean(kernel, (1,), torch.full((16,), 1 << 26, dtype=torch.int32), out)
    assert out.max() == 1 << 30
    run_fault("int32 overflow", kernel, (1,), torch.full((16,), 1 << 27, dtype=torch.int32), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_without_other_are_poison(dtype):
    x, out = torch.ones(12, dtype=dtype), torch.zeros(1)
    run_clean(sum_without_other, (1,), x, out, 12, BLOCK=16)
    assert torch.isnan(out).all()
    run_clean(sum_without_other, (1,), torch.ones(16, dtype=dtype), out, 16, BLOCK=16)
    assert out.item() == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.float16])
def test_reading_what_nobody_wrote_is_found(dtype):
    x, out = torch.empty(2, 16, dtype=dtype), torch.zeros(2, 16)
    run_fault("uninitialised read", copy_rows, (2,), x, out, 2, 16, 16, 16, BLOCK=16)


def test_neighbours_that_a_load_takes_along_are_poison():
    x, out = torch.empty(16), torch.zeros(16)
    x[:5] = 1
    run_clean(copy_fours, (1,), x, out, 5, BLOCK=16)
    assert torch.isnan(out).tolist() == [5 <= i < 8 for i in range(16)]
    run_fault("out of bounds load", copy_fours, (1,), x[:6], out, 5, BLOCK=16)


@pytest.mark.parametrize("fill", ["nan", "seven"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32, torch.bool])
def test_empty_tensors_hold_the_asked_poison(fill, dtype):
    with sanitizer.poisoned_empty(fill):
        made = torch.empty(3, dtype=dtype), torch.zeros(3, dtype=dtype).new_empty(3)
    for x in made:
        assert (x == 7 if fill == "seven" else x != 0).all() or dtype == torch.bool
        assert not (fill == "nan" and dtype.is_floating_point and x.isfinite().any())


# formats


def edge_values():
    special = [0.0, -0.0, 1.0, 1.9999, 448.0, 464.0, 1e9, 1e-9, 3e38, float("inf"), float("nan")]
    scales = torch.logspace(-8, 8, 4096 - len(special), base=10) * torch.randn(4096 - len(special))
    return torch.cat([torch.tensor(special), scales])


def test_bf16_arithmetic_equals_torch():
    x, y = torch.randn(2, 256).bfloat16()
    out = torch.empty(6, 256, dtype=torch.bfloat16)
    run_clean(bf16_arithmetic, (1,), x, y, out, BLOCK=256)
    ramp = (torch.arange(256) * 77).bfloat16()
    assert torch.equal(out, torch.stack([x + y, x * y, x - y, torch.minimum(x, y), -x, ramp]))


def test_bf16_reductions_equal_torch():
    x, out = torch.randn(64).bfloat16(), torch.empty(3, dtype=torch.bfloat16)
    run_clean(bf16_reductions, (1,), x, out, BLOCK=64)
    assert torch.equal(out, torch.stack([x.max(), x.float().sum().bfloat16(), x.min()]))


@pytest.mark.parametrize("source", [torch.float32, torch.float16])
def test_cast_to_bf16_equals_torch(source):
    x, out = edge_values().to(source), torch.empty(4096, dtype=torch.bfloat16)
    run_clean(cast, (1,), x, out, BLOCK=4096)
    assert torch.equal(out.float().nan_to_num(nan=-1), x.bfloat16().float().nan_to_num(nan=-1))
    back = torch.empty(4096, dtype=source)
    run_clean(cast, (1,), out, back, BLOCK=4096)
    assert torch.equal(back.nan_to_num(nan=-1), out.to(source).nan_to_num(nan=-1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_cast_to_fp8_rounds_to_nearest_even_and_saturates(dtype):
    x = edge_values()
    with sanitizer.enabled():
        out = torch.zeros(4096).to(dtype)
        cast[(1,)](x, out, BLOCK=4096)
    limit = torch.finfo(dtype).max
    expected = x.clamp(-limit, limit).to(dtype)
    assert torch.equal(out.float().nan_to_num(nan=-1), expected.float().nan_to_num(nan=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dot_of_short_formats_is_exact_in_fp32(dtype):
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    out = torch.empty(16, 16)
    run_clean(matmul, (1,), a, b, out, M=16, N=16, K=32, PRECISION="tf32")
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-5, rtol=1e-5)


def test_silent_tf32_loses_bits_and_three_passes_do_not():
    a, b = torch.randn(16, 32), torch.randn(32, 16)
    exact = a.double() @ b.double()
    errors = []
    for precision in ("tf32", "tf32x3"):
        out = torch.empty(16, 16)
        run_clean(matmul, (1,), a, b, out, M=16, N=16, K=32, PRECISION=precision)
        errors.append((out - exact).abs().max().item())
    assert errors[0] > 1e-4 and errors[1] < 1e-5


@pytest.mark.parametrize(("dtype", "k"), [(torch.float16, 8), (torch.float8_e4m3fn, 16)])
def test_dot_that_no_gpu_accepts_is_found(dtype, k):
    a, b = torch.ones(16, k).to(dtype), torch.ones(k, 16).to(dtype)
    sizes = {"M": 16, "N": 16, "K": k, "PRECISION": "tf32"}
    run_fault("dot shape", matmul, (1,), a, b, torch.zeros(16, 16), **sizes)


def test_encoding_to_bf16_equals_torch_on_every_half_way_case():
    bits = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] + np.array(
        [0, 0x7FFF, 0x8000, 0x8001]
    )
    values = bits.astype(np.uint32).reshape(-1).view(np.float32)
    ours = torch.from_numpy(numerics.encode(values, tl.bfloat16).view(np.int16)).view(
        torch.bfloat16
    )
    theirs = torch.from_numpy(values).bfloat16()
    assert torch.equal(ours.nan_to_num(nan=-1), theirs.nan_to_num(nan=-1))


# the machinery


def test_program_order_follows_the_seed():
    orders = []
    for seed in (None, 1, 1, 2):
        count, order = torch.zeros(1, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
        with sanitizer.enabled(seed=seed):
            count_programs[(16,)](count, order)
        orders.append(order.tolist())
    assert orders[0] == list(range(16))
    assert orders[1] == orders[2] and len({tuple(x) for x in orders}) == 3


def test_helpers_run_and_their_callers_are_named():
    x, out = torch.arange(8.0), torch.empty(8)
    with sanitizer.enabled() as session:
        call_helper[(7,)](x, out)
    assert out[:7].tolist() == [2.0 * i for i in range(1, 8)]
    assert session.launches == {"call_helper": 1}
    fault = run_fault("out of bounds load", call_helper, (8,), x, out)
    assert "call_helper" in str(fault)


def test_everything_is_restored_afterwards():
    def patched():
        return [{n: vars(owner).get(n) for n in table} for owner, table in sanitizer.PATCHES]

    before = patched()
    with pytest.raises(sanitizer.Fault), sanitizer.enabled():
        store_at[(1,)](torch.zeros(1), 5)
    assert patched() == before
    out = torch.zeros(1)
    store_at[(1,)](out, 0)
    assert out.item() == 1.0


def test_fixture_gives_a_session(sanitized):
    store_at[(1,)](torch.zeros(1), 0)
    assert sanitized.launches == {"store_at": 1}


def test_other_errors_of_a_kernel_pass_through():
    with pytest.raises(Exception, match="power of 2"), sanitizer.enabled():
        matmul[(1,)](torch.ones(4), torch.ones(4), torch.ones(4), M=16, N=3, K=16, PRECISION="ieee")


@triton.jit
def keep_later(value_a, tag_a, value_b, tag_b):
    return value_a * (tag_b == 0) + value_b, tag_a | tag_b


@triton.jit
def scan_and_reduce(VALUE, TAG, OUT, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value, tag = tl.load(VALUE + at), tl.load(TAG + at)
    scanned, _ = tl.associative_scan((value, tag), 1, keep_later)
    backwards, _ = tl.associative_scan((value, tag), 1, keep_later, reverse=True)
    reduced, _ = tl.reduce((value, tag), 1, keep_later)
    tl.store(OUT + at, scanned)
    tl.store(OUT + ROWS * BLOCK + at, backwards)
    tl.store(OUT + 2 * ROWS * BLOCK + tl.arange(0, ROWS), reduced)


def test_scans_and_reductions_equal_the_stock_interpreter():
    value = torch.randint(1, 9, (4, 16), dtype=torch.int32)
    tag = torch.randint(0, 2, (4, 16), dtype=torch.int32)
    ours, stock = torch.zeros(2, 2 * 64 + 4, dtype=torch.int32)
    scan_and_reduce[(1,)](value, tag, stock, ROWS=4, BLOCK=16)
    run_clean(scan_and_reduce, (1,), value, tag, ours, ROWS=4, BLOCK=16)
    assert torch.equal(ours, stock) and ours.unique().numel() > 8


SEMANTIC = interpreter.interpreter_semantic
OPERATIONS = {
    "add": lambda a, b: SEMANTIC.add(a, b, False),
    "sub": lambda a, b: SEMANTIC.sub(a, b, False),
    "mul": lambda a, b: SEMANTIC.mul(a, b, False),
    "truediv": SEMANTIC.truediv,
    "floordiv": SEMANTIC.floordiv,
    "mod": SEMANTIC.mod,
    "minimum": lambda a, b: SEMANTIC.minimum(a, b, tl.PropagateNan.NONE),
    "and": SEMANTIC.and_,
    "shl": SEMANTIC.shl,
    "less": SEMANTIC.less_than,
    "equal": SEMANTIC.equal,
    "where": lambda a, b: SEMANTIC.where(SEMANTIC.to_tensor(True), a, b),
    "where of a row": lambda a, b: SEMANTIC.where(
        SEMANTIC.equal(SEMANTIC.arange(0, 4), 1), *map(SEMANTIC.to_tensor, (a, b))
    ),
    "broadcast": lambda a, b: SEMANTIC.broadcast_impl_value(*map(SEMANTIC.to_tensor, (a, b)))[1],
}


def operands():
    """Numbers of every kind, and tensors of every dtype and shape; also pointers."""
    yield from (0, 3, -2, 300, 1 << 31, 1 << 40, True, -0.0, 2.5, 1e300, tl.constexpr(3))
    for dtype in (tl.int1, tl.uint8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.float32):
        for shape in ((), (4,), (2, 4, 1), (8,)):
            data = (np.arange(max(1, np.prod(shape, dtype=int))) % 3 + 1).reshape(shape or (1,))
            yield tensor(data.astype(interpreter._get_np_dtype(dtype)), dtype, shape)
    for element in (tl.float32, tl.int8):
        for shape in ((), (4,)):
            data = np.full(shape or (1,), 64, np.uint64)
            yield tensor(data, tl.pointer_type(element), shape)


def tensor(data, dtype, shape):
    kind = tl.block_type(dtype, list(shape)) if shape else dtype
    return tl.core.tensor(interpreter.TensorHandle(data, dtype), kind)


@contextlib.contextmanager
def as_in_a_kernel():
    """triton.language as a launch has it."""
    scope = interpreter._patch_lang(copy_rows.fn)
    try:
        yield
    finally:
        scope.restore()


def outcome(operation, *pair):
    """What an operation gives: type, shape and bits, or its error."""
    try:
        result = operation(*pair)
    except Exception as error:  # noqa: BLE001  whatever it is, it must be the same
        return type(error), str(error)
    data = np.ascontiguousarray(result.handle.data)
    sizes = [size.value for size in result.shape]
    return str(result.type), sizes, data.dtype, data.shape, data.tobytes()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_the_stock_interpreter_whatever_was_asked_before(name):
    """Every pair of operands, asked for the first time and remembered."""
    pairs = list(itertools.product(operands(), repeat=2))
    with np.errstate(all="ignore"), as_in_a_kernel():
        stock = [outcome(OPERATIONS[name], *pair) for pair in pairs]
    with sanitizer.enabled(), as_in_a_kernel():
        for _ in range(2):
            for pair, expected in zip(pairs, stock, strict=True):
                assert outcome(OPERATIONS[name], *pair) == expected, pair
    assert len({str(x) for x in stock}) > 40
