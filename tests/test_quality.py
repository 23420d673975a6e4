"""`hsgen quality`: what a spec's choices recall, held against figures made another way."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from hsgen import captures, charts, metrics, quality, standins, svg
from hsgen.cli import main
from hsgen.errors import HsgenError, SpecError
from hsgen.reference import reference
from hsgen.spec import load, parse
from hsgen.spec.files import shipped

ROOT = Path(__file__).resolve().parent.parent
CAPTURE = ROOT / "tests" / "data" / "smollm2_layer05.safetensors"
TEXT = """\
hsgen: 1
name: tried
causal: {causal}
levels:
  - name: block
    partition: {{blocks: 16}}
    pool: {{keys: mean}}
    score: {{form: dot, share: {share}}}
    select: {{top_k: {top_k}, force: {{first: 1, last: 2}}}}
attend:
{attend}
"""
SELECTED = "  - {name: selected, over: block}"
WINDOW = "  - {name: window, window: 32}"


def made(causal="true", share="group, reduce: sum", top_k=4, attend=SELECTED):
    return parse(TEXT.format(causal=causal, share=share, top_k=top_k, attend=attend), "tried.yaml")


@pytest.fixture(scope="module")
def group():
    (group,) = captures.load(CAPTURE)
    return group.prefix(512)


def measured(spec, group, rows=64):
    return list(quality.measure(spec, group, rows))


# --- subjects


def test_subjects_are_levels_windows_and_all_branches():
    names = [subject.name for subject in quality.subjects(load("nsa"))]
    assert names == ["level block", "branch window", "all branches"]
    hisa = {subject.name: subject.about for subject in quality.subjects(load("hisa"))}
    (*_, together) = quality.subjects(load("nsa"))
    assert together.about.startswith("tokens that selected and window read, each once, under one")
    assert together.about.endswith("as the spec does not")
    assert hisa["level block"] == "blocks of 128, expanded by token"
    assert hisa["level token"] == "tokens, attended by selected"


def test_one_branch_is_not_said_twice():
    assert [subject.name for subject in quality.subjects(made())] == ["level block"]


# --- figures


@pytest.mark.parametrize("share", ["head", "group, reduce: sum"])
def test_output_is_that_of_the_reference(group, share):
    """With one branch, attention over what was chosen is what the spec computes."""
    spec = quality.bound(made(share=share), group)
    position = quality.measured_rows(512, 128)
    full = metrics.dense(group.q[position], group.k, group.v, position)
    chosen = quality.choices(spec, group, position)["level block"]
    o = metrics.judge(full, chosen, 16).o
    q, k, v = group.q[None], group.k[None, :, None], group.v[None, :, None]
    expected = reference(spec, standins.tensors(spec, q, k, v)).o[0, position]
    torch.testing.assert_close(o.transpose(0, 1).double(), expected, atol=1e-4, rtol=1e-4)


def test_all_branches_are_the_union_of_tokens(group):
    attend = f"{SELECTED}\n{WINDOW}\ncombine: {{softmax: union}}"
    spec = quality.bound(made(attend=attend), group)
    position = quality.measured_rows(512, 64)
    found = quality.choices(spec, group, position)
    blocks = found["level block"].repeat_interleave(16, -1)
    near = position[:, None] - torch.arange(512)
    expected = (blocks | (near < 32)) & (near >= 0)
    both = found[quality.TOGETHER] & (near >= 0)
    assert torch.equal(both, expected)
    full = metrics.dense(group.q[position], group.k, group.v, position)
    q, k, v = group.q[None], group.k[None, :, None], group.v[None, :, None]
    o = reference(spec, standins.tensors(spec, q, k, v)).o[0, position]
    judged = metrics.judge(full, found[quality.TOGETHER], 1).o.transpose(0, 1).double()
    torch.testing.assert_close(judged, o, atol=1e-4, rtol=1e-4)


def test_figures_of_a_window_are_those_of_brute_force(group):
    spec = parse(
        "hsgen: 1\nname: near\ncausal: true\nattend: [{name: near, window: 32}]\n", "near.yaml"
    )
    (first, *_) = measured(spec, group)
    rows = quality.measured_rows(512, 64)
    q, k = group.q[rows, 0].float(), group.k.float()
    logits = (q @ k.T) * 64**-0.5
    hidden = torch.arange(512) > rows[:, None]
    probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    near = (rows[:, None] - torch.arange(512) < 32) & ~hidden
    mass = (probs * near).sum(-1)
    assert first.ways["selected"]["mass"] == pytest.approx(float(mass.mean()), abs=1e-4)
    assert first.ways["selected"]["worst_mass_row"] == int(rows[mass.argmin()])
    assert first.density == pytest.approx(float(near.sum() / (~hidden).sum()))
    best = [set(p.topk(32).indices.tolist()) for p in sum_over_heads(group, rows)]
    own = [set(range(row - 31, row + 1)) for row in rows.tolist()]
    iou = sum(len(a & b) / len(a | b) for a, b in zip(best, own, strict=True)) / len(rows)
    assert first.iou == pytest.approx(iou, abs=1e-3)


STATIC = """
hsgen: 1
name: static
attend:
  - {name: only, static: {blocks: 16, window: 2, sink: 1, stride: 5, shift: 1, power_of_two: true}}
"""


def test_what_a_static_pattern_takes_is_what_the_reference_attends(group):
    spec = quality.bound(parse(STATIC), group)
    position = quality.measured_rows(512, 64)
    (subject,) = quality.subjects(spec)
    chosen = quality.choices(spec, group, position)[subject.name]
    q, k, v = group.q[None], group.k[None, :, None], group.v[None, :, None]
    o = reference(spec, standins.tensors(spec, q, k, v)).o[0, position]
    full = metrics.dense(group.q[position], group.k, group.v, position)
    judged = metrics.judge(full, chosen, 1).o.transpose(0, 1).double()
    torch.testing.assert_close(judged, o, atol=1e-4, rtol=1e-4)
    assert not torch.equal(chosen[0], chosen[1])  # heads take turns


def test_a_branch_that_sees_everything_misses_nothing(group):
    spec = parse("hsgen: 1\nname: whole\nattend: [{name: whole, window: all}]\n")
    for each in measured(spec, group):
        assert (each.density, each.iou) == (1.0, 1.0)
        assert each.ways["selected"]["mass"] == pytest.approx(1.0)


def sum_over_heads(group, rows):
    logits = torch.einsum("rhd,sd->hrs", group.q[rows].float(), group.k.float()) * 64**-0.5
    hidden = torch.arange(512) > rows[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).sum(0)


def test_every_way_has_one_budget_and_the_oracle_recalls_most(group):
    found = measured(made(share="head"), group)
    assert [each.head for each in found] == [3, 4, 5]
    for each in found:
        assert each.entries == 4
        masses = {way: each.ways[way]["mass"] for way in quality.WAYS}
        assert masses["oracle"] == max(masses.values())
        assert masses["selected"] > masses["random"]
        assert 0 < each.iou < 1


def test_a_spec_that_is_not_causal_sees_all(group):
    (each, *_) = measured(made(causal="false"), group)
    assert each.density == pytest.approx(4 * 16 / 512)


# --- budgets


def test_scaled_budgets_keep_room_for_what_is_forced():
    spec = made(top_k=8, attend=f"{SELECTED}\n{WINDOW}\ncombine: {{softmax: union}}")
    double = quality.scaled(spec, 2.0)
    assert (double.level("block").select.top_k, double.attend[1].window) == (16, 64)
    assert quality.scaled(spec, 0.125).level("block").select.top_k == 3
    assert quality.scaled(spec, 1.0) == spec
    assert quality.scaled(load("hisa"), 0.5).level("block").select.beam == 32


def test_curves_rise_and_pass_through_the_spec():
    report = quality.report(made(), CAPTURE, tokens=256, rows=64, curves=True)
    (curves,) = report.curves
    own = curves.factors.index(1.0)
    assert list(curves.density) == sorted(curves.density)
    assert list(curves.mass["oracle"]) == sorted(curves.mass["oracle"])
    mean = sum(each.density for each in report.measured) / len(report.measured)
    assert curves.density[own] == pytest.approx(mean)


# --- the report


def test_report_states_denominator_stand_ins_and_what_is_not_measured():
    text = str(quality.report(load("nsa"), CAPTURE, tokens=128, rows=64))
    assert "density: attended tokens / tokens visible to the measured rows" in text
    assert "learned compression: identity / size for every slot and position 0: the mean" in text
    assert "branch compressed attends pooled entries, no tokens" in text
    assert "level block takes everything that is visible" in text
    assert "SmolLM2-135M-Instruct by Hugging Face), 128 tokens, layers 5" in text
    for name in ("level block: ", "branch window: ", "all branches: "):
        assert f"\n{name}" in text


def test_a_spec_without_a_choice_says_so():
    spec = parse(
        "hsgen: 1\nname: pooled\ncausal: true\nlevels:\n  - name: chunk\n    partition: {blocks: 16}\n"
        "    pool: {keys: mean, values: mean}\n    score: {form: dot}\n"
        "attend: [{name: chunk, over: chunk, values: pooled}]\n",
        "pooled.yaml",
    )
    report = quality.report(spec, CAPTURE, tokens=128, rows=64, curves=True)
    assert report.measured == ()
    assert "nothing to measure: no level selects" in str(report)
    assert "nothing to measure" in charts.draw(report)


def test_not_causal_is_said():
    report = quality.report(made(causal="false"), CAPTURE, tokens=128, rows=64)
    assert "the spec is not causal, the captured model was" in str(report)


def test_too_few_tokens_are_refused():
    with pytest.raises(HsgenError, match="expected at least 128, got 100"):
        quality.report(made(), CAPTURE, tokens=100)


def test_heads_that_the_spec_does_not_allow_are_refused(group):
    spec = made()
    broken = spec.model_copy(update={"attend": spec.attend * 2})
    with pytest.raises(SpecError):
        quality.bound(broken, group)


# --- the command


@pytest.fixture
def tried(tmp_path):
    path = tmp_path / "tried.yaml"
    path.write_text(TEXT.format(causal="true", share="head", top_k=4, attend=SELECTED))
    return path


def test_command_prints_and_plots(tried, tmp_path, capsys):
    plot = tmp_path / "plot.svg"
    argv = ["quality", str(tried), "--qkv", str(CAPTURE), "--tokens", "256", "--rows", "64"]
    assert main([*argv, "--layers", "5", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "level block: blocks of 16, attended by selected" in out
    root = ElementTree.fromstring(plot.read_text(encoding="utf-8"))
    words = [x.text for x in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"the spec", "oracle", "random", "recent + sink", "density", "mass"} <= set(words)
    wide = float(root.get("width"))
    assert all(svg.width(word) < wide for word in words)
    curves = [x for x in root.iter("{http://www.w3.org/2000/svg}path") if "curve" in x.get("class")]
    assert len(curves) == 2 * len(quality.WAYS)  # drawn, and in the legend
    assert main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema_version"] == 1
    assert record["records"][0]["selected"]["mass"] < record["records"][0]["oracle"]["mass"]
    assert [each["head"] for each in record["records"]] == [3, 4, 5]


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--layers", "1,x"], 2, "expected numbers, as in 0,5"),
        (["--layers", "7"], 1, "expected layers 7"),
        (["--plot", "plot.png"], 2, "ends in .svg"),
    ],
)
def test_wrong_usage(tried, more, status, words, capsys):
    assert main(["quality", str(tried), "--qkv", str(CAPTURE), *more]) == status
    out, err = capsys.readouterr()
    assert not out
    assert words in " ".join(err.replace("│", " ").split())


# --- every spec


@pytest.mark.parametrize("name", [name for name in sorted(shipped()) if name != "moa"])
def test_every_shipped_spec_is_measured(name):
    """Except moa, whose four kinds of heads are no three: shares are shares, the oracle is best."""
    report = quality.report(load(name), CAPTURE, tokens=256, rows=64)
    assert report.subjects
    for each in report.measured:
        assert 0 <= each.density <= 1
        for way in quality.WAYS:
            assert 0 <= each.ways[way]["mass"] <= 1 + 1e-5
    for subject in report.subjects:
        own = [each for each in report.measured if each.subject == subject.name]
        total = {way: sum(each.ways[way]["mass"] for each in own) for way in quality.WAYS}
        assert all(total["oracle"] >= total[way] - 1e-4 for way in total)


SORTED = """
hsgen: 1
name: sorted
levels:
  - name: block
    permute: {keys: {sort_in_segment: 64, by: mass, last: 16}}
    partition: {blocks: 16}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 3, force: {last: 1}}
attend: [{name: selected, over: block}]
"""


def test_a_choice_that_rests_on_the_whole_text_is_that_of_the_whole_text(group):
    """Rows in the middle too: keys are ordered by what the last rows of all attend to."""
    spec = quality.bound(parse(SORTED, "sorted.yaml"), group)
    position = torch.arange(128, 192)
    found = quality.choices(spec, group, position)["branch selected"]
    q, k, v = group.q[None], group.k[None, :, None], group.v[None, :, None]
    whole = reference(spec, standins.tensors(spec, q, k, v), dtype=torch.float32, keep_seen=True)
    assert torch.equal(found, whole.seen["selected"][0, position].transpose(0, 1))
    assert found.any(-1).all()


def test_entries_that_are_no_runs_in_place_are_measured_by_their_tokens():
    (subject,) = quality.subjects(parse(SORTED, "sorted.yaml"))
    assert (subject.name, subject.size) == ("branch selected", 1)
    assert subject.about == "the tokens that level block selects"
    names = [each.name for each in quality.subjects(load("deepseek_csa"))]
    assert names == [
        "branch window"
    ]  # its entries begin before their place, and are attended pooled
