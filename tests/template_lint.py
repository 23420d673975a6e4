"""Rules for kernel sources that can be read off the syntax tree."""

import ast
import re
from collections.abc import Iterator

KERNEL_IMPORTS = frozenset({"import triton", "import triton.language as tl"})
GLUON = "triton.experimental"  # for kernels that stream keys
GLUON_NAMES = frozenset(
    {"gluon", "language", "async_copy", "fence_async_shared", "mbarrier", "tma"}
    | {"warpgroup_mma", "warpgroup_mma_wait"}
)
# Integer `or`, `and`, `min` and `max` give the same bits in any order; a sum of floats does not.
EXACT_ATOMICS = frozenset({"atomic_or", "atomic_and", "atomic_xor", "atomic_min", "atomic_max"})
# Pointers to whole numbers, whose sums have the same bits in any order.
WHOLE_NUMBERS = frozenset({"counts"})
# Strides over batch, tokens and heads, and over slots of lists, as a caller lays them.  LSE is the driver's
# own, with its rows innermost.
WIDE_STRIDE = re.compile(r"^\w+_[bth]$|^s_s$|^stride$|^capacity$")
NARROW_BY_LAYOUT = frozenset({"lse_t"})


def lint(text: str, *, driver: bool = False) -> list[str]:
    """All violations in a module as "LINE: what is wrong", in order of lines."""
    tree = ast.parse(text)
    found = list(_imports(tree, driver=driver))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not driver:
            found += _calls(function)
            found += _offsets(function)
            found += _masks(function)
    return [f"{line}: {message}" for line, message in sorted(set(found))]


Found = Iterator[tuple[int, str]]


def _imports(tree: ast.Module, *, driver: bool) -> Found:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        text = ast.unparse(node)
        own = driver and (
            text == "import torch" or isinstance(node, ast.ImportFrom) and node.level == 1
        )
        gluon = isinstance(node, ast.ImportFrom) and str(node.module).startswith(GLUON)
        known = gluon and {alias.name for alias in node.names} <= GLUON_NAMES
        if text not in KERNEL_IMPORTS and not own and not known:
            yield node.lineno, f"import not allowed: {text}"


def _calls(function: ast.FunctionDef) -> Found:
    for call in ast.walk(function):
        if not isinstance(call, ast.Call) or not _is_language(call.func):
            continue
        name = call.func.attr
        words = {k.arg for k in call.keywords}
        if name == "load" and ("mask" in words or len(call.args) > 1):
            if "other" not in words and len(call.args) < 3:
                yield call.lineno, "tl.load with a mask needs other="
        if name == "dot" and "input_precision" not in words:
            yield call.lineno, "tl.dot needs input_precision="
        whole = name == "atomic_add" and ast.unparse(call.args[0]) in WHOLE_NUMBERS
        if name.startswith("atomic_") and name not in EXACT_ATOMICS and not whole:
            yield (
                call.lineno,
                f"tl.{name} depends on the order of programs where its operands are floats",
            )
        if name in ("multiple_of", "max_contiguous"):
            yield call.lineno, f"tl.{name} is a promise that nothing checks"


def _is_language(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "tl"
    )


# offsets: index * stride is computed in int64


def _offsets(function: ast.FunctionDef) -> Found:
    wide = _closure(function, _is_wide)
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for stride, index in ((node.left, node.right), (node.right, node.left)):
                if _is_stride(stride) and not isinstance(index, ast.Constant):
                    if not _is_wide(index, wide):
                        yield node.lineno, f"{ast.unparse(node)} is not computed in int64"


def _is_stride(node: ast.expr) -> bool:
    named = isinstance(node, ast.Name) and node.id not in NARROW_BY_LAYOUT
    return named and WIDE_STRIDE.match(node.id) is not None


def _is_wide(node: ast.expr, wide: frozenset[str]) -> bool:
    match node:
        case ast.Name():
            return node.id in wide
        case ast.Call(func=ast.Attribute(attr="to"), args=[target, *_]):
            return ast.unparse(target) == "tl.int64"
        case ast.Call():
            return any(_is_wide(x, wide) for x in node.args)
        case ast.BinOp():
            return _is_wide(node.left, wide) or _is_wide(node.right, wide)
        case ast.Subscript() | ast.UnaryOp():
            return _is_wide(node.value if isinstance(node, ast.Subscript) else node.operand, wide)
    return False


# masks: Triton 3.9's interpreter turns `scalar & block` of truth values into int32


def _masks(function: ast.FunctionDef) -> Found:
    blocks = _closure(function, _is_block)
    scalars = _closure(function, _is_scalar)
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if (
                    _is_block(one, blocks)
                    and _is_scalar(other, scalars)
                    and not _is_block(other, blocks)
                ):
                    yield node.lineno, f"{ast.unparse(node)} mixes a scalar and a block mask"


def _is_block(node: ast.expr, blocks: frozenset[str]) -> bool:
    """Certainly a tile: it comes from tl.arange and its kin, and no reduction lies between."""
    match node:
        case ast.Name():
            return node.id in blocks
        case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr=name)):
            if name in ("arange", "zeros", "full"):
                return True
            if name in ("sum", "max", "min", "reduce"):
                return False
            return any(_is_block(x, blocks) for x in node.args)
        case ast.Call(func=ast.Attribute(attr="to", value=value)):
            return _is_block(value, blocks)
        case ast.BinOp():
            return _is_block(node.left, blocks) or _is_block(node.right, blocks)
        case ast.Compare():
            return any(_is_block(x, blocks) for x in (node.left, *node.comparators))
        case ast.Subscript():
            return _is_block(node.value, blocks)
        case ast.UnaryOp():
            return _is_block(node.operand, blocks)
    return False


def _is_scalar(node: ast.expr, scalars: frozenset[str]) -> bool:
    """Certainly a run-time scalar: it comes from tl.program_id or a load of one address."""
    match node:
        case ast.Name():
            return node.id in scalars
        case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr="program_id")):
            return True
        case ast.Call(func=ast.Attribute(attr="to", value=value)):
            return _is_scalar(value, scalars)
        case ast.BinOp():
            parts = (node.left, node.right)
        case ast.Compare():
            parts = (node.left, *node.comparators)
        case _:
            return False
    known = [_is_scalar(x, scalars) for x in parts]
    return any(known) and all(
        k or isinstance(x, ast.Constant) for k, x in zip(known, parts, strict=True)
    )


def _closure(function: ast.FunctionDef, test) -> frozenset[str]:
    """Local names whose every assignment passes `test`, given the names that do."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(node.value)
    names: frozenset[str] = frozenset()
    while True:
        more = frozenset(n for n, values in assigned.items() if all(test(v, names) for v in values))
        if more == names:
            return names
        names = more
