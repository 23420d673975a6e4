"""What a call costs the host above the launches of its kernels, in microseconds.

    python -m benchmarks.overhead [--systems moba,nsa] [--tokens 512] [-o FILE]

Rounds are so short that the device's queue is never full.  `driver` is the driver of the kernels, called
with everything that a call finds out, where Triton is asked of every launch; `raw` are those launches as
repeated calls make them (hsgen/replay.py), absent where a driver is not recorded and every call runs it;
`call` a call without gradients; `recorded` one that autograd has to know of, whose launches are
`raw recorded`, and `operator` the same through PyTorch's operator, as compiled models call it.  `both` is
such a call and its backward, `driver both` the drivers of the two, `raw both` their launches, and `autograd`
what PyTorch takes for one of as many tensors that does nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hsgen import execution, load_kernel, operators
from hsgen.reference import tensor_shapes
from hsgen.runtime import Kernel

CALLS = 20
ROUNDS = 100


class _Nothing(torch.autograd.Function):
    """Keeps tensors, and gives what was there."""

    @staticmethod
    def forward(ctx, o, grads, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.grads = grads
        return o.detach()

    @staticmethod
    def backward(ctx, _):
        assert ctx.saved_tensors
        return None, None, *ctx.grads


def host_time(f: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The least mean of a round, in microseconds; the device is idle when a round begins."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best = float("inf")
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            f()
        best = min(best, (time.perf_counter() - start) / CALLS)
        wait()
    return best * 1e6


def measure(
    kernel: Kernel, tokens: int, device: str = "cuda", rounds: int = ROUNDS
) -> dict[str, float]:
    """By what was called; nothing is `raw` where a driver is not recorded."""
    shapes = tensor_shapes(kernel.spec, 1, tokens, tokens)
    x = {n: torch.randn(s, device=device, dtype=torch.bfloat16) * 0.1 for n, s in shapes.items()}
    leaves = {name: each.requires_grad_() for name, each in x.items()}
    with torch.no_grad():
        o, *_ = kernel(**x, return_lse=True)
    grad = torch.randn_like(o)
    of_kernel = kernel._execution
    call = kernel._call(leaves, kernel._attending, "bthd", (None,) * 5, None)

    def both(attend: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(attend(), list(leaves.values()), grad, allow_unused=True)

    for _ in range(3):  # the second time calls are recorded
        both(lambda: kernel(**leaves))
        with torch.no_grad():
            kernel(**x)
    known = of_kernel._look_up("forward", kernel._attending, call)
    where = execution._batch(call, known.problem)
    given = execution.uniform(known.expected, known.problem, call)
    choice = known.choice
    kept = known.apart or choice  # what a call with gradients runs
    rows_apart = choice.program.rows_apart
    find = of_kernel.replays.find
    forward = find(("forward", known, False, where.sizes, rows_apart, True))
    whole = find(("forward", known, kept is known.apart, where.sizes, False, True))
    left_out = {"rows": False} if rows_apart else {}  # where nobody asks for gradients
    with torch.no_grad():
        outputs, apart, _ = of_kernel.record(call)
    gradients = of_kernel._gradient_program(known.problem, call, apart=bool(apart))
    count = 1 + len(of_kernel.branches)
    lse, chosen = outputs[1:count], outputs[count:]
    zeros = [torch.zeros_like(lse[0]) for _ in lse]
    of_backward = [*call.tensors, *outputs[:count], grad, *zeros, *chosen, *apart]
    last = known.last_grads
    backward = find(last.key) if last else None
    saved = {"apart": dict(zip(kept.program.plan.apart, apart, strict=True))} if apart else {}

    def driver(choice: execution.Choice = choice, **options: bool) -> Any:
        return choice.program.driver.forward(given, where, choice.config, None, **options)

    def driver_both() -> None:
        driver(kept)
        gradients.driver.backward(
            given,
            where,
            gradients.config,
            o=outputs[0],
            lse=dict(zip(of_kernel.branches, lse, strict=True)),
            selection=dict(zip(of_kernel.levels, chosen, strict=True)),
            grad_o=grad,
            grad_lse=dict(zip(of_kernel.branches, zeros, strict=True)),
            **saved,
        )

    def raw_both() -> None:
        whole([*call.tensors, where.table])
        backward([*of_backward, where.table])

    timed: dict[str, Callable[[], Any]] = {
        "driver": lambda: driver(**left_out),
        "raw": lambda: forward([*call.tensors, where.table]),
        "call": lambda: kernel(**x),
        "raw recorded": lambda: whole([*call.tensors, where.table]),
        "driver recorded": lambda: driver(kept),
        "driver both": driver_both,
        "raw both": raw_both,
    }
    if forward is None:
        del timed["raw"]
    if whole is None:
        del timed["raw recorded"]
    if whole is None or backward is None:
        del timed["raw both"]
    with torch.no_grad():
        found = {name: host_time(f, rounds) for name, f in timed.items()}

    def operator() -> Any:
        return operators.forward(kernel._key, *call)

    there = [torch.zeros_like(each) for each in leaves.values()]

    def nothing() -> Any:
        return _Nothing.apply(o, there, *leaves.values())

    found["autograd"] = host_time(lambda: both(nothing), rounds)
    found["recorded"] = host_time(lambda: kernel(**leaves), rounds)
    found["operator"] = host_time(operator, rounds)
    found["both"] = host_time(lambda: both(lambda: kernel(**leaves)), rounds)
    found["both, operators"] = host_time(lambda: both(lambda: operator()[0]), rounds)
    return found


def above(times: Mapping[str, float]) -> str:
    """What calls take above their launches, or where these are not recorded above the driver's."""
    said: list[str] = []
    for name, least in (("call", "raw"), ("recorded", "raw recorded"), ("both", "raw both")):
        base = least if least in times else least.replace("raw", "driver")
        words = f"{name} {times[name] - times[base]:.1f}"
        said.append(words if base == least else f"{words} ({base}: not recorded)")
    return "above  " + "  ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", default="moba,nsa")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("-o", type=Path)
    options = parser.parse_args()
    systems = options.systems.split(",")
    found = {system: measure(load_kernel(system), options.tokens) for system in systems}
    for system, times in found.items():
        print(system, "  ".join(f"{name} {value:.1f}" for name, value in times.items()))
        print(f"  {above(times)}")
    if options.o:
        card = torch.cuda.get_device_name()
        options.o.write_text(json.dumps({"card": card, "microseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
