"""The language as a JSON Schema, for editors: what keys there are, what each may hold, what it means.

Read off the classes of `model` and the keys of `reader`, so that a new key is here once it can be
read.  A schema sees one value at a time: what values must be to each other is for `rules` to say.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from typing import cast

from hsgen.spec import reader
from hsgen.spec.model import (
    HeadDim,
    Heads,
    Node,
    Spec,
    branches,
    choices,
    codes,
    entries,
    losses,
    permutes,
    queries,
    reuse,
    routes,
    scalars,
    scores,
    whole,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Json = dict[str, object]


def schema() -> Json:
    """The JSON Schema (draft 2020-12) of a spec."""
    made = Spec.model_json_schema()
    classes = _classes(Spec)
    docs = _field_docs()
    found = {**cast("dict[str, Json]", made["$defs"]), "Spec": made}
    defs = {
        name: _mapping(cls, found[name], found, docs[name])
        for name, cls in classes.items()
        if reader.keys(cls)  # one without keys is a word where it is used
    }
    top = defs.pop("Spec")
    return {"$schema": DIALECT, "title": "hsgen spec", **top, "$defs": defs}


def _classes(cls: type[Node]) -> dict[str, type[Node]]:
    """Every mapping of the language by name, from the top down."""
    found = {cls.__name__: cls}
    for field in cls.model_fields.values():
        for part in reader.nodes_of(field.annotation):
            found |= _classes(part)
    return found


def _mapping(
    cls: type[Node], made: Json, found: Mapping[str, Json], docs: Mapping[str, str]
) -> Json:
    """One class, its keys spelt as in YAML."""
    fields = cast("dict[str, Json]", made["properties"])
    keys = reader.keys(cls)
    properties: Json = {}
    for key in keys:
        value = _value(fields.get(key.like, {}), found)
        if key.sugar:
            value.pop("default", None)
        about = docs.get(key.field) or value.get("description") or _about_ref(value, found)
        properties[key.name] = {**value, "description": about or made["description"]}
    needed = [key.name for key in keys if key.needed]
    return {
        "type": "object",
        "description": made["description"],
        "properties": properties,
        "additionalProperties": False,
        **_required(cls, needed),
    }


def _required(cls: type[Node], needed: list[str]) -> Json:
    if cls is Heads:  # as the reader has it: one of the two, and not both
        needed.remove("query")
        either: list[Json] = [{"required": ["query"]}, {"required": ["group_size"]}]
        return {"required": needed, "oneOf": either}
    return {"required": needed} if needed else {}


def _value(made: Json, found: Mapping[str, Json]) -> Json:
    """What a field may hold.  `null` is no value of the language; a class without keys is a word."""
    left_out = {"title", "discriminator", "anyOf", "oneOf", "$ref"}
    rest = {key: value for key, value in made.items() if key not in left_out}
    if rest.get("default", ...) is None or isinstance(rest.get("default"), dict | list):
        del rest["default"]
    one = [{"$ref": made["$ref"]}] if "$ref" in made else []
    options = cast("list[Json]", made.get("anyOf") or made.get("oneOf") or one)
    shown = [part for one in options if one.get("type") != "null" for part in _option(one, found)]
    if len(shown) > 1:
        return {**rest, "anyOf": shown}
    return {**rest, **shown[0]} if shown else rest


def _option(made: Json, found: Mapping[str, Json]) -> list[Json]:
    """One way to write a value; of what has a short form as well, both; of a union, its members."""
    if "oneOf" in made:
        members = cast("list[Json]", made["oneOf"])
        return [part for one in members for part in _option(one, found)]
    name = str(made.get("$ref", "")).rpartition("/")[2]
    if name == HeadDim.__name__:  # as the reader has it: one number is both
        number = cast("dict[str, Json]", found[name]["properties"])["qk"]
        return [_value(number, found), made]
    if name and name in _words():
        return [{"const": _words()[name], "description": found[name]["description"]}]
    return [made]


@cache
def _words() -> dict[str, str]:
    """Class -> word, of the classes that have no keys: `Tokens` is `tokens`."""
    return {
        name: cls.model_fields["kind"].default
        for name, cls in _classes(Spec).items()
        if not reader.keys(cls)
    }


def _about_ref(value: Json, found: Mapping[str, Json]) -> object:
    """The docstring of the mapping that a field holds."""
    options = [value, *cast("list[Json]", value.get("anyOf", []))]
    names = [str(one["$ref"]).rpartition("/")[2] for one in options if "$ref" in one]
    return found[names[0]]["description"] if len(names) == 1 else None


def _field_docs() -> dict[str, dict[str, str]]:
    """Class -> field -> the comment beside it in `model`: there a field is explained once, for all."""
    parts = (scalars, permutes, entries, codes, scores, queries, choices, routes, branches)
    modules = (*parts, reuse, losses, whole)
    sources = [inspect.getsource(module) for module in modules]
    return {name: docs for source in sources for name, docs in _docs_in(source).items()}


def _docs_in(source: str) -> dict[str, dict[str, str]]:
    lines = source.splitlines()
    return {
        node.name: {
            part.target.id: comment
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            if (comment := _comment(lines, part).replace("None:", "left out:"))
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _comment(lines: list[str], part: ast.AnnAssign) -> str:
    """What follows a field on its line, or stands in comment lines right above it."""
    line, end = (part.end_lineno or part.lineno) - 1, part.end_col_offset or 0
    beside = lines[line].encode()[end:].decode().strip()
    if beside.startswith("#"):
        return beside.removeprefix("#").strip()
    above: list[str] = []
    for text in map(str.strip, reversed(lines[: part.lineno - 1])):
        if not text.startswith("#"):
            break
        above.insert(0, text.removeprefix("#").strip())
    return " ".join(above)
