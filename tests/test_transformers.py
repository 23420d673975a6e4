"""Specs inside transformers: tiny models of random weights, beside their own attention and themselves."""

import functools

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from hsgen.errors import ArgumentError, HsgenError
from hsgen.integrations import segments
from hsgen.integrations import transformers as integration
from hsgen.spec import parse

VOCABULARY, LENGTH = 31, 23
BLOCKS = """\
hsgen: 1
name: blocks
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: TOP_K, force: {last: 1}}
attend: [{name: selected, over: block}]
"""
FEW, ALL = 2, 6  # blocks of a row; all there are
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # attention that prefers some keys
}


def registered(top_k, **options):
    spec = parse(BLOCKS.replace("TOP_K", str(top_k)), "blocks.yaml")
    return integration.register(spec, f"hsgen:blocks{top_k}", **options)


def tiny(attention, **sizes):
    """A Llama of two layers whose groups have three heads; always of the same weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **sizes})
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


def ids(*lengths, seed=1):
    return torch.randint(0, VOCABULARY, lengths, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens, **others):
    return model(tokens, **others).logits


def kept(model, tokens, cache, **others):
    """The same behind a cache, by the name that the installed version has for it."""
    return logits(model, tokens, **integration.keeping(model, cache), **others)


def padded(tokens, lengths, side):
    """Sequences of other lengths, and which of the tokens are no padding."""
    there = torch.zeros_like(tokens)
    for z, length in enumerate(lengths):
        there[z, slice(-length, None) if side == "left" else slice(length)] = 1
    return tokens * there, there


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(side):
    """Wrong without a mask function; blocks begin at a sequence's first token, wherever that is."""
    lengths = (LENGTH, 13, 6)
    tokens, there = padded(ids(3, LENGTH), lengths, side)
    for top_k in (FEW, ALL):
        model = tiny(registered(top_k))
        position = (there.cumsum(1) - 1).clamp(min=0)
        found = logits(model, tokens, attention_mask=there, position_ids=position)
        for z, length in enumerate(lengths):
            alone = logits(model, tokens[z][there[z] > 0][None])
            torch.testing.assert_close(found[z][there[z] > 0], alone[0], rtol=1e-4, atol=1e-4)
        if top_k == ALL:
            own = logits(tiny("sdpa"), tokens, attention_mask=there, position_ids=position)
            torch.testing.assert_close(found[there > 0], own[there > 0], rtol=1e-4, atol=1e-4)


def test_packed_documents_are_apart():
    """As a collator packs them, with positions alone or with their ends."""
    sizes = (9, 14)
    tokens = ids(1, LENGTH)
    position = torch.cat([torch.arange(n) for n in sizes])[None]
    ends = torch.tensor([0, 9, 23], dtype=torch.int32)
    flash = {f"cu_seq_lens_{x}": ends for x in "qk"} | {f"max_length_{x}": 14 for x in "qk"}
    model = tiny(registered(FEW))
    alone = torch.cat([logits(model, part) for part in tokens.split(sizes, 1)], 1)
    for others in ({}, flash):
        found = logits(model, tokens, position_ids=position, use_cache=False, **others)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def caches(model):
    config = model.config
    return {
        "dynamic": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=LENGTH + 4),
        "ours": integration.new_cache(model, LENGTH),
    }


@pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
def test_chunks_and_steps_are_rows_of_the_whole(kind):
    """Prefill in two chunks, then steps; what is cropped off is as if it had never been."""
    model = tiny(registered(FEW, dense_layers=(1,)))
    tokens = ids(2, LENGTH)
    whole = logits(model, tokens, use_cache=False)
    cache, found = caches(model)[kind], []
    for begin, end in ((0, 11), (11, 21), (21, 22)):
        found.append(kept(model, tokens[:, begin:end], cache))
    if kind != "static":
        kept(model, ids(2, 1, seed=7), cache)
        cache.crop(-1)
    found.append(kept(model, tokens[:, 22:], cache))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


def test_padded_batches_generate_as_their_sequences_do():
    model = tiny(registered(FEW))
    lengths = (17, 9)
    tokens, there = padded(ids(2, 17), lengths, "left")
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(tokens[z : z + 1, 17 - length :], **asked)[0, length:]
        for z, length in enumerate(lengths)
    ]
    for kind in ("dynamic", "static", "ours"):
        cache = integration.keeping(model, caches(model)[kind])
        found = model.generate(tokens, attention_mask=there, **cache, **asked)
        assert torch.equal(found[:, 17:], torch.stack(alone)), kind


def test_beams_follow_their_sequences():
    """A cache whose sequences are exchanged says what transformers' says."""
    model = tiny(registered(FEW))
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "pad_token_id": 0}
    tokens = ids(2, 11)
    expected = model.generate(tokens, **asked)
    cache = integration.keeping(model, integration.new_cache(model, 20))
    assert torch.equal(model.generate(tokens, **cache, **asked), expected)


def test_gradients_are_those_of_its_own_attention():
    """Where all blocks are chosen; of a padded batch, whose padding gets none."""
    tokens, there = padded(ids(2, LENGTH), (LENGTH, 9), "left")
    grads = []
    for attention in (registered(ALL), "sdpa"):
        model = tiny(attention)
        labels = tokens.masked_fill(there == 0, -100)
        position = (there.cumsum(1) - 1).clamp(min=0)
        model(tokens, attention_mask=there, position_ids=position, labels=labels).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_layers_that_slide_keep_their_window():
    sizes = {**SIZES, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    found = []
    for attention in (registered(ALL), "sdpa"):
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(**sizes, head_dim=8, query_pre_attn_scalar=16)
        model = transformers.Gemma3ForCausalLM(config).eval()
        model.set_attn_implementation(attention)
        found.append(model.generate(ids(1, 12), max_new_tokens=4, do_sample=False))
        found.append(logits(model, ids(1, 12)))
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def m3():
    """MiniMax-M3's text model: a layer that chooses blocks of 4 for each key head, then a dense one.

    Its indexer looks at padding too, which in a later layer would be what earlier ones leave there.
    """
    family = pytest.importorskip("transformers.models.minimax_m3_vl")
    config = family.MiniMaxM3VLTextConfig(
        **{**SIZES, "num_attention_heads": 4, "hidden_size": 64},
        head_dim=16,
        rotary_dim=8,
        dense_intermediate_size=32,
        shared_intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
        layer_types=["minimax_m3_sparse", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return family.MiniMaxM3VLTextModel(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["alone", "dynamic", "static", "left", "right"])
def test_m3_attends_to_the_blocks_that_it_chose(m3, kind):
    """Its blocks begin at slots, so padding on the left shifts them; it must in ours as well."""
    tokens, there = ids(2, LENGTH), None
    if kind in ("left", "right"):
        tokens, there = padded(tokens, (LENGTH, 9), kind)
    found = []
    for attention in ("eager", integration.register("minimax_m3")):
        m3.set_attn_implementation(attention)
        cache = None
        if kind == "static":
            cache = StaticCache(config=m3.config, max_cache_len=LENGTH + 5)
        parts = [tokens] if kind == "alone" else [tokens[:, :21], tokens[:, 21:22], tokens[:, 22:]]
        if there is not None:
            parts = [tokens]
        states, seen = [], 0
        for part in parts:
            seen += part.shape[1]
            mask = None if there is None else there[:, :seen]
            named = integration.keeping(m3, cache)
            given = m3(part, attention_mask=mask, use_cache=kind != "alone", **named)
            cache = given[next(iter(named))] if kind != "alone" else None
            states.append(given.last_hidden_state)
        found.append(torch.cat(states, 1))
    real = slice(None) if there is None else there > 0
    torch.testing.assert_close(found[1][real], found[0][real], rtol=1e-4, atol=1e-4)


def test_emitted_kernels_run_inside_a_model():
    """A padded prefill into our cache, and a step, in the interpreter."""
    lengths = (9, 6)
    tokens, there = padded(ids(2, 10), lengths, "left")
    there[:, -1] = 1
    found = []
    for interpret in (True, False):
        model = tiny(registered(FEW, interpret=interpret), num_hidden_layers=1)
        cache = integration.new_cache(model, 12)
        prefill = kept(model, tokens[:, :9], cache, attention_mask=there[:, :9])
        step = kept(model, tokens[:, 9:], cache, attention_mask=there)
        found.append(torch.cat([prefill, step], 1)[there > 0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_no_spec_can_do_is_said(monkeypatch):
    name = registered(FEW)
    model = tiny(name)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    with pytest.raises(HsgenError, match="layer 0, LlamaAttention: expected a mask that is causal"):
        logits(model, ids(1, LENGTH), attention_mask=mask)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(
        HsgenError, match=r"layer 1, .*: no attention drops weights, got dropout 0.1"
    ):
        model.train()(ids(1, LENGTH))
    with pytest.raises(
        ArgumentError, match="q_index, k_index, w_index: expected a tensor, got nothing"
    ):
        spec = integration.language.load("dsa_gqa")
        logits(tiny(integration.register(spec)), ids(1, LENGTH))
    with pytest.raises(ArgumentError, match="attn_implementation that was registered, got 'sdpa'"):
        integration.new_cache(tiny("sdpa"), 8)
    spec = parse(BLOCKS.replace("TOP_K", str(FEW)), "blocks.yaml")
    branch = spec.attend[0].model_copy(update={"scale": 0.5})
    with pytest.raises(HsgenError, match="has a scale of its own, as a model's layer has"):
        own = spec.model_copy(update={"attend": (branch, *spec.attend[1:])})
        logits(tiny(integration.register(own, "scaled")), ids(1, LENGTH))
    with pytest.raises(ArgumentError, match="expected causal attention"):
        integration.register("vsa")
    with pytest.raises(ArgumentError, match="name: expected one without / and |"):
        integration.register("moba", "me/moba")
    with monkeypatch.context() as patch:
        patch.setattr(integration, "version", lambda _: "5.5.4")
        with pytest.raises(HsgenError, match="transformers 5.5.4: expected 5.6 or newer"):
            integration.register("moba")
    cache = integration.new_cache(tiny(name), LENGTH)
    tokens, there = padded(ids(2, 9), (9, 5), "right")
    kept(tiny(name), tokens, cache, attention_mask=there)
    with pytest.raises(ArgumentError, match="crop: expected at most 0 tokens, since padding"):
        cache.crop(-1)
    with pytest.raises(ArgumentError, match="crop: expected how many tokens to forget, .* got 3"):
        cache.crop(3)


def test_keys_that_leave_our_cache_come_to_attention():
    """A model that changes them on the way would attend to a step's own tokens alone."""
    layer = integration.new_cache(tiny(registered(FEW)), LENGTH).layers[0]
    k = torch.zeros(1, 2, 5, 16)
    layer.update(k, k)
    with pytest.raises(HsgenError, match="tokens of an earlier call never came to an attention"):
        layer.update(k, k)
    layer.reset()
    layer.update(k, k)
    layer.handed_on = False  # as attention leaves it
    with pytest.raises(HsgenError, match="expected each layer's own keys"):
        layer.attend(None, {"q": k, "k": k, "v": k}, {}, None)


def test_a_cache_that_a_model_does_not_know_is_refused():
    """Older models hand on an argument `cache` to attention, and every step would be a first one."""
    model = tiny(name := registered(FEW))
    assert set(integration.keeping(model, 1)) <= {"cache", "past_key_values"}
    attention = integration._registered[name]
    q = torch.zeros(1, 6, 1, 16)
    k = torch.zeros(1, 2, 1, 16)
    with pytest.raises(HsgenError, match="layer 0, LlamaAttention: .* knows no argument cache"):
        attention(model.model.layers[0].self_attn, q, k, k, None, cache=DynamicCache())


class Around(torch.nn.Module):
    """A model inside another, as parallel ones are."""

    def __init__(self, inner):
        super().__init__()
        self.module = inner

    def forward(self, *inputs, **others):
        return self.module(*inputs, **others)


class Cached(torch.nn.Module):
    """A model whose newer name of a cache every installed transformers can be asked for."""

    def forward(self, input_ids, cache=None, **others):
        return input_ids


def test_the_argument_for_a_cache_is_found_behind_what_wraps_a_model():
    """Compiled, parallel, decorated, or replaced on the model alone; of either name."""

    def wrapped(forward):
        @functools.wraps(forward)
        def around(*inputs, **others):
            return forward(*inputs, **others)

        return around

    class Decorated(Cached):
        forward = wrapped(Cached.forward)

    replaced = Cached()
    replaced.forward = lambda *inputs, **others: Cached.forward(replaced, *inputs, **others)
    made = (Decorated(), replaced, torch.compile(Cached()), Around(Cached()))
    for model in (*made, Around(torch.compile(Around(Cached())))):
        assert integration.keeping(model, 1) == {"cache": 1}
    model = tiny(registered(FEW))
    assert integration.keeping(Around(model), 1) == integration.keeping(model, 1)


def test_a_model_that_does_not_say_how_it_takes_a_cache_is_refused():
    class Opaque(torch.nn.Module):
        def forward(self, *inputs, **others):
            return inputs

    match = r"argument cache or past_key_values, got Opaque.forward\(\*inputs, \*\*others\)"
    with pytest.raises(ArgumentError, match=match):
        integration.keeping(Opaque(), 1)
    with pytest.raises(ArgumentError, match=r"got Around.forward\(\*inputs, \*\*others\)"):
        integration.keeping(Around(Opaque()), 1)


def test_documents_are_read_off_a_mask():
    """Those of packed positions; a window is no documents, and a mask that differs in one column is not."""
    begins = torch.tensor([[0, 0, 1, 0, 0, 1, 0]]).cumsum(1)

    def packed(b, h, q, k):
        return (k <= q) & (begins[b, q] == begins[b, k])

    asked = {"batch_size": 1, "q_length": 7, "kv_length": 7}
    found = segments.segments(**asked, mask_function=packed)
    assert found.tolist() == [[1, 1, 2, 2, 2, 3, 3]]
    for wrong in (
        lambda b, h, q, k: packed(b, h, q, k) & (q - k < 2),
        lambda b, h, q, k: packed(b, h, q, k) | ((k == 0) & (q == 4)),
    ):
        assert segments.segments(**asked, mask_function=wrong).shape == (1, 1, 7, 7)


@pytest.mark.gpu
@torch.no_grad()
def test_steps_in_a_cuda_graph_are_rows_of_the_whole():
    """On a card, where kernels attend; a captured step is replayed as lengths grow."""
    name = registered(FEW)
    tokens = ids(2, LENGTH).cuda()
    model = tiny(name).cuda()
    whole = logits(model, tokens, use_cache=False)
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(whole.cpu(), logits(tiny(name), tokens.cpu()), **close)
    cache = integration.new_cache(model, LENGTH)
    kept(model, tokens[:, :18], cache)
    token, position = tokens[:, 18:19].clone(), torch.full((2, 1), 18, device="cuda")
    step = kept(model, token, cache, position_ids=position)
    torch.testing.assert_close(step, whole[:, 18:19], **close)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = kept(model, token, cache, position_ids=position)
    for t in range(19, LENGTH):
        token.copy_(tokens[:, t : t + 1])
        position.fill_(t)
        graph.replay()
        torch.testing.assert_close(step, whole[:, t : t + 1], **close)
