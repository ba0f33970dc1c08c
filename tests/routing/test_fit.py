"""The fit score and its labels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from protocol.adverts import Hardware, OfferedCargo
from routing.fit import (
    DEFAULT_WEIGHTS,
    WEIGHTS,
    CargoNeeds,
    Fit,
    FitLabel,
    Machine,
    fit_of,
    fit_of_offer,
    gpu_bandwidth_mbps,
    score_of_offer,
)

CHAT = CargoNeeds("llmcpp", memory_mib=6000, vram_mib=6000, gpu="preferred")
GOOD_GPU = Machine(memory_mib=32_000, vram_mib=10_000, decode_tps=40.0, prefill_tps=2000.0, slots=4)

rates = st.floats(0, 1e9)
mib = st.integers(0, 1 << 30)
machines = st.builds(
    Machine,
    memory_mib=mib,
    vram_mib=mib,
    bandwidth_mbps=mib,
    decode_tps=rates,
    prefill_tps=rates,
    load=st.integers(0, 1_000_000),
    slots=st.integers(0, 1_000_000),
    load_permille=st.integers(0, 1000),
)
needs = st.builds(
    CargoNeeds,
    runtime=st.sampled_from([*WEIGHTS, "new-runtime"]),
    memory_mib=mib,
    vram_mib=mib,
    gpu=st.sampled_from(["none", "preferred", "required"]),
    weights_mib=mib,
)


def test_weights_are_those_published_and_each_sums_to_100() -> None:
    published = {
        "llmcpp": (50, 35, 15),
        "container": (30, 40, 30),
        "wasm": (25, 40, 35),
        "coreml": (45, 40, 15),
        "onnx": (45, 40, 15),
    }
    for runtime, (speed, fit, headroom) in published.items():
        weights = WEIGHTS[runtime]
        assert (weights.speed, weights.fit, weights.headroom) == (speed, fit, headroom)
    assert all(w.speed + w.fit + w.headroom == 100 for w in WEIGHTS.values())
    assert WEIGHTS["container"] == DEFAULT_WEIGHTS


def fit_using(percent: int) -> int:
    return fit_of(CHAT, replace(GOOD_GPU, vram_mib=CHAT.vram_mib * 100 // percent)).fit


def test_sixty_percent_beats_both_ninety_five_and_twenty() -> None:
    assert fit_using(60) == 100
    assert fit_using(60) > fit_using(95)
    assert fit_using(60) > fit_using(20)
    assert all(fit_using(a) <= fit_using(a + 1) for a in range(5, 60))
    assert all(fit_using(a) >= fit_using(a + 1) for a in range(61, 100))


def test_the_worked_example() -> None:
    fit = fit_of(CHAT, GOOD_GPU)
    assert fit == Fit(score=100, speed=100, fit=100, headroom=100, label=FitLabel.PERFECT)
    busy = fit_of(CHAT, replace(GOOD_GPU, load=2))
    assert (busy.headroom, busy.score) == (50, 92)  # (50*100 + 35*100 + 15*50) / 100, rounded to even


def test_labels() -> None:
    assert fit_of(CHAT, GOOD_GPU).label is FitLabel.PERFECT
    slow = replace(GOOD_GPU, decode_tps=8.0, prefill_tps=100.0)
    assert fit_of(CHAT, slow).label is FitLabel.GOOD
    no_gpu = replace(GOOD_GPU, vram_mib=0, memory_mib=10_000)
    assert fit_of(CHAT, no_gpu).label is FitLabel.GOOD  # it wants a GPU: never perfect without
    assert fit_of(replace(CHAT, gpu="none"), no_gpu).label is FitLabel.PERFECT
    full = replace(slow, load=4)
    assert fit_of(CHAT, full).label is FitLabel.MARGINAL
    tight = replace(slow, vram_mib=6500)
    assert fit_of(CHAT, tight).label is FitLabel.MARGINAL  # a tenth of the memory is no room
    assert fit_of(CHAT, replace(slow, vram_mib=5000)).label is FitLabel.UNFIT
    assert fit_of(replace(CHAT, gpu="required"), no_gpu) == Fit(0, 100, 0, 100, FitLabel.UNFIT)


def test_the_wait_for_the_first_token_counts() -> None:
    """A machine that decodes well but reads slowly is slow: a person waits 17 s for its first token."""
    slow_reader = replace(GOOD_GPU, prefill_tps=30.0)
    assert fit_of(CHAT, slow_reader).speed < 50
    assert fit_of(CHAT, replace(GOOD_GPU, decode_tps=20.0)).speed > 60


def test_speed_is_estimated_from_bandwidth() -> None:
    unmeasured = Machine(
        memory_mib=32_000, vram_mib=10_000, bandwidth_mbps=gpu_bandwidth_mbps("NVIDIA GeForce RTX 3080")
    )
    weak = replace(unmeasured, bandwidth_mbps=gpu_bandwidth_mbps("GTX 1060 6GB"))
    assert gpu_bandwidth_mbps("NVIDIA GeForce RTX 3080") == 760_000
    assert gpu_bandwidth_mbps("Apple M3 Max") == 400_000
    assert gpu_bandwidth_mbps("Matrox G200") == 0
    assert fit_of(CHAT, unmeasured).speed > fit_of(CHAT, weak).speed > 0
    assert fit_of(CHAT, Machine()).speed > 0  # the usual CPU
    assert fit_of(CargoNeeds("wasm"), Machine()).speed == 0  # nothing is known at all


@given(needs=needs, machine=machines)
def test_any_figures_give_a_score(needs: CargoNeeds, machine: Machine) -> None:
    fit = fit_of(needs, machine)
    assert all(0 <= value <= 100 for value in (fit.score, fit.speed, fit.fit, fit.headroom))
    if fit.label is FitLabel.PERFECT:
        assert fit.fit >= 80
        assert fit.speed >= 60
        assert needs.gpu == "none" or machine.vram_mib > 0
    if fit.label is FitLabel.GOOD:
        assert fit.headroom >= 20


@given(needs=needs, machine=machines, more=st.integers(1, 1000))
def test_faster_or_idler_never_scores_less(needs: CargoNeeds, machine: Machine, more: int) -> None:
    before = fit_of(needs, machine).score
    if machine.decode_tps > 0 and machine.prefill_tps > 0:
        assert fit_of(needs, replace(machine, decode_tps=machine.decode_tps + more)).score >= before
        assert fit_of(needs, replace(machine, prefill_tps=machine.prefill_tps + more)).score >= before
    assert fit_of(needs, replace(machine, load=machine.load + more)).score <= before
    assert (
        fit_of(needs, replace(machine, load_permille=min(1000, machine.load_permille + more))).score <= before
    )


@given(
    machine=machines, needs=needs, decode=st.floats(0, 1e9), prefill=st.floats(0, 1e9), slots=st.integers(0, 10)
)
def test_the_quick_score_of_an_offer_is_the_same(
    machine: Machine, needs: CargoNeeds, decode: float, prefill: float, slots: int
) -> None:
    hardware = Hardware(1, machine.memory_mib, "", machine.vram_mib, machine.bandwidth_mbps)
    offered = OfferedCargo(
        "x", "m", "1", needs.runtime, "ready", 1, slots, 0, 0, decode, prefill,
        memory_mib=needs.memory_mib, vram_mib=needs.vram_mib,
    )  # fmt: skip
    load, busy = machine.load, machine.load_permille
    assert score_of_offer(offered, hardware, load, busy) == fit_of_offer(offered, hardware, load, busy).score


@pytest.mark.parametrize("tiny", [5e-324, 1e-300])
def test_absurd_rates_do_no_harm(tiny: float) -> None:
    for machine in (
        Machine(decode_tps=tiny, prefill_tps=tiny),
        Machine(decode_tps=tiny, prefill_tps=1e9),
        Machine(decode_tps=1e9, prefill_tps=tiny),
    ):
        assert fit_of(CHAT, machine).speed == 0
