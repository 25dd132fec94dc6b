"""Tokenizers that tests train on the fly, in the forms in which checkpoints ship them, and llama.cpp's view of them."""

from __future__ import annotations

import ctypes
import io
import json
import random
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from checkpoints import CORPUS, ROOT
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alphaq_gguf.arch.base import TokenizerRules
from alphaq_gguf.arch.tokenizer import add_tokenizer
from alphaq_gguf.evaluate.llama_log import collect_errors

AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "It's we'll I'd THEY'RE you've O'Neil 'quoted' IT'S don'T",
    "1 12 123 1234567890 3.14159 0x1F ½ ² ٣٤٥ 12345 99",
    "a\tb\n\n\nc\r\nd\r e\n ",
    "naïve café Größe façade Ångström Việt Nam",
    "東京タワー москва ελληνικά עברית العربية हिन्दी ไทย 한국어 你好\uff0c世界。",
    "😀👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 combining",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # comment\n",
    "$$$ !!! ??? ---- ==== //// \\\\\\ <<>> && || ~~~ ``` \x00\x01\x7f",
    "camelCase HTMLParser iPhone a/b/c http://x.y/z?q=1&r=2 snake_case_9",
    "\u00a0\u2003\u3000\u200b zero\u200dwidth \ufeff bom",
    "x" * 300,
    " \n \n\n \t \t\t\n  \n   \n    \n     \n",
    *CORPUS,
]

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Pre-tokenizers as the tokenizer.json of public checkpoints writes them, by llama.cpp's name.
PRE_TOKENIZERS: dict[str, Any] = json.loads((ROOT / "tests/pre_tokenizers.json").read_text(encoding="utf-8"))

_ALPHABET = [
    *"aZbX019 '.,!?-/\\_$+(\n\r\t <=|",
    *("  ", "\n\n", "'s", "'LL", "é", "ß", "ñ", "д", "中", "文", "か", "カ", "한", "ع", "ह", "ก"),
    *("\u00a0", "½", "²", "٣", "😀", "€", "—", "\uff0c", "。", "\u200d"),
]


def random_texts(count: int, seed: int, more: Sequence[str] = ()) -> Iterator[str]:
    """Short NFC strings that mix what splitting rules tell apart; `more` joins the alphabet."""
    draw = random.Random(seed)
    for _ in range(count):
        yield unicodedata.normalize("NFC", "".join(draw.choices([*_ALPHABET, *more], k=draw.randint(1, 16))))


def write_json(directory: Path, name: str, data: object) -> None:
    (directory / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def edit_json(directory: Path, name: str, **changes: Any) -> None:
    """Set top-level fields of a JSON file."""
    write_json(directory, name, {**json.loads((directory / name).read_text(encoding="utf-8")), **changes})


def write_byte_level(
    directory: Path,
    name: str,
    *,
    special: Sequence[str] = CHATML,
    vocab_size: int = 1200,
    crossing: bool = False,
    **config: Any,
) -> Tokenizer:
    """A byte-level BPE that splits as the `name` of tests/pre_tokenizers.json; `config` is tokenizer_config.json.

    `crossing` trains it on unsplit text, so that its merges cross every border that splitting could miss or invent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    form = PRE_TOKENIZERS[name]
    model = {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": form["ignore_merges"]}
    tokenizer = Tokenizer.from_str(json.dumps({"pre_tokenizer": form["pre_tokenizer"], "model": model}))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    splitting = tokenizer.pre_tokenizer
    if crossing:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator([*AWKWARD, *random_texts(2000, seed=7)], trainer)
    tokenizer.pre_tokenizer = splitting
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory, "tokenizer_config.json", config)
    return tokenizer


def write_sentencepiece(directory: Path, texts: Sequence[str] = AWKWARD, vocab_size: int = 600, **options: Any) -> Any:
    """A tokenizer.model like those of Llama and Mixtral, with byte fallback; `options` go to its trainer."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **{**defaults, **options}
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_byte_fallback(directory: Path, model: Any, added: Sequence[AddedToken] = ()) -> Tokenizer:
    """The tokenizer.json that `model`, a SentencePiece processor, is converted to, with more `added` tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = {model.IdToPiece(i): i for i in range(model.vocab_size())}
    whole = [i for i in ids.values() if not (model.IsControl(i) or model.IsUnknown(i) or model.IsByte(i))]
    merges = []
    for index in whole:
        piece = model.IdToPiece(index)
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(-model.GetScore(index), ids[a], ids[b], (a, b)) for a, b in halves if a in ids and b in ids]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids, merges=[m[3] for m in sorted(merges)], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def write_real(directory: Path, vocabulary: Path, name: str) -> None:
    """The tokenizer.json of a public checkpoint, from a GGUF of its vocabulary and the form that `name` says."""
    fields = GGUFReader(vocabulary).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "token_type", "merges"))
    form = PRE_TOKENIZERS[name]
    model = {"type": "BPE", "merges": merges, "ignore_merges": form["ignore_merges"]}
    model["vocab"] = {text: index for index, text in enumerate(tokens) if types[index] != TokenType.UNUSED}
    added = [
        {"id": index, "content": text, "special": types[index] == TokenType.CONTROL}
        for index, text in enumerate(tokens)
        if types[index] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    data = {"added_tokens": added, "pre_tokenizer": form["pre_tokenizer"], "model": model}
    write_json(directory, "tokenizer.json", data)


def write_vocabulary(
    directory: Path, out: Path, n_vocab: int, *, pre_tokenizer: str | None = None, rules: TokenizerRules | None = None
) -> list[str]:
    """A GGUF that holds the tokenizer of `directory` and nothing else; returns what `add_tokenizer` notes."""
    writer = GGUFWriter(out, "llama")
    notes = add_tokenizer(directory, n_vocab, writer, pre_tokenizer, rules)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def tokenizer_metadata(path: Path) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a GGUF with its types."""
    fields = GGUFReader(path).fields
    return {k: (f.types[0].name, f.contents()) for k, f in fields.items() if k.startswith("tokenizer.")}


class LlamaVocabulary:
    """The vocabulary of a GGUF, loaded by llama.cpp without any weights."""

    def __init__(self, path: Path) -> None:
        # llama-cpp-python's own log callback fails on the cut-off tokens that llama.cpp prints.
        collect_errors()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model is not None, f"llama.cpp cannot load {path}"
        self._model = model
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)

    def __del__(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def encode(self, text: str, *, parse: bool = False, add: bool = False) -> list[int]:
        """Token ids; `parse` reads control tokens written out, `add` adds what the file says belongs around a text."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), add, parse)
        assert count >= 0
        return list(ids[:count])
