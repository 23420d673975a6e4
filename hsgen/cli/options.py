"""Arguments and options that several commands have, and how their words are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsgen.errors import ArgumentError
from hsgen.target import Target

if TYPE_CHECKING:
    from hsgen.spec import Spec

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


class Work(StrEnum):
    """What is tuned, as the command line has it."""

    forward = "forward"
    gradients = "gradients"
    decode = "decode"


class Device(StrEnum):
    """Where a spec is timed."""

    cuda = "cuda"
    cpu = "cpu"


class Peer(StrEnum):
    """What a spec is timed beside."""

    dense = "dense"
    flex = "flex"


def target_of(text: str) -> Target:
    """A GPU by name; an unknown one is wrong usage."""
    try:
        return Target.named(text)
    except ArgumentError as error:
        raise typer.BadParameter(f"{error.message}: {error.help}") from error


def pair(text: str | None) -> tuple[int, int] | None:
    """32/8, or one number for both."""
    if text is None:
        return None
    parts = text.split("/")
    if not (1 <= len(parts) <= 2 and all(part.isdecimal() for part in parts)):
        raise typer.BadParameter(f"expected one or two numbers, as in 32/8, got {text!r}")
    return int(parts[0]), int(parts[-1])


def attended(spec: str, heads: str | None, head_dim: str | None, layer: int | None = None) -> Spec:
    """A spec, bound, of whose calls a command says something: where layers differ, as if it had no loss.

    A layer that learns by what it takes over would need its index for that.
    """
    from hsgen import planner  # noqa: PLC0415
    from hsgen.spec import load  # noqa: PLC0415

    found = load(spec)
    found = found if layer is None else planner.without_losses(found)
    return found.bind(heads=pair(heads), head_dim=pair(head_dim), layer=layer)


def name_of(text: str) -> str:
    """What a spec may be called; anything else is wrong usage."""
    from hsgen.spec import drafts  # noqa: PLC0415  only `new` has names

    try:
        return drafts.named(text)
    except ArgumentError as error:
        raise typer.BadParameter(f"{error.message}: {error.help}") from error


NewName = Annotated[str, typer.Argument(parser=name_of, metavar="NAME", help="Of the new spec.")]
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
    typer.Option(
        parser=target_of, metavar="GPU", help="h100, a100, 4090, b200, mi300x, sm_80, ..."
    ),
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


def numbers_of(text: str | None) -> tuple[int, ...]:
    """0,5,14; none at all where nothing is said."""
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(f"expected numbers, as in 0,5, got {text!r}")
    return tuple(int(part) for part in parts)


def batches_of(text: str | None, work: Work) -> tuple[int, ...]:
    """Sequences of steps, as 1,64; one where nothing is said."""
    if text is not None and work != Work.decode:
        raise typer.BadParameter(f"--batch is of --work decode, got {work.value}")
    found = numbers_of(text) or (1,)
    if min(found) < 1:
        raise typer.BadParameter(f"--batch: expected at least 1 sequence, got {text!r}")
    return found


def page_of(page: int | None, work: Work) -> int:
    """Tokens of a page of a cache; 0 where it has none."""
    if page is None:
        return 0
    if work != Work.decode:
        raise typer.BadParameter(f"--page is of --work decode, got {work.value}")
    if page < 1 or page & (page - 1) or page > 1024:
        raise typer.BadParameter(f"--page: expected a power of two up to 1024, got {page}")
    return page


def seconds_of(text: str) -> float:
    """300s, 5m, or seconds as a number."""
    number, factor = text.removesuffix("s"), 1.0
    if text.endswith("m"):
        number, factor = text.removesuffix("m"), 60.0
    try:
        return float(number) * factor
    except ValueError:
        raise typer.BadParameter(f"expected seconds, as in 300s or 5m, got {text!r}") from None


def lengths_of(text: str | None) -> tuple[int, ...]:
    """8K,32768; none at all where nothing is said."""
    parts = [part.strip().upper() for part in text.split(",")] if text is not None else []
    if not all(part.removesuffix("K").isdecimal() and part.strip("0K") for part in parts):
        raise typer.BadParameter(f"expected numbers of tokens, as in 8K,32K, got {text!r}")
    return tuple(int(part.removesuffix("K")) * (1024 if "K" in part else 1) for part in parts)


Batch = Annotated[
    str | None, typer.Option("--batch", metavar="1,64", help="Sequences, of --work decode.")
]
Page = Annotated[
    int | None,
    typer.Option("--page", metavar="16", help="Tokens of a page, of --work decode; default none."),
]
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
Storage = Annotated[
    str | None,
    typer.Option(metavar="PLACE", help="What several processes share: a file, or a URL."),
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


def place(file: Path) -> str:
    """A file without folders that only this machine has."""
    return file.name if file.is_absolute() else str(file)


def words_of(options: Mapping[str, Sequence[object]]) -> list[str]:
    """Options as they are typed."""
    return [
        word for name, values in options.items() for x in values for word in (f"--{name}", str(x))
    ]
