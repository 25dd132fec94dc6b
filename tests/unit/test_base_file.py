"""Base files: every byte of them, what an interruption keeps, and files that are refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaq_gguf.errors import AlphaQError, OutputError
from alphaq_gguf.evaluate.base_file import BaseFile, BaseWriter
from alphaq_gguf.evaluate.metrics import compress

N_CTX, N_VOCAB, N_WINDOWS = 9, 7, 3


def problem(n_ctx: int = N_CTX, n_vocab: int = N_VOCAB, n_windows: int = N_WINDOWS) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n_windows, n_ctx] and the compressed rows [n_windows, scored, words] of each."""
    draw = np.random.default_rng(n_ctx * n_vocab)
    windows = draw.integers(0, n_vocab, (n_windows, n_ctx))
    n_scored = n_ctx - 1 - n_ctx // 2
    logits = draw.normal(0, 5, (n_windows * n_scored, n_vocab)).astype(np.float32)
    return windows, compress(logits).reshape(n_windows, n_scored, -1)


def layout(windows: np.ndarray, rows: np.ndarray, n_vocab: int = N_VOCAB) -> bytes:
    """The file, put together by hand."""
    n_windows, n_ctx = windows.shape
    tokens = struct.pack(f"<{windows.size}i", *windows.ravel().tolist())
    return b"_logits_" + struct.pack("<3i", n_ctx, n_vocab, n_windows) + tokens + rows.tobytes()


def write(path: Path, windows: np.ndarray, rows: np.ndarray, n_vocab: int = N_VOCAB) -> None:
    with BaseWriter(path, windows, n_vocab) as writer:
        for window in rows[writer.n_done :]:
            writer.append(window)


@given(n_ctx=st.integers(3, 12), n_vocab=st.integers(1, 9), n_windows=st.integers(1, 4))
def test_every_byte_is_in_its_place(tmp_path_factory, n_ctx: int, n_vocab: int, n_windows: int) -> None:
    path = tmp_path_factory.mktemp("base") / "base"
    windows, rows = problem(n_ctx, n_vocab, n_windows)
    write(path, windows, rows, n_vocab)
    assert path.read_bytes() == layout(windows, rows, n_vocab)
    assert [file.name for file in path.parent.iterdir()] == ["base"]
    found = BaseFile(path)
    assert (found.n_ctx, found.n_vocab, found.n_windows) == (n_ctx, n_vocab, n_windows)
    assert found.windows.dtype == np.int64
    np.testing.assert_array_equal(found.windows, windows)
    for i in range(n_windows):
        np.testing.assert_array_equal(found.rows(i), rows[i])


@pytest.mark.parametrize("torn", [0, 5])
def test_an_interrupted_run_goes_on(tmp_path: Path, torn: int) -> None:
    path, partial = tmp_path / "base", tmp_path / "base.partial"
    windows, rows = problem()
    with pytest.raises(KeyboardInterrupt), BaseWriter(path, windows, N_VOCAB) as writer:
        assert writer.n_done == 0
        writer.append(rows[0])
        writer.append(rows[1])
        raise KeyboardInterrupt
    assert not path.exists()
    whole = layout(windows, rows[:2])
    assert partial.read_bytes() == whole
    # A crash while a window is written leaves a piece of it.
    partial.write_bytes(whole[: len(whole) - torn])
    with BaseWriter(path, windows, N_VOCAB) as writer:
        assert writer.n_done == (1 if torn else 2)
        for window in rows[writer.n_done :]:
            writer.append(window)
    assert path.read_bytes() == layout(windows, rows)
    assert not partial.exists()


def test_windows_survive_a_kill(tmp_path: Path) -> None:
    windows, rows = problem()
    writer = BaseWriter(tmp_path / "base", windows, N_VOCAB)
    writer.append(rows[0])
    # Nothing but what the operating system has by now.
    left = (tmp_path / "base.partial").read_bytes()
    with writer:
        assert left == layout(windows, rows[:1])


@pytest.mark.parametrize("other", ["windows", "vocabulary", "junk"])
def test_what_is_left_of_another_file_is_not_used(tmp_path: Path, other: str) -> None:
    path = tmp_path / "base"
    windows, rows = problem()
    left, n_vocab = windows.copy(), N_VOCAB
    if other == "windows":
        left[1, 4] = (left[1, 4] + 1) % N_VOCAB
    elif other == "vocabulary":
        n_vocab += 1
    with BaseWriter(path, left, n_vocab) as writer:
        writer.append(problem(n_vocab=n_vocab)[1][2])
    if other == "junk":
        (tmp_path / "base.partial").write_bytes(b"junk" * 400)
    write(path, windows, rows)
    assert path.read_bytes() == layout(windows, rows)


def test_a_run_that_stopped_before_the_last_step_only_renames(tmp_path: Path) -> None:
    path = tmp_path / "base"
    windows, rows = problem()
    (tmp_path / "base.partial").write_bytes(layout(windows, rows) + b"more" * 100)
    with BaseWriter(path, windows, N_VOCAB) as writer:
        assert writer.n_done == N_WINDOWS
    assert path.read_bytes() == layout(windows, rows)


def test_rows_of_another_shape_are_a_bug(tmp_path: Path) -> None:
    windows, rows = problem()
    with BaseWriter(tmp_path / "base", windows, N_VOCAB) as writer, pytest.raises(ValueError, match="shape"):
        writer.append(rows[0][:-1])
    write(tmp_path / "base", windows, rows)
    with BaseWriter(tmp_path / "base", windows, N_VOCAB) as writer:
        for window in rows:
            writer.append(window)
        with pytest.raises(ValueError, match="window 3"):
            writer.append(rows[0])


def test_places_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    windows, _ = problem()
    with pytest.raises(OutputError, match=r"absent/base: cannot write it: No such file"):
        BaseWriter(tmp_path / "absent/base", windows, N_VOCAB)
    with pytest.raises(OutputError, match="disk full: the file needs"):
        BaseWriter(tmp_path / "base", np.zeros((10, 4097), np.int64), 2**31 - 1)


def damaged(kind: str) -> bytes:
    windows, rows = problem()
    whole = layout(windows, rows)
    if kind == "a token outside":
        windows[1, 1] = N_VOCAB
        return layout(windows, rows)
    if kind == "a negative token":
        windows[2, 3] = -1
        return layout(windows, rows)
    return {
        "empty": b"",
        "short": b"_logits_\0\0",
        "another kind": b"GGUF" + whole[4:],
        "no windows": whole[:16] + struct.pack("<i", 0),
        "negative": whole[:12] + struct.pack("<i", -7) + whole[16:],
        "a tiny context": whole[:8] + struct.pack("<i", 2) + whole[12:],
        "cut": whole[:-1],
        "cut in the tokens": whole[:40],
        "header only": whole[:20],
        "too long": whole + b"\0",
        "absurd": whole[:8] + struct.pack("<3i", 2**31 - 1, 2**31 - 1, 2**31 - 1) + whole[20:],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "no base file: it does not begin with _logits_"),
        ("short", "no base file"),
        ("another kind", "no base file"),
        ("no windows", "damaged base file: its header says 0 windows of 9 tokens and a vocabulary of 7"),
        ("negative", "damaged base file: its header says .* vocabulary of -7"),
        ("a tiny context", "damaged base file: its header says 3 windows of 2 tokens"),
        ("cut", r"base file cut short: expected 416 bytes, found 415"),
        ("cut in the tokens", "base file cut short"),
        ("header only", "base file cut short"),
        ("absurd", "base file cut short"),
        ("too long", r"damaged base file: expected 416 bytes, found 417"),
        ("a token outside", "damaged base file: it holds tokens from 0 to 7, expected 0 to 6"),
        ("a negative token", "damaged base file: it holds tokens from -1"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "base"
    path.write_bytes(damaged(kind))
    with pytest.raises(AlphaQError, match=rf"^{re.escape(str(path))}: {message}"):
        BaseFile(path)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(AlphaQError, match="absent: cannot read it: No such file"):
        BaseFile(tmp_path / "absent")
    with pytest.raises(AlphaQError, match="cannot read it: Is a directory"):
        BaseFile(tmp_path)


def test_a_window_without_probabilities_is_told(tmp_path: Path) -> None:
    path = tmp_path / "base"
    windows, rows = problem()
    rows[1] = compress(np.full((len(rows[1]), N_VOCAB), np.nan, np.float32))
    write(path, windows, rows)
    base = BaseFile(path)
    np.testing.assert_array_equal(base.rows(0), rows[0])
    with pytest.raises(AlphaQError, match="damaged base file: no probabilities in window 2"):
        base.rows(1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AlphaQError, match="cannot read window 3 of 3"):
        base.rows(2)
