"""`hsgen schema` and the parser say the same of every value, and each key is explained."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paces import assert_takes
from test_cli_check import ROOT, hsgen

from hsgen.cli import main
from hsgen.errors import Diagnostic, SpecError
from hsgen.spec import parse, reader, schema, syntax
from hsgen.spec.model import MAX_COUNT, MAX_FORCED
from hsgen.spec.syntax import Items, Keys, Word

SCHEMA = schema.schema()
EDITOR = jsonschema.Draft202012Validator(SCHEMA)
SHIPPED = sorted((ROOT / "specs").glob("*.yaml"))
ERRORS = sorted((ROOT / "tests" / "errors").glob("HS*.yaml"))


def codes_in(module: str) -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "hsgen" / "spec").glob(module)]
    return {code for source in sources for code in re.findall(r'"(HS\d{3})"', source)}


# What a schema cannot say.  The notation is for whoever reads the text; it refuses duplicate keys too.
NOTATION = codes_in("syntax.py")
# What values must be to each other: every rule, HS050 and on, and `own: false` beside `last: 2`.
# HS051, `query` or `group_size`, is the shape of one mapping, and the schema has it.
BETWEEN_VALUES = codes_in("rules/*.py") | {"HS072"}
ONE_VALUE = codes_in("reader.py") - BETWEEN_VALUES


# The two judges -----------------------------------------------------------------------------------


def codes(text: str) -> set[str]:
    """What the parser finds wrong."""
    try:
        parse(text)
    except SpecError as error:
        return {one.code for one in error.diagnostics}
    return set()


def plain(node):
    """The values of a tree, as an editor holds them."""
    match node:
        case Keys():
            return {key.text: plain(value) for key, value in node.items}
        case Items():
            return [plain(item) for item in node.items]
        case Word():
            value = syntax.value(node)
            whole = isinstance(value, float) and value.is_integer()
            return None if isinstance(value, Diagnostic) else int(value) if whole else value


def yaml(data) -> str:
    """The same in a notation that no reader takes for anything else."""
    if isinstance(data, dict):
        return f"{{{', '.join(f'{json.dumps(k)}: {yaml(v)}' for k, v in data.items())}}}"
    if isinstance(data, list):
        return f"[{', '.join(map(yaml, data))}]"
    if isinstance(data, float):
        text = repr(data)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return json.dumps(data, ensure_ascii=False)


def product_too_large(data) -> bool:
    """Of `kv` and `group_size`, each in its range: the parser alone multiplies (HS033)."""
    heads = data.get("heads")
    pair = [heads.get("kv"), heads.get("group_size")] if isinstance(heads, dict) else []
    return all(type(n) is int for n in pair) and len(pair) == 2 and pair[0] * pair[1] > MAX_COUNT


def disagreement(data) -> str | None:
    """Why the two verdicts differ; None where they agree."""
    found = codes(yaml(data))
    assert not found & NOTATION - {"HS017", "HS025"}, found
    refused = bool(found & (ONE_VALUE | {"HS017", "HS025"}))
    why = [error.message for error in EDITOR.iter_errors(data)]
    return None if refused == bool(why) else f"parser {sorted(found)}, schema {why}: {yaml(data)}"


# Equality -----------------------------------------------------------------------------------------


def test_every_code_is_of_one_kind():
    assert not NOTATION & BETWEEN_VALUES
    assert not ONE_VALUE & (NOTATION | BETWEEN_VALUES)
    assert {"HS012", "HS030", "HS031", "HS032", "HS033", "HS035", "HS036", "HS039"} <= ONE_VALUE
    assert {"HS051", "HS038"} <= ONE_VALUE
    assert {code for code in BETWEEN_VALUES if code < "HS050"} == set()


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spec_is_valid(path: Path):
    tree, _ = syntax.read(path.read_bytes(), path.name)
    EDITOR.validate(plain(tree))


@pytest.mark.parametrize("path", ERRORS, ids=lambda path: path.stem)
def test_wrong_spec_gets_the_same_verdict(path: Path):
    tree, notation = syntax.read(path.read_bytes(), path.name)
    found = codes(path.read_bytes())
    if tree is None or notation:
        assert found & NOTATION  # refused before there is a value to judge
    elif found <= NOTATION - {"HS025"}:
        assert path.stem[:5] in NOTATION  # one word that the versions of YAML take differently
    else:
        assert disagreement(plain(tree)) is None


def trees() -> list:
    """Every spec that is written down, right and wrong, as values."""
    read = [syntax.read(path.read_bytes(), path.name) for path in SHIPPED + ERRORS]
    return [plain(tree) for tree, notation in read if tree is not None and not notation]


TREES = [tree for tree in trees() if len(json.dumps(tree)) < 4000]


def keys_and_words(part) -> tuple[set[str], set[str]]:
    """Every key that the schema knows, and every word."""
    keys, words = set(), set()
    for node in part if isinstance(part, list) else part.values() if isinstance(part, dict) else ():
        inner = keys_and_words(node)
        keys, words = keys | inner[0], words | inner[1]
    if isinstance(part, dict):
        keys |= set(part.get("properties", {}))
        words |= {w for w in [*part.get("enum", []), part.get("const")] if isinstance(w, str)}
    return keys, words


KEYS, WORDS = keys_and_words(SCHEMA)
SCALARS = st.sampled_from(
    [True, False, 0, 1, 2, 64, -1, MAX_FORCED, MAX_FORCED + 1, MAX_COUNT, MAX_COUNT + 1]
    + [0.5, -0.25, 1.5, 1e-10, 10**10, "", "x", "for", "x" * 48, "x" * 49, "Upper", "naïve", "a b"]
    + ["x" * 200, "x" * 201, "two\nlines", "1", "no", "a\u2028b", [], {}, ["x"], {"x": 1}]
    + [{"blocks": 64}, {"blocks": 32, "stride": 16}, {"qk": 1, "v": 2}, {"kv": 2, "group_size": 3}]
) | st.sampled_from(sorted(WORDS))


def places(data, path=()) -> list[tuple]:
    """Of everything in a tree."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def at(data, path):
    for step in path:
        data = data[step]
    return data


@st.composite
def mutated(draw):
    """A written spec with up to three of its values changed, keys added, taken away or misspelt."""
    data = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(data)))
        here = at(data, path)
        change = draw(
            st.sampled_from(["value", "value", "key", "less", "misspell", "graft", "many"])
        )
        if change == "key" and isinstance(here, dict):
            here[draw(st.sampled_from([*sorted(KEYS), "colour", ""]))] = copy.deepcopy(
                draw(SCALARS)
            )
        elif change == "many" and isinstance(here, list):
            here *= 17
        elif path and change in ("value", "graft", "less", "misspell"):
            owner, last = at(data, path[:-1]), path[-1]
            if change == "value":
                owner[last] = copy.deepcopy(draw(SCALARS))
            elif change == "graft":
                other = draw(st.sampled_from(TREES))
                owner[last] = copy.deepcopy(at(other, draw(st.sampled_from(places(other)))))
            else:
                value = owner.pop(last)
                if change == "misspell" and isinstance(owner, dict):
                    owner[f"{last}s"] = value
    return data


@given(mutated())
@settings(max_examples=300, deadline=None)
def test_schema_and_parser_agree(data):
    text = yaml(data)
    assume(len(text) < 8000 and not product_too_large(data))
    assert disagreement(data) is None


@pytest.mark.parametrize("place", places(TREES[0])[1:], ids=str)
def test_every_value_may_be_wrong_in_every_way(place):
    """What the property samples, all of it for one shipped spec: each value by one of each kind."""
    for value in [True, 0, 1.5, "x", "X y", "", [], {}, MAX_COUNT + 1, "tokens", "for"]:
        data = copy.deepcopy(TREES[0])
        at(data, place[:-1])[place[-1]] = value
        assert disagreement(data) is None


# What only the parser knows of one value ----------------------------------------------------------


def small(**changed) -> dict:
    return {"hsgen": 1, "name": "w", "attend": [{"name": "local", "window": 4}], **changed}


def test_whole_numbers_with_a_point_are_the_parsers_alone():
    """For JSON Schema, 4.0 is a whole number."""
    data = small(attend=[{"name": "local", "window": 4.0}])
    assert codes(yaml(data)) == {"HS032"}
    assert EDITOR.is_valid(data)


def test_product_of_heads_is_the_parsers_alone():
    data = small(heads={"kv": 2, "group_size": MAX_COUNT})
    assert product_too_large(data)
    assert codes(yaml(data)) == {"HS033"}
    assert EDITOR.is_valid(data)


def test_unicode_that_does_not_print_is_the_parsers_alone():
    """Controls and line breaks the schema refuses; other classes of Unicode no portable pattern says."""
    assert codes(yaml(small(source="a\u00a0b"))) == {"HS037"}
    assert EDITOR.is_valid(small(source="a\u00a0b"))
    assert disagreement(small(source="a\u2028b")) is None
    assert disagreement(small(source="two\nlines")) is None


# What an editor shows -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *SCHEMA["$defs"]])
def test_every_key_is_explained(name):
    mapping = SCHEMA["$defs"][name] if name else SCHEMA
    assert mapping["description"]
    assert all(value["description"] for value in mapping["properties"].values())


def test_keys_are_spelt_as_in_yaml():
    defs = SCHEMA["$defs"]
    assert "from" in defs["Score"]["properties"]
    assert "source" not in defs["Score"]["properties"]
    assert defs["Score"]["properties"]["from"]["description"].endswith(
        "the level whose scores are mapped"
    )
    assert "group_size" in defs["Heads"]["properties"]
    assert list(defs["Blocks"]["properties"]) == ["blocks", "stride", "before"]
    tokens, *_ = defs["Level"]["properties"]["partition"]["anyOf"]
    assert tokens == {"const": "tokens", "description": "Every token is an entry of its own."}
    assert "kind" not in keys_and_words(SCHEMA)[0]


def test_every_key_of_the_parser_is_there():
    for name, cls in schema._classes(schema.Spec).items():
        names = [key.name for key in reader.keys(cls)]
        mapping = SCHEMA if name == "Spec" else SCHEMA["$defs"].get(name, {"properties": {}})
        assert list(mapping["properties"]) == names


def test_comments_beside_and_above_a_field_are_its_description():
    assert SCHEMA["properties"]["causal"]["description"] == "a row sees no token after its own"
    assert SCHEMA["properties"]["heads"]["description"] == "left out: bound at load_kernel"
    lines = ["    # first", "    # second", "    x: int", "    y: str = '#'  # beside"]
    above, beside = schema.ast.parse("class A:\n" + "\n".join(lines)).body[0].body
    lines.insert(0, "class A:")
    assert schema._comment(lines, above) == "first second"
    assert schema._comment(lines, beside) == "beside"


# The command --------------------------------------------------------------------------------------


def test_command_prints_it(capsys):
    assert main(["schema"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == SCHEMA
    assert not err


def test_command_writes_it_over_an_older_one(tmp_path, capsys):
    path = tmp_path / "hsgen.schema.json"
    path.write_text("older")
    assert main(["schema", "-o", str(path)]) == 0
    assert json.loads(path.read_text()) == SCHEMA
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert capsys.readouterr() == ("", "")


def test_command_says_what_it_cannot_write(tmp_path, capsys):
    assert main(["schema", "-o", str(tmp_path / "none" / "s.json")]) == 1
    assert "cannot write: No such file or directory" in capsys.readouterr().err


def test_command_takes_half_a_second():
    assert_takes(0.5, lambda: hsgen("schema").check_returncode())


def test_command_loads_nothing_heavy():
    code = (
        "import sys; from hsgen.cli import main; status = main(['schema']);"
        "heavy = {'torch', 'triton', 'numpy', 'networkx', 'jinja2'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
