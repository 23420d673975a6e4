"""A measuring process on a GPU that is not there: kernels are compiled as launches do, and not run.

Answers which kernels it compiled, and which it found in Triton's cache.
"""

import json
import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hsgen import batch
from hsgen.measurer import shape_of
from hsgen.reference import tensor_shapes
from hsgen.runtime import compile_program
from hsgen.spec import parse
from hsgen.target import Target


class Utils:
    def load_binary(self, *_):
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232_448}


class Launcher:
    def __init__(self, *_):
        pass

    def __call__(self, *_):
        pass


class H100:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


def main():
    driver.set_active(H100())
    told = []
    knobs.compilation.listener = lambda **said: told.append((said["src"].name, said["cache_hit"]))
    for line in sys.stdin:
        request = json.loads(line)
        problem = request["problem"]
        spec, target = parse(problem["spec"]), Target(**json.loads(problem["target"]))
        program = compile_program(
            spec, target, torch.bfloat16, interpret=False, orders=request["orders"]
        )
        shape = shape_of(problem["shapes"][0])
        where = torch.device("cpu")
        sizes = tensor_shapes(spec, shape.sequences, shape.queries, shape.keys)
        x = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()}
        tokens = batch.dense(shape.sequences, shape.queries, shape.keys, where)
        program.driver.forward(x, tokens, request["configs"], None)
        print(json.dumps({"found": dict(told)}), flush=True)
        told.clear()


if __name__ == "__main__":
    main()
