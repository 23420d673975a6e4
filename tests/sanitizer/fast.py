"""Shortcuts that leave every result as it is: the interpreter spends its time on types, not on numbers.

Descriptions of equal tensors are made once; integers are sorted by numpy; combine functions of
reductions and scans see whole arrays, in a tree in the order of the elements.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_types: dict[tuple, dict] = {}
_tensors: dict[tuple, dict] = {}
_numpy: dict[str, np.dtype] = {}

original_block_type = tl.core.block_type.__init__
original_tensor = tl.core.tensor.__init__
original_numpy_type = interpreter._get_np_dtype


def block_type(self, element_ty, shape):
    """As block_type.__init__; equal types share their fields."""
    key = (_name(element_ty), *(getattr(n, "value", n) for n in shape))
    if key not in _types:
        original_block_type(self, element_ty, shape)
        _types[key] = dict(vars(self))
    vars(self).update(_types[key], element_ty=element_ty)


def tensor(self, handle, type):  # noqa: A002  the interpreter passes it by this name
    """As tensor.__init__; tensors of equal type share shape and dtype."""
    if not isinstance(type, tl.dtype):
        original_tensor(self, handle, type)
        return
    shape = type.shape.values if type.is_block() else ()
    key = (_name(type.scalar), *shape)
    if key not in _tensors:
        original_tensor(self, handle, type)
        _tensors[key] = dict(vars(self), handle=None)
    vars(self).update(_tensors[key], handle=handle, type=type, dtype=type.scalar)


def numpy_type(dtype):
    """As _get_np_dtype, which builds a table of all types each time."""
    scalar = dtype.scalar if isinstance(dtype, tl.block_type) else dtype
    if scalar.name not in _numpy:
        _numpy[scalar.name] = original_numpy_type(dtype)
    return _numpy[scalar.name]


def _name(dtype):
    return dtype.name, getattr(dtype, "address_space", 0)


def sorted_integers(call, args, kwargs):
    """tl.sort of integers along the last axis, or None where `call` is something else."""
    if call.fn is not tl.standard.sort.fn or not args[0].dtype.is_int():
        return None
    options = dict(zip(("dim", "descending"), args[1:], strict=False)) | kwargs
    dim, descending = (
        getattr(options.get(n), "value", options.get(n)) for n in ("dim", "descending")
    )
    rank = len(args[0].shape)
    if rank == 0 or dim not in (None, -1, rank - 1):
        return None
    data = np.sort(args[0].handle.data, axis=-1)
    data = np.ascontiguousarray(data[..., ::-1]) if descending else data
    return tl.core.tensor(interpreter.TensorHandle(data, args[0].dtype), args[0].type)


def tree_reduce(self, inputs):
    """As ReduceOps.generic_reduce."""
    whole = self.axis is None
    dtypes = [x.dtype for x in inputs]
    rank = len(inputs[0].handle.data.shape)
    data = [x.handle.data.reshape(-1) if whole else x.handle.data for x in inputs]
    axis = 0 if whole else self.axis
    while data[0].shape[axis] > 1:
        places = np.arange(data[0].shape[axis])
        even = [np.take(x, places[0::2], axis) for x in data]
        odd = [np.take(x, places[1::2], axis) for x in data]
        data = _combine(self, even, odd, dtypes)
    if self.keep_dims:
        data = [x.reshape([1] * rank) if whole else x for x in data]
    else:
        data = [np.take(x, 0, axis) for x in data]
    return [
        self.to_tensor(x if x.shape else x.item(), dtype)
        for x, dtype in zip(data, dtypes, strict=True)
    ]


def tree_scan(self, inputs):
    """As ScanOps.generic_scan."""
    dtypes = [x.dtype for x in inputs]
    data = [np.array(x.handle.data) for x in inputs]
    axis, count = self.axis, data[0].shape[self.axis]
    place = np.arange(count).reshape([-1 if i == axis else 1 for i in range(data[0].ndim)])
    step = 1
    while step < count:
        before = [np.roll(x, step, axis) for x in data]
        combined = _combine(self, before, data, dtypes)
        data = [np.where(place >= step, new, old) for new, old in zip(combined, data, strict=True)]
        step *= 2
    return [self.to_tensor(x, dtype) for x, dtype in zip(data, dtypes, strict=True)]


def _combine(self, left, right, dtypes):
    """The user's function on two lists of arrays; shapes stay powers of two, as Triton demands."""
    first = [self.to_tensor(x, dtype) for x, dtype in zip(left, dtypes, strict=True)]
    second = [self.to_tensor(x, dtype) for x, dtype in zip(right, dtypes, strict=True)]
    out = self.combine_fn.fn(*first, *second)
    out = out if isinstance(out, tuple | tl.core.tuple) else (out,)
    return [x.handle.data for x in out]
