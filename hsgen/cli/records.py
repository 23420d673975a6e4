"""`tuned`: which records there are, and who gets them."""

from __future__ import annotations

from collections.abc import Sequence
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
    OfRoute,
    Page,
    SpecFile,
    TargetName,
    TensorType,
    Work,
    attended,
    batches_of,
    lengths_of,
    page_of,
)
from hsgen.cli.output import complain, counted, print_json
from hsgen.errors import HsgenError

if TYPE_CHECKING:
    from hsgen.tuned import Bucket, Content, GatesContent

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
    tokens: Annotated[
        str,
        typer.Option(
            metavar="8K,32K", help="T and S of one sequence, or 8K that a cache has room for."
        ),
    ] = "8K",
    work: Annotated[
        Work, typer.Option(help="Of calls, of their gradients, or of steps behind a cache.")
    ] = Work.forward,
    batch: Batch = None,
    page: Page = None,
    heads: HeadCounts = None,
    head_dim: HeadDims = None,
    layer: OfRoute = None,
    as_json: Json = False,
) -> None:
    """Show which records a call could get, in order, and what it gets."""
    from hsgen import tuned  # noqa: PLC0415

    bound, pages = attended(spec, heads, head_dim, layer), page_of(page, work)
    ladders = [
        tuned.explain(bound, target, dtype.value, bucket, work.value, pages)
        for bucket in _buckets(lengths_of(tokens), work, batch)
    ]
    found = tuned.crossovers(tuned.Problem.of(bound, dtype.value), tuned.environment(target))
    if as_json:
        print_json({"calls": [ladder.record() for ladder in ladders], "gate": found.record()})
    else:
        typer.echo("\n".join([*map(str, ladders), f"{found}\n"]), nl=False)


def _buckets(lengths: Sequence[int], work: Work, batch: str | None) -> list[Bucket]:
    """Of calls of one sequence, or of steps of one token."""
    from hsgen import configs, tuned  # noqa: PLC0415

    batches = batches_of(batch, work)
    if work != Work.decode:
        return [tuned.Bucket.of(n, n, 1, packed=False) for n in lengths]
    sizes = [configs.Sizes(tokens=1, keys=n, sequences=many) for n in lengths for many in batches]
    return [tuned.Bucket.of_steps(each) for each in sizes]


@tuned_app.command(name="list", epilog="Example: hsgen tuned list nsa --gpu h100")
def list_(spec: OfSpec = None, *, gpu: OfGpu = None, as_json: Json = False) -> None:
    """List the records that are shipped, and those of the cache."""
    from hsgen import tuned  # noqa: PLC0415

    content = tuned.read_folder(tuned.committed()) + tuned.cached()
    held = tuned.read_gates_folder(tuned.committed()) + tuned.cached_gates()
    for flaw in (*content.flaws, *held.flaws):
        complain(f"{flaw}; ignored")
    found = tuned.listing(content.kept, spec=spec, gpu=gpu)
    gates = tuned.gates_listing(held.kept, spec=spec, gpu=gpu)
    if as_json:
        print_json({**found.record(), "gates": gates.record()})
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
        print_json(found.record())
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
        print_json({"records": count, "written": [str(path) for path in written]})
    else:
        typer.echo("".join(f"{path}\n" for path in written), nl=False)
        complain(f"{counted(count, 'record')}, {counted(len(written), 'file')} changed")


def _there(path: Path) -> Path:
    """A file or folder that exists; another one is wrong usage."""
    if not path.exists():
        raise typer.BadParameter(f"{path}: no such file or folder")
    return path
