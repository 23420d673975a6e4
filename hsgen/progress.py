"""What only a terminal shows: a bar on stderr while hsgen works, colours of a difference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from hsgen.report import Progress as Told

EVERY = 10.0  # seconds between lines, where nothing can be overwritten


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


@contextmanager
def line() -> Iterator[Callable[[str], None]]:
    """Something to tell where things stand; on a terminal one line that changes, else one a while."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = 0.0

        def say(text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                console.print(Text(text), soft_wrap=True)

        yield say
        return
    with console.status("") as shown:
        yield lambda text: shown.update(Text(text))


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
