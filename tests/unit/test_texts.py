"""Texts become windows of tokens, and models that read them otherwise than the reference are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CORPUS
from gguf import GGUFValueType

from alphaq_gguf.checkpoint import Source, open_source
from alphaq_gguf.compare.texts import check_vocabularies, open_vocabulary
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.gguf_file import build_header, make_field
from alphaq_gguf.reporter import Silent
from alphaq_gguf.text_windows import cut_texts, read_windows


@pytest.fixture(scope="module")
def source(tiny: Path) -> Source:
    return open_source(tiny)


def write_text(path: Path, text: str = "\n".join(CORPUS * 3)) -> Path:
    path.write_bytes(text.encode("utf-8"))
    return path


def cut(source: Source, texts: list[Path | str], n_ctx: int, max_windows: int | None, cache: Path) -> list[np.ndarray]:
    with open_vocabulary(source) as vocabulary:
        return cut_texts(
            source, vocabulary, texts, n_ctx, max_windows, seed=0, cache_dir=cache, threads=1, reporter=Silent()
        )


def test_windows_hold_the_text(tiny: Path, source: Source, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    # The line break at the end is left out, all others stay as they are.
    a, b = write_text(tmp_path / "a.txt", "one\r\ntwo\r" * 40 + "end\n"), write_text(tmp_path / "b.txt")
    found = cut(source, [b, a, b], 16, None, tmp_path)
    for windows, path in zip(found, (b, a, b), strict=True):
        assert windows.dtype == np.int64
        ids = tokenizer(path.read_bytes().decode().removesuffix("\n"))["input_ids"]
        np.testing.assert_array_equal(windows, np.reshape(ids[: len(ids) // 16 * 16], (-1, 16)))
    assert len(found[0]) > 5
    few = cut(source, [b, a], 16, 2, tmp_path)
    np.testing.assert_array_equal(np.concatenate(few), np.concatenate([found[0][:2], found[1][:2]]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "an empty text"),
        (b"far too short", "too short: less than one window of 512 tokens"),
        (b"not \xff text", "no UTF-8 text: invalid start byte at byte 4"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_text_is_said_before_anything_is_written(
    content: bytes | None, message: str, source: Source, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AlphaQError, match=message) as caught:
        cut(source, ["self", path], 512, None, tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_window_more_than_the_text_has_is_not_made_up(source: Source, tmp_path: Path) -> None:
    with open_vocabulary(source) as vocabulary:
        text = write_text(tmp_path / "text.txt")
        n_tokens = len(vocabulary.tokenize(text.read_text(encoding="utf-8")))
        assert read_windows(vocabulary, text, n_tokens).shape == (1, n_tokens)
        with pytest.raises(AlphaQError, match="too short"):
            read_windows(vocabulary, text, n_tokens + 1)


def write_vocabulary(path: Path, source: Source, changes: dict[str, Callable[[Any], Any]]) -> Path:
    """A GGUF without weights, with the metadata of `source`; `changes` by the key after "tokenizer.ggml."."""
    kinds = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, list: GGUFValueType.ARRAY}
    fields = {field.key: field for field in source.fields}
    for name, change in changes.items():
        key = f"tokenizer.ggml.{name}"
        value = change(fields[key].value if key in fields else None)
        fields[key] = make_field(key, kinds[type(value)], value)
    path.write_bytes(build_header(fields.values(), [])[0])
    return path


def renamed(i: int, name: str) -> Callable[[list[str]], list[str]]:
    return lambda tokens: [*tokens[:i], name, *tokens[i + 1 :]]


def first_unused(source: Source) -> int:
    return next(f.value for f in source.fields if f.key == "tokenizer.ggml.token_type").index(5)


def test_the_same_tokenizer_passes(source: Source, tmp_path: Path) -> None:
    check_vocabularies(source, write_vocabulary(tmp_path / "same.gguf", source, {}))
    padding = {"tokens": renamed(first_unused(source), "<nothing>")}
    check_vocabularies(source, write_vocabulary(tmp_path / "padding.gguf", source, padding))
    # Two names for one way of splitting text.
    alias = {"pre": lambda pre: "deepseek-r1-qwen"}
    check_vocabularies(source, write_vocabulary(tmp_path / "alias.gguf", source, alias))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": lambda tokens: [*tokens, "more"], "token_type": lambda types: [*types, 1]},
            "has 401 tokens in its vocabulary, the reference 400",
        ),
        ({"tokens": renamed(300, "other")}, "token 300 is 'other', there '.+'"),
        (
            {"add_bos_token": lambda _: True, "bos_token_id": lambda _: 0},
            "texts begin with token 0, there with none",
        ),
        ({"pre": lambda _: "gpt-2"}, "splits text otherwise than the reference: after .+ comes '.+', there '.+'"),
        ({"merges": lambda merges: merges[:20]}, "splits text otherwise than the reference: after"),
    ],
)
def test_another_tokenizer_is_refused(
    changes: dict[str, Callable[[Any], Any]], message: str, source: Source, tmp_path: Path
) -> None:
    path = write_vocabulary(tmp_path / "other.gguf", source, changes)
    with pytest.raises(AlphaQError, match=message) as caught:
        check_vocabularies(source, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
