"""Which implementation of an operation runs where."""

from __future__ import annotations

from importlib.util import find_spec

import torch

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


def auto_backend(device: torch.device) -> str:
    """What "auto" stands for on a device: "triton" where its kernels run, else "torch"."""
    return "torch" if why_no_triton(device) else "triton"
