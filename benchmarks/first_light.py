"""Do the emitted kernels of the shipped specs run on this card, right and how fast?

python -m benchmarks.first_light [--tokens 8192]
"""

import argparse
import time

import torch

from hsgen import batch, build, pipeline, spec, target
from hsgen.reference import reference, tensor_shapes


def tensors(s, T, dtype=torch.bfloat16):
    g = torch.Generator(device="cuda").manual_seed(0)
    x = {}
    for name, shape in tensor_shapes(s, 1, T, T).items():
        t = torch.randn(shape, generator=g, device="cuda")
        if name.endswith("weight"):
            t *= (shape[-1] * shape[1]) ** -0.5
        if name == "gates":
            t = t.sigmoid()
        x[name] = t.to(dtype)
    return x


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 8192])
    parser.add_argument("--specs", nargs="*", default=["moba", "nsa", "hisa"])
    options = parser.parse_args()
    goal = target.Target.named("h100")
    for name in options.specs:
        s = spec.load(name)
        try:
            t0 = time.time()
            made = pipeline.compile_spec(s, goal)
            driver = build.load(made.module).driver
            print(name, f"emitted in {time.time() - t0:.2f} s", flush=True)
            for T in options.tokens:
                run(s, driver, T)
        except Exception as error:  # noqa: BLE001 - the next spec may run
            import traceback

            traceback.print_exc()
            print(name, "FAILED", str(error)[:500], flush=True)


def run(s, driver, T):
    x = tensors(s, T)
    b = batch.dense(1, T, T, torch.device("cuda"))
    t0 = time.time()
    o, lse, sel = driver.forward(x, b, driver.CONFIG)
    torch.cuda.synchronize()
    cold = time.time() - t0
    line = f"{s.name} T={T} cold {cold:.1f} s"
    if T <= 2048:
        r = reference(s, x, selection=sel, keep_scores=False)
        e = (o.double() - r.o).abs()
        line += f" max err {e.max():.2e} ref max {r.o.abs().max():.2f}"
        line += " lse " + " ".join(
            f"{n}:{(l.double() - r.lse[n]).nan_to_num(0, 0, 0).abs().max():.1e}"
            for n, l in lse.items()
        )
        full = reference(s, x, keep_scores=False)
        for level, ix in sel.items():
            differing = (ix != full.selection[level].indices).any(-1)
            line += f" {level} rows differing {differing.float().mean():.4f}"
    times = []
    for _ in range(5):
        a, z = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        driver.forward(x, b, driver.CONFIG)
        z.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(z))
    line += f" median {sorted(times)[2]:.2f} ms"
    print(line, flush=True)
    if T >= 8192:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            driver.forward(x, b, driver.CONFIG)
            torch.cuda.synchronize()
        for e in sorted(prof.key_averages(), key=lambda e: -e.device_time_total)[:9]:
            print(f"    {e.key[:40]:40} {e.device_time_total / 1e3:9.3f} ms x{e.count}", flush=True)


main()
