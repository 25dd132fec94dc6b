"""Which implementation of an operation runs where."""

from __future__ import annotations

from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "torch")
# What Triton supports of NVIDIA's GPUs.
_LEAST_CAPABILITY = (8, 0)


def why_no_triton(device: torch.device | str) -> str:
    """Why Triton kernels cannot run on a device, as a clause; empty where they can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"on {device} there are no Triton kernels"
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}, Triton needs {_LEAST_CAPABILITY[0]}.0"
    return ""


def choose_backend(backend: str, device: torch.device) -> str:
    """What runs, "triton" or "torch": for "auto" Triton where its kernels can. ValueError for any other name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "auto":
        return "torch" if why_no_triton(device) else "triton"
    if backend == "triton" and find_spec("triton") is None:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    return backend


def require_triton(device: torch.device, interpreted: bool) -> None:
    """ValueError unless Triton kernels, `interpreted` or compiled, can run on a device."""
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        raise ValueError(
            f"backend 'triton' cannot run on device {device.type!r}: expected a CUDA tensor, "
            "or a CPU tensor with TRITON_INTERPRET=1 set before triton's first use"
        )
