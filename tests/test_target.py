"""Targets by name, by architecture, and from what a driver says."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest

from hsgen.errors import ArgumentError
from hsgen.target import A100, B200, H100, MI300X, TARGETS, Target, from_properties, target_names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "h100"),
        ("H100", "h100"),
        ("NVIDIA H100", "h100"),
        ("sm_90", "h100"),
        ("sm90", "h100"),
        ("sm_90a", "h100"),
        ("h200", "h200"),
        ("sm_80", "a100"),
        ("4090", "rtx 4090"),
        ("rtx4090", "rtx 4090"),
        ("NVIDIA GeForce RTX 4090", "rtx 4090"),
        ("sm_89", "rtx 4090"),
        ("sm_100", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("gfx942", "mi300x"),
    ],
)
def test_names_that_people_type(text, name):
    assert Target.named(text).name == name


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx 4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_that_drivers_say(card, name):
    assert Target.of_card(card).name == name


def test_card_of_no_known_kind():
    with pytest.raises(ArgumentError, match="unknown card 'Tesla T4'"):
        Target.of_card("Tesla T4")


def test_every_suggested_name_is_found():
    assert all(Target.named(name) in TARGETS for name in target_names())


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ArgumentError, match="unknown target 'h10'") as caught:
        Target.named("h10")
    assert "did you mean 'h100'" in str(caught.value)
    assert "sm_100" in str(caught.value)


@pytest.mark.parametrize("text", ["", "   ", "../../x", "nvidia", "sm_", "\x00", "a" * 10_000])
def test_nonsense_is_an_error_not_a_card(text):
    with pytest.raises(ArgumentError):
        Target.named(text)


def test_shared_memory_limits_are_those_of_the_driver():
    limits = {target.name: target.smem_per_block for target in TARGETS}
    assert limits["h100"] == limits["b200"] == 232_448
    assert limits["a100"] == 166_912
    assert limits["rtx 4090"] == 101_376
    assert limits["mi300x"] == 65_536


def test_block_and_system_share_fit_a_multiprocessor():
    assert all(t.smem_per_block + t.smem_reserved <= t.smem_per_sm for t in TARGETS)


def test_three_tf32_passes_are_a_third_of_the_rate():
    assert H100.peak("tf32x3") == pytest.approx(H100.peak_tf32 / 3)
    assert A100.peak("fp8") == 0
    assert B200.peak("bf16") > H100.peak("bf16")


def test_targets_are_frozen_values():
    with pytest.raises(FrozenInstanceError):
        H100.sms = 1
    assert len({*TARGETS, Target.named("sm_90")}) == len(TARGETS)


def properties(**changes):
    said = {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "shared_memory_per_block_optin": 232_448,
        "shared_memory_per_multiprocessor": 233_472,
        "regs_per_multiprocessor": 65_536,
        "max_threads_per_multi_processor": 2048,
        "L2_cache_size": 52_428_800,
    }
    return SimpleNamespace(**said | changes)


def test_a_present_card_keeps_the_rates_of_its_kind():
    target = from_properties(properties(), "cuda")
    assert target.name == "NVIDIA H100 80GB HBM3"
    assert (target.peak_bf16, target.bandwidth) == (H100.peak_bf16, H100.bandwidth)
    assert target.label == "sm_90"


def test_driver_clock_and_width_give_the_bandwidth():
    target = from_properties(properties(memory_clock_rate=2_619_000, memory_bus_width=5120), "cuda")
    assert target.bandwidth == pytest.approx(3.35e12, rel=0.01)


def test_a_slice_of_a_card_is_slower_in_proportion():
    target = from_properties(properties(name="H100 MIG 1g", multi_processor_count=33), "cuda")
    assert target.peak_bf16 == pytest.approx(H100.peak_bf16 / 4)
    assert target.sms == 33


def test_an_unknown_card_of_a_known_architecture_is_described():
    lacking = SimpleNamespace(name="X", major=8, minor=0, multi_processor_count=54)
    target = from_properties(lacking, "cuda")
    assert (target.smem_per_block, target.sms) == (A100.smem_per_block, 54)


def test_an_unknown_architecture_is_an_error():
    with pytest.raises(ArgumentError, match="got architecture 75"):
        from_properties(properties(name="Tesla T4", major=7, minor=5), "cuda")


def test_importing_targets_imports_no_torch():
    code = "import hsgen.target, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_gpu_current_says_what_to_do():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        assert Target.current().sms > 0
        return
    with pytest.raises(ArgumentError, match="no GPU"):
        Target.current()


# AMD


def test_an_mi300x_in_the_words_of_the_others():
    """A workgroup is a block, a wave a warp, a compute unit a multiprocessor, LDS shared memory."""
    assert (MI300X.label, MI300X.binary, MI300X.warp_size, MI300X.sms) == (
        "gfx942",
        "hsaco",
        64,
        304,
    )
    assert MI300X.smem_per_block == 65_536
    assert MI300X.max_warps_per_block == 16
    assert H100.max_warps_per_block == 32
    assert MI300X.peak("bf16") / MI300X.bandwidth == pytest.approx(247, rel=0.01)


def test_a_present_amd_card_is_known_by_its_architecture():
    said = properties(
        name="AMD Instinct MI300X",
        gcnArchName="gfx942:sramecc+:xnack-",
        multi_processor_count=304,
        shared_memory_per_block_optin=65_536,
        shared_memory_per_multiprocessor=65_536,
        regs_per_multiprocessor=0,
    )
    target = from_properties(said, "hip")
    assert replace(target, name="mi300x", l2_bytes=MI300X.l2_bytes) == MI300X
    with pytest.raises(ArgumentError, match="got architecture gfx1100"):
        from_properties(properties(name="RX 7900", gcnArchName="gfx1100"), "hip")


def test_float32_keeps_its_digits_in_the_way_that_each_compiler_knows():
    assert {target.dot_precision for target in TARGETS if target.backend == "cuda"} == {"tf32x3"}
    assert MI300X.dot_precision == "ieee"
    assert MI300X.peak("fp32") < MI300X.peak("tf32")
