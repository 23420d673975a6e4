"""Pictures as text and bytes: SVG elements with escaped words, and PNG.

Knows nothing of what is drawn.  All words are in a monospace font, so that their width is known.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable
from html import escape

ADVANCE = 0.62  # of the font size: no common monospace font has wider letters
SIZE = 12
LINE = 16  # from one line of words to the next

BASE = f"""\
text {{ font-family: monospace; font-size: {SIZE}px; fill: #1f2328; white-space: pre; }}
.bold {{ font-weight: bold; }}
.dim {{ fill: #59636e; }}
.page {{ fill: #ffffff; }}
.line {{ fill: none; stroke: #8c959f; stroke-width: 1.2; }}
.tip {{ fill: #8c959f; }}"""
BASE_DARK = """\
text { fill: #e6edf3; }
.dim { fill: #9198a1; }
.page { fill: #0d1117; }
.line { stroke: #767e88; }
.tip { fill: #767e88; }"""


def width(words: str) -> float:
    """The most pixels that words take."""
    return len(words) * SIZE * ADVANCE


def number(value: float) -> str:
    """A coordinate: one decimal, none where it is 0."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # + 0.0: no minus before 0


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """One line of words on the base line y."""
    look = f' class="{kind}"' if kind else ""
    look += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{number(x)}" y="{number(y)}"{look}>{escape(words, quote=False)}</text>'


def rect(x: float, y: float, wide: float, high: float, kind: str, radius: float = 0) -> str:
    """A rectangle; its look is a class of the style."""
    round_ = f' rx="{number(radius)}"' if radius else ""
    size = f'width="{number(wide)}" height="{number(high)}"'
    return f'<rect x="{number(x)}" y="{number(y)}" {size}{round_} class="{kind}"/>'


def path(commands: str, kind: str) -> str:
    """A path."""
    return f'<path d="{commands}" class="{kind}"/>'


def image(x: float, y: float, wide: float, high: float, content: bytes) -> str:
    """A PNG inside the picture, its pixels kept sharp."""
    size = f'width="{number(wide)}" height="{number(high)}"'
    data = base64.b64encode(content).decode()
    look = 'preserveAspectRatio="none" style="image-rendering: pixelated"'
    return f'<image x="{number(x)}" y="{number(y)}" {size} {look} href="data:image/png;base64,{data}"/>'


def document(
    wide: float, high: float, title: str, elements: Iterable[str], light: str = "", dark: str = ""
) -> str:
    """The whole file; light and dark are rules of style on top of the common ones."""
    size = f'viewBox="0 0 {number(wide)} {number(high)}" width="{number(wide)}" height="{number(high)}"'
    night = ["@media (prefers-color-scheme: dark) {", BASE_DARK, dark, "}"]
    style = "\n".join(rules for rules in (BASE, light, *night) if rules)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    name = f"<title>{escape(title, quote=False)}</title>"
    page = rect(0, 0, wide, high, "page")
    return "\n".join([head, name, f"<style>\n{style}\n</style>", page, *elements, "</svg>"]) + "\n"


def png(wide: int, high: int, pixels: bytes) -> bytes:
    """An image of 8-bit RGB pixels, row by row."""
    assert len(pixels) == 3 * wide * high, "three bytes a pixel"
    row = 3 * wide
    rows = b"".join(b"\0" + pixels[y * row : (y + 1) * row] for y in range(high))
    header = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
