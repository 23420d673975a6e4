"""The worker process that cross-compiles kernels; `resources.measure` starts it.

Reads one JSON object a line from stdin, writes one a line to stdout.  Needs no GPU and no torch.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from hsgen import build, tiling
from hsgen.target import BINARIES
from hsgen.workers import JsonObject

try:
    from triton.experimental.gluon._runtime import GluonASTSource
except ImportError:  # an older Triton, for which no kernel is written so
    GluonASTSource = ASTSource

MEMORY_LIMIT = 16 * 1024**3  # address space, bytes
MESSAGE_LIMIT = 2000
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until stdin ends.  Whatever a compiler prints goes to stderr."""
    _limit()
    with _own_stdout() as answers:
        for line in sys.stdin:
            try:
                answer = measure(json.loads(line))
            except Exception as error:  # noqa: BLE001 - the compiler's own errors have no common base
                answer = {"error": _message(error)}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def measure(request: JsonObject) -> JsonObject:
    """Compile one kernel and read its cost off the binary."""
    start = time.monotonic()
    compiled = _compile(request)
    seconds = time.monotonic() - start
    backend = request["target"][0]
    usage = _cuda_usage(compiled) if backend == "cuda" else hip_usage(compiled.asm["amdgcn"])
    return {
        **usage,
        "shared_bytes": usage.get("shared_bytes", 0) + compiled.metadata.shared,
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        "warps": compiled.metadata.num_warps,
        "seconds": seconds,
        "binary": base64.b64encode(compiled.asm[BINARIES[backend]]).decode(),
    }


def _compile(request: JsonObject) -> CompiledKernel:
    function = _function(request)
    order = function.arg_names
    if list(request["types"]) != order:
        raise TypeError(f"expected parameters {order}, got {list(request['types'])}")
    place = {name: (order.index(name),) for name in order}
    types = request["types"] | {
        name: tiling.type_of(*told) for name, told in request["tiles"].items()
    }
    source = source_of(function)(
        fn=function,
        signature=types,
        constexprs={place[name]: value for name, value in request["constants"].items()},
        attrs={place[name]: told for name, told in _attributes(function, request).items()},
    )
    return triton.compile(source, target=GPUTarget(*request["target"]), options=request["options"])


def source_of(function: JITFunction[Any]) -> type[ASTSource]:
    """How Triton takes a kernel: one in Gluon as such."""
    return GluonASTSource if function.is_gluon() else ASTSource


def _attributes(function: triton.JITFunction, request: JsonObject) -> dict[str, list[list[object]]]:
    """What is promised of arguments, as a launch says it: of one that it looked at and found nothing
    it says so too, which changes no binary, but the key of Triton's cache.
    """
    found: dict[str, list[list[object]]] = {}
    for param in function.params:
        kind = request["types"][param.name]
        if param.name in request["divisible"]:
            found[param.name] = [["tt.divisibility", 16]]
        elif kind[0] in "*iu" and not param.do_not_specialize:
            found[param.name] = []
    return found


def _function(request: JsonObject) -> triton.JITFunction:
    """Import the kernel from the text that was sent, under the path that people will look at."""
    text = json.dumps(request["sources"], sort_keys=True).encode()
    directory = request["directory"]
    module = build.Module(
        name="measured",
        digest=hashlib.sha256(text).hexdigest(),
        sources=request["sources"],
        directory=None if directory is None else Path(directory),
    )
    file = getattr(build.load(module), request["file"].removesuffix(".py"))
    return getattr(file, request["function"])


def _cuda_usage(compiled: CompiledKernel) -> dict[str, int]:
    """Registers and stack bytes a thread, by cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pattern = rf"Function {re.escape(compiled.metadata.name)}:\s+REG:(\d+) STACK:(\d+)"
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of {compiled.metadata.name}: {text}")
    return {"registers": int(found[1]), "spill_bytes": int(found[2]), "scalar_registers": 0}


HIP_NOTES = {
    "registers": "vgpr_count",  # accumulators included
    "scalar_registers": "sgpr_count",
    "spill_bytes": "private_segment_fixed_size",
    "shared_bytes": "group_segment_fixed_size",  # what a launch adds to it is the compiler's to say
}


def hip_usage(assembly: str) -> dict[str, int]:
    """What the notes of the code object say (`amdhsa.kernels`, for the loader); scratch a thread.

    The assembly has them as text: the binary, assembled from it, as MessagePack.
    """
    _, _, notes = assembly.partition("amdhsa.kernels:")
    found = {name: re.search(rf"\.{key}:\s+(\d+)", notes) for name, key in HIP_NOTES.items()}
    missing = [HIP_NOTES[name] for name, match in found.items() if match is None]
    if missing:
        raise ValueError(f"the code object does not say its {', '.join(missing)}")
    return {name: int(match[1]) for name, match in found.items() if match}


def _message(error: BaseException) -> str:
    """What went wrong, of the call furthest in: Triton's own words are but its callers'."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    return f"{type(error).__name__}: {text[:MESSAGE_LIMIT]}"


def _limit() -> None:
    """Bounded memory, no core files, and no life after the parent's."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _own_stdout() -> IO[str]:
    """Keep stdout for answers; print, and what C++ code prints, go to stderr instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
