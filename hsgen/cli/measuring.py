"""`bench` and `gate`: what a spec costs on the GPU that is here, and below what length less would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsgen import paths
from hsgen.cli.app import app
from hsgen.cli.options import (
    Against,
    Device,
    DType,
    Figures,
    HeadCounts,
    HeadDims,
    Inputs,
    Json,
    Lengths,
    OfRoute,
    Peer,
    SpecFile,
    TensorType,
    attended,
    lengths_of,
    place,
    words_of,
)
from hsgen.cli.output import check_suffix, json_text


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
        check_suffix(output, ".json")
    lengths, peers = lengths_of(tokens), against or [Peer.dense]
    bound = attended(spec, heads, head_dim, layer)
    words = words_of(
        {
            "against": peers,
            "tokens": [tokens] if tokens else [],
            "qkv": [place(qkv)] if qkv else [],
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
            command=["hsgen", "bench", place(Path(spec)), *words],
            progress=told,
        )
    text = json_text(found.record())
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
    bound = attended(spec, heads, head_dim, layer)
    lengths = lengths_of(tokens)
    words = words_of(
        {
            "tokens": [tokens] if tokens else [],
            "qkv": [place(qkv)] if qkv else [],
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
            command=["hsgen", "gate", place(Path(spec)), *words],
            progress=told,
        )
    if export and found.gates:
        before = [each.record for each in tuned.read_gates_folder(export).kept]
        tuned.write_gates(export, tuned.merge_gates([*before, found.gates]))
    typer.echo(json_text(found.record()) if as_json else str(found), nl=False)
    raise typer.Exit(0 if found.passed else 1)
