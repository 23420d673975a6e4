"""How good the configurations are that kernels start from, before any tuning: one kernel at a time.

    python -m benchmarks.starts --capture FILE [--budget 300]

For every kernel of the shipped three systems, the longest-running first, one value after another is
changed and kept where that kernel's own time on the device falls by more than the noise.  A variant whose
output differs from the start's is recorded as wrong and not timed.  This is no tuner: it asks whether
hsgen.configs guesses well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

import hsgen
from benchmarks import common
from benchmarks.common import Json
from hsgen import captures, samples, timing
from hsgen.passes import run
from hsgen.planner import plan as graph
from hsgen.schedule import schedule
from hsgen.spec import load
from hsgen.target import Target

SYSTEMS = ("moba", "hisa", "nsa")
NOISE = 0.03  # of the time: less is no gain
TOLERANCE = 1e-2
SAME = 0.999  # of the selected entries: another tile may round a score otherwise

Values = dict[str, int]


def variants(start: Values, name: str) -> Iterator[Values]:
    """The start with one value changed: halved, doubled, four times; BLOCK_M follows BLOCK_T."""
    if name == "BLOCK_M":
        return
    if name == "num_stages":
        yield from ({name: n} for n in (1, 2, 3, 4, 5) if n != start[name])
        return
    if name == "num_warps":
        yield from ({name: n} for n in (1, 2, 4, 8, 16) if n != start[name])
        return
    for value in (start[name] // 4, start[name] // 2, start[name] * 2, start[name] * 4):
        if value < 1 or (name == "BLOCK_N" and value < 16):
            continue
        if name == "BLOCK_T" and "BLOCK_M" in start:
            yield {name: value, "BLOCK_M": max(16, start["BLOCK_M"] * value // start[name])}
        else:
            yield {name: value}


class Search:
    """The kernels of one spec on one input."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], deadline: float) -> None:
        """Run the start once: its output and selection are what every variant must give."""
        self.spec, self.tensors, self.deadline = load(name), tensors, deadline
        self.skipped = 0
        plan = schedule(run(graph(self.spec)), Target.current(), "bf16")
        self.start: dict[str, Values] = {k.name: k.config.keywords() for k in plan.kernels}
        kernel = hsgen.load_kernel(self.spec)
        self.expected, self.selection = kernel(**tensors).float(), kernel.select(**tensors)

    def right(self, kernel: hsgen.Kernel) -> bool:
        """Whether a variant selects the same and computes nearly the same."""
        chosen = kernel.select(**self.tensors)
        same = (chosen[n].indices == s.indices for n, s in self.selection.items())
        if min(float(each.float().mean()) for each in same) < SAME:
            return False
        o = kernel(**self.tensors, selection=self.selection).float()
        return bool((o - self.expected).norm() < TOLERANCE * self.expected.norm())

    def milliseconds(self, name: str, values: Values) -> tuple[float | None, str]:
        """Time of one kernel with a configuration of its own, or what is wrong with it."""
        if time.monotonic() > self.deadline:
            self.skipped += 1
            return None, "no time left"
        kernel = hsgen.load_kernel(self.spec, config={name: values})
        try:
            if not self.right(kernel):
                return None, "wrong"
            found = timing.kernel_times(lambda _number: kernel(**self.tensors))
        except Exception as error:  # noqa: BLE001 - what does not run is a result
            return None, f"{type(error).__name__}: {error}"[:120]
        return found.get(name), "ok"

    def improve(self, name: str) -> Json:
        """Change one value after another, keep what helps."""
        best = dict(self.start[name])
        start, _ = self.milliseconds(name, best)
        least, tried = start, []
        for key in [k for k in ("BLOCK_N", "BLOCK_R", "BLOCK_E", "BLOCK_T") if k in best] + [
            "num_warps",
            "num_stages",
        ]:
            for change in list(variants(best, key)):
                ms, status = self.milliseconds(name, best | change)
                tried.append({**best, **change, "ms": ms, "status": status})
                if ms is not None and least is not None and ms < least * (1 - NOISE):
                    least, best = ms, best | change
        return {
            "start": self.start[name],
            "start_ms": start,
            "best": best,
            "best_ms": least,
            "tried": tried,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Search every kernel, the longest-running first, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts")
    parser.add_argument("--capture", type=Path, default=common.SHIPPED_CAPTURE)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--budget", type=float, default=300, help="seconds, shared by the systems")
    parser.add_argument("--kernels", nargs="+", metavar="SYSTEM/KERNEL", help="these alone")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    words = ["--capture", args.capture.name, "--tokens", str(args.tokens)]
    words += ["--kernels", *args.kernels] if args.kernels else []
    result = common.provenance("benchmarks.starts", words, "cuda")
    result |= {"tokens": args.tokens, "inputs": "real", "kernels": {}}
    groups, began = captures.load(args.capture), time.monotonic()
    asked = args.kernels or []
    systems = [name for name in SYSTEMS if not asked or name in {x.split("/")[0] for x in asked}]
    for number, name in enumerate(systems):
        tensors = samples.make(load(name), "real", args.tokens, "cuda", 0, groups)
        deadline = began + args.budget * (number + 1) / len(systems)
        search, kernel = Search(name, tensors, deadline), hsgen.load_kernel(name)
        times = timing.kernel_times(lambda _number: kernel(**tensors))  # noqa: B023
        searched = [n for n in times if n in search.start and n != "index_selected"]
        for each in [n for n in searched if not asked or f"{name}/{n}" in asked]:
            found = search.improve(each)
            result["kernels"][f"{name}/{each}"] = found
            print(f"{name}/{each}: {found['start_ms']} -> {found['best_ms']} {found['best']}")
        result["kernels"][f"{name}/skipped"] = search.skipped
        common.write_json(
            args.output / f"starts_{common.slug(result['card'])}_{result['date']}.json", result
        )


if __name__ == "__main__":
    main()
