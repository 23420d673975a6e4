"""What a terminal shows while hsgen works: a bar on stderr, and nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hsgen.report import Progress as Told


@contextmanager
def bar() -> Iterator[Told]:
    """Something to tell progress to; it vanishes at the end."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _nobody
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total or None)
            shown.update(tasks[what], completed=done, total=total or None)

        yield tell


def _nobody(what: str, done: int, total: int) -> None:
    """Show nothing."""
