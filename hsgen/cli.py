"""The `hsgen` command: parse the arguments, make one library call, print.

stdout is the result, stderr is everything else.  Exit status: 0 fine, 1 failure, 2 a wrong spec or
wrong usage; of `diff` as of any diff: 0 the same, 1 different, 2 an error.  What loads networkx or
jinja2 is imported by the command that uses it, so that `hsgen check` stays quick; only what looks at
a capture, or times, loads torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsgen import paths
from hsgen.errors import ArgumentError, HsgenError, SpecError
from hsgen.spec import Spec, load
from hsgen.target import Target

if TYPE_CHECKING:
    from hsgen.quality import Report
    from hsgen.tuned import Content, GatesContent

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
SchemaFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write FILE; default standard output."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class DType(StrEnum):
    """dtype of the caller's tensors, as the command line has it."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Device(StrEnum):
    """Where a spec is timed."""

    cuda = "cuda"
    cpu = "cpu"


class Peer(StrEnum):
    """What a spec is timed beside."""

    dense = "dense"
    flex = "flex"


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


def _name(text: str) -> str:
    """What a spec may be called; anything else is wrong usage."""
    from hsgen.spec import drafts  # noqa: PLC0415  only `new` has names

    try:
        return drafts.named(text)
    except ArgumentError as error:
        raise typer.BadParameter(f"{error.message}: {error.help}") from error


NewName = Annotated[str, typer.Argument(parser=_name, metavar="NAME", help="Of the new spec.")]
NewFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write FILE; default NAME.yaml."),
]
Preset = Annotated[
    str | None, typer.Option("--from", metavar="PRESET", help="Name of a shipped spec, or a file.")
]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A model's config.json, or its folder: the model's sizes."),
]
OfConfig = Annotated[
    int | None, typer.Option("--layer", min=0, help="Of the config: the attention of this one.")
]
ForEditors = Annotated[
    Path | None,
    typer.Option(
        metavar="SCHEMA",
        help="What `hsgen schema -o SCHEMA` wrote: the new file tells editors of it.",
    ),
]
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


def _numbers(text: str | None) -> tuple[int, ...]:
    """0,5,14; none at all where nothing is said."""
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(f"expected numbers, as in 0,5, got {text!r}")
    return tuple(int(part) for part in parts)


def _seconds(text: str) -> float:
    """300s, 5m, or seconds as a number."""
    number, factor = text.removesuffix("s"), 1.0
    if text.endswith("m"):
        number, factor = text.removesuffix("m"), 60.0
    try:
        return float(number) * factor
    except ValueError:
        raise typer.BadParameter(f"expected seconds, as in 300s or 5m, got {text!r}") from None


def _lengths(text: str | None) -> tuple[int, ...]:
    """8K,32768; none at all where nothing is said."""
    parts = [part.strip().upper() for part in text.split(",")] if text is not None else []
    if not all(part.removesuffix("K").isdecimal() and part.strip("0K") for part in parts):
        raise typer.BadParameter(f"expected numbers of tokens, as in 8K,32K, got {text!r}")
    return tuple(int(part.removesuffix("K")) * (1024 if "K" in part else 1) for part in parts)


Capture = Annotated[
    Path | None, typer.Option("--qkv", metavar="FILE", help="Captured q, k, v, a safetensors file.")
]
ModelFolder = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="A model as transformers saves it, or .gguf."),
]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="What --model reads; default Python's own manual."),
]
MaskCapture = Annotated[
    Path | None, typer.Option("--qkv", metavar="FILE", help="Captured q, k, v that --mask is of.")
]
Layer = Annotated[
    int | None, typer.Option(min=0, help="Of a route by layer, and of the capture: its first.")
]
OfRoute = Annotated[
    int | None,
    typer.Option("--layer", min=0, help="Where a route goes by layer, or layers take over."),
]
Lengths = Annotated[
    str | None, typer.Option("--tokens", metavar="8K,32K", help="T and S; default 8K,32K.")
]
Against = Annotated[list[Peer] | None, typer.Option(help="Timed too, repeatable; default dense.")]
Inputs = Annotated[
    Path | None,
    typer.Option("--qkv", metavar="FILE", help="A capture that inputs are made of; else random."),
]
Figures = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write all figures as JSON.")
]
Layers = Annotated[str | None, typer.Option(metavar="0,5,...", help="Of the capture; default all.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="A prefix of the capture.")]
GraphFile = Annotated[
    Path | None, typer.Option("--svg", metavar="FILE", help="Draw graph and launches as SVG.")
]
MaskFile = Annotated[
    Path | None,
    typer.Option("--mask", metavar="FILE", help="Draw what each row takes, as .svg or .png."),
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw mass recalled against density as SVG."),
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
    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim), layer=layer)
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
        _write(file, drawing.draw(shown).encode(), ".svg")
    if as_json:
        _print_json(shown.record())
    elif file:
        typer.echo(file)
    else:
        typer.echo(str(shown), nl=False)


def _show_mask(
    spec: Spec, file: Path, qkv: Path, layer: int | None, tokens: int | None, *, as_json: bool
) -> None:
    """Draw what each row takes on a capture, and print what the panels are."""
    from hsgen import mask  # noqa: PLC0415  loads torch

    _check_suffix(file, ".svg", ".png")
    found = mask.mask(spec, qkv, layer=layer, tokens=tokens or mask.TOKENS)
    as_png = file.suffix.lower() == ".png"
    _write(file, mask.png(found) if as_png else mask.draw(found).encode(), ".svg", ".png")
    if as_json:
        _print_json(found.record())
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
        _check_suffix(plot, ".svg")
    own, numbers = load(spec), _numbers(layers)
    if model:
        found = _of_model(own, model, text, numbers, tokens, rows, curves=plot is not None)
    else:
        assert qkv is not None
        found = quality.report(
            own, qkv, layers=numbers, tokens=tokens, rows=rows, curves=plot is not None
        )
    if plot:
        _write(plot, charts.draw(found).encode(), ".svg")
    if as_json:
        _print_json(found.record())
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

    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim), layer=layer)
    if verify:
        _require_choice(bound)
    with progress.bar() as told:
        done = report.report(
            bound, target, dtype.value, output=output, verified=verify, progress=told
        )
    if as_json:
        _print_json(done.record())
    else:
        typer.echo(str(done), nl=False)
    raise typer.Exit(0 if done.passed else 1)


@app.command(epilog="Example: hsgen bench nsa --tokens 8K,32K --against dense --against flex")
def bench(
    spec: SpecFile,
    *,
    against: Against = None,
    tokens: Lengths = None,
    qkv: Inputs = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of the tensors; default bf16, interpreted fp32.")
    ] = None,
    device: Annotated[Device, typer.Option(help="cpu: a small copy, interpreted.")] = Device.cuda,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing, a measurement.")] = 1.0,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    layer: OfRoute = None,
    output: Figures = None,
    as_json: Json = False,
) -> None:
    """Time a spec on the GPU that is here, beside dense attention: hsgen bench nsa."""
    if output:
        _check_suffix(output, ".json")
    lengths, peers = _lengths(tokens), against or [Peer.dense]
    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim), layer=layer)
    _require_choice(bound)
    words = _words(
        {
            "against": peers,
            "tokens": [tokens] if tokens else [],
            "qkv": [_place(qkv)] if qkv else [],
            "dtype": [dtype] if dtype else [],
            "device": [device],
            "heads": [heads] if heads else [],
            "head-dim": [head_dim] if head_dim else [],
            "layer": [layer] if layer is not None else [],
        }
    )
    if device == Device.cpu:
        paths.ask_for_interpreter()  # before anything imports triton
    from hsgen import bench, progress  # noqa: PLC0415  load torch
    from hsgen.spec import drafts  # noqa: PLC0415

    with progress.bar() as told:
        found = bench.bench(
            bound,
            tokens=lengths,
            against=[peer.value for peer in peers],
            dtype=dtype.value if dtype else None,
            device=device.value,
            capture=qkv,
            seconds=seconds,
            command=["hsgen", "bench", _place(Path(spec)), *words],
            progress=told,
        )
    text = _json_text(found.record())
    if output:
        drafts.write(output, text, over=True)
    typer.echo(text if as_json else str(found), nl=False)
    raise typer.Exit(0 if found.passed else 1)


@app.command(epilog="Example: hsgen gate hisa --tokens 1K,2K,4K,8K,16K,32K --export tuned")
def gate(
    spec: SpecFile,
    *,
    tokens: Annotated[
        str | None, typer.Option(metavar="1K,...", help="Lengths, T and S; default 1K to 128K.")
    ] = None,
    qkv: Inputs = None,
    dtype: TensorType = DType.bf16,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing, a length.")] = 1.0,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    layer: OfRoute = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the record there too, as tuned/ has it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure below which lengths dense or flat attention is faster than a spec: hsgen gate hisa.

    What was found is kept in the cache, where `load_kernel(spec, gate="measured")` takes it from.
    """
    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim), layer=layer)
    _require_choice(bound)
    lengths = _lengths(tokens)
    words = _words(
        {
            "tokens": [tokens] if tokens else [],
            "qkv": [_place(qkv)] if qkv else [],
            "dtype": [dtype] if dtype != DType.bf16 else [],
            "heads": [heads] if heads else [],
            "head-dim": [head_dim] if head_dim else [],
            "layer": [layer] if layer is not None else [],
        }
    )
    from hsgen import crossover, progress, tuned  # noqa: PLC0415  load torch

    with progress.bar() as told:
        found = crossover.measure_gates(
            bound,
            tokens=lengths,
            dtype=dtype.value,
            capture=qkv,
            seconds=seconds,
            command=["hsgen", "gate", _place(Path(spec)), *words],
            progress=told,
        )
    if export and found.gates:
        before = [each.record for each in tuned.read_gates_folder(export).kept]
        tuned.write_gates(export, tuned.merge_gates([*before, found.gates]))
    typer.echo(_json_text(found.record()) if as_json else str(found), nl=False)
    raise typer.Exit(0 if found.passed else 1)


def _place(file: Path) -> str:
    """A file without folders that only this machine has."""
    return file.name if file.is_absolute() else str(file)


def _require_choice(spec: Spec) -> None:
    """Nothing, where the spec chooses what it attends.

    Raises:
        HsgenError: another layer does, and there is no sample of that.
    """
    if spec.brought:
        raise HsgenError(
            f"{spec.name}: level {spec.brought[0]} takes over what another layer chose, and there is no"
            " sample of that yet",
            help="`hsgen compile --no-verify` and `hsgen show` need none",
        )


def _words(options: Mapping[str, Sequence[object]]) -> list[str]:
    """Options as they are typed."""
    return [
        word for name, values in options.items() for x in values for word in (f"--{name}", str(x))
    ]


@app.command(epilog="Example: hsgen tune nsa --shapes 8K,32K --budget 300s")
def tune(
    spec: SpecFile,
    *,
    shapes: Annotated[
        str, typer.Option(metavar="8K,1/32K", help="Calls to time: tokens, or queries/keys.")
    ] = "8K,32K",
    budget: Annotated[
        float, typer.Option(parser=_seconds, metavar="300s", help="Of the search; or 5m.")
    ] = "300s",  # type: ignore[assignment]  # typer parses defaults too
    trials: Annotated[int | None, typer.Option(min=1, help="Points that are measured.")] = None,
    gpus: Annotated[str, typer.Option(metavar="0,1", help="Numbers, or all.")] = "0",
    only: Annotated[
        str | None, typer.Option(metavar="KERNEL,...", help="Just these kernels, as planned.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    qkv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="A capture that inputs are made of."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="What several processes share: a file, or a URL."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write records there too, as tuned/ has them."),
    ] = None,
    point: Annotated[
        str | None, typer.Option("--try", metavar="POINT", help="Measure one point alone.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="DIR", help="Draw the study: history, axes, importances."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the space and prune it; needs no GPU.")
    ] = False,
    target: TargetName = "h100",  # type: ignore[assignment]  # of --dry-run
    dtype: TensorType = DType.bf16,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    layer: OfRoute = None,
    as_json: Json = False,
) -> None:
    """Find the fastest configuration of a spec on the GPU that is here: hsgen tune nsa.

    What is measured is kept at once: the same command goes on where it was stopped.
    """
    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim), layer=layer)
    _require_choice(bound)
    kernels = tuple(filter(None, (only or "").split(",")))
    from hsgen import measurer, progress, pruning  # noqa: PLC0415  load networkx

    calls = tuple(measurer.shape_of(text) for text in shapes.split(","))
    if dry_run:
        with progress.bar() as told:
            found = pruning.dry_run(
                bound, target, dtype.value, only=kernels, budget=budget, progress=told
            )
        typer.echo(_json_text(found.record()) if as_json else str(found), nl=False)
        return
    words = {
        "shapes": [shapes],
        "dtype": [dtype] if dtype != DType.bf16 else [],
        "heads": [heads] if heads else [],
        "head-dim": [head_dim] if head_dim else [],
        "layer": [layer] if layer is not None else [],
        "only": [only] if only else [],
        "qkv": [_place(qkv)] if qkv else [],
    }
    from hsgen import tune, tuned  # noqa: PLC0415  loads optuna

    options = tune.Options(
        dtype=dtype.value,
        shapes=calls,
        limits=tune.Limits(trials=math.inf if trials is None else trials, seconds=budget),
        gpus=tune.present_gpus() if gpus == "all" else tuple(map(str, _numbers(gpus))),
        seed=seed,
        capture=qkv,
        storage=storage,
        only=kernels,
        command=("hsgen", "tune", _place(Path(spec)), *_words(words)),
    )
    if point is not None:
        result = tune.attempt(bound, options, point)
        typer.echo(_json_text(result.record()) if as_json else f"{result}\n", nl=False)
        raise typer.Exit(0 if result.failure is None else 1)
    draw = _draw() if plots else None  # what is missing is said before the search
    with progress.line() as line:
        report = tune.tune(bound, options, tell=lambda status: line(str(status)))
    if export:
        before = [each.record for each in tuned.read_folder(export).kept]
        tuned.write(export, tuned.merge([*before, *report.records]))
    typer.echo(_json_text(report.record()) if as_json else str(report), nl=False)
    if plots and draw:
        draw(storage or report.journal, report.study, plots)


def _draw() -> Callable[[Path | str, str, Path], object]:
    """What draws a study.

    Raises:
        HsgenError: matplotlib is missing.
    """
    try:
        from hsgen.tune import pictures  # noqa: PLC0415  loads matplotlib
    except ModuleNotFoundError as error:
        help = 'pip install "hsgen[plots]"'
        raise HsgenError(f"--plots needs the package {error.name}", help=help) from error
    return pictures.pictures


@app.command(epilog="Example: hsgen search moba --qkv FILE --least --target h100 -o found")
def search(
    spec: SpecFile,
    *,
    qkv: Annotated[
        Path, typer.Option("--qkv", metavar="FILE", help="What errors are measured on.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Write the front into this folder."),
    ],
    least: Annotated[
        bool, typer.Option("--least", help="Time is the least by the roofline; needs no GPU.")
    ] = False,
    target: TargetName = "h100",  # type: ignore[assignment]  # typer parses defaults too
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", metavar="32K", help="Of a timed call; default as captured."),
    ] = None,
    layers: Layers = None,
    rows: Annotated[int, typer.Option(min=1, help="Measured, of the second half.")] = 256,
    trials: Annotated[int, typer.Option(min=1, help="Variants that are tried.")] = 60,
    budget: Annotated[
        float | None, typer.Option(min=0.0, metavar="SECONDS", help="None is begun after that.")
    ] = None,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    as_json: Json = False,
) -> None:
    """Look for better sizes and budgets of a spec: hsgen search moba --qkv FILE -o DIR.

    What was tried is kept in DIR: the same command goes on where it was stopped.
    """
    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim))
    lengths = _lengths(tokens)
    if len(lengths) > 1:
        raise typer.BadParameter(f"expected one number of tokens, got {tokens!r}")
    from hsgen import progress, search, variants  # noqa: PLC0415  load torch and optuna
    from hsgen.spec import drafts  # noqa: PLC0415

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HsgenError(f"{output}: cannot write: {error.strerror}") from error
    with progress.bar() as told:
        found = search.search(
            variants.variants(bound),
            qkv,
            search.clock(qkv, target if least else None, tokens=lengths[0] if lengths else None),
            layers=_numbers(layers),
            rows=rows,
            trials=trials,
            budget=math.inf if budget is None else budget,
            journal=output / "search.journal",
            progress=told,
        )
    made = {**search.texts(found), "front.svg": search.draw(found)}
    made["front.json"] = _json_text(found.record())
    for name, text in made.items():
        drafts.write(output / name, text, over=True)
    for path in search.outdated(found, output):
        path.unlink()
    typer.echo(made["front.json"] if as_json else str(found), nl=False)


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
        _print_json(record)
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
        _print_json(found.record())
    else:
        typer.echo(found.page() if page else str(found), nl=False)


# --- tuned

tuned_app = typer.Typer(help="What was tuned: which records there are, and who gets them.")
app.add_typer(tuned_app, name="tuned")

OfSpec = Annotated[str | None, typer.Argument(metavar="SPEC", help="Only of this one.")]
OfGpu = Annotated[str | None, typer.Option("--gpu", metavar="ID", help="Only of this folder.")]


@tuned_app.command(epilog="Example: hsgen tuned explain nsa --target h100 --tokens 8K,32K")
def explain(
    spec: SpecFile,
    *,
    target: TargetName = "h100",  # type: ignore[assignment]  # typer parses defaults too
    dtype: TensorType = DType.bf16,
    tokens: Annotated[str, typer.Option(metavar="8K,32K", help="T and S of one sequence.")] = "8K",
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    layer: OfRoute = None,
    as_json: Json = False,
) -> None:
    """Show which records a call could get, in order, and what it gets."""
    from hsgen import tuned  # noqa: PLC0415

    bound = load(spec).bind(heads=_pair(heads), head_dim=_pair(head_dim), layer=layer)
    ladders = [
        tuned.explain(bound, target, dtype.value, tuned.Bucket.of(n, n, 1, packed=False))
        for n in _lengths(tokens)
    ]
    found = tuned.crossovers(tuned.Problem.of(bound, dtype.value), tuned.environment(target))
    if as_json:
        _print_json({"calls": [ladder.record() for ladder in ladders], "gate": found.record()})
    else:
        typer.echo("\n".join([*map(str, ladders), f"{found}\n"]), nl=False)


@tuned_app.command(name="list", epilog="Example: hsgen tuned list nsa --gpu h100")
def list_(spec: OfSpec = None, *, gpu: OfGpu = None, as_json: Json = False) -> None:
    """List the records that are shipped, and those of the cache."""
    from hsgen import tuned  # noqa: PLC0415

    content = tuned.read_folder(tuned.committed()) + tuned.cached()
    held = tuned.read_gates_folder(tuned.committed()) + tuned.cached_gates()
    for flaw in (*content.flaws, *held.flaws):
        _complain(f"{flaw}; ignored")
    found = tuned.listing(content.kept, spec=spec, gpu=gpu)
    gates = tuned.gates_listing(held.kept, spec=spec, gpu=gpu)
    if as_json:
        _print_json({**found.record(), "gates": gates.record()})
    else:
        typer.echo(f"{found}{gates}", nl=False)


@tuned_app.command(name="check", epilog="Example: hsgen tuned check tuned")
def check_tuned(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Or a file; default what is shipped.")
    ] = None,
    *,
    cache: Annotated[bool, typer.Option(help="Those of the cache too.")] = False,
    as_json: Json = False,
) -> None:
    """Check records without a GPU: each line, and that every kernel compiles and fits."""
    from hsgen import progress, tuned  # noqa: PLC0415

    where = _there(folder) if folder else tuned.committed()
    content = tuned.read_folder(where)
    content += tuned.cached() if cache else tuned.Content()
    gates = tuned.read_gates_folder(where)
    gates += tuned.cached_gates() if cache else tuned.GatesContent()
    with progress.bar() as told:
        found = tuned.check(content, gates, progress=lambda done, all: told("compile", done, all))
    if as_json:
        _print_json(found.record())
    else:
        typer.echo(str(found), nl=False)
    raise typer.Exit(0 if found.passed else 1)


@tuned_app.command(epilog="Example: hsgen tuned merge tuned other/tuned")
def merge(
    into: Annotated[Path, typer.Argument(metavar="INTO", help="A folder as tuned/ is.")],
    others: Annotated[list[Path], typer.Argument(metavar="FROM...", help="Folders or files.")],
    *,
    as_json: Json = False,
) -> None:
    """Merge records into a folder: one a problem, bucket and environment, the others its alternates."""
    from hsgen import tuned  # noqa: PLC0415

    content, gates = tuned.read_folder(into), tuned.read_gates_folder(into)
    for other in others:
        content += tuned.read_folder(_there(other))
        gates += tuned.read_gates_folder(other)
    _merge(into, content, gates, as_json=as_json)


@tuned_app.command(epilog="Example: hsgen tuned export tuned --gpu h100")
def export(
    into: Annotated[Path, typer.Argument(metavar="DIR", help="A folder as tuned/ is.")],
    *,
    spec: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this one.")] = None,
    gpu: OfGpu = None,
    as_json: Json = False,
) -> None:
    """Merge the records of the cache into a folder, to be committed."""
    from hsgen import tuned  # noqa: PLC0415

    held = tuned.cached()
    kept = tuned.listing(held.kept, spec=spec, gpu=gpu).kept
    kept = tuple(each for each in kept if each.record.environment.gpu != tuned.INTERPRETER)
    content = tuned.Content(kept=kept, flaws=held.flaws) + tuned.read_folder(into)
    cached = tuned.cached_gates()
    gates = tuned.gates_listing(cached.kept, spec=spec, gpu=gpu).kept
    all_gates = tuned.GatesContent(kept=gates, flaws=cached.flaws) + tuned.read_gates_folder(into)
    _merge(into, content, all_gates, as_json=as_json)


def _merge(into: Path, content: Content, gates: GatesContent, *, as_json: bool) -> None:
    """Write one record a key; nothing where a line would be lost."""
    from hsgen import tuned  # noqa: PLC0415

    if flaws := (*content.flaws, *gates.flaws):
        raise HsgenError("\n".join(map(str, flaws)), help="nothing was written")
    merged = tuned.merge(kept.record for kept in content.kept)
    merged_gates = tuned.merge_gates(kept.record for kept in gates.kept)
    written = tuned.write(into, merged) + tuned.write_gates(into, merged_gates)
    count = len(merged) + len(merged_gates)
    if as_json:
        _print_json({"records": count, "written": [str(path) for path in written]})
    else:
        typer.echo("".join(f"{path}\n" for path in written), nl=False)
        _complain(f"{_count(count, 'record')}, {_count(len(written), 'file')} changed")


def _there(path: Path) -> Path:
    """A file or folder that exists; another one is wrong usage."""
    if not path.exists():
        raise typer.BadParameter(f"{path}: no such file or folder")
    return path


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
    typer.echo(_json_text(result), nl=False)


def _json_text(result: dict[str, object]) -> str:
    return json.dumps({"schema_version": SCHEMA_VERSION, **result}, indent=2) + "\n"


def _check_suffix(file: Path, *suffixes: str) -> None:
    """A file's suffix says its kind; another one is wrong usage."""
    if file.suffix.lower() not in suffixes:
        raise typer.BadParameter(
            f"expected a file that ends in {' or '.join(suffixes)}, got {file}"
        )


def _write(file: Path, content: bytes, *suffixes: str) -> None:
    """Write a picture."""
    _check_suffix(file, *suffixes)
    try:
        file.write_bytes(content)
    except OSError as error:
        raise HsgenError(f"{file}: cannot write this picture: {error.strerror}") from error


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
