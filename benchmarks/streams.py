"""Kernels whose keys come in a stream, beside the loops that they stand for: one card, one run.

    python -m benchmarks.streams --capture FILE -o OUT

Needs a Hopper card.  Each system's call is checked against the reference, then both programs' outputs
against one another, then whole calls and kernels are timed.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import hsgen
from benchmarks import common
from benchmarks.common import Json
from hsgen import captures, checking, samples, timing
from hsgen.errors import ArgumentError
from hsgen.samples import Kind
from hsgen.spec import Spec, load
from hsgen.target import Target

SYSTEMS = ("nsa", "infllm_v2", "dsa_gqa", "examples/block_lists.yaml")
TOKENS = (8192, 32768, 131072)
ALIKE = 2e-2  # of outputs that chose for themselves, in bf16
SECONDS = 0.5  # of timing a whole call


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every system and length; results are on disk after each."""
    target = Target.current()
    if not target.streams:
        raise ArgumentError(
            f"{target.name}: nothing streams here; a Hopper card, Triton 3.6 to 3.8"
        )
    made = common.provenance("benchmarks.streams", argv, "cuda")
    path = args.output / f"streams_{common.slug(made['card'])}_{made['date']}.json"
    groups = captures.load(args.capture)
    data: Json = {"runs": [made], "cases": {}}
    for name in args.systems:
        spec = load(str(common.ROOT / name) if "/" in name else name)
        for tokens in args.tokens:
            found = checking.attempt(
                lambda spec=spec, tokens=tokens: case(spec, tokens, args.inputs, groups, target)
            )
            data["cases"][f"{spec.name}/{tokens}/{args.inputs}"] = found
            common.write_json(path, data)
            said = found["streams"]["ms"] if found["status"] == "ok" else found["reason"]
            print(spec.name, tokens, said, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    return path


def case(
    spec: Spec, tokens: int, kind: Kind, groups: Sequence[captures.Group], target: Target
) -> Json:
    """Both programs of a spec on the same tensors."""
    x = samples.make(spec, kind, tokens, "cuda", 0, groups)
    kernels = {
        "streams": hsgen.load_kernel(spec),
        "rows": hsgen.load_kernel(spec, target=replace(target, streams=False)),
    }
    outputs: dict[str, Tensor] = {}
    found: Json = {}
    with torch.no_grad():
        for name, kernel in kernels.items():
            outputs[name] = kernel(**x)
            runs = checking.sampled(spec, tokens)
            found[name] = checking.compare(spec, x, outputs[name], kernel.select(**x), runs)
        found["error"] = checking.relative(outputs["streams"], outputs["rows"])
        if not found["error"] < ALIKE:
            raise checking.CheckError(f"relative error {found['error']:.2g} beside `rows`")
        for name, kernel in kernels.items():
            whole = timing.time_calls(lambda _, kernel=kernel: kernel(**x), "cuda", SECONDS)
            found[name] |= {
                "ms": whole.median,
                "kernels": timing.kernel_times(lambda _, kernel=kernel: kernel(**x)),
            }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--inputs", choices=("real", "random"), default="real")
    parser.add_argument("--capture", type=Path, default=common.SHIPPED_CAPTURE)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    print(run(parser.parse_args(words), words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
