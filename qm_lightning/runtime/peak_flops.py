"""What devices can compute at best, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch

# TFLOP/s of dense products from the makers' data sheets: (bf16 and fp16, fp32 without tensor cores).
# The first name that occurs in the device's name counts, so longer names come first.
_TERA: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 67.0),
    ("H200", 989.4, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 67.0),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("A10", 125.0, 31.2),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
)


def peak_flops(device_name: str, precision: str, tf32: bool = False) -> float | None:
    """Largest FLOP/s of a device in a precision.

    Args:
        device_name: as ``torch.cuda.get_device_name`` says it.
        precision: the trainer's, e.g. ``bf16-mixed`` or ``32-true``.
        tf32: whether fp32 products run on tensor cores (``torch.set_float32_matmul_precision("high")``).

    Returns:
        FLOP/s, or ``None`` for a device or a precision that is not in the table.
    """
    for name, narrow, full in _TERA:
        if name.lower() in device_name.lower():
            if precision.startswith(("bf16", "16")):
                return narrow * 1e12
            if precision.startswith("32"):
                return (narrow / 2 if tf32 and name not in ("V100", "T4") else full) * 1e12
            return None
    return None


def peak_of(device: torch.device, precision: str) -> float | None:
    """``peak_flops`` of a torch device; ``None`` for a CPU."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), precision, tf32)
