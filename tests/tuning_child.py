"""A measuring process that loads nothing and misbehaves where it is told to: python tuning_child.py PLAN.

PLAN is JSON: `bad` says, by `kernel.NAME=value`, how a point with that value behaves; `log` is a file
that learns of each point that is asked for; `seconds` is how long one takes.
"""

import json
import os
import signal
import sys
import time
import zlib


def point_values(configs):
    return [
        f"{kernel}.{name}={value}"
        for kernel, values in configs.items()
        for name, value in values.items()
    ]


def microseconds(configs):
    """Some formula: the same each time, best for some point in the middle."""
    off = 0.0
    for value in point_values(configs):
        name, _, number = value.rpartition("=")
        wanted = zlib.crc32(name.encode()) % 5 + 1
        off += abs(int(number).bit_length() - wanted)
    return 100.0 + 7.0 * off


def result(times=None, failure=None, shapes=("8K",)):
    made = {"median_us": times, "iqr_us": 0.5, "runs": 20}
    return {
        "times": dict.fromkeys(shapes, made) if times is not None else {},
        "failure": failure,
        "check": {"trials": 2},
        "seconds": 0.01,
    }


def failed(kind, message):
    return result(failure={"kind": kind, "message": message, "kernel": "", "limit": ""})


def misbehave(how):
    """Six planted failures: three end the process, three are answers."""
    match how:
        case "illegal":
            return failed("ILLEGAL_ACCESS", "CUDA error: an illegal memory access was encountered")
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            print("compiling forever", file=sys.stderr, flush=True)
            time.sleep(3600)
        case "abort":
            print("assertion failed in the compiler", file=sys.stderr, flush=True)
            os.abort()
        case "resources":
            return failed(
                "OVER_SMEM", "out of resource: shared memory, Required: 300000, limit: 232448"
            )
        case "wrong":
            return failed("WRONG_NUMERIC", "one sequence: o: row [0, 1] is off by 0.5")
        case "timer":
            return result(-1.0)
        case "late":
            time.sleep(0.3)
    return None


def main():
    plan = json.loads(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "describe":
            answer = {
                "target": None,
                "gpus": 1,
                "made": {
                    "card": "none",
                    "torch": "0",
                    "driver": None,
                    "cuda": None,
                    "date": "2000-01-01",
                },
            }
        elif request["do"] == "shares":
            answer = {"ms": {}}
        elif request["do"] == "prove":
            answer = result() | {"check": {"error_at_length": 0.001}}
        elif request["do"] == "compare":
            answer = {
                "samples": [
                    [microseconds(p["configs"])] * request["rounds"] for p in request["points"]
                ]
            }
        else:
            how = next(
                (plan["bad"][v] for v in point_values(request["configs"]) if v in plan["bad"]), ""
            )
            if "log" in plan:
                with open(plan["log"], "a") as log:
                    log.write(json.dumps(request["configs"], sort_keys=True) + "\n")
            time.sleep(plan.get("seconds", 0.0))
            shapes = request["problem"]["shapes"]
            answer = misbehave(how) or result(microseconds(request["configs"]), shapes=shapes)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
