"""`hsgen specs`, and docs/systems.md that is made of it."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from paces import assert_takes
from shares import third
from test_cli_check import ROOT, hsgen

from hsgen import catalogue, emit, passes, planner, schedule
from hsgen.cli import main
from hsgen.errors import PlanError, Span
from hsgen.spec import files, load
from hsgen.target import Target

PAGE = ROOT / "docs" / "systems.md"
SHIPPED = files.shipped()
HEADER = "# Small: a spec for a test.\n# Not shipped.\nhsgen: 1\nname: small\n"
LEVEL = """\
levels:
  - name: chunk
    partition: {blocks: 64}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 4, force: {last: 1}}
"""
H100 = Target.named("h100")


@functools.cache
def shipped_ones() -> catalogue.Catalogue:
    """Made once a process: workers come back to this file."""
    return catalogue.catalogue(H100)


@functools.cache
def page_of():
    return shipped_ones().page()


@functools.cache
def as_json():
    return json.loads(json.dumps(shipped_ones().record()))


@pytest.fixture
def listed() -> catalogue.Catalogue:
    return shipped_ones()


@pytest.fixture
def record():
    """What `hsgen specs --json` has, but for its version."""
    return as_json()


@pytest.fixture
def entry(tmp_path: Path):
    """The entry of a text."""

    def make(text: str) -> catalogue.Entry:
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return catalogue.entry(path, H100)

    return make


# What is listed -----------------------------------------------------------------------------------


def test_every_shipped_spec_is_listed(listed: catalogue.Catalogue):
    assert [one.spec.name for one in listed.entries] == list(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spec_says_its_essence(name: str):
    """One sentence at the top of the file: the one place where it is said."""
    said = catalogue.essence(SHIPPED[name].read_text())
    assert 20 < len(said) <= 220
    assert said.endswith(".")
    assert said.isprintable()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER, "Small: a spec for a test."),
        (
            "\ufeff# yaml-language-server: $schema=s.json\n# One\n# sentence.\n# more.\n",
            "One sentence.",
        ),
        ("# As in eq. 9 of it.  The authors\n# differ.\nhsgen: 1\n", "As in eq. 9 of it."),
        ("# no end\nhsgen: 1\n# late.\n", ""),
        ("hsgen: 1\n# late.\n", ""),
    ],
)
def test_essence_is_the_first_sentence_of_the_header(text: str, said: str):
    assert catalogue.essence(text) == said


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spec_has_a_tier(name: str):
    """catalogue.TIERS says where to add one."""
    assert catalogue.tier(name) in catalogue.TIERS


@pytest.mark.parametrize(
    ("name", "said"),
    [("nsa", "A"), ("nsa_fla", "A"), ("nsafla", None), ("flash_moba", "B"), ("delta_llm", "C")],
)
def test_preset_has_the_tier_of_its_system(name: str, said: str | None):
    assert catalogue.tier(name) == said


def test_no_system_has_two_tiers():
    systems = [system for listed in catalogue.TIERS.values() for system in listed.split()]
    assert len(systems) == len(set(systems))


def test_json_has_every_shipped_spec(record: dict, capsys: pytest.CaptureFixture[str]):
    assert main(["specs", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["schema_version"], result["target"], result["tokens"]) == (1, "h100", 131072)
    assert result == {"schema_version": 1, **record}


@pytest.mark.parametrize("name", third(SHIPPED, turn=1))
def test_json_says_what_show_says(name: str, record: dict, capsys: pytest.CaptureFixture[str]):
    (mine,) = [one for one in record["specs"] if one["name"] == name]
    main(["show", name, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert mine["source"] == load(name).source
    assert mine["tier"] == catalogue.tier(name)
    assert mine["causality"] == shown["graph"]["causality"]
    assert (mine["problem"] is None) == (shown["problem"] is None)
    if shown["plan"]:
        assert mine["kernels"] == [kernel["name"] for kernel in shown["plan"]["kernels"]]
    last = [node["flops"][-1] for node in shown["graph"]["nodes"]]
    flops = sum(piece["t2"] * 131072**2 + piece["t1"] * 131072 + piece["t0"] for piece in last)
    flops += sum(factor * 131072**power for piece in last for power, factor in piece["others"])
    sizes = shown["graph"]["sizes"]
    pairs = 131072 * 131073 / 2 if load(name).causal else 131072**2
    dense = 2 * sizes["Hq"] * (sizes["Dqk"] + sizes["Dv"]) * pairs
    if load(name).route or (mine["calls"] or "").startswith("mean"):
        assert 0 < mine["of_dense"] < flops / dense  # of ways, the mean of a table or the costliest
    else:
        assert mine["of_dense"] == pytest.approx(flops / dense)


def test_costs_say_of_which_calls_they_are(listed: catalogue.Catalogue):
    said = {one.spec.name: one.calls for one in listed.entries if one.calls}
    assert said == {
        "delta": "mean of 7 calls, 1 of which chooses",
        "hylra": "mean of 8 calls, 3 of which choose",
        "index_cache": "mean of 4 calls, 1 of which chooses",
        "sparse_d": "a call that chooses",
        "spatten": "a call that chooses",
    }
    (delta,) = [one for one in listed.entries if one.spec.name == "delta"]
    for text in (str(listed), page_of().replace("²", "^2")):
        assert f"{delta.flops} ({delta.calls})" in text


def test_text_has_a_row_and_an_essence_each(
    listed: catalogue.Catalogue, capsys: pytest.CaptureFixture[str]
):
    assert main(["specs"]) == 0
    out, err = capsys.readouterr()
    assert out == str(listed)
    assert not err
    rows = [line for line in out.splitlines() if not line.startswith("  ")]
    assert [row.split()[0] for row in rows[1:-1]] == list(SHIPPED)
    assert all(f"  {one.essence}\n" in out for one in listed.entries)


def test_heads_that_are_open_are_bound(entry):
    open_, bound = entry(TEXT), entry(f"{TEXT}heads: {{query: 32, kv: 8}}\nhead_dim: 128\n")
    assert open_.flops == bound.flops
    assert open_.plan
    assert open_.spec.heads is None


def test_choice_needs_a_selection(entry):
    window = entry(HEADER + "attend: [{name: local, window: 64}]\n")
    assert window.phases == ("prefill", "decode", "gradients")
    assert window.record()["levels"] == []
    assert window.of_dense and window.of_dense < 0.01


def test_phases_without_a_plan_are_left_out(entry):
    chosen = entry(TEXT)
    assert chosen.phases == ("prefill", "select", "decode", "gradients")
    branch = "{name: selected, over: chunk, sink: learned}"
    sunk = entry(f"{HEADER}{LEVEL}attend: [{branch}]\ncombine: {{gates: input}}\n")
    assert sunk.plan
    assert sunk.phases == ("prefill", "select", "decode")


def refuse(*_: object, **__: object):
    span = Span(file="small.yaml", line=7, column=1)
    raise PlanError("no kernel\n  does it yet", span=span)


TEXT = f"{HEADER}{LEVEL}attend: [{{name: selected, over: chunk}}]\n"


def test_graph_without_a_plan_says_why(entry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule, "schedule", refuse)
    one = entry(TEXT)
    assert one.flops and one.of_dense and one.causality == "token"
    assert (one.plan, one.phases, one.record()["kernels"]) == (None, (), None)
    assert one.problem == one.record()["problem"] == "line 7: no kernel does it yet"


def test_layers_that_differ_are_planned_each(listed: catalogue.Catalogue):
    """Each kind of layer has kernels of its own, of which some choose, and a phase is one of all of them."""
    by_name = {one.spec.name: one for one in listed.entries}
    for name, counts, phases in (
        # one kind chooses, one takes over
        ("index_cache", [5, 3], ("prefill", "decode", "gradients")),
        ("hylra", [3, 3], ("prefill", "decode", "gradients")),
        ("small_thinker", [1, 1], ("prefill", "decode", "gradients")),
    ):
        one = by_name[name]
        plans = [
            schedule.schedule(passes.run(planner.plan(made)), H100)
            for made in (
                load(name).model_copy(update={"loss": None}).bind(layer=layer) for layer in (0, 2)
            )
        ]
        assert [len(plan.kernels) for plan in plans] == counts
        assert one.status == f"{counts[0]} and {counts[1]} kernels by layer"
        assert one.phases == phases
        assert [len(names) for names in one.record()["kernels_by_layer"]] == counts
        assert f"{counts[0]} + {counts[1]}" in str(listed)
    assert by_name["token_sparse"].phases == ("prefill", "gradients")
    assert by_name["token_sparse"].status == "1 and 12 kernels by layer"
    assert by_name["minference"].layers is None  # its heads differ
    assert by_name["nsa"].record()["kernels_by_layer"] is None


def test_spec_without_a_graph_says_why(entry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "plan", refuse)
    one = entry(TEXT)
    assert (one.graph, one.flops, one.causality, one.of_dense) == (None, None, None, None)
    alone = catalogue.Catalogue(entries=(one,), target=H100)
    assert str(alone).splitlines()[1].split() == ["small", "-", "-", "chunk", "-", "-", "-", "none"]
    assert f"\n  {one.problem}\n" in str(alone)
    assert f"| – | – | – | – | none: {one.problem} |" in alone.page()
    assert "make the kernels of 0 of the 1 systems." in alone.page()


# The ten operators --------------------------------------------------------------------------------


def test_operators_are_in_the_words_of_the_spec():
    assert dict(catalogue.operators(load("hisa"))) == {
        "index": "heads 64, dim 128",
        "partition": "block blocks 128; token tokens, within block",
        "pool": "block keys mean",
        "score": "block form relu_weighted, share all; token form relu_weighted, share all",
        "select": "block beam 64, force (first 1, last 1); token top_k 2048",
        "attend": "selected, over token",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_operators_leave_nothing_out(name: str):
    """Every number and word of a spec is in its line."""
    said = " ".join(catalogue.operators(load(name)).values())
    text = re.sub(r"#.*", "", SHIPPED[name].read_text())
    body = text[text.index("levels:") if "levels:" in text else text.index("attend:") :]
    values = set(re.findall(r"(?<=[ :{])[a-z0-9_.]+(?=[,}\n])", body)) - {"shared", "true", "input"}
    assert values
    assert not {one for one in values if not re.search(rf"\b{re.escape(one)}\b", said)}


# The page -----------------------------------------------------------------------------------------


def test_page_is_what_the_command_prints(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    """`hsgen specs --page > docs/systems.md` rewrites it, as does `pytest --update-golden`."""
    assert main(["specs", "--page"]) == 0
    out = capsys.readouterr().out
    if request.config.getoption("--update-golden"):
        PAGE.write_text(out, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == out


def test_page_has_two_lines_for_every_system(listed: catalogue.Catalogue):
    page = page_of()
    for one in listed.entries:
        name = one.spec.name
        (row,) = re.findall(rf"^\| \[{name}\]\(\.\./specs/{name}\.yaml\) \|.*$", page, re.MULTILINE)
        assert len(re.findall(r"(?<!\\)\|", row)) == 11
        assert f"\n- **{name}**: " in page


def test_page_counts_skeletons_and_pieces(listed: catalogue.Catalogue):
    """Counted anew, from what the plans name and from what the modules define."""
    skeletons, pieces, plans = Counter(), set(), 0
    for one in listed.entries:
        if one.plan is None:
            continue
        plans += 1
        skeletons.update({kernel.skeleton for kernel in one.plan.kernels})
        provenance = emit.Provenance(version="0", spec="s", digest="d", target="t")
        for text in emit.render(one.plan, provenance).values():
            pieces |= {name for name in emit.library() if f"\ndef {name}(" in text}
    counts = ", ".join(f"`{name}` in {count}" for name, count in sorted(skeletons.items()))
    assert (
        f"{len(skeletons)} skeletons ({counts}) and {len(pieces)} pieces make the kernels of "
        f"{plans} of the {len(SHIPPED)} systems."
    ) in page_of()


def test_operators_that_nothing_uses_are_named(listed: catalogue.Catalogue):
    idle = re.findall(r"No shipped spec has (.*) yet\.", page_of())
    named = set(re.findall(r"`(\w+)`", idle[0])) if idle else set()
    used = {operator for one in listed.entries for operator in catalogue.operators(one.spec)}
    assert named == set(catalogue.OPERATORS) - used


def test_plans_are_those_of_the_pipeline(listed: catalogue.Catalogue):
    one = next(each for each in listed.entries if each.spec.name == "nsa")
    assert one.plan == schedule.schedule(passes.run(planner.plan(load("nsa"))), H100, "bf16")


def test_check_of_all_specs_takes_a_second():
    assert_takes(1, lambda: hsgen("check", *SHIPPED).check_returncode())
