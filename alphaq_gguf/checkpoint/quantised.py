"""Quantised checkpoints as plain floats: FP8 with one scale per block of weights, and MXFP4."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from gguf import Metadata

from ..arch import Config
from ..errors import SourceError
from ..qtypes import QType
from .shards import SafetensorsWeights, Weights

_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")

# Bytes are decoded by looking them up: on one core several times faster than arithmetic.
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
_E2M1 = torch.tensor([sign * v for sign in (1, -1) for v in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=torch.bfloat16)
# Of each byte both values, low nibble first, as one 32-bit word.
_E2M1_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1).view(torch.int32)[:, 0].numpy()
_E8M0 = torch.tensor([*(2.0**e for e in range(-127, 128)), torch.nan], dtype=torch.bfloat16)


def check_method(config: Config, directory: Path, label: str) -> None:
    """SourceError for a quantisation we do not read; its hint names the original if `directory` tells it."""
    method = _method(config)
    if method is not None and method not in _METHODS:
        original = _find_original(config, directory)
        raise SourceError(
            f"{label}: already quantised ({method}) in a form that is not read (only {' and '.join(_METHODS)} are); "
            "requantising would add its error to ours",
            "use the original bf16, f16 or f32 checkpoint" + (f": {original}" if original else ""),
        )


def dequantise(stored: SafetensorsWeights, config: Config) -> Weights:
    """`stored` with its quantised tensors as floats and without their scales, read as lazily as the rest.

    For a `config` that `check_method` lets pass. SourceError when tensors and scales do not match.
    """
    method = _method(config)
    if method is not None:
        return _METHODS[method](stored, _settings(config))
    for name in stored.shapes:
        if stored.dtype(name) == "F8_E4M3":
            raise SourceError(
                f"{stored.where}: {name} is FP8, and config.json has no quantization_config to say how it is scaled",
                "use the config.json of the repository the weights come from",
            )
    return stored


class _Dequantised(ABC):
    """A checkpoint whose quantised tensors are the keys of `scale_of`; its values name their scales."""

    decoded_qtype: QType

    def __init__(self, stored: SafetensorsWeights, scale_of: Mapping[str, str], scale_suffix: str) -> None:
        self._stored = stored
        self._scale_of = scale_of
        scales = set(scale_of.values())
        for name in stored.shapes:
            if name.endswith(scale_suffix) and name not in scales:
                raise self._error(f"{name} belongs to no quantised tensor")
        for name, scale in scale_of.items():
            if scale not in stored.shapes:
                raise self._error(f"{name} has no {scale}")
            expected, found = self._scale_shape(name), stored.shapes[scale]
            if found != expected:
                raise self._error(f"{scale} has shape {list(found)}, {name} calls for {list(expected)}")
        self.shapes = {name: self._shape(name) for name in stored.shapes if name not in scales}

    @abstractmethod
    def _scale_shape(self, name: str) -> tuple[int, ...]:
        """The shape a quantised tensor's scales must have; SourceError for a tensor that cannot be one."""

    @abstractmethod
    def _decode(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a quantised matrix, in `decoded_qtype`."""

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shapes[name]

    def _error(self, problem: str) -> SourceError:
        return SourceError(
            f"{self._stored.where}: {problem}", "the checkpoint is damaged or incomplete: download it again"
        )

    def qtype(self, name: str) -> QType:
        return self.decoded_qtype if name in self._scale_of else self._stored.qtype(name)

    def read(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        if name not in self._scale_of:
            return self._stored.read(name, expert, first, last)
        if expert is None and len(self.shapes[name]) == 3:
            return torch.stack([self._decode(name, i, 0, self.shapes[name][1]) for i in range(first, last)])
        return self._decode(name, expert, first, last)


class _BlockFp8(_Dequantised):
    """E4M3 weights `X` [.., rows, cols] times `X_scale_inv`, one per block of rows and columns: `quant_method` fp8.

    Rounded once, to F32, as the product is defined.
    """

    decoded_qtype = QType.F32

    def __init__(self, stored: SafetensorsWeights, settings: Mapping[str, Any]) -> None:
        block = settings.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise SourceError(
                f"{stored.where}: weight_block_size in quantization_config is {block!r}, expected [rows, columns]: "
                "FP8 without block scales is not read",
                "use the original bf16, f16 or f32 checkpoint",
            )
        self._height, self._width = block
        scale_of = {name: f"{name}_scale_inv" for name in stored.shapes if stored.dtype(name) == "F8_E4M3"}
        super().__init__(stored, scale_of, "_scale_inv")
        for scale in scale_of.values():
            stored.qtype(scale)
        # What static schemes scale activations by is no weight.
        self.shapes = {n: s for n, s in self.shapes.items() if not n.endswith(("activation_scale", "input_scale"))}

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        shape = self._shape(name)
        if len(shape) not in (2, 3):
            raise self._error(f"{name} is FP8 and has shape {list(shape)}, expected two or three dimensions")
        return *shape[:-2], -(-shape[-2] // self._height), -(-shape[-1] // self._width)

    def _decode(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        codes = self._stored.read(name, expert, first, last).view(torch.uint8)
        top = first // self._height
        scales = self._stored.read(self._scale_of[name], expert, top, -(-last // self._height)).float()
        scales = scales[torch.arange(first, last) // self._height - top]
        values = torch.from_numpy(_E4M3[codes.numpy()])
        for block, scale in zip(values.split(self._width, dim=1), scales.split(1, dim=1), strict=True):
            block.mul_(scale)
        return values


class _Mxfp4(_Dequantised):
    """`X_blocks` [E, rows, cols / 32, 16], pairs of E2M1, times `X_scales` [E, rows, cols / 32], E8M0 powers of two.

    Presented as `X_blocks` [E, rows, cols] in BF16, which holds every product that F32 holds: two
    significant bits, at least 2^-1 * 2^-127 = 2^-128, above BF16's least 2^-133; and both overflow at
    2^128. Scale 255 is NaN (OCP Microscaling Formats 1.0, 5.4.1).
    """

    decoded_qtype = QType.BF16

    def __init__(self, stored: SafetensorsWeights, settings: Mapping[str, Any]) -> None:
        blocks = [name for name in stored.shapes if name.endswith("_blocks")]
        super().__init__(stored, {name: name.removesuffix("blocks") + "scales" for name in blocks}, "_scales")

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._stored.shapes[name]
        return (*shape[:2], shape[2] * 32) if name in self._scale_of else shape

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        shape = self._stored.shapes[name]
        for tensor in (name, self._scale_of[name]):
            if self._stored.dtype(tensor) != "U8":
                raise self._error(f"{tensor} has dtype {self._stored.dtype(tensor)}, expected U8")
        if len(shape) != 4 or shape[-1] != 16:
            raise self._error(f"{name} has shape {list(shape)}, expected [experts, rows, columns / 32, 16]")
        return shape[:-1]

    def _decode(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        codes = self._stored.read(name, expert, first, last)
        scales = _E8M0[self._stored.read(self._scale_of[name], expert, first, last).int()]
        values = torch.from_numpy(_E2M1_PAIRS[codes.numpy()]).view(torch.bfloat16)
        return values.mul_(scales[..., None]).flatten(1)


_METHODS: dict[str, type[_BlockFp8] | type[_Mxfp4]] = {"fp8": _BlockFp8, "mxfp4": _Mxfp4}


def _settings(config: Config) -> dict[str, Any]:
    found = config.get("quantization_config") or {}
    return found if isinstance(found, dict) else {"quant_method": found}


def _method(config: Config) -> str | None:
    """The name of the quantisation that config.json declares; None without one."""
    settings = _settings(config)
    return str(settings.get("quant_method", "unknown")) if settings else None


def _find_original(config: Config, directory: Path) -> str:
    """Who names which repository as the unquantised checkpoint; empty when nobody does."""
    try:
        base = Metadata.load_model_card(directory).get("base_model")
    except (yaml.YAMLError, UnicodeDecodeError):
        base = None
    settings = _settings(config)
    named = {
        "base_model in README.md": base[0] if isinstance(base, list) and base else base,
        "_name_or_path in config.json": config.get("_name_or_path"),
        "quantization_config in config.json": settings.get("model_name_or_path") or settings.get("tokenizer"),
    }
    for place, name in named.items():
        if isinstance(name, str) and _REPOSITORY.fullmatch(name):
            return f"{place} names {name}"
    return ""
