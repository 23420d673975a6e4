"""Records of `tuned/`: their JSON line, and what a line must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_records import RECORD, record

from hsgen import tuned
from hsgen.spec import load

SLIPS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "future": ("schema", lambda data: data.update(schema=2)),
    "no schema": ("schema", lambda data: data.update(schema="1")),
    "a typo": ("alternate", lambda data: data.update(alternate=data.pop("alternates"))),
    "a field less": ("time", lambda data: data.pop("time")),
    "no kernels": ("kernels", lambda data: data.update(kernels={})),
    "another dtype": ("problem.dtype", lambda data: data["problem"].update(dtype="int8")),
    "a path": ("problem.spec", lambda data: data["problem"].update(spec="../nsa")),
    "no power of two": ("bucket.keys", lambda data: data["bucket"].update(keys=3000)),
    "no time": ("time.median_us", lambda data: data["time"].update(median_us=0)),
    "three warps": (
        "kernels.score.config",
        lambda data: data["kernels"]["score"]["config"].update(num_warps=3),
    ),
    "a default left out": (
        "kernels.score.config",
        lambda data: data["kernels"]["score"]["config"].pop("num_stages"),
    ),
    "a word for a number": (
        "kernels.score.config.BLOCK_T",
        lambda data: data["kernels"]["score"]["config"].update(BLOCK_T="16"),
    ),
    "a huge tile": (
        "kernels.score.config.BLOCK_T",
        lambda data: data["kernels"]["score"]["config"].update(BLOCK_T=1 << 21),
    ),
    "too many alternates": (
        "alternates",
        lambda data: data.update(alternates=data["alternates"] * 6),
    ),
}


def test_record_comes_back_from_its_line():
    line = tuned.dump(RECORD)
    assert "\n" not in line
    assert tuned.read(line) == RECORD
    assert tuned.dump(tuned.read(line)) == line


def test_line_does_not_depend_on_the_order_of_kernels():
    backwards = record(kernels=dict(reversed(RECORD.kernels.items())))
    assert tuned.dump(backwards) == tuned.dump(RECORD)


@pytest.mark.parametrize("name", SLIPS)
def test_slip_is_found_at_its_field(name: str):
    field, slip = SLIPS[name]
    data = json.loads(tuned.dump(RECORD))
    slip(data)
    with pytest.raises(tuned.RecordError) as found:
        tuned.read(json.dumps(data))
    assert found.value.field == field


@pytest.mark.parametrize("line", ["", "{", "[]", "null", "<<<<<<< main", "[" * 30000, "x" * 70000])
def test_what_is_no_object_is_no_record(line: str):
    with pytest.raises(tuned.RecordError):
        tuned.read(line)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_line_holds_what_json_does_not(value: float):
    with pytest.raises(tuned.RecordError):
        tuned.dump(record(time__median_us=value))


def test_what_could_not_be_read_is_not_written():
    with pytest.raises(tuned.RecordError, match=r"bucket\.keys"):
        tuned.dump(record(bucket__keys=3000))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_damage_gives_anything_but_a_record_or_its_error(data: st.DataObject):
    line = bytearray(tuned.dump(RECORD).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(line) - 1))
        line[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from(
                [b"", b"1", b"-", b"e9", b'"', b"{", b"null,", b"\\ud800", b"\xff", b"9" * 5000]
            )
        )
    try:
        found = tuned.read(bytes(line))
    except tuned.RecordError as error:
        assert error.message
    else:
        assert tuned.read(tuned.dump(found)) == found


def test_key_is_of_problem_bucket_and_environment():
    assert record(time__median_us=1.0, orders={"selected": "keys"}).key == RECORD.key
    others = [
        record(problem__dtype="fp16"),
        record(bucket__packed=True),
        record(environment__triton="3.5"),
        record(environment__l2="cold"),
    ]
    assert len({RECORD.key, *(other.key for other in others)}) == 5


@given(*[st.integers(1, 1 << 30)] * 3)
@settings(max_examples=50, deadline=None)
def test_bucket_holds_its_call(rows: int, keys: int, sequences: int):
    bucket = tuned.Bucket.of(rows, keys, sequences, False)
    for number, bound in ((rows, bucket.queries), (keys, bucket.keys)):
        assert bound // 2 < number <= bound
    assert tuned.Bucket.of(bucket.queries, bucket.keys, bucket.sequences, False) == bucket


def test_distance_counts_steps_of_two():
    bucket = tuned.Bucket.of(8192, 8192, 1, False)
    assert bucket.distance(bucket) == 0
    assert bucket.distance(tuned.Bucket.of(4096, 32768, 1, False)) == 3
    assert bucket.distance(tuned.Bucket.of(8192, 8192, 1, True)) == 8


def test_problem_is_of_a_bound_spec():
    spec = load("moba")
    problem = tuned.Problem.of(spec, "bf16")
    assert (problem.heads, problem.head_dim, problem.digest) == (
        (32, 32),
        (128, 128),
        spec.digest,
    )
    assert str(problem) == f"moba {spec.digest[:12]} bf16, heads 32/32, head dim 128/128"


def test_record_prints():
    assert str(RECORD).splitlines()[1] == (
        "  100 us (IQR 0.5, 20 runs), 1.50 times as fast as the start"
    )
