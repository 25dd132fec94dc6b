"""What both kinds of tokenizers share: the type of an added token, the text a tokenizer changes, what came out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from gguf import TokenType

from ...errors import SourceError
from .files import AddedToken, FastTokenizer

_MARKERS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
_CONTROL_TEXTS = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}


@dataclass(frozen=True)
class Vocabulary:
    """All tokens by id. `pre` is llama.cpp's name of the splitting; `space_prefix` says whether text gets a leading
    space, None where llama.cpp never adds one; `notes` say what it will do otherwise than the checkpoint.
    """

    tokens: list[str]
    pre: str = "default"
    space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


def classify(token: AddedToken, special_texts: Collection[str]) -> tuple[str, TokenType]:
    """Text and type of an added token; markers such as <|im_start|> are control tokens even where no file says so."""
    looks_special = token.text in _CONTROL_TEXTS or any(
        token.text.startswith(start) and token.text.endswith(end) for start, end in _MARKERS
    )
    if token.special or looks_special or token.text in special_texts:
        return token.text, TokenType.CONTROL
    return token.text.replace("\u2581", " "), TokenType.USER_DEFINED


def check_normalizer(fast: FastTokenizer, allowed: Collection[str]) -> None:
    """SourceError when the tokenizer changes text in ways other than `allowed` before it splits it."""
    steps = fast.normalizer.get("normalizers", [fast.normalizer])
    odd = [str(step.get("type")) for step in steps if step and step.get("type") not in allowed]
    if odd:
        raise SourceError(
            f"{fast.path}: the tokenizer changes text before splitting it ({', '.join(odd)}), llama.cpp does not",
            "there is no GGUF metadata for this tokenizer",
        )
