"""YAML text -> a tree of mappings, lists and words with spans; or every mistake of the notation.

A strict subset: whatever YAML 1.1 and 1.2 read differently, or what stands for something written
elsewhere (anchors, tags, merge keys), is a mistake.  Knows nothing of what a spec may say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, cast

import yaml

from hsgen.errors import Diagnostic, Span

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_VALUES = 4096
MAX_DIGITS = 18

_Parse = Callable[[str, type[yaml.SafeLoader]], Iterator[yaml.Event]]
_parse = cast("_Parse", yaml.parse)  # pyright: ignore[reportUnknownMemberType] - stub without types

# YAML's line breaks, which are what PyYAML counts lines by
_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_HEADER = re.compile("(?:#[^\n\r\x85\u2028\u2029]*\n)+")
_FORBIDDEN = yaml.reader.Reader.NON_PRINTABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A scalar as it was written; `plain` if without quotes."""

    text: str
    plain: bool
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list."""

    items: tuple[Tree, ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A mapping, as pairs in the order of the text; no key occurs twice."""

    items: tuple[tuple[Word, Tree], ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Something already reported, of which nothing is known."""

    span: Span


Tree = Word | Items | Keys | Unreadable
Scalar = str | int | float | bool


def read(text: str | bytes, filename: str) -> tuple[Keys | None, list[Diagnostic]]:
    """Read one document.

    Returns:
        The mapping at its top, or None where nothing sensible can be said of it; and the mistakes.
    """
    source = _Source(filename)
    try:
        source.decode(text)
        return source.document(), source.found
    except _Stop:
        return None, source.found


class _Stop(Exception):
    """Nothing after this mistake can be read."""


class _Source:
    """One text while it is read.  `found` grows; all else is set once."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.found: list[Diagnostic] = []
        self.text = ""
        self.lines: list[str] = [""]
        self.values = 0

    def decode(self, text: str | bytes) -> None:
        """Take the text, if it is one of bearable size."""
        if len(text) > MAX_BYTES:
            self.stop(
                "HS001",
                f"expected at most {MAX_BYTES // 1024} KiB, got more",
                help="a spec is a page",
            )
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                self.lines = _BREAK.split(text[: error.start].decode("utf-8"))
                at = self.at(len(self.lines) - 1, len(self.lines[-1]))
                message = f"expected UTF-8, got byte 0x{text[error.start]:02x} that is none"
                self.stop("HS002", message, span=at, help="save the file as UTF-8")
        self.text = text.removeprefix("\ufeff")
        self.lines = _BREAK.split(self.text)
        if bad := _FORBIDDEN.search(self.text):
            before = _BREAK.split(self.text[: bad.start()])
            at = self.at(len(before) - 1, len(before[-1]))
            message = f"expected printable text, got the character U+{ord(bad[0]):04X}"
            self.stop("HS003", message, span=at, help="remove that character")

    def document(self) -> Keys:
        """The one mapping that the text is."""
        events = self._events()
        tree = self._next(events)
        self._only(events)
        if isinstance(tree, Keys):
            return tree
        if isinstance(tree, Word) and tree.plain and tree.text in {"", "~", "null"}:
            self.empty()
        span = tree.span
        kind = "a list" if isinstance(tree, Items) else "a single word"
        if not isinstance(tree, Unreadable):
            help = "start with 'hsgen: 1', then 'name: ...'"
            self.error(
                "HS008", f"expected keys with values at the top, got {kind}", span=span, help=help
            )
        raise _Stop

    def empty(self) -> NoReturn:
        """Report that there is nothing."""
        help = "start with 'hsgen: 1'; 'hsgen check nsa' shows that a shipped spec is found"
        self.stop("HS007", "expected a spec, got an empty file", help=help)

    def _only(self, events: Iterator[yaml.Event]) -> None:
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                message = "expected one document, got a second one"
                help = "remove this '---' and what follows, or make it a file of its own"
                self.stop("HS006", message, span=self.of(event), help=help)

    def _events(self) -> Iterator[yaml.Event]:
        """PyYAML's events between the marks of the stream, its errors made ours."""
        at = Span(file=self.filename, line=1, column=1, text=self.lines[0])
        try:
            # the pure Python loader: same messages and columns wherever it runs
            for event in _parse(self._without_header(), yaml.SafeLoader):
                at = self.of(event)
                yield event
        except yaml.MarkedYAMLError as error:
            self._bad_syntax(error)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # PyYAML lets ValueError through: "\UFFFFFFFF", %YAML 9999...
            self.stop("HS004", f"not YAML: {_sentence(str(error))}", span=at)

    def _without_header(self) -> str:
        """The text with its first comment as empty lines: PyYAML reads comments sign by sign."""
        header = _HEADER.match(self.text)
        if header is None:
            return self.text
        return "\n" * header[0].count("\n") + self.text[header.end() :]

    def _bad_syntax(self, error: yaml.MarkedYAMLError) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        span = self.at(mark.line, mark.column) if mark else None
        problem = error.problem or error.context or "unreadable"
        rest = self.lines[mark.line][mark.column :] if mark and mark.line < len(self.lines) else ""
        before = (
            self.lines[mark.line][: mark.column] if mark and mark.line < len(self.lines) else ""
        )
        if rest.startswith("\t") or (not before.strip() and "\t" in before):
            self.stop("HS005", "expected spaces, got a tab", span=span, help="indent with spaces")
        hint = next((hint for part, hint in _HINTS.items() if part in problem), None)
        where = ""
        if (
            error.context
            and error.context_mark
            and error.context_mark.line != getattr(mark, "line", 0)
        ):
            where = f", {error.context} that starts on line {error.context_mark.line + 1}"
        message = f"not YAML: {_sentence(problem)}{_sentence(where)}"
        self.stop("HS004", message, span=span, help=hint or "write 'key: value' lines")

    def _next(self, events: Iterator[yaml.Event]) -> Tree:
        """The first document's tree."""
        for event in events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)):
                continue
            if isinstance(event, yaml.StreamEndEvent):
                self.empty()
            return self._tree(event, events, 1)
        raise AssertionError("PyYAML ended without the end of a stream")

    def _tree(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Tree:
        span = self.of(event)
        self.values += 1
        if self.values > MAX_VALUES:
            self.stop(
                "HS010",
                f"expected at most {MAX_VALUES} values, got more",
                span=span,
                help="a spec is a page",
            )
        if isinstance(event, yaml.AliasEvent):
            help = f"write again what '&{event.anchor}' stands for"
            self.error(
                "HS014", f"expected a value, got the alias '*{event.anchor}'", span=span, help=help
            )
            return Unreadable(span=span)
        tagged = self._marks(event, span)
        if isinstance(event, yaml.ScalarEvent) and not tagged:
            return Word(text=event.value, plain=event.style is None, span=span)
        if depth > MAX_DEPTH:
            self.stop(
                "HS009",
                f"expected at most {MAX_DEPTH} levels of nesting, got more",
                span=span,
                help="remove brackets, or indentation",
            )
        tree: Tree = Unreadable(span=span)
        if isinstance(event, yaml.SequenceStartEvent):
            tree = Items(items=tuple(self._items(events, depth)), span=span)
        elif isinstance(event, yaml.MappingStartEvent):
            tree = Keys(items=tuple(self._keys(events, depth)), span=span)
        return Unreadable(span=span) if tagged else tree

    def _marks(self, event: yaml.Event, span: Span) -> bool:
        """Report an anchor or a tag; true for a tag, which makes the value something else."""
        if anchor := getattr(event, "anchor", None):
            help = f"remove '&{anchor}' and write the value wherever it is needed"
            self.error(
                "HS013", f"expected a value, got the anchor '&{anchor}'", span=span, help=help
            )
        tag: str | None = getattr(event, "tag", None)
        if tag:
            tag = short(tag.replace("tag:yaml.org,2002:", "!!"))
            message = f"expected a value, got the tag '{tag}'"
            self.error("HS015", message, span=span, help=f"remove '{tag}'")
        return bool(tag)

    def _items(self, events: Iterator[yaml.Event], depth: int) -> Iterator[Tree]:
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                return
            yield self._tree(event, events, depth + 1)

    def _keys(self, events: Iterator[yaml.Event], depth: int) -> Iterator[tuple[Word, Tree]]:
        lines: dict[str, int] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                return
            key = self._tree(event, events, depth + 1)
            value = self._tree(next(events), events, depth + 1)
            if self._usable(key, lines):
                assert isinstance(key, Word)
                lines[key.text] = key.span.line
                yield key, value

    def _usable(self, key: Tree, lines: dict[str, int]) -> bool:
        """Whether a key is one word, no merge key, and new; reports it if not."""
        if not isinstance(key, Word) or not key.text:
            if not isinstance(key, Unreadable):
                self.error(
                    "HS017",
                    "expected a word as key, got something else",
                    span=key.span,
                    help="write 'key: value'",
                )
            return False
        if key.text == "<<" and key.plain:
            help = "write out the keys that it would bring"
            self.error("HS016", "expected a key, got the merge key '<<'", span=key.span, help=help)
            return False
        if key.text in lines:
            message = f"duplicate key '{short(key.text)}': it is on line {lines[key.text]} already"
            self.error("HS011", message, span=key.span, help="remove one of the two")
            return False
        return True

    def of(self, event: yaml.Event) -> Span:
        """Where an event is; its first line of it."""
        start, end = event.start_mark, event.end_mark
        length = end.column - start.column if end.line == start.line else 1 << 16
        return self.at(start.line, start.column, length)

    def at(self, line: int, column: int, length: int = 1) -> Span:
        """A place counted from 0, made a Span."""
        text = self.lines[line] if line < len(self.lines) else ""
        length = max(1, min(length, len(text.rstrip()) - column))
        return Span(file=self.filename, line=line + 1, column=column + 1, length=length, text=text)

    def error(
        self, code: str, message: str, *, span: Span | None = None, help: str | None = None
    ) -> None:
        """Report a mistake and read on."""
        where = span or Span(file=self.filename, line=1, column=1)
        self.found.append(Diagnostic(code=code, message=message, span=where, help=help))

    def stop(
        self, code: str, message: str, *, span: Span | None = None, help: str | None = None
    ) -> NoReturn:
        """Report a mistake after which nothing can be read."""
        self.error(code, message, span=span, help=help)
        raise _Stop


_HINTS = {
    "mapping values are not allowed": "one 'key: value' a line; quote a text that holds ': '",
    "could not find expected ':'": "write 'key: value'",
    "expected <block end>": "indent this line like the ones above that it belongs to",
    "expected ',' or": "close the bracket, or put a comma before this",
    "while scanning a quoted scalar": "close the quote",
    "unexpected end of stream": "close the quote",
    "cannot start any token": "put the value in quotes",
}


def _sentence(problem: str) -> str:
    """PyYAML's words on one line of bearable length."""
    return short(" ".join(problem.split()), 160)


def short(text: str, limit: int = 60) -> str:
    """The text on one line, cut where it is longer than a message bears."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


# Words without quotes -----------------------------------------------------------------------------

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_SAYS_YES = {"y", "yes", "on"}
_SAYS_NO = {"n", "no", "off"}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
_EXPONENT = re.compile(r"([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))[eE]([-+]?)([0-9]+)")
_OCTAL = re.compile(r"[-+]?0[0-9]+|0o[0-7]+|[-+]?0b[01]+")
_BASE_60 = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?")
_GROUPED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def value(word: Word) -> Scalar | Diagnostic:
    """What a word means, or the mistake where YAML's versions disagree about it."""
    text = word.text
    if not word.plain:
        return text
    if text in _NULL:
        return _mistake(
            word, "HS025", "expected a value, got none", "write the value, or remove the key"
        )
    if text in _TRUE | _FALSE:
        return text in _TRUE
    if _INT.fullmatch(text) or _HEX.fullmatch(text):
        if len(text) > MAX_DIGITS:
            message = f"expected a number of at most {MAX_DIGITS} digits, got {len(text)}"
            return _mistake(word, "HS024", message, "write a smaller number")
        return int(text, 16 if _HEX.fullmatch(text) else 10)
    if _FLOAT.fullmatch(text) and abs(float(text)) != float("inf"):
        return float(text)
    return _trap(word) or text


def _trap(word: Word) -> Diagnostic | None:
    """The mistake in a plain word that some YAML reader takes for something else than a text."""
    text = word.text
    shown = short(text, 40)
    if text.lower() in _SAYS_YES | _SAYS_NO:
        meant = "true" if text.lower() in _SAYS_YES else "false"
        message = f"'{shown}' is a truth value in YAML 1.1 and a text in YAML 1.2"
        return _mistake(word, "HS019", message, f'write {meant}; for the word itself "{text}"')
    if _NOT_FINITE.fullmatch(text) or _FLOAT.fullmatch(text):
        return _mistake(
            word, "HS023", f"expected a finite number, got '{shown}'", "write a finite number"
        )
    if match := _EXPONENT.fullmatch(text):
        message = f"'{shown}' is a text in YAML 1.1 and a number in YAML 1.2"
        return _mistake(word, "HS018", message, f"write {short(_with_point(*match.groups()), 40)}")
    if _OCTAL.fullmatch(text):
        message = f"'{shown}' is one number in YAML 1.1 and another, or none, in YAML 1.2"
        return _mistake(word, "HS020", message, f"write {_decimals(text)}")
    if _BASE_60.fullmatch(text):
        message = f"'{shown}' is a number in base 60 in YAML 1.1 and a text in YAML 1.2"
        return _mistake(word, "HS021", message, f'write one decimal number; for the text "{shown}"')
    if "_" in text and _GROUPED.fullmatch(text):
        message = f"'{shown}' is a number in YAML 1.1 and a text in YAML 1.2"
        return _mistake(word, "HS022", message, f"write {short(text.replace('_', ''), 40)}")
    return None


def _mistake(word: Word, code: str, message: str, help: str) -> Diagnostic:
    return Diagnostic(code=code, message=message, span=word.span, help=help)


def _with_point(mantissa: str, sign: str, exponent: str) -> str:
    """`1e-5` as every YAML reads it: 1.0e-5."""
    point = mantissa if "." in mantissa else f"{mantissa}.0"
    point = f"0{point}" if point.startswith(".") else point
    return f"{point}e{sign or '+'}{exponent}"


def _decimals(text: str) -> str:
    """What `010` may have been meant to be."""
    digits = text.lstrip("+-")[:40]
    if digits[1] in "ob":
        return str(int(digits, 0))
    plain = digits.lstrip("0") or "0"
    octal = set(digits) <= set("01234567") and plain != "0"
    return f"{plain}, or {int(digits, 8)} if octal was meant" if octal and len(plain) > 1 else plain
