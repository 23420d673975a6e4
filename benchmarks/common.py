"""What the measurements share: where they ran, specs with other numbers, results, tables.

Measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hsgen import machine
from hsgen.quality import Json
from hsgen.spec import Blocks, Level, Select, Spec

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHIPPED_CAPTURE = ROOT / "tests" / "data" / "smollm2_layer05.safetensors"

MISSING = "–"  # of a figure that is not there
LINE = 160  # characters of a line of a results file


# Where and when -------------------------------------------------------------------------------------


def provenance(module: str, argv: Sequence[str], device: str) -> Json:
    """Everything that a figure needs beside it: card, versions, date and command."""
    return machine.provenance(["python", "-m", module, *_without_output(argv)], device)


def _without_output(argv: Sequence[str]) -> list[str]:
    """A command but for where its results went: that is a folder of one machine."""
    kept, skip = [], False
    for word in argv:
        if not skip and word not in ("-o", "--output"):
            kept.append(word)
        skip = word in ("-o", "--output")
    return kept


def without_folders(argv: Sequence[str]) -> list[str]:
    """Words of a command, of absolute paths the last part."""
    return [Path(word).name if Path(word).is_absolute() else word for word in argv]


def slug(name: str) -> str:
    """A card's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# Specs ----------------------------------------------------------------------------------------------


def with_blocks(spec: Spec, level: str, size: int, stride: int | None = None) -> Spec:
    """The same attention with entries of another size on one level."""
    partition = Blocks(size=size, stride=stride or size)
    return _with_level(spec, level, {"partition": partition})


def with_budget(spec: Spec, level: str, count: int) -> Spec:
    """The same attention keeping another number of entries on one level."""
    old = spec.level(level).select
    assert old is not None, f"level {level} selects nothing"
    key = "top_k" if old.top_k else "beam"
    return _with_level(spec, level, {"select": old.model_copy(update={key: count})})


def _with_level(spec: Spec, name: str, update: Mapping[str, Blocks | Select]) -> Spec:
    def change(level: Level) -> Level:
        return level.model_copy(update=update) if level.name == name else level

    return spec.model_copy(update={"levels": tuple(change(level) for level in spec.levels)})


# Results and tables ---------------------------------------------------------------------------------


def write_json(path: Path, data: Json) -> None:
    """Write results so that a diff shows what changed, six digits a number; replaces the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(_laid_out(_rounded(data), 0) + "\n")
    partial.replace(path)


def _rounded(value: object) -> object:
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
    return value


def _laid_out(value: object, depth: int) -> str:
    """JSON with what fits a line on a line."""
    line, indent = json.dumps(value), " " * depth
    if len(line) <= LINE or not isinstance(value, dict | list):
        return line
    if isinstance(value, list):
        parts = [_laid_out(each, depth + 1) for each in value]
    else:
        parts = [f"{json.dumps(k)}: {_laid_out(each, depth + 1)}" for k, each in value.items()]
    first, last = "[]" if isinstance(value, list) else "{}"
    body = f",\n{indent} ".join(parts)
    return f"{first}\n{indent} {body}\n{indent}{last}"


def read_json(path: Path) -> Json:
    """Read results."""
    return json.loads(path.read_text())


def found(paths: Sequence[Path], kind: str) -> list[Path]:
    """The results to write up: those named, else all that are kept, by name."""
    return list(paths) or sorted(RESULTS.glob(f"{kind}_*.json"))


def written(
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    kind: str,
    run: Callable[[argparse.Namespace, Sequence[str]], Path],
    page: Callable[[Sequence[Json]], str],
) -> int:
    """Measure and print the page of that, or with --report write the page of what is kept."""
    if args.report is None:
        print(page([read_json(run(args, sys.argv[1:] if argv is None else argv))]))
        return 0
    results = [read_json(path) for path in found(args.report, kind)]
    (args.docs / f"{kind}.md").write_text(page(results))
    return 0


def number(value: float | None) -> str:
    """A figure of a table: three digits, or all before the point."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    rule = ["---", *(["---:"] * (len(head) - 1))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
