"""What is timed of one spec at one length: its kernels, dense attention, FlexAttention; step by step.

Checks outputs before their time; decides neither which steps run nor what is said of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hsgen import baselines, checking, drawn, samples, timing
from hsgen.captures import Group
from hsgen.checking import Figures, NotExpressibleError, Selected
from hsgen.runtime import Kernel, load_kernel
from hsgen.selection import ListSelection
from hsgen.spec import Spec
from hsgen.tuned import Bucket

SMALL = 3000  # tokens of the first check, no multiple of anything

Tensors = dict[str, Any]  # Tensor by name; a type would be held against all keywords of a kernel
Step = tuple[str, Callable[[], Figures]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """Where and on what specs are timed.

    Attributes:
        device: "cuda", or "cpu".
        kind: Of input.
        groups: Captured heads, that "real" inputs are made of.
        seconds: Of timing, a measurement.
        dtype: Of the tensors.
        interpret: CPU tensors go through the emitted kernels, not to the reference.
        config: By kernel, what replaces values of the tuned or starting configuration.
    """

    device: str
    kind: samples.Kind
    groups: Sequence[Group]
    seconds: float
    dtype: torch.dtype = torch.bfloat16
    interpret: bool = False
    config: Mapping[str, Mapping[str, int]] | None = None

    def make(self, spec: Spec, tokens: int, seed: int) -> Tensors:
        """One set of inputs; for a layer that takes over, with what another could have chosen."""
        made: Tensors = dict(
            samples.make(spec, self.kind, tokens, self.device, seed, self.groups, dtype=self.dtype)
        )
        if spec.brought:
            generator = torch.Generator(self.device).manual_seed(seed)
            made["selection"] = drawn.lists(spec, 1, tokens, tokens, generator)
        return made

    def sets(self, spec: Spec, tokens: int) -> list[Tensors]:
        """Enough sets that no call finds its inputs in the cache."""
        first = self.make(spec, tokens, 0)
        weighed = {name: x for name, x in first.items() if name != "selection"}
        few = samples.size_in_bytes(weighed) >= samples.ROTATED or self.device == "cpu"
        return [
            first,
            *(self.make(spec, tokens, seed) for seed in range(1, 1 if few else samples.SETS)),
        ]

    def load(self, spec: Spec) -> Kernel:
        """The spec's kernels."""
        return load_kernel(spec, interpret=self.interpret, config=self.config)

    def time(self, call: timing.Call) -> Figures:
        """Milliseconds of a call; in the interpreter of one call."""
        if self.interpret:
            found = timing.time_once(call, self.device)
        else:
            found = timing.time_calls(call, self.device, self.seconds)
        return {"ms": dataclasses.asdict(found)}

    def weigh(self, call: timing.Call) -> Figures:
        """Bytes that a call holds at its peak; nothing where there is no GPU."""
        return {"bytes": timing.peak_memory(call)} if self.device == "cuda" else {}


# --- the spec's own kernels


def check_all(setting: Setting, spec: Spec, tokens: int) -> Figures:
    """Every row of a short input against the reference, on the kernels' own choice."""
    tensors = setting.make(spec, tokens, 10)
    o, selection = run(setting, spec, tensors)
    return checking.compare(spec, tensors, o, selection, [(0, tokens)])


def run(setting: Setting, spec: Spec, tensors: Tensors) -> tuple[Tensor, Selected]:
    """One call, and what it chose."""
    kernel = setting.load(spec)
    selection = kernel.select(**tensors) if chooses(spec) else handed(tensors)
    o = kernel(**tensors)
    assert isinstance(o, Tensor), "no log-sum-exp was asked for"
    return o, selection


def chooses(spec: Spec) -> bool:
    """Whether some level selects, and no other layer has."""
    return any(level.select for level in spec.levels) and not spec.brought


def handed(tensors: Tensors) -> Selected:
    """What comes with inputs as the choice of another layer."""
    given: dict[str, Tensor] = tensors.get("selection", {})
    return {name: ListSelection(level=name, indices=x) for name, x in given.items()}


def kernel_steps(setting: Setting, spec: Spec, sets: Sequence[Tensors]) -> Iterator[Step]:
    """The whole of a call and its halves, then its kernels and its memory."""
    kernel = setting.load(spec)

    def total(n: int) -> object:
        return kernel(**sets[n % len(sets)])

    calls: dict[str, timing.Call] = {"total": total}
    if chooses(spec):
        chosen = [kernel.select(**x) for x in sets]
        calls["select"] = lambda n: kernel.select(**sets[n % len(sets)])
        calls["attend"] = lambda n: kernel(**sets[n % len(sets)], selection=chosen[n % len(sets)])
    for name, call in calls.items():
        yield name, functools.partial(setting.time, call)
    yield "configs", lambda: {"kernels": configs(kernel, sets[0]["q"].shape[1])}
    if setting.device == "cuda":
        yield "kernels", lambda: {"ms": timing.kernel_times(total)}
        yield "memory", lambda: setting.weigh(total)


def configs(kernel: Kernel, tokens: int) -> Figures:
    """What the kernels of one call on one sequence ran with: of a tuned record, or the start."""
    return dict(kernel.chosen(Bucket.of(tokens, tokens, 1, packed=False)))


# --- dense attention


def dense_steps(
    setting: Setting, spec: Spec, variants: Sequence[baselines.Variant], tensors: Tensors
) -> Iterator[Step]:
    """Dense attention on the same q, k, v, by every variant."""
    latent = tensors["k"][..., : spec.head_dim.v if spec.head_dim else None]
    x = tensors["q"], tensors["k"], tensors.get("v", latent)
    for variant in variants:
        action = functools.partial(time_dense, setting, variant, x, causal=spec.causal)
        yield f"dense {variant.name}", action


def time_dense(
    setting: Setting,
    variant: baselines.Variant,
    x: tuple[Tensor, Tensor, Tensor],
    *,
    causal: bool,
) -> Figures:
    """Check a variant's last row, then time it."""
    call = baselines.dense(variant, *x, causal=causal)
    expected = baselines.last_row(*x)
    error = checking.require_close(call(0)[:, -1], expected, "in the last row")
    q, v = x[0], x[2]
    flops = baselines.dense_flops(q.shape[1], q.shape[2], q.shape[3], v.shape[3], causal=causal)
    timed = setting.time(call) | setting.weigh(call)
    return timed | {"error": error, "tflops": flops / timed["ms"]["median"] / 1e9}


# --- FlexAttention


def flex_steps(
    setting: Setting, spec: Spec, tensors: Tensors, *, masked: bool = False
) -> Iterator[Step]:
    """FlexAttention on the blocks that the kernels selected, beside the kernels attending to the same.

    Args:
        setting: Where and on what.
        spec: Bound.
        tensors: Of one sequence.
        masked: The mask is needed although its own step will not run.

    Raises:
        NotExpressibleError: no mask says what this spec selects.
    """
    level = baselines.selected_level(spec)
    chosen = setting.load(spec).select(**tensors) if chooses(spec) else handed(tensors)
    selection = {level.name: chosen[level.name]}
    alone = baselines.selected_only(spec, level.name)
    tensors = {name: tensors[name] for name in drawn.read_shapes(alone, 1, 1, 1)}
    kernel = setting.load(alone)
    indices, size = selection[level.name].indices[0], level.partition.size
    made: list[BlockMask] = []

    def attend(_number: int) -> Tensor:
        o = kernel(**tensors, selection=selection)
        assert isinstance(o, Tensor), "no log-sum-exp was asked for"
        return o

    def mask(_number: int) -> BlockMask:
        return baselines.flex_mask(indices, size, tensors["q"].shape[2])

    def time_mask() -> Figures:
        if setting.device != "cuda":
            raise NotExpressibleError("FlexAttention is timed on GPUs only")
        baselines.require_table(indices.shape[0], indices.shape[1], size)
        made[:] = [mask(0)]
        return setting.time(mask)

    def time_flex() -> Figures:
        if not made:
            raise NotExpressibleError("there is no mask")
        call = baselines.flex(made[0], tensors["q"], tensors["k"], tensors["v"])
        difference = checking.require_close(
            call(0), attend(0), "beside hsgen on the same selection"
        )
        timed = setting.time(call) | setting.weigh(call)
        return timed | {"difference": difference, "sparsity": made[0].sparsity()}

    if masked:
        time_mask()
    yield "attend selected", lambda: setting.time(attend)
    yield "flex mask", time_mask
    yield "flex", time_flex
