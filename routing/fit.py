"""How well a machine fits a Cargo: 0 to 100, and a word for people.

The reference (product.md, section 4) gives three dimensions, their weights for five runtimes, and the labels in
part. What it leaves open is decided here:

- *Speed*: time for a typical exchange at the target rates, over the time that this machine needs for it.
  Prefill counts with decode, because on small machines the wait for the first token is most of what a
  person notices. Rates that nobody measured are estimated from memory bandwidth: each token reads all
  weights once.
- *Fit*: use of the memory that matters (graphics memory if the Cargo uses a GPU there, else main memory),
  best at 60 %: 100 there, straight down to 40 at nothing (a machine wasted) and to 30 at all of it (no room
  for a longer context). More than all: it does not run.
- *Headroom*: share of slots that are free, and not more than the machine's own idleness.
- `diffusers` has no published weights: 50/40/10, like the other runtimes that saturate a GPU, with little
  headroom because one image at a time fills it. A runtime that nobody knows is weighed like a container,
  the default.
- *Good* is published as "20 %+ headroom", cut off. Both readings are asked for: a fifth of the capacity for
  work and a fifth of the memory are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final

import msgspec
from msgspec.structs import replace

from protocol.adverts import Hardware, OfferedCargo

SWEET_SPOT_PERCENT: Final = 60
FIT_AT_NOTHING: Final = 40
FIT_AT_ALL: Final = 30

#: Where neither the Cargo's needs nor the machine's memory are known: neither good nor bad.
UNKNOWN_FIT: Final = 50
ALL_PERCENT: Final = 100

#: A chat that feels immediate: 30 tokens/s is what the reference shows for its chat Cargo on a usual GPU,
#: faster than anyone reads; a prompt of 512 tokens is read in about a second.
TARGET_DECODE_TPS: Final = 30.0
TARGET_PREFILL_TPS: Final = 500.0
TYPICAL_PROMPT_TOKENS: Final = 512
TYPICAL_OUTPUT_TOKENS: Final = 256

#: Of the bandwidth on the data sheet, what decoding gets (llama.cpp: 50 to 75 %).
BANDWIDTH_SHARE: Final = 0.6

#: Prefill is bound by arithmetic; without a measurement, this many times the decode rate (on CPUs 3 to 6 times,
#: measured; on GPUs far more, which only makes the estimate cautious).
PREFILL_PER_DECODE: Final = 4.0

PERFECT_FIT: Final = 80
PERFECT_SPEED: Final = 60
GOOD_HEADROOM: Final = 20
GOOD_MEMORY_USE_PERCENT: Final = 80

#: Memory bandwidth in GB/s as on the makers' data sheets, by a part of the name; longer names are tried first.
GPU_BANDWIDTH_GBPS: Final[Mapping[str, int]] = MappingProxyType({
    "rtx 5090": 1792, "rtx 5080": 960, "rtx 5070 ti": 896, "rtx 5070": 672, "rtx 5060": 448,
    "rtx 4090": 1008, "rtx 4080 super": 736, "rtx 4080": 717, "rtx 4070 ti": 504, "rtx 4070": 504,
    "rtx 4060 ti": 288, "rtx 4060": 272,
    "rtx 3090": 936, "rtx 3080": 760, "rtx 3070": 448, "rtx 3060": 360, "rtx 3050": 224,
    "rtx 2080 ti": 616, "rtx 2080": 448, "rtx 2070": 448, "rtx 2060": 336,
    "gtx 1080 ti": 484, "gtx 1080": 320, "gtx 1070": 256, "gtx 1060": 192, "gtx 1660": 192,
    "h200": 4800, "h100": 3350, "a100": 1935, "l40": 864, "l4": 300, "a10": 600, "t4": 320, "v100": 900,
    "mi300": 5300, "mi250": 3277, "rx 7900 xtx": 960, "rx 7900": 800, "rx 7800": 624,
    "rx 6800": 512, "rx 6700": 384,
    "m4 max": 546, "m4 pro": 273, "m4": 120, "m3 max": 400, "m3 pro": 150, "m3": 100,
    "m2 ultra": 800, "m2 max": 400, "m2 pro": 200, "m2": 100, "m1 ultra": 800, "m1 max": 400,
    "m1 pro": 200, "m1": 68,
})  # fmt: skip
_GPU_NAMES: Final = tuple(sorted(GPU_BANDWIDTH_GBPS, key=lambda name: (-len(name), name)))

#: Two channels of DDR4, as in most desktops; and the slowest usual graphics card.
CPU_BANDWIDTH_MBPS: Final = 40_000
GPU_BANDWIDTH_MBPS: Final = 192_000


@dataclass(frozen=True, slots=True)
class Weights:
    """Percent, together 100."""

    speed: int
    fit: int
    headroom: int


WEIGHTS: Final[Mapping[str, Weights]] = MappingProxyType(
    {
        "llmcpp": Weights(50, 35, 15),
        "container": Weights(30, 40, 30),
        "wasm": Weights(25, 40, 35),
        "coreml": Weights(45, 40, 15),
        "onnx": Weights(45, 40, 15),
        "diffusers": Weights(50, 40, 10),
    }
)
DEFAULT_WEIGHTS: Final = WEIGHTS["container"]


class FitLabel(IntEnum):
    """Ordered: more is better."""

    UNFIT = 0
    MARGINAL = 1
    GOOD = 2
    PERFECT = 3


class CargoNeeds(msgspec.Struct, frozen=True, gc=False):
    """What a Cargo takes. `gpu`: none, preferred, required. `weights_mib`: what is read per token (0: unknown).
    Targets in tokens/s.
    """

    runtime: str
    memory_mib: int = 0
    vram_mib: int = 0
    gpu: str = "none"
    weights_mib: int = 0
    target_decode_tps: float = TARGET_DECODE_TPS
    target_prefill_tps: float = TARGET_PREFILL_TPS


class Machine(msgspec.Struct, frozen=True, gc=False):
    """What it has, and how busy it is. Rates in tokens/s for this Cargo, 0: not measured. `load`, `slots`:
    jobs there and jobs that it can run at once.
    """

    memory_mib: int = 0
    vram_mib: int = 0
    bandwidth_mbps: int = 0
    decode_tps: float = 0.0
    prefill_tps: float = 0.0
    load: int = 0
    slots: int = 1
    load_permille: int = 0


class Fit(msgspec.Struct, frozen=True, gc=False):
    """Each 0 to 100; `score` is their weighted mean."""

    score: int
    speed: int
    fit: int
    headroom: int
    label: FitLabel


def fit_of(needs: CargoNeeds, machine: Machine) -> Fit:
    """Total: any figures give a score."""
    on_gpu = needs.gpu != "none" and machine.vram_mib > 0
    needed, there = (needs.vram_mib, machine.vram_mib) if on_gpu else (needs.memory_mib, machine.memory_mib)
    use = _use_percent(needed, there)
    decode_tps, prefill_tps = _rates(needs, machine, on_gpu=on_gpu)
    speed = _speed(decode_tps, prefill_tps, needs.target_decode_tps, needs.target_prefill_tps)
    fit, headroom = _sweet_spot(use), _headroom(machine.load, machine.slots, machine.load_permille)
    if use > ALL_PERCENT or (needs.gpu == "required" and not on_gpu):
        return Fit(0, speed, 0, headroom, FitLabel.UNFIT)
    score = _score(needs.runtime, speed, fit, headroom)
    label = FitLabel.MARGINAL
    if fit >= PERFECT_FIT and speed >= PERFECT_SPEED and (on_gpu or needs.gpu == "none"):
        label = FitLabel.PERFECT
    elif headroom >= GOOD_HEADROOM and use <= GOOD_MEMORY_USE_PERCENT:
        label = FitLabel.GOOD
    return Fit(score, speed, fit, headroom, label)


def score_of_offer(offered: OfferedCargo, hardware: Hardware, load: int, load_permille: int = 0) -> int:
    """The score of a Cargo that an Island has already, from what its advert says, which `fit_of` would give
    too. Placement asks this of each candidate for each job.
    """
    if offered.vram_mib and hardware.vram_mib:
        use = _use_percent(offered.vram_mib, hardware.vram_mib)
    else:
        use = _use_percent(offered.memory_mib, hardware.memory_mib)
    if use > ALL_PERCENT:
        return 0
    decode_tps, prefill_tps = offered.decode_tps, offered.prefill_tps
    if decode_tps <= 0 or prefill_tps <= 0:
        needs, machine = _as_needs_and_machine(offered, hardware)
        decode_tps, prefill_tps = _rates(needs, machine, on_gpu=bool(offered.vram_mib and hardware.vram_mib))
    speed = _speed(decode_tps, prefill_tps, TARGET_DECODE_TPS, TARGET_PREFILL_TPS)
    headroom = _headroom(load, offered.slots, load_permille)
    return _score(offered.runtime, speed, _sweet_spot(use), headroom)


def fit_of_offer(offered: OfferedCargo, hardware: Hardware, load: int, load_permille: int = 0) -> Fit:
    """Of a Cargo that an Island has already, from what its advert says."""
    needs, machine = _as_needs_and_machine(offered, hardware)
    return fit_of(needs, replace(machine, load=load, load_permille=load_permille))


def gpu_bandwidth_mbps(name: str) -> int:
    """From the GPU's name, MB/s; 0 if it is not known."""
    lower = name.lower().replace("geforce ", "").replace("radeon ", "")
    for known in _GPU_NAMES:
        if known in lower:
            return GPU_BANDWIDTH_GBPS[known] * 1000
    return 0


def _as_needs_and_machine(offered: OfferedCargo, hardware: Hardware) -> tuple[CargoNeeds, Machine]:
    needs = CargoNeeds(
        runtime=offered.runtime,
        memory_mib=offered.memory_mib,
        vram_mib=offered.vram_mib,
        gpu="preferred" if offered.vram_mib else "none",
    )
    machine = Machine(
        memory_mib=hardware.memory_mib,
        vram_mib=hardware.vram_mib,
        bandwidth_mbps=hardware.bandwidth_mbps,
        decode_tps=offered.decode_tps,
        prefill_tps=offered.prefill_tps,
        slots=offered.slots,
    )
    return needs, machine


def _rates(needs: CargoNeeds, machine: Machine, *, on_gpu: bool) -> tuple[float, float]:
    """Decode and prefill in tokens/s, measured or estimated; 0: nothing is known."""
    decode = machine.decode_tps
    if decode <= 0:
        weights_mib = needs.weights_mib or (needs.vram_mib if on_gpu else needs.memory_mib)
        bandwidth = machine.bandwidth_mbps or (GPU_BANDWIDTH_MBPS if on_gpu else CPU_BANDWIDTH_MBPS)
        decode = BANDWIDTH_SHARE * bandwidth / weights_mib if weights_mib > 0 else 0.0
    return decode, machine.prefill_tps if machine.prefill_tps > 0 else PREFILL_PER_DECODE * decode


def _speed(decode: float, prefill: float, target_decode: float, target_prefill: float) -> int:
    if decode <= 0 or prefill <= 0:
        return 0
    target = TYPICAL_PROMPT_TOKENS / target_prefill + TYPICAL_OUTPUT_TOKENS / target_decode
    # `target / actual` with both multiplied by the rates: the smallest of floats must not divide.
    actual = TYPICAL_PROMPT_TOKENS * decode + TYPICAL_OUTPUT_TOKENS * prefill
    return min(100, round(100 * target * decode * prefill / actual)) if actual > 0 else 0


def _use_percent(needed: int, there: int) -> int:
    """How much of the memory it takes, rounded up; negative: unknown."""
    return -(-100 * needed // there) if needed > 0 and there > 0 else -1


def _sweet_spot(use_percent: int) -> int:
    if use_percent < 0:
        return UNKNOWN_FIT
    if use_percent > ALL_PERCENT:
        return 0
    if use_percent <= SWEET_SPOT_PERCENT:
        return FIT_AT_NOTHING + (100 - FIT_AT_NOTHING) * use_percent // SWEET_SPOT_PERCENT
    over = use_percent - SWEET_SPOT_PERCENT
    return 100 - (100 - FIT_AT_ALL) * over // (100 - SWEET_SPOT_PERCENT)


def _headroom(load: int, slots: int, load_permille: int) -> int:
    slots = slots or 1
    free = 100 * (slots - load) // slots if load < slots else 0
    return min(free, 100 - load_permille // 10)


def _score(runtime: str, speed: int, fit: int, headroom: int) -> int:
    weights = WEIGHTS.get(runtime, DEFAULT_WEIGHTS)
    return round((weights.speed * speed + weights.fit * fit + weights.headroom * headroom) / 100)
