"""The command line that commands add themselves to."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="hsgen",
    help="Compile hierarchical sparse attention: from a YAML spec to verified Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
