"""Plans and sources of specs as tests want them: a fixed target and provenance, small calls."""

import functools
from dataclasses import replace

import pytest
import sanitizer
import torch
from conformance import systems

from hsgen import batch, build, configs, emit, passes, pipeline, planner, schedule
from hsgen.errors import BuildError
from hsgen.reference import tensor_shapes
from hsgen.target import H100

SHIPPED = [*systems.KERNELS, "sparse_mla"]  # and an example that no shipped spec is like
SIXTEEN = replace(H100, peak_fp8=0.0)  # a Hopper whose units take no bytes, as other cards' do not


def graph(spec):
    return passes.run(planner.plan(spec))


@functools.cache
def shipped_plan(name):
    """The plan of a shipped spec for an H100 and bf16."""
    return schedule.schedule(graph(systems.load(name)), H100)


def sources(plan, digest="0" * 64):
    """The text of every file of a plan, with a header that no release changes."""
    origin = emit.Provenance(version="0.0.0", spec=plan.name, digest=digest, target=plan.target)
    return emit.render(plan, origin)


def body(text):
    """A module without its header."""
    lines = text.splitlines(keepends=True)
    assert all(line.startswith("# ") for line in lines[:4])
    return "".join(lines[4:])


def tensors(spec, tokens, dtype=torch.float32):
    """Random tensors of one sequence for every input of a spec."""
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(spec, 1, tokens, tokens)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def run(artifact, given):
    """One dense call of an artifact's kernels in the interpreter, sanitized.  -> o, lse, selection"""
    plan = configs.for_interpreter(artifact.plan)
    config = {kernel.name: kernel.config.keywords() for kernel in plan.kernels}
    sequences, tokens = given["q"].shape[:2]
    where = batch.dense(sequences, tokens, given["k"].shape[1], given["q"].device)
    driver = build.load(artifact.module).driver
    with sanitizer.enabled():
        return driver.forward(given, where, config, None)


def compiled(edited, spec):
    """A graph compiled for tests: full precision."""
    return pipeline.compile_graph(edited, spec, H100, "fp32")


def _compiles_for_amd():
    try:
        return bool(build.triton_version("hip"))
    except BuildError:
        return False


needs_amd = pytest.mark.skipif(not _compiles_for_amd(), reason="Triton is too old for AMD cards")
