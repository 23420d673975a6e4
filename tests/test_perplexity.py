"""`hsgen quality --model`: a model of random weights, whose perplexity is worked out another way too."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as vocabularies

from hsgen import models, perplexity
from hsgen.cli import main
from hsgen.errors import HsgenError
from hsgen.spec import load, parse

LAYERS, VOCABULARY, LENGTH = 2, 29, 160
DENSE = """\
hsgen: 1
name: everything
attend: [{name: dense, window: all}]
"""
BLOCKS = """\
hsgen: 1
name: blocks
levels:
  - name: block
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: TOP_K, force: {first: 1, last: 1}}
attend: [{name: selected, over: block}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers, 4 query and 2 key heads, and a tokenizer of one-letter words."""
    path = tmp_path_factory.mktemp("model")
    words = {chr(ord("a") + i): i for i in range(VOCABULARY - 3)} | {"?": VOCABULARY - 3}
    tokenizer = Tokenizer(vocabularies.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(
        path
    )
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # attention that prefers some keys
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder)


@pytest.fixture(scope="module")
def text() -> str:
    letters = torch.randint(0, 26, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return " ".join(chr(ord("a") + int(i)) for i in letters)


@pytest.fixture(scope="module")
def ids(model, text):
    return model.tokens(text, LENGTH)


def blocks(top_k):
    return parse(BLOCKS.replace("TOP_K", str(top_k)), "blocks.yaml")


def test_dense_is_what_transformers_says(folder, model, ids):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = plain(ids[None]).logits[0, :-1].double()
    expected = -logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(
        model.surprise(ids, models.dense).double(), expected, atol=1e-4, rtol=0
    )
    found = perplexity.perplexity(parse(DENSE, "dense.yaml"), model, ids)
    wanted = math.exp(float(expected[LENGTH // 2 - 1 :].mean()))
    assert found.ways == pytest.approx(dict.fromkeys(found.ways, wanted), rel=1e-4)
    assert len(expected[LENGTH // 2 - 1 :]) == LENGTH // 2  # the second half, each token once


def test_every_block_is_dense_and_few_are_not(model, ids):
    every = perplexity.perplexity(blocks(LENGTH // 8), model, ids).ways
    few = perplexity.perplexity(blocks(3), model, ids).ways
    assert every["spec"] == pytest.approx(every["dense"], rel=1e-4)
    assert every["oracle"] == pytest.approx(every["dense"], rel=1e-4)
    assert few["dense"] == pytest.approx(every["dense"])
    assert len({round(value, 4) for value in few.values()}) == len(few) == 5


def test_only_the_layers_asked_for_are_exchanged(model, ids):
    some = perplexity.perplexity(blocks(3), model, ids, layers=[1])
    every = perplexity.perplexity(blocks(3), model, ids)
    assert some.layers == (1,)
    assert every.layers == (0, 1)
    assert some.ways["spec"] not in (some.ways["dense"], every.ways["spec"])


def test_captured_heads_are_the_models(model, ids):
    groups = model.capture(ids)
    assert [(group.layer, group.kv_head) for group in groups] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert groups[0].q.shape == (LENGTH, 2, 16)
    assert [group.layer for group in model.capture(ids, [1])] == [1, 1]


def test_gated_branches_get_equal_shares(model, ids):
    """Where gates are what a model lacks, two branches over the same tokens are one."""
    text = """
hsgen: 1
name: twice
attend: [{name: one, window: all}, {name: two, window: all}]
combine: {gates: input}
"""
    found = perplexity.perplexity(parse(text, "twice.yaml"), model, ids)
    assert found.ways["spec"] == pytest.approx(found.ways["dense"], rel=1e-4)


def test_the_command(folder, text, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    arguments = ["quality", "moba", "--model", str(folder), "--text", str(file)]
    assert main([*arguments, "--tokens", "128", "--rows", "64"]) == 0
    printed = capsys.readouterr().out
    assert "level chunk" in printed
    assert "oracle, random, recent + sink: as many entries as level chunk" in printed
    assert main([*arguments, "--tokens", "128", "--rows", "64", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["perplexity"]["perplexity"]) == {
        *("dense", "spec", "oracle", "random", "recent_sink")
    }
    assert record["perplexity"]["tokens"] == 128


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--tokens", "1000"], f"expected at most {LENGTH}"),
        (["--layers", "7"], "expected numbers below 2, got 7"),
        (["--text", "nowhere.txt"], "cannot read this text"),
    ],
)
def test_what_does_not_do_is_said(folder, text, tmp_path, capsys, extra, words):
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    given = ["--text", str(file)] if "--text" not in extra else []
    assert main(["quality", "moba", "--model", str(folder), *given, *extra]) == 1
    assert words in capsys.readouterr().err


def test_one_source_of_attention(folder, capsys):
    assert main(["quality", "moba"]) == 2
    assert main(["quality", "moba", "--qkv", "x", "--model", str(folder)]) == 2
    assert main(["quality", "moba", "--qkv", "x", "--text", "y"]) == 2
    assert "expected" in capsys.readouterr().err


def test_no_model_and_no_causal_spec(model, ids, tmp_path):
    with pytest.raises(HsgenError, match="found nothing"):
        models.load(tmp_path / "nothing")
    with pytest.raises(HsgenError, match="cannot read this model"):
        models.load(tmp_path)
    spec = load("moba").model_copy(update={"causal": False})
    with pytest.raises(HsgenError, match="expected causal"):
        perplexity.perplexity(spec, model, ids)
