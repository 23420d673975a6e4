"""Who computes a call: emitted kernels, or the reference in float32 standing in for them.

A backend is a function Call -> Outcome.  A test of the suite itself gives a broken one.
"""

import functools
import importlib.util
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import sanitizer
import torch

from conformance import systems
from conformance.calls import Outcome
from hsgen import batch, configs, emit, passes, planner, schedule
from hsgen.execution import aligned
from hsgen.reference import reference, tensor_kinds
from hsgen.selection import to_list
from hsgen.target import Target


def stand_in(call):
    """The reference in float32, rounded as a kernel would."""
    result = reference(call.spec, call.tensors, **call.options, dtype=torch.float32)
    given = "selection" in call.options
    return Outcome(
        o=result.o.to(call.dtype),
        lse={name: t.float() for name, t in result.lse.items()},
        selection={
            name: to_list(s, width=None if given else _slots(call, name)).indices
            for name, s in result.selection.items()
        },
    )


def _slots(call, name):
    return systems.slots(call.spec, call.spec.level(name), call.keys)


def interpreter(call, *, seed=0, forced=None, orders=()):
    """The emitted kernels through Triton's interpreter, under the sanitizer.

    `seed` draws the order in which programs run; `forced`: other values of some kernels' tunables;
    `orders`: pairs of branch and loop order.
    """
    emitted = compiled(call.spec, call.dtype, orders)
    with sanitizer.enabled(seed=seed):
        return run(call, emitted.driver, _forced(emitted.quick, forced))


def cuda(call, *, forced=None, orders=()):
    """The emitted kernels on the GPU, as they are configured without tuning."""
    emitted = compiled(call.spec, call.dtype, orders, streams=_streams(call))
    return run(call, emitted.driver, _forced(emitted.driver.CONFIG, forced))


def _streams(call):
    """Whether keys come in a stream where they can: not where their rows begin anywhere."""
    tensors = {n: t[None] if call.packed and t.ndim > 1 else t for n, t in call.tensors.items()}
    return aligned(planner.plan(call.spec), tensors)


def _forced(config, values):
    return {name: each | (values or {}).get(name, {}) for name, each in config.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Emitted:
    """The driver of a spec, and a configuration for the interpreter."""

    driver: object
    quick: dict


_folder = tempfile.TemporaryDirectory(prefix="hsgen-conformance-")
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def compiled(spec, dtype, orders=(), *, streams=False):
    """A spec emitted and imported, once a session."""
    return _compiled(spec, dtype, orders, streams)


@functools.cache
def _compiled(spec, dtype, orders, streams):
    plan = _plan(spec, dtype, orders, streams=streams)
    quick = configs.for_interpreter(plan)
    return Emitted(
        driver=_import(plan, spec), quick={k.name: k.config.keywords() for k in quick.kernels}
    )


def _plan(spec, dtype, orders, *, streams=False):
    goal = Target.current() if torch.cuda.is_available() else Target.named("h100")
    goal = replace(goal, streams=goal.streams and streams)
    return schedule.schedule(passes.run(planner.plan(spec)), goal, NAMES[dtype], dict(orders))


def _import(plan, spec):
    """Write the modules of a plan, and import their driver."""
    package = f"conformance_{len(list(Path(_folder.name).iterdir()))}"
    provenance = emit.Provenance(
        version="0", spec=spec.name, digest=spec.digest, target=plan.target
    )
    folder = Path(_folder.name) / package
    folder.mkdir()
    for name, text in emit.render(plan, provenance).items():
        (folder / name).write_text(text, encoding="utf-8")
    places = [str(folder)]
    found = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=places
    )
    sys.modules[package] = importlib.util.module_from_spec(found)
    return importlib.import_module(f"{package}.driver")


def run(call, module, config):
    """Call a driver; outcomes come back in the shape of the call's tensors."""
    kinds = tensor_kinds(call.spec)
    tensors = dict(call.tensors)
    if call.packed:
        tensors = {n: t if kinds[n] == "parameter" else t[None] for n, t in tensors.items()}
    given = call.options.get("selection")
    if given is not None:
        given = {name: s[None] if call.packed else s for name, s in given.items()}
    o, lse, chosen = module.forward(tensors, _batch(call), config, given)
    chosen = {name: s for name, s in chosen.items() if s is not None}
    if call.packed:
        o, lse, chosen = (
            o[0],
            {n: t[0] for n, t in lse.items()},
            {n: s[0] for n, s in chosen.items()},
        )
    return Outcome(o=o, lse=lse, selection=chosen)


def _batch(call):
    options = {n: v for n, v in call.options.items() if n in ("q_offset", "kv_lens")}
    if call.packed:
        cu_q = call.options["cu_seqlens_q"]
        cu_k = call.options.get("cu_seqlens_k", cu_q)
        return batch.packed(cu_q, cu_k, call.tokens, call.keys, **options)
    B = call.tensors["q"].shape[0]
    return batch.dense(B, call.tokens, call.keys, call.device, **options)
