"""llama.cpp's token ids equal those of the checkpoint's tokenizer, and our metadata that of its converter."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import COMMON
from oracles import convert_vocabularies_with_llama_cpp, llama_cpp_sources
from tokenizer_files import (
    AWKWARD,
    CHATML,
    PRE_TOKENIZERS,
    LlamaVocabulary,
    edit_json,
    random_texts,
    tokenizer_metadata,
    write_byte_fallback,
    write_byte_level,
    write_json,
    write_real,
    write_sentencepiece,
    write_vocabulary,
)
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from alphaq_gguf.arch.base import TokenizerRules
from alphaq_gguf.evaluate.llama import LlamaModel

# NFC text: Qwen's tokenizers compose characters and llama.cpp does not.
TEXTS = [unicodedata.normalize("NFC", text) for text in AWKWARD]
CHAT = "<|im_start|>user\nHello, Größe 12!<|im_end|>\n<|im_start|>assistant\n"
N_VOCAB = 1300

# llama.cpp tells upper from lower case in ASCII only there, and takes no marks into words.
CASE = {"É", "Д", "Å", "\u0301", "\u093f", "\u094d", "\u0940"}
# A range of those tokenizers holds spaces, which llama.cpp replaces by an ASCII one before matching.
WIDE_SPACES = {"\u2003", "\u3000"}
KNOWN_DIFFERENCES = {"gpt-4o": CASE, "tekken": CASE, "deepseek-llm": WIDE_SPACES, "deepseek-coder": WIDE_SPACES}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_of_byte_level_tokenizers(name: str, tmp_path: Path) -> None:
    # deepseek-llm takes digits one by one, llama.cpp in runs: the same for vocabularies trained one by one.
    reference = write_byte_level(tmp_path, name, crossing=name != "deepseek-llm", eos_token="<|im_end|>")
    assert write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB) == []
    assert tokenizer_metadata(tmp_path / "vocab.gguf")["tokenizer.ggml.pre"] == ("STRING", name)
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    odd = KNOWN_DIFFERENCES.get(name, set())
    more = [c for c in ("É", "Д", "\u0301", "\u093f", "\u3000") if c not in odd]
    for text in (*TEXTS, *random_texts(600, seed=1, more=more)):
        if not odd & set(text):
            assert theirs.encode(text) == encode(reference, text), repr(text)
    assert theirs.encode(CHAT, parse=True) == encode(reference, CHAT)
    assert theirs.encode("a", add=True) == encode(reference, "a")


@pytest.mark.parametrize("name", ["deepseek-llm", "refact"])
def test_ids_of_public_vocabularies(name: str, tmp_path: Path) -> None:
    """Against ids that llama.cpp's developers took from the checkpoints' own tokenizers."""
    vocabulary = llama_cpp_sources() / f"models/ggml-vocab-{name}.gguf"
    texts = Path(f"{vocabulary}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = Path(f"{vocabulary}.out").read_text(encoding="utf-8").split("\n")
    write_real(tmp_path, vocabulary, name)
    assert write_vocabulary(tmp_path, tmp_path / "vocab.gguf", 103_000) == []
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    for text, ids in zip(texts, expected, strict=True):
        assert theirs.encode(text) == [int(i) for i in ids.split()], repr(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt-4o", "ÉCOLE"),
        ("gpt-4o", "a\u093fZ"),
        ("tekken", "ÉCOLE"),
        ("deepseek-llm", "12"),
        ("deepseek-llm", "\u3000 "),
        ("deepseek-coder", "\u3000 "),
    ],
)
def test_known_differences_in_splitting(name: str, text: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path, name)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    for end in range(2, len(letters) + 1):
        data["model"]["vocab"].setdefault(letters[:end], len(data["model"]["vocab"]))
        data["model"]["merges"].insert(0, [letters[: end - 1], letters[end - 1]])
    write_json(tmp_path, "tokenizer.json", data)
    write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert LlamaVocabulary(tmp_path / "vocab.gguf").encode(text) != encode(reference, text)


@pytest.mark.parametrize(("name", "n_notes"), [("llama-bpe", 0), ("dbrx", 0), ("gpt-4o", 1), ("qwen2", 0)])
def test_words_that_no_merge_makes(name: str, n_notes: int, tmp_path: Path) -> None:
    write_byte_level(tmp_path, name)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["qqqqq"] = len(data["model"]["vocab"])
    write_json(tmp_path, "tokenizer.json", data)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    notes = write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    assert len(notes) == n_notes
    assert ("'qqqqq'" in "".join(notes)) == (theirs.encode("qqqqq") != encode(reference, "qqqqq")) == bool(n_notes)


@pytest.mark.parametrize("name", ["llama-bpe", "tekken", "qwen2"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_added_where_the_checkpoint_adds_it(name: str, adds_bos: bool, tmp_path: Path) -> None:
    reference = write_byte_level(tmp_path, name, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    if adds_bos:
        add_bos_template(tmp_path, reference, "<|endoftext|>")
    write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    assert theirs.encode("a b", add=True) == reference.encode("a b").ids
    assert (theirs.encode("", add=True) == [0]) == adds_bos


def add_bos_template(directory: Path, tokenizer: Tokenizer, bos: str) -> None:
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(directory / "tokenizer.json"))


def test_ids_of_a_sentencepiece_model(tmp_path: Path) -> None:
    reference = write_sentencepiece(tmp_path)
    assert write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB) == []
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    for text in (*TEXTS, *random_texts(1500, seed=2, more=["É", "\u0301", "\u3000"])):
        assert theirs.encode(text) == reference.encode(text), repr(text)
    assert theirs.encode("a", add=True) == [reference.bos_id(), *reference.encode("a")]


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_of_a_byte_fallback_tokenizer_json(prefix: bool, tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path / "spm")
    added = [AddedToken("<|im_start|>", special=True), AddedToken("<think>", normalized=False)]
    reference = write_byte_fallback(tmp_path, model, added)
    if not prefix:
        reference.normalizer = normalizers.Replace(" ", "▁")
        reference.save(str(tmp_path / "tokenizer.json"))
    write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    for text in (*TEXTS, *random_texts(1500, seed=3, more=["É", "\u0301", "\u3000"])):
        assert theirs.encode(text) == encode(reference, text), repr(text)
    chat = "<s>[INST] Hi [/INST]<|im_start|>user\n<think> 12</s> b"
    assert theirs.encode(chat, parse=True) == encode(reference, chat)


def test_a_space_only_before_the_first_word_is_a_known_difference(tmp_path: Path) -> None:
    reference = write_byte_fallback(tmp_path, write_sentencepiece(tmp_path / "spm"))
    reference.normalizer = normalizers.Sequence([])
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    reference.save(str(tmp_path / "tokenizer.json"))
    write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    for text in TEXTS:
        if not text.startswith(" "):
            assert theirs.encode(text) == encode(reference, text), repr(text)
    assert theirs.encode("a") == encode(reference, "a") == encode(reference, " a") != theirs.encode(" a")
    assert theirs.encode("<s>a", parse=True) == encode(reference, "<s> a") != encode(reference, "<s>a")


def test_shortened_spaces_are_a_known_difference(tmp_path: Path) -> None:
    reference = write_sentencepiece(tmp_path, remove_extra_whitespaces=True)
    (note,) = write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    assert "runs of spaces" in note
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    assert theirs.encode("a b") == reference.encode("a b")
    assert theirs.encode("a  b") != reference.encode("a  b") == reference.encode("a b")


def test_spaces_that_tokens_swallow_are_a_known_difference(tmp_path: Path) -> None:
    reference = write_byte_level(tmp_path, "qwen2")
    reference.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    reference.save(str(tmp_path / "tokenizer.json"))
    (note,) = write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    assert "<|end|>" in note
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    assert theirs.encode("<|end|>a", parse=True) == encode(reference, "<|end|>a") == encode(reference, "<|end|> \na")
    assert theirs.encode("<|end|> \na", parse=True) != encode(reference, "<|end|> \na")


def test_spaces_as_added_tokens(tmp_path: Path) -> None:
    """As in OLMoE's vocabulary, which came from GPT-NeoX."""
    reference = write_byte_level(tmp_path, "gpt-2")
    reference.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    reference.save(str(tmp_path / "tokenizer.json"))
    write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    for text in (*TEXTS, *random_texts(600, seed=4, more=["   ", "     "])):
        assert theirs.encode(text) == encode(reference, text), repr(text)


def test_text_that_is_not_nfc_is_a_known_difference(tmp_path: Path) -> None:
    reference = write_byte_level(tmp_path, "qwen2")
    write_vocabulary(tmp_path, tmp_path / "vocab.gguf", N_VOCAB)
    theirs = LlamaVocabulary(tmp_path / "vocab.gguf")
    assert theirs.encode("cafe\u0301") != encode(reference, "cafe\u0301") == theirs.encode("café")


@pytest.mark.parametrize("kind", ["byte-level", "slow", "sentencepiece"])
def test_a_converted_model_tokenizes_as_its_checkpoint(kind: str, tiny_copy: Path, tmp_path: Path, cli) -> None:
    reference = Tokenizer.from_file(str(tiny_copy / "tokenizer.json"))
    options: list[str] = []
    if kind == "slow":
        split_into_slow_files(tiny_copy)
        options = ["--pre-tokenizer", "qwen2"]
    if kind == "sentencepiece":
        (tiny_copy / "tokenizer.json").unlink()
        model = write_sentencepiece(tiny_copy, [text for text in TEXTS if text.isascii()], 390)
        reference = write_byte_fallback(tmp_path, model)
        edit_json(tiny_copy, "tokenizer_config.json", eos_token="</s>", pad_token=None, add_prefix_space=True)
    out = tmp_path / "out.gguf"
    code, _, err = cli("convert", tiny_copy, "-o", out, "--bpw", 4, *options)
    assert code == 0, err
    with LlamaModel(out, n_ctx=64, threads=1) as theirs:
        assert theirs.bos == (1 if kind == "sentencepiece" else None)
        for text in TEXTS:
            assert theirs.tokenize(text) == encode(reference, text), repr(text)
        assert theirs.tokenize(CHAT, special=True) == encode(reference, CHAT)


def split_into_slow_files(directory: Path) -> None:
    """tokenizer.json as the three files that went before it."""
    data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    (directory / "tokenizer.json").unlink()
    write_json(directory, "vocab.json", data["model"]["vocab"])
    lines = ["#version: 0.2", *(" ".join(merge) for merge in data["model"]["merges"]), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    write_json(directory, "added_tokens.json", {token["content"]: token["id"] for token in data["added_tokens"]})


# Where our metadata differs from that of llama.cpp's converter, and why.
DIFFERENCES = {
    # transformers' LlamaTokenizerFast, up to version 4, adds what tokenizer_config.json says: DeepSeek relies on it.
    "explicit bos": {"tokenizer.ggml.add_bos_token"},
    # llama.cpp adds BOS for this pre-tokenizer unless told otherwise; these checkpoints do not.
    "silent on bos": {"tokenizer.ggml.add_bos_token"},
    # Adding a BOS that nobody names would add token 11.
    "no bos": {"tokenizer.ggml.add_bos_token"},
    # The converter gives all tokens one score, which merges from left to right, and overlooks the special flag.
    "json only": {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"},
    # Files that the converter does not read; it looks special tokens up in tokenizer.json alone.
    "mixtral": {"tokenizer.ggml.unknown_token_id"},
    "special tokens map": {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id"},
    "generation config": {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"},
    "template alone": {"tokenizer.chat_template"},
}


class Shelf:
    """Checkpoints without weights, one of each kind of tokenizer, for llama.cpp's converter and for us."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rules: dict[str, TokenizerRules] = {}

    def new(self, name: str, family: str = "Qwen2Moe", rules: TokenizerRules | None = None, **config: Any) -> Path:
        """The directory of a checkpoint whose config.json is that of a tiny `family`, by transformers' class prefix."""
        import transformers

        directory = self.root / name
        directory.mkdir()
        values = {**COMMON, "vocab_size": N_VOCAB, "architectures": [f"{family}ForCausalLM"], **config}
        saved = getattr(transformers, f"{family}Config")(**values).to_dict()
        # transformers fills in special tokens that no checkpoint means.
        write_json(directory, "config.json", {k: v for k, v in saved.items() if not k.endswith("_token_id")} | config)
        self.rules[name] = rules or TokenizerRules()
        return directory

    def compare(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Name, our metadata and the converter's of each checkpoint."""
        jobs = []
        for name, rules in self.rules.items():
            source, ours, theirs = self.root / name, self.root / f"{name} ours.gguf", self.root / f"{name} theirs.gguf"
            n_vocab = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
            write_vocabulary(source, ours, n_vocab, rules=rules)
            jobs.append((source, theirs, tokenizer_metadata(ours)["tokenizer.ggml.pre"][1]))
        convert_vocabularies_with_llama_cpp(jobs)
        for name in self.rules:
            ours, theirs = (tokenizer_metadata(self.root / f"{name} {whose}.gguf") for whose in ("ours", "theirs"))
            yield name, ours, theirs


def added(*tokens: tuple[int, str, bool]) -> dict[str, Any]:
    """An added_tokens_decoder of (id, text, special)."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {str(index): {"content": text, "special": special, **flags} for index, text, special in tokens}


def fill_with_byte_level(shelf: Shelf) -> None:
    qwen = shelf.new("qwen", bos_token_id=0)
    tokenizer = write_byte_level(qwen, "qwen2", eos_token="<|im_end|>")
    tokenizer.add_tokens(["<think>", "<|odd|>", "▁gap", "<pad>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(qwen / "tokenizer.json"))
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool use", "template": "{{ 2 }}"}]
    pad = {"__type": "AddedToken", "content": "<|endoftext|>", "normalized": False}
    edit_json(qwen, "tokenizer_config.json", add_bos_token=False, chat_template=templates, pad_token=pad)

    listed = shelf.new("listed", "Qwen3Moe", head_dim=64)
    tokenizer = write_byte_level(listed, "qwen2", eos_token="<|im_end|>", additional_special_tokens=["<tool>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(listed / "tokenizer.json"))
    decoder = added(*((i, text, True) for i, text in enumerate(CHATML)), (1200, "<tool>", False), (1201, "<x>", True))
    edit_json(listed, "tokenizer_config.json", added_tokens_decoder=decoder)

    granite = shelf.new("granite", "GraniteMoe", TokenizerRules(space_prefix=True), num_local_experts=4)
    tokenizer = write_byte_level(granite, "llama-bpe", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    add_bos_template(granite, tokenizer, "<|endoftext|>")
    edit_json(granite, "tokenizer_config.json", add_prefix_space=False)
    (granite / "chat_template.jinja").write_text("{{ 'jinja' }}", encoding="utf-8")
    (granite / "additional_chat_templates").mkdir()
    (granite / "additional_chat_templates/rag.jinja").write_text("{{ 'rag' }}", encoding="utf-8")

    special = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
    rules = TokenizerRules(special=special, preferred=("glm4",))
    glm = shelf.new("glm", "Glm4Moe", rules, n_routed_experts=4, head_dim=64, eos_token_id=[0, 2], pad_token_id=0)
    texts = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
    write_byte_level(glm, "llama-bpe", special=texts, eos_token="<|endoftext|>", pad_token="<|endoftext|>")

    template = shelf.new("bos and eos")
    tokenizer = write_byte_level(template, "qwen2", eos_token="<|im_end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    tokenizer.save(str(template / "tokenizer.json"))

    explicit = shelf.new("explicit bos")
    tokenizer = write_byte_level(
        explicit, "deepseek-v3", bos_token="<|im_start|>", add_bos_token=True, tokenizer_class="LlamaTokenizerFast"
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(explicit / "tokenizer.json"))

    write_byte_level(shelf.new("silent on bos"), "tekken", eos_token="<|im_end|>")
    write_byte_level(shelf.new("no bos"), "qwen2", eos_token="<|im_end|>", add_bos_token=True)

    mapped = shelf.new("special tokens map")
    write_byte_level(mapped, "qwen2")
    write_json(
        mapped, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    )

    generation = shelf.new("generation config")
    write_byte_level(generation, "qwen2")
    write_json(generation, "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 0]})

    template = shelf.new("template alone")
    write_byte_level(template, "qwen2")
    (template / "tokenizer_config.json").unlink()
    (template / "chat_template.jinja").write_text("{{ 'jinja' }}", encoding="utf-8")


def fill_with_sentencepiece(shelf: Shelf) -> None:
    mixtral = shelf.new("mixtral", "Mixtral", TokenizerRules(space_prefix=True), num_local_experts=4)
    write_sentencepiece(mixtral)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True}
    control = [(0, "<unk>", True), (1, "<s>", True), (2, "</s>", True)]
    decoder = {"added_tokens_decoder": added(*control, (700, "<|im_start|>", False))}
    write_json(mixtral, "tokenizer_config.json", named | flags | decoder)
    write_json(mixtral, "added_tokens.json", {"<|im_start|>": 700, "<tool>": 701, "too far": N_VOCAB})
    edit_json(mixtral, "config.json", bos_token_id=1, eos_token_id=2)

    rope = {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 512}
    phi = shelf.new("phi", "Phimoe", architectures=["PhiMoEForCausalLM"], num_local_experts=4, rope_parameters=rope)
    more = [AddedToken("<|end|>", special=True), AddedToken("<tool>", special=False)]
    write_byte_fallback(phi, write_sentencepiece(phi), more)
    edit_json(phi, "config.json", bos_token_id=1, eos_token_id=600)
    decoder = {"added_tokens_decoder": added(*control, (600, "<|end|>", True))}
    chat = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>", "chat_template": "{{ 0 }}"}
    write_json(phi, "tokenizer_config.json", named | chat | decoder)

    ernie = shelf.new("ernie", "Ernie4_5_Moe", TokenizerRules(space_prefix=True))
    write_sentencepiece(ernie, add_dummy_prefix=False)
    write_json(ernie, "tokenizer_config.json", {"add_prefix_space": False, "add_bos_token": False})
    edit_json(ernie, "config.json", bos_token_id=1, eos_token_id=2, pad_token_id=0)

    fast = shelf.new("json only", "Mixtral", num_local_experts=4, vocab_size=602)
    write_byte_fallback(fast, write_sentencepiece(shelf.root / "model"), more)
    write_json(fast, "tokenizer_config.json", named | {"tokenizer_class": "PreTrainedTokenizerFast"})


def test_metadata_equal_that_of_llama_cpps_converter(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    fill_with_byte_level(shelf)
    fill_with_sentencepiece(shelf)
    for name, ours, theirs in shelf.compare():
        differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
        assert differing == DIFFERENCES.get(name, set()), name
