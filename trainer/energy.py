"""An estimate of the energy of a training run from wall time and the nominal power of its GPUs. Imports no torch."""

from __future__ import annotations

from typing import Any

# Watts by the name that CUDA reports: the maximum power of the vendor's data sheet. A name that stands for variants of
# different power is left out.
NOMINAL_WATTS = {
    "NVIDIA A10": 150,
    "NVIDIA A100 80GB PCIe": 300,
    "NVIDIA A100-PCIE-40GB": 250,
    "NVIDIA A100-SXM4-40GB": 400,
    "NVIDIA A100-SXM4-80GB": 400,
    "NVIDIA A30": 165,
    "NVIDIA A40": 300,
    "NVIDIA B200": 1000,
    "NVIDIA GeForce RTX 3090": 350,
    "NVIDIA GeForce RTX 4090": 450,
    "NVIDIA GeForce RTX 5090": 575,
    "NVIDIA H100 80GB HBM3": 700,
    "NVIDIA H100 PCIe": 350,
    "NVIDIA H200": 700,
    "NVIDIA L4": 72,
    "NVIDIA L40": 300,
    "NVIDIA L40S": 350,
    "Tesla T4": 70,
    "Tesla V100-SXM2-16GB": 300,
    "Tesla V100-SXM2-32GB": 300,
}


def estimate(device: str | None, count: int, seconds: float | None) -> dict[str, Any]:
    """Kilowatt-hours (`kwh`, None if the power or the time is unknown), and their `basis` in words.

    Args:
        device: as CUDA names it, "cpu", or None if it was not recorded.
        count: the number of such devices.
        seconds: wall time.
    """
    if device not in NOMINAL_WATTS:
        said = "the device was not recorded" if device is None else f"no nominal power is known for {device}"
        return {"kwh": None, "basis": said}
    if seconds is None:
        return {"kwh": None, "basis": "the wall time was not recorded"}
    watts = NOMINAL_WATTS[device]
    return {
        "kwh": round(count * watts * seconds / 3.6e6, 6),
        "basis": f"estimate, not measured: {count} × {watts} W, the nominal power of {device}, for all of the "
        f"{seconds / 3600:.2f} h of wall time; without hosts, network and cooling",
    }
