"""Shortcuts that leave every result as it is: the interpreter spends its time on types, not on numbers.

Descriptions of equal tensors are made once; what two types of operands become is asked once, and numpy
broadcasts them; what an operator asks of the builder is seen once for each pair of types; the language's
functions are looked for once; functions of one text are rewritten once; integers are sorted by numpy;
combine functions of reductions and scans see whole arrays, in a tree in the order of the elements.
"""

import ast
import collections
import contextlib
import functools
import inspect
import linecache
import numbers
import textwrap
from dataclasses import replace
from types import CodeType

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

# names tell types apart: the interpreter has one address space
_types: dict[tuple, dict] = {}
_tensors: dict[str, dict] = {}
_numpy: dict[str, np.dtype] = {}
_elements: dict[tuple, tl.block_type] = {}
_shapes: dict[tuple, tl.core.tuple] = {}
_widths: dict[str, int] = {}
_steps: dict[str, np.uint64] = {}
_false: dict[tuple, np.ndarray] = {}
_builtins: dict[int, list] = {}
# what was seen with the interpreter's own methods, and with those of a sanitizer, by what it is about
OWN: dict[str, dict] = collections.defaultdict(dict)
CHECKED: dict[str, dict] = collections.defaultdict(dict)
seen = OWN
_patched: set[int] = set()  # modules whose language a launch has replaced
MANY = 1 << 16  # pairs of operands that are remembered; constants are among them

Handle = interpreter.TensorHandle
Tensor = tl.core.tensor
Rewriter = interpreter.FunctionRewriter

original_block_type = tl.core.block_type.__init__
original_with_element = tl.core.block_type.with_element_ty
original_tensor = tl.core.tensor.__init__
original_numpy_type = interpreter._get_np_dtype
original_unwrap = tl.core._unwrap_if_constexpr
original_equal = tl.core.dtype.__eq__
original_to_tensor = TritonSemantic.to_tensor
original_cast = TritonSemantic.cast
original_operands = TritonSemantic.binary_op_type_checking_impl
original_broadcast = TritonSemantic.broadcast_impl_value
original_create_broadcast = interpreter.InterpreterBuilder.create_broadcast
original_launch = interpreter.GridExecutor.__call__
original_patch_tensor = interpreter._patch_lang_tensor
original_rewrite = Rewriter.rewrite_ast


def block_type(self, element_ty, shape):
    """As block_type.__init__; equal types share their fields."""
    sizes = tuple([getattr(n, "value", n) for n in shape])
    key = (element_ty.name, sizes)
    if key not in _types:
        original_block_type(self, element_ty, shape)
        self.shape = _shapes.setdefault(sizes, self.shape)
        _types[key] = dict(vars(self))
    vars(self).update(_types[key], element_ty=element_ty)


def with_element(self, scalar_ty):
    """As block_type.with_element_ty; equal types are one object."""
    key = (self.name, scalar_ty.name)
    if key not in _elements:
        _elements[key] = original_with_element(self, scalar_ty)
    return _elements[key]


def tensor(self, handle, type):  # noqa: A002  the interpreter passes it by this name
    """As tensor.__init__; tensors of equal type share it, and their shape."""
    fields = _tensors.get(type.name)
    if fields is None:
        original_tensor(self, handle, type)
        _tensors[type.name] = dict(vars(self), handle=None)
        return
    own = vars(self)
    own.update(fields)
    own["handle"] = handle


def same_type(self, other):
    """As dtype.__eq__."""
    if type(self) is type(other) is tl.dtype:
        return self.name == other.name
    return original_equal(self, other)


def numpy_type(dtype):
    """As _get_np_dtype, which builds a table of all types each time."""
    scalar = dtype.scalar if isinstance(dtype, tl.block_type) else dtype
    if scalar.name not in _numpy:
        _numpy[scalar.name] = original_numpy_type(dtype)
    return _numpy[scalar.name]


def fits(array, dtype):
    """As _validate_np_data_size."""
    width = _widths.get(dtype.name)
    if width is None:
        width = 64 if isinstance(dtype, tl.pointer_type) else max(8, dtype.primitive_bitwidth)
        _widths[dtype.name] = width
    return array.itemsize * 8 <= width


def handle(self, data, dtype, attr=None):
    """As TensorHandle.__init__."""
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if not fits(data, dtype):
        self.__post_init__()  # which raises


PLAIN = frozenset(
    (tl.core.tensor, tl.dtype, tl.pointer_type, tl.block_type, int, float, bool, str, type(None))
)


def unwrap(value):
    """As _unwrap_if_constexpr."""
    return value if type(value) in PLAIN else original_unwrap(value)


def to_tensor(self, x, check_type=True):
    """As TritonSemantic.to_tensor."""
    return x if type(x) is tl.core.tensor else original_to_tensor(self, x, check_type)


def cast(self, value, dtype, fp_downcast_rounding=None):
    """As TritonSemantic.cast; what it asks of the builder is seen once for each pair of types."""
    if value.type.scalar is dtype.scalar:
        return value
    key = (value.type.name, dtype.name)
    step = seen["cast"].get(key)
    if step is None and fp_downcast_rounding is None:
        asked, made = _watched(self, lambda x, _semantic: original_cast(_semantic, x, dtype), value)
        single = len(asked) == 1 and asked[0][0] == "cast_impl"
        if single and asked[0][1][0] is value.handle and asked[0][-1] is made.handle:
            step = (asked[0][1][1], _fields(made))
        seen["cast"][key] = step = step or ()
    if not step or fp_downcast_rounding is not None:
        return original_cast(self, value, dtype, fp_downcast_rounding)
    wanted, fields = step
    made = object.__new__(Tensor)
    own = vars(made)
    own.update(fields)
    own["handle"] = self.builder.cast_impl(value.handle, wanted)
    return made


# operands


def operands(self, lhs, rhs, *rules, **named):
    """As binary_op_type_checking_impl, but arrays keep their shapes, which numpy broadcasts.

    What two types become is remembered, and the array of a constant.
    """
    if named:
        return original_operands(self, lhs, rhs, *rules, **named)
    left = lhs.type.name if type(lhs) is tl.core.tensor else (type(lhs), lhs)
    right = rhs.type.name if type(rhs) is tl.core.tensor else (type(rhs), rhs)
    key = (left, right, rules)
    known = seen["operands"].get(key)
    if known is not None:
        (left_type, left_array), (right_type, right_array) = known
        if left != left_type.name:
            lhs = _as_known(self, lhs, left_type, left_array)
        if right != right_type.name:
            rhs = _as_known(self, rhs, right_type, right_array)
        return lhs, rhs
    found = original_operands(self, lhs, rhs, *rules)
    if len(seen["operands"]) < MANY:
        pairs = zip((lhs, rhs), found, strict=True)
        seen["operands"][key] = tuple((x.type, _constant(given, x)) for given, x in pairs)
    return found


def _constant(given, x):
    return x.handle.data if isinstance(given, numbers.Number) else None


def _as_known(semantic, operand, wanted, constant):
    if constant is not None:
        return tl.core.tensor(Handle(constant, wanted.scalar), wanted)
    if operand.type.scalar.name != wanted.scalar.name:
        operand = semantic.cast(operand, wanted.scalar)
    return tl.core.tensor(operand.handle, wanted)


def broadcast(self, lhs, rhs):
    """As broadcast_impl_value."""
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and left.shape is right.shape:
        return lhs, rhs
    return original_broadcast(self, lhs, rhs)


# functions


_wrapper = tl.core.builtin(lambda: None).__code__


def patch_builtins(owner, builder, scope):
    """As _patch_builtin; which members are the language's own is asked once, before any is replaced."""
    if id(owner) not in _builtins:
        found = [(n, x) for n, x in inspect.getmembers(owner) if tl.core.is_builtin(x)]
        if not found:  # replaced by somebody who does not put them back
            return
        semantic = TritonSemantic(builder)
        _builtins[id(owner)] = [(n, x, _bound(owner, n, x, semantic)) for n, x in found]
    for name, member, call in _builtins[id(owner)]:
        if getattr(owner, name) is member:
            scope.set_attr(owner, name, call)


def _bound(owner, name, member, semantic):
    """A function of the language without the wrapper that only asks for `_semantic`."""
    function = member.__wrapped__ if getattr(member, "__code__", None) is _wrapper else member
    if owner is tl.core.tensor and name in OPERATORS:
        return _operator(name, function, semantic)

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    return _index(call) if owner is tl.core.tensor and name == "__getitem__" else call


def patch_tensor(tensor, *scope):
    """As _patch_lang_tensor, with an index that numpy does not warn about."""
    original_patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])


# operators

OPERATORS = frozenset(
    f"__{side}{name}__"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor"),
        *("lt", "le", "gt", "ge", "eq", "ne"),
    )
    for side in ("", "r")
)
WATCHED = ("binary_op", "create_addptr", "create_idiv", "cast_impl")
FIRST, SECOND = "first", "second"  # whose handle an operation takes


def _operator(name, function, semantic):
    """One of two operands.  Where it casts them at most and then asks one thing of the builder, that is
    asked at once the next time that operands of these types come; a number is part of its type.
    """
    builder = semantic.builder
    new, constexpr = object.__new__, tl.core.constexpr

    def call(self, other):
        kind = type(other)
        if kind is constexpr:
            other = other.value
            kind = type(other)
        key = (self.type.name, other.type.name if kind is Tensor else (kind, other))
        known = seen[name]
        step = known.get(key)
        if step is None:
            step = known[key] = _seen(function, semantic, self, other) if len(known) < MANY else ()
        if not step:
            return function(self, other, _semantic=semantic)
        ask, rest, left, left_type, right, right_type, fields = step
        left = self.handle if left is FIRST else other.handle if left is SECOND else left
        right = self.handle if right is FIRST else other.handle if right is SECOND else right
        if left_type is not None:
            left = builder.cast_impl(left, left_type)
        if right_type is not None:
            right = builder.cast_impl(right, right_type)
        made = new(Tensor)
        own = vars(made)
        own.update(fields)
        own["handle"] = ask(builder, left, right, *rest)
        return made

    return call


def _seen(function, semantic, one, other):
    """What an operator asks of the builder: (method, its last arguments, whose handle or a constant's and
    the type that it is cast to, twice, fields of the tensor that is made), or () where it asks for more.
    """
    if type(other) is Tensor:  # so that each has a handle of its own
        other = Tensor(Handle(other.handle.data, other.handle.dtype), other.type)
    asked, result = _watched(semantic, function, one, other)
    own = {id(x.handle): side for x, side in ((one, FIRST), (other, SECOND)) if type(x) is Tensor}
    cast = {}
    for name, (handle, *rest), out in asked[:-1]:
        if name != "cast_impl" or id(handle) in cast:
            return ()
        cast[id(out)] = (own.get(id(handle), out), *rest) if id(handle) in own else (out, None)
    if not asked or asked[-1][0] == "cast_impl" or asked[-1][-1] is not result.handle:
        return ()
    name, (left, right, *rest), _ = asked[-1]
    sides = [cast.get(id(x), (own.get(id(x), x), None)) for x in (left, right)]
    tensors = [side for side, _ in sides if isinstance(side, str)]
    if sorted(tensors) != sorted(own.values()):
        return ()
    return getattr(type(semantic.builder), name), rest, *sides[0], *sides[1], _fields(result)


def _watched(semantic, function, *operands):
    """What a function of the language asks of the builder, (method, arguments, handle that is made) each
    time, and what it returns.
    """
    builder, asked = semantic.builder, []
    function(*operands, _semantic=semantic)  # after which `operands` knows the types

    def watch(name):
        method = getattr(type(builder), name)

        def watched(*arguments):
            out = method(builder, *arguments)
            asked.append((name, arguments, out))
            return out

        return watched

    for name in WATCHED:
        setattr(builder, name, watch(name))
    try:
        return asked, function(*operands, _semantic=semantic)
    finally:
        for name in WATCHED:
            delattr(builder, name)


def _fields(made):
    """What tensors of its type have beside their handle."""
    return {**vars(made), "handle": None}


def _index(original):
    """x[:, None] and the like, by numpy."""
    fields, new, whole = {}, object.__new__, slice(None)

    def call(self, slices):
        if type(slices) is not tuple or any(x is not None and x != whole for x in slices):
            return original(self, slices)
        key = (self.type.name, *[x is None for x in slices])
        if key not in fields:
            fields[key] = _fields(original(self, slices))
        made = new(Tensor)
        own = vars(made)
        own.update(fields[key])
        own["handle"] = Handle(self.handle.data[slices], self.handle.dtype.scalar)
        return made

    return call


def expand_dims(self, arg, axis):
    """As create_expand_dims."""
    shape = list(arg.data.shape)
    shape.insert(axis if axis >= 0 else axis + len(shape) + 1, 1)
    return Handle(arg.data.reshape(shape), arg.dtype.scalar)


def spread(self, arg, shape):
    """As create_broadcast; numpy's own looks at views for long."""
    if arg.data.dtype != np.bool_:
        return original_create_broadcast(self, arg, shape)
    shape = tuple(shape)
    if shape not in _false:
        _false[shape] = np.zeros(shape, bool)
    return Handle(arg.data | _false[shape], arg.dtype.scalar)


def add_pointer(self, ptr, offset):
    """As create_addptr."""
    name = ptr.dtype.scalar.element_ty.name
    if name not in _steps:
        _steps[name] = np.uint64(max(1, ptr.get_element_ty().primitive_bitwidth // 8))
    moved = offset.data.astype(np.uint64)
    moved *= _steps[name]
    return Handle(ptr.data + moved, ptr.dtype)


def rewrite(self):
    """As FunctionRewriter.rewrite_ast, which reads and compiles the text of each function by itself."""
    code = self.fn.__code__
    self.filename = code.co_filename
    linecache.checkcache(self.filename)
    lines = linecache.getlines(self.filename)
    place = _top_level(lines, code.co_firstlineno)
    place = place or _functions("".join(lines)).get(code.co_firstlineno)
    if place is None:
        return original_rewrite(self)
    self.def_file_lineno, body = place
    namespace, known = dict(self.kwargs), self.fn.__globals__
    for key, value in vars(interpreter).items():
        known.setdefault(key, value)
    exec(_moved(_rewritten(body), self.filename, self.def_file_lineno - 1), known, namespace)
    return namespace[self.fn.__name__]


def _top_level(lines, first):
    """Where the `def` of a function at the margin is, which begins at a line, and its text: whole modules
    take long to parse.  None where that cannot be seen from margins.
    """
    at = first - 1
    while at < len(lines) and lines[at].startswith("@"):
        at += 1
    if at >= len(lines) or not lines[at].startswith("def "):
        return None
    end = at + 1
    while end < len(lines) and lines[end][0] in " )\n":
        end += 1
    body = "".join(lines[at:end])
    return (at + 1, body) if body.count('"""') % 2 == 0 else None  # else text reaches the margin


@functools.cache
def _functions(text):
    """{first line, decorators and all: line of the `def`, text from there}."""
    lines = text.splitlines(keepends=True)
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            body = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            found[first] = (node.lineno, body)
    return found


@functools.cache
def _rewritten(text):
    tree = ast.fix_missing_locations(Rewriter.ast_transformer.visit(ast.parse(text)))
    return compile(tree, "", "exec")


def _moved(code, filename, lines):
    """The same code in another file, so many lines further down."""
    inner = tuple(
        _moved(each, filename, lines) if isinstance(each, CodeType) else each
        for each in code.co_consts
    )
    return code.replace(
        co_consts=inner, co_filename=filename, co_firstlineno=code.co_firstlineno + lines
    )


# launches


def launch(executor, *args, **kwargs):
    """As GridExecutor.__call__."""
    _patched.clear()
    return original_launch(executor, *args, **kwargs)


def helper(self, *args, **kwargs):
    """As InterpretedFunction.__call__, but a module's language is patched once a launch, not at each call."""
    done = sorted_integers(self, args, kwargs)
    if done is not None:
        return done
    place = id(self.fn.__globals__)
    if place not in _patched:
        _patched.add(place)
        interpreter._patch_lang(self.fn)
    fn = self.rewrite()
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


# reductions


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


# all of them

PATCHES = (
    (
        interpreter,
        {
            "_get_np_dtype": numpy_type,
            "_patch_builtin": patch_builtins,
            "_patch_lang_tensor": patch_tensor,
            "_validate_np_data_size": fits,
        },
    ),
    (Handle, {"__init__": handle}),
    (Rewriter, {"rewrite_ast": rewrite}),
    (
        TritonSemantic,
        {
            "binary_op_type_checking_impl": operands,
            "broadcast_impl_value": broadcast,
            "cast": cast,
            "to_tensor": to_tensor,
        },
    ),
    (interpreter.InterpretedFunction, {"__call__": helper}),
    (interpreter.GridExecutor, {"__call__": launch}),
    (tl.core, {"_unwrap_if_constexpr": unwrap}),
    (tl.core.block_type, {"__init__": block_type, "with_element_ty": with_element}),
    (tl.core.dtype, {"__eq__": same_type}),
    (tl.core.tensor, {"__init__": tensor}),
    (interpreter.ReduceOps, {"generic_reduce": tree_reduce}),
    (interpreter.ScanOps, {"generic_scan": tree_scan}),
    (
        interpreter.InterpreterBuilder,
        {
            "create_addptr": add_pointer,
            "create_broadcast": spread,
            "create_expand_dims": expand_dims,
        },
    ),
    # The interpreter computes each integer operation a second time for an assertion that it never raises.
    (
        interpreter.interpreter_builder,
        {"options": replace(interpreter.interpreter_builder.options, sanitize_overflow=False)},
    ),
)


def install():
    """From now on, for all launches of the process."""
    for owner, table in PATCHES:
        for name, value in table.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def checked():
    """Inside, methods are a sanitizer's."""
    global seen
    before, seen = seen, CHECKED
    try:
        yield
    finally:
        seen = before
