"""`hsgen bench`: what it says, what it writes, and that nothing wrong is timed.  Runs in the interpreter."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_tuned import interpreted

from hsgen import baselines, bench, checking, machine, measure, standins, timing, trials, tuned
from hsgen.cli import main
from hsgen.reference import reference
from hsgen.selection import ListSelection, to_list
from hsgen.spec import load, parse

CAPTURE = Path(__file__).parent / "data" / "smollm2_layer05.safetensors"
TINY = """\
hsgen: 1
name: tiny
heads: {query: 2, kv: 2}
head_dim: 16
causal: true
levels:
  - name: chunk
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: selected, over: chunk}
"""
SPEC = parse(TINY)
SMALL = ("--device", "cpu", "--tokens", "24")


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return str(tmp_path / "tiny.yaml")


# --- in the interpreter


@pytest.mark.usefixtures("sanitized")
def test_a_spec_is_checked_timed_and_said(tiny, tmp_path, capsys):
    file = tmp_path / "out.json"
    argv = ["bench", tiny, *SMALL, "--against", "dense", "--against", "flex", "-o", str(file)]
    assert main([*argv, "--qkv", str(CAPTURE)]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    lines = shown.out.splitlines()
    assert lines[0].startswith("tiny on cpu, kernels for sm_90, fp32: heads 2/2 of 16/16, batch 1")
    assert "inputs smollm2_layer05.safetensors" in lines[0]
    assert lines[2].startswith("in Triton's interpreter, whose times mean nothing")
    table = lines[lines.index("") + 1 :]
    labels = [line[7:27].strip() for line in table[1 : table.index("")]]
    assert labels == ["tiny", "choosing", "attending", "dense torch", "chosen branch alone"]
    assert "checked before timing: 24 rows, output at most" in shown.out
    assert "24 tokens, flex mask skipped: FlexAttention is timed on GPUs only" in lines
    found = json.loads(file.read_text())
    assert (found["schema_version"], found["ok"], found["card"]) == (1, True, "cpu")
    assert (found["inputs"], found["capture"]) == ("real", CAPTURE.name)
    assert {"torch", "triton", "date", "digest", "shrunk", "dtype"} <= set(found)
    assert str(tmp_path) not in file.read_text()
    assert str(CAPTURE.parent) not in file.read_text()
    words = shlex.split(found["command"])
    assert words[:3] == ["hsgen", "bench", "tiny.yaml"]
    assert words[words.index("--qkv") + 1] == CAPTURE.name
    (case,) = found["cases"]
    done = {name for name, entry in case["steps"].items() if entry["status"] == "ok"}
    timed = {"total", "select", "attend", "dense torch", "attend selected"}
    assert done == {"check small", "configs"} | timed
    assert "configs of 24 tokens: for the interpreter: every kernel" in lines
    assert case["steps"]["check small"]["same_choice"] == 1.0


@pytest.mark.usefixtures("sanitized")
def test_tuned_records_are_said(tmp_path, capsys):
    """Which record, how near it is, and the values, of each kernel that one speaks for."""
    text = TINY.replace("tiny", "tiny_tuned")
    (tmp_path / "tiny_tuned.yaml").write_text(text)
    made = interpreted(trials.shrink(parse(text)), attend_selected={"num_warps": 8})
    other = replace(made.kernels["pool_chunk_keys"], text="ab" * 12)
    tuned.publish(replace(made, kernels={**made.kernels, "pool_chunk_keys": other}))
    argv = ["bench", str(tmp_path / "tiny_tuned.yaml"), *SMALL, "-o", str(tmp_path / "out.json")]
    assert main(argv) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("configs of")]
    near = "configs of 24 tokens: tuned, nearest bucket: "
    assert len(said) == 2, said
    assert any(line.startswith(near) and "attend_selected" in line for line in said)
    assert any("pool_chunk_keys" in line and "for the interpreter: " in line for line in said)
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    chosen = case["steps"]["configs"]["kernels"]
    assert chosen["attend_selected"]["config"]["num_warps"] == 8
    assert chosen["attend_selected"]["origin"].startswith("tuned, nearest bucket")
    assert "cache tiny_tuned-" in chosen["attend_selected"]["origin"]
    assert set(chosen) == set(made.kernels)


class Wrong:
    """Kernels whose output is a little too large."""

    def __init__(self, kernel):
        self.kernel = kernel

    def select(self, **tensors):
        return self.kernel.select(**tensors)

    def __call__(self, **tensors):
        return self.kernel(**tensors) * 1.05


def test_a_wrong_kernel_is_not_timed(tiny, monkeypatch, capsys):
    load = measure.Setting.load
    monkeypatch.setattr(measure.Setting, "load", lambda self, spec: Wrong(load(self, spec)))
    assert main(["bench", tiny, *SMALL, "--against", "flex", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    ((name, entry),) = found["cases"][0]["steps"].items()
    assert (name, entry["status"]) == ("check small", "failed")
    assert entry["reason"].startswith("CheckError: relative error 0.05 of the output")


def test_a_wrong_choice_is_refused():
    """Attended as it was chosen, so that only the choice is wrong."""
    torch.manual_seed(0)
    x = {name: torch.randn(1, 80, 2, 16) for name in "qkv"}
    right = reference(SPEC, x)
    runs = checking.sampled(SPEC, 80)
    assert checking.compare(SPEC, x, right.o, right.selection, runs)["same_choice"] == 1.0
    other = right.selection["chunk"].indices.clone()
    other[:, 16:, :, 0] = 0
    wrong = {"chunk": ListSelection(level="chunk", indices=other)}
    o = reference(SPEC, x, selection=wrong).o
    with pytest.raises(checking.CheckError, match="chunk: .* of the reference's choice"):
        checking.compare(SPEC, x, o, wrong, runs)


def test_a_choice_of_nothing_is_none_at_all():
    """Where a route takes heads another way, the level has no entries."""
    x = {name: torch.randn(1, 80, 2, 16) for name in "qkv"}
    right = reference(SPEC, x)
    none = {"chunk": to_list(right.selection["chunk"]).indices.fill_(-1)}
    asked = checking.Reference(SPEC, x)
    asked._known[0, 80, ""] = checking.Said(o=right.o, chosen=none)
    with pytest.raises(checking.CheckError, match=r"chunk: 0\.0% of the reference's choice"):
        checking.compare(SPEC, x, right.o, right.selection, [(0, 80)], asked)
    empty = {"chunk": ListSelection(level="chunk", indices=none["chunk"])}
    o = reference(SPEC, x, selection=empty).o
    assert checking.compare(SPEC, x, o, empty, [(0, 80)], asked)["same_choice"] == 1.0


@pytest.mark.parametrize("turn", [0.0, 1e-3, float("nan")])
def test_rows_that_choose_with_ones_far_apart_are_asked_twice(monkeypatch, turn):
    spec = standins.bind(load("svg2"), query=2, kv=2, dim=16)
    assert not checking.runs_tell(spec)
    o = torch.randn(1, 50, 2, 16)
    outputs = iter((o + turn, o))
    monkeypatch.setattr(measure, "run", lambda *_: (next(outputs), {}))
    setting = bench.Setting(device="cpu", kind="random", groups=(), seconds=0.0)
    length = bench._Length(setting=setting, spec=spec, tokens=50)
    if turn == 0.0:
        assert length.check() == {"rows_twice": 50}
    else:
        with pytest.raises(checking.CheckError, match="not finite, or another one"):
            length.check()


def test_rows_are_checked_where_nothing_is_causal():
    spec = parse(TINY.replace("causal: true", "causal: false").replace(", force: {last: 1}", ""))
    x = {name: torch.randn(1, 40, 2, 16) for name in "qkv"}
    found = reference(spec, x)
    checked = checking.compare(spec, x, found.o, found.selection, checking.sampled(spec, 40))
    assert checked["error"] < 1e-6
    assert checked["rows"] == 2 * checking.SAMPLED
    assert standins.rows_of(spec, x, 8, 16)["k"].shape[1] == 40


@pytest.mark.parametrize("name", ["xattention", "dhsa_released"])
def test_choices_whose_counts_vary_are_checked(name):
    spec = standins.bind(load(name), query=2, kv=1, dim=16)
    x = {name: torch.randn(1, 300, 1 + (name == "q"), 16) for name in "qkv"}
    found = reference(spec, x)
    chosen = {level: to_list(each) for level, each in found.selection.items()}
    checked = checking.compare(spec, x, found.o, chosen, checking.sampled(spec, 300))
    assert checked["error"] < 1e-6
    assert checked["same_choice"] == 1.0


def test_rows_that_choose_together_are_checked_together():
    spec = load("dhsa_released")
    (block,) = {level.query.block for level in spec.levels if level.query}
    tokens = 5 * block + 7
    runs = checking.sampled(spec, tokens)
    assert all(a % block == 0 and (b % block == 0 or b == tokens) for a, b in runs)
    assert checking.sampled(load("moba"), 100) == [(46, 54), (92, 100)]


# --- errors


def test_no_gpu_is_said_with_what_to_do(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", tiny]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert "no GPU is present" in said.err
    assert "--device cpu" in said.err
    assert "hsgen compile" in said.err


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (("--device", "cpu", "--tokens", "2K"), 1, "expected at most 1024 with --device cpu"),
        (("--device", "cpu", "--dtype", "bf16"), 1, "the interpreter computes no bf16"),
        (("--device", "cpu", "--qkv", "absent.safetensors"), 1, "cannot read this capture"),
        (("--tokens", "8K,many"), 2, "expected numbers of tokens, as in 8K,32K"),
        (("--tokens", "0"), 2, "expected numbers of tokens, as in 8K,32K"),
        (("--against", "sparse"), 2, "dense"),
        (("-o", "figures.txt"), 2, ".json"),
        (("--heads", "8/8"), 1, "heads"),
    ],
)
def test_errors(tiny, argv, status, said, capsys):
    assert main(["bench", tiny, *argv]) == status
    shown = capsys.readouterr()
    assert not shown.out
    assert said in shown.err


def test_a_spec_without_kernels_names_the_line(capsys):
    assert main(["bench", "spt", "--device", "cpu"]) == 1
    assert "no kernel compares codes yet" in capsys.readouterr().err


# --- what a GPU's figures look like


def timed(ms, **more):
    return {"status": "ok", "ms": {"median": ms, "least": ms, "most": ms, "calls": 5}, **more}


def report_of(*cases):
    made = {
        "card": "NVIDIA H100", "driver": "570", "cuda": "12.8", "cudnn": 91002, "torch": "2.9",
        "triton": "3.5", "python": "3.12", "date": "2026-11-26", "command": "hsgen bench tiny",
    }  # fmt: skip
    return bench.Report(
        spec=SPEC, arch="sm_90", dtype="bf16", capture=None, made=made, shrunk=None, cases=cases
    )


def case_of(tokens, ms, dense):
    limit = {"ms": ms / 4, "bound": "compute", "math": "bf16", "flops": 1.0, "bytes": 1.0}
    steps = {
        "check small": {"status": "ok", "error": 2e-3, "same_choice": 0.999, "rows": 3000},
        "total": timed(ms),
        "select": timed(ms / 4),
        "attend": timed(ms * 3 / 4),
        "kernels": {"status": "ok", "ms": {"attend_selected": ms / 2, "fill": 0.001}},
        "memory": {"status": "ok", "bytes": 200 << 20},
        "dense cuDNN": timed(dense, tflops=600.0, bytes=64 << 20),
        "dense flash": {"status": "failed", "reason": "RuntimeError: no\nkernel", "trace": ""},
    }
    return bench.Case(
        tokens=tokens, flops=1e12 * tokens / 8192, limits={"attend_selected": limit}, steps=steps
    )


def test_table_of_a_gpu():
    text = str(report_of(case_of(8192, 2.0, 1.0), case_of(32768, 8.0, 16.0)))
    lines = text.splitlines()
    assert lines[0] == (
        "tiny on NVIDIA H100, kernels for sm_90, bf16: heads 2/2 of 16/16, batch 1, inputs random"
    )
    assert "cuda 12.8, cudnn 91002, driver 570, 2026-11-26" in lines[1]
    rows = [line.split() for line in lines]
    assert ["8192", "tiny", "2", "500", "0.50x", "200"] in rows
    assert ["32768", "tiny", "8", "500", "2.00x", "200"] in rows
    assert ["dense", "cuDNN", "16", "600", "64"] in rows
    assert ["attend_selected", "4", "2", "50%", "compute,", "bf16"] in rows
    assert ["fill", "0.001", "not", "of", "the", "plan"] in rows
    assert "8192 tokens, dense flash failed: RuntimeError: no kernel" in lines
    growth = "from 8192 to 32768 tokens time grows as T^1.00, its arithmetic as T^1.00"
    assert f"{growth}; dense attention as T^2.00" in lines
    assert max(map(len, lines)) <= 120


def test_failed_peers_do_not_fail_the_command():
    good = case_of(8192, 2.0, 1.0)
    assert report_of(good).passed
    bad = {"total": {"status": "failed", "reason": "OutOfMemoryError", "trace": ""}}
    assert not report_of(bench.Case(tokens=1, flops=1.0, limits={}, steps=bad)).passed


def test_longer_inputs_are_timed_by_the_fastest_of_each_backend():
    spec = SPEC.model_copy(update={"heads": SPEC.heads.model_copy(update={"kv": 1})})
    every = baselines.variants(spec, "cuda")
    case = bench.Case(
        tokens=1,
        flops=1.0,
        limits={},
        steps={
            "kernels": {"status": "ok", "ms": {"a": 1.0}},
            "dense cuDNN": timed(2.0),
            "dense cuDNN, heads expanded": timed(1.0),
        },
    )
    kept = [variant.name for variant in baselines.contenders(every, case.dense_times())]
    assert kept == ["cuDNN, heads expanded", "flash", "flash, heads expanded"]


def test_values_are_padded_to_longer_keys_only():
    for qk, v, padded in ((32, 16, True), (16, 32, False), (16, 16, False)):
        spec = SPEC.bind(head_dim=None).model_copy(
            update={"head_dim": SPEC.head_dim.model_copy(update={"qk": qk, "v": v})}
        )
        assert any(x.pad for x in baselines.variants(spec, "cuda")) is padded


LATENT = """\
hsgen: 1
name: latent
heads: {query: 4, kv: 1}
head_dim: {qk: 24, v: 16}
causal: true
index: {heads: 2, dim: 8, keys: shared}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 4}
attend:
  - {name: selected, over: token, storage: latent, scale: 0.2041241452319315}   # 24^-0.5
"""


def test_dense_takes_the_first_channels_of_a_latent_as_its_value():
    setting = measure.Setting(
        device="cpu", kind="random", groups=(), seconds=0.01, dtype=torch.float32
    )
    length = bench._Length(setting=setting, spec=parse(LATENT), tokens=20)
    steps = list(length.dense(()))
    assert steps
    for name, action in steps:
        found = action()
        assert found["error"] < 1e-5, name  # of the last row, beside the reference


@pytest.mark.parametrize("causal", [True, False])
def test_dense_sees_what_the_spec_sees(causal):
    q, k, v = (torch.randn(1, 12, 2, 16) for _ in range(3))
    variant = baselines.Variant(name="torch", backend=None, expand=False, pad=False)
    o = baselines.dense(variant, q, k, v, causal=causal)(0)
    seen = torch.ones(12, 12).tril() if causal else torch.ones(12, 12)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    p = logits.masked_fill(seen == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(o, torch.einsum("bhqk,bkhd->bqhd", p, v))


def test_only_blocks_of_tokens_go_into_a_mask():
    apart = TINY.replace("{blocks: 8}", "{blocks: 8, stride: 4}")
    apart = parse(apart.replace(", force: {last: 1}", ""))
    with pytest.raises(checking.NotExpressibleError, match="no branch attends chosen blocks"):
        baselines.selected_level(apart)
    assert baselines.selected_level(SPEC).name == "chunk"


def test_text_of_failures_names_no_folder():
    said = machine.without_paths(
        'File "/usr/lib/python3/site-packages/torch/nn/x.py", /home/me/.cache/hsgen/ab/rank.py: 1/2'
    )
    assert said == 'File "torch/nn/x.py", rank.py: 1/2'


def test_a_single_call_is_timed_once():
    calls = []
    found = timing.time_once(calls.append, "cpu")
    assert calls == [0]
    assert (found.calls, found.median) == (1, found.first)
