"""Safetensors files behind one lookup: checkpoint tensor name -> shape, stored type, rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..arch.base import read_json
from ..errors import SourceError
from ..prefetch import prefetch
from ..qtypes import QType

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors$")
_QTYPES = {"F32": QType.F32, "F16": QType.F16, "BF16": QType.BF16}
TORCH_DTYPES = {QType.F32: torch.float32, QType.F16: torch.float16, QType.BF16: torch.bfloat16}
# Headers of remote shards are fetched side by side.
_PARALLEL_HEADERS = 8


class Shard(Protocol):
    """One safetensors file. `tensors` maps names to (safetensors dtype, shape)."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    def read(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) along the last but one dimension, of one expert where there are three dimensions.

        A vector counts as one row and comes as [1, n]. In the stored dtype.
        """
        ...


class Weights(Protocol):
    """All tensors of a checkpoint as plain floats, whatever they are stored as."""

    shapes: dict[str, tuple[int, ...]]

    def qtype(self, name: str) -> QType:
        """F32, F16 or BF16: the type that holds the tensor's values exactly."""
        ...

    def read(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        """Rows as `Shard.read` gives them, in the dtype of `qtype`."""
        ...


class LocalShard:
    """A safetensors file on disk; SourceError when it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # pread keeps memory to what is asked for; a mapped file counts as resident memory.
            self._file: Any = safe_open(path, framework="pt", backend="pread")
            names = sorted(self._file.keys())
            pieces = {name: self._file.get_slice(name) for name in names}
            self.tensors: Mapping[str, tuple[str, tuple[int, ...]]] = {
                name: (p.get_dtype(), tuple(p.get_shape())) for name, p in pieces.items()
            }
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise SourceError(f"{path}: truncated or corrupt safetensors file: {reason}", "download it again") from None

    def read(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        piece = self._file.get_slice(name)
        try:
            if expert is not None:
                return piece[expert, first:last]
            if len(self.tensors[name][1]) == 1:
                return piece[:].reshape(1, -1)
            return piece[first:last]
        except SafetensorError as error:
            raise SourceError(f"{self.path}: {name}: {error}") from None


class SafetensorsWeights:
    """The shards of one checkpoint. `open_shard` opens one of `files` by name; `directory` may hold the index.

    SourceError names a shard that is absent, and a tensor the index promises in vain.
    """

    def __init__(self, directory: Path, where: str, files: Collection[str], open_shard: Callable[[str], Shard]) -> None:
        self.where = where
        self._shard_of: dict[str, Shard] = {}
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        expected = list_shards(directory, where, files)
        opened = prefetch((partial(open_shard, file) for file in expected), _PARALLEL_HEADERS)
        shards = dict(zip(expected, opened, strict=True))
        for file, shard in shards.items():
            names = expected[file] or shard.tensors
            missing = [name for name in names if name not in shard.tensors]
            if missing:
                raise SourceError(f"{where}/{file}: {INDEX} promises tensor {missing[0]}, the file lacks it")
            for name in sorted(names):
                self._shard_of[name], self._file_of[name] = shard, file
                self.shapes[name] = shard.tensors[name][1]

    def dtype(self, name: str) -> str:
        """The dtype as safetensors names it."""
        return self._shard_of[name].tensors[name][0]

    def qtype(self, name: str) -> QType:
        """The stored type as a GGUF type; SourceError for a dtype that is not a plain float."""
        found = self.dtype(name)
        if found not in _QTYPES:
            raise SourceError(
                f"{self.where}/{self._file_of[name]}: {name} has dtype {found}, expected BF16, F16 or F32",
                "use the unquantised checkpoint",
            )
        return _QTYPES[found]

    def read(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        return self._shard_of[name].read(name, expert, first, last)


def list_shards(directory: Path, where: str, files: Iterable[str]) -> dict[str, list[str] | None]:
    """The safetensors files that make up a checkpoint -> the tensors its index expects in each (None: all in it).

    `files` are the names at hand. Without an index the usual names tell: one `model.safetensors`, or
    numbered ones, which must be complete; other safetensors files beside them are copies in other layouts.
    """
    at_hand = sorted(files)
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise SourceError(f"{index}: not a valid shard index: no weight_map", "download it again")
        expected: dict[str, list[str] | None] = {}
        for name, file in weight_map.items():
            expected[file] = [*(expected.get(file) or []), name]
        absent = sorted(file for file in expected if file not in at_hand)
    else:
        single = [file for file in at_hand if file.endswith(".safetensors")]
        numbered = [match for match in map(NUMBERED.match, single) if match]
        counts = {match[2] for match in numbered}
        if SINGLE in single:
            return {SINGLE: None}
        if len(counts) == 1:
            (count,) = counts
            width = len(numbered[0][1])
            names = [f"model-{number:0{width}d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
            expected = dict.fromkeys(names)
            absent = [name for name in names if name not in single]
        elif single:
            return dict.fromkeys(single)
        else:
            raise _no_safetensors(where, at_hand)
    if absent:
        raise SourceError(
            f"{where}: shard {absent[0]} is missing ({len(absent)} of {len(expected)} shards absent)",
            "finish the download",
        )
    return expected


def _no_safetensors(where: str, files: list[str]) -> SourceError:
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return SourceError(
            f"{where}: only a pickle checkpoint ({pickles[0]}), which can run code when opened",
            "use a repository or revision with safetensors, or convert it with transformers first",
        )
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        return SourceError(
            f"{where}: no .safetensors file, but {len(ggufs)} GGUF", f"give the float one itself, such as {ggufs[0]}"
        )
    return SourceError(f"{where}: no .safetensors file", "finish the download")
