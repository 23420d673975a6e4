"""`hsgen show --svg`: boxes hold their words, lines join the right boxes, colours are launches'."""

import functools
import re
import zlib
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
from shares import third

from hsgen import drawing, layout, report, svg
from hsgen.cli import main
from hsgen.spec import load, parse
from hsgen.target import Target

ROOT = Path(__file__).resolve().parent.parent
SPECS = [*sorted((ROOT / "specs").glob("*.yaml")), ROOT / "examples" / "block_topk.yaml"]
SVG = "{http://www.w3.org/2000/svg}"
H100 = Target.named("h100")


@functools.cache
def drawn(spec):
    return drawing.draw(report.show(spec, H100))


def shapes(element, kind, look=""):
    return [x for x in element.iter(SVG + kind) if look in x.get("class", "")]


def box(element):
    """Left, top, right and bottom."""
    x, y, wide, high = (float(element.get(name)) for name in ("x", "y", "width", "height"))
    return x, y, x + wide, y + high


def graph_group(text):
    """The group of the graph itself; the legend is the second."""
    return ElementTree.fromstring(text).findall(SVG + "g")[0]


# --- the layout


def diamond():
    return nx.DiGraph([("a", "b"), ("b", "c"), ("a", "d"), ("c", "d"), ("d", "e"), ("x", "d")])


def test_boxes_lie_below_their_operands_and_apart():
    names = ["x", "a", "b", "c", "d", "e"]
    placed = layout.layered(diamond(), {name: (80.0 + 7 * i, 30.0) for i, name in enumerate(names)})
    for a, b in diamond().edges:
        assert placed.boxes[a].y + placed.boxes[a].high + layout.FLOOR <= placed.boxes[b].y + 1e-6
    boxes = list(placed.boxes.values())
    for i, one in enumerate(boxes):
        assert one.x >= 0
        assert one.x + one.wide <= placed.wide + 1e-6
        for other in boxes[i + 1 :]:
            beside = one.x + one.wide <= other.x or other.x + other.wide <= one.x
            assert beside or one.y + one.high <= other.y or other.y + other.high <= one.y


def test_long_lines_pass_beside_boxes():
    placed = layout.layered(diamond(), dict.fromkeys("xabcde", (80.0, 30.0)))
    stops = placed.bends["a", "d"]
    assert len(stops) == 2
    for stop in stops:
        for one in placed.boxes.values():
            apart = stop.centre <= one.x or stop.centre >= one.x + one.wide
            assert apart or stop.y + stop.high <= one.y or stop.y >= one.y + one.high


def test_crossing_that_can_be_avoided_is():
    crossed = nx.DiGraph([("a", "y"), ("b", "x")])
    placed = layout.layered(crossed, dict.fromkeys("abxy", (40.0, 20.0)))
    at = {name: each.centre for name, each in placed.boxes.items()}
    assert (at["a"] - at["b"]) * (at["y"] - at["x"]) > 0


def test_inputs_stand_right_above_their_first_reader():
    placed = layout.layered(diamond(), dict.fromkeys("xabcde", (80.0, 30.0)))
    assert placed.boxes["x"].y == placed.boxes["c"].y


# --- the picture


@pytest.mark.parametrize("name", ["hisa", "moba", "nsa"])
def test_picture_is_as_kept(name, golden):
    golden(f"{name}/graph.svg", drawn(load(name)))


def test_picture_of_the_docs_is_of_the_example(golden):
    golden("../../docs/graph.svg", drawn(load(SPECS[-1])))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_words_stay_in_their_box(path):
    group = graph_group(drawn(load(path)))
    boxes = [box(x) for x in shapes(group, "rect", "box")]
    words = shapes(group, "text")
    assert len(words) > 10
    for text in words:
        x, y, wide = float(text.get("x")), float(text.get("y")), svg.width(text.text)
        if text.get("text-anchor") == "middle":
            x -= wide / 2
        held = [b for b in boxes if b[0] <= x and x + wide <= b[2] and b[1] + 8 <= y <= b[3] - 2]
        assert held, text.text


@pytest.mark.parametrize("path", third(SPECS, turn=2), ids=lambda path: path.stem)
def test_names_do_not_run_into_the_badges(path):
    group = graph_group(drawn(load(path)))
    badges = [box(x) for x in shapes(group, "rect", "launch") if x.get("rx") == "3"]
    assert badges or report.show(load(path), H100).plan is None
    for text in shapes(group, "text", "bold"):
        end = float(text.get("x")) + svg.width(text.text)
        beside = [b for b in badges if b[1] < float(text.get("y")) < b[3]]
        assert not [b for b in beside if float(text.get("x")) < b[2] and end > b[0]]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_everything_is_inside_the_picture(path):
    root = ElementTree.fromstring(drawn(load(path)))
    for group in root.findall(SVG + "g"):
        right = float(re.match(r"translate\(([\d.]+)", group.get("transform"))[1])
        for text in shapes(group, "text"):
            wide = 0 if text.get("text-anchor") else svg.width(text.text)
            assert right + float(text.get("x")) + wide <= float(root.get("width"))


def test_every_operator_and_launch_is_there():
    text = drawn(load("nsa"))
    shown = report.show(load("nsa"), H100)
    words = [x.text for x in ElementTree.fromstring(text).iter(SVG + "text")]
    for node in shown.graph.nodes():
        assert f"%{node.name}" in words
    launched = [launch.kernel for step in shown.plan.steps for launch in step.launches]
    assert [word for word in words if word in launched] == launched
    assert "FLOPs 49.2K T" in words  # as `hsgen show nsa` prints for %o
    lines = shapes(ElementTree.fromstring(text), "path", "line")
    assert len(lines) == sum(len(set(node.inputs)) for node in shown.graph.nodes())


def test_an_operator_of_two_launches_has_both_numbers():
    shown = report.show(load("quest"), H100)
    by_number = {x.number: x.kernel for x in drawing._launches(shown.plan)}
    group = graph_group(drawn(load("quest")))
    words = [x.text for x in shapes(group, "text")]
    numbers = words[words.index("%selected.o") :]
    numbers = [by_number[int(word)] for word in numbers if word.isdecimal()]
    assert set(numbers[:2]) == {"index_selected", "attend_selected"}


def test_both_colour_schemes_cover_every_class():
    text = drawn(load("nsa"))
    light, dark = text.split("<style>")[1].split("</style>")[0].split("@media")
    for scheme in (light, dark):
        for kind in {"launch0", "launch11", "input", "none", "page", "dim", "line", "tip"}:
            assert f".{kind} {{" in scheme
    assert "font-family: monospace;" in light


def test_without_a_plan_the_reason_is_drawn():
    spec = parse(
        "hsgen: 1\nname: open\ncausal: true\nattend: [{name: near, window: 64}]\n", "open.yaml"
    )
    text = drawn(spec)
    assert "no plan" in text
    assert "costs are known once" in text
    assert "give `heads`" in " ".join(
        x.text for x in ElementTree.fromstring(text).iter(SVG + "text")
    )
    assert 'launch0"' not in text


def test_command_writes_the_picture(tmp_path, capsys):
    file = tmp_path / "moba.svg"
    assert main(["show", "moba", "--svg", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert file.read_text(encoding="utf-8") == drawn(load("moba"))


def test_command_says_what_is_wrong_with_the_file(tmp_path, capsys):
    assert main(["show", "moba", "--svg", str(tmp_path / "moba.png")]) == 2
    assert "ends in .svg" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert main(["show", "moba", "--svg", str(tmp_path / "no" / "moba.svg")]) == 1
    assert "cannot write this picture" in capsys.readouterr().err


# --- elements


def test_words_are_escaped():
    assert svg.text(0, 0, "a < b & c") == '<text x="0" y="0">a &lt; b &amp; c</text>'


def test_png_is_what_was_drawn():
    data = svg.png(2, 1, bytes([255, 0, 0, 0, 0, 255]))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    assert zlib.decompress(data[start + 4 : start + 4 + length]) == bytes([0, 255, 0, 0, 0, 0, 255])
    assert int.from_bytes(data[start + 4 + length : start + 8 + length], "big") == zlib.crc32(
        data[start : start + 4 + length]
    )


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "0"), (-0.04, "0"), (2.04, "2"), (-3.25, "-3.2")]
)
def test_numbers_are_short(value, words):
    assert svg.number(value) == words
