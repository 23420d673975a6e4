"""`check`, `show` and `quality`: what is wrong with a spec, what it computes, what it recalls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsgen.cli.app import app
from hsgen.cli.options import (
    Capture,
    DType,
    GraphFile,
    HeadCounts,
    HeadDims,
    Json,
    Layer,
    Layers,
    MaskCapture,
    MaskFile,
    ModelFolder,
    PlotFile,
    SpecFile,
    SpecFiles,
    TargetName,
    TensorType,
    TextFile,
    Tokens,
    numbers_of,
    pair,
)
from hsgen.cli.output import check_suffix, complain, counted, print_json, status_of, write_picture
from hsgen.errors import HsgenError, SpecError
from hsgen.spec import Spec, load
from hsgen.target import Target

if TYPE_CHECKING:
    from hsgen.quality import Report


@app.command(epilog="Example: hsgen check specs/nsa.yaml")
def check(specs: SpecFiles, *, as_json: Json = False) -> None:
    """Check specs: every mistake at once, with the place and what to type instead."""
    checked = [_check(name) for name in specs]
    if as_json:
        print_json({"specs": [one.record() for one in checked]})
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
    svg: GraphFile = None,
    mask: MaskFile = None,
    qkv: MaskCapture = None,
    layer: Layer = None,
    tokens: Tokens = None,
    as_json: Json = False,
) -> None:
    """Show what a spec computes and how it would run: hsgen show nsa."""
    if (mask is None) != (qkv is None):
        raise typer.BadParameter("expected --mask and --qkv together: what is drawn, and of what")
    bound = load(spec).bind(heads=pair(heads), head_dim=pair(head_dim), layer=layer)
    if mask and qkv:
        _show_mask(bound, mask, qkv, layer, tokens, as_json=as_json)
    if svg or not mask:
        _show_graph(bound, target, dtype, svg, as_json=as_json and not mask)


def _show_graph(
    spec: Spec, target: Target, dtype: DType, file: Path | None, *, as_json: bool
) -> None:
    """Print graph and plan, or draw them."""
    from hsgen import drawing, report  # noqa: PLC0415  their stages are not for `check`

    shown = report.show(spec, target, dtype.value)
    if file:
        write_picture(file, drawing.draw(shown).encode(), ".svg")
    if as_json:
        print_json(shown.record())
    elif file:
        typer.echo(file)
    else:
        typer.echo(str(shown), nl=False)


def _show_mask(
    spec: Spec, file: Path, qkv: Path, layer: int | None, tokens: int | None, *, as_json: bool
) -> None:
    """Draw what each row takes on a capture, and print what the panels are."""
    from hsgen import mask  # noqa: PLC0415  loads torch

    check_suffix(file, ".svg", ".png")
    found = mask.mask(spec, qkv, layer=layer, tokens=tokens or mask.TOKENS)
    as_png = file.suffix.lower() == ".png"
    write_picture(file, mask.png(found) if as_png else mask.draw(found).encode(), ".svg", ".png")
    if as_json:
        print_json(found.record())
    else:
        typer.echo(f"{found}{file}")


@app.command(epilog="Example: hsgen quality nsa --qkv tests/data/smollm2_layer05.safetensors")
def quality(
    spec: SpecFile,
    *,
    qkv: Capture = None,
    model: ModelFolder = None,
    text: TextFile = None,
    layers: Layers = None,
    tokens: Tokens = None,
    rows: Annotated[int, typer.Option(min=1, help="Measured, of the second half.")] = 1024,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Measure what a spec's choices recall of a model's attention: hsgen quality nsa --qkv FILE."""
    from hsgen import charts, quality  # noqa: PLC0415  load torch

    if (qkv is None) == (model is None):
        raise typer.BadParameter("expected --qkv FILE or --model DIR, one of them")
    if text and not model:
        raise typer.BadParameter("expected --text with --model, which reads it")
    if plot:
        check_suffix(plot, ".svg")
    own, numbers = load(spec), numbers_of(layers)
    if model:
        found = _of_model(own, model, text, numbers, tokens, rows, curves=plot is not None)
    else:
        assert qkv is not None
        found = quality.report(
            own, qkv, layers=numbers, tokens=tokens, rows=rows, curves=plot is not None
        )
    if plot:
        write_picture(plot, charts.draw(found).encode(), ".svg")
    if as_json:
        print_json(found.record())
    else:
        typer.echo(str(found), nl=False)


def _of_model(
    spec: Spec,
    model: Path,
    text: Path | None,
    layers: tuple[int, ...],
    tokens: int | None,
    rows: int,
    *,
    curves: bool,
) -> Report:
    """What a spec recalls of a model's own attention, and how the model speaks with the spec's."""
    from hsgen import progress  # noqa: PLC0415  loads torch

    try:
        from hsgen import perplexity  # noqa: PLC0415  loads transformers
    except ModuleNotFoundError as error:
        help = "pip install 'hsgen[model]'"
        raise HsgenError(f"--model needs the package {error.name}", help=help) from error
    with progress.bar() as told:
        return perplexity.report(
            spec, model, text, layers=layers, tokens=tokens, rows=rows, curves=curves, told=told
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """One file, and the Spec in it or why there is none."""

    file: str
    spec: Spec | None = None
    error: HsgenError | None = None

    @property
    def status(self) -> int:
        return status_of(self.error) if self.error else 0

    def print(self) -> None:
        """Say that a spec is right, or everything that is wrong."""
        if self.error:
            complain(str(self.error))
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
        counted(len(spec.levels), "level"),
        counted(len(spec.attend), "branch"),
    ]
    return ", ".join([*parts, f"digest {spec.digest[:12]}"])


def _check(name: str) -> _Checked:
    try:
        return _Checked(file=name, spec=load(name))
    except HsgenError as error:
        return _Checked(file=name, error=error)
