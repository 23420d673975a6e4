"""What a spec's choices are worth on a capture: mass recalled, agreement with the oracle, output error.

The spec chooses, by the reference; what the choice is held against comes from `metrics` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hsgen import analysis, captures, metrics, planner, standins
from hsgen.captures import Group
from hsgen.errors import HsgenError
from hsgen.reference import Result, reference
from hsgen.selection import members
from hsgen.spec import Attend, Blocks, Level, Spec, Tokens, verify

RUN = 64  # consecutive rows measured together
ROWS = 1024
SEED = 2
WAYS = ("selected", "oracle", "random", "recent_sink")
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the spec's budgets, in the plot
WAYS_TEXT = {"recent_sink": "recent + sink"}  # others are called what they are
TOGETHER = "all branches"

Json = dict[str, "str | int | float | bool | Json | list[Json] | None"]


# --- what is measured of a spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A choice that a spec makes: a level's selection, a window or pattern, or all raw branches together."""

    name: str
    about: str
    size: int = 1
    stride: int = 1
    level: str | None = None
    branch: str | None = None  # whose tokens are measured, where no level's entries are


def subjects(spec: Spec) -> tuple[Subject, ...]:
    """Every level that selects, every window or pattern; and their union where several read tokens.

    Where entries are no runs of tokens in place, a choice is of the tokens that a branch reads of it.
    """
    placed = {level.name for level in spec.levels if _in_place(level)}
    found = [_level_subject(spec, x) for x in spec.levels if x.select and x.name in placed]
    found += [_branch_subject(branch) for branch in raw_branches(spec) if branch.over not in placed]
    if len(raw_branches(spec)) > 1:
        names = " and ".join(branch.name for branch in raw_branches(spec))
        apart = "" if spec.combine and spec.combine.softmax else ", as the spec does not"
        about = f"tokens that {names} read, each once, under one softmax{apart}"
        found.append(Subject(name=TOGETHER, about=about))
    return tuple(found)


def _in_place(level: Level) -> bool:
    """Whether entry i has the tokens from i * stride on."""
    cut = level.permute is not None and level.permute.keys is not None
    partition = level.partition
    return not cut and (
        isinstance(partition, Tokens) or (isinstance(partition, Blocks) and not partition.before)
    )


def _level_subject(spec: Spec, level: Level) -> Subject:
    """A level, what its entries are, and who uses what it selects."""
    size = level.partition.size
    entries = f"blocks of {size}" if size > 1 else "tokens"
    apart = f" every {level.partition.stride}" if level.partition.stride != size else ""
    attended = [
        f"attended by {branch.name}{' as pooled entries' if branch.values == 'pooled' else ''}"
        for branch in spec.attend
        if branch.over == level.name
    ]
    expanded = [f"expanded by {other.name}" for other in spec.levels if other.within == level.name]
    return Subject(
        name=f"level {level.name}",
        about=", ".join([entries + apart, *attended, *expanded]),
        size=size,
        stride=level.partition.stride,
        level=level.name,
    )


def _branch_subject(branch: Attend) -> Subject:
    """A branch that chooses by position alone, or tokens in no order of blocks."""
    if branch.over:
        about = f"the tokens that level {branch.over} selects"
    elif branch.static:
        about = f"a static pattern of units of {branch.static.blocks} tokens"
    elif branch.window == "all":
        about = "every token"
    else:
        about = f"the last {branch.window} tokens, whatever they are"
    return Subject(name=f"branch {branch.name}", about=about, branch=branch.name)


def raw_branches(spec: Spec) -> list[Attend]:
    """The branches that read tokens."""
    return [branch for branch in spec.attend if branch.values == "raw"]


def bound(spec: Spec, group: Group) -> Spec:
    """The spec for the heads of a group.

    Raises:
        SpecError: it does not allow them.
    """
    heads, dims = group.q.shape[1], (group.k.shape[-1], group.v.shape[-1])
    choosing = tuple(each.model_copy(update={"dense": 0}) for each in spec.reuse)
    spec = spec.model_copy(update={"reuse": choosing})  # of all calls, the first that chooses
    return verify(standins.bind(spec, query=heads, kv=1, dim=dims))


def scaled(spec: Spec, factor: float) -> Spec:
    """The same attention with every budget and window multiplied; forced entries still fit.

    Patterns, thresholds and masses are no budgets: they stay as they are.
    """
    return spec.model_copy(
        update={
            "levels": tuple(_scaled_level(level, factor) for level in spec.levels),
            "attend": tuple(
                x.model_copy(update={"window": max(1, round(x.window * factor))})
                if isinstance(x.window, int)
                else x
                for x in spec.attend
            ),
        }
    )


def _scaled_level(level: Level, factor: float) -> Level:
    select = level.select
    if select is None or select.threshold is not None or select.top_p is not None:
        return level
    if select.fraction is not None:
        changed = select.model_copy(update={"fraction": min(1.0, select.fraction * factor)})
        return level.model_copy(update={"select": changed})
    forced = (select.force.first + select.force.last) if select.force.counted else 0
    key = "top_k" if select.top_k else "beam"
    budget = max(1, forced, round(select.budget * factor))
    return level.model_copy(update={"select": select.model_copy(update={key: budget})})


# --- choosing


def looks_ahead(spec: Spec) -> bool:
    """Whether rows depend on later tokens, so that all of them are chosen for together."""
    return analysis.causality(planner.plan(spec)) != "token"


def choices(spec: Spec, group: Group, position: Tensor) -> dict[str, Tensor]:
    """Choose by the reference in float32.

    Run of rows by run of rows where a row depends on no later token; else for the whole text, of
    which a run's rows would see another end.

    Args:
        spec: Bound to the group.
        group: The capture.
        position: i64[R], ascending, made of runs of RUN consecutive rows.

    Returns:
        By subject: bool[Hs, R, N].
    """
    q, k, v = group.q[None], group.k[None, :, None], group.v[None, :, None]
    made = standins.tensors(spec, q, k, v)
    tokens = len(group.k)
    alone = not looks_ahead(spec)
    runs = position.split(RUN) if alone else (torch.arange(tokens, device=position.device),)
    chosen: dict[str, list[Tensor]] = {each.name: [] for each in subjects(spec)}
    for run in runs:
        a, b = int(run[0]), int(run[-1]) + 1
        result = reference(
            spec,
            standins.rows_of(spec, made, a, b),
            q_offset=a,
            dtype=torch.float32,
            keep_scores=False,
            keep_seen=True,
        )
        for each in subjects(spec):
            mask = chosen_of(result, each, tokens)
            chosen[each.name].append(mask if alone else mask[:, position])
    return {name: torch.cat(parts, 1) for name, parts in chosen.items()}


def chosen_of(result: Result, subject: Subject, tokens: int) -> Tensor:
    """What a subject took, of one sequence.  -> bool[Hs, R, N]"""
    if subject.level:
        entries = -(-tokens // subject.stride)
        return members(result.selection[subject.level], entries)[0].transpose(0, 1)
    names = [subject.branch] if subject.branch else list(result.seen)
    masks = [_padded(result.seen[name][0], tokens) for name in names]
    heads = max(mask.shape[1] for mask in masks)
    spread = [mask.repeat_interleave(heads // mask.shape[1], 1) for mask in masks]
    return torch.stack(spread).any(0).transpose(0, 1)


def _padded(seen: Tensor, tokens: int) -> Tensor:
    """Tokens that a row could not see are unseen.  bool[R, H, s] -> bool[R, H, S]"""
    return torch.nn.functional.pad(seen, (0, tokens - seen.shape[-1]))


# --- measuring


def measured_rows(tokens: int, rows: int) -> Tensor:
    """Runs of RUN rows, evenly spaced over the second half.  -> i64[R]"""
    runs = max(1, min(rows, tokens // 2) // RUN)
    first = torch.linspace(tokens / 2, tokens - RUN, runs).round().long()
    return (first[:, None] + torch.arange(RUN)).flatten().unique()


def noise(rows: int, entries: int) -> Tensor:
    """What the random choice is made of, the same in every case.  -> f32[R, N]"""
    return torch.rand(rows, entries, generator=torch.Generator().manual_seed(SEED))


def summary(quality: metrics.Quality, head: int, position: Tensor) -> Json:
    """Means over the rows of one head, and the worst row of each."""
    mass, error = quality.mass[head], quality.error[head]
    return {
        "mass": float(mass.mean()),
        "error": float(error.mean()),
        "worst_mass": float(mass.min()),
        "worst_mass_row": int(position[mass.argmin()]),
        "worst_error": float(error.max()),
        "worst_error_row": int(position[error.argmax()]),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One subject on one head: by way, what `summary` says; IoU is with the oracle's entries."""

    subject: str
    layer: int
    head: int
    entries: float
    density: float
    iou: float
    ways: dict[str, Json]

    def record(self) -> Json:
        """The same for machines."""
        return {
            "subject": self.subject,
            "layer": self.layer,
            "head": self.head,
            "entries": self.entries,
            "density": self.density,
            "iou": self.iou,
            **self.ways,
        }


def measure(spec: Spec, group: Group, rows: int) -> Iterator[Measured]:
    """Every subject on every head of a group."""
    spec = bound(spec, group)
    position = measured_rows(len(group.q), rows)
    full = metrics.dense(group.q[position], group.k, group.v, position, causal=spec.causal)
    found = choices(spec, group, position)
    for subject in subjects(spec):
        yield from _measure(subject, found[subject.name], full, group)


def _measure(
    subject: Subject, chosen: Tensor, full: metrics.Dense, group: Group
) -> Iterator[Measured]:
    size, stride, position = subject.size, subject.stride, full.position
    ways = metrics.choices(full, chosen, size, noise(len(position), chosen.shape[-1]), stride)
    judged = {name: metrics.judge(full, way, size, stride) for name, way in ways.items()}
    iou = metrics.overlap(chosen, ways["oracle"]).mean(-1)
    seen = float(full.sees(torch.arange(len(group.k))).sum())
    heads = full.probs.shape[0]
    for h in range(heads):
        own = h * len(chosen) // heads
        yield Measured(
            subject=subject.name,
            layer=group.layer,
            head=group.query_head(h),
            entries=float(chosen[own].sum(-1).float().mean()),
            density=float(judged["selected"].kept[h].sum()) / seen,
            iou=float(iou[own]),
            ways={name: summary(quality, h, position) for name, quality in judged.items()},
        )


# --- the report


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """One subject at several budgets, means over layers and heads: per budget, density and masses."""

    subject: str
    factors: tuple[float, ...]
    density: tuple[float, ...]
    mass: dict[str, tuple[float, ...]]


class Part(Protocol):
    """Another section of a report; `str()` is its text."""

    @property
    def name(self) -> str: ...

    def record(self) -> Json: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a spec's choices are worth on a capture."""

    spec: Spec
    capture: str
    origin: dict[str, str]
    tokens: int
    rows: int
    heads: int
    subjects: tuple[Subject, ...]
    measured: tuple[Measured, ...]
    curves: tuple[Curves, ...] = ()
    more: tuple[Part, ...] = ()  # what else was measured of the same

    def record(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "spec": self.spec.name,
            "digest": self.spec.digest,
            "capture": {"file": self.capture, **self.origin},
            "tokens": self.tokens,
            "rows": self.rows,
            "density_is": _density_text(self.spec),
            "standins": [
                {"wants": wants, "given": given}
                for wants, given in standins.stated(self.spec, self.heads)
            ],
            "notes": list(_notes(self)),
            **{part.name: part.record() for part in self.more},
            "subjects": [{"name": each.name, "about": each.about} for each in self.subjects],
            "records": [each.record() for each in self.measured],
            "curves": [
                {"subject": x.subject, "factors": x.factors, "density": x.density, "mass": x.mass}
                for x in self.curves
            ],
        }

    def __str__(self) -> str:
        parts = [_header(self)]
        parts += [_table(self, subject) for subject in self.subjects]
        if notes := _notes(self):
            parts.append("\n".join(notes) + "\n")
        return "\n".join([*parts, *map(str, self.more)])


def report(
    spec: Spec,
    path: Path,
    *,
    layers: Sequence[int] = (),
    tokens: int | None = None,
    rows: int = ROWS,
    curves: bool = False,
) -> Report:
    """Measure a spec on a capture.

    Args:
        spec: The attention; its heads are exchanged for the captured ones.
        path: The capture.
        layers: Only these; none means all.
        tokens: A prefix of the capture; None takes all.
        rows: Measured, in runs over the second half.
        curves: Also at other budgets.

    Raises:
        HsgenError: the capture does not do, or the spec needs what it lacks.
    """
    groups = [group.prefix(tokens or len(group.q)) for group in captures.load(path, layers)]
    origin = captures.metadata(path)
    return report_on(spec, groups, name=path.name, origin=origin, rows=rows, curves=curves)


def report_on(
    spec: Spec,
    groups: Sequence[Group],
    *,
    name: str,
    origin: dict[str, str],
    rows: int = ROWS,
    curves: bool = False,
) -> Report:
    """Measure a spec on groups at hand: `report`, of what is called `name` and came from `origin`."""
    length = min(len(group.q) for group in groups)
    if length < 2 * RUN:
        raise HsgenError(f"tokens: expected at least {2 * RUN}, got {length}")
    measured = tuple(each for group in groups for each in measure(spec, group, rows))
    return Report(
        spec=spec,
        capture=name,
        origin=origin,
        tokens=length,
        rows=len(measured_rows(length, rows)),
        heads=groups[0].q.shape[1],
        subjects=subjects(spec),
        measured=measured,
        curves=_curves(spec, groups, rows) if curves else (),
    )


def _curves(spec: Spec, groups: Sequence[Group], rows: int) -> tuple[Curves, ...]:
    """Every subject with all budgets of the spec scaled alike."""
    runs = [
        [each for group in groups for each in measure(scaled(spec, factor), group, rows)]
        for factor in FACTORS
    ]
    found: list[Curves] = []
    for subject in subjects(spec):
        own = [[each for each in run if each.subject == subject.name] for run in runs]
        found.append(
            Curves(
                subject=subject.name,
                factors=FACTORS,
                density=tuple(_mean([each.density for each in run]) for run in own),
                mass={way: tuple(_mean(_values(run, way, "mass")) for run in own) for way in WAYS},
            )
        )
    return tuple(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _values(measured: Sequence[Measured], way: str, what: str) -> list[float]:
    return [float(str(each.ways[way][what])) for each in measured]


def _density_text(spec: Spec) -> str:
    """What a density is of."""
    seen = "tokens up to the row's own" if spec.causal else "all tokens"
    return f"attended tokens / tokens visible to the measured rows ({seen})"


def _header(report: Report) -> str:
    """How it was measured, and what stood in for what."""
    model = f" ({report.origin['model'].partition(',')[0]})" if "model" in report.origin else ""
    layers = ", ".join(str(layer) for layer in sorted({each.layer for each in report.measured}))
    lines = [
        f"{report.spec.name} on {report.capture}{model}, {report.tokens} tokens"
        + (f", layers {layers}" if layers else ""),
        f"rows: {report.rows}, in runs of {RUN} over the second half",
        f"density: {_density_text(report.spec)}",
        "mass: share of the dense attention probability on the attended tokens, mean over rows",
        "IoU: entries in both over entries in either, selection and oracle",
        "error: |o - dense| / |dense| by row, o being one softmax over the attended tokens",
        "oracle, random, recent (and the sink): as many entries in every row, shared by the same heads",
        "  (the oracle is best for the sum over the heads that share, so one of them may do better)",
        "in place of what the model lacks:",
        *(f"  {wants}: {given}" for wants, given in standins.stated(report.spec, report.heads)),
    ]
    return "\n".join(lines) + "\n"


def _notes(report: Report) -> tuple[str, ...]:
    """What a reader must know to read the figures rightly."""
    notes: list[str] = []
    if not report.subjects:
        notes.append("nothing to measure: no level selects, and no branch reads tokens")
    for each in report.spec.attend:
        if each.values == "pooled":
            notes.append(
                f"branch {each.name} attends pooled entries, no tokens: not measured by itself"
            )
    if not report.spec.causal:
        notes.append("the spec is not causal, the captured model was: dense sees every token here")
    for subject in report.subjects:
        own = [each.density for each in report.measured if each.subject == subject.name]
        if own and min(own) == 1.0:
            notes.append(
                f"{subject.name} takes everything that is visible: its budget does not bite on "
                f"{report.tokens} tokens"
            )
    return tuple(notes)


HEAD = (
    *("layer", "head", "density", "entries"),
    *("mass", "oracle", "random", "recent", "IoU", "error", "oracle", "random", "recent"),
    *("worst mass (row)", "worst error (row)"),
)


def _table(report: Report, subject: Subject) -> str:
    """One subject: a line a head, then the mean."""
    own = [each for each in report.measured if each.subject == subject.name]
    rows = [list(HEAD), *(_row(each) for each in own)]
    mean = [
        *("mean", "", f"{_mean([each.density for each in own]):.3f}"),
        f"{_mean([each.entries for each in own]):.1f}",
        *(f"{_mean(_values(own, way, 'mass')):.3f}" for way in WAYS),
        f"{_mean([each.iou for each in own]):.3f}",
        *(f"{_mean(_values(own, way, 'error')):.3f}" for way in WAYS),
        *("", ""),
    ]
    rows.append(mean)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  "
        + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([f"{subject.name}: {subject.about}", *lines]) + "\n"


def _row(each: Measured) -> list[str]:
    own = each.ways["selected"]
    return [
        *(str(each.layer), str(each.head), f"{each.density:.3f}", f"{each.entries:.1f}"),
        *(f"{each.ways[way]['mass']:.3f}" for way in WAYS),
        f"{each.iou:.3f}",
        *(f"{each.ways[way]['error']:.3f}" for way in WAYS),
        f"{own['worst_mass']:.3f} ({own['worst_mass_row']})",
        f"{own['worst_error']:.2f} ({own['worst_error_row']})",
    ]
