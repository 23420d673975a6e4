"""What emitted text may contain, decided on its syntax tree before anything is imported.

The first fence is that a spec's text never reaches a source line (values are typed, names are
identifiers).  This is the second: imports only of triton, torch and siblings, known builtins, known
names of torch and triton, no underscored attribute, and nothing that acts while importing.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hsgen.errors import BuildError

FILE = re.compile(r"(__init__|[a-z][a-z0-9_]{0,63})\.py")
NODES = {
    *(ast.Module, ast.Import, ast.ImportFrom, ast.alias, ast.FunctionDef, ast.arguments, ast.arg),
    *(ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.Expr, ast.Pass),
    *(ast.For, ast.While, ast.If, ast.IfExp, ast.Break, ast.Continue, ast.With, ast.withitem),
    *(ast.Assert, ast.Raise, ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Slice),
    *(ast.Call, ast.keyword, ast.Starred, ast.Lambda, ast.Tuple, ast.List, ast.Dict, ast.Set),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.JoinedStr, ast.FormattedValue),
}
BASES = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
BUILTIN_WORDS = """
    abs all any bin bool bytes callable chr complex dict divmod enumerate filter float frozenset
    hash hex id int isinstance issubclass iter len list map max min next oct ord pow range repr
    reversed round set slice sorted str sum tuple zip
    AssertionError IndexError KeyError NotImplementedError RuntimeError TypeError ValueError
"""
TORCH_WORDS = """
    Tensor arange as_tensor cat ceil cumsum device dtype empty empty_like empty_strided finfo full
    full_like iinfo inf maximum minimum nan ones ones_like promote_types searchsorted stack strided
    tensor where zeros zeros_like
    bfloat16 bool float float8_e4m3fn float8_e5m2 float16 float32 float64 half int int8 int16 int32
    int64 long uint8
"""
BUILTINS = frozenset(BUILTIN_WORDS.split())
DANGEROUS = frozenset(dir(builtins)) - BUILTINS - {"_"}  # the last one is an interactive session's
TORCH = frozenset(TORCH_WORDS.split())
TRITON = frozenset({"Config", "cdiv", "jit", "next_power_of_2"})
# Submodules of triton.language: through them one reaches all that they import.
LANGUAGE_MODULES = frozenset({"core", "extra", "random", "semantic", "standard", "target_info"})
ATTRIBUTES = LANGUAGE_MODULES | {"format", "format_map", "mro", "numpy", "tofile"}
GLUON = "triton.experimental.gluon"
HOPPER = f"{GLUON}.language.nvidia.hopper"
AMPERE = f"{GLUON}.language.nvidia.ampere"
FROM = {  # by module: what may be imported from it, and as what
    "triton.experimental": {"gluon": GLUON},
    GLUON: {"language": "triton.language"},
    AMPERE: {"async_copy": f"{AMPERE}.async_copy"},
    HOPPER: {
        "mbarrier": f"{HOPPER}.mbarrier",
        "tma": f"{HOPPER}.tma",
        "fence_async_shared": "",
        "warpgroup_mma": "",
        "warpgroup_mma_wait": "",
    },
}
ROOTS = {
    "torch": TORCH,
    "triton": TRITON,
    GLUON: frozenset({"constexpr_function", "jit"}),
    f"{AMPERE}.async_copy": frozenset({"async_copy_global_to_shared", "mbarrier_arrive"}),
    f"{HOPPER}.mbarrier": frozenset({"MBarrierLayout", "arrive", "expect", "init", "wait"}),
    f"{HOPPER}.tma": frozenset({"async_copy_global_to_shared"}),
}
DECORATING = {"triton", GLUON}
IMPORTS = {("torch", None), ("triton", None), ("triton.language", "tl")}


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """One file while it is checked; `nodes` are its tree's, walked once."""

    name: str
    tree: ast.Module
    nodes: Sequence[ast.AST]
    modules: Mapping[str, str]  # local name -> torch, triton, triton.language or a sibling file


def check(sources: Mapping[str, str]) -> dict[str, ast.Module]:
    """Parse and check every Python file; other files are data and stay unread.

    Raises:
        BuildError: `file:line: what`.  Emitted text that fails is a bug in hsgen, or tampered with.
    """
    trees = {name: _parse(name, text) for name, text in sources.items() if name.endswith(".py")}
    defined = {name: _definitions(tree) for name, tree in trees.items()}
    for name, tree in trees.items():
        nodes = tuple(ast.walk(tree))
        file = _File(name=name, tree=tree, nodes=nodes, modules=_imports(name, nodes, defined))
        for node in nodes:
            _check_node(file, node)
        _check_attributes(file, defined)
        _check_top_level(file)
    _check_cycles(trees)
    return trees


def siblings(tree: ast.Module) -> set[str]:
    """The files that a file imports from its own package."""
    found = set[str]()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f"{name}.py" for name in names}
    return found


def _parse(name: str, text: str) -> ast.Module:
    if not FILE.fullmatch(name):
        raise BuildError(f"a module's file name must be an identifier and .py, got {name!r}")
    try:
        return ast.parse(text, filename=name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise BuildError(f"{name}:{line}: emitted text does not parse: {error}") from error


def _definitions(tree: ast.Module) -> set[str]:
    """The functions and values that siblings may use: not what the file itself imported."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            leaves = [leaf for leaf in ast.walk(node) if isinstance(leaf, ast.Name)]
            names |= {leaf.id for leaf in leaves if isinstance(leaf.ctx, ast.Store)}
    return names


def _imports(
    name: str, nodes: Sequence[ast.AST], defined: Mapping[str, set[str]]
) -> dict[str, str]:
    modules = dict[str, str]()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= _plain_import(name, node)
        elif isinstance(node, ast.ImportFrom):
            modules |= _from_import(name, node, defined)
    return modules


def _plain_import(name: str, node: ast.Import) -> dict[str, str]:
    for alias in node.names:
        if (alias.name, alias.asname) not in IMPORTS:
            _refuse(name, node, f"import of {alias.name}")
    return {alias.asname or alias.name: alias.name for alias in node.names}


def _from_import(
    name: str, node: ast.ImportFrom, defined: Mapping[str, set[str]]
) -> dict[str, str]:
    """`from . import attend`, `from .attend import kernel`, and `__future__`."""
    if node.level == 0 and node.module == "__future__":
        return {}
    if node.level == 0 and node.module in FROM:
        known = FROM[node.module]
        for alias in node.names:
            if alias.name not in known:
                _refuse(name, node, f"import of {alias.name} from {node.module}")
        return {a.asname or a.name: known[a.name] for a in node.names if known[a.name]}
    if node.level != 1:
        _refuse(name, node, f"import from {node.module}")
    if node.module is None:
        for alias in node.names:
            if f"{alias.name}.py" not in defined:
                _refuse(name, node, f"import of the missing sibling {alias.name}")
        return {alias.asname or alias.name: f"{alias.name}.py" for alias in node.names}
    for alias in node.names:
        if alias.name not in defined.get(f"{node.module}.py", set()):
            _refuse(name, node, f"import of {alias.name}, which {node.module} does not define")
    return {}


def _check_node(file: _File, node: ast.AST) -> None:
    if type(node) not in NODES and not isinstance(node, BASES):
        _refuse(file.name, node, type(node).__name__)
    match node:
        case ast.Import() | ast.ImportFrom() if node not in file.tree.body:
            _refuse(file.name, node, "import inside a function")
        case ast.Name(id=word) | ast.arg(arg=word) | ast.FunctionDef(name=word):
            _check_word(file, node, word)
        case ast.Attribute(attr=word) if word.startswith("_") or word in ATTRIBUTES:
            _refuse(file.name, node, f"the attribute {word}")
        case ast.alias(name=name, asname=alias):
            _check_word(file, node, alias or name.partition(".")[0])
        case ast.keyword(arg=str(word)) if word.startswith("__"):
            _refuse(file.name, node, f"the argument {word}")
        case _:
            pass


def _check_word(file: _File, node: ast.AST, word: str) -> None:
    """No name of a dangerous builtin, read or bound; no dunder; modules are never rebound."""
    if word.startswith("__") and word not in {"__all__", "__future__"}:
        _refuse(file.name, node, f"the name {word}")
    if word in DANGEROUS:
        _refuse(file.name, node, f"the builtin {word}")
    rebound = word in file.modules and not isinstance(node, ast.alias)
    if rebound and not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)):
        _refuse(file.name, node, f"another meaning for the module {word}")


def _check_attributes(file: _File, defined: Mapping[str, set[str]]) -> None:
    """A module is only ever written before a dot and a name that is known to be harmless."""
    bases = set[int]()
    for node in file.nodes:
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        origin = file.modules.get(node.value.id)
        if origin is None:
            continue
        bases.add(id(node.value))
        if not isinstance(node.ctx, ast.Load) or not _known(origin, node.attr, defined):
            _refuse(file.name, node, f"{node.value.id}.{node.attr}")
    for node in file.nodes:
        if isinstance(node, ast.Name) and node.id in file.modules and id(node) not in bases:
            _refuse(file.name, node, f"the module {node.id} as a value")


def _known(origin: str, attribute: str, defined: Mapping[str, set[str]]) -> bool:
    if origin == "triton.language":
        return attribute not in LANGUAGE_MODULES
    return attribute in (ROOTS[origin] if origin in ROOTS else defined[origin])


def _check_top_level(file: _File) -> None:
    """Importing runs nothing but definitions, constants and triton's own decorator."""
    for node in file.tree.body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef():
                pass
            case ast.Expr(value=ast.Constant(value=str())):
                pass
            case ast.Assign() | ast.AnnAssign():
                _check_calls(file, node)
            case _:
                _refuse(file.name, node, f"{type(node).__name__} at the top level")
    for node in file.nodes:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                _check_decorator(file, decorator)
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                _check_calls(file, default)


def _check_decorator(file: _File, node: ast.expr) -> None:
    match node:
        case ast.Attribute(value=ast.Name(id=base)) if file.modules.get(base) in DECORATING:
            pass
        case ast.Call(func=ast.Attribute(value=ast.Name(id=base)), args=[]) if (
            file.modules.get(base) in DECORATING
        ):
            for keyword in node.keywords:
                _check_calls(file, keyword.value)
        case _:
            _refuse(file.name, node, f"the decorator {ast.unparse(node)}")


def _check_calls(file: _File, part: ast.AST) -> None:
    for node in ast.walk(part):
        if isinstance(node, ast.Call) and not _harmless(file, node.func):
            _refuse(file.name, node, f"a call of {ast.unparse(node.func)} while importing")


def _harmless(file: _File, function: ast.expr) -> bool:
    match function:
        case ast.Attribute(value=ast.Name(id=base)):
            return file.modules.get(base) in {"triton", "triton.language"}
        case ast.Name(id=word):
            return word in BUILTINS
        case _:
            return False


def _check_cycles(trees: Mapping[str, ast.Module]) -> None:
    """Files that import each other have no order in which each is whole when it is used."""
    below = {name: siblings(tree) for name, tree in trees.items()}
    while ready := {name for name, needs in below.items() if not needs & below.keys()}:
        below = {name: needs for name, needs in below.items() if name not in ready}
    if below:
        raise BuildError(f"emitted files import each other: {', '.join(sorted(below))}")


def _refuse(name: str, node: ast.AST, what: str) -> NoReturn:
    raise BuildError(f"{name}:{getattr(node, 'lineno', 1)}: emitted text may not hold {what}")
