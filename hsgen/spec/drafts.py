"""A new spec from one that is there, or from a model's config: written whole or not at all."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

from hsgen.errors import ArgumentError, HsgenError, SpecError
from hsgen.spec import families, fields, files
from hsgen.spec.families import Found
from hsgen.spec.reader import parse
from hsgen.spec.text import dump

COLUMNS = 100  # of the comments that stand above a spec


def named(text: str) -> str:
    """The text, if it is one that a spec may be called by.

    Raises:
        ArgumentError: it is not.
    """
    smallest = f"hsgen: 1\nname: {json.dumps(text)}\nattend: [{{name: local, window: 1}}]\n"
    try:
        return parse(smallest).name
    except SpecError as error:
        raise ArgumentError(error.message, help=error.help) from error


def draft(name: str, preset: str | Path, *, schema: str | None = None) -> str:
    """The text of a spec under another name, comments and layout kept.

    Args:
        name: what the new one is called.
        preset: name of a shipped spec, or a path.
        schema: what editors are to check it by, as seen from where it will lie.

    Raises:
        ArgumentError: that is no name, or no place that a comment can say.
        HsgenError: there is no such preset.
        SpecError: the preset has mistakes.
    """
    path, text = files.read(preset)
    where = parse(text, str(path)).span("name")
    assert where is not None
    lines = text.decode("utf-8").removeprefix("\ufeff").splitlines(keepends=True)
    start, line = where.column - 1, lines[where.line - 1]
    lines[where.line - 1] = f"{line[:start]}{named(name)}{line[start + where.length :]}"
    return "".join([*(_modeline(schema) if schema else ()), *lines])


def from_config(
    name: str, config: Path, *, layer: int | None = None, schema: str | None = None
) -> tuple[str, Found]:
    """The text of a spec with the sizes of a model, and what it was made of.

    Args:
        name: what the spec is called.
        config: a config.json, or the folder that holds one.
        layer: the one layer it is to be of; None: all whose attention a spec can say.
        schema: what editors are to check it by, as seen from where it will lie.

    Raises:
        ArgumentError: that is no name; that layer has no attention that a spec says.
        HsgenError: there is no such config, or it says what cannot be, or what no spec can say.
    """
    said = fields.read(config)
    found = families.find(said, layer)
    spec = found.spec.model_copy(update={"name": named(name)})
    header = [line for note in found.notes for line in _comment(note)]
    text = "\n".join([*header, dump(spec)])
    try:
        parse(text, name)
    except SpecError as error:
        msg = f"{said.where}: no spec can say this: {error.message}"
        raise HsgenError(msg, help=error.help) from error
    return "".join([*(_modeline(schema) if schema else ()), text]), found


def _comment(note: str) -> list[str]:
    return textwrap.wrap(note, COLUMNS, initial_indent="# ", subsequent_indent="# ")


def _modeline(schema: str) -> tuple[str]:
    """The line by which yaml-language-server finds a schema; a blank would end the place."""
    if not schema.isprintable() or any(c.isspace() for c in schema):
        msg = f"schema: expected a path without blanks, got {schema!r}"
        raise ArgumentError(msg, help="move it, or name it otherwise")
    return (f"# yaml-language-server: $schema={schema}\n",)


def write(path: Path, text: str, *, over: bool = False) -> None:
    """Write a file so that nobody ever sees half of it.

    Args:
        path: the file.
        text: all that it will hold.
        over: replace what is there.

    Raises:
        HsgenError: it is there already, or cannot be written.
    """
    made = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with made.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        _publish(made, path, over=over)
    except FileExistsError as error:
        msg = f"{path}: expected no such file, got one"
        raise HsgenError(msg, help="write another name after -o, or remove that file") from error
    except (OSError, ValueError) as error:
        msg = f"{path}: cannot write: {getattr(error, 'strerror', None) or error}"
        raise HsgenError(msg) from error
    finally:
        made.unlink(missing_ok=True)


def _publish(made: Path, path: Path, *, over: bool) -> None:
    if over:
        made.replace(path)
        return
    try:
        os.link(made, path)  # fails where something is there, which a rename does not
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.touch(exist_ok=False)
        made.replace(path)
