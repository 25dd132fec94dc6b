"""The files of a Hugging Face tokenizer, and what they say together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import SourceError
from ..base import read_json

DAMAGED = "download the file again"


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before text is split; `swallows` says that it eats neighbouring spaces."""

    text: str
    special: bool
    swallows: bool = False


@dataclass(frozen=True)
class FastTokenizer:
    """The BPE model in a tokenizer.json, or in vocab.json and merges.txt, whose `pre_tokenizer` is then None."""

    path: Path
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    model: dict[str, Any]
    added: dict[int, AddedToken]
    normalizer: dict[str, Any]
    pre_tokenizer: dict[str, Any] | None
    post_processor: dict[str, Any]

    @property
    def is_bpe(self) -> bool:
        return _is_bpe(self.model)


class TokenizerFiles:
    """A checkpoint directory, seen as a tokenizer. SourceError names the file that is damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = self._read("tokenizer_config.json")
        self.special_tokens_map = self._read("special_tokens_map.json")
        self.model_config = self._read("config.json")
        self.generation_config = self._read("generation_config.json")

    @property
    def sentencepiece(self) -> Path | None:
        """tokenizer.model, where there is one."""
        path = self.directory / "tokenizer.model"
        return path if path.is_file() else None

    @cached_property
    def fast(self) -> FastTokenizer | None:
        """tokenizer.json or its predecessors vocab.json and merges.txt; None without either."""
        path, vocab, merges = (self.directory / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
        if path.is_file():
            return _parse(path, read_json(path))
        if vocab.is_file() and merges.is_file() and not self.sentencepiece:
            lines = [line.rstrip("\r") for line in _read_text(merges).split("\n")]
            pairs = [line for line in lines if line and not line.startswith("#version")]
            return _parse(vocab, {"model": {"type": "BPE", "vocab": read_json(vocab), "merges": pairs}})
        return None

    @cached_property
    def listed(self) -> dict[int, AddedToken]:
        """What added_tokens.json and tokenizer_config.json add to the vocabulary, by id."""
        found = {}
        try:
            for text, index in self._read("added_tokens.json").items():
                found[int(index)] = AddedToken(str(text), special=False)
            for index, entry in (self.config.get("added_tokens_decoder") or {}).items():
                found[int(index)] = _added_token(entry)
        except (AttributeError, KeyError, TypeError, ValueError):
            names = "added_tokens.json or added_tokens_decoder in tokenizer_config.json"
            raise SourceError(f"{self.directory}: {names} does not list tokens", DAMAGED) from None
        return found

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """All added tokens by id, those of tokenizer.json included; one that any file calls special is special."""
        found = dict(self.listed)
        for index, token in self.fast.added.items() if self.fast else ():
            special = token.special or (index in found and found[index].special)
            found[index] = replace(token, special=special)
        return found

    def special_token(self, kind: str) -> str | None:
        """The text of the `kind` token (bos, eos, ...) by name, None when no file names it."""
        for source in (self.config, self.special_tokens_map):
            if text := _text(source.get(f"{kind}_token")):
                return text
        return None

    @cached_property
    def special_texts(self) -> set[str]:
        """All tokens that the files name as special."""
        return {text for source in (self.config, self.special_tokens_map) for text in _special_texts(source)}

    def special_id(self, kind: str) -> int | None:
        """The id of the `kind` token in the model's own configuration."""
        nested = self.model_config.get("text_config")
        for source in (self.model_config, nested, self.generation_config):
            value = source.get(f"{kind}_token_id") if isinstance(source, dict) else None
            index = value[0] if isinstance(value, list) and value else value
            if isinstance(index, int) and index >= 0:
                return index
        return None

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name; the one without a name is called default."""
        found: Any = self.config.get("chat_template")
        if found is None and (path := self.directory / "chat_template.jinja").is_file():
            more = sorted((self.directory / "additional_chat_templates").glob("*.jinja"))
            return {"default": _read_text(path)} | {other.stem: _read_text(other) for other in more}
        if found is None:
            found = self._read("chat_template.json").get("chat_template")
        if isinstance(found, str):
            return {"default": found}
        entries = [entry for entry in found or () if isinstance(entry, dict)]
        return {e["name"]: e["template"] for e in entries if e.get("name") and isinstance(e.get("template"), str)}

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.directory / name)
        except FileNotFoundError:
            return {}


def _parse(path: Path, data: dict[str, Any]) -> FastTokenizer:
    try:
        model = data["model"]
        return FastTokenizer(
            path=path,
            vocab={str(text): int(index) for text, index in model["vocab"].items()} if _is_bpe(model) else {},
            merges=[_pair(merge) for merge in model["merges"]] if _is_bpe(model) else [],
            model=model,
            added={int(entry["id"]): _added_token(entry) for entry in data.get("added_tokens") or ()},
            normalizer=_node(data, "normalizer"),
            pre_tokenizer=_node(data, "pre_tokenizer") if path.name == "tokenizer.json" else None,
            post_processor=_node(data, "post_processor"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path}: not a tokenizer: {type(error).__name__} {error}", DAMAGED) from None


def _node(data: dict[str, Any], key: str) -> dict[str, Any]:
    node = data.get(key) or {}
    if not isinstance(node, dict):
        raise TypeError(f"{key} is no object")
    return node


def _is_bpe(model: dict[str, Any]) -> bool:
    return model.get("type", "BPE") == "BPE"


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _added_token(entry: dict[str, Any]) -> AddedToken:
    swallows = bool(entry.get("lstrip") or entry.get("rstrip"))
    return AddedToken(str(entry["content"]), special=bool(entry.get("special")), swallows=swallows)


def _text(value: Any) -> str | None:
    """The text of a token given as a string or as an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _special_texts(source: dict[str, Any]) -> Iterator[str]:
    for key, value in source.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            values = value.values() if isinstance(value, dict) else value or ()
        else:
            values = [value] if key.endswith("_token") else []
        yield from filter(None, map(_text, values))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8: {error}", DAMAGED) from None
