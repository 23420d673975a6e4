"""`compile`: modules and binaries for a GPU that need not be there."""

from __future__ import annotations

from typing import Annotated

import typer

from hsgen.cli.app import app
from hsgen.cli.options import (
    DType,
    Folder,
    HeadCounts,
    HeadDims,
    Json,
    OfRoute,
    SpecFile,
    TargetName,
    TensorType,
    attended,
)
from hsgen.cli.output import print_json


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
    layer: OfRoute = None,
    as_json: Json = False,
) -> None:
    """Compile a spec for a GPU that need not be there: hsgen compile nsa --target h100 -o build."""
    from hsgen import progress, report  # noqa: PLC0415

    bound = attended(spec, heads, head_dim, layer)
    with progress.bar() as told:
        done = report.report(
            bound, target, dtype.value, output=output, verified=verify, progress=told
        )
    if as_json:
        print_json(done.record())
    else:
        typer.echo(str(done), nl=False)
    raise typer.Exit(0 if done.passed else 1)
