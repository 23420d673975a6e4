"""The model of examples/ and the training run: what learns, what is refused, what is written up."""

import json

import pytest
import torch

from benchmarks import common, training_run
from examples import language_model
from examples.language_model import LanguageModel, Size
from hsgen.errors import HsgenError
from hsgen.spec import Kl

SIZE = Size(vocabulary=64, layers=1, width=32, heads=(2, 1), dim=16)
TINY = "--device cpu --layers 1 --width 32 --heads 2 1 --dim 16 --tokens 64 --batch 2 --text manual".split()


def gradients(model, tokens):
    y, loss = model(tokens)
    (y.square().mean() + loss).backward()
    return {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("name", ["nsa", "moba", "hisa", "hirouter"])
def test_every_weight_of_a_system_learns(name):
    """Gates, maps of pools, the index by its loss and the tree by its own among them."""
    spec = training_run.system(name, 64, SIZE)
    model = LanguageModel(SIZE, spec, plain=True)
    grads = gradients(model, torch.randint(64, (2, 64)))
    own = {"nsa": "project.gates", "hisa": "project.q_index", "hirouter": "learned.leaf_centroids"}
    assert any(own.get(name, "project.q") in each for each in grads)
    for each, grad in grads.items():
        assert grad is not None and grad.any(), each


def test_an_index_learns_from_nothing_but_its_loss():
    spec = training_run.system("hisa", 64, SIZE).model_copy(update={"loss": None})
    grads = gradients(LanguageModel(SIZE, spec, plain=True), torch.randint(64, (1, 64)))
    index = [name for name in grads if "_index" in name]
    assert len(index) == 3
    assert not any(grads[name] is not None and grads[name].any() for name in index)


def test_weights_of_one_name_begin_alike():
    dense, nsa = (
        dict(LanguageModel(SIZE, training_run.system(name, 64, SIZE)).named_parameters())
        for name in ("dense", "nsa")
    )
    assert dense.keys() < nsa.keys()
    for name, weight in dense.items():
        assert torch.equal(weight, nsa[name]), name
    assert not torch.equal(dense["embed.weight"], LanguageModel(SIZE, seed=1).embed.weight)


def test_a_parameter_that_nothing_begins_is_refused():
    with pytest.raises(ValueError, match=r"some_sink: nothing says what .* begins as"):
        language_model.initialise("attention.learned.some_sink", torch.empty(2), 1, 0)


@pytest.mark.usefixtures("sanitized")
def test_kernels_and_the_reference_have_the_same_gradients_of_a_model():
    """And what stands behind a token changes nothing before it."""
    spec = training_run.system("moba", 32, SIZE)
    tokens = torch.randint(64, (1, 32))
    by_kernels = LanguageModel(SIZE, spec, interpret=True)
    expected = gradients(LanguageModel(SIZE, spec, plain=True), tokens)
    assert_alike(gradients(by_kernels, tokens), expected)


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize(
    ("name", "own", "plain"),
    [
        ("hisa", "project.q_index.weight", False),
        ("hisa", "project.q_index.weight", True),
        ("hirouter", "learned.leaf_centroids", False),
    ],
    ids=["on kernels", "of the reference", "a tree"],
)
def test_attention_on_kernels_learns_beside_a_loss(name, own, plain):
    """hisa: the index by KL, everything else by chosen tokens; hirouter: all by dual entropy too."""
    spec = training_run.system(name, 64, SIZE)
    tokens = torch.randint(64, (1, 64))
    mixed = LanguageModel(SIZE, spec, plain_losses=plain, interpret=True)
    expected = gradients(LanguageModel(SIZE, spec, plain=True), tokens)
    assert expected[f"blocks.0.attention.{own}"].any()
    assert_alike(gradients(mixed, tokens), expected)


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_model_says_nothing_of_tokens_ahead():
    tokens = torch.randint(64, (1, 64))
    other = tokens.clone()
    other[:, 40:] = torch.randint(64, (1, 24))
    for name in training_run.SYSTEMS:
        spec = training_run.system(name, 64, SIZE)
        model = LanguageModel(SIZE, spec, plain=spec is not None).eval()
        with torch.no_grad():
            said, again = model(tokens)[0], model(other)[0]
        torch.testing.assert_close(said[:, :40], again[:, :40])
        assert not torch.allclose(said[:, 40:], again[:, 40:])


def test_what_no_kernel_trains_is_said_by_name():
    spec = training_run.system("hirouter", 512, Size())
    loss = spec.loss.model_copy(update={"kl": Kl(level="token")})
    words = training_run.refusals(spec.model_copy(update={"loss": loss}), "cpu", interpret=True)
    said = "no kernel computes the loss kl of scores that are mapped, normalised or carried yet"
    assert words == {"losses": f"hirouter: {said}"}


def test_sizes_are_the_authors_shares():
    said = {name: training_run.system(name, 4096, Size()) for name in training_run.SYSTEMS}
    said = {name: spec and training_run.sizes(spec) for name, spec in said.items()}
    assert said == {
        "dense": None,
        "nsa": "compressed: blocks of 16 every 8; block: blocks of 32, 16 kept; window: 256",
        "moba": "chunk: blocks of 256, 3 kept",
        "hisa": "block: blocks of 32, 32 kept; token: 256 kept",
        "hirouter": "branch: 8 children a node, 4 kept; leaf: 8 children a node, 8 kept; "
        "token: 256 kept",
    }


@pytest.mark.parametrize("count", training_run.pairs(512))
def test_recall_is_told_once_and_asked_where_it_says(count):
    drawn = torch.Generator().manual_seed(count)
    text, targets, first = training_run.told_and_asked(count, 512, drawn)
    symbols = training_run.SYMBOLS
    told = {int(k): int(v) for k, v in text[:256].unflatten(0, (-1, 2)) if k < symbols}
    assert len(told) == count
    asked = (targets != training_run.IGNORED).nonzero().flatten().tolist()
    assert asked == list(range(256, 512, 2))
    seen = set()
    for at in asked:
        key = int(text[at])
        assert targets[at] == text[at + 1] == told[key]
        assert bool(first[at]) == (key not in seen)
        seen.add(key)


def test_held_out_text_is_not_trained_on():
    kept, held = training_run.split([bytes([i]) * 3 for i in range(30)])
    assert {9, 19, 29} <= set(held)
    assert not {9, 19, 29} & (set(kept) - {10})  # 10: a newline between documents
    with pytest.raises(HsgenError, match="expected more than 64 bytes to train on"):
        training_run.reading([b"few"], 64, 1, "cpu")


def test_trainings_lower_losses_go_on_and_are_written_up(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "HELD", 2)
    argv = [*TINY, "--steps", "12", "--rate", "1e-2", "-o", str(tmp_path)]
    some = ["--systems", "dense", "nsa", "moba"]
    assert training_run.main([*argv, *some, "--tasks", "text"]) == 0
    (path,) = tmp_path.glob("training_run_cpu_64_*.json")
    result = common.read_json(path)
    assert [x["attention"] for x in result["records"]] == ["sdpa", "reference", "reference"]
    for record in result["records"]:
        (_, first, _), *_, (last_step, last, _) = record["curve"]
        assert last_step == record["steps"] == 12
        assert last < first - 0.5, record["system"]
        assert record["measured"][-1][1]["bits"] < first

    # again: what is there stays; a system that kernels refuse; recall of one system
    old = result["records"]
    assert training_run.main([*argv, *some, "--tasks", "text"]) == 0
    refused = {"losses": "no kernel computes the loss dual_entropy yet"}
    monkeypatch.setattr(training_run, "refusals", lambda *_, **__: refused)
    assert (
        training_run.main([*argv, "--systems", "hirouter", "--tasks", "text", "--interpret"]) == 0
    )
    assert training_run.main([*argv, "--systems", "dense", "--tasks", "recall"]) == 0
    result = common.read_json(path)
    assert result["records"][:3] == old
    assert str(tmp_path) not in json.dumps(result)
    with pytest.raises(HsgenError, match="expected results with steps 13, got 12"):
        training_run.main([*argv, "--steps", "13"])

    assert training_run.main(["--report", "-o", str(tmp_path), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "training_run.md").read_text()
    assert "| hirouter | none | – | – | – | – | – | – |" in text
    assert "no kernel computes the loss dual_entropy yet" in text, text
    assert "| nsa | reference | 12 |" in text
    assert "Python's language reference" in text
    picture = (tmp_path / "training_run.svg").read_text()
    for word in (">nsa<", ">dense<", "held-out", "recalled"):
        assert word in picture


def test_picture_is_made_of_the_kept_results():
    kept = [common.read_json(path) for path in common.found([], "training_run")]
    written = (common.ROOT / "docs" / "training_run.svg").read_text()
    assert written == training_run.plot(kept)


def test_a_training_stops_when_its_time_is_over(tmp_path):
    argv = [*TINY, "--steps", "500", "--seconds", "0.1", "--systems", "dense", "--tasks", "recall"]
    assert training_run.main([*argv, "-o", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    (record,) = common.read_json(path)["records"]
    assert 0 < record["steps"] < 500
    assert "of 500 steps when its time was over" in training_run.page([common.read_json(path)])


def test_the_rate_goes_up_then_down():
    rates = [training_run.rate(step, 100) for step in range(101)]
    assert max(rates) == rates[9] and rates[0] < 0.11
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(training_run.LEAST_RATE)


def test_example_runs(capsys):
    language_model.main()
    said = capsys.readouterr().out
    assert float(said.splitlines()[-1].split()[2]) < 6.0
