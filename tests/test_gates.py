"""Gates: which form a call takes, what that form means, and where crossovers come from."""

import logging
import pickle
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from reference_driver import compiler
from tuned_records import RECORD

import hsgen
from hsgen import dense, gates, paths, tuned
from hsgen.errors import ArgumentError, HsgenError
from hsgen.execution import Options
from hsgen.gates import Gate, GateError
from hsgen.reference import reference, tensor_kinds, tensor_shapes
from hsgen.runtime import Kernel, load_kernel
from hsgen.spec import dump, load, parse
from hsgen.spec.files import shipped
from hsgen.tuned import files
from hsgen.tuned import gates as records

FLAT = parse("""
hsgen: 1
name: one_level
heads: {query: 4, kv: 2}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 2}
    pool: {keys: mean}
    score: {form: dot, share: group, reduce: sum}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: block}
""")
NESTED = parse("""
hsgen: 1
name: nested
heads: {query: 4, kv: 2}
head_dim: 16
index: {heads: 2, dim: 16, keys: shared}
levels:
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: relu_weighted, share: all}
    select: {beam: 1, force: {last: 1}}
  - name: token
    within: block
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 3}
attend:
  - {name: selected, over: token}
""")
GATE = Gate(dense_below=10, flat_below=14)
counter = iter(range(10**6))


def driven(spec, gate=None, made=None):
    """A Kernel whose emitted kernels are the reference."""
    options = Options(interpret=True, gate=gate)
    return Kernel(spec, options, key=f"{spec.name}-gated-{next(counter)}", compiler=compiler(made))


@pytest.fixture(params=["reference", "driver"])
def kernel_of(request):
    """(spec, gate) -> a Kernel on CPU, by either way."""
    if request.param == "reference":
        return lambda spec, gate: load_kernel(spec, gate=gate)
    return driven


def tensors(spec, T, S=None, B=2, dtype=torch.float32):
    shapes = tensor_shapes(spec, B, T, S or T)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def meaning(spec, form, x, **lengths):
    """The reference of a form."""
    made = {"own": lambda: spec, "dense": lambda: gates.dense_form(spec)}
    made["flat"] = lambda: gates.flat_form(spec)
    of = made[form]()
    read = {name: x[name] for name in tensor_shapes(of, 1, 1, 1)}
    return reference(of, read, dtype=torch.float64, **lengths)


def assert_form(spec, form, o, x, **lengths):
    """An output is what one form means, and what no other one does."""
    o = o.double()
    for other in ("dense", "flat", "own") if spec is NESTED else ("dense", "own"):
        close = torch.allclose(o, meaning(spec, other, x, **lengths).o, atol=1e-4)
        assert close == (other == form), f"expected {form}, beside {other}"


# --- the value


def test_a_gate_is_exact_at_its_lengths():
    gate = Gate(dense_below=8192, flat_below=65536)
    lengths = (1, 8191, 8192, 65535, 65536)
    assert [gate.form(n) for n in lengths] == ["dense", "dense", "flat", "flat", "own"]
    assert [Gate().form(n) for n in (0, 1)] == ["own", "own"]
    assert str(gate) == "dense below 8,192 keys, flat below 65,536 keys"
    assert str(Gate()) == "never gated"
    assert hsgen.Gate is Gate


@pytest.mark.parametrize("wrong", [-1, 2.5, True, "8K"])
def test_a_gate_is_made_of_lengths(wrong):
    with pytest.raises(ArgumentError, match="dense_below: expected a number of keys"):
        Gate(dense_below=wrong)


def test_flat_calls_are_longer_than_dense_ones():
    with pytest.raises(ArgumentError, match="flat_below: expected more than dense_below, 8, got 8"):
        Gate(dense_below=8, flat_below=8)


def test_a_kernel_takes_gates_only():
    with pytest.raises(ArgumentError, match="gate: expected a Gate, 'measured' or None, got 8192"):
        load_kernel(FLAT, gate=8192)


# --- forms

DENSE = """
    biformer biformer_released dhsa dhsa_released draft_attention draft_attention_head dsa dsa_gqa
    flash_moba flex_prefill glm_kpool hip hirouter hisa hydra infllm_v2 kinetics minimax_m3 moba pbs_attn
    proxy_attn quest s2o sale sea seer_attention seer_attention_r sparge spt svg2 xattention
""".split()
NARROWED = ["hip", "hirouter", "hisa"]


def derived(derive):
    """Shipped specs that have a form."""
    found = {}
    for name, path in shipped().items():
        try:
            found[name] = derive(load(path))
        except GateError as error:
            assert str(error).count("cannot be gated") == 1
            assert error.help
    return found


def test_some_shipped_specs_approximate_dense_attention():
    found = derived(gates.dense_form)
    assert list(found) == DENSE
    for name, spec in found.items():
        assert parse(dump(spec)) == spec
        assert (spec.name, spec.levels) == (f"{name}_dense", ())
    assert found["dsa"].attend[0].scale == load("dsa").attend[0].scale
    assert found["dsa"].attend[0].storage == "latent"


def test_some_shipped_specs_have_levels_that_narrow():
    found = derived(gates.flat_form)
    assert list(found) == NARROWED
    assert [level.name for level in found["hisa"].levels] == ["token"]
    same = found["hisa"].model_copy(update={"name": "dsa_gqa"})
    assert same.digest == load("dsa_gqa").digest


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nsa", "branches have softmaxes of their own, and gates"),
        ("deepseek_csa", "a sink takes part of every softmax"),
        ("nosa", "adds a learned bias to its logits"),
        ("token_sparse", "rows that are not chosen see nothing in branch kept"),
        ("sqa", "it attends every token already"),
    ],
)
def test_other_specs_say_why_not(name, why):
    with pytest.raises(GateError, match=f"{name}: cannot be gated dense: .*{why}") as error:
        gates.forms(load(name), Gate(dense_below=8192))
    assert error.value.span
    with pytest.raises(GateError, match=f"cannot be gated dense: .*{why}"):
        gates.forms(load(name), "measured")


def test_a_kernel_says_so_when_it_is_loaded():
    with pytest.raises(GateError, match="cannot be gated dense: branches have softmaxes"):
        load_kernel("nsa", gate=Gate(dense_below=8192))


def test_one_level_has_no_flat_form():
    with pytest.raises(GateError, match="expected a level within another, got block") as error:
        load_kernel(FLAT, gate=Gate(flat_below=64))
    assert "leave out flat_below" in str(error.value)
    assert load_kernel(FLAT, gate="measured") is not load_kernel(FLAT)


# --- calls


@pytest.mark.parametrize("spec", [FLAT, NESTED])
@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("keys", [9, 10, 13, 14])
@pytest.mark.parametrize("rows", ["prefill", "chunk", "decode"])
def test_a_call_takes_the_form_of_its_length(kernel_of, spec, layout, keys, rows):
    gate = GATE if spec is NESTED else Gate(dense_below=10)
    kernel = kernel_of(spec, gate)
    x = tensors(spec, {"prefill": keys, "chunk": 3, "decode": 1}[rows], keys)
    given = x
    if layout == "bhtd":
        given = {n: y.transpose(1, 2) if y.ndim == 4 else y for n, y in x.items()}
    o = kernel(**given, layout=layout)
    o = o.transpose(1, 2) if layout == "bhtd" else o
    form = gate.form(keys)
    assert_form(spec, form, o, x)
    meant = kernel.reference(**given, layout=layout)
    meant = meant.transpose(1, 2) if layout == "bhtd" else meant
    torch.testing.assert_close(meant, meaning(spec, form, x).o)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("length", [9, 10])
def test_a_number_of_keys_counts(kernel_of, length, return_lse):
    kernel, x = kernel_of(FLAT, Gate(dense_below=10)), tensors(FLAT, 4, 16)
    form = "dense" if length < 10 else "own"
    given = kernel(**x, kv_lens=length, return_lse=return_lse)
    o = given[0] if return_lse else given
    lens = torch.full((2,), length)
    assert_form(FLAT, form, o, x, kv_lens=lens)
    if return_lse:
        (expected,) = meaning(FLAT, form, x, kv_lens=lens).lse.values()
        torch.testing.assert_close(given[1], expected.float())


def test_lengths_on_the_device_count_by_their_room(kernel_of):
    kernel, lens = kernel_of(FLAT, Gate(dense_below=10)), torch.tensor([8, 9], dtype=torch.int32)
    for room, form in ((9, "dense"), (10, "own")):
        x = tensors(FLAT, 4, room)
        assert_form(FLAT, form, kernel(**x, kv_lens=lens), x, kv_lens=lens)


@pytest.mark.parametrize(("most", "form"), [(None, "own"), (10, "own"), (9, "dense"), (30, "own")])
def test_packed_documents_count_by_the_longest_that_is_known(kernel_of, most, form):
    kernel, cu = kernel_of(FLAT, Gate(dense_below=10)), torch.tensor([0, 7, 16]).int()
    x = {name: y[0] for name, y in tensors(FLAT, 16, B=1).items()}
    o = kernel(**x, cu_seqlens_q=cu, max_seqlen_k=most)
    assert_form(FLAT, form, o, x, cu_seqlens_q=cu)


def test_all_packed_keys_together_may_be_few(kernel_of):
    cu = torch.tensor([0, 7, 16]).int()
    x = {name: y[0] for name, y in tensors(FLAT, 16, B=1).items()}
    o = kernel_of(FLAT, Gate(dense_below=17))(**x, cu_seqlens_q=cu)
    assert_form(FLAT, "dense", o, x, cu_seqlens_q=cu)


def test_choosing_is_never_gated(kernel_of):
    kernel, alone, x = (
        kernel_of(FLAT, Gate(dense_below=99)),
        kernel_of(FLAT, None),
        tensors(FLAT, 9),
    )
    chosen = kernel.select(**x)
    assert torch.equal(chosen["block"].indices, alone.select(**x)["block"].indices)
    assert_form(FLAT, "own", kernel(**x, selection=chosen), x)
    torch.testing.assert_close(kernel.reference(**x, selection=chosen), meaning(FLAT, "own", x).o)
    assert_form(FLAT, "dense", kernel(**x), x)


def test_what_a_form_does_not_read_is_checked_all_the_same(kernel_of):
    kernel, x = kernel_of(NESTED, GATE), tensors(NESTED, 9)
    with pytest.raises(ArgumentError, match="w_index: expected"):
        kernel(**{**x, "w_index": x["w_index"][:, :, :1]})
    with pytest.raises(ArgumentError, match="q_index: expected a tensor"):
        kernel(**{name: y for name, y in x.items() if name != "q_index"})
    with pytest.raises(ArgumentError, match="kv_lens: expected 0 to S = 9, got 10"):
        kernel(**x)
        kernel(**x, kv_lens=10)
    with pytest.raises(ArgumentError, match="q: expected"):
        kernel(**{**x, "q": x["q"][0]})
    with pytest.raises(ArgumentError, match="max_seqlen_k"):
        kernel(**x, max_seqlen_k="9")


def test_gradients_reach_what_a_form_reads():
    kernel = load_kernel(NESTED, gate=GATE)
    x = {name: y.requires_grad_() for name, y in tensors(NESTED, 9).items()}
    kernel(**x).sum().backward()
    exact = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    meaning(NESTED, "dense", exact).o.sum().backward()
    for name in "qkv":
        torch.testing.assert_close(x[name].grad, exact[name].grad.float())
    assert x["q_index"].grad is None


def test_forms_compile_when_a_call_takes_them_and_once():
    made = []
    kernel = driven(NESTED, GATE, made)
    names = []
    for keys in (15, 13, 9, 8, 12, 16):
        kernel(**tensors(NESTED, keys))
        names.append([spec.name for spec, *_ in made])
    assert names[0] == ["nested"]
    assert names[1] == ["nested", "nested_flat"]
    assert names[2:] == [["nested", "nested_flat", "nested_dense"]] * 4
    assert (kernel.stats().compiles, kernel.stats().calls) == (3, 6)


def test_a_gate_is_part_of_a_kernel():
    kernel = load_kernel(FLAT, gate=Gate(dense_below=10))
    assert kernel is load_kernel(FLAT, gate=Gate(dense_below=10))
    assert kernel is not load_kernel(FLAT, gate=Gate(dense_below=11))
    assert load_kernel(FLAT, gate=Gate()) is load_kernel(FLAT)
    assert pickle.loads(pickle.dumps(kernel)) is kernel
    assert "gate: dense below 10 keys" in kernel.explain()
    assert "dense calls" in kernel.explain()
    assert "gate" not in load_kernel(FLAT).explain()


@pytest.mark.parametrize("gate", [GATE, "measured"])
def test_gated_calls_compile_in_one_graph(gate):
    kernel = load_kernel(NESTED, gate=gate)
    compiled = torch.compile(lambda x: kernel(**x), fullgraph=True, backend="aot_eager")
    for keys in (9, 13, 15):
        x = tensors(NESTED, keys)
        torch.testing.assert_close(compiled(x), kernel(**x))


@pytest.mark.usefixtures("sanitized")
def test_emitted_kernels_run_every_form():
    kernel = load_kernel(NESTED, interpret=True, gate=GATE)
    for keys in (9, 13, 14):
        x = tensors(NESTED, keys)
        assert_form(NESTED, GATE.form(keys), kernel(**x), x)


# --- PyTorch's kernels

SHAPES = [(1, 9), (9, 9), (1, 1)]
LENGTHS = [{}, {"kv_lens": 7}, {"q_offset": 0}, {"q_offset": 3}, {"q_offset": 3, "kv_lens": 8}]
OTHERS = [  # calls that are left to a kernel of ours
    ((3, 9), {}),
    ((12, 9), {}),
    ((9, 9), {"kv_lens": 7}),
    ((9, 9), {"q_offset": 1}),
    ((1, 9), {"q_offset": 9}),
    ((1, 9), {"kv_lens": 0}),
    ((1, 9), {"q_offset": torch.tensor([2, 4], dtype=torch.int32)}),
    ((1, 9), {"kv_lens": torch.tensor([2, 4], dtype=torch.int32)}),
    ((9, 9), {"return_lse": True}),
]


@pytest.fixture
def on_cpu(monkeypatch):
    """Let PyTorch's kernels have CPU tensors; collects what they put out."""
    found = []
    attend = dense.attend

    def attended(*arguments, **options):
        o = attend(*arguments, **options)
        found.append(o is not None)
        return o

    monkeypatch.setattr(dense, "DEVICES", ("cpu",))
    monkeypatch.setattr(dense, "DTYPES", (torch.float32,))
    monkeypatch.setattr(dense, "attend", attended)
    return found


def as_tensors(lengths):
    made = {}
    for name, value in lengths.items():
        if name != "return_lse":
            made[name] = torch.full((2,), value) if isinstance(value, int) else value
    return made


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_attends_what_the_dense_form_means(on_cpu, causal, layout, lengths, shape):
    spec = parse(dump(FLAT).replace("causal: true", f"causal: {str(causal).lower()}"))
    kernel = load_kernel(spec, gate=Gate(dense_below=99))
    x = tensors(spec, *shape)
    lengths = {n: min(y, shape[1] - (n == "q_offset")) for n, y in lengths.items()}
    given = {n: y.transpose(1, 2) for n, y in x.items()} if layout == "bhtd" else x
    o = kernel(**given, layout=layout, **lengths)
    o = o.transpose(1, 2) if layout == "bhtd" else o
    expected = meaning(spec, "dense", x, **as_tensors(lengths)).o
    torch.testing.assert_close(o.double(), expected, atol=1e-5, rtol=1e-5)
    keys, first = lengths.get("kv_lens", shape[1]), lengths.get("q_offset")
    seen = keys if first is None or not causal else first + shape[0]
    assert on_cpu == [seen <= keys and (not causal or shape[0] in (1, seen))]


@pytest.mark.parametrize(("shape", "lengths"), OTHERS)
def test_what_torch_cannot_do_is_left_to_the_form(on_cpu, shape, lengths):
    kernel, x = load_kernel(FLAT, gate=Gate(dense_below=99)), tensors(FLAT, *shape)
    found = kernel(**x, **lengths)
    o = found[0] if isinstance(found, tuple) else found
    expected = meaning(FLAT, "dense", x, **as_tensors(lengths)).o
    torch.testing.assert_close(o.double(), expected, atol=1e-5, rtol=1e-5)
    assert on_cpu in ([], [False])


@pytest.mark.parametrize("change", ["softcap: 5.0", "scale: 0.5"])
def test_branches_keep_their_scale_and_cap(on_cpu, change):
    spec = parse(dump(FLAT).replace("over: block", f"over: block, {change}"))
    x = tensors(spec, 9)
    o = load_kernel(spec, gate=Gate(dense_below=99))(**x)
    assert_form(spec, "dense", o, x)
    plain = meaning(FLAT, "dense", x).o
    assert not torch.allclose(o.double(), plain, atol=1e-4)
    assert on_cpu == ([True] if "scale" in change else [])


def test_packed_documents_are_left_to_the_form(on_cpu):
    cu = torch.tensor([0, 7, 16]).int()
    x = {name: y[0] for name, y in tensors(FLAT, 16, B=1).items()}
    o = load_kernel(FLAT, gate=Gate(dense_below=99))(**x, cu_seqlens_q=cu)
    assert_form(FLAT, "dense", o, x, cu_seqlens_q=cu)
    assert on_cpu == []


@pytest.mark.parametrize("T", [1, 300, 2048])
@pytest.mark.gpu
def test_gated_calls_are_right_on_a_card(T):
    kernel = load_kernel("moba", gate=Gate(dense_below=4096))
    spec = kernel.spec
    x = {n: y.cuda() for n, y in tensors(spec, T, 2048, B=1, dtype=torch.bfloat16).items()}
    expected = meaning(spec, "dense", x).o
    for o in (kernel(**x), kernel(**x, return_lse=True)[0]):
        assert (o.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.gpu
def test_a_graph_keeps_the_form_that_it_was_captured_with():
    kernel = load_kernel("hisa", gate=Gate(dense_below=2048, flat_below=4096))
    for keys, form in ((1024, "dense"), (3072, "flat"), (8192, "own")):
        x = {n: y.cuda() for n, y in tensors(kernel.spec, keys, B=1, dtype=torch.bfloat16).items()}
        kernel.warmup(**x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = kernel(**x)
        for each in x.values():
            each.copy_(torch.randn_like(each))
        graph.replay()
        torch.testing.assert_close(o, kernel(**x), msg=form)


# --- what was measured

TIME = tuned.Time(median_us=100.0, iqr_us=1.0, runs=9)
PROBLEM = tuned.Problem.of(FLAT, "fp32")


def crossing(below):
    return tuned.Crossing(below=below, least=below, most=below)


def record(dense=10, flat=None, spec=FLAT, date="2026-11-26", **environment):
    return tuned.Gates(
        problem=tuned.Problem.of(spec, "fp32"),
        environment=replace(RECORD.environment, **environment),
        lengths=(tuned.Length(tokens=1024, times={"dense": TIME, "own": TIME}),),
        dense=crossing(dense) if dense else None,
        flat=crossing(flat) if flat else None,
        provenance=replace(RECORD.provenance, date=date, command="hsgen gate one_level"),
    )


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty cache, and a committed folder with nothing but the GPUs."""
    committed = tmp_path / "tuned"
    committed.mkdir()
    shutil.copy(paths.data_dir("tuned") / "gpus.yaml", committed)
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    for module in (files, tuned):
        monkeypatch.setattr(module, "committed", lambda: committed)
    monkeypatch.setattr(records, "_told", set())
    return committed


def measured(spec=FLAT):
    """A kernel of the H100 that knows no other kernel's look-ups."""
    options = Options(interpret=True, gate="measured", target=hsgen.Target.named("h100"))
    key = f"{spec.name}-measured-{next(counter)}"
    return Kernel(spec, options, key=key, compiler=compiler())


def test_a_record_is_a_line():
    made = record(dense=10, flat=20, spec=NESTED)
    assert tuned.read_gates(tuned.dump_gates(made)) == made
    assert made.gate == Gate(dense_below=10, flat_below=20)
    assert record(dense=None).gate == Gate()


@pytest.mark.parametrize("keep", ["cache", "committed"])
def test_a_kernel_takes_what_was_measured(folders, keep):
    made = record(dense=10, flat=14, spec=NESTED)
    if keep == "cache":
        assert tuned.publish_gates(made)
    else:
        assert tuned.write_gates(folders, [made]) == (folders / "h100" / "_gates.jsonl",)
    kernel = measured(NESTED)
    for keys in (9, 10, 13, 14):
        x = tensors(NESTED, keys)
        assert_form(NESTED, GATE.form(keys), kernel(**x), x)
    assert (
        'gate="measured": dense below 10 keys, flat below 14 keys  (measured; ' in kernel.explain()
    )


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
def test_heads_that_a_spec_leaves_open_are_those_of_the_tensors(folders, layout):
    free = parse(dump(FLAT).replace("heads: {query: 4, kv: 2}\n", "").replace("head_dim: 16\n", ""))
    wide = free.bind(heads=(4, 4), head_dim=(16, 32))
    for spec, below in ((free.bind(heads=(4, 2), head_dim=16), 10), (wide, 12)):
        problem = tuned.Problem.of(spec, "fp32")
        tuned.publish_gates(replace(record(dense=below), problem=problem))
    kernel = measured(free)
    for spec, below in ((wide, 12), (FLAT, 10), (wide, 12)):
        for keys in (below - 1, below):
            x = tensors(spec, 3, keys)
            given = {n: y.transpose(1, 2) for n, y in x.items()} if layout == "bhtd" else x
            o = kernel(**given, layout=layout)
            o = o.transpose(1, 2) if layout == "bhtd" else o
            assert_form(spec, "dense" if keys < below else "own", o, x)


@pytest.mark.parametrize("how", ["reference", "driver"])
def test_nothing_is_gated_where_nothing_was_measured(folders, caplog, how):
    kernel = measured() if how == "driver" else load_kernel(FLAT, gate="measured")
    x = tensors(FLAT, 9)
    with caplog.at_level(logging.INFO, "hsgen"):
        for _ in range(2):
            assert_form(FLAT, "own", kernel(**x), x)
    said = [each.getMessage() for each in caplog.records if "crossover" in each.getMessage()]
    assert len(said) == (how == "driver")
    if said:
        assert said[0].endswith("so no call is gated; hsgen gate one_level")


def test_records_are_taken_in_order(folders, caplog):
    def below():
        files.forget()
        found = tuned.crossovers(PROBLEM, RECORD.environment)
        return found.rung, found.gate.dense_below

    assert below() == ("none", 0)
    tuned.publish_gates(record(dense=1, sm="sm_80", gpu="a100", processors=108))
    tuned.publish_gates(replace(record(dense=2), problem=replace(PROBLEM, dtype="bf16")))
    assert below() == ("none", 0)
    tuned.publish_gates(record(dense=3, gpu="h200"))
    assert below() == ("other GPU", 3)
    tuned.publish_gates(record(dense=4, triton="3.4"))
    assert below() == ("other Triton", 4)
    tuned.write_gates(folders, [record(dense=5)])
    assert below() == ("exact", 5)
    tuned.publish_gates(record(dense=6, date="2026-11-25"))
    assert below() == ("exact", 5)
    tuned.publish_gates(record(dense=6, date="2026-11-27"))
    assert below() == ("exact", 6)
    with caplog.at_level(logging.INFO, "hsgen"):
        tuned.crossovers(PROBLEM, RECORD.environment).tell()
    assert not caplog.records


BAD = {
    "torn": (lambda text: text[:200], "not JSON"),
    "newer": (lambda text: text.replace('"schema": 1', '"schema": 2'), "a newer hsgen wrote it"),
    "unknown field": (
        lambda text: text.replace('"flat"', '"x": 1, "flat"', 1),
        "x: unexpected keyword",
    ),
    "edited": (
        lambda text: text.replace('"below": 10', '"below": 0', 1),
        "dense.below: input should be greater than or equal to 1",
    ),
    "beside its noise": (
        lambda text: text.replace('"below": 10', '"below": 11', 1),
        "dense.below: expected 10 to 10, got 11",
    ),
    "other GPU": (
        lambda text: text.replace('"h100"', '"h200"'),
        "environment.gpu: expected 'h100'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_record_is_told_and_gates_nothing(folders, name):
    damage, message = BAD[name]
    tuned.write_gates(folders, [record()])
    path = folders / "h100" / "_gates.jsonl"
    path.write_text("\n" + damage(path.read_text()))
    files.forget()
    x = tensors(FLAT, 9)
    with pytest.warns(RuntimeWarning) as told:
        assert_form(FLAT, "own", measured()(**x), x)
    (said,) = [str(each.message) for each in told if "_gates" in str(each.message)]
    assert said.startswith(f"{path}:2: ")
    assert message in said


def test_gates_are_no_configurations(folders):
    tuned.write_gates(folders, [record()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.read_folder(folders) == tuned.Content()
        assert tuned.entries("h100", "gates") == ()
    assert tuned.read_folder(folders / "h100" / "_gates.jsonl") == tuned.Content()
    assert len(tuned.read_gates_folder(folders / "h100" / "_gates.jsonl").kept) == 1


def test_the_newest_of_two_records_stays():
    old, new = record(dense=10), record(dense=11, date="2026-11-27")
    other = record(dense=12, gpu="h200")
    assert tuned.merge_gates([new, old, other]) == tuned.merge_gates([other, old, new])
    assert {each.gate.dense_below for each in tuned.merge_gates([new, old, other])} == {11, 12}


def moba(dense=8192, **changes):
    made = replace(record(dense=dense), problem=tuned.Problem.of(load("moba"), "bf16"))
    return replace(made, **changes)


def test_check_judges_records_of_gates(folders):
    environment = replace(RECORD.environment, processors=1)
    tuned.write_gates(
        folders,
        [moba(), record(), moba(environment=environment), moba(flat=crossing(9000))],
    )
    content = tuned.read_gates_folder(folders)
    found = tuned.check(tuned.Content(), content)
    states = {(each.status, *each.stale, *each.broken) for each in found.entries}
    assert ("ok",) in states
    assert ("stale", "no shipped one_level means the same") in states
    text = str(found)
    assert "environment: gpus.yaml has ('h100', 'sm_90', 132, 232448)" in text
    assert "moba: cannot be gated flat" in text
    assert "the line before has the same key" in text
    assert not found.passed


def test_a_file_of_gates_may_be_damaged():
    with pytest.raises(HsgenError, match="not JSON"):
        tuned.read_gates("<<<<<<< main")
    kinds = tensor_kinds(FLAT)
    assert set(kinds) == {"q", "k", "v"}
