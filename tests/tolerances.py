"""How far a kernel may be from float64, by dtype; no environment variable widens it.

`used` in a failure says which part of a bound was taken.  Correct kernels take about a third of it:
a change that suddenly takes more has lost accuracy, even where it passes.
"""

from dataclasses import dataclass

import torch

from hsgen.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Units of error.

    Attributes:
        output: unit roundoff of the output's dtype, u.
        arithmetic: unit roundoff of dots and sums inside a kernel; scores and log-sum-exps have it.
        bias: how much of u all rows may have in common: rounding cancels, chopped sums do not.
        stored: how far a pooled entry may be off after it is rounded, beside float64's rounded one: one
            step of the dtype where their sums lie on two sides of a tie.
        eight: what a step of 32 products of e4m3 may lose, as a part of the sum of their sizes, where units
            add them; else 0.
        own: factor on the error that the same computation in plain PyTorch of that dtype makes.
    """

    output: float
    arithmetic: float
    stored: float
    eight: float = 0.0
    bias: float = 0.25
    own: float = 3.0


UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FLOAT32 = 2.0**-24
THREE_TF32 = 2.0**-21  # dots of float32 on tensor cores: three passes of TF32, sums chopped
# Of 32 products of e4m3 and the sum before them, Hopper's units drop what is below 2^-13 of the greatest:
# see test_eight, which adds as they do.
STEP_OF_EIGHT, EIGHT = 32, 2.0**-10


def tolerance(dtype, device):
    """The tolerance of a dtype where a kernel runs: on "cpu" through the interpreter, or on "cuda"."""
    on_gpu = torch.device(device).type == "cuda"
    arithmetic = THREE_TF32 if on_gpu else FLOAT32
    output = max(UNITS[dtype], arithmetic)
    chopped = on_gpu and dtype == torch.float32
    stored = 0.0 if dtype == torch.float32 else 2 * UNITS[dtype]
    eight = on_gpu and dtype != torch.float32 and Target.current().dots_of_e4m3
    return Tolerance(
        output=output,
        arithmetic=arithmetic,
        stored=stored,
        eight=EIGHT if eight else 0.0,
        bias=1.0 if chopped else 0.25,
    )


def in_eight(dim):
    """What a dot of `dim` products of e4m3 may lose, as a part of the sum of their sizes."""
    return EIGHT * -(-dim // STEP_OF_EIGHT)
