"""Backends of vLLM and SGLang on stand-ins of what these have: mixed batches in their layouts of pages.

`benchmarks.server_interfaces` holds what the stand-ins are called against the released packages.
"""

import importlib
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hsgen.errors import ArgumentError, HsgenError
from hsgen.reference import reference
from hsgen.spec import parse

PAGE, PAGES, HEADS, DIM = 16, 9, 2, 32
SPEC = """
hsgen: 1
name: blocks
heads: {query: 2, kv: 1}
head_dim: 32
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 3, force: {last: 1}}
attend: [{name: selected, over: block}]
"""
COUNTS = (1, 20, 3)  # new tokens of three requests: a step, a chunk of prefill, a step with drafts
SEEN = (30, 0, 16)
TABLE = ((5, 2), (1, 7), (3, 8))


class Dense:
    """A backend that says that it was called."""

    def __init__(self, *_, **__):
        self.calls = []

    def init_forward_metadata(self, batch):
        self.calls.append("metadata")

    def forward_extend(self, q, k, v, layer, batch, save_kv_cache=True):
        self.calls.append("dense")
        return q


@pytest.fixture
def packages(monkeypatch):
    """Modules of both servers, with as much in them as backends import."""

    def module(name, **names):
        made = ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    class Enumeration:
        __members__ = {}

    class Impl:
        def __init__(self, num_heads, head_size, scale, **others):
            self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
            self.sliding_window, self.attn_type = (-1, -1), "decoder"
            self.sinks = others.get("sinks")
            self.alibi_slopes = self.logits_soft_cap = self.kv_sharing_target_layer_name = None

        def forward(self, *arguments):
            return "dense"

    class Builder:
        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            return SimpleNamespace(num_actual_tokens=sum(COUNTS), causal=True)

    config = SimpleNamespace(additional_config={})
    attention = "vllm.v1.attention"
    module("vllm")
    module(
        f"{attention}.backends.registry",
        AttentionBackendEnum=Enumeration,
        register_backend=Enumeration.__members__.__setitem__,
    )
    module("vllm.config", get_current_vllm_config=lambda: config)
    number = {"extract_layer_index": lambda name: int(name.split(".")[2])}
    module("vllm.model_executor.models.utils", **number)
    module(
        f"{attention}.backend",
        AttentionCGSupport=Enum("AttentionCGSupport", "NEVER"),
        AttentionType=SimpleNamespace(DECODER="decoder"),
    )
    triton = {"TritonAttentionBackend": object, "TritonAttentionImpl": Impl}
    module(f"{attention}.backends.triton_attn", **triton, TritonAttentionMetadataBuilder=Builder)
    backends, choices = {"triton": Dense}, []
    layers = "sglang.srt.layers.attention"
    module("sglang")
    module(
        f"{layers}.attention_registry",
        ATTENTION_BACKENDS=backends,
        register_attention_backend=lambda name: lambda made: backends.setdefault(name, made),
    )
    module(f"{layers}.base_attn_backend", AttentionBackend=type("AttentionBackend", (), {}))
    module("sglang.srt.server_args", add_attention_backend_choices=choices.extend)
    for name in ("vllm", "vllm_backend", "sglang"):
        monkeypatch.delitem(sys.modules, f"hsgen.integrations.{name}", raising=False)
    yield SimpleNamespace(
        config=config, backends=backends, choices=choices, enum=Enumeration.__members__
    )
    for name in ("vllm", "vllm_backend", "sglang"):
        sys.modules.pop(f"hsgen.integrations.{name}", None)


@pytest.fixture
def told(tmp_path):
    path = tmp_path / "blocks.yaml"
    path.write_text(SPEC)
    return {"spec": str(path), "dense_layers": [1]}


@pytest.fixture
def sequences():
    """Whole sequences, and the packed new tokens of all."""
    torch.manual_seed(0)
    whole = [
        {n: torch.randn(seen + new, h, DIM) for n, h in (("q", HEADS), ("k", 1), ("v", 1))}
        for seen, new in zip(SEEN, COUNTS, strict=True)
    ]
    new = {n: torch.cat([x[n][seen:] for x, seen in zip(whole, SEEN, strict=True)]) for n in "qkv"}
    return whole, new


def expected(whole):
    spec = parse(SPEC, "blocks.yaml")
    found = []
    for x, count in zip(whole, COUNTS, strict=True):
        given = {n: y[None] for n, y in x.items()}
        found.append(reference(spec, given, dtype=torch.float64).o[0, -count:])
    return torch.cat(found)


def fill(whole, k_pages, v_pages):
    """What is seen already, in its pages."""
    for x, seen, table in zip(whole, SEEN, TABLE, strict=True):
        for t in range(seen):
            k_pages[table[t // PAGE], t % PAGE] = x["k"][t]
            v_pages[table[t // PAGE], t % PAGE] = x["v"][t]


def test_vllm(packages, told, sequences):
    importlib.import_module("hsgen.integrations.vllm").register()
    importlib.import_module(
        "hsgen.integrations.vllm"
    ).register()  # in every process, more than once
    assert packages.enum == {"HSGEN": "hsgen.integrations.vllm_backend.Backend"}
    backend = importlib.import_module("hsgen.integrations.vllm_backend").Backend
    with pytest.raises(ArgumentError, match=r"additional_config\['hsgen'\]: expected what layers"):
        backend.get_impl_cls()(HEADS, DIM, DIM**-0.5)
    packages.config.additional_config = {"hsgen": told}
    with pytest.raises(HsgenError, match="HSGEN: no spec is told of sinks"):
        backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, sinks=torch.zeros(HEADS))
    impl = backend.get_impl_cls()(HEADS, DIM, DIM**-0.5)
    whole, new = sequences
    kv_cache = torch.zeros(PAGES, 1, PAGE, 2 * DIM)
    fill(whole, *kv_cache.transpose(1, 2).split(DIM, -1))
    starts = torch.tensor([0, *COUNTS]).cumsum(0).to(torch.int32)
    common = SimpleNamespace(
        num_reqs=3,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(SEEN, dtype=torch.int32) + torch.tensor(COUNTS, dtype=torch.int32),
        block_table_tensor=torch.tensor(TABLE, dtype=torch.int32),
        max_seq_len=31,
    )
    metadata = backend.get_builder_cls()().build(0, common)
    padded = {n: torch.cat([x, torch.ones(2, *x.shape[1:])]) for n, x in new.items()}
    output = torch.full_like(padded["q"], 7.0)
    arguments = (*(padded[n] for n in "qkv"), kv_cache, metadata, output)
    layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
    assert impl.forward(layer, *arguments) is output
    torch.testing.assert_close(output[:-2].double(), expected(whole), rtol=1e-4, atol=1e-5)
    assert (output[-2:] == 7.0).all()  # nobody's
    scaled = backend.get_impl_cls()(HEADS, DIM, 2 * DIM**-0.5)
    again = scaled.forward(layer, padded["q"] / 2, *arguments[1:-1], torch.empty_like(output))
    torch.testing.assert_close(again[:-2], output[:-2])
    layer.layer_name = "model.layers.1.self_attn.attn"
    assert impl.forward(layer, *arguments) == "dense"
    assert backend.supports_block_size(64)
    assert not backend.supports_block_size(48)
    assert not backend.supports_kv_connector()


class Mode:
    """Of a mixed batch."""

    name = "MIXED"

    def is_decode(self):
        return False

    def is_extend_without_speculative(self):
        return True


def test_sglang(packages, told, sequences):
    module = importlib.import_module("hsgen.integrations.sglang")
    module.register()
    module.register()
    assert packages.choices == ["hsgen"]
    whole, new = sequences
    buffers = [torch.zeros(PAGES * PAGE + 1, 1, DIM) for _ in "kv"]
    fill(whole, *(x[:-1].unflatten(0, (PAGES, PAGE)) for x in buffers))
    slots = torch.zeros(8, 64, dtype=torch.int32)
    requests = torch.tensor([6, 2, 4])
    for request, table in zip(requests, TABLE, strict=True):
        for i, page in enumerate(table):
            slots[request, i * PAGE : (i + 1) * PAGE] = page * PAGE + torch.arange(PAGE)
    runner = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(hsgen=told)),
        page_size=PAGE,
        req_to_token_pool=SimpleNamespace(req_to_token=slots),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda _: buffers),
    )
    backend = packages.backends["hsgen"](runner)
    lengths = torch.tensor(SEEN) + torch.tensor(COUNTS)
    batch = SimpleNamespace(
        forward_mode=Mode(),
        batch_size=3,
        extend_seq_lens_cpu=list(COUNTS),
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        req_pool_indices=requests,
    )
    backend.init_forward_metadata(batch)
    layer = SimpleNamespace(
        layer_id=0,
        sliding_window_size=-1,
        logit_cap=0.0,
        is_cross_attention=False,
        attn_type=SimpleNamespace(value="decoder"),
        tp_q_head_num=HEADS,
        tp_k_head_num=1,
        tp_v_head_num=1,
        qk_head_dim=DIM,
        v_head_dim=DIM,
        scaling=DIM**-0.5,
    )
    flat = [new[n].flatten(1) for n in "qkv"]
    o = backend.forward_extend(*flat, layer, batch)
    torch.testing.assert_close(
        o.unflatten(1, (HEADS, DIM)).double(), expected(whole), rtol=1e-4, atol=1e-5
    )
    layer.scaling *= 2
    torch.testing.assert_close(backend.forward_extend(flat[0] / 2, *flat[1:], layer, batch), o)
    layer.layer_id = 1
    backend.forward_extend(*flat, layer, batch)
    assert backend.others.calls == ["metadata", "dense"]
    layer.layer_id, layer.logit_cap = 0, 30.0
    with pytest.raises(HsgenError, match="layer 0: expected attention of a decoder without a cap"):
        backend.forward_extend(*flat, layer, batch)
    runner.page_size = 1
    with pytest.raises(ArgumentError, match="page-size: expected a power of two from 16 on, got 1"):
        packages.backends["hsgen"](runner)
