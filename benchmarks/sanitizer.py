"""Specs of all of tier A under NVIDIA's compute-sanitizer: no access out of bounds, none that races.

    python -m benchmarks.sanitizer -o OUT                      # memcheck
    python -m benchmarks.sanitizer --tool racecheck --specs nsa moba hisa -o OUT

A spec is a process: it runs the small trials of `hsgen.trials` on the card, held against the reference as
well, PyTorch's pool of memory switched off so that every tensor ends where it ends.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import common
from benchmarks.common import Json

SPECS = (
    "nsa", "nsa_fla", "nsa_xunhao", "fsa", "moba", "hisa", "quest", "infllm_v2", "minimax_m3",
    "dsa", "dsa_gqa", "glm_kpool", "dhsa_released", "hip", "hirouter", "psa", "psa_mass",
    "seer_attention", "seer_attention_r", "xattention", "vsa", "hydra", "biformer", "draft_attention",
    "deepseek_hca", "qwen_qsa", "kinetics", "small_thinker", "sqa", "sparge", "pbs_attn", "gna",
)  # fmt: skip
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (.*)")
CLEAN = re.compile(r"^0 (errors|hazards)")
DIED = "no summary"


def child(name: str, *, device: str = "cuda") -> int:
    """Run a spec's trials, on a CPU in Triton's interpreter.  -> how many things are wrong"""
    import torch

    from hsgen import trials
    from hsgen.runtime import compile_program
    from hsgen.spec import load
    from hsgen.standins import bind
    from hsgen.target import Target

    spec = load(name)
    spec = spec if spec.heads and spec.head_dim else bind(spec, query=8, kv=2, dim=64)
    interpret = device == "cpu"
    wrong, target = 0, Target.named("h100") if interpret else Target.current()
    for trial in trials.trials(spec):
        if trial.dtype == torch.float32 and trial.numbers != "integers":
            continue
        program = compile_program(trial.spec, target, trial.dtype, interpret=interpret)
        with trials.poisoned():
            problems = trials.Examination(trial, device).problems(program, program.config)
        print(trial.name, problems or "right", flush=True)
        wrong += len(problems)
    return wrong


def examine(name: str, tool: str, seconds: float) -> Json:
    """One spec under the tool.  -> what it said"""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "benchmarks.sanitizer", "--child", name]
    began = time.monotonic()
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"said": f"not done in {seconds:g} s", "clean": False, "trials": 0}
    output = done.stdout + done.stderr
    found = SUMMARY.search(output)
    said = found[2].strip() if found else DIED
    clean = found is not None and CLEAN.match(said) is not None and done.returncode == 0
    entry: Json = {"said": said, "clean": clean, "trials": output.count(" right\n")}
    if not clean:
        lines = [
            line for line in output.splitlines() if line.startswith("=====") or "Error" in line
        ]
        entry["lines"] = [line[:200] for line in lines[:40]]
        entry["tail"] = output[-600:]
    return entry | {"seconds": round(time.monotonic() - began, 1)}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run specs under compute-sanitizer.")
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument(
        "--tool", choices=("memcheck", "racecheck", "synccheck"), default="memcheck"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="of a spec")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """All specs at once; 0 if every one is clean."""
    args = arguments(argv)
    if args.child:
        return min(child(args.child), 8)
    made = common.provenance("benchmarks.sanitizer", sys.argv[1:] if argv is None else argv, "cuda")
    with ThreadPoolExecutor(args.at_once) as pool:
        found = list(pool.map(lambda name: examine(name, args.tool, args.seconds), args.specs))
    data = {"runs": [made], "tool": args.tool, "specs": dict(zip(args.specs, found, strict=True))}
    path = args.output / f"sanitizer_{args.tool}_{common.slug(made['card'])}_{made['date']}.json"
    common.write_json(path, data)
    for name, entry in data["specs"].items():
        print(f"{name:16} {entry['trials']} trials, {entry['said']}, {entry.get('seconds')} s")
        for line in entry.get("lines", [])[:6]:
            print("   ", line)
    return 0 if all(entry["clean"] for entry in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
