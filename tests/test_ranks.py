"""DTensors, DDP and FSDP, in two processes: see `ranks_child`."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("ranks_child.py")


@pytest.mark.parametrize("more", [(), pytest.param(("compiles",), marks=pytest.mark.full)], ids=str)
def test_two_ranks_are_one(tmp_path, more):
    command = [sys.executable, str(CHILD), str(tmp_path / "meet"), *more]
    done = subprocess.run(
        command, cwd=CHILD.parent.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
