"""The module cache under every fault that can be made here, and the fence before import."""

import contextlib
import errno
import inspect
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hsgen import allowlist, build, store
from hsgen.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
KERNEL = '''"""A kernel file that needs neither torch nor triton."""

SIZES = (16, 32)


def double(x):
    return x * 2
'''
DRIVER = '''"""Calls the kernel."""

from . import kernel


def forward(x):
    return kernel.double(x) + 1
'''
SOURCES = {"kernel.py": KERNEL, "driver.py": DRIVER}
KEY = {"spec": "a" * 64, "hsgen": "0.1.0"}
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, no memory of earlier warnings, no temporary folder yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HSGEN_CACHE_DIR", str(folder))
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setattr(store, "_private", {})
    monkeypatch.setattr(build, "_loaded", {})
    return folder


def entries(cache):
    return sorted(path for path in (cache / "modules").iterdir() if path.name.startswith("toy-"))


def run(code, *arguments, **options):
    """Run a small program that has no torch in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1, **options)


def one_warning(caught, words):
    messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(messages) == 1, messages
    assert words in messages[0]


# The life of a module


def test_build_find_and_load(cache):
    module = build.build("toy", SOURCES, KEY)
    assert module.directory == cache / "modules" / f"toy-{module.digest[:12]}"
    assert (module.directory / "driver.py").read_text() == DRIVER
    assert build.find(KEY) == module
    assert build.load(module).driver.forward(3) == 7


def test_load_by_directory_gives_the_same_object():
    module = build.build("toy", SOURCES, KEY)
    assert build.load(module.directory) is build.load(module)


def test_building_again_writes_nothing(cache):
    module = build.build("toy", SOURCES, KEY)
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}
    assert build.build("toy", SOURCES, KEY) == module
    assert {path: path.lstat().st_mtime_ns for path in cache.rglob("*")} == before


def test_another_text_or_key_is_another_module():
    first = build.build("toy", SOURCES, KEY)
    second = build.build("toy", SOURCES | {"kernel.py": KERNEL + "\nMORE = 1\n"}, KEY)
    third = build.build("toy", SOURCES, KEY | {"hsgen": "0.2.0"})
    assert len({first.digest, second.digest, third.digest}) == 3
    assert build.find(KEY) == second, "the key leads to what was built last"


def test_an_unknown_key_is_a_miss_that_writes_nothing(cache):
    assert build.find(KEY) is None
    assert not cache.exists()


def test_folders_are_private(cache):
    build.build("toy", SOURCES, KEY)
    modes = {stat.S_IMODE(path.lstat().st_mode) & 0o077 for path in [cache, *cache.rglob("*")]}
    assert modes == {0}


def test_tracebacks_and_inspect_show_emitted_lines():
    module = build.build("toy", SOURCES, KEY)
    forward = build.load(module).driver.forward
    with pytest.raises(TypeError) as caught:
        forward(None)
    frames = [entry.path for entry in caught.traceback]
    assert Path(module.path("kernel.py")) in map(Path, frames)
    assert inspect.getsource(forward) == "def forward(x):\n    return kernel.double(x) + 1\n"


def test_the_source_shown_is_the_source_that_was_checked():
    module = build.build("toy", SOURCES, KEY)
    forward = build.load(module).driver.forward
    (module.directory / "driver.py").write_text("raise SystemExit\n" * 20)
    assert "kernel.double" in inspect.getsource(forward)


def test_no_byte_code_is_written_or_read():
    module = build.build("toy", SOURCES, KEY)
    build.load(module)
    assert not list(module.directory.rglob("*.pyc"))


def test_files_that_are_not_in_the_manifest_cannot_be_imported():
    module = build.build("toy", SOURCES, KEY)
    (module.directory / "sly.py").write_text("x = 1\n")
    package = build.load(module)
    with pytest.raises(ModuleNotFoundError):
        __import__(f"{package.__name__}.sly")


def test_an_init_file_may_gather_its_siblings():
    gather = '"""All."""\n\nfrom .driver import forward\n'
    package = build.load(build.build("toy", SOURCES | {"__init__.py": gather}, KEY))
    assert package.forward(1) == 3


def test_an_error_while_importing_names_the_emitted_line():
    module = build.build("toy", {"kernel.py": "A = 1\nB = A / 0\n"}, KEY)
    for _ in range(2):
        with pytest.raises(BuildError, match=r"kernel\.py:2: ZeroDivisionError"):
            build.load(module)
    assert not [name for name in sys.modules if name.startswith(module.package)]


def test_nothing_is_pickled():
    for module in (build, store, allowlist):
        assert pickle not in vars(module).values()
        assert "pickle" not in inspect.getsource(module).replace("Nothing is pickled", "")


def test_threads_share_one_import():
    module = build.build("toy", SOURCES, KEY)
    start = threading.Barrier(32)

    def load(_):
        start.wait()
        return build.load(module)

    with ThreadPoolExecutor(32) as threads:
        assert len({id(package) for package in threads.map(load, range(32))}) == 1


# Names

BAD_NAMES = [
    "",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "A",
    "1a",
    "a-b",
    "a b",
    "a\n",
    "a\0",
    "é",
    "a" * 65,
    "x():\n    import os",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_unsafe_spec_names_reach_no_path(name, cache):
    with pytest.raises(BuildError):
        build.build(name, SOURCES, KEY)
    assert not cache.exists()


@pytest.mark.parametrize("name", [*BAD_NAMES, "manifest.json", "a.sh", "a.py/b.py", ".tmp-x.py"])
def test_unsafe_file_names_reach_no_path(name, cache):
    for file in {name, f"{name}.py"} - {"manifest.json.py"}:
        with pytest.raises(BuildError):
            build.build("toy", {file: KERNEL}, KEY)
    assert not cache.exists()


# Damage


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1 << 3
    path.write_bytes(data)


def damage_truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_empty(path):
    os.truncate(path, 0)


def damage_delete(path):
    path.unlink()


def damage_edit(path):
    path.write_text(path.read_text().replace("2", "3") + "\n")


def damage_link(path):
    elsewhere = path.parent.parent.parent / "elsewhere"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)


def damage_folder(path):
    path.unlink()
    path.mkdir()


def damage_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("file", ["kernel.py", "driver.py", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("warm", [False, True])
def test_damage_is_set_aside_rebuilt_and_told_once(cache, damage, file, warm):
    module = build.build("toy", SOURCES, KEY)
    damage(module.directory / file)
    with pytest.raises(BuildError, match="cannot load"):
        build.load(module.directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if warm:
            assert build.find(KEY) is None
        assert build.build("toy", SOURCES, KEY) == module
        assert build.find(KEY) == module
    one_warning(caught, "damaged cache entry set aside and rebuilt")
    assert build.load(module.directory).driver.forward(3) == 7
    assert len(list((cache / "quarantine").iterdir())) == 1


def test_every_flipped_bit_of_a_manifest_is_seen(cache):
    module = build.build("toy", SOURCES, KEY)
    path = module.directory / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 5):
            torn = bytearray(whole)
            torn[position] ^= 1 << bit
            path.write_bytes(torn)
            try:
                entry = store.read(module.directory)
            except store.DamagedError:
                continue
            # what JSON does not mind (a space that became a tab) changes no meaning
            assert json.loads(torn) == json.loads(whole)
            assert entry.digest == module.digest


@pytest.mark.parametrize("what", ["file", "link", "dangling"])
def test_something_else_in_the_entry_s_place_is_set_aside(cache, what, tmp_path):
    module = build.build("toy", SOURCES, KEY)
    moved = tmp_path / module.directory.name
    module.directory.rename(moved)
    if what == "file":
        module.directory.write_text("x")
    else:
        module.directory.symlink_to(moved if what == "link" else tmp_path / "nowhere")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert build.build("toy", SOURCES, KEY) == module
    one_warning(caught, "set aside")
    assert not module.directory.is_symlink()
    assert build.load(module.directory).driver.forward(3) == 7


def test_a_damaged_pointer_is_a_miss(cache):
    module = build.build("toy", SOURCES, KEY)
    (pointer,) = (cache / "modules" / "by-key").iterdir()
    for text in ("", "[]", "{}", '{"name": "../..", "digest": 3}', "[" * 100_000, "\xff"):
        pointer.write_text(text)
        assert build.find(KEY) is None
    assert build.build("toy", SOURCES, KEY) == module
    assert build.find(KEY) == module


def test_quarantine_is_bounded(cache, monkeypatch):
    monkeypatch.setattr(store, "MAX_QUARANTINE", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            damage_edit(build.build("toy", SOURCES, KEY).directory / "kernel.py")
    assert len(list((cache / "quarantine").iterdir())) == 3


# Many processes

START = """
    import os, sys, time, warnings
    from hsgen import build
    SOURCES = {sources!r}
    KEY = {key!r}
"""


def program(code):
    return textwrap.dedent(START).format(sources=SOURCES, key=KEY) + textwrap.dedent(code)


def test_32_processes_start_cold_at_once(cache, tmp_path):
    code = program("""
        open(sys.argv[1] + str(os.getpid()), "w").close()
        while not os.path.exists(sys.argv[2]):
            time.sleep(0.01)
        module = build.find(KEY) or build.build("toy", SOURCES, KEY)
        assert build.load(module).driver.forward(3) == 7
        assert build.load(module.directory) is build.load(module)
        print(module.directory)
        assert "torch" not in sys.modules and "triton" not in sys.modules
    """)
    ready, go = tmp_path / "ready", tmp_path / "go"
    ready.mkdir()
    children = [run(code, f"{ready}/", go) for _ in range(32)]
    deadline = time.monotonic() + 60
    while len(list(ready.iterdir())) < 32 and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    results = [child.communicate(timeout=60) for child in children]
    assert {errors for _, errors in results} == {""}
    (entry,) = entries(cache)
    assert {output.strip() for output, _ in results} == {str(entry)}
    assert not list(cache.rglob(".tmp-*"))
    assert not (cache / "quarantine").exists()


@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "rename", "replace"])
@pytest.mark.parametrize("number", [1, 3])
def test_killed_in_the_middle_of_writing(cache, call, number):
    """kill -9 at a chosen system call leaves nothing that a later process could take for whole."""
    code = program("""
        import signal
        name, number = sys.argv[1], int(sys.argv[2])
        real, count = getattr(os, name), 0

        def deadly(*arguments, **options):
            global count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, deadly)
        build.build("toy", SOURCES, KEY)
    """)
    child = run(code, call, number)
    child.communicate(timeout=30)
    assert child.returncode in (-signal.SIGKILL, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = build.build("toy", SOURCES, KEY)
        assert build.find(KEY) == module
    assert build.load(module.directory).driver.forward(3) == 7


def test_killed_at_any_time(cache):
    """Processes that publish without end die at random moments; whatever is there is whole."""
    code = program("""
        for number in range(10**9):
            build.build("toy", SOURCES | {"size.py": f"N = {number % 50}\\n"}, KEY)
    """)
    children = [run(code) for _ in range(4)]
    deadline = time.monotonic() + 60
    while len(list(cache.glob("modules/toy-*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    for child in children:
        time.sleep(0.05)
        child.kill()
        child.communicate()
    for entry in entries(cache):
        store.read(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load(build.build("toy", SOURCES, KEY)).driver.forward(3) == 7


def test_drafts_of_killed_processes_are_swept_later(cache):
    old, young = (cache / "modules" / f".tmp-host-1-{name}" for name in ("old", "young"))
    for draft in (old, young):
        draft.mkdir(parents=True)
        (draft / "kernel.py").touch()
    cache.chmod(0o700)
    (cache / "modules").chmod(0o700)
    os.utime(old, (1, 1))
    build.build("toy", SOURCES, KEY)
    assert (old.exists(), young.exists()) == (False, True)


def test_chaos_of_writers_and_vandals_never_gives_wrong_text(cache):
    """Four writers, while files are flipped, cut and deleted under them."""
    code = program("""
        warnings.simplefilter("ignore")
        for count in range(200):
            number = count % 5
            key = {"n": number}
            sources = SOURCES | {"size.py": f"N = {number}\\n"}
            module = build.find(key) or build.build("toy", sources, key)
            assert module.sources == sources
        print("fine")
    """)
    children = [run(code) for _ in range(4)]
    chance, harm = random.Random(7), 0
    vandals = [damage_flip, damage_truncate, damage_empty, damage_delete, damage_edit]
    while any(child.poll() is None for child in children):
        time.sleep(0.002)
        with contextlib.suppress(OSError, ValueError, IndexError):  # moved away under our hands
            victim = chance.choice(list(cache.glob("modules/toy-*/*")))
            chance.choice(vandals)(victim)
            harm += 1
    results = [child.communicate() for child in children]
    assert results == [("fine\n", "")] * 4
    assert harm > 5


def test_the_cache_may_vanish_while_in_use(cache):
    code = program("""
        warnings.simplefilter("ignore")  # half-deleted entries are damaged ones
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            module = build.build("toy", SOURCES, KEY)
            assert module.sources == SOURCES
            assert build.load(module).driver.forward(3) == 7
        print("fine")
    """)
    child = run(code)
    while child.poll() is None:
        subprocess.run(["rm", "-rf", *cache.glob("modules/*")], check=False)
        time.sleep(0.03)
    output, errors = child.communicate()
    assert output == "fine\n", errors


# Disks that refuse


def refuse(monkeypatch, code, folder):
    """Make every write below a folder fail, as root ignores mode bits."""
    real_open, real_mkdir = os.open, os.mkdir

    def checked_open(path, flags, *rest, **options):
        if flags & os.O_CREAT and str(path).startswith(str(folder)):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, flags, *rest, **options)

    def checked_mkdir(path, *rest, **options):
        if str(path).startswith(str(folder)):
            raise OSError(code, os.strerror(code), str(path))
        return real_mkdir(path, *rest, **options)

    monkeypatch.setattr(os, "open", checked_open)
    monkeypatch.setattr(os, "mkdir", checked_mkdir)


ERRORS = ["EROFS", "EACCES", "ENOSPC", "EDQUOT", "EIO", "ENAMETOOLONG", "EBUSY", "ESTALE"]


@pytest.mark.parametrize("name", ERRORS)
def test_a_disk_that_refuses_costs_one_warning(cache, monkeypatch, name):
    refuse(monkeypatch, getattr(errno, name), cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = build.build("toy", SOURCES, KEY)
        second = build.build("two", SOURCES, KEY | {"n": 2})
        assert build.find(KEY) == first
    one_warning(caught, "cannot use the cache")
    assert build.load(first).driver.forward(3) == build.load(second).driver.forward(3) == 7
    assert stat.S_IMODE(first.directory.parent.parent.stat().st_mode) == 0o700
    assert not cache.exists()


def test_a_warm_cache_works_when_it_can_only_be_read(cache, monkeypatch):
    module = build.build("toy", SOURCES, KEY)
    refuse(monkeypatch, errno.EROFS, cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.find(KEY) == module == build.build("toy", SOURCES, KEY)


def test_a_damaged_read_only_cache_is_rebuilt_elsewhere(cache, monkeypatch):
    module = build.build("toy", SOURCES, KEY)
    damage_flip(module.directory / "kernel.py")
    refuse(monkeypatch, errno.EROFS, cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert build.find(KEY) is None
        again = build.build("toy", SOURCES, KEY)
    one_warning(caught, "cannot use the cache")
    assert again.directory != module.directory
    assert build.load(again).driver.forward(3) == 7


def test_with_no_disk_at_all_modules_live_in_memory(monkeypatch):
    refuse(monkeypatch, errno.ENOSPC, "/")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = build.build("toy", SOURCES, KEY)
    one_warning(caught, "cannot use the cache")
    assert module.directory is None
    forward = build.load(module).driver.forward
    assert forward(3) == 7
    assert "kernel.double" in inspect.getsource(forward)


def test_temporary_folders_of_killed_processes_are_swept_later(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = {"dead": f"hsgen-{gone.pid}-a", "alive": f"hsgen-{os.getpid()}-a", "other": "hsgen-x-a"}
    folders = {name: tmp_path / folder for name, folder in names.items()}
    for folder in folders.values():
        folder.mkdir()
        os.utime(folder, (1, 1))
    private = store.private_directory()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert {name for name, folder in folders.items() if folder.exists()} == {"alive", "other"}


@is_root
@pytest.mark.parametrize("free", ["nothing", "a little"])
def test_a_full_tmpfs(tmp_path, monkeypatch, free):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "none", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        monkeypatch.setenv("HSGEN_CACHE_DIR", str(disk / "cache"))
        filler = b"x" * (1 << 20)
        with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", 0) as file:
            while True:
                file.write(filler)
        if free == "a little":
            os.truncate(disk / "filler", (disk / "filler").stat().st_size - 8192)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            modules = [build.build("toy", SOURCES, KEY | {"n": n}) for n in range(4)]
        one_warning(caught, "cannot use the cache")
        assert all(build.load(module).driver.forward(3) == 7 for module in modules)
        assert not list(disk.rglob(".tmp-*"))
        (disk / "filler").unlink()
        assert build.build("toy", SOURCES, KEY).directory.is_relative_to(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@is_root
def test_a_user_without_home_name_or_rights(cache, tmp_path):
    """A uid that no passwd file knows, no HOME, and mode bits that do count."""
    code = program("""
        os.setgid(54321), os.setuid(54321)
        module = build.build("toy", SOURCES, KEY)
        assert build.load(module).driver.forward(3) == 7
        print(module.directory)
    """)
    for drop in ("HSGEN_CACHE_DIR", "HOME"):
        cache.mkdir(mode=0o755, exist_ok=True)
        environment = {"XDG_CACHE_HOME": "", "TMPDIR": "/tmp", drop: ""}
        child = run(code, env={"HSGEN_CACHE_DIR": str(cache)} | environment, cwd="/")
        output, errors = child.communicate(timeout=30)
        if "ModuleNotFoundError" in errors or "No module named" in errors:
            pytest.skip("that user cannot read this checkout")
        assert child.returncode == 0, errors
        assert errors.count("RuntimeWarning") <= 1
        assert not output.startswith(str(cache))
    assert not list(cache.iterdir())


# Folders that others could write


@pytest.mark.parametrize("level", ["root", "kind", "entry"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folders_that_others_may_write_are_refused(cache, level, mode):
    module = build.build("toy", SOURCES, KEY)
    (module.directory / "kernel.py").write_text("planted = 1\n")
    folder = {"root": cache, "kind": cache / "modules", "entry": module.directory}[level]
    folder.chmod(mode)
    before = sorted(cache.rglob("*"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = build.build("toy", SOURCES, KEY)
    one_warning(caught, "writable by others")
    assert not again.directory.is_relative_to(cache)
    assert sorted(cache.rglob("*")) == before
    if level == "entry":
        with pytest.raises(BuildError, match="writable by others"):
            build.load(module.directory)


@is_root
def test_folders_of_someone_else_are_refused(cache):
    cache.mkdir()
    os.chown(cache, 54321, 54321)
    with pytest.warns(RuntimeWarning, match="belongs to uid 54321"):
        module = build.build("toy", SOURCES, KEY)
    assert not list(cache.iterdir())
    assert build.load(module).driver.forward(3) == 7


def test_a_link_of_one_s_own_to_a_larger_disk_is_followed(cache, tmp_path):
    larger = tmp_path / "larger"
    larger.mkdir(mode=0o700)
    cache.symlink_to(larger)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.build("toy", SOURCES, KEY).directory.is_relative_to(larger)


@is_root
def test_a_link_that_someone_else_made_is_refused(cache, tmp_path):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    cache.symlink_to(target)
    os.lchown(cache, 54321, 54321)
    with pytest.warns(RuntimeWarning, match="cannot use the cache"):
        build.build("toy", SOURCES, KEY)
    assert not list(target.iterdir())


def test_a_linked_kind_folder_is_refused(cache, tmp_path):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    cache.mkdir(mode=0o700)
    (cache / "modules").symlink_to(target)
    with pytest.warns(RuntimeWarning, match="cannot use the cache"):
        build.build("toy", SOURCES, KEY)
    assert not list(target.iterdir())


# The fence before import

HARMLESS = '''"""What emitted files really hold."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import kernel
from .kernel import double

BLOCK = tl.constexpr(16)
CONFIG = {"attend": {"BLOCK_M": 64, "num_warps": 4}}


@triton.jit
def piece(x, y: tl.constexpr):
    """Add."""
    return tl.where(x > y, tl.math.exp2(x), 0.0)


@triton.jit(do_not_specialize=["n"])
def attend(X, n, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    for start in tl.range(0, n, BLOCK_M):
        while start < n:
            tl.store(X + rows, piece(tl.load(X + rows, mask=rows < n, other=0.0), 1), mask=rows < n)


def forward(tensors, batch, config=None):
    """Allocate and launch."""
    q = tensors["q"]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"q: expected fp16 or bf16, got {q.dtype}")
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    steps = [double(i) for i in range(4)] + [kernel.SIZES[0]]
    grid = lambda meta: (triton.cdiv(q.shape[1], meta["BLOCK_M"]),)
    attend[grid](q, q.shape[1], **CONFIG["attend"])
    return o, {"selected": max(steps)}
'''

HARMFUL = {
    "plain import": "import os",
    "import under a name": "import os as triton",
    "import inside a function": "def f():\n    import subprocess",
    "from import": "from os import system",
    "parent import": "from .. import x",
    "torch submodule": "import torch.utils.cpp_extension",
    "torch from import": "from torch import load",
    "missing sibling": "from . import absent",
    "what a sibling imported": "from .other import tl",
    "star": "from .other import *",
    "sibling's module": "from . import other\nX = other.tl",
    "exec": "def f(x):\n    exec(x)",
    "eval": "def f(x):\n    return eval(x)",
    "compile": "def f(x):\n    return compile(x, '', 'exec')",
    "open": "def f():\n    return open('/etc/passwd')",
    "__import__": "X = __import__('os')",
    "getattr": "def f(x):\n    return getattr(x, 'a')",
    "globals": "def f():\n    return globals()",
    "a builtin rebound": "def f(exec):\n    return exec",
    "__builtins__": "X = __builtins__",
    "dunder attribute": "X = ().__class__",
    "private attribute": "import torch\nX = torch._C",
    "dunder in an f-string": "def f(x):\n    return f'{x.__class__}'",
    "format": "def f(x):\n    return '{0.__class__}'.format(x)",
    "torch.load": "import torch\n\n\ndef f():\n    return torch.load('x')",
    "torch.ops": "import torch\n\n\ndef f():\n    return torch.ops.load_library('x')",
    "torch.hub": "import torch\n\n\ndef f():\n    return torch.hub.load('x')",
    "torch as a value": "import torch\n\n\ndef f(g):\n    return g(torch)",
    "torch assigned": "import torch\nX = torch",
    "torch rebound": "import torch\n\n\ndef f(torch):\n    return torch.load",
    "torch attribute set": "import torch\n\n\ndef f():\n    torch.empty = 1",
    "triton.runtime": "import triton\nX = triton.runtime",
    "tl.core": "import triton.language as tl\nX = tl.core",
    "tl.math.core": "import triton.language as tl\nX = tl.math.core",
    "call at the top": "def f():\n    pass\n\n\nf()",
    "call in a constant": "def f():\n    pass\n\n\nX = f()",
    "call in a default": "def f():\n    pass\n\n\ndef g(x=f()):\n    pass",
    "call in a decorator": "def f(x):\n    return x\n\n\n@f(1)\ndef g():\n    pass",
    "loop at the top": "while True:\n    pass",
    "class": "class A:\n    pass",
    "global": "def f():\n    global X\n    X = 1",
    "try": "def f():\n    try:\n        pass\n    except ValueError:\n        pass",
    "async": "async def f():\n    pass",
    "yield": "def f():\n    yield 1",
    "match": "def f(x):\n    match x:\n        case _:\n            pass",
    "syntax": "def f(:",
    "nul": "X = 1\0",
    "deep": "X = " + "(" * 10_000,
    "injected name": "def x():\n    import os; os.system('id')\ndef y():\n    pass",
}


def test_what_emitted_files_hold_is_allowed():
    allowlist.check({"kernel.py": KERNEL, "driver.py": HARMLESS})


@pytest.mark.parametrize("text", HARMFUL.values(), ids=HARMFUL.keys())
def test_what_they_never_hold_is_refused(text, cache):
    other = "import triton.language as tl\n\nN = tl.constexpr(1)\n"
    with pytest.raises(BuildError, match=r"^driver\.py:\d+: "):
        build.build("toy", {"other.py": other, "driver.py": text + "\n"}, KEY)
    assert not cache.exists()


def test_a_decorator_is_only_triton_s():
    text = "def f(x):\n    return x\n\n\n@f\ndef g():\n    pass\n"
    with pytest.raises(BuildError):
        allowlist.check({"driver.py": text})


def test_files_that_import_each_other_are_refused():
    with pytest.raises(BuildError, match="import each other"):
        allowlist.check({"a.py": "from . import b\n", "b.py": "from . import a\n"})


def test_a_planted_entry_passes_the_fence_too(cache):
    """Whole by its own manifest, and still refused: the fence stands at each load."""
    entry = store.publish("modules", "toy", {"kernel.py": b"import os\n"}, KEY)
    with pytest.raises(BuildError, match="may not hold import of os"):
        build.load(entry.directory)


def test_triton_reads_kernels_from_memory(monkeypatch):
    """A full disk leaves no real file, which @triton.jit asks for."""
    pytest.importorskip("triton")
    refuse(monkeypatch, errno.ENOSPC, "/")
    with pytest.warns(RuntimeWarning):
        module = build.build("toy", {"kernel.py": KERNEL, "driver.py": HARMLESS}, KEY)
    assert module.directory is None
    attend = build.load(module).driver.attend
    assert "tl.program_id" in inspect.getsource(attend.fn)


@pytest.mark.parametrize(
    ("found", "words"),
    [("3.2.0", "expected Triton 3.4 or newer, got triton 3.2.0"), (None, "not installed")],
)
def test_triton_that_cannot_compile_is_refused(monkeypatch, found, words):
    def version(name):
        if found is None or name != "triton":
            raise build.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(build, "version", version)
    with pytest.raises(BuildError, match=words):
        build.triton_version()


def test_triton_of_today_is_taken(monkeypatch):
    monkeypatch.setattr(build, "version", lambda name: "3.10.0+git1")
    assert build.triton_version() == "triton 3.10.0+git1"
