"""`diff`, `schema`, `new` and `specs`: specs beside one another, and how to write one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hsgen import paths
from hsgen.cli.app import app
from hsgen.cli.options import (
    Config,
    DType,
    ForEditors,
    HeadCounts,
    HeadDims,
    Json,
    NewFile,
    NewName,
    OfConfig,
    Preset,
    SchemaFile,
    TargetName,
    TensorType,
    pair,
)
from hsgen.cli.output import complain, print_json
from hsgen.errors import HsgenError
from hsgen.spec import load


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
            load(name).bind(heads=pair(heads), head_dim=pair(head_dim)) for name in (a, b)
        )
        found = compare.compare(one, other, target, dtype.value)
    except HsgenError as error:
        complain(str(error))
        raise typer.Exit(2) from error
    if as_json:
        print_json(found.record())
    elif sys.stdout.isatty() and paths.wants_color():
        progress.print_difference(str(found))
    else:
        typer.echo(str(found), nl=False)
    raise typer.Exit(0 if found.same else 1)


@app.command(epilog="Example: hsgen schema -o hsgen.schema.json")
def schema(*, output: SchemaFile = None) -> None:
    """Print the JSON Schema of the language, by which editors complete and explain a spec."""
    from hsgen.spec import drafts  # noqa: PLC0415
    from hsgen.spec import schema as language  # noqa: PLC0415

    text = json.dumps(language.schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        drafts.write(output, text, over=True)


@app.command(epilog="Example: hsgen new my_attention --from nsa")
def new(
    name: NewName,
    *,
    preset: Preset = None,
    from_config: Config = None,
    layer: OfConfig = None,
    output: NewFile = None,
    schema: ForEditors = None,
    as_json: Json = False,
) -> None:
    """Write a spec that starts from another, comments kept, or from the config.json of a model."""
    from hsgen.spec import drafts  # noqa: PLC0415  reads configs of models

    if (preset is None) == (from_config is None):
        raise typer.BadParameter("expected --from PRESET or --from-config FILE, one of them")
    if layer is not None and from_config is None:
        raise typer.BadParameter("expected --layer with --from-config, whose layers it counts")
    file = output or Path(f"{name}.yaml")
    if schema is not None and not schema.is_file():
        raise typer.BadParameter(f"{schema}: no such file; 'hsgen schema -o {schema}' writes it")
    seen = Path(os.path.relpath(schema, file.parent)).as_posix() if schema else None
    record: dict[str, object] = {"file": str(file), "name": name}
    if from_config is not None:
        text, found = drafts.from_config(name, from_config, layer=layer, schema=seen)
        whose = f"{' and '.join(found.presets)} with the sizes of {from_config}"
        record |= {"config": str(from_config), "presets": found.presets, "layers": found.layers}
    else:
        assert preset is not None
        text, whose = drafts.draft(name, preset, schema=seen), preset
        record["from"] = preset
    drafts.write(file, text)
    if as_json:
        print_json(record)
    else:
        typer.echo(f"{file}: {name}, which is {whose} until you change it")


@app.command(epilog="Example: hsgen specs --json")
def specs(
    *,
    target: TargetName = "h100",  # type: ignore[assignment]  # typer parses defaults too
    page: Annotated[bool, typer.Option(help="Print docs/systems.md.")] = False,
    as_json: Json = False,
) -> None:
    """List the shipped specs: what each is, what it costs, and how far its kernels reach."""
    from hsgen import catalogue  # noqa: PLC0415

    found = catalogue.catalogue(target)
    if as_json:
        print_json(found.record())
    else:
        typer.echo(found.page() if page else str(found), nl=False)
