"""Records of GPUs that need not exist, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hsgen import tuned

KERNEL = tuned.KernelChoice(
    text="ab" * 12,
    config={"BLOCK_T": 16, "num_warps": 4, "num_stages": 2},
    shared=1024,
    registers=64,
)
RECORD = tuned.Tuned(
    problem=tuned.Problem(
        spec="nsa", digest="cd" * 32, dtype="bf16", heads=(64, 4), head_dim=(192, 128)
    ),
    bucket=tuned.Bucket.of(8192, 8192, 1, False),
    environment=tuned.Environment(
        gpu="h100", sm="sm_90", processors=132, shared_memory=232448, triton="3.6"
    ),
    kernels={"attend": KERNEL, "score": replace(KERNEL, text="ef" * 12)},
    time=tuned.Time(median_us=100.0, iqr_us=0.5, runs=20),
    default=tuned.Time(median_us=150.0, iqr_us=0.5, runs=20),
    provenance=tuned.Provenance(
        hsgen="0.1.0",
        torch="2.11.0",
        driver="570.1",
        date="2026-11-26",
        trials=50,
        command="hsgen tune nsa",
    ),
    check={"max_error": 0.01, "seeds": 2, "reference": "float64"},
    alternates=(
        tuned.Alternate(kernels={"attend": {"num_warps": 8, "num_stages": 2}}, ratio=1.01),
    ),
)


def record(**changes: Any) -> tuned.Tuned:
    """RECORD with fields replaced, those of its parts as `bucket__keys=16`."""
    made = RECORD
    for name, value in changes.items():
        part, _, inner = name.partition("__")
        if inner:
            value = replace(getattr(made, part), **{inner: value})
        made = replace(made, **{part: value})
    return made
