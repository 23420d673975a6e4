"""compile_spec: the stages in order, on one screen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import cast

from hsgen import backward, build, configs, emit, losses, passes, planner, resources, schedule
from hsgen.configs import DType, Sizes, Work
from hsgen.errors import ArgumentError
from hsgen.graph import Graph
from hsgen.plan import Cached, Plan
from hsgen.resources import Job
from hsgen.schedule import Order
from hsgen.spec import Spec
from hsgen.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compiled spec: what it means, how it runs, and the files that run it."""

    spec: Spec
    target: Target
    graph: Graph
    plan: Plan
    module: build.Module

    @property
    def sources(self) -> Mapping[str, str]:
        """Text of every emitted file."""
        return self.module.sources


def compile_spec(
    spec: Spec,
    target: Target,
    dtype: DType = "bf16",
    orders: Mapping[str, Order] | None = None,
    cached: Cached | None = None,
    *,
    apart: bool = False,
) -> Artifact:
    """Compile one spec for one GPU, which need not be there.  The whole of hsgen, in order.

    `orders`, `cached` and `apart` are what `schedule` takes.

    Raises:
        PlanError: no kernel can do it.
        BuildError: the emitted files cannot be kept.
    """
    graph = passes.run(planner.plan(spec))
    return compile_graph(graph, spec, target, dtype, orders, cached, apart=apart)


def compile_graph(
    graph: Graph,
    spec: Spec,
    target: Target,
    dtype: DType = "bf16",
    orders: Mapping[str, Order] | None = None,
    cached: Cached | None = None,
    *,
    apart: bool = False,
) -> Artifact:
    """As compile_spec, from a graph: the one a spec gives, or one edited by hand."""
    plan = schedule.schedule(graph, target, dtype, orders, cached, apart=apart)
    sources = emit.render(plan, provenance(spec, target))
    key = {
        "hsgen": hsgen_version(),
        "spec": spec.digest,
        "graph": hashlib.sha256(str(graph).encode()).hexdigest(),  # one edited by hand is another
        "target": target.name,
        "dtype": dtype,
        **({"streams": True} if target.streams else {}),
        **({"orders": dict(orders)} if orders else {}),
        **({"cached": asdict(cached)} if cached else {}),
        **({"apart": True} if apart else {}),
    }
    module = build.build(spec.name, sources, key)
    return Artifact(spec=spec, target=target, graph=graph, plan=plan, module=module)


def compile_backward(
    spec: Spec, target: Target, dtype: DType = "bf16", *, apart: bool = False
) -> Artifact:
    """Compile the gradients of one spec for one GPU: a module of their own.

    `apart`: the forward kept the outputs of gated branches.

    Raises:
        PlanError: something whose gradient no kernel makes yet.
        BuildError: the emitted files cannot be kept.
    """
    graph = passes.run(planner.plan(spec))
    plan = backward.plan(graph, target, dtype, apart=apart)
    sources = emit.render(plan, provenance(spec, target))
    key = {
        "hsgen": hsgen_version(),
        "spec": spec.digest,
        "graph": hashlib.sha256(str(graph).encode()).hexdigest(),
        "target": target.name,
        "dtype": dtype,
        "of": "backward",
        **({"apart": True} if apart else {}),
        **({"streams": True} if target.streams else {}),
    }
    module = build.build(f"{spec.name}_backward", sources, key)
    return Artifact(spec=spec, target=target, graph=graph, plan=plan, module=module)


def compile_losses(
    spec: Spec, target: Target, dtype: DType = "bf16", *, gradients: bool = False
) -> Artifact:
    """Compile the losses of one spec for one GPU, or their gradients beside them: a module of their own.

    Raises:
        PlanError: a loss that no kernel computes yet.
        BuildError: the emitted files cannot be kept.
    """
    graph = passes.run(planner.plan(spec))
    plan = losses.plan(graph, target, dtype, gradients=gradients)
    sources = emit.render(plan, provenance(spec, target))
    key = {
        "hsgen": hsgen_version(),
        "spec": spec.digest,
        "graph": hashlib.sha256(str(graph).encode()).hexdigest(),
        "target": target.name,
        "dtype": dtype,
        "of": "losses and gradients" if gradients else "losses",
    }
    module = build.build(f"{spec.name}_losses", sources, key)
    return Artifact(spec=spec, target=target, graph=graph, plan=plan, module=module)


def compile_work(
    spec: Spec,
    target: Target,
    dtype: DType = "bf16",
    work: Work = "forward",
    orders: Mapping[str, Order] | None = None,
    sizes: Sizes | None = None,
) -> Artifact:
    """A call's kernels, those of its gradients, as a call that autograd records gets them, or those of steps
    behind a cache, of some `sizes`; of no loss.

    Raises:
        ArgumentError: orders of gradients or of steps, which have but one.
        PlanError: no kernel can do it.
        BuildError: the emitted files cannot be kept.
    """
    spec = planner.without_losses(spec)
    if work == "forward":
        return compile_spec(spec, target, dtype, orders)
    if orders:
        raise ArgumentError(f"orders: expected none of {work}, got {dict(orders)}")
    if work == "decode":
        assert sizes is not None, "a step has sizes"
        cached = Cached(rows="few", page=sizes.page)
        made = compile_spec(spec, target, dtype, cached=cached)
        return replace(made, plan=configs.for_steps(made.plan, sizes))
    apart = backward.keeps_branches(passes.run(planner.plan(spec)))
    return compile_backward(spec, target, dtype, apart=apart)


def call_jobs(artifact: Artifact, sizes: Sizes | None = None) -> tuple[Job, ...]:
    """What to cross-compile of it, one a kernel, as `resources.call_jobs` says; `sizes`: of steps."""
    if sizes is not None:
        return resources.step_jobs(artifact.plan, artifact.module, artifact.target, sizes)
    before = None
    if artifact.plan.gradients and not artifact.plan.losses:
        graph, target, dtype = artifact.graph, artifact.target, cast("DType", artifact.plan.dtype)
        apart = backward.keeps_branches(graph)
        before = schedule.schedule(graph, target, dtype, apart=apart)
    return resources.call_jobs(artifact.plan, artifact.module, artifact.target, before)


def filling_jobs(spec: Spec, target: Target, dtype: DType, sizes: Sizes) -> tuple[Job, ...]:
    """The same of the kernels that put many tokens at a time into a cache."""
    cached = Cached(rows="many", page=sizes.page)
    made = compile_spec(spec, target, dtype, cached=cached)
    names = {launch.kernel for step in made.plan.appends for launch in step.launches}
    kernels = tuple(kernel for kernel in made.plan.kernels if kernel.name in names)
    plan = replace(made.plan, kernels=kernels, steps=())
    return resources.step_jobs(plan, made.module, target, replace(sizes, tokens=sizes.keys))


def provenance(spec: Spec, target: Target) -> emit.Provenance:
    """What the header of every emitted file says."""
    return emit.Provenance(
        version=hsgen_version(), spec=spec.name, digest=spec.digest, target=target.label
    )


@lru_cache(maxsize=1)
def hsgen_version() -> str:
    """The installed version."""
    try:
        return version("hsgen")
    except PackageNotFoundError:  # imported from a checkout that is not installed
        return "0.0.0"
