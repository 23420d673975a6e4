"""The `hsgen` command: parse the arguments, make one library call, print.

stdout is the result, stderr is everything else.  Exit status: 0 fine, 1 failure, 2 a wrong spec or
wrong usage; of `diff` as of any diff: 0 the same, 1 different, 2 an error.  What loads networkx or
jinja2 is imported by the command that uses it, so that `hsgen check` stays quick; nothing here loads
torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hsgen import paths
from hsgen.errors import ArgumentError, HsgenError, SpecError
from hsgen.spec import Spec, load
from hsgen.target import Target

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
SpecFile = Annotated[
    str, typer.Argument(metavar="SPEC", help="A file, or the name of a shipped spec.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class DType(StrEnum):
    """dtype of the caller's tensors, as the command line has it."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def _target(text: str) -> Target:
    """A GPU by name; an unknown one is wrong usage."""
    try:
        return Target.named(text)
    except ArgumentError as error:
        raise typer.BadParameter(f"{error.message}: {error.help}") from error


def _pair(text: str | None) -> tuple[int, int] | None:
    """32/8, or one number for both."""
    if text is None:
        return None
    parts = text.split("/")
    if not (1 <= len(parts) <= 2 and all(part.isdecimal() for part in parts)):
        raise typer.BadParameter(f"expected one or two numbers, as in 32/8, got {text!r}")
    return int(parts[0]), int(parts[-1])


TargetName = Annotated[
    Target,
    typer.Option(parser=_target, metavar="GPU", help="h100, a100, 4090, b200, mi300x, sm_80, ..."),
]
TensorType = Annotated[DType, typer.Option(help="Of the tensors that kernels get.")]
HeadCounts = Annotated[
    str | None, typer.Option("--heads", metavar="QUERY/KV", help="Where the spec is open.")
]
HeadDims = Annotated[
    str | None, typer.Option("--head-dim", metavar="QK/V", help="Where the spec is open.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Write DIR/<spec name>/, a package; default a cache."
    ),
]


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


@app.command(epilog="Example: hsgen show nsa --target a100")
def show(
    spec: SpecFile,
    *,
    target: TargetName = "h100",  # type: ignore[assignment]  # typer parses defaults too
    dtype: TensorType = DType.bf16,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    as_json: Json = False,
) -> None:
    """Show what a spec computes and how it would run: hsgen show nsa."""
    from hsgen import report  # noqa: PLC0415  its stages are not for `check`

    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim))
    shown = report.show(bound, target, dtype.value)
    if as_json:
        _print_json(shown.record())
    else:
        typer.echo(str(shown), nl=False)


@app.command(name="compile", epilog="Example: hsgen compile nsa --target h100 -o build")
def compile_(
    spec: SpecFile,
    *,
    target: TargetName = "h100",  # type: ignore[assignment]  # typer parses defaults too
    dtype: TensorType = DType.bf16,
    output: Folder = None,
    verify: Annotated[bool, typer.Option(help="Run the kernels in Triton's interpreter.")] = True,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    as_json: Json = False,
) -> None:
    """Compile a spec for a GPU that need not be there: hsgen compile nsa --target h100 -o build."""
    from hsgen import progress, report  # noqa: PLC0415

    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim))
    with progress.bar() as told:
        done = report.report(
            bound, target, dtype.value, output=output, verified=verify, progress=told
        )
    if as_json:
        _print_json(done.record())
    else:
        typer.echo(str(done), nl=False)
    raise typer.Exit(0 if done.passed else 1)


@app.command(epilog="Example: hsgen diff nsa my_nsa.yaml")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A file, or the name of a shipped spec.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    *,
    target: TargetName = "h100",  # type: ignore[assignment]  # typer parses defaults too
    dtype: TensorType = DType.bf16,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    as_json: Json = False,
) -> None:
    """Show how two specs differ: graph, plan, emitted code.  Status 0: they mean the same, 1: not."""
    from hsgen import compare, progress  # noqa: PLC0415

    try:
        one, other = (
            load(name).bind(heads=_pair(heads), head_dim=_pair(head_dim)) for name in (a, b)
        )
        found = compare.compare(one, other, target, dtype.value)
    except HsgenError as error:
        _complain(str(error))
        raise typer.Exit(2) from error
    if as_json:
        _print_json(found.record())
    elif sys.stdout.isatty() and paths.wants_color():
        progress.print_difference(str(found))
    else:
        typer.echo(str(found), nl=False)
    raise typer.Exit(0 if found.same else 1)


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
