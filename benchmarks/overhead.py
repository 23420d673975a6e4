"""What a call costs the host above the launches of its kernels, in microseconds.

    python -m benchmarks.overhead [--systems moba,nsa] [--tokens 512] [-o FILE]

Rounds are so short that the device's queue is never full.  `raw` is the driver of the kernels, called with
everything that a call finds out; `call` a call without gradients; `recorded` one that autograd has to know
of, and `operator` the same through PyTorch's operator, as compiled models call it.  `both` is such a call
and its backward, `raw both` the two drivers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hsgen import execution, load_kernel, operators
from hsgen.reference import tensor_shapes

CALLS = 20
ROUNDS = 100


def host_time(f: Callable[[], Any]) -> float:
    """The least mean of a round, in microseconds; the device is idle when a round begins."""
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            f()
        best = min(best, (time.perf_counter() - start) / CALLS)
        torch.cuda.synchronize()
    return best * 1e6


def measure(system: str, tokens: int) -> dict[str, float]:
    """By what was called."""
    kernel = load_kernel(system)
    shapes = tensor_shapes(kernel.spec, 1, tokens, tokens)
    x = {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.1 for n, s in shapes.items()}
    leaves = {name: each.requires_grad_() for name, each in x.items()}
    with torch.no_grad():
        o, *_ = kernel(**x, return_lse=True)
    grad = torch.randn_like(o)
    call = kernel._call(leaves, kernel._attending, "bthd", (None,) * 5, None)
    of_kernel = kernel._execution
    known = of_kernel._look_up("forward", kernel._attending, call)
    where = execution._batch(call, known.problem)
    given = execution.uniform(known.expected, known.problem, call)

    def raw() -> Any:
        return known.choice.program.driver.forward(given, where, known.choice.config, None)

    def both(attend: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(attend(), list(leaves.values()), grad, allow_unused=True)

    both(lambda: kernel(**leaves))
    program, recorded = known.gradients, known.apart or known.choice  # as that call found them

    def raw_both() -> None:
        forward = recorded.program.driver.forward
        o, lse, chosen, *apart = forward(given, where, recorded.config, None)
        nothing = dict.fromkeys(lse, torch.zeros_like(next(iter(lse.values()))))
        saved = {"o": o, "lse": lse, "selection": chosen, "grad_o": grad, "grad_lse": nothing}
        saved |= {"apart": apart[0]} if apart else {}
        program.driver.backward(given, where, program.config, **saved)

    found: dict[str, float] = {}
    with torch.no_grad():
        found["raw"] = host_time(raw)
        found["call"] = host_time(lambda: kernel(**x))
        found["raw both"] = host_time(raw_both)
    found["recorded"] = host_time(lambda: kernel(**leaves))
    found["operator"] = host_time(lambda: operators.forward(kernel._key, *call))
    found["both"] = host_time(lambda: both(lambda: kernel(**leaves)))
    found["both, operators"] = host_time(
        lambda: both(lambda: operators.forward(kernel._key, *call)[0])
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", default="moba,nsa")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("-o", type=Path)
    options = parser.parse_args()
    found = {system: measure(system, options.tokens) for system in options.systems.split(",")}
    for system, times in found.items():
        print(system, "  ".join(f"{name} {value:.1f}" for name, value in times.items()))
        above = {"call": "raw", "recorded": "raw", "both": "raw both"}
        print("  above", "  ".join(f"{a} {times[a] - times[b]:.1f}" for a, b in above.items()))
    if options.o:
        card = torch.cuda.get_device_name()
        options.o.write_text(json.dumps({"card": card, "microseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
