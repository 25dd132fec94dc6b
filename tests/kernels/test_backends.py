"""Which devices get Triton kernels, and what is said of the others."""

from __future__ import annotations

from importlib.machinery import ModuleSpec

import pytest
import torch
from alphaq_kernels import why_no_triton
from alphaq_kernels.backends import choose_backend


def test_processors_have_none() -> None:
    assert why_no_triton("cpu") == "on cpu there are no Triton kernels"
    assert choose_backend("auto", torch.device("cpu")) == "torch"


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((9, 0), True, ""),
        ((8, 0), True, ""),
        ((7, 5), True, "compute capability 7.5, Triton needs 8.0"),
        ((9, 0), False, "triton is not installed"),
    ],
)
def test_a_gpu_must_be_one_that_triton_supports(
    capability: tuple[int, int], installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drivers and packages that are not at hand here; torch's and Python's answers are all that stands in for them.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    spec = ModuleSpec("triton", None) if installed else None
    monkeypatch.setattr("alphaq_kernels.backends.find_spec", lambda name: spec)
    assert reason in why_no_triton("cuda:0")
    assert bool(reason) == bool(why_no_triton("cuda:0"))
    assert choose_backend("auto", torch.device("cuda:0")) == ("torch" if reason else "triton")
