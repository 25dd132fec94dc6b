"""Write a GGUF in one pass: complete header first, then one tensor at a time, renamed when whole.

The file grows under `OUT.partial`; `OUT.partial.json` counts the tensors that are complete in it, so
an interrupted run goes on where it stopped. Knows tensors and bytes, nothing of alphas or budgets.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import OutputError
from .gguf_file import TensorInfo
from .reporter import Reporter, Silent

# Bytes after which an unfinished file is made safe against a crash; Ctrl-C makes it safe at once.
_CHECKPOINT_BYTES = 1 << 28

Produce = Callable[[TensorInfo], Iterator[np.ndarray]]
"""The bytes of a tensor in order, as uint8 arrays."""


def partial_path(out: Path) -> Path:
    """Where a file lives until it is complete."""
    return out.with_name(out.name + ".partial")


def _journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial.json")


def check_output(out: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """OutputError when `out` is an input, exists without `force`, or cannot be created."""
    resolved = out.resolve()
    if any(resolved == path.resolve() for path in inputs):
        raise OutputError(f"{out}: the output is the source itself", "choose another output name")
    try:
        _journal_path(out).exists()
    except OSError as error:
        raise OutputError(f"{out}: {(error.strerror or '').lower()}", "choose a shorter name") from None
    if out.is_dir():
        raise OutputError(f"{out} is a directory", "give a file name")
    if out.exists() and not force:
        raise OutputError(f"{out} exists", "choose another name or pass --force to replace it")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} does not exist", f"mkdir -p {out.parent}")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OutputError(f"{out.parent}: cannot write here: {error.strerror}", "choose another directory") from None


def check_space(out: Path, size: int) -> None:
    """OutputError when the file system of `out` cannot hold `size` bytes beside what is there."""
    partial = partial_path(out)
    have = shutil.disk_usage(out.parent).free + (partial.stat().st_size if partial.exists() else 0)
    if have < size:
        raise OutputError(
            f"{out.parent}: disk full: the file needs {size:,} bytes, {have:,} are free",
            "free some space or choose another directory",
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block succeeds and vanishes when it fails."""
    temporary = partial_path(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file through a temporary name; OutputError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_gguf(
    out: Path,
    header: bytes,
    tensors: Sequence[TensorInfo],
    size: int,
    produce: Produce,
    reporter: Reporter | None = None,
) -> int:
    """Write `header` and the data of `tensors` (offsets relative to its end) to `out`; bytes resumed from.

    Interruption keeps the partial file for the next run with the same header; any error removes it.
    OutputError when the disk is full or the directory vanishes.
    """
    reporter = reporter or Silent()
    partial, journal = partial_path(out), _journal_path(out)
    check_space(out, size)
    key = hashlib.sha256(header).hexdigest()
    done = _completed(partial, journal, key, header, tensors)
    ends = [len(header) + info.offset for info in tensors[1:]] + [size] * bool(tensors)
    resumed = ends[done - 1] if done else 0
    try:
        with partial.open("r+b" if done else "wb") as file:
            if done:
                file.truncate(resumed)
                file.seek(resumed)
            else:
                file.write(header)

            def checkpoint() -> None:
                # The journal may never claim what a power cut could still lose.
                file.flush()
                os.fsync(file.fileno())
                journal.write_text(json.dumps({"header": key, "tensors": done}), encoding="utf-8")

            saved = resumed
            try:
                with reporter.task("Writing", sum(t.n_bytes for t in tensors), "bytes") as advance:
                    advance(sum(t.n_bytes for t in tensors[:done]))
                    for info, end in zip(tensors[done:], ends[done:], strict=True):
                        _write_tensor(file, info, produce, advance)
                        file.write(b"\0" * (end - file.tell()))
                        done += 1
                        if end - saved >= _CHECKPOINT_BYTES:
                            checkpoint()
                            saved = end
            except KeyboardInterrupt:
                checkpoint()
                raise
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
        journal.unlink(missing_ok=True)
    except OSError as error:
        _discard(partial, journal)
        raise OutputError(f"{out}: cannot be written: {error.strerror}", "nothing was kept") from None
    except Exception:
        _discard(partial, journal)
        raise
    return resumed


def _write_tensor(file, info: TensorInfo, produce: Produce, advance: Callable[[int], None]) -> None:
    written = 0
    for piece in produce(info):
        file.write(piece.data)
        written += piece.nbytes
        advance(piece.nbytes)
    if written != info.n_bytes:
        raise RuntimeError(f"{info.name}: produced {written} bytes, the header promises {info.n_bytes}")


def _completed(partial: Path, journal: Path, key: str, header: bytes, tensors: Sequence[TensorInfo]) -> int:
    """How many tensors an earlier run with this very header finished, 0 when there is none to trust."""
    try:
        state = json.loads(journal.read_text(encoding="utf-8"))
        done = int(state["tensors"])
        if state["header"] != key or not 0 < done <= len(tensors):
            return 0
        last = tensors[done - 1]
        if partial.stat().st_size < len(header) + last.offset + last.n_bytes:
            return 0
        with partial.open("rb") as file:
            return done if file.read(len(header)) == header else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _discard(partial: Path, journal: Path) -> None:
    partial.unlink(missing_ok=True)
    journal.unlink(missing_ok=True)
