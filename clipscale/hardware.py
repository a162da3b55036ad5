"""The devices that plans and meters know: what they can do at most, how much they hold, how fast they are joined.

Peaks are of dense products, memory and its bandwidth as vendors name them. What a collective moves is a round figure
below what the links carry, of which only H100's comes from NCCL's tests. :data:`CATALOGUE` is all of them; importing
this imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from clipscale.errors import ConfigError

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Hardware:
    """A device, or for a CPU one process's share of it.

    ``words``: any of them in a device's own name makes it this one. ``peak``: FLOP/s by arithmetic, ``fp32``, ``bf16``
    or ``fp16``, without TF32. ``attained``: the share of the peak that products of a transformer's sizes reach in
    training, which is an assumption. Bandwidths are bytes per second: ``memory_bandwidth``; of a collective within one
    node, ``node_bandwidth``, and over several, ``network_bandwidth`` (NCCL's bus bandwidth); of copies from the host.
    ``hop_s`` is the latency of a step of a ring; ``launch_s`` the host's time to start an operation of eager PyTorch.
    ``reserve_bytes`` is taken by the driver, the context and NCCL.
    """

    name: str
    words: tuple[str, ...]
    peak: Mapping[str, float]
    attained: float
    memory_bytes: int
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    hop_s: float
    launch_s: float
    reserve_bytes: int
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is one."""
        return self.name != "cpu"

    @property
    def usable_bytes(self) -> int:
        """What a training process may fill: less the reserve, and a twentieth that the allocator cannot use."""
        return int((self.memory_bytes - self.reserve_bytes) * (0.95 if self.is_gpu else 0.9))


def _gpu(
    name: str, words: tuple[str, ...], fp32: float, half: float, attained: float, memory_gb: float, memory_tb_s: float,
    node_gb_s: float, network_gb_s: float, host_gb_s: float, source: str,
) -> Hardware:  # fmt: skip
    peak = {"fp32": fp32 * TERA, "bf16": half * TERA, "fp16": half * TERA}
    bandwidths = (memory_tb_s * TERA, node_gb_s * GIGA, network_gb_s * GIGA, host_gb_s * GIGA)
    # What vendors call a GB of a device's memory is 2^30 bytes.
    return Hardware(name, words, peak, attained, int(memory_gb * GIB), *bandwidths, 3e-6, 6e-6, 2 * GIB, source)


# fmt: off
_GPUS = [
    # Nodes of eight, joined by 8 x 200 Gb/s (A100) or 8 x 400 Gb/s.
    _gpu("b200", ("B200",), 80, 2250, 0.35, 180, 8.0, 800, 340, 50, "NVIDIA Blackwell brief, HGX B200, 1,000 W"),
    _gpu("h200", ("H200",), 67, 989, 0.40, 141, 4.8, 450, 340, 50, "NVIDIA H200 data sheet, SXM (and GH200)"),
    _gpu("h100", ("H100", "H800"), 67, 989, 0.40, 80, 3.35, 450, 340, 50, "NVIDIA H100 data sheet, SXM"),
    _gpu("a100", ("A100", "A800"), 19.5, 312, 0.50, 80, 2.04, 230, 160, 22, "NVIDIA A100 80GB data sheet, SXM"),
    _gpu("mi300x", ("MI300X",), 163.4, 1307, 0.30, 192, 5.3, 310, 320, 50, "AMD Instinct MI300X data sheet"),
]
_VARIANTS = [
    # Of the same names with something else beside it, which makes them others.
    _gpu("gh200", ("GH200",), 67, 989, 0.40, 96, 4.0, 450, 340, 400, "NVIDIA GH200 data sheet, 96 GB"),
    _gpu("h100_pcie", ("H100 PCIe",), 51, 756, 0.40, 80, 2.0, 50, 50, 50, "NVIDIA H100 data sheet, PCIe"),
    _gpu("h100_nvl", ("H100 NVL",), 60, 835, 0.40, 94, 3.9, 50, 50, 50, "NVIDIA H100 data sheet, NVL"),
    _gpu("a100_40gb", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 19.5, 312, 0.50, 40, 1.56, 230, 160, 22,
         "NVIDIA A100 40GB data sheet, SXM"),
]
_SMALLER = [
    _gpu("l40s", ("L40S",), 91.6, 362, 0.50, 48, 0.86, 20, 20, 22, "NVIDIA L40S data sheet"),
    _gpu("l40", ("L40",), 90.5, 181, 0.50, 48, 0.86, 20, 20, 22, "NVIDIA L40 data sheet"),
    _gpu("l4", ("L4",), 30.3, 121, 0.50, 24, 0.30, 10, 10, 12, "NVIDIA L4 data sheet"),
    _gpu("a40", ("A40",), 37.4, 150, 0.50, 48, 0.70, 20, 20, 22, "NVIDIA A40 data sheet"),
    _gpu("a10", ("A10",), 31.2, 125, 0.50, 24, 0.60, 10, 10, 22, "NVIDIA A10 data sheet"),
    _gpu("rtx4090", ("RTX 4090",), 82.6, 165, 0.50, 24, 1.01, 10, 10, 22, "NVIDIA Ada architecture white paper"),
]
# fmt: on

# Of one core: two fused multiply-adds of 8 fp32 numbers per cycle at 3 GHz (AVX2). Gloo on one machine copies.
_CORE = Hardware(
    "cpu", (), {"fp32": 96 * GIGA, "bf16": 150 * GIGA, "fp16": 96 * GIGA}, 0.6, 0, 15 * GIGA, 1 * GIGA, 0.5 * GIGA,
    10 * GIGA, 100e-6, 20e-6, 0, "a core with AVX2 at 3 GHz; memory is this machine's",
)  # fmt: skip

CATALOGUE: dict[str, Hardware] = {one.name: one for one in [*_VARIANTS, *_GPUS, *_SMALLER, _CORE]}


def find(name: str, processes: int = 1) -> Hardware:
    """A device by its name here, or by the name that its driver gives it; of a CPU, the share that one of ``processes``
    on this machine has. Raises ConfigError for one that is not known."""
    chosen = CATALOGUE.get(name.lower())
    if chosen is None:
        chosen = next((one for one in CATALOGUE.values() if any(word in name for word in one.words)), None)
    if chosen is None:
        raise ConfigError(f"--hardware {name}: not in the catalogue; choose from {', '.join(CATALOGUE)}")
    return chosen if chosen.is_gpu else _share_of_this_machine(chosen, processes)


def _share_of_this_machine(core: Hardware, processes: int) -> Hardware:
    cores = max(1, (os.cpu_count() or 1) // processes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
    peak = {name: cores * flops for name, flops in core.peak.items()}
    return replace(core, peak=peak, memory_bytes=memory, memory_bandwidth=core.memory_bandwidth * min(cores, 8))


def render() -> str:
    """Markdown: a row for every device."""
    lines = [
        "| `--hardware` | bf16, TFLOP/s | fp32 | reached | GiB | TB/s | in a node, GB/s | over nodes | source |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for one in [*_GPUS, *_VARIANTS, *_SMALLER, _CORE]:
        peaks = [f"{one.peak[name] / TERA:.4g}" for name in ("bf16", "fp32")]
        memory = [f"{one.memory_bytes / GIB:.0f}" if one.is_gpu else "", f"{one.memory_bandwidth / TERA:.3g}"]
        links = [f"{bandwidth / GIGA:g}" for bandwidth in (one.node_bandwidth, one.network_bandwidth)]
        cells = [f"`{one.name}`", *peaks, f"{one.attained:.0%}", *memory, *links, one.source]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
