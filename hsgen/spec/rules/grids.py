"""Axes that tokens lie along, and what counts steps along them."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import MAX_AXES, GridWindow, Path, Spec, Tile
from hsgen.spec.rules.problem import Problem


def axes(spec: Spec) -> Iterator[Problem]:
    """Whether there are axes where something needs them, and as many as it counts along."""
    users = list(_per_axis(spec))
    if spec.axes is None:
        for path, _ in users[:1]:
            yield Problem(
                code="HS140",
                path=path,
                message=f"expected 'axes' in the spec with '{path[-1]}', got none",
                help="write 'axes: [30, 48, 80]' at the top, or [any, any, any] to bind them later",
                also=(("axes",),),
                at_key=True,
            )
        return
    if not spec.axes or not users:
        yield Problem(
            code="HS141",
            path=("axes",),
            message="expected axes, got none"
            if not spec.axes
            else "expected something that lies along 'axes', got none",
            help=f"write 1 to {MAX_AXES} lengths, as 'axes: [30, 48, 80]'"
            if not spec.axes
            else "remove 'axes', or write 'static: {grid: {window: [8, 16, 16]}}' in a branch",
            also=(*(("attend", i) for i in range(-1, len(spec.attend))), ("levels",)),
            at_key=True,
        )
        return
    for path, steps in users:
        if len(steps) != len(spec.axes):
            yield Problem(
                code="HS142",
                path=path,
                message=f"expected one value for each of the {len(spec.axes)} axes,"
                f" got {len(steps)}",
                help=f"write '{path[-1]}: [{', '.join(_padded(steps, len(spec.axes)))}]'",
                also=(("axes",),),
                at_key=True,
            )


def _padded(steps: tuple[int | bool, ...], axes: int) -> list[str]:
    """What was written, as long as it must be."""
    last = steps[-1] if steps else 1
    return [str(step).lower() for step in (*steps, *[last] * axes)[:axes]]


def _per_axis(spec: Spec) -> Iterator[tuple[Path, tuple[int | bool, ...]]]:
    """Everything that has one value an axis."""
    for i, level in enumerate(spec.levels):
        order = level.permute and level.permute.keys
        if isinstance(order, Tile):
            yield ("levels", i, "permute", "keys", "tile"), order.tile
        if level.query and level.query.tile is not None:
            yield ("levels", i, "query", "tile"), level.query.tile
    for i, branch in enumerate(spec.attend):
        if branch.static and branch.static.grid:
            grid = branch.static.grid
            for field in GridWindow.model_fields:
                steps = getattr(grid, field)
                if steps is not None:
                    yield ("attend", i, "static", "grid", field), steps


def grid_windows(spec: Spec) -> Iterator[Problem]:
    """Rows that move together by more than their window, and windows longer than an axis."""
    for i, branch in enumerate(spec.attend):
        grid = branch.static and branch.static.grid
        if not grid:
            continue
        path: Path = ("attend", i, "static", "grid")
        ones = (1,) * len(grid.window)
        for n, (window, stride) in enumerate(zip(grid.window, grid.stride or ones, strict=False)):
            if stride > window:
                yield Problem(
                    code="HS143",
                    path=(*path, "stride"),
                    message=f"expected a stride of at most the window, {window}, along axis {n},"
                    f" got {stride}: some rows would not see themselves",
                    help=f"write a stride from 1 to {window}",
                    also=((*path, "window"),),
                )
        spans = zip(spec.axes or (), grid.window, grid.dilation or ones, strict=False)
        for n, (length, window, dilation) in enumerate(spans):
            if length != "any" and window * dilation > length:
                yield Problem(
                    code="HS144",
                    path=(*path, "window"),
                    message=f"expected a window of at most {max(length // dilation, 1)} along axis"
                    f" {n}, of {length} steps{_by(dilation)}, got {window}",
                    help=f"write {max(length // dilation, 1)}, or a longer axis",
                    also=(("axes",), (*path, "dilation")),
                )


def _by(dilation: int) -> str:
    return f" and dilation {dilation}" if dilation > 1 else ""
