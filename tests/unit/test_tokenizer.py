"""Reading tokenizers: which splitting has which name, which files are refused, where special tokens come from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import (
    PRE_TOKENIZERS,
    edit_json,
    random_texts,
    tokenizer_metadata,
    write_byte_fallback,
    write_byte_level,
    write_json,
    write_sentencepiece,
    write_vocabulary,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from alphaq_gguf.arch.base import TokenizerRules
from alphaq_gguf.arch.tokenizer.bpe import find_unmergeable
from alphaq_gguf.arch.tokenizer.patterns import derive_pre_tokenizer
from alphaq_gguf.errors import SourceError

N_VOCAB = 1300


def derive(node: dict[str, Any], **options: Any) -> str | None:
    return derive_pre_tokenizer(node, **{"ignore_merges": False, **options})


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_public_forms_have_their_name(name: str) -> None:
    form = PRE_TOKENIZERS[name]
    assert derive(form["pre_tokenizer"], ignore_merges=form["ignore_merges"]) == name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_changed_regex_has_no_name(name: str) -> None:
    node = copy.deepcopy(PRE_TOKENIZERS[name]["pre_tokenizer"])
    for step in node.get("pretokenizers", [node]):
        if "pattern" in step:
            step["pattern"]["Regex"] += "|never"
        else:
            step["add_prefix_space"] = True
    assert derive(node) is None


def test_spellings_of_one_splitting() -> None:
    split, byte_level = PRE_TOKENIZERS["qwen2"]["pre_tokenizer"]["pretokenizers"]
    nested = {"type": "Sequence", "pretokenizers": [split]}
    removed = {**split, "behavior": "Removed", "invert": True}
    raw = {**split, "pattern": {"Regex": split["pattern"]["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")}}
    for first in (split, nested, removed, raw):
        assert derive({"type": "Sequence", "pretokenizers": [first, byte_level]}) == "qwen2"
    for other in ({**split, "behavior": "Removed"}, {**split, "behavior": "MergedWithNext"}, {"type": "Whitespace"}):
        assert derive({"type": "Sequence", "pretokenizers": [other, byte_level]}) is None
    assert derive({"type": "Sequence", "pretokenizers": [split, {**byte_level, "add_prefix_space": True}]}) is None
    digits, *rest = PRE_TOKENIZERS["deepseek-v3"]["pre_tokenizer"]["pretokenizers"]
    assert derive({"type": "Sequence", "pretokenizers": [digits, *rest]}) == "deepseek-v3"
    lossy = {**digits, "behavior": "Removed", "invert": True}
    assert derive({"type": "Sequence", "pretokenizers": [lossy, *rest]}) is None
    assert derive({}) is None


def test_names_that_split_alike() -> None:
    llama, gpt = PRE_TOKENIZERS["llama-bpe"]["pre_tokenizer"], PRE_TOKENIZERS["gpt-2"]["pre_tokenizer"]
    assert derive(llama, ignore_merges=True) == "llama-bpe"
    assert derive(llama, ignore_merges=True, preferred=("glm4",)) == "glm4"
    assert derive(llama, ignore_merges=False, preferred=("glm4",)) == "dbrx"
    assert derive(gpt, preferred=("olmo",)) == "olmo"
    assert derive(gpt, preferred=("llama4",)) == "gpt-2"
    assert derive(PRE_TOKENIZERS["gpt-4o"]["pre_tokenizer"], ignore_merges=True, preferred=("llama4",)) == "llama4"


def test_tokens_that_merging_does_not_give_back() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator(random_texts(400, seed=3), trainers.BpeTrainer(vocab_size=700, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    # Without some of the merges, tokens built on them are out of reach, unless other merges lead there.
    merges = [tuple(merge) for i, merge in enumerate(model["merges"]) if i % 5]
    reference = models.BPE(vocab=model["vocab"], merges=merges)
    expected = [token for token in model["vocab"] if len(reference.tokenize(token)) > 1]
    assert len(expected) > 50
    assert find_unmergeable(model["vocab"], merges) == expected


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A byte-level tokenizer to damage."""
    write_byte_level(tmp_path / "model", "qwen2", eos_token="<|im_end|>")
    return tmp_path / "model"


def refusal(directory: Path, n_vocab: int = N_VOCAB, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        write_vocabulary(directory, directory / "vocab.gguf", n_vocab, **options)
    assert caught.value.hint or "vocab_size" in caught.value.message or "refuses" in caught.value.message
    return str(caught.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert all(name in message for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"))


def test_slow_files_need_a_name_for_their_splitting(directory: Path) -> None:
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (directory / "tokenizer.json").unlink()
    write_json(directory, "vocab.json", model["vocab"])
    assert "tokenizer.json is missing" in refusal(directory)
    (directory / "merges.txt").write_bytes("\r\n".join(" ".join(merge) for merge in model["merges"]).encode())
    assert "--pre-tokenizer" in refusal(directory)
    write_vocabulary(directory, directory / "vocab.gguf", N_VOCAB, pre_tokenizer="qwen2")
    metadata = tokenizer_metadata(directory / "vocab.gguf")
    assert metadata["tokenizer.ggml.merges"][1] == [" ".join(merge) for merge in model["merges"]]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_damaged_json(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    assert name in refusal(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": ["a"], "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}},
        {"added_tokens": [{"content": "<x>"}]},
        {"added_tokens": ["<x>"]},
        {"pre_tokenizer": "ByteLevel"},
    ],
)
def test_a_tokenizer_json_that_holds_something_else(directory: Path, changes: dict[str, Any]) -> None:
    edit_json(directory, "tokenizer.json", **changes)
    assert "tokenizer.json: not a tokenizer" in refusal(directory)


def test_added_tokens_that_are_no_tokens(directory: Path) -> None:
    edit_json(directory, "tokenizer_config.json", added_tokens_decoder={"7": {"special": True}})
    assert "added_tokens_decoder" in refusal(directory)


def test_a_chat_template_that_is_no_text(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja" in refusal(directory)


def test_text_changed_before_splitting(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert "Lowercase" in refusal(directory)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": False},
    ],
)
def test_other_kinds_of_tokenizer_json(directory: Path, model: dict[str, Any]) -> None:
    edit_json(directory, "tokenizer.json", model=model, pre_tokenizer={"type": "Metaspace"})
    assert f"tokenizer of type {model['type']!r} is not supported" in refusal(directory)


def test_a_byte_fallback_tokenizer_that_splits(tmp_path: Path) -> None:
    tokenizer = write_byte_fallback(tmp_path, write_sentencepiece(tmp_path / "spm"))
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "Digits" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"model_type": "unigram"}, "not of type BPE"), ({"byte_fallback": False}, "no byte fallback")],
)
def test_other_kinds_of_sentencepiece_model(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, vocab_size=400, **options)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff"])
def test_damaged_sentencepiece_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert "tokenizer.model: not a SentencePiece model" in refusal(tmp_path)


def test_more_tokens_than_the_model_has(directory: Path, tmp_path: Path) -> None:
    assert "token id 1199 does not fit the model's vocabulary of 1000" in refusal(directory, 1000)
    write_sentencepiece(tmp_path / "spm")
    assert "600 tokens, but vocab_size in config.json is 599" in refusal(tmp_path / "spm", 599)


def test_two_tokens_of_one_text(directory: Path) -> None:
    decoder = {"1250": {"content": "ing", "special": False}, "1251": {"content": "ing", "special": False}}
    edit_json(directory, "tokenizer_config.json", added_tokens_decoder=decoder)
    assert "both 'ing'" in refusal(directory)


def special_ids(directory: Path, **options: Any) -> dict[str, int]:
    write_vocabulary(directory, directory / "vocab.gguf", N_VOCAB, **options)
    metadata = tokenizer_metadata(directory / "vocab.gguf")
    end = "_token_id"
    return {k.split(".")[-1].removesuffix(end): v for k, (_, v) in metadata.items() if k.endswith(end)}


def test_special_tokens_by_precedence(directory: Path) -> None:
    write_json(directory, "tokenizer_config.json", {})
    assert special_ids(directory) == {}
    write_json(directory, "generation_config.json", {"eos_token_id": [5, 6], "bos_token_id": None})
    assert special_ids(directory) == {"eos": 5}
    write_json(
        directory, "config.json", {"text_config": {"eos_token_id": 7}, "bos_token_id": 8, "pad_token_id": N_VOCAB}
    )
    assert special_ids(directory) == {"eos": 7, "bos": 8}
    write_json(directory, "special_tokens_map.json", {"eos_token": {"content": "<|im_start|>"}})
    assert special_ids(directory) == {"eos": 1, "bos": 8}
    write_json(
        directory, "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "ing", "unk_token": "no such"}
    )
    vocab = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert special_ids(directory) == {"eos": 2, "bos": 8, "padding": vocab["ing"]}


def test_a_familys_special_tokens_fill_gaps_only(directory: Path) -> None:
    rules = TokenizerRules(special={"eos": "<|endoftext|>", "eot": "<|im_start|>", "unk": "<no such token>"})
    assert special_ids(directory, rules=rules) == {"eos": 2, "eot": 1}


def test_special_tokens_are_control_tokens(directory: Path) -> None:
    edit_json(directory, "tokenizer_config.json", extra_special_tokens={"image": "in"}, pad_token="ing")
    write_vocabulary(directory, directory / "vocab.gguf", N_VOCAB)
    metadata = tokenizer_metadata(directory / "vocab.gguf")
    tokens, types = (metadata[f"tokenizer.ggml.{key}"][1] for key in ("tokens", "token_type"))
    control = {token for token, kind in zip(tokens, types, strict=True) if kind == 3}
    assert control == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "in", "ing"}
