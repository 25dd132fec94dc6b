"""Safetensors files on the Hub, read by HTTP range requests and never kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from urllib.parse import urlsplit

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from ..errors import ConnectionLostError, SourceError
from . import hub
from .hub import RepoFile, Repository, TransportError, explained, persist

# A long range is fetched over several connections, none for less than this.
_CONNECTIONS = 4
_SMALLEST_SPAN = 1 << 21
# Digests of blocks are kept to notice a range that reads differently the second time: of 4 KiB, or
# of more in large files, so that there are no more than this many.
_SMALLEST_BLOCK = 1 << 12
_BLOCKS = 1 << 17
_FIRST_READ = 1 << 14
_HEADER_LIMIT = 100_000_000
_REFUSED = {401, 403}

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class RemoteFile:
    """A file of a repository at one commit, read in pieces.

    A piece that arrives cut, late or not at all is asked for again from where it stopped;
    ConnectionLostError when that keeps failing, SourceError when the file is not what the Hub listed.
    """

    def __init__(self, repository: Repository, file: RepoFile) -> None:
        self.label = f"{repository.label}/{file.name}"
        self.size = file.size
        self._file = file
        self._repo_id, self._commit = repository.repo_id, repository.commit
        self._url = huggingface_hub.hf_hub_url(repository.repo_id, file.name, revision=repository.commit)
        self._location: str | None = None
        self._block = max(_SMALLEST_BLOCK, -(-file.size // _BLOCKS))
        self._digests = np.zeros(-(-file.size // self._block), dtype=np.uint64)

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes [offset, offset + length)."""
        buffer = bytearray(length)
        count = max(1, min(_CONNECTIONS, length // _SMALLEST_SPAN))
        edges = [length * i // count for i in range(count + 1)]
        spans = list(pairwise(edges))
        with memoryview(buffer) as view:
            if count == 1:
                self._fill(view, offset)
            else:
                with ThreadPoolExecutor(count) as pool:
                    list(pool.map(lambda span: self._fill(view[span[0] : span[1]], offset + span[0]), spans))
            self._compare(view, offset)
        return buffer

    def _fill(self, view: memoryview, offset: int) -> None:
        done, failures, wait = 0, 0, hub.WAIT_S
        while done < len(view):
            before, reason, pause = done, "the connection was cut", 0.0
            try:
                for chunk in self._stream(offset + done, offset + len(view)):
                    view[done : done + len(chunk)] = chunk
                    done += len(chunk)
            except _TryAgainError as error:
                reason, pause = str(error), error.pause
            except TransportError as error:
                reason = str(error) or type(error).__name__
            if done == len(view):
                return
            if done > before:
                failures, wait = 0, hub.WAIT_S
            failures += 1
            if failures >= hub.TRIES:
                raise ConnectionLostError(f"{self.label}: connection lost after {hub.TRIES} tries: {reason}")
            time.sleep(min(max(wait, pause), hub.LONGEST_WAIT_S))
            wait *= 2

    def _stream(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop), as far as one request brings them."""
        location = self._location or self._resolve()
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if urlsplit(location).netloc == urlsplit(self._url).netloc:
            headers |= build_hf_headers()
        session = huggingface_hub.get_session()
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with session.stream("GET", location, headers=headers, timeout=timeout) as response:
            status = response.status_code
            if status in _REFUSED:
                # Signed locations expire; the next try asks the Hub for a new one, and that says if access is denied.
                self._location = None
                raise _TryAgainError(f"HTTP {status}")
            if status in hub.TRANSIENT:
                after = response.headers.get("Retry-After", "")
                raise _TryAgainError(f"HTTP {status}", float(after) if after.isdecimal() else 0.0)
            expected = f"bytes {start}-{stop - 1}/{self.size}"
            found = response.headers.get("Content-Range", "no Content-Range")
            if status != 206 or found != expected:
                raise SourceError(
                    f"{self.label}: asked for {expected}, got HTTP {status}, {found}",
                    "the server does not serve ranges of this file: leave out --stream",
                )
            self._location = location
            left = stop - start
            for chunk in response.iter_raw():
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return

    def _resolve(self) -> str:
        """Where the bytes lie now: most often a signed address on another host."""
        with explained(self._repo_id, self._commit, self._file.name):
            found = persist(
                lambda: huggingface_hub.get_hf_file_metadata(self._url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            )
        if self._file.sha256 not in (None, found.etag) or found.size not in (None, self.size):
            raise SourceError(
                f"{self.label}: hash mismatch: the Hub listed {self._file.sha256}, {self.size} bytes, "
                f"and now serves {found.etag}, {found.size} bytes",
                "the repository changed: run the command again",
            )
        return found.location

    def _compare(self, view: memoryview, offset: int) -> None:
        """SourceError when a block reads differently than it did before."""
        size, end = self._block, offset + len(view)
        last = len(self._digests) if end == self.size else end // size
        for block in range(-(-offset // size), last):
            data = view[block * size - offset : (block + 1) * size - offset]
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
            known = int(self._digests[block])
            if known and known != digest:
                raise SourceError(
                    f"{self.label}: hash mismatch: bytes {block * size} to {block * size + len(data)} differ "
                    "from the first time",
                    "something on the way damages data: run again with a new --cache-dir, or without --stream",
                )
            self._digests[block] = digest


class _TryAgainError(Exception):
    """A request failed in a way that passes; `pause` is how many seconds the server wants to be left alone."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class RemoteShard:
    """The tensors of a remote safetensors file. SourceError when its header is damaged."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        head = file.read(0, min(_FIRST_READ, file.size))
        length = int.from_bytes(head[:8], "little")
        if file.size < 8 or length > min(file.size - 8, _HEADER_LIMIT):
            raise _damaged(file, f"its header claims {length} bytes, the file has {file.size}")
        header = head[8 : 8 + length]
        if len(header) < length:
            header += file.read(8 + len(header), length - len(header))
        try:
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            self._offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}
            self.tensors: Mapping[str, tuple[str, tuple[int, ...]]] = {
                name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()
            }
            ends = [8 + length + entry["data_offsets"][1] for entry in entries.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _damaged(file, f"{type(error).__name__} in its header") from None
        if max(ends, default=0) > file.size:
            raise _damaged(file, f"its tensors end at byte {max(ends)}, the file at {file.size}")

    def read(self, name: str, expert: int | None, first: int, last: int) -> torch.Tensor:
        dtype, shape = self.tensors[name]
        if len(shape) == 1:
            shape, first, last = (1, *shape), 0, 1
        start = first
        if expert is not None:
            start += expert * shape[1]
            shape = shape[1:]
        if dtype not in _TORCH_DTYPES:
            raise SourceError(f"{self._file.label}: {name} has dtype {dtype}", "use the unquantised checkpoint")
        kind = _TORCH_DTYPES[dtype]
        width = math.prod(shape[1:]) * kind.itemsize
        data = self._file.read(self._offsets[name] + start * width, (last - first) * width)
        return torch.frombuffer(data, dtype=kind).reshape(last - first, *shape[1:])


def open_shard(repository: Repository, file: RepoFile) -> RemoteShard:
    """Read the header of one of the repository's safetensors files."""
    return RemoteShard(RemoteFile(repository, file))


def _damaged(file: RemoteFile, reason: str) -> SourceError:
    return SourceError(f"{file.label}: damaged safetensors file: {reason}", "the repository itself is damaged")
