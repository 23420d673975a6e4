"""Cross-compiling without a GPU: costs, occupancy, refusals, and compilers that misbehave."""

import ast
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from emitted import needs_amd

from hsgen import build, paths, pipeline, resources, store
from hsgen.errors import BuildError, PlanError
from hsgen.resources import (
    CompileFailure,
    Cost,
    Job,
    KernelSignature,
    Parameter,
    Resources,
    measure,
    occupancy,
    require_fit,
    roofline,
)
from hsgen.spec import load
from hsgen.target import A100, B200, H100, H200, MI300X, RTX4090
from hsgen.workers import Pool, Worker, WorkerError

pytest.importorskip("triton")

ATTEND = '''"""Dense attention of one head, as small as it gets."""

import triton
import triton.language as tl

from .softmax import update


@triton.jit
def attend(
    Q,  # [T, D]
    K,  # [S, D]
    V,  # [S, D]
    O,  # [T, D]
    length,
    scale,
    stride_t,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, D)
    inside = rows[:, None] < length
    at = rows.to(tl.int64)[:, None] * stride_t + cols[None, :]
    q = tl.load(Q + at, mask=inside, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for n in range(0, length, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        of = keys.to(tl.int64)[:, None] * stride_t + cols[None, :]
        k = tl.load(K + of, mask=keys[:, None] < length, other=0.0)
        v = tl.load(V + of, mask=keys[:, None] < length, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        p, m, l, acc = update(tl.where(keys[None, :] < length, s, float("-inf")), m, l, acc)
        acc += tl.dot(p.to(v.dtype), v)
    tl.store(O + at, (acc / l[:, None]).to(O.dtype.element_ty), mask=inside)
'''
SOFTMAX = '''"""A step of the online softmax."""

import triton
import triton.language as tl


@triton.jit
def update(s, m, l, acc):
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp(s - new[:, None])
    alpha = tl.exp(m - new)
    return p, new, l * alpha + tl.sum(p, 1), acc * alpha[:, None]
'''
POINTERS = tuple(Parameter(name=n, kind="pointer", dtype="bf16", divisible=True) for n in "QKVO")
SIGNATURE = KernelSignature(
    file="attend.py",
    function="attend",
    parameters=(
        *POINTERS,
        Parameter(name="length", kind="int", dtype="i32"),
        Parameter(name="scale", kind="float", dtype="fp32"),
        Parameter(name="stride_t", kind="int", dtype="i32", divisible=True),
        *(Parameter(name=name, kind="constexpr") for name in ("D", "BLOCK_M", "BLOCK_N")),
    ),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def module():
    """The toy kernel, built."""
    return build.build("toy", {"attend.py": ATTEND, "softmax.py": SOFTMAX}, {"test": "resources"})


def job(module, target=H100, sizes=(64, 64, 64), warps=4, stages=2, signature=SIGNATURE):
    constants = dict(zip(("D", "BLOCK_M", "BLOCK_N"), sizes, strict=True))
    return Job(
        module=module,
        signature=signature,
        constants=constants,
        num_warps=warps,
        num_stages=stages,
        target=target,
    )


def cost(**changes):
    plain = {"registers": 128, "spill_bytes": 0, "shared_bytes": 0, "tensor_columns": 0}
    return Cost(**plain | {"warps": 4, "seconds": 1.0, "binary": b""} | changes)


def outcome(target, **changes):
    return resources._outcome(
        Job(
            module=None, signature=SIGNATURE, constants={}, num_warps=4, num_stages=1, target=target
        ),
        cost(**changes),
        cached=False,
    )


# Compiling


def test_every_cuda_target_is_measured_and_the_second_time_is_quick(module, capfd):
    targets = (A100, RTX4090, H100, B200, H200)
    jobs = [job(module, target) for target in targets]
    told = []
    results = measure(jobs, progress=lambda done, total: told.append((done, total)))
    assert [type(result) for result in results] == [Resources] * len(jobs), results
    for result in results:
        assert 32 <= result.cost.registers <= 255
        assert result.cost.spill_bytes == 0
        assert 8192 <= result.cost.shared_bytes <= 64 * 1024
        assert result.cost.warps == 4
        assert 0 < result.occupancy <= 1
        assert result.cost.binary.startswith(b"\x7fELF")
        assert not result.cached
    assert results[3].cost.tensor_columns > 0, "sm_100 multiplies in tensor memory"
    assert results[2].cost == results[4].cost, "h100 and h200 share a binary"
    assert told == [(n, 4) for n in range(1, 5)]
    assert capfd.readouterr() == ("", "")

    start = time.monotonic()
    again = measure(jobs)
    assert time.monotonic() - start < 1.0
    assert again == results
    assert all(result.cached for result in again)


@needs_amd
def test_an_amd_card_is_measured_from_the_notes_of_its_code(module):
    """One tile fits; with seven stages its buffers do not, and that need is named with the limit."""
    fine, deep = measure([job(module, MI300X), job(module, MI300X, sizes=(64, 64, 128), stages=7)])
    assert isinstance(fine, Resources), fine
    assert fine.cost.binary.startswith(b"\x7fELF")
    assert b"amdgcn-amd-amdhsa" in fine.cost.binary
    assert b".vgpr_count" in fine.cost.binary
    assert 32 <= fine.cost.registers <= 512
    assert 16 <= fine.cost.scalar_registers <= 112
    assert 8192 <= fine.cost.shared_bytes <= MI300X.smem_per_block
    assert (fine.cost.spill_bytes, fine.cost.warps, fine.cost.tensor_columns) == (0, 4, 0)
    assert 0 < fine.occupancy <= 1

    least = deep.cost.shared_bytes
    assert least > MI300X.smem_per_block
    words = f"needs at least {least:,} bytes of shared memory a block, the limit is 65,536"
    with pytest.raises(PlanError, match=f"cannot run on mi300x .gfx942.: {words}"):
        require_fit("attend", [outcome(MI300X, shared_bytes=2 * least), deep], MI300X)
    assert require_fit("attend", [deep, fine], MI300X) == (fine,)


def test_a_triton_that_cannot_compile_for_amd_is_refused_by_name(module, monkeypatch):
    monkeypatch.setattr(build, "version", lambda name: "3.4.0")
    with pytest.raises(BuildError) as caught:
        measure([job(module, MI300X)])
    assert str(caught.value) == (
        "expected Triton 3.5.1 or newer to compile for AMD cards, got triton 3.4.0\n"
        "help: pip install --upgrade torch, which brings the Triton that it works with"
    )
    monkeypatch.setattr(build, "version", lambda name: "3.5.1")
    assert build.triton_version("hip") == "triton 3.5.1"


NOTES = """\
\t.amdhsa_next_free_vgpr 93
\t.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     0
    .group_segment_fixed_size: 512
    .name:           rank
    .private_segment_fixed_size: 24
    .sgpr_count:     106
    .sgpr_spill_count: 67
    .vgpr_count:     93
    .vgpr_spill_count: 6
"""


def test_notes_are_read_and_none_may_be_missing():
    crosscompile = pytest.importorskip("hsgen.crosscompile")
    assert crosscompile.hip_usage(NOTES) == {
        "registers": 93,
        "scalar_registers": 106,
        "spill_bytes": 24,
        "shared_bytes": 512,
    }
    with pytest.raises(ValueError, match="does not say its vgpr_count"):
        crosscompile.hip_usage(NOTES.replace(".vgpr_count", ".count"))


def test_measuring_imports_neither_torch_nor_triton_here():
    code = """
        import sys
        from hsgen import resources
        sys.exit(bool({"torch", "triton"} & sys.modules.keys()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, check=False).returncode == 0


def test_the_interpreter_s_variable_does_not_reach_compilers(module, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (result,) = measure([job(module, A100)])
    assert isinstance(result, Resources), result


def test_alignment_promises_reach_the_compiler(module):
    """Without them a kernel is another one: nothing is copied asynchronously, so no buffers."""
    plain = replace(
        SIGNATURE, parameters=tuple(replace(p, divisible=False) for p in SIGNATURE.parameters)
    )
    promised, plain = measure(
        [job(module, A100, stages=4), job(module, A100, stages=4, signature=plain)]
    )
    assert promised.cost.shared_bytes > 1.5 * plain.cost.shared_bytes


def test_a_module_in_memory_is_measured_too(module):
    (result,) = measure([job(replace(module, directory=None), A100)])
    assert isinstance(result, Resources), result


def test_equal_jobs_are_compiled_once(module):
    told = []
    results = measure([job(module, A100)] * 3, progress=lambda *done: told.append(done))
    assert told == [(1, 1)]
    assert len(set(map(id, (result.cost for result in results)))) == 1


def test_a_change_of_a_piece_or_of_the_compiler_is_a_miss(module, monkeypatch):
    keys = [resources._key(job(module), "triton 3.6.0")]
    keys.append(resources._key(job(module), "triton 3.9.0"))
    keys.append(resources._key(job(module, A100), "triton 3.6.0"))
    keys.append(resources._key(job(module, warps=8), "triton 3.6.0"))
    changed = module.sources | {"softmax.py": SOFTMAX + "\nX = 1\n"}
    keys.append(resources._key(job(replace(module, sources=changed)), "triton 3.6.0"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    keys.append(resources._key(job(module), "triton 3.6.0"))
    assert len(set(keys)) == len(keys)


def test_a_file_the_kernel_does_not_use_is_no_miss(module):
    changed = module.sources | {"other.py": "X = 1\n"}
    other = replace(module, sources=changed, digest="0" * 64, directory=None)
    assert resources._key(job(module), "v") == resources._key(job(other), "v")


def test_a_damaged_result_is_measured_again(module, cache):
    (first,) = measure([job(module, A100)])
    (record,) = cache.glob("resources/attend-*/cost.json")
    record.write_text(record.read_text().replace('"registers": ', '"registers": 1'))
    store._warned.clear()
    with pytest.warns(RuntimeWarning, match="damaged cache entry"):
        (second,) = measure([job(module, A100)])
    assert second == first
    assert not second.cached


@pytest.mark.parametrize("name", ["moba", "nsa", "hisa"])
def test_jobs_of_a_plan_name_the_parameters_of_its_kernels(name):
    artifact = pipeline.compile_spec(load(str(paths.data_dir("specs") / f"{name}.yaml")), H100)
    for planned in resources.plan_jobs(artifact.plan, artifact.module, H100):
        signature = planned.signature
        tree = ast.parse(artifact.sources[signature.file])
        (kernel,) = [node for node in tree.body if getattr(node, "name", "") == signature.function]
        assert [p.name for p in signature.parameters] == [arg.arg for arg in kernel.args.args]
        assert resources._request(planned)["types"], "each constexpr has a value"


# What does not compile


def test_a_kernel_that_does_not_compile_is_an_outcome(module):
    broken = module.sources | {"attend.py": ATTEND.replace("tl.trans(k)", "k")}
    bad = job(replace(module, sources=broken, digest="1" * 64), A100, sizes=(32, 64, 16))
    good = job(module, A100)
    failure, result = measure([bad, good])
    assert isinstance(failure, CompileFailure)
    assert failure.kind == "error"
    assert "equal reduction dimensions" in failure.message  # the cause, not its callers
    assert isinstance(result, Resources)
    with pytest.raises(BuildError, match="attend does not compile for sm_80: error: "):
        require_fit("attend", [failure], A100)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": SIGNATURE.parameters[1:]}, "expected parameters"),
        ({"function": "absent"}, "absent"),
    ],
)
def test_a_signature_that_does_not_match_is_an_outcome(module, change, words):
    (failure,) = measure([job(module, A100, signature=replace(SIGNATURE, **change))])
    assert isinstance(failure, CompileFailure)
    assert words in failure.message


def test_constants_are_checked_before_anything_starts(module):
    with pytest.raises(BuildError, match="constexpr D has no value"):
        measure([replace(job(module), constants={"BLOCK_M": 64, "BLOCK_N": 64})])
    with pytest.raises(BuildError, match="no parameter 'BLOCK_X'"):
        measure([replace(job(module), constants={"BLOCK_X": 64})])


def test_a_compiler_that_hangs_is_killed_with_its_children(module, tmp_path, monkeypatch):
    """A ptxas that sleeps: Triton waits for it, and it must not outlive the limit."""
    fake, pids = tmp_path / "ptxas", tmp_path / "pids"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo "release 12.8, V12.8.93"; exit;; esac\n'
        f"echo $$ >> {pids}\nexec sleep 60\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(fake))
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(fake))
    start = time.monotonic()
    (failure,) = measure([job(module, A100)], timeout=12.0)
    assert time.monotonic() - start < 30
    assert failure == CompileFailure(kind="timeout", message=failure.message)
    (pid,) = pids.read_text().split()
    assert not alive(int(pid))


def alive(pid):
    """Whether a process runs still; a killed one may wait a moment for its burial."""
    for _ in range(100):
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


# Workers

ECHO = "import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n"


def environment(folder):
    return os.environ | {"FOLDER": str(folder)}


def worker(code):
    return Worker(("-c", code), environment)


def test_a_worker_answers_long_lines():
    echo = worker(ECHO)
    request = {"text": "x" * 3_000_000}
    assert echo.ask(request, 30.0) == request
    echo.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; sys.exit('last words')", "exit status 1 (no answer) last words"),
        ("input(); print('no json', flush=True)", "JSON|Expecting value"),
    ],
)
def test_a_worker_that_dies_says_how(code, words):
    with pytest.raises(WorkerError) as caught:
        worker(code).ask({}, 30.0)
    assert caught.value.kind == "crash"
    assert any(word in str(caught.value) for word in words.split("|"))


def test_a_worker_starts_again_after_it_died():
    code = (
        "import os, sys\nfor line in sys.stdin:\n    os.abort() if 'die' in line else print(line)\n"
    )
    code = code.replace("print(line)", "print(line, end='', flush=True)")
    with Pool(("-c", code), environment, 1) as pool:
        answers = list(pool.ask_all([{"a": 1}, {"die": 1}, {"a": 2}], 30.0))
    assert answers[0] == {"a": 1}
    assert isinstance(answers[1], WorkerError)
    assert answers[2] == {"a": 2}


def test_answers_keep_the_order_of_requests():
    code = ECHO.replace("    print", "    import time; time.sleep(len(line) % 7 / 50)\n    print")
    requests = [{"n": "x" * n} for n in range(20)]
    with Pool(("-c", code), environment, 4) as pool:
        assert list(pool.ask_all(requests, 30.0)) == requests


def test_leaving_the_pool_kills_its_workers():
    code = "import os, json, time\ninput()\nprint(json.dumps({'pid': os.getpid()}), flush=True)\n"
    with Pool(("-c", code + "time.sleep(60)"), environment, 1) as pool:
        (answer,) = pool.ask_all([{}], 30.0)
        assert alive(answer["pid"])
    assert not alive(answer["pid"])


def test_a_stopped_worker_starts_no_child():
    """An interrupt may come while another thread is about to start one."""
    worker = Worker(("-c", ECHO), environment)
    worker.stop()
    with pytest.raises(WorkerError, match="stopped before it began"):
        worker.ask({"a": 1}, 30.0)


def test_an_interrupt_does_not_wait_for_compilers():
    code = ECHO + "import time\n"
    code = code.replace(
        "    print", "    import time; time.sleep(30 if 'slow' in line else 0)\n    print"
    )
    start = time.monotonic()
    with Pool(("-c", code), environment, 2) as pool, pytest.raises(KeyboardInterrupt):
        for _ in pool.ask_all([{"a": 1}, {"slow": 1}, {"slow": 2}], 60.0):
            raise KeyboardInterrupt
    assert time.monotonic() - start < 10


# Arithmetic


@pytest.mark.parametrize(
    ("registers", "shared", "columns", "warps", "target", "expected"),
    [
        (32, 0, 0, 4, H100, (16, "warps")),
        (128, 0, 0, 4, H100, (4, "registers")),
        (255, 0, 0, 8, H100, (1, "registers")),
        (255, 0, 0, 1, H100, (8, "registers")),  # two warps of 8,192 registers a scheduler
        (168, 0, 0, 1, H100, (12, "registers")),
        (168, 0, 0, 3, H100, (4, "registers")),
        (168, 0, 0, 4, H100, (3, "registers")),
        (168, 0, 0, 9, H100, (1, "registers")),
        (168, 0, 0, 13, H100, (0, "registers")),
        (64, 0, 0, 1, H100, (32, "blocks")),
        (16, 0, 0, 1, H100, (32, "blocks")),
        (32, 100_000, 0, 4, H100, (2, "shared memory")),
        (32, 232_448, 0, 4, H100, (1, "shared memory")),
        (32, 232_449, 0, 4, H100, (0, "shared memory")),
        (32, 101_376, 0, 4, RTX4090, (1, "shared memory")),
        (32, 101_377, 0, 4, RTX4090, (0, "shared memory")),
        (32, 166_912, 0, 4, A100, (1, "shared memory")),
        (32, 1024, 256, 4, B200, (2, "tensor memory")),
        (32, 1024, 1024, 4, B200, (0, "tensor memory")),
        (228, 65_536, 0, 4, MI300X, (1, "shared memory")),
        (256, 0, 0, 4, MI300X, (2, "registers")),
        # waves a scheduler as LLVM counts them: 8, 7, 5, 4, 3 for these registers of a lane
        (64, 0, 0, 4, MI300X, (8, "warps")),
        (69, 0, 0, 4, MI300X, (7, "registers")),
        (93, 0, 0, 4, MI300X, (5, "registers")),
        (124, 0, 0, 4, MI300X, (4, "registers")),
        (158, 0, 0, 4, MI300X, (3, "registers")),
        (32, 16_385, 0, 4, MI300X, (3, "shared memory")),
        (32, 65_537, 0, 4, MI300X, (0, "shared memory")),
        (32, 0, 0, 16, MI300X, (2, "warps")),
        (32, 0, 0, 32, MI300X, (0, "warps")),
        (32, 0, 0, 32, H100, (2, "warps")),
        (32, 0, 0, 64, H100, (0, "warps")),
    ],
)
def test_occupancy(registers, shared, columns, warps, target, expected):
    found = occupancy(
        registers=registers,
        shared_bytes=shared,
        tensor_columns=columns,
        warps=warps,
        target=target,
    )
    assert found == expected


@pytest.mark.parametrize(
    ("scalars", "expected"), [(96, (8, "warps")), (106, (7, "scalar registers"))]
)
def test_scalar_registers_are_shared_by_the_waves_of_a_scheduler(scalars, expected):
    found = occupancy(
        registers=32,
        scalar_registers=scalars,
        shared_bytes=0,
        tensor_columns=0,
        warps=4,
        target=MI300X,
    )
    assert found == expected


def test_a_block_of_too_many_threads_is_refused():
    with pytest.raises(PlanError, match="at least 32 warps a block, the limit is 16"):
        require_fit("selected", [outcome(MI300X, warps=32, registers=32)], MI300X)


def test_what_cannot_fit_is_refused_with_need_and_limit():
    tried = [outcome(RTX4090, shared_bytes=size) for size in (294_912, 131_072, 163_840)]
    with pytest.raises(PlanError) as caught:
        require_fit("selected", tried, RTX4090)
    assert str(caught.value) == (
        "kernel selected cannot run on rtx 4090 (sm_89): needs at least 131,072 bytes of shared "
        "memory a block, the limit is 101,376"
    )


def test_what_fits_is_kept_in_order():
    tried = [outcome(H100, shared_bytes=size) for size in (294_912, 131_072, 1024)]
    assert require_fit("selected", tried, H100) == tuple(tried[1:])


def test_tensor_memory_has_its_own_refusal():
    with pytest.raises(PlanError, match="1,024 columns of tensor memory a block, the limit is 512"):
        require_fit("selected", [outcome(B200, tensor_columns=1024)], B200)


def test_a_tile_too_large_for_a_card_is_refused_from_its_real_cost(module):
    results = measure([job(module, RTX4090, sizes=(128, 128, 128), warps=8, stages=3)])
    with pytest.raises(PlanError, match="the limit is 101,376"):
        require_fit("attend", results, RTX4090)


def test_roofline():
    assert roofline(989.4e12, 1.0, H100, "bf16").seconds == pytest.approx(1.0)
    assert roofline(989.4e12, 1.0, H100, "bf16").bound == "compute"
    memory = roofline(1.0, 3.35e12, H100, "bf16")
    assert (memory.bound, memory.seconds) == ("memory", pytest.approx(1.0))
    assert roofline(0, 0, H100, "bf16").seconds == 0
    with pytest.raises(PlanError, match="no fp8"):
        roofline(1.0, 1.0, A100, "fp8")
