"""Forward and backward of sparse attention beside dense attention's, gradients checked before their time.

    python -m benchmarks.backward --device cuda --budget 560 -o OUT
    python -m benchmarks.backward --device cuda --stages tiles --tokens 32768 --systems moba -o OUT
    python -m benchmarks.backward --resume OUT/backward_CARD_DATE.json ...     # keeps finished steps

The stage `tiles` times the kernels of gradients with other tiles than those they start from.  Every step of
every case stands alone: what fails is written down, and results are on disk after each step.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks import common, speed
from hsgen import backward, baselines, captures, checking, passes, planner, standins, timing
from hsgen.checking import CheckError, Figures
from hsgen.measure import Setting, Tensors
from hsgen.quality import Json
from hsgen.reference import reference
from hsgen.runtime import Kernel, load_kernel
from hsgen.selection import ListSelection
from hsgen.spec import Spec
from hsgen.target import Target

SYSTEMS = ("moba", "nsa")
STAGES = ("hsgen", "dense", "tiles")
SECONDS = 1.0  # of timing, a measurement
SMALL = 2500  # tokens of the check of all rows, which holds all logits in float64
TOLERANCE = 2e-2  # of each gradient beside its own size: bf16, of two products in a row
# rows a tile, keys a tile, warps, stages
TILES = (
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (32, 64, 4, 2),
    (32, 64, 8, 2),
    (64, 32, 4, 2),
    (64, 32, 4, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 2),
    (64, 128, 8, 2),
    (32, 128, 8, 2),
    (128, 128, 8, 2),
)


# hsgen itself ---------------------------------------------------------------------------------------


def leaves(tensors: Tensors) -> Tensors:
    """The same numbers, which require grad."""
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def gradients(kernel: Kernel, x: Tensors, grad: Tensor) -> dict[str, Tensor]:
    """Of every tensor."""
    o = kernel(**x)
    assert isinstance(o, Tensor), "no log-sum-exp was asked for"
    return dict(zip(x, torch.autograd.grad(o, list(x.values()), grad), strict=True))


def check(spec: Spec, tensors: Tensors, runs: Sequence[tuple[int, int]]) -> Figures:
    """Gradients of the outputs of some rows against float64, on the kernels' own choice; twice the same."""
    kernel, x = load_kernel(spec), leaves(tensors)
    with torch.no_grad():
        chosen = kernel.select(**tensors)
    worst = dict.fromkeys(tensors, 0.0)
    for a, b in runs:
        grad = torch.zeros(tensors["q"].shape[:3] + tensors["v"].shape[3:]).to(tensors["q"])
        grad[:, a:b] = torch.randn(grad[:, a:b].shape, device=grad.device)
        found, again = gradients(kernel, x, grad), gradients(kernel, x, grad)
        for name, each in found.items():
            if not torch.equal(each, again[name]):
                raise CheckError(f"gradient of {name}: other bits in a second run")
        expected = _expected(spec, tensors, (a, b), chosen, grad[:, a:b])
        # what shifts all logits of a row alike has no gradient but rounding
        least = 1e-9 * max(float(each.norm()) for each in expected.values())
        for name, each in expected.items():
            of = found[name]
            if of.shape != each.shape:  # rows of queries, or keys up to the last row
                of = of[:, a:b] if each.shape[1] == b - a else of[:, :b]
            outside = float(found[name].double().norm() ** 2 - of.double().norm() ** 2)
            error = float((of.double() - each).norm() ** 2) + max(outside, 0.0)
            size = float(each.norm())
            worst[name] = max(worst[name], error**0.5 / (size if size > least else 1e9 * least))
    if not max(worst.values()) < TOLERANCE:
        raise CheckError(f"relative errors of gradients {worst}, expected below {TOLERANCE}")
    return {"errors": worst, "rows": sum(b - a for a, b in runs)}


def _expected(
    spec: Spec,
    tensors: Tensors,
    rows: tuple[int, int],
    chosen: dict[str, ListSelection],
    grad: Tensor,
) -> dict[str, Tensor]:
    """Gradients in float64 of the tensors as those rows see them."""
    a, b = rows
    part = standins.rows_of(spec, tensors, a, b)
    part = {name: x.detach().double().requires_grad_() for name, x in part.items()}
    given = {
        name: ListSelection(level=name, indices=s.indices[:, a:b]) for name, s in chosen.items()
    }
    o = reference(spec, part, selection=given, q_offset=a, keep_scores=False).o
    found = torch.autograd.grad(
        o, list(part.values()), grad.double(), allow_unused=True, materialize_grads=True
    )
    return dict(zip(part, found, strict=True))


def run_hsgen(bench: speed.Bench, case: speed.Case) -> None:
    """Check, then time forward, and forward and backward, then kernels and memory."""
    journal, name, spec = bench.journal, case.name, case.spec
    setting = bench.of(case)
    steps = ("forward", "both", "kernels", "memory")
    if all(journal.done(name, step) for step in ("check small", "check", *steps)):
        return
    small = min(SMALL, case.tokens)
    if not journal.run(name, "check small", lambda: check_small(setting, spec, small)):
        return
    tensors = setting.make(spec, case.tokens, 0)
    runs = checking.sampled(spec, case.tokens)
    if not journal.run(name, "check", lambda: check(spec, tensors, runs)):
        return
    kernel, x = setting.load(spec), leaves(tensors)
    grad = torch.randn_like(kernel(**tensors))

    def forward(_number: int) -> object:
        return kernel(**x)

    def both(_number: int) -> object:
        return gradients(kernel, x, grad)

    journal.run(name, "forward", lambda: setting.time(forward))
    journal.run(name, "both", lambda: setting.time(both))
    if setting.device == "cuda":
        journal.run(name, "kernels", lambda: {"ms": timing.kernel_times(both)})
        journal.run(name, "memory", lambda: memory(setting, both, tensors))


def check_small(setting: Setting, spec: Spec, tokens: int) -> Figures:
    """Every row of a short input, of the same group with one key head: all that differs is the grid."""
    heads = spec.heads
    assert heads is not None
    kv = 1 if heads.group > 1 else 2
    few = heads.model_copy(update={"query": kv * heads.group, "kv": kv})
    one = spec.model_copy(update={"heads": few})
    return check(one, setting.make(one, tokens, 10), [(0, tokens)])


def memory(setting: Setting, both: timing.Call, tensors: Tensors) -> Figures:
    """Bytes of inputs, and of a call at its peak above them."""
    return setting.weigh(both) | {"inputs": sum(x.nbytes for x in tensors.values())}


# Dense attention ------------------------------------------------------------------------------------


def run_dense(bench: speed.Bench, case: speed.Case) -> None:
    """Dense causal attention on the same q, k, v, every way that PyTorch has."""
    journal, setting = bench.journal, bench.of(case)
    made = setting.make(case.spec, case.tokens, 0)
    tensors = made["q"], made["k"], made["v"]
    del made
    for variant in speed.contenders(journal, case, baselines.variants(case.spec, setting.device)):
        both, forward = dense(variant, *tensors)
        step = f"dense {variant.name}"
        journal.run(case.name, f"forward of {step}", lambda call=forward: setting.time(call))
        journal.run(case.name, step, lambda call=both: setting.time(call) | setting.weigh(call))


def dense(
    variant: baselines.Variant, q: Tensor, k: Tensor, v: Tensor
) -> tuple[timing.Call, timing.Call]:
    """Forward and backward of a variant, and its forward; padding and copies of heads are made before."""
    if variant.pad:
        v = pad(v, (0, q.shape[-1] - v.shape[-1]))
    if variant.expand:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    x = [each.transpose(1, 2).detach().requires_grad_() for each in (q, k, v)]
    gqa = x[0].shape[1] != x[1].shape[1]
    grad = torch.randn(*q.shape[:3], v.shape[-1]).to(q).transpose(1, 2)

    def forward(_number: int) -> Tensor:
        if variant.backend is None:
            return scaled_dot_product_attention(*x, is_causal=True, enable_gqa=gqa)
        with sdpa_kernel(variant.backend):
            return scaled_dot_product_attention(*x, is_causal=True, enable_gqa=gqa)

    def both(number: int) -> object:
        return torch.autograd.grad(forward(number), x, grad)

    return both, forward


# Tiles ----------------------------------------------------------------------------------------------


def run_tiles(bench: speed.Bench, case: speed.Case) -> None:
    """Each kernel of gradients with other tiles, alone: the profiler's time of it in a whole call."""
    journal, setting, spec = bench.journal, bench.of(case), case.spec
    tensors = setting.make(spec, case.tokens, 0)
    x = leaves(tensors)
    grad = torch.randn_like(setting.load(spec)(**tensors))
    for kernel, values in _points(spec):
        words = " ".join(f"{key}={value}" for key, value in values.items())
        action = functools.partial(_time_tiles, spec, kernel, values, x, grad)
        journal.run(case.name, f"{kernel} {words}", action)


def _time_tiles(
    spec: Spec, kernel: str, values: dict[str, int], x: Tensors, grad: Tensor
) -> Figures:
    attn = load_kernel(spec, config={kernel: values})
    times = timing.kernel_times(lambda _: gradients(attn, x, grad))
    return {"kernel_ms": times[kernel]}


def _points(spec: Spec) -> Iterator[tuple[str, dict[str, int]]]:
    """Kernels of gradients with their tiles, and of lists their chunks."""
    plan = backward.plan(passes.run(planner.plan(spec)), Target.current())
    for kernel in plan.kernels:
        start = dict(kernel.config.constexprs)
        if kernel.name.partition("_")[0] not in ("dq", "dkv") or "BLOCK_M" not in start:
            continue
        heads = max(1, start["BLOCK_M"] // start["BLOCK_T"])
        block = getattr(kernel.context, "size", kernel.context.stride)  # of one that is chosen
        for rows, keys, warps, stages in TILES:
            if rows >= heads and not 1 < block < keys:
                tiles = {"BLOCK_T": rows // heads, "BLOCK_M": rows, "BLOCK_N": keys}
                yield kernel.name, {**tiles, "num_warps": warps, "num_stages": stages}
        if "BLOCK_C" in start:
            for chunk in (512, 2048, 4096):
                yield kernel.name, {"BLOCK_C": chunk}


# Command line ---------------------------------------------------------------------------------------


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every stage of every case."""
    made = common.provenance("benchmarks.backward", argv, args.device)
    path = args.output / f"backward_{common.slug(made['card'])}_{made['date']}.json"
    journal = speed.Journal(path=path, deadline=time.monotonic() + args.budget)
    if args.resume:
        journal.data = common.read_json(args.resume)
    journal.data["runs"].append(made | {"capture": args.capture.name})
    groups = captures.load(args.capture)
    setting = Setting(device=args.device, kind="random", groups=groups, seconds=args.seconds)
    bench = speed.Bench(setting=setting, journal=journal)
    stages: dict[str, Callable[[speed.Bench, speed.Case], None]]
    stages = {"hsgen": run_hsgen, "dense": run_dense, "tiles": run_tiles}
    for stage in args.stages:
        for case in _cases(args):
            journal.case(case.name, case.facts())
            try:
                stages[stage](bench, case)
            except Exception as error:  # noqa: BLE001 - outside any step: while making inputs, say
                journal.run(case.name, f"{stage} set-up", functools.partial(_raise, error))
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return path


def _raise(error: Exception) -> Figures:
    raise error


def _cases(args: argparse.Namespace) -> Iterator[speed.Case]:
    for tokens in args.tokens:
        for system in args.systems:
            heads = tuple(args.heads) if args.heads else None
            yield speed.Case(
                system=system, tokens=tokens, kind=args.inputs, heads=heads, dim=args.dim
            )


def table(data: Json) -> str:
    """A row a case: milliseconds of both passes, and those of the fastest dense attention."""
    head = ["system, tokens", "forward", "both", "dense", "dense / both", "peak MiB"]
    rows = []
    for case in data["cases"].values():
        steps = {n: s for n, s in case["steps"].items() if s["status"] == "ok"}
        ms = {n: s["ms"]["median"] for n, s in steps.items() if "median" in s.get("ms", {})}
        best = min((t for n, t in ms.items() if n.startswith("dense ")), default=None)
        both = ms.get("both")
        peak = steps.get("memory", {}).get("bytes")
        rows.append(
            [
                f"{case['system']}, {case['tokens']:,}",
                *(common.number(each) for each in (ms.get("forward"), both, best)),
                common.number(best / both if best and both else None),
                common.number(peak / 2**20 if peak else None),
            ]
        )
    return common.table(head, rows)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time gradients against dense attention's.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--inputs", choices=("random", "real"), default="real")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES[:2])
    parser.add_argument("--heads", type=int, nargs=2, help="query and kv, to try the script out")
    parser.add_argument("--dim", type=int, help="of a head, with --heads")
    parser.add_argument(
        "--capture", type=Path, default=common.SHIPPED_CAPTURE, help="of real heads"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, a measurement")
    parser.add_argument(
        "--budget", type=float, default=3600.0, help="seconds, no step begins later"
    )
    parser.add_argument("--resume", type=Path, help="results whose finished steps are kept")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results."""
    args = arguments(argv)
    path = run(args, sys.argv[1:] if argv is None else argv)
    print(table(common.read_json(path)))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
