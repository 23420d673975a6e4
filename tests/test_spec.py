"""Text -> Spec: what is equal, what is refused, and that nothing but SpecError escapes."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsgen.errors import ArgumentError, HsgenError, SpecError
from hsgen.spec import HeadDim, Heads, Level, Select, Spec, dump, load, parse, verify
from hsgen.spec.syntax import MAX_BYTES, read

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "specs").glob("*.yaml"))
ERRORS = sorted((ROOT / "tests" / "errors").glob("HS*.yaml"))

SMALL = """\
hsgen: 1
name: small
levels:
  - name: chunk
    partition: {blocks: 64}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 4, force: {last: 1}}
attend:
  - {name: selected, over: chunk}
"""

WINDOW = "hsgen: 1\nname: w\nattend: [{name: local, window: 4}]\n"


def codes(text: str | bytes) -> list[tuple[int, int, str]]:
    """(line, column, code) of each mistake."""
    with pytest.raises(SpecError) as caught:
        parse(text, "t.yaml")
    spans = [(d, d.span) for d in caught.value.diagnostics]
    return [(span.line, span.column, d.code) for d, span in spans if span]


# What is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spec_survives_dump_and_parse(path: Path) -> None:
    spec = load(path)
    assert parse(dump(spec)) == spec
    assert dump(parse(dump(spec))) == dump(spec)
    assert verify(spec) is spec


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spec_is_found_by_name(path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(path.stem) == load(path)


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(HsgenError, match="did you mean 'nsa'") as caught:
        load("nsaa")
    assert not isinstance(caught.value, SpecError)


@pytest.mark.parametrize("name", ["no/such.yaml", ".", "nul\0byte", "x" * 5000])
def test_unreadable_file_is_no_spec_error(name: str) -> None:
    with pytest.raises(HsgenError) as caught:
        load(name)
    assert not isinstance(caught.value, SpecError)


def test_comments_layout_and_file_change_nothing() -> None:
    other = "# a comment\n" + SMALL.replace("{blocks: 64}", "\n      blocks: 64 # tokens")
    first, second = parse(SMALL, "a.yaml"), parse("\ufeff" + other.replace("\n", "\r\n"), "b.yaml")
    assert first == second
    assert hash(first) == hash(second)
    assert first.digest == second.digest


def test_defaults_may_be_written_out() -> None:
    written = SMALL.replace("{blocks: 64}", "{blocks: 64, stride: 64}")
    written = written.replace("form: dot", "form: dot, share: head").replace(
        "name: small", "name: small\ncausal: true"
    )
    assert parse(written).digest == parse(SMALL).digest


def test_source_is_no_part_of_the_digest() -> None:
    cited = SMALL.replace("levels:", "source: somewhere\nlevels:")
    assert parse(cited).digest == parse(SMALL).digest
    assert parse(cited) != parse(SMALL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("top_k: 4", "top_k: 5"),
        ("blocks: 64", "blocks: 32"),
        ("last: 1", "first: 1"),
        ("mean", "max"),
    ],
)
def test_meaning_changes_the_digest(old: str, new: str) -> None:
    assert parse(SMALL.replace(old, new)).digest != parse(SMALL).digest


def test_digest_is_stable() -> None:
    """Compiled modules are found by it: a change here orphans every user's cache."""
    assert parse(WINDOW).digest[:16] == "691b89a35a653fbd"
    assert parse(SMALL).digest[:16] == "5fbf2714f201bf9a"


def test_a_window_may_be_all() -> None:
    assert parse(WINDOW.replace("4}", "all}")).attend[0].window == "all"
    with pytest.raises(SpecError, match=r"or all for 'window', got 'al'(?s:.*)write 'window: all'"):
        parse(WINDOW.replace("4}", "al}"))
    with pytest.raises(SpecError, match=r"got 0(?s:.*)write 'window: 512' or 'window: all'"):
        parse(WINDOW.replace("4}", "0}"))


def test_sugar_means_its_long_form() -> None:
    long = "heads: {query: 32, kv: 8}\nhead_dim: {qk: 64, v: 64}\n"
    short = "heads: {kv: 8, group_size: 4}\nhead_dim: 64\n"
    assert parse(WINDOW + long) == parse(WINDOW + short)
    own = SMALL.replace("force: {last: 1}", "force: {own: true}")
    assert parse(own) == parse(SMALL)
    assert parse(SMALL.replace("last: 1", "last: 2, own: true")).levels[0].select == Select(
        top_k=4, force=parse(SMALL.replace("last: 1", "last: 2")).levels[0].select.force
    )


def test_names_that_look_like_values_survive() -> None:
    text = WINDOW.replace("name: w", 'name: "on"').replace("name: local", 'name: "null"')
    spec = parse(text)
    assert (spec.name, spec.attend[0].name) == ("on", "null")
    assert parse(dump(spec)) == spec


@pytest.mark.parametrize("scale", ["0.5", "1.0e-5", "2", "1.5e+3", ".25", "none"])
def test_scales_survive(scale: str) -> None:
    spec = parse(SMALL.replace("form: dot", f"form: dot, scale: {scale}"))
    assert parse(dump(spec)) == spec


def test_spans_point_at_fields() -> None:
    spec = parse(SMALL, "s.yaml")
    span = spec.spans["levels", 0, "select", "top_k"]
    assert (span.line, span.column, span.length) == (8, 21, 1)
    assert str(spec.span("levels", 0, "partition", "stride")) == "s.yaml:5:5"
    assert str(spec.span("levels", 0)) == "s.yaml:4:11"
    assert spec.level("chunk").name == "chunk"


# Late binding -------------------------------------------------------------------------------------


def test_bind_fills_what_is_open() -> None:
    bound = parse(SMALL).bind(heads=(32, 8), head_dim=128)
    assert bound.heads == Heads(query=32, kv=8)
    assert bound.head_dim == HeadDim(qk=128, v=128)
    assert bound.span("levels") is not None
    assert bound.bind(heads=Heads(query=32, kv=8)) == bound


@pytest.mark.parametrize(
    "arguments",
    [
        {"heads": (32, 7)},
        {"heads": (0, 1)},
        {"head_dim": -1},
        {"head_dim": (64, True)},
        {"heads": (16, 8)},
    ],
)
def test_bind_refuses_with_expected_and_got(arguments: dict) -> None:
    spec = parse(SMALL + "heads: {query: 32, kv: 8}\n")
    with pytest.raises(ArgumentError, match=r"(?s)expected.*got"):
        spec.bind(**arguments)


def test_specs_made_in_python_are_judged_by_the_same_rules() -> None:
    spec = parse(SMALL)
    broken = spec.model_copy(update={"levels": ()})
    with pytest.raises(SpecError, match="unknown level 'chunk'"):
        verify(broken)


# What is refused ----------------------------------------------------------------------------------


def test_all_mistakes_are_reported_in_file_order() -> None:
    text = (
        SMALL.replace("mean", "meen")
        .replace("top_k: 4", "topk: 0")
        .replace("over: chunk", "over: chnk")
    )
    assert codes(text + "causal: yes\n") == [
        (6, 18, "HS035"),
        (8, 14, "HS012"),
        (8, 20, "HS033"),
        (10, 28, "HS054"),
        (11, 9, "HS019"),
    ]


def test_one_slip_is_one_mistake() -> None:
    """What rests on something wrong is not judged: no train of errors follows."""
    assert codes(SMALL.replace("partition:", "partitoin:")) == [(5, 5, "HS012")]
    assert codes(SMALL.replace("select:", "selct:")) == [(8, 5, "HS012")]
    assert codes(SMALL.replace("name: chunk", "name: Chunk")) == [(4, 11, "HS036")]
    assert codes(SMALL.replace("blocks: 64", "blocks: x")) == [(5, 25, "HS032")]
    assert codes(SMALL.replace("{form: dot}", "dot")) == [(7, 12, "HS031")]


def test_limits_of_forced_entries() -> None:
    three = SMALL.replace("last: 1", "first: 2, last: 3")
    assert codes(three) == [(8, 24, "HS071")]
    assert parse(three.replace("last: 3", "last: 3, counted: false")).levels[0].select.width == 9


def test_numbers_are_no_names() -> None:
    numbers = SMALL.replace("name: chunk", "name: 64").replace("over: chunk", "over: 1.5")
    assert codes(numbers) == [(4, 11, "HS036"), (10, 28, "HS036")]
    assert codes(WINDOW + "source: 7\n") == [(4, 9, "HS037")]


def test_field_names_of_python_are_no_keys() -> None:
    assert "HS012" in {code for *_, code in codes(SMALL.replace("form: dot", "source: chunk"))}
    # a mapping without a key of any kind is of none
    assert "HS035" in {
        code for *_, code in codes(SMALL.replace("blocks: 64", "kind: blocks, size: 64"))
    }


@pytest.mark.parametrize(
    "name",
    [
        "x():\\n import os",
        "../../etc/passwd",
        "/etc/passwd",
        "{{ 7 * 7 }}",
        "{% for x in y %}",
        "a\\n",
        "a b",
        "A",
        "_a",
        "1a",
        "caf\u00e9",
        "a" * 49,
        "import",
        "a\\u202eb",
        "a;b",
        "",
    ],
)
@pytest.mark.parametrize("field", ["name: small", "name: chunk", "name: selected", "over: chunk"])
def test_names_are_identifiers_and_nothing_else(name: str, field: str) -> None:
    key = field.split(":", maxsplit=1)[0]
    with pytest.raises(SpecError) as caught:
        parse(SMALL.replace(field, f'{key}: "{name}"'))
    assert "HS036" in {d.code for d in caught.value.diagnostics}
    shown = str(caught.value)
    assert all(line.isprintable() for line in shown.splitlines())


@pytest.mark.parametrize("text", ["one\\ntwo", "a\\u202eb", "a\\x1b[31m", "x" * 201])
def test_source_is_one_printable_line(text: str) -> None:
    assert [code for *_, code in codes(WINDOW + f'source: "{text}"\n')] == ["HS037"]


@pytest.mark.parametrize("kv", ["index", "new", "pages"])
def test_kv_makes_no_second_argument_of_a_name(kv: str) -> None:
    text = WINDOW.replace("window: 4", f"window: 4, kv: {kv}")
    assert [code for *_, code in codes(text)] == ["HS053"]


def test_alias_bomb_is_refused_before_it_expands() -> None:
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    start = time.perf_counter()
    assert "HS014" in {code for *_, code in codes("\n".join(lines))}
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 30000,
        b"{a: " * 9000,
        b"- " * 30000,
        b"a: [" + b"1," * 30000 + b"]",
        b"a: " + b"9" * 60000,
        b"\n".join(b"k%d: 1" % i for i in range(6000)),
        b"x: 1\n" * 12000,
        b"? " * 30000,
        b"a: '" + b"x" * 60000,
        b"a: " + b"0" * 60000 + b"1_",
        b"a: 1" + b":30" * 20000,
        b'a: "\\U00110000"',
        b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1",
        b"%TAG ! tag:%FF\n--- !x%FF y",
        b"\xff\xfeh\x00i\x00",
        b"\x00",
        b"",
        b"\xef\xbb\xbf",
        b"...",
        b"---\n...\n---\n",
        b"\xc2\x85" * 1000 + b"a: b: c",
        b"a: \xe2\x80\xa8 b: c: d",
    ],
    ids=range(22),
)
def test_hostile_text_is_refused_in_bounded_time(text: bytes) -> None:
    start = time.perf_counter()
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert len(str(caught.value)) < 100_000
    assert time.perf_counter() - start < 5


def test_text_over_the_limit_is_refused_unread() -> None:
    assert codes(b"#" * (MAX_BYTES + 1)) == [(1, 1, "HS001")]
    assert codes("#" * (MAX_BYTES + 1)) == [(1, 1, "HS001")]


def test_lone_surrogates_can_be_shown() -> None:
    with pytest.raises(SpecError) as caught:
        parse("a: \ud800", "\udcff.yaml")
    assert str(caught.value).encode()


# Fuzzing ------------------------------------------------------------------------------------------

SEEDS = [path.read_bytes() for path in (*SHIPPED, *ERRORS) if path.stat().st_size < 2000]
TOKENS = [
    *(b"&a ", b"*a", b"!!int ", b"[", b"]", b"{", b"}", b"<<: ", b"\n", b"\t", b": ", b"- ", b"|"),
    *(
        b">",
        b"'",
        b'"',
        b"%",
        b"@",
        b"? ",
        b"---\n",
        b"...\n",
        b"#",
        b",",
        b"~",
        b"\\",
        b"\xc2\x85",
    ),
    *(
        b"1e5",
        b"0x1g",
        b"-1",
        b"true",
        b"null",
        b"on",
        b"1:30",
        b"0o7",
        b"7",
        b"1.5",
        b"0",
        b"none",
        b"tokens",
    ),
    *(b"from", b"form", b"within", b"kv", b"share", b"group", b"all", b"beam", b"chunk", b"block"),
]


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A seed with bytes changed, tokens put in, pieces cut out or moved."""
    text = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(text) - 1)))
        match draw(st.sampled_from(["change", "insert", "cut", "copy", "word", "word", "word"])):
            case "change":
                text[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                text[at:at] = draw(st.sampled_from(TOKENS))
            case "cut":
                del text[at : at + draw(st.integers(1, 12))]
            case "copy":
                text[at:at] = text[at // 2 : at // 2 + draw(st.integers(1, 80))]
            case _:
                words = re.split(rb"([^a-z0-9_.]+)", bytes(text))
                other = draw(st.sampled_from([*TOKENS, *words[::2]]))
                words[at % len(words) // 2 * 2] = other
                text = bytearray(b"".join(words))
    return bytes(text)


@settings(max_examples=400, deadline=2000, derandomize=True)
@given(mutations())
def test_only_spec_errors_escape(text: bytes) -> None:
    try:
        spec = parse(text, "fuzz.yaml")
    except SpecError as error:
        assert str(error)
        assert all(d.span and d.help for d in error.diagnostics)
    else:
        assert parse(dump(spec)) == spec
        assert verify(spec) is spec


@settings(max_examples=100, deadline=2000, derandomize=True)
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_arbitrary_text_is_refused(text: bytes | str) -> None:
    with pytest.raises(SpecError):
        parse(text)


def test_levels_can_be_changed_in_python() -> None:
    spec = parse(SMALL)
    level: Level = spec.levels[0].model_copy(update={"select": Select(top_k=8)})
    changed: Spec = spec.model_copy(update={"levels": (level,)})
    assert verify(changed).levels[0].select == Select(top_k=8)


CLUSTERS = """
hsgen: 1
name: clusters
causal: false
levels:
  - name: {first}
  - name: {second}
attend: [{{name: selected, over: b}}]
"""
OF_CLUSTERS = """c
    permute: {keys: {kmeans: 4, iterations: 2}}
    partition: clusters
    pool: {keys: mean}
    score: {form: dot, normalise: softmax}"""


BLOCKS = """c
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot}"""
MAPPED = """b
    partition: {blocks: 8}
    score: {from: c, map: sum}"""
NARROWED = """b
    within: c
    partition: tokens
    score: {form: dot}"""
BEAM, KEPT = "\n    select: {beam: 2}", "\n    select: {top_k: 2}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (OF_CLUSTERS, MAPPED + KEPT),
        (OF_CLUSTERS + BEAM, NARROWED + KEPT),
        (BLOCKS + BEAM, OF_CLUSTERS.replace("c\n", "b\n    within: c\n", 1) + KEPT),
    ],
    ids=["mapped", "narrowed", "within"],
)
def test_clusters_have_no_size_that_others_rest_on(first, second):
    """Neither a map nor a level within is judged by sizes where there is none."""
    with pytest.raises(SpecError) as caught:
        parse(CLUSTERS.format(first=first, second=second))
    assert [each.code for each in caught.value.diagnostics] == ["HS134"]


@pytest.mark.parametrize(
    ("header", "lines"),
    [
        ("", 0),
        ("# a\n# b: [\n", 2),
        ("# a\r\n", 1),
        ("# a\x85# b\n", 2),
        ("#\n\n#\n", 3),
        ("\ufeff# a\n", 1),
    ],
)
def test_a_first_comment_moves_lines_and_nothing_else(header, lines):
    plain, found = read("hsgen: 1\nname: a]: b\n", "f")
    moved, moved_found = read(header + "hsgen: 1\nname: a]: b\n", "f")
    assert plain is moved is None
    at = [(d.code, d.message, d.span.line - lines, d.span.column, d.span.text) for d in moved_found]
    assert at == [(d.code, d.message, d.span.line, d.span.column, d.span.text) for d in found]


@pytest.mark.parametrize("text", ["# a", "# a\n", "# a\n# b"])
def test_comments_alone_are_an_empty_file(text):
    tree, found = read(text, "f")
    assert tree is None
    assert [each.code for each in found] == ["HS007"]
