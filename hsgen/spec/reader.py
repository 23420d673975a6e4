"""A tree of words -> a Spec: which keys there are, what each may hold, and where each one stood.

The keys and what they may hold are read off the classes of `model`, so that message and type
cannot drift.  A misspelt key is reported and then read as what it was meant to be, so that one slip
does not bring a train of others.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Literal, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hsgen.errors import Diagnostic, Span, SpecError, nearest
from hsgen.spec import rules, syntax
from hsgen.spec.model import (
    LANGUAGE,
    MAX_CALLS,
    MAX_COUNT,
    Blocks,
    Diagonals,
    Force,
    Halving,
    Heads,
    KMeans,
    LearnedTree,
    Node,
    Parts,
    Path,
    Ragged,
    SortInSegment,
    Spec,
    Stripes,
    Tile,
)
from hsgen.spec.syntax import Items, Keys, Tree, Unreadable, Word

Data = dict[str, "Plain"]
Plain = str | int | float | bool | None | Node | Data | tuple["Plain", ...]

# keys that are no fields, and fields that are no keys
_SUGAR: Mapping[type[Node], tuple[str, ...]] = {Heads: ("group_size",), Force: ("own",)}
_HIDDEN = {"kind"}
# partitions: those that are a word, and those that are a mapping, by the key that tells them apart
_WORD_KINDS = {"tokens", "clusters"}
_KINDS: Mapping[str, type[Node]] = {
    "blocks": Blocks,
    "parts": Parts,
    "halving": Halving,
    "tree": LearnedTree,
    "ragged": Ragged,
    "stripes": Stripes,
    "diagonals": Diagonals,
}
# orders of keys, told apart in the same way
_WORD_ORDERS = {"gather"}
_ORDERS: Mapping[str, type[Node]] = {
    "sort_in_segment": SortInSegment,
    "kmeans": KMeans,
    "tile": Tile,
}

# words of the language that this version does not know yet; everything else is a slip of the pen
_PLANNED_WORDS = """
    cosine pages softmax_mass
"""
_PLANNED = frozenset(_PLANNED_WORDS.split())


def parse(text: str | bytes, filename: str = "<spec>") -> Spec:
    """Read a spec.

    Args:
        text: YAML; bytes are UTF-8.
        filename: what to call it in messages; nothing is opened.

    Raises:
        SpecError: with every mistake of the text.
    """
    tree, found = syntax.read(text, filename)
    if tree is None:
        raise SpecError(found)
    reading = _Reading(found)
    spec = reading.spec(tree)
    if spec is None or reading.found:
        raise SpecError(reading.found)
    return spec


class _Reading:
    """One tree while it is read.  Grows `found` and remembers where each field stood."""

    def __init__(self, found: list[Diagnostic]) -> None:
        self.found = found
        self.spans: dict[Path, Span] = {}  # of values; of keys where the value is no single word
        self.keys: dict[Path, Span] = {}
        self.broken: set[Path] = set()  # already reported; whatever depends on it is not judged

    def spec(self, tree: Keys) -> Spec | None:
        """The Spec; None where the text is of another version, or too little of it is right."""
        if not self.version(tree):
            return None
        self.spans[()] = tree.items[0][0].span if tree.items else tree.span
        data = self.model(tree, (), Spec)
        spec = self.validated(data)
        if spec is None:
            return None
        for problem in rules.problems(spec, self.broken):
            span = self.key_of(problem.path) if problem.at_key else self.place(problem.path)
            self.report(problem.code, span, problem.message, problem.help)
        return spec.located(self.spans)

    def version(self, tree: Keys) -> bool:
        """Whether the text is in this version of the language; a later one is not judged."""
        for key, node in tree.items:
            if key.text != "hsgen" or not isinstance(node, Word):
                continue
            number = syntax.value(node)
            if isinstance(number, Diagnostic) or (number == LANGUAGE and type(number) is int):
                return True
            later = type(number) is int and number > LANGUAGE
            message = f"expected language version {LANGUAGE}, got {_shown(number)}"
            help = (
                f"upgrade hsgen, or write 'hsgen: {LANGUAGE}'"
                if later
                else f"write 'hsgen: {LANGUAGE}'"
            )
            self.report("HS038", node.span, message, help)
            self.broken.add(("hsgen",))
            return not later
        return True

    # Shapes ---------------------------------------------------------------------------------------

    def model(self, tree: Keys, path: Path, cls: type[Node]) -> Data:
        """A mapping that holds the keys of `cls`."""
        entries = self.entries(tree, path, cls)
        if cls is Heads:
            return self.heads(tree, entries, path)
        if cls is Force:
            return self.force(entries, path)
        return self.fields(tree, entries, path, cls)

    def fields(self, tree: Keys, entries: Mapping[str, Tree], path: Path, cls: type[Node]) -> Data:
        """The fields of `cls`; what is missing is reported and stood in for."""
        data: Data = {}
        for field, node in entries.items():
            data[field] = self.value(node, (*path, field))
        for key, field in _keys(cls).items():
            if field not in data and _is_needed(cls, field):
                here = self.spans.get(path, tree.span)
                example = _example((*path, field)) or f"{key}: ..."
                self.report(
                    "HS030", here, f"missing key '{key}' in {_where(path)}", f"write '{example}'"
                )
                data[field] = self.stand_in((*path, field))
        return data

    def value(self, node: Tree, path: Path) -> Plain:
        """What a field holds, of the shape that its type has."""
        if isinstance(node, Unreadable):
            return self.stand_in(path)
        if (union := _union_of(path)) is not None:
            return self.told_apart(node, path, union)
        if path == ("head_dim",) and isinstance(node, Word):
            number = self.word(node, path)
            return {"qk": number, "v": number}
        shape = _shape(path)
        if isinstance(shape, type):
            if isinstance(node, Keys):
                return self.model(node, path, shape)
            return self.mismatch(node, path)
        if shape == "list":
            return self.listed(node, path) if isinstance(node, Items) else self.mismatch(node, path)
        return self.word(node, path) if isinstance(node, Word) else self.mismatch(node, path)

    def listed(self, node: Items, path: Path) -> Plain:
        """The levels, branches, heads of a static rule, ways of a route, or a word for every axis."""
        limit = _most(path)
        if len(node.items) > limit:
            message = f"expected at most {limit} entries in {_where(path)}, got {len(node.items)}"
            self.report("HS039", node.items[limit].span, message, "leave some out")
            self.broken.add((*path, -1))
        if not node.items and path == ("attend",):
            self.report(
                "HS030", node.span, "missing branch in 'attend'", f"write '{_EXAMPLE['attend']}'"
            )
            return self.stand_in(path)
        return tuple(self.item(tree, (*path, i)) for i, tree in enumerate(node.items[:limit]))

    def item(self, node: Tree, path: Path) -> Plain:
        """One level, one branch, one head, or one word."""
        self.spans[path] = self.keys[path] = node.span
        cls = _shape(path)
        if isinstance(node, Unreadable):
            return self.stand_in(path)
        if not isinstance(cls, type):
            return self.word(node, path) if isinstance(node, Word) else self.mismatch(node, path)
        if not isinstance(node, Keys):
            return self.mismatch(node, path)
        for key, value in node.items:
            if key.text == "name":
                self.spans[path] = value.span
        return self.model(node, path, cls)

    def told_apart(self, node: Tree, path: Path, union: _Union) -> Plain:
        """A word, as `tokens`, or a mapping that the key of its kind tells apart: `{blocks: 64}`."""
        if isinstance(node, Keys):
            return self.kind_of(node, path, union)
        word = self.word(node, path) if isinstance(node, Word) else None
        if path not in self.broken and word not in union.words:
            got = _shown(word) if isinstance(node, Word) else _kind(node)
            self.no_kind(node.span, got, path, union, _not_yet(word))
        return {"kind": word if path not in self.broken else union.stand_in}

    def kind_of(self, node: Keys, path: Path, union: _Union) -> Plain:
        """A mapping, by the first key that is the name of a kind."""
        said, kinds = [key.text for key, _ in node.items], union.mappings
        kind = next((key for key in said if key in kinds), None)
        if kind is None and len(kinds) > 1:
            close = next((near for key in said if (near := nearest(key, kinds))), None)
            planned = next((_not_yet(key) for key in said if key in _PLANNED), None)
            self.no_kind(
                node.span,
                f"a mapping without {_listed(kinds)}",
                path,
                union,
                planned or (f"did you mean '{close}'?" if close else None),
            )
            return {"kind": union.stand_in}
        cls = kinds[kind or next(iter(kinds))]
        data = self.fields(node, self.entries(node, path, cls), path, cls)
        if cls is Blocks:
            size = data["size"]
            if "stride" not in data and not (type(size) is int and 1 <= size <= MAX_COUNT):
                self.broken.add((*path, "stride"))  # it is the size that gets reported
            data.setdefault("stride", size)
        return {"kind": cls.model_fields["kind"].default, **data}

    def no_kind(self, span: Span, got: str, path: Path, union: _Union, help: str | None) -> None:
        """Report what is of no kind at all."""
        message = f"expected {union.expected}, got {got}"
        self.report("HS035", span, message, help or union.advice)
        self.broken.add(path)

    def heads(self, tree: Keys, entries: Mapping[str, Tree], path: Path) -> Data:
        """`{query, kv}`, or `{kv, group_size}`."""
        both = "query" in entries and "group_size" in entries
        if both or ("group_size" not in entries and "query" not in entries):
            got = "both" if both else "neither"
            at = self.keys.get((*path, "group_size"), self.spans.get(path, tree.span))
            message = f"expected 'query' or 'group_size' in 'heads', got {got}"
            self.report("HS051", at, message, "write {query: 32, kv: 8} or {kv: 8, group_size: 4}")
            self.broken.add(path)
        data: Data = {field: self.value(node, (*path, field)) for field, node in entries.items()}
        if "kv" not in data:
            self.report(
                "HS030",
                self.spans.get(path, tree.span),
                "missing key 'kv' in 'heads'",
                "write 'kv: 8'",
            )
            data["kv"] = self.stand_in((*path, "kv"))
        group = data.pop("group_size", None)
        if "query" not in data:
            data["query"] = self.product(group, data["kv"], path)
        return data

    def product(self, group: Plain, kv: Plain, path: Path) -> int:
        """The query heads that `kv` and `group_size` make."""
        at = (*path, "group_size")
        counts = [n for n in (group, kv) if type(n) is int and n >= 1]
        if len(counts) == 2 and counts[0] * counts[1] <= MAX_COUNT:
            return counts[0] * counts[1]
        if path not in self.broken and at not in self.broken and type(kv) is int and kv >= 1:
            message = f"expected a whole number from 1 to {MAX_COUNT // kv}, got {_shown(group)}"
            code = "HS033" if type(group) is int else "HS032"
            self.report(code, self.place(at), message, "write 'group_size: 4'")
        self.broken.add((*path, "query"))
        return 1

    def force(self, entries: Mapping[str, Tree], path: Path) -> Data:
        """`own: true` is one way to say `last: 1`."""
        data: Data = {field: self.value(node, (*path, field)) for field, node in entries.items()}
        if "own" not in data:
            return data
        own, at = data.pop("own"), (*path, "own")
        last = data.get("last", 0)
        if type(own) is not bool:
            if at not in self.broken:
                message = f"expected true or false for 'own', got {_shown(own)}"
                self.report("HS034", self.place(at), message, "write 'own: true'")
                self.broken.add(at)
        elif own and (type(last) is not int or last < 1):
            data["last"] = max(last, 1) if type(last) is int else last
            self.spans.setdefault((*path, "last"), self.place(at))
        elif not own and type(last) is int and last >= 1:
            message = (
                f"expected own: true with last: {last}, whose last entry is the own one, got false"
            )
            self.report("HS072", self.place(at), message, "remove 'own', or write 'last: 0'")
        return data

    def entries(self, tree: Keys, path: Path, cls: type[Node]) -> dict[str, Tree]:
        """Field -> value; unknown keys are reported, and read as the nearest key that is free."""
        known = _keys(cls)
        said = {key.text for key, _ in tree.items}
        found: dict[str, Tree] = {}
        for key, node in tree.items:
            name = key.text
            if name not in known:
                name = nearest(name, known.keys()) or ""
                self.unknown(key, path, known, name)
                if not name or name in said:
                    continue
                said.add(name)
            at = (*path, known[name])
            self.keys[at] = key.span
            self.spans[at] = node.span if isinstance(node, Word) else key.span
            found[known[name]] = node
        return found

    def unknown(self, key: Word, path: Path, known: Mapping[str, str], meant: str) -> None:
        """Report a key that does not exist, with the keys that do."""
        listed = f"keys here: {', '.join(sorted(known))}"
        not_yet = f"{_not_yet(key.text)};" if key.text in _PLANNED else ""
        help = not_yet or (f"did you mean '{meant}'?" if meant else "")
        message = f"unknown key '{syntax.short(key.text)}' in {_where(path)}"
        self.report("HS012", key.span, message, f"{help} {listed}".strip())

    # Words ----------------------------------------------------------------------------------------

    def word(self, node: Word, path: Path) -> Plain:
        """A single value, if YAML's versions agree on it."""
        value = syntax.value(node)
        if not isinstance(value, Diagnostic):
            return value
        self.found.append(value)
        return self.stand_in(path)

    def mismatch(self, node: Tree, path: Path) -> Plain:
        """Report a list for a word, and the like."""
        if isinstance(node, Word):
            value = syntax.value(node)
            if isinstance(value, Diagnostic):
                self.found.append(value)
                return self.stand_in(path)
        got = _shown(node.text) if isinstance(node, Word) else _kind(node)
        example = _example(path)
        help = f"write '{example}'" if example else f"write {_expected(path)}"
        self.report(
            "HS031", node.span, f"expected {_expected(path)} for {_where(path)}, got {got}", help
        )
        return self.stand_in(path)

    def stand_in(self, path: Path) -> Plain:
        """Something valid in place of what is wrong, so that the rest can be judged."""
        self.broken.add(path)
        return _stand_in(path)

    def validated(self, data: Data) -> Spec | None:
        """The Spec of `data`; each value out of range is reported and stood in for."""
        try:
            return Spec.model_validate(data)
        except ValidationError as error:
            for detail in _one_each(error):
                path = _path(detail["loc"])
                if not self.is_broken(path):
                    self.out_of_range(detail, path)
                _put(data, path, self.stand_in(path))
        try:
            return Spec.model_validate(data)
        except ValidationError:
            return None

    def out_of_range(self, detail: ErrorDetails, path: Path) -> None:
        """Report a value that its field cannot hold."""
        value: object = detail["input"]
        code = _code(detail["type"], path)
        key = _key_name(path)
        help = _not_yet(value) or _advice(value, path)
        message = f"expected {_expected(path)} for '{key}', got {_shown(value)}"
        self.report(code, self.place(path), message, help)

    def is_broken(self, path: Path) -> bool:
        """Whether this, or what holds it, is reported already."""
        return any(path[:end] in self.broken for end in range(len(path) + 1))

    # Places ---------------------------------------------------------------------------------------

    def report(self, code: str, span: Span, message: str, help: str | None) -> None:
        """Add one mistake."""
        self.found.append(Diagnostic(code=code, message=message, span=span, help=help))

    def place(self, path: Path) -> Span:
        """Where a field stands, or the nearest thing around it."""
        return _nearest_span(self.spans, path)

    def key_of(self, path: Path) -> Span:
        """Where the key of a field stands, or the nearest thing around it."""
        return self.keys.get(path) or self.place(path)


def _nearest_span(spans: Mapping[Path, Span], path: Path) -> Span:
    found = (spans.get(path[:end]) for end in range(len(path), 0, -1))
    return next((span for span in found if span), None) or spans[()]


# What the classes say -----------------------------------------------------------------------------


def _example(path: Path) -> str | None:
    """A field as one would write it."""
    key, part = _key_name(path), _part(path)[0]
    if get_origin(part) is tuple and not _has_class(part) and key not in _EXAMPLE:
        return f"{key}: [true, false]" if get_args(part)[0] is bool else f"{key}: [8, 16, 16]"
    owned = f"{_key_name(path[:-1])}.{key}" if len(path) > 1 else key
    return _EXAMPLE.get(owned) or _EXAMPLE.get(key)


def _most(path: Path) -> int:
    """The longest list that a field holds."""
    return next(x for limit in _part(path)[1] if (x := getattr(limit, "max_length", None)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Union:
    """What may stand in one place: words, and mappings by the key that tells them apart."""

    words: Collection[str]
    mappings: Mapping[str, type[Node]]
    stand_in: str
    expected: str
    advice: str


_PARTITION = _Union(
    words=_WORD_KINDS,
    mappings=_KINDS,
    stand_in="tokens",
    expected="'tokens', 'clusters', or a mapping {blocks: size, stride: step}, {parts: number} or"
    " {diagonals: size}",
    advice="write 'partition: tokens' or 'partition: {blocks: 64}'",
)
_ORDER = _Union(
    words=_WORD_ORDERS,
    mappings=_ORDERS,
    stand_in="gather",
    expected="'gather', or a mapping {sort_in_segment: size, ...}, {kmeans: clusters, ...} or"
    " {tile: sizes}",
    advice="write '{sort_in_segment: 256, by: mass, last: 128}' or 'gather'",
)


def _union_of(path: Path) -> _Union | None:
    if path[-1] == "partition":
        return _PARTITION
    return _ORDER if path[-2:-1] == ("permute",) else None


_EXAMPLE = {
    "hsgen": "hsgen: 1",
    "name": "name: my_attention",
    "heads": "heads: {query: 32, kv: 8}",
    "heads.query": "query: 32",
    "query.heads": "heads: mean",
    "head_dim": "head_dim: 128",
    "index": "index: {heads: 64, dim: 128}",
    "permute": "permute: {keys: {sort_in_segment: 256, by: mass, last: 128}}",
    "sort_in_segment": "sort_in_segment: 256",
    "by": "by: mass",
    "kmeans": "kmeans: 1000",
    "tile": "tile: [4, 4, 4]",
    "iterations": "iterations: 50",
    "partition": "partition: {blocks: 64}",
    "blocks": "blocks: 64",
    "parts": "parts: 128",
    "pool": "pool: {keys: mean}",
    "query": "query: {block: 128, pool: mean}",
    "score": "score: {form: dot}",
    "select": "select: {top_k: 16}",
    "codes": "codes: {words: 16, dim: 8}",
    "words": "words: 16",
    "dim": "dim: 128",
    "force": "force: {first: 1, last: 1}",
    "route": "route: {by: layer, table: [full, near]}",
    "route.by": "by: layer",
    "table": "table: [full, near]",
    "levels": "levels: [{name: block, ...}]",
    "attend": "attend: [{name: local, window: 512}]",
    "combine": "combine: {gates: input}",
    "reuse": "reuse: [{level: token, over: layers, as: final, every: 4}]",
    "as": "as: final",
    "pattern": "pattern: FSSS",
    "loss": "loss: {kl: {level: token}}",
    "kl": "kl: {level: token}",
    "dual_entropy": "dual_entropy: {tree: leaf, temperature: 0.1}",
    "distill": "distill: {student: sparse, teacher: full}",
    "top_p": "top_p: {mass: 0.9}",
    "quota": "quota: [{merge: 1, fraction: 0.1}, {merge: 8, fraction: 0.2}]",
    "merge": "merge: 2",
    "early_stop": "early_stop: {gain: 0.01, entries: 64}",
    "gain": "gain: 0.01",
    "entries": "entries: 64",
    "mass": "mass: 0.9",
    "static": "static: {blocks: 64, window: 16, sink: 1}",
    "per_head": "per_head: [{window: 16}, {window: 64}]",
    "rotate": "rotate: {at: first, dims: 64, base: 10000.0}",
    "at": "at: first",
    "delta": "delta: {threshold: 0.1, window: 128}",
    "threshold": "threshold: 0.1",
    "axes": "axes: [30, 48, 80]",
    "grid": "grid: {window: [8, 16, 16]}",
    "spans": "spans: {factor: 2.0, power: 0.5}",
    "ragged": "ragged: given",
}
_CODES = {
    "int_type": "HS032",
    "int_from_float": "HS032",
    "float_type": "HS032",
    "greater_than_equal": "HS033",
    "less_than_equal": "HS033",
    "finite_number": "HS033",
    "bool_type": "HS034",
    "literal_error": "HS035",
}


def _code(kind: str, path: Path) -> str:
    """Our code for pydantic's kind of error; the rest of them are about texts."""
    return _CODES.get(kind) or ("HS037" if path == ("source",) else "HS036")


@cache
def _keys(cls: type[Node]) -> Mapping[str, str]:
    """YAML key -> field, in the order of the class."""
    renamed = {field: key for key, field in cls.renamed.items()}
    fields = [field for field in cls.model_fields if field not in _HIDDEN]
    sugar = _SUGAR.get(cls, ())
    return {renamed.get(field, field): field for field in fields} | {key: key for key in sugar}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of a mapping: the field it sets; of sugar, that field is none, and `like` holds the same."""

    name: str
    field: str
    like: str
    needed: bool

    @property
    def sugar(self) -> bool:
        """Whether this is another way to say what other keys say."""
        return self.field != self.like


def keys(cls: type[Node]) -> tuple[Key, ...]:
    """The keys of a mapping, in the order of its class."""
    return tuple(
        Key(
            name=name,
            field=field,
            like=field if field in cls.model_fields else _LIKE.get(field, field),
            needed=field in cls.model_fields and _is_needed(cls, field),
        )
        for name, field in _keys(cls).items()
    )


def nodes_of(annotation: object) -> tuple[type[Node], ...]:
    """The mappings that a type speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return (annotation,)
    return tuple(node for part in get_args(annotation) for node in nodes_of(part))


def _is_needed(cls: type[Node], field: str) -> bool:
    if cls is Blocks:
        return field == "size"
    return field == "hsgen" or cls.model_fields[field].is_required()


def _part(path: Path) -> tuple[object, tuple[object, ...]]:
    """The type of a field, without `None`, and the limits on it."""
    return _part_at(tuple(0 if isinstance(step, int) else step for step in path))


@cache
def _part_at(path: Path) -> tuple[object, tuple[object, ...]]:
    """As `_part`, which is the same for all items of a list."""
    here: object = Spec
    limits: tuple[object, ...] = ()
    for step in path:
        if isinstance(step, int):
            here, limits = get_args(here)[0], ()
        else:
            name = _LIKE.get(step, step)
            field = _class(here, name).model_fields[name]
            here, limits = field.annotation, tuple(field.metadata)
        if NoneType in (args := get_args(here)):
            rest = [arg for arg in args if arg is not NoneType]
            here = rest[0] if len(rest) == 1 else here
        if get_origin(here) is Annotated:
            here, *more = get_args(here)
            limits = tuple(limit for part in more for limit in getattr(part, "metadata", [part]))
    return here, limits


# sugar holds what these fields hold
_LIKE = {"group_size": "kv", "own": "counted"}


def _class(annotation: object, field: str | None = None) -> type[Node]:
    """The mapping that a type says there is; of several kinds, the first that has the field."""
    classes = [cls for cls in nodes_of(annotation) if _keys(cls)] or [*nodes_of(annotation)]
    return next((cls for cls in classes if field in cls.model_fields), classes[0])


def _shape(path: Path) -> type[Node] | Literal["list", "word"]:
    part, _ = _part(path)
    if get_origin(part) is tuple:
        return "list"
    return part if isinstance(part, type) and issubclass(part, Node) else "word"


def _expected(path: Path) -> str:
    """What a field holds, in words."""
    part, limits = _part(path)
    if path[-1] == "head_dim":
        return "a whole number, or a mapping {qk: ..., v: ...}"
    if path[-2:] == ("score", "scale"):
        return "a number from 1e-9 to 1e9 or none"
    if any(get_origin(one) is Annotated for one in get_args(part)) and _words(part):
        return f"a whole number from 1 to {MAX_COUNT} or {_words(part)[0]}"  # a Count or a word
    shape = _shape(path)
    if isinstance(shape, type):
        return f"a mapping with keys {', '.join(_keys(shape))}"
    if shape == "list":
        return "a list"
    if part is int:
        low, high = (int(_limit(limits, end)) for end in ("ge", "le"))
        return f"a whole number from {low} to {high}"
    if part is float:
        low, high = (_limit(limits, end) for end in ("ge", "le"))
        return f"a number from {low:g} to {high:g}"
    if part is bool:
        return "true or false"
    if part is str:
        return _TEXTS.get(str(path[-1]), _A_NAME)
    words = [str(word) for word in get_args(part)]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _stand_in(path: Path) -> Plain:
    part, _ = _part(path)
    last = path[-1]
    if isinstance(last, int):
        word = _unnamed(path) if part is str else part is not bool
        return _smallest(_class(part), path) if _has_class(part) else word
    if last in _LIKE:
        return None
    owner = _class(_part(path[:-1])[0], last) if len(path) > 1 else Spec
    field = owner.model_fields[last]
    if last == "partition":
        return {"kind": "tokens"}
    if path == ("attend",):
        return ({"name": "unnamed", "window": 1},)
    if not field.is_required():
        return cast("Plain", field.get_default())
    if get_origin(part) is tuple:
        return ()
    if part is str:
        return _unnamed(path)
    return _smallest(_class(part), path) if _has_class(part) else 1


def _unnamed(path: Path) -> str:
    """A name that no other stand-in has."""
    steps = path[1:] if isinstance(path[-1], int) else path[1:-1]
    return "_".join(["unnamed", *(str(step) for step in steps)])


def _smallest(cls: type[Node], path: Path) -> Data:
    needed = [field for field in cls.model_fields if cls.model_fields[field].is_required()]
    return {field: _stand_in((*path, field)) for field in needed}


# Errors of pydantic -------------------------------------------------------------------------------


def _one_each(error: ValidationError) -> Iterator[ErrorDetails]:
    """The first error of each field; a union tells one for each of its members."""
    seen: set[Path] = set()
    for detail in error.errors(include_url=False, include_context=False):
        path = _path(detail["loc"])
        # a list whose items are all wrong is also too short, for pydantic
        if path not in seen and detail["type"] != "too_short":
            seen.add(path)
            yield detail


def _path(loc: Path) -> Path:
    """The location of a pydantic error, without the names of union members."""
    path: Path = ()
    here: object = Spec
    for step in loc:
        if isinstance(step, int) or step in _fields(here):
            path = (*path, step)
            here, _ = _part(path)
    return path


def _fields(annotation: object) -> set[str]:
    """The fields of every mapping that a type speaks of."""
    return {field for cls in nodes_of(annotation) for field in cls.model_fields}


def _has_class(annotation: object) -> bool:
    options = (annotation, *get_args(annotation))
    return any(isinstance(part, type) and issubclass(part, Node) for part in options)


def _put(data: Data, path: Path, value: Plain) -> None:
    here: Plain = data
    for step in path[:-1]:
        here = cast("Mapping[str | int, Plain]", here)[step]
    if isinstance(here, tuple):  # a list of words
        i = cast("int", path[-1])
        _put(data, path[:-1], (*here[:i], value, *here[i + 1 :]))
    else:
        cast("dict[str | int, Plain]", here)[path[-1]] = value


# Words for messages -------------------------------------------------------------------------------


def _key_name(path: Path) -> str:
    """What the text calls a field."""
    last = path[-1]
    if isinstance(last, int):
        return f"{path[-2]}[{last}]"
    owner = _class(_part(path[:-1])[0], last) if len(path) > 1 else Spec
    return {field: key for key, field in owner.renamed.items()}.get(last, last)


def _kind(node: Tree) -> str:
    return "a mapping" if isinstance(node, Keys) else "a list"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _where(path: Path) -> str:
    return f"'{_key_name(path)}'" if path else "the spec"


def _shown(value: object) -> str:
    """A value as the text would have it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{syntax.short(value)}'"
    return "nothing" if value is None else str(value)


def _not_yet(value: object) -> str | None:
    """Help for a word that is in the design of the language, but not in this version."""
    if isinstance(value, str) and value in _PLANNED:
        return f"'{value}' is not in this version of hsgen"
    return None


def _advice(value: object, path: Path) -> str:
    """What to type instead."""
    key, part = _key_name(path), _part(path)[0]
    words = ["true", "false"] if part is bool else _words(part)
    if key in _TEXTS:
        return f"write '{_EXAMPLE[key]}'" if key in _EXAMPLE else f"write {_expected(path)}"
    if part is str:
        name = _named(value) if isinstance(path[-1], int) else f"{key}: {_named(value)}"
        return f"write '{name}'"
    if isinstance(value, str) and (close := nearest(value, words)):
        quotes = " without quotes" if value == close else ""
        return f"write '{key}: {close}'{quotes}"
    if key == "window" and words:
        return "write 'window: 512' or 'window: all'"
    if isinstance(path[-1], int) and part is not bool:
        return f"write a whole number from 1 to {MAX_COUNT}{' or any' if words else ''}"
    if words:
        options = [f"'{key}: {word}'" for word in words]
        return f"write {' or '.join(options)}"
    if part is float:
        return f"write '{key}: {_example_of(path)}'"
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return f"write '{key}: {_within(int(value[:9]), path)}' without quotes"
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else 16
    return f"write '{key}: {_within(number, path)}'"


# what texts hold that are no names
_TEXTS = {
    "source": "one printable line of at most 200 characters",
    "pattern": f"letters F (fresh) and S (shared), F first, at most {MAX_CALLS}, or S alone",
}
_A_NAME = "a name (a-z first, then a-z, 0-9 and _, at most 48, no word of Python)"


def _words(part: object) -> list[str]:
    """The words that a field may hold, if words are what it holds."""
    literals = [p for p in (part, *get_args(part)) if get_origin(p) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def _named(value: object) -> str:
    """A name that looks like the value."""
    name = re.sub(r"[^a-z0-9]+", "_", str(value).lower()).strip("_")[:40].lstrip("0123456789_")
    return f"{name}_" if keyword.iskeyword(name) else name or "my_name"


def _example_of(path: Path) -> str:
    """A number that the field may hold, as one would write it."""
    return {"mass": "0.9", "fraction": "0.1", "threshold": "0.005"}.get(str(path[-1]), "0.5")


def _within(number: float, path: Path) -> int:
    """The whole number nearest to this one that the field may hold."""
    _, limits = _part(path)
    low, high = (int(_limit(limits, end)) for end in ("ge", "le"))
    return max(low, min(high, round(number)))


def _limit(limits: tuple[object, ...], end: str) -> float:
    return next(getattr(limit, end) for limit in limits if hasattr(limit, end))
