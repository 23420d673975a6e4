"""The `hsgen` command: parse the arguments, make one library call, print.

stdout is the result, stderr is everything else.  Exit status: 0 fine, 1 failure, 2 a wrong spec or
wrong usage.  What loads torch or networkx is imported when a command uses it, through `hsgen`'s
lazy names, so that `hsgen check` stays quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from hsgen import paths
from hsgen.errors import HsgenError, SpecError
from hsgen.spec import Spec, load

SCHEMA_VERSION = 1  # of every --json

app = typer.Typer(
    name="hsgen",
    help="Compile hierarchical sparse attention: from a YAML spec to verified Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SpecFiles = Annotated[
    list[str], typer.Argument(metavar="SPEC...", help="Files, or names of shipped specs.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status.
    """
    try:
        app(args=list(argv) if argv is not None else None, prog_name="hsgen")
    except HsgenError as error:
        _complain(str(error))
        return _status(error)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@app.callback()
def _root() -> None:
    """Keep `check` a command of its own while it is the only one."""


@app.command(epilog="Example: hsgen check specs/nsa.yaml")
def check(specs: SpecFiles, *, as_json: Json = False) -> None:
    """Check specs: every mistake at once, with the place and what to type instead."""
    checked = [_check(name) for name in specs]
    if as_json:
        _print_json({"specs": [one.record() for one in checked]})
    else:
        for one in checked:
            one.print()
    raise typer.Exit(max(one.status for one in checked))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """One file, and the Spec in it or why there is none."""

    file: str
    spec: Spec | None = None
    error: HsgenError | None = None

    @property
    def status(self) -> int:
        return _status(self.error) if self.error else 0

    def print(self) -> None:
        """Say that a spec is right, or everything that is wrong."""
        if self.error:
            _complain(str(self.error))
        elif self.spec:
            typer.echo(f"{self.file}: ok ({summary(self.spec)})")

    def record(self) -> dict[str, object]:
        """The same for machines."""
        listed = self.error.diagnostics if isinstance(self.error, SpecError) else ()
        return {
            "file": self.file,
            "ok": self.error is None,
            "name": self.spec.name if self.spec else None,
            "digest": self.spec.digest if self.spec else None,
            "diagnostics": [diagnostic.record() for diagnostic in listed],
            "error": str(self.error) if self.error and not listed else None,
        }


def summary(spec: Spec) -> str:
    """One line about a spec."""
    heads = f"{spec.heads.query}/{spec.heads.kv} heads" if spec.heads else "any heads"
    parts = [
        spec.name,
        heads,
        _count(len(spec.levels), "level"),
        _count(len(spec.attend), "branch"),
    ]
    return ", ".join([*parts, f"digest {spec.digest[:12]}"])


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def _check(name: str) -> _Checked:
    try:
        return _Checked(file=name, spec=load(name))
    except HsgenError as error:
        return _Checked(file=name, error=error)


def _status(error: HsgenError) -> int:
    return 2 if isinstance(error, SpecError) else 1


def _print_json(result: dict[str, object]) -> None:
    typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, **result}, indent=2))


def _complain(text: str) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
