"""How far a kernel may be from float64, by dtype; no environment variable widens it.

`used` in a failure says which part of a bound was taken.  Correct kernels take about a third of it:
a change that suddenly takes more has lost accuracy, even where it passes.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Units of error.

    Attributes:
        output: unit roundoff of the output's dtype, u.
        arithmetic: unit roundoff of dots and sums inside a kernel; scores and log-sum-exps have it.
        bias: how much of u all rows may have in common: rounding cancels, chopped sums do not.
        stored: how far a pooled entry may be off after it is rounded, beside float64's rounded one: one
            step of the dtype where their sums lie on two sides of a tie.
        own: factor on the error that the same computation in plain PyTorch of that dtype makes.
    """

    output: float
    arithmetic: float
    stored: float
    bias: float = 0.25
    own: float = 3.0


UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FLOAT32 = 2.0**-24
THREE_TF32 = 2.0**-21  # dots of float32 on tensor cores: three passes of TF32, sums chopped


def tolerance(dtype, device):
    """The tolerance of a dtype where a kernel runs: on "cpu" through the interpreter, or on "cuda"."""
    on_gpu = torch.device(device).type == "cuda"
    arithmetic = THREE_TF32 if on_gpu else FLOAT32
    output = max(UNITS[dtype], arithmetic)
    chopped = on_gpu and dtype == torch.float32
    stored = 0.0 if dtype == torch.float32 else 2 * UNITS[dtype]
    return Tolerance(
        output=output, arithmetic=arithmetic, stored=stored, bias=1.0 if chopped else 0.25
    )
