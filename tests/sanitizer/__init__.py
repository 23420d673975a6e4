"""A sanitizer for kernels that run in Triton's interpreter.

    with sanitizer.enabled(seed=7):
        kernel[grid](...)          # raises sanitizer.Fault at the first violation

It finds accesses outside a tensor argument, races between programs, missing barriers inside one,
conflicting stores, int32 overflow, float atomics, reads of memory that nobody wrote, and dots that
no GPU accepts.  Lanes loaded under a mask without `other` hold poison, programs run in an order
drawn from the seed, and bf16, fp8 and TF32 round as on a GPU.

It does not model shared memory, warps or alignment.
"""

import contextlib
import inspect
import linecache
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.backends.nvidia.compiler import min_dot_size

from . import fast, memory, numerics
from .poison import is_poison, poison_masked_lanes, poisoned_empty

__all__ = ["Fault", "Session", "enabled", "poisoned_empty"]

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
HERE = str(Path(__file__).parent)
INTERPRETER_FILE = interpreter.__file__
TRITON_ROOT = str(Path(triton.__file__).parent)
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
OVERFLOWING = (np.add, np.subtract, np.multiply)
INT32 = np.iinfo(np.int32)
FOUR_AT_ONCE = "# four at once"  # a load that says so reads neighbours of what it asks for


class Fault(AssertionError):
    """A kernel broke a rule.

    Attributes:
        kind: which rule, e.g. "out of bounds load".
        kernel: name of the launched kernel.
        program: grid index of the program.
        line: source line of the kernel, "" where it cannot be had.
    """

    def __init__(self, *, kind, kernel, program, detail, location, line):
        """Format the report."""
        self.kind, self.kernel, self.program, self.line = kind, kernel, program, line
        where = f"\n  {location}\n    {line}" if location else ""
        super().__init__(f"{kind}: kernel {kernel}, program {program}: {detail}{where}")


@dataclass(slots=True, eq=False)
class Session:
    """What one `enabled` block knows.  `launches` counts kernel launches, by name."""

    seed: int | None
    launches: dict[str, int] = field(default_factory=dict)
    kernel: str = ""
    program: tuple[int, int, int] | None = None
    names: list[str] = field(default_factory=list)
    views: list[memory.View] = field(default_factory=list)
    order: np.ndarray | None = None
    position: int = 0
    tick: int = 0
    first: int = 0
    zero_filled: bool = False

    def fault(self, kind, detail):
        """Raise a Fault for the operation under way."""
        location, line = _kernel_line()
        raise Fault(
            kind=kind,
            kernel=self.kernel,
            program=self.program,
            detail=detail,
            location=location,
            line=line,
        )


_active: Session | None = None


@contextlib.contextmanager
def enabled(seed: int | None = 0):
    """Check every launch inside the block.

    Args:
        seed: Order of the programs; None keeps the grid's order.
    """
    global _active
    if _active is not None:
        raise RuntimeError("the sanitizer is enabled already")
    _check_environment()
    _active = Session(seed=seed)
    try:
        with _patched():
            yield _active
    finally:
        _active = None


def _check_environment():
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    old_triton = tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7)
    if old_triton and tuple(int(x) for x in np.__version__.split(".")[:2]) >= (2, 4):
        raise RuntimeError(f"the interpreter of Triton {triton.__version__} needs numpy < 2.4")


@contextlib.contextmanager
def _patched():
    """Put our methods in place of the interpreter's; the old ones come back however we leave."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fast.checked())
        for owner, table in (*fast.PATCHES, *PATCHES):
            for name, value in table.items():
                stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(np.errstate(all="ignore"))
        yield


@contextlib.contextmanager
def _replaced(owner, name, value):
    missing = object()
    old = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if old is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


# launches


def _launch(executor, *args, **kwargs):
    session = _active
    session.kernel = executor.fn.__name__
    session.launches[session.kernel] = session.launches.get(session.kernel, 0) + 1
    session.names = _tensor_names(executor, args, kwargs)
    session.views, session.program, session.tick = [], None, memory.MANY
    try:
        return fast.launch(executor, *args, **kwargs)
    except interpreter.InterpreterError as error:
        fault = _find_fault(error)
        if fault is None:
            raise
        raise fault from None
    finally:
        session.views, session.program = [], None


def _find_fault(error):
    while error is not None and not isinstance(error, Fault):
        error = error.__cause__
    return error


def _tensor_names(executor, args, kwargs):
    known = inspect.signature(executor.fn).parameters
    call = inspect.getcallargs(
        executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known}
    )
    names = []

    def visit(name, value):
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                visit(f"{name}[{i}]", item)
        elif hasattr(value, "data_ptr"):
            names.append(name)
        elif hasattr(value, "base"):  # a tensor descriptor
            visit(f"{name}.base", value.base)

    for name, value in call.items():
        if name not in executor.constexprs:
            visit(name, value)
    return names


def _convert_argument(arg):
    converted = _original_convert(arg)
    if hasattr(arg, "data_ptr"):
        session = _active
        number = len(session.views)
        name = session.names[number] if number < len(session.names) else f"tensor {number}"
        session.views.append(memory.make_view(name, arg))
        tag = np.uint64(number + 1) << np.uint64(memory.TAG_SHIFT)
        converted.handle.data = converted.handle.data | tag
    return converted


def _on_host(args, kwargs):
    values = [*args, *kwargs.values()]
    return all(
        isinstance(v, torch.Tensor) and v.is_cpu or not hasattr(v, "data_ptr") for v in values
    )


def _arguments_to_host(self, args, kwargs):
    simple = not any(isinstance(v, tuple) for v in [*args, *kwargs.values()])
    if simple and _on_host(args, kwargs):
        return list(args), kwargs
    return _original_to_host(self, args, kwargs)


def _arguments_to_device(self, args, host_args, kwargs, host_kwargs):
    # What lies in host memory was changed in place; copying it onto itself would touch all of it.
    if host_kwargs is not kwargs:
        _original_to_device(self, args, host_args, kwargs, host_kwargs)


def _set_grid_dim(self, nx, ny, nz):
    session = _active
    session.order = np.arange(nx * ny * nz)
    if session.seed is not None:
        launch = sum(session.launches.values())
        np.random.default_rng((session.seed, launch)).shuffle(session.order)
    session.position = 0
    memory.assign_regions(session.views)
    _original_set_grid_dim(self, nx, ny, nz)


def _set_grid_idx(self, x, y, z):
    session = _active
    _, ny, nz = self.grid_dim
    number = int(session.order[session.position])
    session.position += 1
    session.program = (number // (ny * nz), number // nz % ny, number % nz)
    session.tick += 1
    session.first = session.tick
    _original_set_grid_idx(self, *session.program)


def _barrier(self):
    _active.tick += 1


# memory


def _load(self, ptrs, mask, other, *rest, **named):
    session = _active
    dtype = ptrs.get_element_ty()
    active = _spread(_as_mask(mask.data), ptrs.data)
    lanes = np.count_nonzero(active)
    _access(ptrs, active, lanes, _itemsize(dtype), "load")
    loaded = _original_load(self, _untagged(ptrs), mask, other, *rest, **named)
    if lanes:
        found = is_poison(loaded.data, active)
        # one that reads neighbours of what it asks for keeps the poison: what comes of it is wrong
        if found and FOUR_AT_ONCE not in _kernel_line()[1]:
            session.fault("uninitialised read", f"{found} lanes hold what torch.empty left there")
    if other is None and not session.zero_filled and lanes < active.size:
        loaded = Handle(poison_masked_lanes(loaded.data, active, dtype), loaded.dtype)
    return loaded


def _store(self, ptrs, value, mask, *rest, **named):
    active = _spread(_as_mask(mask.data), ptrs.data)
    lanes = np.count_nonzero(active)
    _access(ptrs, active, lanes, _itemsize(ptrs.get_element_ty()), "store")
    if not lanes:
        return None
    raw = _untagged(ptrs)
    result = _original_store(self, raw, value, mask, *rest, **named)
    data = _spread(value.data, raw.data)
    if data.size > 1:
        flags = np.ascontiguousarray(active)
        back = interpreter._interpreter.load(raw.data, flags, np.zeros_like(data), data.dtype)
        bits = f"u{data.dtype.itemsize}"
        differ = np.ascontiguousarray(data).view(bits) != back.view(bits)
        lanes = np.count_nonzero(differ & active)
        if lanes:
            detail = f"{lanes} lanes store another value to an address than a later lane does"
            _active.fault("conflicting stores", detail)
    return result


def _atomic_rmw(self, op, ptr, value, mask, *rest, **named):
    active = np.broadcast_to(np.asarray(mask.data), ptr.data.shape)
    if op == interpreter._ir.ATOMIC_OP.FADD:
        _active.fault("float atomic", "the sum depends on the order of the programs")
    _access(ptr, active, np.count_nonzero(active), _itemsize(value.dtype.scalar), "atomic")
    return _original_rmw(self, op, _untagged(ptr), value, mask, *rest, **named)


def _atomic_cas(self, ptr, *rest, **named):
    lanes, size = ptr.data.size, _itemsize(ptr.get_element_ty())
    _access(ptr, np.ones(ptr.data.shape, bool), lanes, size, "atomic")
    return _original_cas(self, _untagged(ptr), *rest, **named)


def _as_mask(data):
    """A mask as bools: the interpreter widens some to numbers."""
    return data if data.dtype == bool else data != 0


def _spread(data, other):
    """Broadcast to the shape of another array."""
    data = np.asarray(data)
    return data if data.shape == other.shape else np.broadcast_to(data, other.shape)


def _itemsize(dtype):
    return interpreter._get_np_dtype(dtype).itemsize


def _untagged(ptrs):
    return Handle(ptrs.data & memory.ADDRESS_MASK, ptrs.dtype)


def _access(ptrs, active, lanes, size, what):
    """Check and note one operation, in which so many lanes take part."""
    if not lanes:
        return
    pointers = ptrs.data.reshape(-1) if lanes == active.size else ptrs.data[active]
    first = int(pointers[0]) >> memory.TAG_SHIFT
    if 1 <= first <= len(_active.views):
        view = _active.views[first - 1]
        offsets = memory.offsets_inside(view, pointers, first, size)
        if offsets is not None:
            _note(view, offsets, size, what)
            return
    tags = pointers >> np.uint64(memory.TAG_SHIFT)
    addresses = (pointers & memory.ADDRESS_MASK).astype(np.int64)
    for tag in np.unique(tags):
        _access_view(int(tag), addresses[tags == tag], size, what)


def _access_view(tag, addresses, size, what):
    session = _active
    if not 1 <= tag <= len(session.views):
        session.fault(
            f"out of bounds {what}", f"{addresses.size} lanes point at no tensor argument"
        )
    view = session.views[tag - 1]
    offsets = addresses - view.start
    wrong = memory.outside(view, offsets, size)
    if wrong.any():
        element = int(offsets[np.argmax(wrong)]) // view.itemsize
        detail = (
            f"{int(wrong.sum())} lanes outside {view.describe()}, the first at element {element}"
        )
        session.fault(f"out of bounds {what}", detail)
    _note(view, offsets, size, what)


def _note(view, offsets, size, what):
    """Hold an operation inside of a view against those before it."""
    session, region = _active, view.region
    index = region.locate(offsets + (view.start - region.start), size)
    action = {"load": region.load, "store": region.store, "atomic": region.update}[what]
    for problem in action(index, session.first, session.tick):
        text = f"{what} of {view.describe()}, {problem.lanes} lanes: {problem.detail}"
        session.fault(problem.kind, text)


def _descriptor_load(self, *args, **kwargs):
    # A descriptor fills with zeros by itself; older versions say so by passing no `other`.
    session = _active
    session.zero_filled = True
    try:
        return _original_descriptor_load(self, *args, **kwargs)
    finally:
        session.zero_filled = False


# arithmetic


def _binary(self, lhs, rhs, op):
    dtype = lhs.dtype.scalar
    if numerics.is_emulated(dtype) and lhs.data.dtype != np.bool_ and op not in BITWISE:
        out = op(numerics.decode(lhs.data, dtype), numerics.decode(rhs.data, rhs.dtype.scalar))
        if out.dtype == np.bool_:
            return Handle(out, tl.int1)
        return Handle(numerics.encode(out, dtype), dtype)
    if op in OVERFLOWING and lhs.data.dtype == rhs.data.dtype == np.int32:
        exact = op(lhs.data, rhs.data, dtype=np.int64)
        kept = exact.astype(np.int32)
        if np.count_nonzero(exact != kept):
            _check_int32(op.__name__, exact)
        return Handle(kept, dtype)
    return _original_binary(self, lhs, rhs, op)


def _unary(self, arg, op):
    dtype = arg.dtype.scalar
    if not numerics.is_emulated(dtype):
        return _original_unary(self, arg, op)
    return Handle(numerics.encode(op(numerics.decode(arg.data, dtype)), dtype), dtype)


def _ternary(self, lhs, rhs, other, op):
    dtype = other.dtype.scalar
    if op is np.where or not numerics.is_emulated(dtype):
        return _original_ternary(self, lhs, rhs, other, op)
    values = (numerics.decode(x.data, dtype) for x in (lhs, rhs, other))
    return Handle(numerics.encode(op(*values), dtype), dtype)


def _clamp(self, arg, low, high, propagate_nans):
    if propagate_nans == interpreter._ir.PROPAGATE_NAN.NONE:
        return self.binary_op(self.binary_op(arg, low, np.fmax), high, np.fmin)
    return self.ternary_op(arg, low, high, np.clip)


def _fma(self, x, y, z):
    dtype = z.dtype.scalar
    if not numerics.is_emulated(dtype):
        return _original_fma(self, x, y, z)
    a, b, c = (numerics.decode(v.data, dtype) for v in (x, y, z))
    return Handle(numerics.encode(a * b + c, dtype), dtype)


def _cast(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    # Comparisons leave a truth value in a handle of the operands' type.
    emulated = numerics.is_emulated(source) and src.data.dtype != np.bool_
    if source == target or not (emulated or numerics.is_emulated(target)):
        return _original_cast(self, src, dst_type)
    values = numerics.decode(src.data, source) if emulated else src.data
    if numerics.is_emulated(target):
        return Handle(numerics.encode(values, target), target)
    return Handle(values.astype(interpreter._get_np_dtype(target)), target)


def _fp_to_fp(self, src, dst_type, rounding_mode):
    types = (src.dtype.scalar, dst_type.scalar)
    if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ or tl.float8e4b15 in types:
        return _original_fp_to_fp(self, src, dst_type, rounding_mode)
    return self.cast_impl(src, dst_type)


def _bf16(self, value):
    return Handle(numerics.encode([value], tl.bfloat16), tl.bfloat16)


def _dot(self, a, b, d, input_precision, *rest, **named):
    types = (a.dtype.scalar, b.dtype.scalar)
    (m, k), n = a.data.shape[-2:], b.data.shape[-1]
    least = min_dot_size(None)(*types)
    if m < least[0] or n < least[1] or k < least[2]:
        detail = f"M={m}, N={n}, K={k} of {types[0]}; the least is {least}"
        _active.fault("dot shape", detail)
    x, y = (numerics.decode(v.data, t) for v, t in zip((a, b), types, strict=True))
    if types[0] == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        x, y = numerics.round_tf32(x), numerics.round_tf32(y)
    accumulator = d.dtype.scalar
    if numerics.is_emulated(accumulator):
        total = np.matmul(x, y, dtype=np.float32) + numerics.decode(d.data, accumulator)
        return Handle(numerics.encode(total, accumulator), accumulator)
    return Handle(np.matmul(x, y, dtype=d.data.dtype) + d.data, accumulator)


def _sum(self, tensor):
    data, dtype = tensor.handle.data, tensor.dtype
    if data.dtype != np.int32 or dtype != tl.int32:
        return _original_sum(self, tensor)
    exact = np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=np.int64)
    _check_int32("sum", exact)
    return self.to_tensor(exact, dtype)


def _cumsum(self, tensor):
    data, dtype = tensor.handle.data, tensor.dtype
    if data.dtype != np.int32 or dtype != tl.int32:
        return _original_cumsum(self, tensor)
    exact = np.cumsum(data, axis=self.axis, dtype=np.int64)
    _check_int32("cumsum", exact)
    return [self.to_tensor(exact, dtype)]


def _check_int32(name, exact):
    if exact.size and (exact.min() < INT32.min or exact.max() > INT32.max):
        worst = exact.reshape(-1)[np.argmax(np.abs(exact))]
        _active.fault("int32 overflow", f"{name} gives {int(worst)}")


def _reduce(self, tensors):
    """Reductions and scans of bf16 run in fp32 and round once."""
    if not isinstance(tensors, tuple) or all(t.dtype != tl.bfloat16 for t in tensors):
        return _original_reduce(self, tensors)
    wide = tuple(_widened(t) if t.dtype == tl.bfloat16 else t for t in tensors)
    results = _original_reduce(self, wide)
    return tuple(
        _narrowed(self, out) if t.dtype == tl.bfloat16 and out.dtype == tl.float32 else out
        for t, out in zip(tensors, results, strict=False)
    )


def _widened(tensor):
    data = numerics.decode(tensor.handle.data, tl.bfloat16)
    kind = tl.block_type(tl.float32, list(tensor.shape)) if tensor.type.is_block() else tl.float32
    return tl.core.tensor(Handle(data, tl.float32), kind)


def _narrowed(self, tensor):
    data = numerics.encode(tensor.handle.data, tl.bfloat16)
    return self.to_tensor(data if tensor.type.is_block() else data[0], tl.bfloat16)


# reports


def _kernel_line():
    """The innermost line of the kernel that is running: ("file:line in function", source)."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        inside = code.co_filename.startswith((TRITON_ROOT, HERE))
        if not inside and Path(code.co_filename).exists():
            line = linecache.getline(code.co_filename, frame.f_lineno).strip()
            name = Path(code.co_filename).name
            return f"{name}:{frame.f_lineno} in {code.co_name}", line
        if code.co_filename == INTERPRETER_FILE and code is _original_launch.__code__:
            break
        frame = frame.f_back
    return "", ""


_original_launch = fast.original_launch
_original_convert = interpreter._implicit_cvt
_original_to_host = interpreter.GridExecutor._init_args_hst
_original_to_device = interpreter.GridExecutor._restore_args_dev
_original_set_grid_dim = Builder.set_grid_dim
_original_set_grid_idx = Builder.set_grid_idx
_original_load = Builder.create_masked_load
_original_store = Builder.create_masked_store
_original_rmw = Builder.create_atomic_rmw
_original_cas = Builder.create_atomic_cas
_original_descriptor_load = Builder.create_descriptor_load
_original_binary = Builder.binary_op
_original_unary = Builder.unary_op
_original_ternary = Builder.ternary_op
_original_fma = Builder.create_fma
_original_cast = Builder.cast_impl
_original_fp_to_fp = Builder.create_fp_to_fp
_original_sum = interpreter.ReduceOps.sum
_original_cumsum = interpreter.ScanOps.cumsum
_original_reduce = interpreter.ReduceScanOpInterface.apply

PATCHES = (
    (interpreter, {"_implicit_cvt": _convert_argument}),
    (interpreter.ReduceScanOpInterface, {"apply": _reduce}),
    (interpreter.ReduceOps, {"sum": _sum}),
    (interpreter.ScanOps, {"cumsum": _cumsum}),
    (
        interpreter.GridExecutor,
        {
            "__call__": _launch,
            "_init_args_hst": _arguments_to_host,
            "_restore_args_dev": _arguments_to_device,
        },
    ),
    (
        Builder,
        {
            "set_grid_dim": _set_grid_dim,
            "set_grid_idx": _set_grid_idx,
            "create_barrier": _barrier,
            "create_masked_load": _load,
            "create_masked_store": _store,
            "create_atomic_rmw": _atomic_rmw,
            "create_atomic_cas": _atomic_cas,
            "create_descriptor_load": _descriptor_load,
            "binary_op": _binary,
            "unary_op": _unary,
            "ternary_op": _ternary,
            "create_clampf": _clamp,
            # On a GPU these return the operand that is a number.
            "create_minnumf": lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin),
            "create_maxnumf": lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax),
            "create_fma": _fma,
            "cast_impl": _cast,
            "create_fp_to_fp": _fp_to_fp,
            "create_dot": _dot,
            "get_bf16": _bf16,
        },
    ),
)
