"""A compiler for hierarchical sparse attention.

text -> Spec -> Graph -> Plan -> Sources -> Module -> Kernel; every noun is a frozen value.

    spec        what an attention means, from YAML text            hsgen.spec.load
    reference   the meaning itself, in plain PyTorch
    graph       the operators that a meaning needs
    planner     Spec -> Graph, then Graph -> Graph
    schedule    which operators share a kernel, with which buffers
    emit        kernels as readable Triton modules
    build       modules on disk, verified
    runtime     `load_kernel(spec)`: the kernel in a model

Shapes in this package:

    B    batch                          D, Dqk, Dv   length of a head's vectors
    T    query tokens                   Hi, Di       heads and their length of a separate index
    S    key tokens                     N            entries of a level
    Hq   query heads                    K            entries that one row selects
    Hkv  key/value heads                Hs           heads that select for themselves: Hq, Hkv or 1
    G    group: Hq / Hkv                Z            sequences: B, or documents of a packed batch

Importing hsgen loads neither torch nor triton: each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsgen.errors import HsgenError
    from hsgen.gates import Gate
    from hsgen.pipeline import compile_spec
    from hsgen.runtime import load_kernel
    from hsgen.spec import Spec
    from hsgen.target import Target

__all__ = ["Gate", "HsgenError", "Spec", "Target", "compile_spec", "load_kernel"]

__version__ = "0.1.0"

_HOME = {
    "Gate": "hsgen.gates",
    "HsgenError": "hsgen.errors",
    "Spec": "hsgen.spec",
    "Target": "hsgen.target",
    "compile_spec": "hsgen.pipeline",
    "load_kernel": "hsgen.runtime",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        msg = f"module 'hsgen' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
