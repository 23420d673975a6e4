"""What a caller reads when tensors are wrong: argument, expected, got, and where it comes from."""

import pytest
import torch
from reference_driver import compiler

from hsgen.errors import ArgumentError
from hsgen.execution import Options
from hsgen.reference import tensor_shapes
from hsgen.runtime import Kernel, load_kernel
from hsgen.selection import BitmapSelection, ListSelection, to_bitmap
from hsgen.spec import load, parse

TEXT = """\
hsgen: 1
name: tiny
heads: {query: 4, kv: 2}
head_dim: {qk: 8, v: 4}
index: {heads: 3, dim: 5, keys: shared}
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: relu_weighted, share: all}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
  - {name: window, window: 3, kv: window}
combine: {gates: input}
"""
SPEC = parse(TEXT, "tiny.yaml")
B, T, S = 2, 7, 9


@pytest.fixture
def kernel():
    return load_kernel(SPEC)


def tensors(*shape, dtype=torch.float32):
    return {
        n: torch.randn(s).to(dtype) for n, s in tensor_shapes(SPEC, *(shape or (B, T, S))).items()
    }


def packed(total_q=7, total_k=7):
    kinds = tensors(1, total_q, total_k)
    return {name: x[0] for name, x in kinds.items()}


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def says(kernel, x, **options):
    """The message that a call earns."""
    with pytest.raises(ArgumentError) as error:
        kernel(**x, **options)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def test_right_tensors_pass(kernel):
    assert kernel(**tensors()).shape == (B, T, 4, 4)


def test_missing_tensors_are_named_with_their_shapes(kernel):
    x = tensors()
    del x["gates"], x["k_window"]
    text = says(kernel, x)
    assert text.startswith("k_window, gates: expected a tensor, got nothing")
    assert "k_window [B, S, Hkv, Dqk]: keys of branch window" in text
    assert "gates [B, T, Hq, 2]" in text


def test_none_counts_as_missing(kernel):
    assert says(kernel, tensors() | {"gates": None}).startswith(
        "gates: expected a tensor, got noth"
    )


def test_unknown_names_get_the_nearest(kernel):
    text = says(kernel, tensors() | {"gate": torch.ones(1)})
    assert text.startswith("gate: spec 'tiny' has no such tensor")
    assert "did you mean 'gates'?" in text


def test_what_is_no_tensor_is_named(kernel):
    assert "k: expected a tensor, got list" in says(kernel, tensors() | {"k": [1.0]})


def test_head_counts_point_at_the_spec(kernel):
    x = tensors() | {"k": torch.randn(B, S, 4, 8)}
    assert says(kernel, x) == (
        "k: expected [B, S, Hkv, Dqk] = [2, 9, 2, 8] fp32 cpu, got [2, 9, 4, 8] fp32 cpu\n"
        "help: spec 'tiny' has Hkv = 2 (tiny.yaml:3:23)"
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected", "help"),
    [
        (
            "q",
            (B, T, 4, 9),
            "q: expected [B, T, Hq, Dqk] = [2, 7, 4, 8]",
            "Dqk = 8 (tiny.yaml:4:16)",
        ),
        (
            "q",
            (B, T, 6, 8),
            "q: expected [B, T, Hq, Dqk] = [2, 7, 4, 8]",
            "Hq = 4 (tiny.yaml:3:16)",
        ),
        (
            "v",
            (B, S, 2, 8),
            "v: expected [B, S, Hkv, Dv] = [2, 9, 2, 4]",
            "Dv = 4 (tiny.yaml:4:22)",
        ),
        ("v", (B, S - 1, 2, 4), "v: expected [B, S, Hkv, Dv] = [2, 9, 2, 4]", "S = 9, as in k"),
        ("k", (B + 1, S, 2, 8), "k: expected [B, S, Hkv, Dqk] = [2, 9, 2, 8]", "B = 2, as in q"),
        (
            "q_index",
            (B, T, 3, 4),
            "q_index: expected [B, T, Hi, Di] = [2, 7, 3, 5]",
            "Di = 5 (tiny.yaml:5:24)",
        ),
        ("k_index", (B, S, 1, 5), "k_index: expected [B, S, Di]", "expected 3 dimensions, got 4"),
        ("gates", (B, T, 4, 3), "gates: expected [B, T, Hq, 2] = [2, 7, 4, 2]", "spec 'tiny'"),
        ("q", (T, 4, 8), "q: expected [B, T, Hq, Dqk]", "packed sequences need cu_seqlens_q"),
    ],
)
def test_shapes_say_expected_and_got(kernel, name, shape, expected, help):
    text = says(kernel, tensors() | {name: torch.randn(shape)})
    assert expected in text
    assert f"got {list(shape)} fp32 cpu" in text
    assert help in text


def test_bhtd_is_spoken_in_its_own_order(kernel):
    x = {n: y.transpose(1, 2) if y.ndim == 4 else y for n, y in tensors().items()}
    assert kernel(**x, layout="bhtd").shape == (B, 4, T, 4)
    x["k"] = torch.randn(B, 4, S, 8)
    assert "k: expected [B, Hkv, S, Dqk] = [2, 2, 9, 8]" in says(kernel, x, layout="bhtd")


def test_packed_is_spoken_as_totals(kernel):
    x = packed()
    assert kernel(**x, cu_seqlens_q=i32(0, 7)).shape == (7, 4, 4)
    x["v"] = torch.randn(6, 2, 4)
    assert "v: expected [total_k, Hkv, Dv] = [7, 2, 4]" in says(kernel, x, cu_seqlens_q=i32(0, 7))


def test_packed_tensors_have_no_batch(kernel):
    text = says(kernel, tensors(), cu_seqlens_q=i32(0, 7))
    assert "with cu_seqlens_q tensors are packed and have no batch dimension" in text


@pytest.mark.parametrize("layout", ["BTHD", "thd", ""])
def test_unknown_layouts_are_refused(kernel, layout):
    assert f"expected 'bthd' or 'bhtd', got {layout!r}" in says(kernel, tensors(), layout=layout)


def test_packed_has_one_layout(kernel):
    text = says(kernel, packed(), cu_seqlens_q=i32(0, 7), layout="bhtd")
    assert "packed sequences are [total, H, D]" in text


def test_dtypes_do_not_mix(kernel):
    text = says(kernel, tensors() | {"k": torch.randn(B, S, 2, 8).half()})
    assert "fp32 cpu, got [2, 9, 2, 8] fp16 cpu" in text
    assert "every tensor has the dtype and the device of q" in text


def test_integers_are_no_dtype(kernel):
    x = {name: y.int() for name, y in tensors().items()}
    assert "dtypes here: fp16, bf16, fp32" in says(kernel, x)


def test_devices_do_not_mix(kernel):
    text = says(kernel, tensors() | {"v": torch.empty(B, S, 2, 4, device="meta")})
    assert "got [2, 9, 2, 4] fp32 meta" in text


def test_the_dtype_of_load_kernel_binds():
    kernel = load_kernel(SPEC, dtype=torch.float16)
    assert "q: expected fp16, as load_kernel was told, got fp32" in says(kernel, tensors())


def test_the_last_stride_must_be_1(kernel):
    k = torch.randn(B, S, 8, 2).transpose(2, 3)
    text = says(kernel, tensors() | {"k": k})
    assert "k: expected stride 1 in the last dimension, got strides (144, 16, 1, 2)" in text


def test_open_heads_must_divide():
    kernel = load_kernel(SPEC.model_copy(update={"heads": None}))
    x = tensors() | {"q": torch.randn(B, T, 3, 8), "gates": torch.randn(B, T, 3, 2)}
    assert "q has Hq = 3 heads; Hkv must divide that" in says(kernel, x)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"cu_seqlens_k": i32(0, 7)}, "cu_seqlens_k: expected cu_seqlens_q beside it"),
        ({"max_seqlen_k": 3}, "max_seqlen_k: expected cu_seqlens_q beside it"),
        ({"q_offset": i32(0)}, "q_offset: expected [2] int32 cpu, got [1] int32 cpu"),
        ({"q_offset": torch.tensor([0, 0])}, "q_offset: expected [2] int32 cpu, got [2] int64 cpu"),
        ({"kv_lens": i32(1, 2, 3)}, "kv_lens: expected [2] int32 cpu, got [3] int32 cpu"),
        ({"kv_lens": 10}, "kv_lens: expected 0 to S = 9, got 10"),
        ({"kv_lens": -1}, "kv_lens: expected 0 to S = 9, got -1"),
    ],
)
def test_lengths_say_expected_and_got(kernel, lengths, message):
    assert message in says(kernel, tensors(), **lengths)


@pytest.mark.parametrize("name", ["q_offset", "kv_lens"])
def test_lengths_are_whole_numbers(kernel, name):
    with pytest.raises(ArgumentError, match=f"{name}: expected an int or int32"):
        kernel(**tensors(), **{name: 1.5})


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (
            {"cu_seqlens_q": torch.tensor([0, 7])},
            "cu_seqlens_q: expected [2] int32 cpu, got [2] int64",
        ),
        ({"cu_seqlens_q": [0, 7]}, "cu_seqlens_q: expected int32 [Z + 1], got list"),
        ({"cu_seqlens_q": i32()}, "cu_seqlens_q: expected int32 [Z + 1], got [0]"),
        (
            {"cu_seqlens_q": i32(0, 7), "cu_seqlens_k": i32(0, 3, 7)},
            "cu_seqlens_k: expected [2] int32 cpu, got [3] int32 cpu",
        ),
        (
            {"cu_seqlens_q": i32(0, 7), "max_seqlen_k": -1},
            "max_seqlen_k: expected an int of at least 0, got -1",
        ),
    ],
)
def test_packed_lengths_say_expected_and_got(kernel, lengths, message):
    assert message in says(kernel, packed(), **lengths)


def test_keys_of_another_total_need_lengths_of_their_own(kernel):
    text = says(kernel, packed(7, 9), cu_seqlens_q=i32(0, 7))
    assert "cu_seqlens_k: expected it, as q and k have 7 and 9 rows" in text


# --- values, looked at on request only


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"cu_seqlens_q": i32(0, 5, 3, 7)}, "cu_seqlens_q[2]: expected at least 5, got 3"),
        ({"cu_seqlens_q": i32(1, 7)}, "expected 0 at the start and 7 at the end, got 1 and 7"),
        ({"cu_seqlens_q": i32(0, 6)}, "expected 0 at the start and 7 at the end, got 0 and 6"),
        (
            {"cu_seqlens_q": i32(0, 2, 7), "max_seqlen_k": 4},
            "max_seqlen_k: expected at least 5, got 4",
        ),
        (
            {"cu_seqlens_q": i32(0, 2, 7), "kv_lens": i32(3, 5)},
            "kv_lens[0]: expected 0 to 2, got 3",
        ),
    ],
)
def test_values_are_checked_on_request(lengths, message):
    assert message in says(load_kernel(SPEC, check=True), packed(), **lengths)


def test_dense_lengths_are_checked_on_request():
    kernel = load_kernel(SPEC, check=True)
    assert "kv_lens[1]: expected 0 to 9, got 12" in says(kernel, tensors(), kv_lens=i32(9, 12))
    assert kernel(**tensors(), kv_lens=i32(9, 0)).shape == (B, T, 4, 4)


def test_the_environment_asks_for_checks(monkeypatch):
    monkeypatch.setenv("HSGEN_CHECK", "1")
    assert "kv_lens[1]" in says(load_kernel(SPEC), tensors(), kv_lens=i32(9, 12))


# --- selections


def chosen(kernel, x):
    return kernel.select(**x)


def test_a_selection_comes_back(kernel):
    x = tensors()
    torch.testing.assert_close(kernel(**x, selection=chosen(kernel, x)), kernel(**x))


@pytest.mark.parametrize("form", ["indices", "bitmap", "narrow"])
def test_selections_come_in_any_form(kernel, form):
    x = tensors()
    given = chosen(kernel, x)["block"]
    forms = {
        "indices": given.indices,
        "bitmap": to_bitmap(given, 3),
        "narrow": given.indices[..., :1],
    }
    o = kernel(**x, selection={"block": forms[form]})
    if form != "narrow":
        torch.testing.assert_close(o, kernel(**x))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"blok": i32(0)}, "no selecting level 'blok'\nhelp: did you mean 'block'?"),
        ({"block": [0]}, "expected a ListSelection, a BitmapSelection or int32 indices, got list"),
        ({"block": ListSelection(level="other", indices=i32(0))}, "got one of 'other'"),
        ({"block": i32(0)}, "= [2, 7, 1, 1 to 2] int32 cpu, got [1] int32 cpu"),
        ({"block": torch.zeros(B, T, 2, 2, dtype=torch.int32)}, "got [2, 7, 2, 2] int32 cpu"),
        ({"block": torch.zeros(B, T, 1, 3, dtype=torch.int32)}, "got [2, 7, 1, 3] int32 cpu"),
        ({"block": torch.zeros(B, T, 1, 2)}, "got [2, 7, 1, 2] fp32 cpu"),
        (i32(0), "expected {level: selection}, got Tensor"),
    ],
)
def test_selections_say_expected_and_got(kernel, selection, message):
    assert message in says(kernel, tensors(), selection=selection)


def test_attended_levels_must_be_there():
    kernel = load_kernel("hisa", heads=(32, 8))
    with pytest.raises(ArgumentError, match="expected level 'token', which is attended, got block"):
        kernel._call(
            dict.fromkeys(kernel._attending.names, torch.ones(1)),
            kernel._attending,
            "bthd",
            (None,) * 5,
            {"block": torch.zeros(1)},
        )


@pytest.mark.parametrize("index", [3, -2])
def test_indices_are_checked_on_request(index):
    x = tensors()
    given = torch.full((B, T, 1, 2), 0, dtype=torch.int32)
    given[1, 3, 0, 1] = index
    text = says(load_kernel(SPEC, check=True), x, selection={"block": given})
    assert f"selection['block']: expected -1 to 2 in sequence 1, got {index}" in text
    assert load_kernel(SPEC)(**x, selection={"block": given}).shape == (B, T, 4, 4)


def test_select_needs_only_what_choosing_needs(kernel):
    x = tensors()
    only = {name: x[name] for name in ("q", "k", "q_index", "k_index", "w_index")}
    expected = kernel.select(**x)["block"].indices
    assert torch.equal(kernel.select(**only)["block"].indices, expected)
    with pytest.raises(ArgumentError, match="w_index: expected a tensor, got nothing"):
        kernel.select(**{name: only[name] for name in only if name != "w_index"})
    with pytest.raises(ArgumentError, match="gate: spec 'tiny' has no such tensor"):
        kernel.select(**x, gate=x["gates"])


@pytest.mark.parametrize("shape", [(0, T, S), (B, 0, S), (B, T, 0), (B, 0, 0)])
@pytest.mark.parametrize("interpret", [False, True])
def test_nothing_to_attend_to_gives_empty_rows(shape, interpret):
    made = []
    kernel = Kernel(
        SPEC,
        Options(interpret=interpret),
        key=f"empty-{shape}-{interpret}",
        compiler=compiler(made),
    )
    o, lse = kernel(**tensors(*shape), return_lse=True)
    assert o.shape == (*shape[:2], 4, 4)
    assert not o.any()
    assert all(
        (each == -torch.inf).all() and each.shape == (shape[0], 4, shape[1])
        for each in lse.values()
    )
    assert (kernel.select(**tensors(*shape))["block"].indices == -1).all()
    assert not any(driver.calls for *_, driver in made)


def test_bitmaps_of_another_level_are_refused(kernel):
    given = BitmapSelection(level="other", words=i32(1), entries=1)
    assert "got one of 'other'" in says(kernel, tensors(), selection={"block": given})


def test_more_keys_than_axes_have_places():
    nothing = torch.zeros(128)
    q, gates = nothing.expand(1, 32761, 12, 128), nothing.expand(1, 32761, 12, 2, 128)
    text = says(load_kernel("vsa"), {"q": q, "k": q, "v": q, "gates": gates})
    assert "k: expected at most 32760 tokens, as many as `axes` have places, got 32761" in text


def test_more_keys_of_a_document_than_axes_have_places():
    small = load("vsa").model_copy(update={"axes": (1, 2, 3)})
    nothing = torch.zeros(128)
    q, gates = nothing.expand(9, 12, 128), nothing.expand(9, 12, 2, 128)
    given = {"q": q, "k": q, "v": q, "gates": gates, "cu_seqlens_q": i32(0, 2, 9)}
    text = says(load_kernel(small, interpret=True, check=True), given)
    assert "k: expected at most 6 tokens a sequence, as many as `axes` have places" in text
    assert "got 7 of sequence 1" in text
