"""Every exception that hsgen raises on purpose, and the one form in which mistakes are shown.

Knows nothing of YAML, graphs or GPUs: a `Span` is a place in a text, a `Diagnostic` a mistake.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

MAX_EXCERPT = 120  # columns of a source line that are shown
MAX_SHOWN = 100  # diagnostics rendered for one file; `SpecError.diagnostics` has all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A place in a text file.  Lines and columns count from 1, in characters."""

    file: str
    line: int
    column: int
    length: int = 1
    text: str = ""  # the whole source line, for the excerpt

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One mistake: where it is, what was expected, what was found, and what to type instead."""

    code: str
    message: str
    span: Span | None = None
    help: str | None = None
    severity: Severity = "error"

    def __str__(self) -> str:
        return render(
            self.message, code=self.code, span=self.span, help=self.help, severity=self.severity
        )

    @property
    def position(self) -> tuple[int, int, str]:
        """Sorts diagnostics of one file by where they are."""
        line, column = (self.span.line, self.span.column) if self.span else (0, 0)
        return line, column, self.code

    def record(self) -> Mapping[str, object]:
        """This diagnostic as plain data for JSON."""
        span = self.span
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "help": self.help,
            "file": span.file if span else None,
            "line": span.line if span else None,
            "column": span.column if span else None,
            "length": span.length if span else None,
        }


class HsgenError(Exception):
    """Every error raised on purpose; prints as `file:line:col: error: message` with an excerpt."""

    def __init__(self, message: str, *, span: Span | None = None, help: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.span = span
        self.help = help

    def __str__(self) -> str:
        return render(self.message, span=self.span, help=self.help)


class SpecError(HsgenError):
    """The spec is wrong; `diagnostics` has every mistake, in file order."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = tuple(sorted(diagnostics, key=lambda d: d.position))
        first = self.diagnostics[0]
        super().__init__(first.message, span=first.span, help=first.help)
        self.args = (self.diagnostics,)  # what pickle calls the class with

    def __str__(self) -> str:
        shown = [str(diagnostic) for diagnostic in self.diagnostics[:MAX_SHOWN]]
        hidden = len(self.diagnostics) - len(shown)
        return "\n".join([*shown, f"... and {hidden} more"] if hidden else shown)


class PlanError(HsgenError):
    """The spec is legal, but no kernel can do it: names the limit and points at the cause."""


class EmitError(HsgenError):
    """A template failed.  A bug in hsgen, not in the spec."""


class BuildError(HsgenError):
    """An emitted module cannot be written, imported or compiled."""


class TuneError(HsgenError):
    """No trial finished."""


class ArgumentError(HsgenError, ValueError):
    """A wrong argument at run time: its name, expected and got."""


def render(
    message: str,
    *,
    code: str | None = None,
    span: Span | None = None,
    help: str | None = None,
    severity: Severity = "error",
) -> str:
    """Show one mistake: the sentence, the source line with a caret, and the help."""
    if span is None and code is None:
        return printable(message) + (f"\nhelp: {printable(help)}" if help else "")
    label = f"{severity}[{code}]" if code else severity
    lines = [f"{span}: {label}: {message}" if span else f"{label}: {message}"]
    margin = " " * (len(str(span.line)) if span else 1)
    lines += _excerpt(span, margin) if span and span.text else ()
    lines += [f"{margin} = help: {help}"] if help else ()
    return "\n".join(printable(line) for line in lines)


def printable(text: str) -> str:
    """Replace what could move the cursor, reorder the line or fail to encode."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` was probably meant to be."""
    options = sorted(words)
    close = [option for option in options if _distance(word, option) <= max(1, len(option) // 3)]
    return min(close, key=lambda option: _distance(word, option), default=None)


def _distance(a: str, b: str) -> int:
    """Edits (insert, delete, replace, swap neighbours) that turn `a` into `b`."""
    if abs(len(a) - len(b)) > 16 or max(len(a), len(b)) > 64:
        return 64
    older: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, older[j - 2] + 1)
            row.append(best)
        older, last = last, row
    return last[-1]


def _excerpt(span: Span, margin: str) -> list[str]:
    """The source line and a caret line under it; a window of it where the line is long."""
    start = max(0, span.column - 1 - MAX_EXCERPT // 2) if len(span.text) > MAX_EXCERPT else 0
    # one column a character, so that the caret stands right under it
    text = printable(span.text[start : start + MAX_EXCERPT].replace("\t", " ")).rstrip()
    before = span.column - 1 - start
    pad = sum(_columns(c) for c in text[:before]) + max(0, before - len(text))
    marked = text[before : before + span.length]
    carets = "^" * max(1, sum(_columns(c) for c in marked))
    body = f"{span.line} | {text}" if text else f"{span.line} |"
    return [f"{margin} |", body, f"{margin} | {' ' * pad}{carets}"]


def _columns(char: str) -> int:
    """Terminal columns that one character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
