"""The architecture: which module may use which, and what may be loaded or read where."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hsgen"

# In the order of processing.  A module imports only from lines above its own; `spec` has an order
# of its own.  The README shows the same lines.
LAYERS = """\
errors  paths  svg                      what is said · where things are · pictures as text
target  spec                            a GPU · what the user wrote
selection  graph  layout                what is chosen · what is computed · places for its boxes
reference  analysis  planner  passes    the meaning · the costs · Spec -> Graph -> Graph
flops                                   what PyTorch counts of a call
storage                                 what a cache keeps of a spec
plan
gates                                   forms of a spec for short sequences
rows  dryrun                            a kernel's loops · one call on paper
axes                                    tokens in the order of tiles
kernels
boxes                                   windows along axes
patterns  estimates                     what is seen by position alone · choices held against it
buckets  together  transposed           rows by the block they chose · rows that share a list · rows by tokens
halved  picked  trees  clusters         intervals that are searched · tokens a tile picked · trees · k-means
pyramids  sorting  slashes              entries read in tiers · sorted keys · columns and diagonals
walks  keeping  runs                    tokens taken best first · that heads keep · by the scores of runs
stripes  takes                          anchors behind each row, and spans · keys and rows that nodes take
cols  unpool  unweigh  learn  entropies gradients of attention, of pools and of losses
blockgate                               the same of a gate of blocks
maps  likeness  pairs                   what blocks of rows give blocks · blocks alike · pairs of a head
running  foretold                       tokens of greatest bias, row after row · heads of two ways
streams  cols_streams                   rows whose keys one warp brings · keys whose rows two bring
splits  appending                       a row's keys shared by programs · new tokens into a cache
configs  refusals                       the tiles a kernel starts from · what no kernel does yet
schedule  driver                        Graph, Target -> Plan
backward  losses                        the same of gradients, and of losses
knobs                                   what tuning may vary of a kernel, and rules
space                                   the same of a whole spec
emit                                    Plan -> source text
allowlist  store
workers  build                          source text -> modules on disk
tiling                                  what the tensor memory accelerator brings
crosscompile  resources                 registers, occupancy and limits of modules
pipeline                                the stages in order
tuned                                   configurations that were measured, and which one a call gets
catalogue                               what `specs` says
alike                                   how tensors lie
batch  operators  dense                 where sequences lie · torch's view of calls · PyTorch's attention
arguments
cache                                   keys, values and entries of sequences that grow
launching                               launches whose numbers stay in memory
replay                                  what a driver did, done again with other tensors
execution
gating  decoding  sharding              which form a call takes · behind a cache · split over ranks
runtime                                 load_kernel
serving                                 mixed batches on the pages of a server
drawn                                   rows that drift, and lists of another layer, where no model is at hand
trials                                  emitted kernels against the reference
gradients  steps                        the same of what autograd asks for, and behind a cache
verify                                  trials in a process of their own
report                                  what `show` and `compile` say
measurer                                what measuring says, and a table that says it again
pruning  lanes                          what cannot run · points in processes that may die
compare                                 what `diff` says
drawing                                 graph and plan as a picture
captures  metrics  standins             a model's q, k, v · a choice against dense · what it lacks
models  integrations                    a model whose attention can be exchanged · libraries that run models
quality                                 what a spec recalls of a capture
charts  plots  mask  perplexity         that as curves · what each row takes · what a model then says
machine  samples  timing                a card and its versions · tensors to time on · clocks
checking                                what an output must be to be timed
baselines  tuning                       dense attention, and FlexAttention · such a process
measure                                 the steps of a measurement
bench  crossover                        what a spec costs on the card that is here · to what length less would
variants                                what may be turned at a spec
tiles                                   tiles of its kernels, in steps
tune                                    the fastest configuration of a spec
search                                  variants on the front of time against error
progress
cli
"""
SPEC_LAYERS = """\
model  syntax
rules  text
reader
schema  files  fields
families
drafts
"""
LIGHT = (  # need neither torch nor triton, so that checking and planning are quick
    "errors paths target spec graph analysis planner passes flops storage plan gates rows kernels "
    "boxes patterns estimates buckets together halved picked trees clusters pyramids sorting slashes walks "
    "keeping runs stripes splits appending cols unpool unweigh learn entropies blockgate running foretold "
    "configs refusals schedule driver backward losses "
    "knobs space emit allowlist store workers build resources pipeline tuned catalogue "
    "verify dryrun report measurer pruning lanes compare progress cli svg layout drawing"
).split()
HEAVY = {"torch", "triton", "optuna"}
# Imports that are not at the top of a module, and why.
LAZY = {
    ("target", "torch"): "only Target.current() looks at a device",
    ("sharding", "torch"): "torch.distributed.tensor takes a second, and only a DTensor needs it",
    ("cli", "hsgen"): "a command loads what it uses, so that `check` starts quickly",
}
SOLE_IMPORTERS = {
    "jinja2": {"emit"},
    "yaml": {"spec", "tuned"},
    "typer": {"cli"},
    "matplotlib": {"tune"},
    "optuna": {"search", "tune"},
    "rich": {"progress"},
    "safetensors": {"captures"},
    "transformers": {"integrations", "models"},
}


def named(text: str) -> list[list[str]]:
    """The modules of each line of a diagram; from column 40 on it is prose."""
    return [line[:40].split() for line in text.splitlines()]


def ranks(text: str) -> dict[str, int]:
    return {name: rank for rank, row in enumerate(named(text)) for name in row}


def files() -> Iterator[tuple[str, Path]]:
    """Each file of the package, with its module or package right below hsgen."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def inner_module(path: Path) -> str:
    """The module or package right below hsgen.spec that a file belongs to."""
    return path.relative_to(PACKAGE / "spec").parts[0].removesuffix(".py")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(node: ast.AST) -> Iterator[str]:
    """Full names that an import statement may load."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=0):
            yield from (f"{module}.{alias.name}" for alias in names)
        case ast.ImportFrom():
            raise AssertionError("relative import")
        case _:
            return


@functools.cache
def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(tree(path)) for name in imported(node)}


def below(name: str, package: str) -> str | None:
    """Of a full name, the part that follows `package`."""
    return (
        name.removeprefix(f"{package}.").split(".")[0] if name.startswith(f"{package}.") else None
    )


def test_every_module_has_a_layer():
    modules = {module for module, _ in files()} - {"__init__", "__main__"}
    assert modules - {"_data"} == set(ranks(LAYERS))
    inner = {inner_module(path) for module, path in files() if module == "spec"} - {"__init__"}
    assert inner == set(ranks(SPEC_LAYERS))


def test_light_modules_have_a_layer():
    assert set(LIGHT) <= set(ranks(LAYERS))


@pytest.mark.parametrize("package", ["hsgen", "hsgen.spec"])
def test_imports_point_upwards(package: str):
    inner = package == "hsgen.spec"
    order = ranks(SPEC_LAYERS if inner else LAYERS)
    wrong = []
    for module, path in files():
        name = inner_module(path) if inner and module == "spec" else module
        if name.startswith("__") or (inner and module != "spec"):
            continue
        used = {below(one, package) for one in imports(path)} & set(order)
        wrong += [
            f"{name} imports {one}" for one in used if one != name and order[one] >= order[name]
        ]
    assert not wrong


def test_modules_import_hsgen_by_module():
    """`from hsgen import load_kernel` would go around the layers."""
    known = {*ranks(LAYERS), "__version__"}
    wrong = [
        f"{path.name} imports {name}"
        for module, path in files()
        if module not in ("__init__", "cli")
        for name in imports(path)
        if (part := below(name, "hsgen")) and part not in known
    ]
    assert not wrong


def test_no_import_inside_a_function():
    found = {
        (module, name.split(".")[0])
        for module, path in files()
        for function in ast.walk(tree(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        for name in imported(node)
    }
    assert found <= set(LAZY)


def test_some_libraries_have_one_importer():
    for library, allowed in SOLE_IMPORTERS.items():
        users = {m for m, path in files() if library in {n.split(".")[0] for n in imports(path)}}
        assert users <= allowed, library


def test_only_paths_reads_the_environment():
    readers = {
        module
        for module, path in files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    }
    assert readers == {"paths"}


def test_nothing_is_evaluated_or_unpickled():
    """Only `build` runs text: that of a module whose syntax `allowlist` has passed."""
    runners = {
        (module, node.func.id)
        for module, path in files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ("eval", "exec", "compile", "__import__")
    }
    assert runners <= {("build", "exec"), ("build", "compile")}
    unpicklers = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    users = {m for m, path in files() if unpicklers & {n.split(".")[0] for n in imports(path)}}
    assert not users


def test_nothing_happens_at_import():
    """The statements of a module define.  `operators` tells torch of its operators, `cli` typer of
    its groups.
    """
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for module, path in files()
        if module != "operators"
        for node in tree(path).body
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if not ast.unparse(node).startswith("app.add_typer(")
    ]
    assert not calls


def test_light_modules_load_quickly():
    """Checking a spec and showing its graph needs neither torch nor triton."""
    names = ", ".join(f"hsgen.{name}" for name in LIGHT)
    code = f"import sys, {names}; print(*sorted(set(sys.modules) & {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_import_of_hsgen_loads_next_to_nothing():
    code = "import sys, hsgen; print(*{'yaml', 'pydantic', 'networkx', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
