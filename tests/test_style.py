"""ruff and pyright find nothing, so that one command covers them too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {
    "lint": ("ruff", "check", "--output-format", "concise"),
    "format": ("ruff", "format", "--check", "--output-format", "concise"),
    "types": ("pyright", "--pythonpath", sys.executable),
}


@pytest.mark.parametrize("name", ["lint", "format", pytest.param("types", marks=pytest.mark.slow)])
def test_style(name: str):
    module, *arguments = CHECKS[name]
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
