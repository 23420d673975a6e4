"""Where hsgen's data and its cache are; the only reader and writer of the environment.

Creates nothing and reads no file: callers get paths.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

DataKind = Literal["templates", "specs", "tuned"]


def data_dir(kind: DataKind) -> Path:
    """The folder of shipped `templates`, `specs` or `tuned`: in a wheel, else in the checkout.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_data" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    msg = f"hsgen is installed without its '{kind}' folder in {package}; reinstall it"
    raise FileNotFoundError(msg)


def cache_dir() -> Path:
    """The folder of compiled modules: $HSGEN_CACHE_DIR, $XDG_CACHE_HOME/hsgen or ~/.cache/hsgen."""
    if chosen := os.environ.get("HSGEN_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the XDG specification: a relative path is to be ignored
        return base / "hsgen"
    try:
        return Path.home() / ".cache" / "hsgen"
    except RuntimeError:  # no home at all, as for some service users
        return Path(tempfile.gettempdir()) / f"hsgen-{os.getuid()}"


def wants_checks() -> bool:
    """$HSGEN_CHECK: whether kernels look at the values of lengths and selections, which costs a wait."""
    return os.environ.get("HSGEN_CHECK", "0") not in ("", "0")


def requires_tuned() -> bool:
    """$HSGEN_REQUIRE_TUNED: whether a call on kernels that are not tuned is an error."""
    return os.environ.get("HSGEN_REQUIRE_TUNED", "0") not in ("", "0")


def wants_color() -> bool:
    """Whether the user allows colour on a terminal (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible_gpus() -> tuple[str, ...]:
    """$CUDA_VISIBLE_DEVICES, as names for a child's; empty where it is not set."""
    return tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))


def ask_for_interpreter() -> None:
    """$TRITON_INTERPRET for the rest of this process: heard only before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"


def child_environment(*, remove: Iterable[str], add: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child, changed."""
    kept = {name: value for name, value in os.environ.items() if name not in set(remove)}
    return kept | dict(add)


def compiler_environment() -> dict[str, str]:
    """The variables that change what Triton's compilers make, for cache keys."""
    harmless = {"TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER", "TRITON_HOME", "TRITON_INTERPRET"}
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("TRITON_", "PTXAS_", "DISABLE_PTXAS", "LLVM_")) and name not in harmless
    }
