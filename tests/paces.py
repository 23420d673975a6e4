"""How long a command may take, on whatever machine the tests run."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

AT_REST = 0.25  # seconds of processor time that the libraries of `hsgen check` take to load


def assert_takes(seconds: float, command: Callable[[], object], tries: int = 8) -> None:
    """That a command takes this long at most, by the clock or by processor time (other work may
    keep the processors busy), on a machine where the libraries load within AT_REST.  Where these
    need more just then, since the machine is slow or its caches are other programs', the command
    may take as much more.
    """
    seen = []
    for _ in range(tries):
        start, before = time.perf_counter(), _children_time()
        command()
        took = min(time.perf_counter() - start, _children_time() - before)
        seen.append((took, seconds * max(1.0, _libraries_time() / AT_REST)))
        if took < seen[-1][1]:
            return
    pytest.fail(f"(took, allowed), each time: {seen}")


def _libraries_time() -> float:
    before = _children_time()
    code = "import typer, pydantic.types, yaml, rich.console"
    subprocess.run([sys.executable, "-c", code], check=True)
    return _children_time() - before


def _children_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
