"""Where a figure was measured: card, versions, date and command.  Names no folder of that machine."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

PACKAGE = Path(__file__).resolve().parent


def card(device: str) -> str:
    """The name of what is measured: a GPU as its driver calls it, or "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def provenance(command: Sequence[str], device: str) -> dict[str, str | int | None]:
    """Everything that a figure needs beside it."""
    return {
        "card": card(device),
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(command),
    }


def without_paths(text: str) -> str:
    """Folders of the machine that ran this say nothing to anyone else."""
    text = text.replace(f"{PACKAGE.parent}/", "")
    text = re.sub(r"/[^\s\"']*/site-packages/", "", text)
    return re.sub(r"(?<![\w.:/])/(?:[\w.+-]+/)+", "", text)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.split("\n")[0].strip()
