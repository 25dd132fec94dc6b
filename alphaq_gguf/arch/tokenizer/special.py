"""Special tokens, what is added around a text, and chat templates, as GGUF metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, Keys

from .files import TokenizerFiles

_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")


def add_special_tokens(
    files: TokenizerFiles,
    ids: Mapping[str, int],
    n_vocab: int,
    writer: GGUFWriter,
    *,
    fallback: Mapping[str, str],
    adds_bos: bool,
) -> None:
    """Add special token ids, the flags for adding them, and the chat templates to `writer`.

    `ids` are the ids of all tokens by text; `fallback` names tokens, by kind, that count where the files are
    silent; `adds_bos` says that llama.cpp prepends BOS unless told otherwise.
    """
    named = {kind: files.special_token(kind) for kind in _KINDS}
    named["bos"] = named["bos"] or files.special_token("cls")
    named["eos"] = named["eos"] or named["sep"]
    post_processor = files.fast.post_processor if files.fast else {}
    template = _read_template(post_processor, named)
    silent = {"bos": False, "eos": False} if _processors(post_processor, "ByteLevel") else {}
    explicit = {kind: files.config.get(f"add_{kind}_token") for kind in ("bos", "eos", "sep")}
    explicit = {kind: flag for kind, flag in explicit.items() if isinstance(flag, bool)}
    # Only this class, which DeepSeek's checkpoints name, reads the flags where a post-processor adds nothing.
    obeys = str(files.config.get("tokenizer_class")).startswith("LlamaTokenizer")
    flags = {**silent, **explicit, **template} if obeys else {**explicit, **silent, **template}
    if adds_bos:
        flags.setdefault("bos", False)
    found: dict[str, int] = {}
    for kind, text in named.items():
        index = ids.get(text) if text else None
        index = files.special_id(kind) if index is None else index
        if index is not None and index < n_vocab:
            found[kind] = index
    for kind, text in fallback.items():
        if text in ids:
            found.setdefault(kind, ids[text])
    for kind, index in found.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    for kind, flag in flags.items():
        getattr(writer, f"add_add_{kind}_token")(flag and kind in found)
    _add_chat_templates(files.chat_templates(), writer)


def _read_template(post_processor: dict[str, Any], named: dict[str, str | None]) -> dict[str, bool]:
    """Which of bos, eos and sep the template of tokenizer.json adds; completes `named` by what it shows."""
    flags: dict[str, bool] = {}
    for template in _processors(post_processor, "TemplateProcessing"):
        single, pair = ([_special(part) for part in template.get(key) or ()] for key in ("single", "pair"))
        if len(single) < 2:
            continue
        first, last = single[0], single[-1]
        if first:
            named["bos"] = named["bos"] or first
            flags["bos"] = first == named["bos"]
        if last:
            if last != named["eos"]:
                named["eot"], named["eos"] = named["eos"], last
            flags["eos"] = True
        between = pair[1 if first and pair[:1] == [first] else 0 : -1 if last and pair[-1:] == [last] else None]
        if between and len(between) > 2 and not (between[0] or between[-1]):
            ends = {named["sep"], named["eos"]}
            flags["sep"] = (between[1] in ends and not last) or (len(between) == 4 and between[2] in ends)
            if flags["sep"]:
                named["sep"] = named["sep"] or named["eos"]
    return flags


def _processors(node: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [step for step in node.get("processors") or [node] if step.get("type") == kind]


def _special(part: dict[str, Any]) -> str | None:
    return (part.get("SpecialToken") or {}).get("id")


def _add_chat_templates(templates: Mapping[str, str], writer: GGUFWriter) -> None:
    others = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items() if name != "default"}
    for name, text in others.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), text)
    if others:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, sorted(others))
    if "default" in templates:
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, templates["default"])
