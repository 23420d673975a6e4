"""`hsgen show --mask`: pixels are what was chosen and what it holds."""

import json
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_quality import SELECTED, SORTED, TEXT, WINDOW, made

from hsgen import mask, quality, svg
from hsgen.cli import main
from hsgen.errors import HsgenError
from hsgen.reference import reference
from hsgen.spec import parse

CAPTURE = Path(__file__).parent / "data" / "smollm2_layer05.safetensors"


@pytest.fixture(scope="module")
def found():
    return mask.mask(made(share="head"), CAPTURE, tokens=200)


def test_a_panel_a_head(found):
    assert [panel.head for panel in found.panels] == [3, 4, 5]
    assert found.panels[0].mass.shape == (200, 200)


def test_mass_of_every_row_is_one(found):
    for panel in found.panels:
        torch.testing.assert_close(panel.mass.sum(-1), torch.ones(200))


def test_pixels_are_the_choice(found):
    panel = found.panels[0]
    visible = torch.ones(200, 200).tril()
    torch.testing.assert_close(panel.visible, visible)
    blocks = panel.chosen[199].unflatten(0, (-1, 8))[
        :, 0
    ]  # half blocks: 0, and 11 and 12 at the end
    assert panel.chosen[199].sum() == 3 * 16 + 8
    assert blocks[[0, 1, 22, 23, 24]].tolist() == [1] * 5
    assert (panel.chosen * (1 - visible)).sum() == 0
    assert panel.density == pytest.approx(float(panel.chosen.sum() / visible.sum()))
    assert panel.recalled == pytest.approx(float((panel.chosen * panel.mass).sum()) / 200, abs=1e-5)


def test_many_tokens_share_pixels():
    few = mask.mask(made(), CAPTURE, tokens=700).panels[0]
    assert few.mass.shape[0] <= mask.PIXELS
    torch.testing.assert_close(few.mass.sum(-1), torch.ones(len(few.mass)))
    assert few.chosen.max() <= 1
    assert few.visible[-1, 0] == 1
    assert 0 < few.visible[0, 0] < 1


def test_colours_say_held_missed_and_hidden():
    panel = mask.Panel(
        subject=made_subject(),
        head=0,
        mass=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        chosen=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        visible=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        density=0.5,
        recalled=0.5,
    )
    (held, hidden), (taken, missed) = mask.pixels(panel).tolist()
    assert hidden == list(mask.HIDDEN)
    assert taken == list(mask.TAKEN)
    assert held[2] > held[0]  # blue
    assert missed[0] > missed[2]  # red


def made_subject():
    return mask.Subject(name="level block", about="blocks")


def test_several_choices_have_a_row_each():
    attend = f"{SELECTED}\n{WINDOW}\ncombine: {{softmax: union}}"
    found = mask.mask(made(attend=attend), CAPTURE, tokens=100)
    names = [panel.subject.name for panel in found.panels]
    assert names == ["level block"] * 3 + ["branch window"] * 3 + ["all branches"] * 3
    data = mask.png(found)
    wide, high = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (wide, high) == (3 * 100 + 2 * 4, 3 * 100 + 2 * 4)


def test_words_stay_in_the_picture(found):
    root = ElementTree.fromstring(mask.draw(found))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert float(text.get("x")) + svg.width(text.text) <= float(root.get("width"))
    captions = [x.text for x in root.iter("{http://www.w3.org/2000/svg}text") if "head " in x.text]
    assert len(captions) == 3
    for caption in captions:
        assert svg.width(caption) <= mask.PIXELS + mask.GAP


def test_picture_does_not_depend_on_how_rows_are_cut(found, monkeypatch):
    monkeypatch.setattr(mask, "ROWS", 64)
    again = mask.mask(made(share="head"), CAPTURE, tokens=200)
    for one, other in zip(found.panels, again.panels, strict=True):
        assert torch.equal(one.chosen, other.chosen)


def test_a_text_that_is_chosen_for_as_a_whole_is_computed_once(monkeypatch):
    """Rows of later blocks need what earlier ones do: the whole text, but not once a run of rows."""
    spec = parse(SORTED)
    monkeypatch.setattr(mask, "ROWS", 32)
    calls = []

    def counted(*given, **named):
        calls.append(named["q_offset"])
        return reference(*given, **named)

    monkeypatch.setattr(quality, "reference", counted)
    cut = mask.mask(spec, CAPTURE, tokens=96).panels
    assert calls == [0]
    monkeypatch.setattr(mask, "ROWS", 96)
    once = mask.mask(spec, CAPTURE, tokens=96).panels
    assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(cut, once, strict=True))


def test_a_spec_without_a_choice_is_refused():
    spec = parse(
        "hsgen: 1\nname: pooled\ncausal: true\nlevels:\n  - name: chunk\n    partition: {blocks: 16}\n"
        "    pool: {keys: mean, values: mean}\n    score: {form: dot}\n"
        "attend: [{name: chunk, over: chunk, values: pooled}]\n",
        "pooled.yaml",
    )
    with pytest.raises(HsgenError, match="no level selects and no branch reads tokens"):
        mask.mask(spec, CAPTURE)


# --- the command


@pytest.fixture
def argv(tmp_path):
    path = tmp_path / "tried.yaml"
    path.write_text(TEXT.format(causal="true", share="head", top_k=4, attend=SELECTED))
    return ["show", str(path), "--qkv", str(CAPTURE), "--tokens", "100"]


def test_command_writes_svg_and_png(argv, tmp_path, capsys):
    for suffix in ("svg", "png"):
        file = tmp_path / f"mask.{suffix}"
        assert main([*argv, "--mask", str(file), "--layer", "5"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0] == "tried on smollm2_layer05.safetensors, layer 5, 100 tokens"
        assert out[1].startswith(
            "  level block (blocks of 16, attended by selected), head 3: density"
        )
        assert out[-1] == str(file)
    data = (tmp_path / "mask.png").read_bytes()
    body = data[data.index(b"IDAT") + 4 : -16]
    assert len(zlib.decompress(body)) == 100 * (1 + 3 * (3 * 100 + 2 * 4))


def test_command_says_it_as_json(argv, tmp_path, capsys):
    assert main([*argv, "--mask", str(tmp_path / "mask.svg"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [panel["head"] for panel in record["panels"]] == [3, 4, 5]


@pytest.mark.parametrize("more", [["--mask", "mask.gif"], []])
def test_wrong_usage_is_status_2(argv, more, capsys):
    assert main([*argv, *more]) == 2
    assert not capsys.readouterr().out
