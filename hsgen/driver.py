"""What fills the driver: the plan's steps in the order of `forward` and of `select`.

Only orders and names; the plan has decided everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hsgen import splits
from hsgen.plan import STREAMED, Buffer, Kernel, Launch, Plan, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One launch as text; `shared` are constexprs that another kernel's configuration decides, `given` those
    that follow from a call's sizes.
    """

    kernel: str
    grid: tuple[str, ...]
    arguments: tuple[str, ...]
    shared: tuple[tuple[str, str], ...]
    given: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Steps that follow each other; choosing ones are skipped where the caller brings a selection.

    `given`: what is done in their place.
    """

    choosing: bool
    steps: tuple[Step, ...]
    given: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Everything `driver.py.jinja` reads."""

    plan: Plan
    header: str

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return self.plan.kernels

    @property
    def imports(self) -> str:
        return "\n".join(
            f"from .{name} import {name}" for name in sorted(k.name for k in self.kernels)
        )

    @property
    def streams(self) -> bool:
        """Whether the keys of some kernel come in a stream."""
        return any(kernel.skeleton in STREAMED for kernel in self.kernels)

    @property
    def processors(self) -> bool:
        """Whether some size is a share of the GPU's processors."""
        return any("batch.processors" in x for step in self.plan.steps for _, x in step.sizes)

    @property
    def scratch_bytes(self) -> int:
        return self.plan.scratch_bytes

    @property
    def output(self) -> str:
        return self.plan.output

    @property
    def reads_output(self) -> bool:
        """Of a backward: whether it looks at what the forward put out."""
        return any(
            self.output in launch.arguments for step in self.plan.steps for launch in step.launches
        )

    @property
    def lse(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.plan.lse.items())

    @property
    def lse_once(self) -> tuple[tuple[str, str], ...]:
        """The same without branches that share one with a branch before."""
        names: dict[str, str] = {}
        for branch, name in self.lse:
            names.setdefault(name, branch)
        return tuple((branch, name) for name, branch in names.items())

    @property
    def selection(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.plan.selection.items())

    @property
    def given(self) -> tuple[tuple[str, str], ...]:
        """The attended levels, which a caller's selection must have."""
        read = {name for step in (*self._always(), *self._given_steps) for name in step.needs}
        return tuple((level, name) for level, name in self.selection if name in _made(read))

    @property
    def brought(self) -> tuple[tuple[str, str], ...]:
        """Levels that no step chooses of: every call is given what another layer chose."""
        return tuple((level, name) for level, name in self.selection if name in self.plan.brought)

    @property
    def listed(self) -> frozenset[str]:
        """Selections that a kernel walks slot by slot, so that their order and repeats matter."""
        return frozenset(
            name
            for step in self.plan.steps
            for launch in step.launches
            if self.plan.kernel(launch.kernel).by_slot
            for name in launch.arguments
            if name in self.plan.selection.values() and name not in self._parents(step)
        )

    def _parents(self, step: Step) -> tuple[str, ...]:
        """Selections that a choosing step expands: they are never a caller's."""
        chooses = any(name in self.plan.selection.values() for name in _made(step.makes))
        return _made(step.needs) if chooses else ()

    @property
    def alone(self) -> str:
        """A level of which no caller's selection is attended."""
        return self.plan.alone

    @property
    def absent(self) -> tuple[tuple[str, str], ...]:
        """Levels that are only expanded: a caller's selection may leave them out."""
        return tuple(pair for pair in self.selection if pair not in self.given)

    # --- order

    def _ancestors(self, wanted: Iterable[str], cut: frozenset[str]) -> list[Step]:
        """The steps that make `wanted` (names in the driver), not looking behind `cut`, in order."""
        need, found = set(wanted), []
        for step in reversed(self.plan.usual):
            if any(name in need for name in _made(step.makes) if name not in cut):
                found.append(step)
                need |= set(_made(step.needs))
        return found[::-1]

    @property
    def _chosen(self) -> frozenset[str]:
        """What is chosen: by row, and by block of rows."""
        names = [name for _, name in self.selection]
        return frozenset((*names, *(f"{name}_blocks" for name in names)))

    @property
    def _given_steps(self) -> tuple[Step, ...]:
        return tuple(step for step in self.plan.steps if step.of == "given")

    @property
    def rows_apart(self) -> bool:
        """Whether lists of rows are made apart from what is attended."""
        return any(step.of == "rows" for step in self.plan.steps)

    @property
    def chosen_for_others(self) -> bool:
        """Whether these are chosen, but not attended."""
        return any(step.of == "rows" and step.chunk for step in self.plan.steps)

    def left_out(self, step: Step) -> tuple[str, ...]:
        """What a step makes of which there is none if it is left out."""
        made = _made(step.makes)
        return tuple(buffer.name for buffer in step.buffers if buffer.name in made)

    def _always(self) -> list[Step]:
        return self._ancestors((self.output, *self.plan.lse.values()), self._chosen)

    @property
    def select(self) -> tuple[Step, ...]:
        return tuple(self._ancestors((name for _, name in self.selection), frozenset()))

    @property
    def forward(self) -> tuple[Group, ...]:
        """What choosing needs too, then choosing, then what reads a selection."""
        always = self._always()
        choosing = tuple(step for step in self.select if step not in always)
        before = tuple(step for step in always if step in self.select or not self._late(step))
        after = tuple(step for step in always if step not in before)
        own = tuple(step for step in after if step.of == "own")
        rest = tuple(step for step in after if step.of != "own")
        groups = (
            Group(choosing=False, steps=before),
            Group(choosing=True, steps=(*choosing, *own), given=self._given_steps),
            Group(choosing=False, steps=rest),
        )
        return tuple(group for group in groups if group.steps)

    def _late(self, step: Step) -> bool:
        """Whether a step reads a selection, directly or not."""
        chosen = self._chosen
        behind = self._ancestors(_made(step.needs), frozenset())
        return any(name in chosen for s in (*behind, step) for name in _made(s.needs))

    # --- a cache

    @property
    def cached(self) -> bool:
        return self.plan.cached is not None

    @property
    def few(self) -> bool:
        """Whether a call has a few rows of each sequence, whose keys programs share."""
        return self.plan.cached is not None and self.plan.cached.rows == "few"

    @property
    def share_keys(self) -> int:
        return splits.SHARE_KEYS

    @property
    def long_share(self) -> int:
        return splits.LONG_SHARE

    @property
    def appends(self) -> tuple[Step, ...]:
        return self.plan.appends

    @property
    def unpack_append(self) -> tuple[str, ...]:
        """New tokens and what is learned from the caller, the rest from the cache."""
        assert self.plan.storage is not None
        streams = [stream.name for stream in self.plan.storage.streams]
        needed = {name for step in self.appends for name in step.needs}
        learned = [x for x, _ in self.plan.inputs if x in needed and x not in streams]
        return (
            *(f'new_{name} = tensors["{name}"]' for name in streams),
            *(f'in_{name} = tensors["{name}"]' for name in learned),
            *(f'in_{name} = cache["{name}"]' for name in streams),
            *(line for name in self.plan.kept for line in _kept(name, "cache")),
        )

    # --- text

    def unpack(self, steps: Iterable[Step]) -> tuple[str, ...]:
        """The caller's tensors that some steps read."""
        needed = {name for step in steps for name in step.needs}
        needed |= {"q"} if needed else set()  # the shape of every output
        inputs = tuple(
            f'in_{name} = tensors["{name}"]' for name, _ in self.plan.inputs if name in needed
        )
        kept = (name for name in self.plan.kept if name in needed)
        return (*inputs, *(line for name in kept for line in _kept(name, "tensors")))

    @property
    def unpack_forward(self) -> tuple[str, ...]:
        groups = self.forward
        return self.unpack(step for group in groups for step in (*group.steps, *group.given))

    @property
    def unpack_select(self) -> tuple[str, ...]:
        lines = self.unpack(self.select)
        if (gates := self.plan.gates) is None:
            return lines
        given = f'in_{gates} = tensors["{gates}"]'
        any_will_do = f"in_{gates} = in_q  # of as many rows: no choice depends on an output"
        return tuple(any_will_do if line == given else line for line in lines)

    def passing(self, step: Step) -> tuple[str, ...]:
        """What is let go behind a step."""
        return self.plan.passing(step)

    def calls(self, step: Step) -> tuple[Call, ...]:
        return tuple(self._call(launch) for launch in step.launches)

    def _call(self, launch: Launch) -> Call:
        kernel = self.plan.kernel(launch.kernel)
        tuned = [name for name, _ in kernel.config.constexprs]
        shared = [p.name for p in kernel.params if p.kind == "constexpr" and p.name not in tuned]
        return Call(
            kernel=launch.kernel,
            grid=tuple(_tuned(text, launch.kernel) for text in launch.grid),
            arguments=launch.arguments,
            shared=tuple((name, f'config["{kernel.follows}"]["{name}"]') for name in shared),
            given=launch.given,
        )

    def dtype(self, buffer: Buffer) -> str:
        names = {"f32": "torch.float32", "i32": "torch.int32", "i64": "torch.int64"}
        names["e4m3"] = "torch.float8_e4m3fn"
        return names.get(buffer.dtype, "in_q.dtype")


def _made(nodes: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"made_{name.replace('.', '_')}" for name in nodes)


def _kept(name: str, source: str) -> tuple[str, ...]:
    """Entries of a level, and how many a sequence has room for."""
    (made,) = _made((name,))
    return f'{made} = {source}["{name}"]', f"{made.replace('made_', 'count_', 1)} = {made}.shape[1]"


def _tuned(text: str, kernel: str) -> str:
    """{BLOCK_T} in a grid is the kernel's own tuned value."""
    for each in ("T", "R", "E", "V", "H", "N", "P", "D"):
        name = f"BLOCK_{each}"
        text = text.replace(f"{{{name}}}", f'config["{kernel}"]["{name}"]')
    return text
