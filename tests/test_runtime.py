"""load_kernel and Kernel, on the reference, on a driver in place of emitted ones, and on a GPU."""

import copy
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.utils.flop_counter
from reference_driver import compiler

from hsgen import execution, operators, runtime, standins
from hsgen.errors import ArgumentError, HsgenError, PlanError, SpecError
from hsgen.execution import Options, Stats
from hsgen.reference import tensor_kinds, tensor_shapes
from hsgen.runtime import Kernel, load_kernel
from hsgen.selection import ListSelection
from hsgen.spec import Blocks, HeadDim, Heads, load, parse
from hsgen.target import Target

GATED = parse("""
hsgen: 1
name: gated
heads: {query: 4, kv: 2}
head_dim: {qk: 8, v: 4}
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
  - {name: near, window: 3}
combine: {gates: input}
""")
LEARNED = parse("""
hsgen: 1
name: learned
heads: {query: 2, kv: 2}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: linear, position: learned}
    score: {form: dot}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
""")
OPEN = parse("""
hsgen: 1
name: open
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
""")
counter = iter(range(10**6))


def tensors(spec=GATED, B=2, T=13, S=None, *, dtype=torch.float32, device="cpu", grad=False):
    shapes = tensor_shapes(spec, B, T, S or T)
    return {
        n: torch.randn(s, dtype=dtype, device=device, requires_grad=grad) for n, s in shapes.items()
    }


def packed(spec, total):
    kinds = tensor_kinds(spec)
    return {n: x if kinds[n] == "parameter" else x[0] for n, x in tensors(spec, 1, total).items()}


def swapped(spec, x):
    kinds = tensor_kinds(spec)
    return {
        n: y.transpose(1, 2) if y.ndim == 4 and kinds[n] != "parameter" else y for n, y in x.items()
    }


def driven(spec=GATED, made=None, **options):
    """A Kernel whose emitted kernels are the reference."""
    return Kernel(
        spec,
        Options(interpret=True, **options),
        key=f"{spec.name}-{next(counter)}",
        compiler=compiler(made),
    )


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# --- loading


def test_specs_load_by_name_path_and_value(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("hsgen: 1\nname: mine\nattend:\n  - {name: near, window: 3}\n")
    assert load_kernel("nsa").spec.name == "nsa"
    assert load_kernel(path).spec.name == load_kernel(str(path)).spec.name == "mine"
    assert load_kernel(GATED).spec == GATED


def test_equal_requests_share_one_kernel():
    assert load_kernel("nsa") is load_kernel("nsa")
    assert load_kernel("nsa") is not load_kernel("nsa", dtype=torch.float16)
    assert load_kernel("nsa") is not load_kernel("nsa", config={"attend_window": {"num_warps": 4}})


def test_kernels_survive_copies_and_pickles():
    kernel = load_kernel(GATED)
    assert copy.copy(kernel) is copy.deepcopy(kernel) is kernel
    assert pickle.loads(pickle.dumps(kernel)) is kernel
    assert repr(kernel).startswith("Kernel(gated-")


def test_wrong_specs_say_so(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("hsgen: 1\nname: wrong\natend: []\n")
    with pytest.raises(SpecError, match="atend"):
        load_kernel(path)
    with pytest.raises(HsgenError, match="did you mean 'nsa'"):
        load_kernel("nsaa")


def test_heads_and_head_dim_bind():
    for heads, head_dim in (
        ((4, 2), 8),
        (Heads(query=4, kv=2), HeadDim(qk=8, v=8)),
        ((4, 2), (8, 8)),
    ):
        spec = load_kernel(OPEN, heads=heads, head_dim=head_dim).spec
        assert (spec.heads.query, spec.heads.kv, spec.head_dim.qk, spec.head_dim.v) == (4, 2, 8, 8)
    with pytest.raises(ArgumentError, match="heads: expected"):
        load_kernel(GATED, heads=(8, 2))


def test_targets_are_names_or_values():
    assert load_kernel(GATED, target="h100") is load_kernel(GATED, target=Target.named("h100"))
    with pytest.raises(ArgumentError, match="unknown target"):
        load_kernel(GATED, target="h1000")


def test_the_interpreter_must_be_switched_on():
    code = (
        "from hsgen import load_kernel\n"
        "try: load_kernel('moba', interpret=True)\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "expected TRITON_INTERPRET=1 in the environment" in run.stdout, run.stderr
    assert execution.interpreting()


# --- calls


@pytest.fixture(params=["reference", "driver"])
def kernel_of(request):
    """spec -> a Kernel on CPU, by either way."""
    return load_kernel if request.param == "reference" else driven


@pytest.mark.parametrize("spec", [GATED, LEARNED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_have_the_stated_shapes_and_dtypes(kernel_of, spec, dtype):
    kernel, x = kernel_of(spec), tensors(spec, dtype=dtype)
    o, lse = kernel(**x, return_lse=True)
    heads = spec.heads.query
    assert (o.shape, o.dtype) == ((2, 13, heads, spec.head_dim.v), dtype)
    by_branch = lse if isinstance(lse, dict) else {"selected": lse}
    assert list(by_branch) == [branch.name for branch in spec.attend]
    for each in by_branch.values():
        assert (each.shape, each.dtype) == ((2, heads, 13), torch.float32)
        assert each.is_contiguous()
    assert torch.equal(kernel(**x), o)


def test_the_reference_is_the_meaning(kernel_of):
    x = tensors()
    o, lse = kernel_of(GATED)(**x, return_lse=True)
    expected, expected_lse = load_kernel(GATED).reference(**x, return_lse=True)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(o, expected.float())
    assert list(lse) == list(expected_lse) == ["selected", "near"]
    torch.testing.assert_close(lse["near"], expected_lse["near"].float())


@pytest.mark.parametrize("spec", [GATED, LEARNED])
def test_bhtd_is_the_same_call(kernel_of, spec):
    kernel, x = kernel_of(spec), tensors(spec)
    o, lse = kernel(**x, return_lse=True)
    other, other_lse = kernel(**swapped(spec, x), layout="bhtd", return_lse=True)
    assert torch.equal(other.transpose(1, 2), o)
    torch.testing.assert_close(other_lse, lse)
    assert torch.equal(
        kernel.reference(**swapped(spec, x), layout="bhtd").transpose(1, 2).float(), o
    )
    chosen = kernel.select(**swapped(spec, x), layout="bhtd")["block"].indices
    assert torch.equal(chosen, kernel.select(**x)["block"].indices)


def test_packed_documents_equal_separate_ones(kernel_of):
    kernel, x = kernel_of(LEARNED), packed(LEARNED, 20)
    kinds = tensor_kinds(LEARNED)
    o, lse = kernel(**x, cu_seqlens_q=i32(0, 6, 6, 20), return_lse=True)
    chosen = kernel.select(**x, cu_seqlens_q=i32(0, 6, 6, 20))["block"]
    assert (o.shape, lse.shape) == ((20, 2, 16), (2, 20))
    for start, end in ((0, 6), (6, 20)):
        one = {n: y if kinds[n] == "parameter" else y[None, start:end] for n, y in x.items()}
        o_one, lse_one = kernel(**one, return_lse=True)
        torch.testing.assert_close(o[start:end], o_one[0])
        torch.testing.assert_close(lse[:, start:end], lse_one[0])
        assert torch.equal(chosen.indices[start:end], kernel.select(**one)["block"].indices[0])


def test_packed_keys_may_have_lengths_of_their_own(kernel_of):
    kernel, x = kernel_of(GATED), packed(GATED, 20)
    query = {name: x[name][:5] for name in ("q", "gates")}
    lengths = {"cu_seqlens_q": i32(0, 2, 5), "cu_seqlens_k": i32(0, 9, 20), "max_seqlen_k": 11}
    o = kernel(**{**x, **query}, **lengths)
    whole = kernel(**x, cu_seqlens_q=i32(0, 9, 20))
    assert not torch.equal(o[:2], whole[7:9])  # other queries
    again = {name: torch.cat([x[name][7:9], x[name][17:20]]) for name in ("q", "gates")}
    torch.testing.assert_close(
        kernel(**{**x, **again}, **lengths), torch.cat([whole[7:9], whole[17:]])
    )


@pytest.mark.parametrize("form", ["number", "tensor", "scalar"])
def test_chunked_prefill_equals_the_whole(kernel_of, form):
    kernel, x = kernel_of(GATED), tensors(B=2, T=13)
    whole = kernel(**x)
    offset = {"number": 5, "tensor": i32(5, 5), "scalar": torch.tensor(5, dtype=torch.int32)}[form]
    chunk = {**x, "q": x["q"][:, 5:9], "gates": x["gates"][:, 5:9]}
    torch.testing.assert_close(kernel(**chunk, q_offset=offset), whole[:, 5:9])


@pytest.mark.parametrize("form", ["number", "tensor", "scalar"])
def test_padded_keys_do_not_exist(kernel_of, form):
    kernel, x = kernel_of(GATED), tensors(B=2, T=13)
    lens = {"number": 9, "tensor": i32(9, 9), "scalar": torch.tensor(9, dtype=torch.int32)}[form]
    padded = {**x, "q": x["q"][:, :9], "gates": x["gates"][:, :9]}
    short = {name: y[:, :9] for name, y in x.items()}
    torch.testing.assert_close(kernel(**padded, kv_lens=lens), kernel(**short))


def test_any_strides_will_do(kernel_of):
    kernel, x = kernel_of(GATED), tensors()
    fused = torch.randn(2, 13, 8, 8)
    fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:, :4] = x["q"], x["k"], x["v"]
    views = {"q": fused[:, :, :4], "k": fused[:, :, 4:6], "v": fused[:, :, 6:, :4]}
    assert torch.equal(kernel(**{**x, **views}), kernel(**x))


def test_a_selection_replaces_choosing(kernel_of):
    kernel, x = kernel_of(GATED), tensors()
    chosen = kernel.select(**x)
    assert isinstance(chosen["block"], ListSelection)
    assert torch.equal(kernel(**x, selection=chosen), kernel(**x))
    first = torch.zeros(2, 13, 2, 1, dtype=torch.int32)  # fewer slots than the spec has
    o = kernel(**x, selection={"block": first})
    torch.testing.assert_close(o, kernel.reference(**x, selection={"block": first}).float())
    assert not torch.equal(o, kernel(**x))


NESTED = parse("""
hsgen: 1
name: nested
heads: {query: 4, kv: 2}
head_dim: 8
index: {heads: 2, dim: 8, keys: shared}
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: relu_weighted, share: all}
    select: {beam: 3}
  - name: token
    within: block
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 5}
attend:
  - {name: selected, over: token}
""")


def test_a_selection_may_be_of_the_attended_level_alone(kernel_of):
    kernel, x = kernel_of(NESTED), tensors(NESTED)
    token = kernel.select(**x)["token"]
    expected, selection = kernel(**x), {"token": token}
    assert torch.equal(kernel(**x, selection=selection), expected)
    if kernel_of is load_kernel:
        x["q"].requires_grad_()
        kernel(**x, selection=selection).sum().backward()
        assert x["q"].grad is not None


def test_tensors_that_a_spec_does_not_need_may_still_be_q_k_v():
    spec = parse("""
hsgen: 1
name: own
heads: {query: 2, kv: 1}
head_dim: 8
attend:
  - {name: near, window: 3, kv: near}
""")
    x = tensors(spec)
    assert set(x) == {"q", "k_near", "v_near"}
    assert load_kernel(spec)(x.pop("q"), x["k_near"], x["v_near"], **x).shape == (2, 13, 2, 8)


# --- gradients


@pytest.mark.parametrize("spec", [GATED, LEARNED])
def test_the_reference_is_differentiable(spec):
    x, y = tensors(spec, grad=True), None
    y = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    o, lse = load_kernel(spec)(**x, return_lse=True)
    r, rlse = load_kernel(spec).reference(**y, return_lse=True)
    first, rfirst = (a if isinstance(a, torch.Tensor) else a["near"] for a in (lse, rlse))
    (o.square().sum() + first.sum()).backward()
    (r.square().sum() + rfirst.sum()).backward()
    for name in x:
        none = torch.zeros_like(y[name])  # what only chooses has no gradient
        expected = none if y[name].grad is None else y[name].grad
        torch.testing.assert_close(x[name].grad, expected, msg=name)


def test_gradients_pass_gradcheck():
    x = tensors(GATED, 1, 6, dtype=torch.float64, grad=True)
    names = list(x)
    call = lambda *values: load_kernel(GATED)(**dict(zip(names, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(x.values()), fast_mode=True)


def test_kernels_refuse_a_gradient_that_they_do_not_make():
    level = GATED.levels[0].model_copy(update={"partition": Blocks(size=4, stride=2)})
    kernel, x = driven(GATED.model_copy(update={"levels": (level,)})), tensors()
    x["k"].requires_grad_()
    words = r"branch selected: no kernel has the gradient of overlapping blocks yet(.*\n)*.*torch\.no_grad"
    with pytest.raises(PlanError, match=words):
        kernel(**x)
    with torch.no_grad():
        assert not kernel(**x).requires_grad
    assert not kernel(**{name: t.detach() for name, t in x.items()}).requires_grad
    assert kernel.select(**x)["block"].indices.dtype == torch.int32


def test_without_grad_nothing_is_recorded():
    with torch.inference_mode():
        assert load_kernel(GATED)(**tensors()).is_inference()


# --- torch.compile and the operators


@pytest.fixture
def compiled():
    """f -> f under torch.compile(fullgraph=True)."""
    torch._dynamo.reset()
    return lambda f, **options: torch.compile(f, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_gives_the_same(kernel_of, compiled, dynamic):
    kernel = kernel_of(GATED)
    call = compiled(lambda **x: kernel(**x, return_lse=True), dynamic=dynamic)
    for T in (13, 14, 17):
        x = tensors(T=T)
        torch.testing.assert_close(call(**x), kernel(**x, return_lse=True), rtol=0, atol=0)


def test_torch_compile_takes_every_option(kernel_of, compiled):
    kernel, x = kernel_of(GATED), swapped(GATED, tensors())
    options = {"layout": "bhtd", "q_offset": 1, "kv_lens": i32(12, 13)}
    call = compiled(lambda **y: kernel(**y, **options))
    assert torch.equal(call(**x), kernel(**x, **options))
    y = packed(GATED, 13)
    call = compiled(lambda cu, **y: kernel(**y, cu_seqlens_q=cu, max_seqlen_k=13))
    assert torch.equal(call(i32(0, 5, 13), **y), kernel(**y, cu_seqlens_q=i32(0, 5, 13)))


def test_torch_compile_takes_select_and_its_selection(kernel_of, compiled):
    kernel, x = kernel_of(GATED), tensors()
    call = compiled(lambda **x: kernel(**x, selection=kernel.select(x["q"], x["k"])))
    assert torch.equal(call(**x), kernel(**x))


load_kernel_of_test = load_kernel(GATED)


def test_torch_compile_names_the_wrong_argument(compiled):
    kernel, x = load_kernel(GATED), tensors()
    x["v"] = x["v"][:, :7]
    with pytest.raises(Exception, match=r"v: expected \[B, S, Hkv, Dv\] = \[2, 13, 2, 4\]"):
        compiled(lambda **x: kernel(**x))(**x)


def test_export_keeps_tokens_dynamic():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, gates):
            return load_kernel_of_test(q, k, v, gates=gates)

    T = torch.export.Dim("T", min=2, max=64)
    program = torch.export.export(Model(), tuple(tensors().values()), dynamic_shapes=({1: T},) * 4)
    x = tensors(T=9)
    assert torch.equal(program.module()(*x.values()), load_kernel_of_test(**x))


@pytest.mark.parametrize("name", ["seer_attention", "hirouter", "ssa"])
def test_export_keeps_tokens_of_losses_dynamic(name):
    spec = standins.bind(load(name), query=4, kv=2, dim=32)
    kernel = load_kernel(spec)

    def drawn(T):
        return {n: torch.randn(s) for n, s in tensor_shapes(spec, 1, T, T).items()}

    first, other, names = drawn(64), drawn(100), list(tensor_shapes(spec, 1, 1, 1))

    class Model(torch.nn.Module):
        def forward(self, *x):
            return kernel.losses(**dict(zip(names, x, strict=True)))

    T = torch.export.Dim("T", min=2, max=4096)
    follows = tuple({1: T} if first[n].shape != other[n].shape else {} for n in names)
    program = torch.export.export(Model(), tuple(first.values()), dynamic_shapes=(follows,))
    found, expected = program.module()(*other.values()), kernel.losses(**other)
    assert list(found) == list(expected)
    assert all(torch.equal(found[loss], expected[loss]) for loss in expected)
    assert all(x.isfinite() and x != 0 for x in expected.values())


@pytest.mark.parametrize(
    ("layout", "lengths", "grad"),
    [
        ("bthd", (None, None, None, None, None), False),
        ("bhtd", (None, None, None, None, None), True),
        ("bthd", (None, None, None, i32(0, 1), 4), True),
        ("packed", (i32(0, 3, 5), None, 3, None, None), False),
    ],
)
def test_operators_pass_opcheck(layout, lengths, grad):
    kernel = load_kernel(GATED)
    x = packed(GATED, 5) if layout == "packed" else tensors(T=5)
    x = {name: t.detach().requires_grad_(grad) for name, t in x.items()}
    x = swapped(GATED, x) if layout == "bhtd" else x
    order = "bthd" if layout == "packed" else layout
    call = kernel._call(x, kernel._attending, order, lengths, None)
    torch.library.opcheck(operators.forward, (kernel._key, *call))
    choosing = kernel._call(x, kernel._choosing, order, lengths, None)
    torch.library.opcheck(operators.select, (kernel._key, *choosing))


def test_fake_outputs_are_exact():
    kernel = driven(LEARNED)
    for layout, x in (("bthd", tensors(LEARNED)), ("bhtd", swapped(LEARNED, tensors(LEARNED)))):
        call = kernel._call(x, kernel._attending, layout, (None,) * 5, None)
        for real, fake in zip(
            kernel._execution.forward(call), kernel._execution.forward_fake(call), strict=True
        ):
            assert (real.shape, real.stride(), real.dtype) == (
                fake.shape,
                fake.stride(),
                fake.dtype,
            )


def test_meta_tensors_have_shapes_only():
    x = {name: t.to("meta") for name, t in tensors().items()}
    assert load_kernel(GATED)(**x).shape == (2, 13, 4, 4)


def test_plain_calls_skip_the_operator(monkeypatch):
    kernel, x = load_kernel(GATED), tensors()
    expected = kernel(**x)
    monkeypatch.setattr(operators, "forward", None)
    assert torch.equal(kernel(**x), expected)


class Subclass(torch.Tensor):
    pass


def test_calls_that_are_not_plain_use_the_operator():
    x = tensors()
    kernel = load_kernel(GATED)
    call = lambda x: kernel._call(x, kernel._attending, "bthd", (None,) * 5, None)  # noqa: E731
    assert not operators.is_watched(call(x))
    assert not operators.is_recorded(call(x))
    assert operators.is_watched(call(x | {"q": x["q"].as_subclass(Subclass)}))
    assert operators.is_recorded(call(tensors(grad=True)))
    with torch.profiler.profile(), torch.utils.flop_counter.FlopCounterMode(display=False):
        assert operators.is_watched(call(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert operators.is_watched(call(x))


def test_a_profile_shows_the_operator():
    kernel, x = load_kernel(GATED), tensors()
    with torch.profiler.profile() as profile:
        kernel(**x)
    assert any(event.key == "hsgen::forward" for event in profile.key_averages())


def test_outputs_may_be_written_in_place():
    weight = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        outputs = [
            driven(GATED)(**swapped(GATED, tensors()), layout="bhtd"),
            driven(GATED)(**packed(GATED, 9), cu_seqlens_q=i32(0, 4, 9)),
        ]
    for o in outputs:
        o.mul_(weight).sum().backward()


def test_unknown_keys_are_explained():
    x = list(tensors().values())
    with pytest.raises(HsgenError, match="no kernel 'nobody' in this process"):
        operators.forward("nobody", "bthd", x, [], "", *(None,) * 7)


# --- programs


def test_a_program_is_compiled_once_for_all_lengths():
    made = []
    kernel = driven(made=made)
    for T in (1, 13, 16, 40):
        kernel(**tensors(T=T))
    assert len(made) == 1
    kernel(**tensors(dtype=torch.float16))
    assert [element for *_, element, _ in made] == [torch.float32, torch.float16]


def test_open_heads_are_bound_by_tensors():
    made = []
    kernel = driven(OPEN, made)
    for heads, dim in ((2, 8), (3, 16), (2, 8)):
        q, k = torch.randn(1, 5, heads * 2, dim), torch.randn(1, 5, heads, dim)
        assert kernel(q, k, k[..., :4]).shape == (1, 5, heads * 2, 4)
    bound = [spec for spec, *_ in made]
    assert [(s.heads.query, s.heads.kv, s.head_dim.qk, s.head_dim.v) for s in bound] == [
        (4, 2, 8, 4),
        (6, 3, 16, 4),
    ]


def test_open_specs_run_on_the_reference_too():
    q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
    bound = load_kernel(OPEN, heads=(4, 2), head_dim=8)
    assert torch.equal(load_kernel(OPEN)(q, k, k), bound(q, k, k))
    assert torch.equal(
        load_kernel(OPEN).select(q, k)["block"].indices, bound.select(q, k)["block"].indices
    )


def test_threads_compile_once_and_wait():
    made, outputs = [], []
    kernel, x = driven(made=made), tensors()
    start = threading.Barrier(16)

    def run():
        start.wait()
        outputs.append(kernel(**x))

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(torch.equal(o, outputs[0]) for o in outputs)
    assert len(outputs) == 16


def test_many_threads_load_one_kernel():
    spec = GATED.model_copy(update={"name": "gated_by_threads"})
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_kernel(spec))) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    assert len(set(map(id, found))) == 1


def test_configurations_are_merged_and_explained():
    kernel = driven(config={"attend": {"num_warps": 8}})
    kernel(**tensors())
    text = kernel.explain()
    assert "attend: BLOCK_T=16 num_warps=8  (caller)" in text
    assert "heads 4/2, head dim 8/4, fp32, cpu" in text
    assert "%block.selection" in text
    assert kernel.plan == "a plan"


def test_unknown_kernels_in_a_configuration_are_refused():
    """Those of gradients are known too."""
    match = "config: expected one of attend, .*dq_selected, .*, got 'atend'"
    with pytest.raises(ArgumentError, match=match):
        driven(LEARNED, config={"atend": {"num_warps": 8}})(**tensors(LEARNED))


def test_nothing_is_compiled_before_a_call():
    kernel = driven()
    assert "nothing is compiled yet" in kernel.explain()
    with pytest.raises(HsgenError, match="nothing is compiled yet"):
        kernel.plan  # noqa: B018


def test_stats_count():
    kernel, x = driven(), tensors()
    o, lse = kernel(**x, return_lse=True)
    chosen = kernel.select(**x)["block"].indices
    kernel(**x)
    outputs = o.nbytes + chosen.nbytes + sum(each.nbytes for each in lse.values())
    bytes = 2 * outputs + chosen.nbytes
    assert kernel.stats() == Stats(calls=3, compiles=1, launches=9, bytes=bytes)


def test_known_calls_are_forgotten_in_time(monkeypatch):
    monkeypatch.setattr(execution, "KNOWN_CALLS", 3)
    made = []
    kernel = driven(made=made)
    for T in range(1, 9):
        kernel(**tensors(T=T))
    assert len(kernel._execution._known) <= 3
    assert len(made) == 1


def test_capture_before_warmup_is_refused(monkeypatch):
    """A mocked capture; the GPU lane has a real one."""
    kernel, x = driven(), tensors()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(type="cuda")
    with pytest.raises(HsgenError, match=r"being captured.*\n.*call warmup\(\.\.\.\)"):
        kernel._execution._refuse_capture(on_gpu)
    kernel.warmup(**x)
    kernel._execution._refuse_capture(torch.device("cpu"))
    assert all(known.ran for known in kernel._execution._known.values())


def test_plans_that_do_not_exist_are_refused_by_the_first_call():
    union = GATED.model_copy(
        update={"combine": GATED.combine.model_copy(update={"gates": None, "softmax": "union"})}
    )
    x = tensors(union)
    o, lse = load_kernel(union)(**x, return_lse=True)
    assert o.shape[:2] == lse.shape[:1] + lse.shape[2:]
    with pytest.raises(PlanError):
        load_kernel(union, interpret=True)(**x)


# --- emitted kernels


EMITTED = parse("""
hsgen: 1
name: emitted
heads: {query: 2, kv: 1}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
""")


@pytest.mark.usefixtures("sanitized")
def test_emitted_kernels_run_in_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path))
    kernel = load_kernel(EMITTED, interpret=True)
    x = tensors(EMITTED, B=1, T=11)
    o, lse = kernel(**x, return_lse=True)
    expected, expected_lse = kernel.reference(**x, return_lse=True)
    torch.testing.assert_close(o, expected.float())
    torch.testing.assert_close(lse, expected_lse.float())
    assert torch.equal(kernel(**x, selection=kernel.select(**x)), o)
    assert "(for the interpreter)" in kernel.explain()
    assert kernel.stats().compiles == 1


# --- on a GPU


@pytest.fixture
def on_gpu():
    kernel = load_kernel(EMITTED)
    return kernel, tensors(EMITTED, T=100, dtype=torch.bfloat16, device="cuda")


@pytest.mark.gpu
def test_cuda_tensors_run_kernels(on_gpu):
    kernel, x = on_gpu
    o, lse = kernel(**x, return_lse=True)
    expected, expected_lse = kernel.reference(**x, return_lse=True, selection=kernel.select(**x))
    torch.testing.assert_close(o.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    assert kernel.stats().launches > 0


@pytest.mark.gpu
def test_cuda_calls_never_wait(on_gpu):
    kernel, x = on_gpu
    kernel.warmup(**x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(**x)
        kernel.select(**x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graphs_replay_with_new_values(on_gpu):
    kernel, x = on_gpu
    lens = torch.tensor([100, 60], dtype=torch.int32, device="cuda")
    kernel.warmup(**x, kv_lens=lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = kernel(**x, kv_lens=lens)
    x["q"].normal_()
    lens.copy_(torch.tensor([77, 100], device="cuda"))
    graph.replay()
    assert torch.equal(o, kernel(**x, kv_lens=lens))


@pytest.mark.gpu
def test_cuda_capture_before_warmup_is_refused(on_gpu):
    kernel, x = on_gpu
    x = {name: t[:, :51] for name, t in x.items()}
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(HsgenError, match="call warmup"), torch.cuda.graph(graph):
        kernel(**x)
    torch.cuda.synchronize()
    assert kernel(**x).isfinite().all()


@pytest.mark.gpu
def test_cuda_streams_give_the_same(on_gpu):
    kernel, x = on_gpu
    expected = kernel(**x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        o = kernel(**x)
    stream.synchronize()
    assert torch.equal(o, expected)


@pytest.mark.gpu
def test_cuda_compiles_under_torch_compile(on_gpu):
    kernel, x = on_gpu
    torch._dynamo.reset()
    assert torch.equal(torch.compile(lambda **x: kernel(**x), fullgraph=True)(**x), kernel(**x))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_needs_no_current_device(on_gpu):
    kernel, x = on_gpu
    other = {name: t.to("cuda:1") for name, t in x.items()}
    assert torch.equal(kernel(**other).to("cuda:0"), kernel(**x))
    assert torch.cuda.current_device() == 0


def test_runtime_exports_what_the_package_promises():
    assert runtime.load_kernel is load_kernel
