"""The cost model: what a collective and an op take on a given machine, as polynomials in the token count T.

A collective over ``n`` ranks takes ``latency + wire bytes / bandwidth``. Reduce-scatter and all-gather move
``(n-1)/n`` of the full value, a ring all-reduce twice that (Thakur, Rabenseifner, Gropp, "Optimization of
collective communication operations in MPICH", 2005). An op takes ``FLOPs / flops + bytes / memory bandwidth``:
the sum, not the maximum, so that costs stay polynomial in T.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpcompile.errors import OptionError, nearest

PICOSECONDS = 10**12


@dataclass(frozen=True)
class HardwareProfile:
    """A machine, as far as placement needs it.

    Args:
        name: the preset's name.
        bandwidth: bytes/s that one rank sends (and receives) in a reduce-scatter or all-gather.
        latency: seconds per reduce-scatter or all-gather, launch included.
        all_reduce_latency: seconds per all-reduce, launch included; less than two ``latency`` where one kernel
            does both halves.
        flops: dense bf16 FLOP/s of one rank that matrix products reach.
        memory_bandwidth: bytes/s of device memory that elementwise ops reach.
        source: where the numbers come from.
    """

    name: str
    bandwidth: float
    latency: float
    all_reduce_latency: float
    flops: float
    memory_bandwidth: float
    source: str

    def seconds_per_byte(self, size: int) -> float:
        """Seconds per byte of the full value in a reduce-scatter or all-gather; an all-reduce takes two.

        On the wire, and read and written once in memory: packing, padding and unpacking are copies.
        """
        return (size - 1) / size / self.bandwidth + 2 / self.memory_bandwidth

    def compute(self, flops: float, moved_bytes: float) -> float:
        """Seconds of an op on one rank."""
        return flops / self.flops + moved_bytes / self.memory_bandwidth


_DATASHEET = "vendor data sheet peak, times 0.6 (FLOP/s), 0.8 (memory) and 0.8 (link); latency typical of the library"

_HCCS = "HCCS 196 GB/s per direction"
_NVLINK = "NVLink 4 450 GB/s per direction"

# name, bandwidth, latency, all-reduce latency, FLOP/s, memory bandwidth, source
PROFILES = {
    p.name: p
    for p in (
        HardwareProfile("ascend-a2", 157e9, 20e-6, 30e-6, 225e12, 1.28e12, f"910B, {_HCCS}; {_DATASHEET}"),
        HardwareProfile("ascend-a3", 157e9, 20e-6, 30e-6, 225e12, 1.28e12, f"910C die, {_HCCS}; {_DATASHEET}"),
        HardwareProfile("h100-nvlink", 360e9, 12e-6, 16e-6, 593e12, 2.68e12, f"H100 SXM, {_NVLINK}; {_DATASHEET}"),
        HardwareProfile("h200-nvlink", 360e9, 12e-6, 16e-6, 593e12, 3.84e12, f"H200 SXM, {_NVLINK}; {_DATASHEET}"),
        HardwareProfile("pcie", 25e9, 20e-6, 32e-6, 185e12, 0.69e12, f"L40S, PCIe 4.0 x16 32 GB/s; {_DATASHEET}"),
        HardwareProfile("gloo", 1e9, 200e-6, 300e-6, 0.1e12, 10e9, "gloo over loopback, order of magnitude"),
    )
}


def profile(name: str | HardwareProfile) -> HardwareProfile:
    """The preset called ``name``. Raises :class:`OptionError` with the nearest name if there is none."""
    if isinstance(name, HardwareProfile):
        return name
    if name not in PROFILES:
        raise OptionError(f"unknown hardware profile {name!r}{nearest(name, PROFILES)}")
    return PROFILES[name]
