"""`tune` and `search`: the fastest configuration of a spec, and what it could be instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsgen.cli.app import app
from hsgen.cli.options import (
    Batch,
    DType,
    HeadCounts,
    HeadDims,
    Json,
    Layers,
    OfRoute,
    Page,
    SpecFile,
    Storage,
    TargetName,
    TensorType,
    Work,
    attended,
    batches_of,
    lengths_of,
    numbers_of,
    page_of,
    pair,
    place,
    seconds_of,
    words_of,
)
from hsgen.cli.output import json_text
from hsgen.errors import HsgenError
from hsgen.spec import load

if TYPE_CHECKING:
    from hsgen.measurer import Shape
    from hsgen.tune import Report


@app.command(epilog="Example: hsgen tune nsa --shapes 8K,32K --budget 300s")
def tune(
    spec: SpecFile,
    *,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="8K,1/32K",
            help="Calls to time: tokens, or queries/keys; default 8K,32K.  Of steps 8K that a cache has.",
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            parser=seconds_of, metavar="300s", help="Of the search, before its finals; or 5m."
        ),
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
    storage: Storage = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write records there too, as tuned/ has them."),
    ] = None,
    work: Annotated[
        Work, typer.Option(help="What is tuned: calls, their gradients, or steps behind a cache.")
    ] = Work.forward,
    batch: Batch = None,
    page: Page = None,
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
    bound = attended(spec, heads, head_dim, layer)
    kernels = tuple(filter(None, (only or "").split(",")))
    from hsgen import progress, pruning  # noqa: PLC0415  load networkx

    pages, calls = page_of(page, work), _shapes(shapes, work, batch)
    if dry_run:
        with progress.bar() as told:
            found = pruning.dry_run(
                bound,
                target,
                dtype.value,
                work.value,
                calls[0].step_bucket.sizes(pages) if work == Work.decode else None,
                only=kernels,
                budget=budget,
                progress=told,
            )
        typer.echo(json_text(found.record()) if as_json else str(found), nl=False)
        return
    words = {
        "shapes": [",".join(call.name for call in calls)],
        "dtype": [dtype] if dtype != DType.bf16 else [],
        "work": [work.value] if work != Work.forward else [],
        "page": [page] if page else [],
        "heads": [heads] if heads else [],
        "head-dim": [head_dim] if head_dim else [],
        "layer": [layer] if layer is not None else [],
        "only": [only] if only else [],
        "qkv": [place(qkv)] if qkv else [],
    }
    from hsgen import tune, tuned  # noqa: PLC0415  loads optuna

    options = tune.Options(
        dtype=dtype.value,
        work=work.value,
        page=pages,
        shapes=calls,
        limits=tune.Limits(trials=math.inf if trials is None else trials, seconds=budget),
        gpus=tune.present_gpus() if gpus == "all" else tuple(map(str, numbers_of(gpus))),
        seed=seed,
        capture=qkv,
        storage=storage,
        only=kernels,
        command=("hsgen", "tune", place(Path(spec)), *words_of(words)),
    )
    if point is not None:
        result = tune.attempt(bound, options, point)
        typer.echo(json_text(result.record()) if as_json else f"{result}\n", nl=False)
        raise typer.Exit(0 if result.failure is None else 1)
    draw = drawing() if plots else None  # what is missing is said before the search
    reports: list[Report] = []
    with progress.line() as line:
        for report in tune.tune_each(bound, options, tell=lambda status: line(str(status))):
            reports.append(report)
            if export:
                before = [each.record for each in tuned.read_folder(export).kept]
                tuned.write(export, tuned.merge([*before, *report.records]))
    records = [report.record() for report in reports]
    if as_json:
        typer.echo(json_text(records[0] if len(records) == 1 else {"searches": records}), nl=False)
    else:
        typer.echo("".join(map(str, reports)), nl=False)
    for report in reports if plots and draw else ():
        assert plots is not None
        assert draw is not None
        where = plots if len(reports) == 1 else plots / report.study
        draw(storage or report.journal, report.study, where)


def _shapes(text: str | None, work: Work, batch: str | None) -> tuple[Shape, ...]:
    """Calls to time; of steps, 8K is one token of each sequence behind as many."""
    from hsgen import measurer  # noqa: PLC0415

    usual = "8K,64K" if work == Work.decode else "8K,32K"
    found = tuple(measurer.shape_of(each) for each in (text or usual).split(","))
    batches = batches_of(batch, work)
    if work != Work.decode:
        return found
    if batch is not None and (many := next((x for x in found if x.sequences > 1), None)):
        raise typer.BadParameter(f"--batch: expected none beside {many.name}, got {batch!r}")
    rows = tuple(replace(x, queries=1) if x.queries == x.keys else x for x in found)
    if batch is None:
        return rows
    return tuple(replace(x, sequences=many) for x in rows for many in batches)


def drawing() -> Callable[[Path | str, str, Path], object]:
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
    storage: Storage = None,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    as_json: Json = False,
) -> None:
    """Look for better sizes and budgets of a spec: hsgen search moba --qkv FILE -o DIR.

    What was tried is kept in DIR, or in PLACE: the same command goes on where it was stopped.
    """
    bound = load(spec).bind(heads=pair(heads), head_dim=pair(head_dim))
    lengths = lengths_of(tokens)
    if len(lengths) > 1:
        raise typer.BadParameter(f"expected one number of tokens, got {tokens!r}")
    from hsgen import progress, search, tiles, variants  # noqa: PLC0415  load torch and optuna
    from hsgen.spec import drafts  # noqa: PLC0415

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HsgenError(f"{output}: cannot write: {error.strerror}") from error
    with progress.bar() as told:
        clock = search.clock(qkv, target if least else None, tokens=lengths[0] if lengths else None)
        found = search.search(
            variants.variants(bound, tiles.knobs() if clock.turns_tiles else ()),
            qkv,
            clock,
            layers=numbers_of(layers),
            rows=rows,
            trials=trials,
            budget=math.inf if budget is None else budget,
            storage=storage or output / "search.journal",
            progress=told,
        )
    made = {**search.texts(found), "front.svg": search.draw(found)}
    made["front.json"] = json_text(found.record())
    for name, text in made.items():
        drafts.write(output / name, text, over=True)
    for path in search.outdated(found, output):
        path.unlink()
    typer.echo(made["front.json"] if as_json else str(found), nl=False)
