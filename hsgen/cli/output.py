"""What commands print and write: results to stdout, all else to stderr, in colour on a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from hsgen import paths
from hsgen.errors import HsgenError, SpecError

SCHEMA_VERSION = 1  # of every --json


def counted(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def status_of(error: HsgenError) -> int:
    return 2 if isinstance(error, SpecError) else 1


def print_json(result: dict[str, object]) -> None:
    typer.echo(json_text(result), nl=False)


def json_text(result: dict[str, object]) -> str:
    return json.dumps({"schema_version": SCHEMA_VERSION, **result}, indent=2) + "\n"


def check_suffix(file: Path, *suffixes: str) -> None:
    """A file's suffix says its kind; another one is wrong usage."""
    if file.suffix.lower() not in suffixes:
        raise typer.BadParameter(
            f"expected a file that ends in {' or '.join(suffixes)}, got {file}"
        )


def write_picture(file: Path, content: bytes, *suffixes: str) -> None:
    """Write a picture."""
    check_suffix(file, *suffixes)
    try:
        file.write_bytes(content)
    except OSError as error:
        raise HsgenError(f"{file}: cannot write this picture: {error.strerror}") from error


def complain(text: str) -> None:
    """Print diagnostics, in colour on a terminal."""
    color = sys.stderr.isatty() and paths.wants_color()
    for line in text.splitlines():
        typer.echo(_painted(line) if color else line, err=True)


def _painted(line: str) -> str:
    """Colour of one line of a diagnostic."""
    margin, bar, rest = line.partition("|")
    if bar and not margin.strip() and rest.strip(" ^") == "":
        return f"{margin}|{typer.style(rest, fg='red')}"
    if ": error" in line:
        return typer.style(line, bold=True)
    return typer.style(line, fg="cyan") if line.lstrip().startswith("= help:") else line
