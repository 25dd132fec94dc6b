"""Whether two models read text alike, as llama.cpp's own tokenizers tell."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..checkpoint import Source
from ..checkpoint.gguf import GGUFSource
from ..errors import AlphaQError
from ..evaluate.llama import LlamaVocabulary

# What the known ways of splitting text take apart differently.
_PROBE = (
    "It's I'LL we've DON'T 1234567890 3.14 12,345  \t\n\n   HTMLParser's x_y2=f(a[0])!= \u201cna\u00efve\u201d "
    "Gr\u00f6\u00dfe E\u0301 \u6771\u4eac\u3068 \u043c\u043e\u0441\u043a\u0432\u0430 \u0627\u0644\u0639\u0631 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \U0001f600\r\n\r\n  end  "
)
_HINT = "give the reference that the file was made from"


def open_vocabulary(source: Source) -> LlamaVocabulary:
    """llama.cpp's tokenizer of `source`; SourceError without one."""
    if isinstance(source, GGUFSource):
        return LlamaVocabulary(source.files[0])
    return LlamaVocabulary.of_fields(source.fields)


def check_vocabularies(source: Source, path: Path) -> None:
    """AlphaQError when the GGUF at `path` makes other tokens of text than the reference `source`, with how they differ.

    What tokens are called counts only where a text can hold them.
    """
    with open_vocabulary(source) as reference, LlamaVocabulary(path) as candidate:
        problem = _difference(reference, candidate)
    if problem:
        raise AlphaQError(f"{path}: {problem}", _HINT)


def _difference(reference: LlamaVocabulary, candidate: LlamaVocabulary) -> str | None:
    theirs, ours = _pieces(reference), _pieces(candidate)
    if len(ours) != len(theirs):
        return f"has {len(ours):,} tokens in its vocabulary, the reference {len(theirs):,}"
    for i, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        if found != expected:
            return f"another tokenizer than the reference's: token {i} is {found}, there {expected}"
    if candidate.bos != reference.bos:
        begin, begin_there = (f"token {v.bos}" if v.bos is not None else "none" for v in (candidate, reference))
        return f"another tokenizer than the reference's: texts begin with {begin}, there with {begin_there}"
    found, expected = candidate.tokenize(_PROBE), reference.tokenize(_PROBE)
    if found != expected:
        i = next(i for i, (a, b) in enumerate(zip_longest(found, expected)) if a != b)
        before = candidate.llm.detokenize(found[:i]).decode("utf-8", "replace")[-10:]
        piece, piece_there = ([*map(ours.__getitem__, tokens), "nothing"][i] for tokens in (found, expected))
        return f"splits text otherwise than the reference: after {before!r} comes {piece}, there {piece_there}"
    return None


def _pieces(vocabulary: LlamaVocabulary) -> list[str]:
    """Every token as it is spelt in the file, quoted; what is declared unused is all the same."""
    import llama_cpp

    model: Any = llama_cpp.llama_model_get_vocab(vocabulary.llm.model)
    return [
        "unused"
        if llama_cpp.llama_vocab_get_attr(model, i) & llama_cpp.LLAMA_TOKEN_ATTR_UNUSED
        else repr(llama_cpp.llama_vocab_get_text(model, i).decode("utf-8", "replace"))
        for i in range(llama_cpp.llama_vocab_n_tokens(model))
    ]
