"""`hsgen new --from-config`: a shipped spec with the sizes that a model's config.json says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hsgen.cli import main
from hsgen.errors import ArgumentError, HsgenError
from hsgen.spec import Spec, drafts, families, load, parse

CONFIGS = Path(__file__).parent / "configs"
# config -> the shipped spec that it is, sizes and all, and the layers of which
SAME = {
    "minimax_m3_vl": ("minimax_m3", range(3, 60)),
    "qwen4_exp": ("qwen_qsa", range(3, 40, 4)),
    "glm5_next": ("glm_kpool", range(3, 45, 4)),
    "minicpm": ("infllm_v2", range(32)),
    "nsa": ("nsa_fla", range(24)),
}


def said(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.fixture
def made(tmp_path: Path):
    """The spec of a config, of which some fields are changed, and the text of its comments."""

    def make(
        name: str, changes: Mapping[str, object] = {}, *, layer: int | None = None
    ) -> tuple[Spec, str]:
        config = said(name)
        inner = config.get("text_config", config)
        inner |= changes
        path = tmp_path / "config.json"
        path.write_text(
            json.dumps(config | ({"text_config": inner} if inner is not config else {}))
        )
        text, _ = drafts.from_config("mine", path, layer=layer)
        comments = " ".join(re.findall(r"^# (.*)$", text, re.MULTILINE))
        return parse(text), comments

    return make


def named(spec: Spec, name: str = "mine") -> Spec:
    return spec.model_copy(update={"name": name})


# What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME)
def test_config_of_the_defaults_is_the_shipped_spec(name: str):
    preset, layers = SAME[name]
    text, found = drafts.from_config("mine", CONFIGS / f"{name}.json")
    assert parse(text) == named(load(preset))
    assert (found.presets, found.layers) == ((preset,), tuple(layers))
    assert all(len(line) <= 100 for line in text.splitlines() if line.startswith("#"))


def test_deepseek_v32_has_the_scale_of_its_stretched_positions(made):
    plain, _ = made("deepseek_v32", {"rope_scaling": None})
    assert plain == named(load("dsa"))
    stretched, comments = made("deepseek_v32")
    # as DeepSeek's own code: 192^-0.5 (0.1 ln 40 + 1)^2
    assert stretched.attend[0].scale == pytest.approx(0.1352337788608801, rel=1e-15)
    assert "192^-0.5 times YaRN's mscale, 1.3689, squared" in comments
    new = {"rope_scaling": None, "rope_parameters": said("deepseek_v32")["rope_scaling"]}
    assert made("deepseek_v32", new)[0] == stretched


def test_glm_5_is_dsa_whose_layers_share_choices(made):
    spec, comments = made("glm_moe_dsa")
    assert spec.index and (spec.index.heads, spec.levels) == (32, load("dsa").levels)
    assert spec.attend[0].scale == 0.0625
    assert spec.reuse == load("index_cache").reuse  # the same pattern, by the same authors' rule
    assert "The calls of `reuse` are layers 0 to 77" in comments
    assert "not here: indexer_rope_interleave true" in comments


def test_deepseek_v4_takes_a_way_in_every_layer(made):
    spec, comments = made("deepseek_v4")
    assert spec.route and spec.route.table == ("sliding", "sliding", *("csa", "hca") * 3)
    assert spec.bind(layer=2) == named(load("deepseek_csa"))
    heavy = load("deepseek_hca").model_dump_json().replace('"entry"', '"heavy"')
    assert spec.bind(layer=3) == named(Spec.model_validate_json(heavy))
    assert [branch.name for branch in spec.bind(layer=0).attend] == ["window"]
    assert "base 160000, yarn by 16" in comments


@pytest.mark.parametrize(("layer", "preset"), [(2, "deepseek_csa"), (7, "deepseek_hca")])
def test_one_layer_is_the_shipped_spec(made, layer: int, preset: str):
    spec, comments = made("deepseek_v4", layer=layer)
    assert spec == named(load(preset))
    assert f"specs/{preset}.yaml with the sizes of a config.json" in comments
    assert f"layer {layer} of 8" in comments


def test_layer_that_slides_has_a_window_and_the_sink(made):
    spec, _ = made("deepseek_v4", layer=0)
    assert (spec.levels, spec.index) == ((), None)
    assert spec.combine == load("deepseek_csa").combine


def test_sizes_are_the_configs(made):
    """Each number that a config says is at its place, and none of the shipped spec's is left."""
    spec, _ = made(
        "minimax_m3_vl",
        {
            "num_attention_heads": 24,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "sparse_attention_config": {
                "sparse_num_index_heads": 3,
                "sparse_index_dim": 32,
                "sparse_block_size": 16,
                "sparse_topk_blocks": 9,
                "sparse_init_block": 1,
                "sparse_local_block": 2,
                "sparse_attention_freq": [1] * 60,
            },
        },
    )
    assert spec == parse(
        "hsgen: 1\nname: mine\nsource: 'arXiv:2606.13392'\nheads: {query: 24, kv: 3}\n"
        "head_dim: 64\ncausal: true\nindex: {heads: 3, dim: 32, keys: shared}\nlevels:\n"
        "  - {name: token, partition: tokens, score: {form: index_dot, share: group}}\n"
        "  - name: block\n    partition: {blocks: 16}\n    score: {from: token, map: max}\n"
        "    select: {top_k: 9, force: {first: 1, last: 2}}\n"
        "attend: [{name: selected, over: block}]\n"
    )


def test_qwen_of_other_positions_takes_cos_and_sin(made):
    rope = {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.25}
    spec, comments = made("qwen4_exp", {"rope_parameters": rope})
    rotate = spec.levels[0].pool.rotate
    assert (rotate.base, rotate.dims) == (None, 64)
    assert "RoPE is yarn: cos and sin of every position are inputs" in comments
    by_type = {"indexed_attention": {"rope_theta": 500, "partial_rotary_factor": 0.125}}
    rotate = made("qwen4_exp", {"rope_parameters": by_type})[0].levels[0].pool.rotate
    assert (rotate.base, rotate.dims) == (500.0, 32)


def test_k_pool_without_a_tail(made):
    spec, _ = made("glm5_next", {"index_kpool_always_select_tail": False, "index_kpool": 32})
    assert (spec.levels[0].select.force.tail, spec.levels[0].select.top_k) == (None, 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index_topk_freq": 8, "index_skip_topk_offset": 4}, {"every": 2}),
        ({"index_topk_pattern": "F" * 8 + "S" * 4 + "F" * 30 + "SSF"}, {"pattern": "FFSFFFFFFFS"}),
        ({"indexer_types": ["full"] * 8 + ["shared"] * 37}, {"every": 10, "lead": 1}),
        ({"index_topk_freq": 1}, None),
    ],
)
def test_shared_choices_of_the_layers_with_an_index(made, changes: dict[str, Any], said: Any):
    """Linear layers between them count for the rule, and are no calls."""
    spec, _ = made("glm5_next", changes)
    if said is None:
        assert not spec.reuse
        return
    (reuse,) = spec.reuse
    assert (reuse.level, reuse.over, reuse.role) == ("pool", "layers", "final")
    assert reuse.model_dump(include={"every", "lead", "pattern"}, exclude_defaults=True) == said


def test_minicpm_of_other_sizes(made):
    sparse = said("minicpm")["sparse_config"] | {"window_size": 128, "topk": 8, "init_blocks": 2}
    mixers = ["minicpm4", *["lightning-attn"] * 7] * 4
    spec, comments = made("minicpm", {"sparse_config": sparse, "mixer_types": mixers})
    select = spec.levels[2].select
    assert (select.top_k, select.force.first, select.force.last) == (10, 2, 3)
    assert "layers 0, 8, ..., 24 of 32" in comments
    assert "Texts of less than 8192 tokens" in comments


def test_nsa_without_a_window_has_two_branches(made):
    spec, _ = made("nsa", {"window_size": 0})
    assert [branch.name for branch in spec.attend] == ["compressed", "selected"]


# What is not dropped ------------------------------------------------------------------------------


def test_what_a_config_leaves_out_is_named(made):
    spec, comments = made("deepseek_v32", {"index_topk": None, "rope_scaling": None})
    assert spec == named(load("dsa"))
    assert "Left out there, so defaults of its class: index_topk 2048." in comments


def test_what_is_said_of_attention_and_not_read_is_named(made):
    more = {"attention_dropout": 0.1, "attention_bias": True, "swa_window": 7, "attn_logit_cap": 0}
    _, comments = made("deepseek_v32", more)
    assert "Said there of attention, and not here: attention_dropout 0.1, swa_window 7." in comments
    old = said("minimax_m3_vl")["text_config"]["sparse_attention_config"] | {"x": 1, "sparse_y": 2}
    _, comments = made("minimax_m3_vl", {"sparse_attention_config": old})
    assert "Said of sparse attention there, and not here: sparse_y 2." in comments


ALL = [1] * 60
WRONG = [
    (
        "minimax_m3_vl",
        {
            "sparse_attention_config": {
                "sparse_attention_freq": ALL,
                "sparse_disable_index_value": [0],
            }
        },
        "sparse_disable_index_value: expected 1 in sparse layers",
    ),
    (
        "minimax_m3_vl",
        {"sparse_attention_config": {"sparse_attention_freq": ALL, "use_sparse_attention": False}},
        "expected layers of minimax_m3_sparse",
    ),
    ("minicpm", {"sparse_config": None}, "expected layers of minicpm4, got none of 32"),
    ("minicpm", {"sparse_config": {"use_nope": True}}, "use_nope: expected false"),
    ("minicpm", {"sparse_config": {"window_size": 100}}, "window_size: expected a multiple of"),
    ("minicpm", {"hidden_size": None}, "head_dim: expected a whole number of at least 1, got 0"),
    (
        "deepseek_v32",
        {"index_topk": "2048"},
        'index_topk: expected a whole number of at least 1, got "2048"',
    ),
    (
        "deepseek_v32",
        {"index_topk": True},
        "index_topk: expected a whole number of at least 1, got true",
    ),
    ("deepseek_v32", {"num_key_value_heads": 8}, "num_key_value_heads: expected 128, as many"),
    ("deepseek_v32", {"layer_types": ["indexed_attention"]}, "num_hidden_layers: expected as many"),
    ("deepseek_v32", {"layer_types": ["mamba"] * 61}, 'layer_types: expected "indexed_attention"'),
    ("deepseek_v32", {"rope_scaling": 40}, "rope_scaling: expected a mapping, got 40"),
    ("deepseek_v32", {"index_topk": 1 << 30}, "no spec can say this: "),
    (
        "minimax_m3_vl",
        {"index_topk_blocks": 8},
        "index_topk_blocks: expected 16, which sparse_topk",
    ),
    ("minimax_m3_vl", {"sparse_attention_config": None}, "expected layers of minimax_m3_sparse"),
    (
        "minimax_m3_vl",
        {"layer_types": ["minimax_m3_sparse"] * 60},
        "sparse_attention_freq: expected",
    ),
    ("minimax_m3_vl", {"num_attention_heads": 63}, "no spec can say this: expected"),
    ("minimax_m3_vl", {"num_key_value_heads": 8}, "no spec can say this: expected"),
    (
        "qwen4_exp",
        {"indexer_n_heads": None},
        "indexer_n_heads: expected a whole number",
    ),
    ("qwen4_exp", {"indexer_kv_heads": 2}, "indexer_kv_heads: expected 1, which all heads"),
    (
        "qwen4_exp",
        {"indexer_budget": 2050},
        "indexer_budget: expected a multiple of the compress ratio, 16",
    ),
    ("qwen4_exp", {"head_dim": 1024}, "no spec can say this: "),  # turns more than an index key has
    ("glm5_next", {"index_kpool": 48}, "index_topk: expected a multiple of index_kpool, 48"),
    ("glm5_next", {"qk_rope_head_dim": 64}, "qk_rope_head_dim: expected 0, since pooled keys"),
    ("glm5_next", {"index_kpool_always_select_tail": 1}, "expected true or false, got 1"),
    ("glm5_next", {"indexer_types": ["shared"] * 45}, "to choose for itself, got SSSSSSSSSSS"),
    ("glm5_next", {"index_topk_pattern": "FSS"}, "index_topk_pattern: expected 45 of them"),
    (
        "deepseek_v4",
        {"compress_ratios": [0, 2] * 4},
        "compress_ratios: expected 0 or 4 or 128 in it, got 2",
    ),
    (
        "deepseek_v4",
        {"compress_rate_csa": 8},
        "compress_rate_csa: expected one of the compress_ratios",
    ),
    (
        "deepseek_v4",
        {"num_hidden_layers": 12},
        "num_hidden_layers: expected as many as layers are said, 9",
    ),
    ("deepseek_v4", {"layer_types": ["sliding_attention"] * 8}, "layer_types: expected the types"),
    ("deepseek_v4", {"num_key_value_heads": 64}, "num_key_value_heads: expected 1, whose keys"),
    ("deepseek_v4", {"partial_rotary_factor": 0.25}, "qk_rope_head_dim: expected 128, by partial"),
    ("nsa", {"model_type": "llama"}, "model_type: expected one of minimax_m3_vl, qwen4_exp"),
    ("nsa", {"model_type": None}, "got nothing"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_what_cannot_be_is_an_error(made, name: str, changes: dict[str, Any], message: str):
    with pytest.raises(HsgenError, match=re.escape(message)):
        made(name, changes)


def test_unknown_model_gives_the_nearest(made):
    with pytest.raises(HsgenError) as error:
        made("nsa", {"model_type": "deepseek_v3"})
    assert error.value.help == "did you mean 'deepseek_v32'?"


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("qwen4_exp", 0, "expected one of indexed_attention, got 0, which is linear_attention"),
        ("minimax_m3_vl", 2, "expected one of minimax_m3_sparse, got 2, which is full_attention"),
        ("deepseek_v4", 8, "expected a number below 8, got 8"),
        ("nsa", 24, "expected a number below 24, got 24"),
    ],
)
def test_layer_without_such_attention(made, name: str, layer: int, message: str):
    with pytest.raises(ArgumentError, match=message):
        made(name, layer=layer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot read this config"),
        (b"\xff\xfe", "cannot read this config"),
        (b"[" * 200_000, "cannot read this config"),
        (b"[]", "expected the fields of a model, got []"),
        (
            b'{"model_type": "nsa", "head_dim": 8, "head_dim": 16}',
            "the key 'head_dim' is there twice",
        ),
        (b" " * ((1 << 20) + 1), "more than 1048576 bytes"),
    ],
)
def test_file_that_is_no_config(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(HsgenError, match=re.escape(message)):
        drafts.from_config("mine", path)


# The command --------------------------------------------------------------------------------------


def test_command_writes_a_spec_that_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(said("deepseek_v4")))
    assert main(["new", "mine", "--from-config", "model"]) == 0
    told = capsys.readouterr().out
    assert told == (
        "mine.yaml: mine, which is deepseek_csa and deepseek_hca with the sizes of model until you "
        "change it\n"
    )
    assert main(["check", "mine.yaml"]) == 0
    assert main(["new", "mine", "--from-config", "model"]) == 1  # what is there stays
    capsys.readouterr()
    given = ["--from-config", "model/config.json", "--layer", "2", "--json", "-o", "two.yaml"]
    assert main(["new", "two", *given]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "file": "two.yaml",
        "name": "two",
        "config": "model/config.json",
        "presets": ["deepseek_csa"],
        "layers": [2],
    }
    assert load("two.yaml") == named(load("deepseek_csa"), "two")


@pytest.mark.parametrize(
    "given", [[], ["--from", "nsa", "--from-config", "x"], ["--from", "nsa", "--layer", "1"]]
)
def test_one_start_and_no_more(given: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["new", "mine", *given]) == 2
    assert "expected --" in " ".join(capsys.readouterr().err.replace("│", " ").split())


# Transformers' own classes ------------------------------------------------------------------------

CLASSES = {
    "minimax_m3_vl": ("minimax_m3_vl", "MiniMaxM3VLTextConfig"),
    "qwen4_exp": ("qwen4_exp", "Qwen4ExpTextConfig"),
    "glm5_next": ("glm5_next", "Glm5NextTextConfig"),
    "glm_moe_dsa": ("glm_moe_dsa", "GlmMoeDsaConfig"),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32Config"),
    "deepseek_v4": ("deepseek_v4", "DeepseekV4Config"),
}


def configured(name: str, **fields: object) -> Any:
    """A config of transformers' class, where this release has it."""
    package, kind = CLASSES[name]
    pytest.importorskip("transformers")
    module = pytest.importorskip(f"transformers.models.{package}.configuration_{package}")
    return getattr(module, kind)(**fields)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_class(name: str):
    config = configured(name)
    flat = vars(config) | {
        "full_attention_interval": 4,  # an argument of the class, no field of it
        "compress_rate_csa": getattr(config, "compress_rates", {}).get(
            "compressed_sparse_attention"
        ),
        "compress_rate_hca": getattr(config, "compress_rates", {}).get(
            "heavily_compressed_attention"
        ),
    }
    defaults = families.FAMILIES[name].defaults
    assert {key: flat[key] for key in defaults} == dict(defaults)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_config_is_read(name: str, tmp_path: Path):
    """What the class saves, most defaults left out, is the shipped spec."""
    needed: dict[str, dict[str, object]] = {
        "minimax_m3_vl": {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57},
        "qwen4_exp": {
            key: value
            for key, value in said("qwen4_exp")["text_config"].items()
            if key.startswith("indexer") or key == "rope_parameters"
        },
    }
    config = configured(name, **needed.get(name, {}))
    config.save_pretrained(tmp_path)
    text, found = drafts.from_config("mine", tmp_path)
    spec = parse(text)
    if name in SAME:
        assert (spec, found.layers) == (named(load(SAME[name][0])), tuple(SAME[name][1]))
    if name == "deepseek_v32":
        assert spec == named(load("dsa"))
    if name == "deepseek_v4":
        assert spec.bind(layer=3) == named(load("deepseek_csa"))
    if name == "glm_moe_dsa":
        assert (spec.reuse, spec.attend[0].scale) == ((), 0.0625)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_hidden_layers": 5},
        {"compress_ratios": [0, 4, 128, 4, 0, 0], "num_hidden_layers": 5},
        {
            "layer_types": ["sliding_attention", "compressed_sparse_attention"],
            "num_hidden_layers": 2,
        },
    ],
)
def test_ways_of_deepseek_v4_are_the_classes(made, fields: dict[str, Any]):
    theirs = configured("deepseek_v4", **fields).layer_types
    blank = {"num_hidden_layers": None, "compress_ratios": None}
    spec, _ = made("deepseek_v4", blank | fields)
    ways = {"csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
    assert spec.route
    assert [ways.get(way, "sliding_attention") for way in spec.route.table] == theirs


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("glm_moe_dsa", {"index_topk_freq": 4}),
        ("glm_moe_dsa", {"index_topk_freq": 3, "index_skip_topk_offset": 5}),
        ("glm_moe_dsa", {"index_topk_freq": 0}),
        ("glm_moe_dsa", {"index_topk_pattern": "FFFS" * 10}),
        ("glm5_next", {"index_topk_freq": 12, "index_skip_topk_offset": 8}),
        ("glm5_next", {"index_topk_pattern": "SSSFSSSS" * 5}),
    ],
)
def test_shared_choices_are_the_classes(made, name: str, fields: dict[str, Any]):
    layers = {"num_hidden_layers": 40}
    fields = {key: value[:40] if isinstance(value, str) else value for key, value in fields.items()}
    theirs = configured(name, **fields, **layers)
    spec, _ = made(name, {"index_topk_freq": None} | fields | layers)
    ours = [
        theirs.indexer_types[i]
        for i, kind in enumerate(theirs.layer_types)
        if kind == "indexed_attention"
    ]
    turns = [spec.reuse[0].turn(i) if spec.reuse else "fresh" for i in range(len(ours))]
    assert turns == ["fresh" if mode == "full" else "shared" for mode in ours]
