"""Captures: what a file must hold, and what stands in for what a model lacks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hsgen import captures, standins
from hsgen.errors import HsgenError
from hsgen.reference import reference, tensor_shapes
from hsgen.spec import load, verify

CAPTURE = Path(__file__).parent / "data" / "smollm2_layer05.safetensors"
SPECS = Path(__file__).parent.parent / "specs"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two layers, two kv heads in one of them, and a tensor of another name."""
    path = tmp_path_factory.mktemp("captures") / "several.safetensors"
    tensors = {"embedding": torch.ones(2)}
    for layer, kv in ((12, 0), (3, 1), (3, 0)):
        heads = {"q": 2, "k": 1, "v": 1}
        for x, count in heads.items():
            tensors[f"layer{layer:02d}.kv{kv}.{x}"] = torch.full((1, 8, count, 4), layer + kv / 2)
    save_file(tensors, path, metadata={"model": "made up"})
    return path


def test_groups_are_in_order(several):
    groups = captures.load(several)
    assert [(group.layer, group.kv_head) for group in groups] == [(3, 0), (3, 1), (12, 0)]
    assert groups[1].query_head(1) == 3
    assert groups[1].k.shape == (8, 4)
    assert groups[1].q[0, 0, 0] == 3.5
    assert captures.metadata(several) == {"model": "made up"}


def test_layers_are_chosen(several):
    assert [group.layer for group in captures.load(several, [12])] == [12]
    with pytest.raises(HsgenError, match="expected layers 4, 5") as error:
        captures.load(several, [3, 5, 4])
    assert error.value.help == "it has layers 3, 12"


def test_prefix_is_shorter(several):
    group = captures.load(several)[0].prefix(5)
    assert (len(group.q), len(group.k), len(group.v)) == (5, 5, 5)


def test_what_is_no_capture_is_said(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(HsgenError, match="cannot read this capture"):
        captures.load(tmp_path / "text")
    with pytest.raises(HsgenError, match="cannot read this capture"):
        captures.load(tmp_path / "nothing")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(HsgenError, match=r"expected tensors layer<number>\.kv<number>\.q"):
        captures.load(tmp_path / "other")
    save_file({"layer00.kv0.q": torch.ones(1, 2, 1, 4)}, tmp_path / "half")
    with pytest.raises(HsgenError, match="cannot read this capture"):
        captures.load(tmp_path / "half")


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in SPECS.glob("*.yaml") if path.stem != "moa")
)
def test_every_shipped_spec_has_stand_ins(name):
    """Except moa, whose four kinds of heads are no three."""
    (group,) = captures.load(CAPTURE)
    group = group.prefix(64)
    spec = verify(standins.bind(load(name), query=3, kv=1, dim=64))
    made = standins.tensors(spec, group.q[None], group.k[None, :, None], group.v[None, :, None])
    assert {n: tuple(x.shape) for n, x in made.items()} == tensor_shapes(spec, 1, 64, 64)
    assert reference(spec, made).o.isfinite().all()
    assert standins.stated(spec, 3)[0][1] == "the captured group: 3 query heads, 1 kv head"


def test_ways_by_head_go_on_over_as_many_heads_as_there_are():
    """Two ways in turn are no table of three heads, but say which way each of three takes."""
    spec = verify(standins.bind(load("routing_transformer"), query=3, kv=1, dim=16))
    assert spec.route is not None
    assert spec.route.table == ("near", "routed", "near")


def test_learned_compression_becomes_the_mean():
    spec = standins.bind(load("nsa"), query=2, kv=1, dim=16)
    q, k, v = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 1, 16), torch.randn(1, 64, 1, 16)
    made = standins.tensors(spec, q, k, v)
    weight, position = made["compressed_key_weight"], made["compressed_key_position"]
    entry = torch.einsum("shd,hsde->he", k[0, :32] + position.transpose(0, 1), weight)
    torch.testing.assert_close(entry, k[0, :32].mean(0))


def test_gates_are_those_asked_for():
    spec = standins.bind(load("nsa"), query=2, kv=1, dim=16)
    q, k, v = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 1, 16), torch.randn(1, 64, 1, 16)
    made = standins.tensors(spec, q, k, v, [0.0, 1.0, 0.0])
    assert made["gates"].unique(dim=2).flatten(0, 2)[0].tolist() == [0, 1, 0]
    assert (standins.tensors(spec, q, k, v)["gates"] == 1).all()


def test_tensor_without_a_stand_in_is_named():
    spec = standins.bind(load("moba"), query=2, kv=1, dim=16)
    with pytest.raises(HsgenError, match="nothing in a capture can stand in for k"):
        standins.tensors(
            spec, torch.randn(1, 8, 2, 16), torch.randn(1, 8, 1, 8), torch.randn(1, 8, 1, 16)
        )


def test_what_stood_in_is_said():
    said = dict(standins.stated(load("nsa"), 3))
    assert "learned compression" in said
    assert said["k_compressed, v_compressed, k_window, v_window"] == "the same k and v for all"
    assert "gates" in said
    assert "index queries, keys, weights" in dict(standins.stated(load("hisa"), 3))
    assert len(standins.stated(load("moba"), 3)) == 1
