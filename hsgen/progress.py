"""What only a terminal shows: a bar on stderr while hsgen works, colours of a difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from hsgen.report import Progress as Told


@contextmanager
def bar() -> Iterator[Told]:
    """Something to tell progress to; it vanishes at the end.  Nothing where stderr is no terminal."""
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


STYLES = (  # by how a line starts; the first that fits
    ("+++", "bold"),
    ("---", "bold"),
    ("@@", "cyan"),
    ("+", "green"),
    ("-", "red"),
    ("~", "yellow"),
)


def print_difference(text: str) -> None:
    """Lines of a difference on stdout, in colour, as wide as they are."""
    console = Console()
    for line in text.splitlines():
        style = next((style for start, style in STYLES if line.startswith(start)), "")
        console.print(Text(line, style), soft_wrap=True)


def _nobody(what: str, done: int, total: int) -> None:
    """Show nothing."""
