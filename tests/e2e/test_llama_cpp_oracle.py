"""llama.cpp's own converter, quantiser and tokenizer agree with ours."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CORPUS, FAMILIES, QWEN2_REGEX, build_moe, write_tokenizer
from gguf import GGUFReader
from oracles import convert_with_llama_cpp, quantize_with_llama_cpp

from alphaq_gguf.evaluate.llama import LlamaModel

# Keys that describe our file and not the model.
OWN_KEYS = {"general.quantized_by", "general.file_type"}

MODEL_CARD = """---
license: apache-2.0
base_model: someone/Base-Model-7x2B
language: [en, de]
tags: [moe, tiny]
---
# A model
"""

AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "It's we'll I'd THEY'RE you've O'Neil 'quoted'",
    "1 12 123 1234567890 3.14159 0x1F ½ ² ٣",
    "a\tb\n\n\nc\r\nd\r e\n ",
    "naïve café Größe façade Ångström Việt Nam",
    "東京タワー москва ελληνικά עברית العربية हिन्दी ไทย",
    "😀👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 combining",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # comment\n",
    "$$$ !!! ??? ---- ==== //// \\\\\\ <<>> && || ~~~ ``` \x00\x01\x7f",
    "\u00a0\u2003\u3000\u200b zero\u200dwidth \ufeff bom",
    "x" * 300,
    *CORPUS,
]


def metadata(path: Path) -> dict[str, object]:
    fields = GGUFReader(path).fields
    return {
        key: (field.types[0].name, field.contents())
        for key, field in fields.items()
        if not key.startswith(("GGUF.", "alphaq.")) and key not in OWN_KEYS
    }


LAYOUTS = {
    **{family: {"family": family} for family in FAMILIES},
    **{f"{family} fused": {"family": family, "fused": True} for family in FAMILIES},
    "bf16 shards": {"shards": True, "dtype": "bfloat16"},
    "rope scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    "Qwen3Moe fused and tied": {"family": "Qwen3Moe", "fused": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_and_metadata_equal_those_of_llama_cpps_converter(layout: str, tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "Tiny-Test-Moe-2B-Instruct-v1.1", **LAYOUTS[layout])
    (source / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    (source / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 20, "top_p": 0.8}', encoding="utf-8")
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    convert_with_llama_cpp(source, theirs)
    code, _, err = cli("convert", source, "-o", ours, "--bpw", 32, "--tensor-type", r"\.weight$=F32")
    assert code == 0, err
    their_tensors = {t.name: t for t in GGUFReader(theirs).tensors}
    our_tensors = {t.name: t for t in GGUFReader(ours).tensors}
    assert their_tensors.keys() == our_tensors.keys()
    for name, tensor in their_tensors.items():
        assert tensor.shape.tolist() == our_tensors[name].shape.tolist(), name
        np.testing.assert_array_equal(tensor.data, our_tensors[name].data, err_msg=name)
    assert metadata(ours) == metadata(theirs)


def test_a_tied_output_is_written_out_because_llama_cpp_needs_it(tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "model", tie_word_embeddings=True)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    convert_with_llama_cpp(source, theirs)
    assert cli("convert", source, "-o", ours, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    their_names = {t.name for t in GGUFReader(theirs).tensors}
    our_tensors = {t.name: t for t in GGUFReader(ours).tensors}
    assert our_tensors.keys() - their_names == {"output.weight"}
    np.testing.assert_array_equal(our_tensors["output.weight"].data, our_tensors["token_embd.weight"].data)


@pytest.mark.parametrize("bpw", [2.7, 3.5, 5.0, 8.5])
def test_blocks_are_byte_equal_to_llama_cpps_quantiser(bpw: float, tiny: Path, tmp_path: Path, cli) -> None:
    float_file, ours, theirs = tmp_path / "f32.gguf", tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert cli("convert", tiny, "-o", float_file, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    assert cli("convert", tiny, "-o", ours, "--bpw", bpw, "--strategy", "mse")[0] == 0
    ours_read = {t.name: t for t in GGUFReader(ours).tensors}
    types = {name: int(t.tensor_type) for name, t in ours_read.items()}
    quantize_with_llama_cpp(float_file, theirs, {n: t for n, t in types.items() if t != 0})
    theirs_read = {t.name: t for t in GGUFReader(theirs).tensors}
    assert {n: int(t.tensor_type) for n, t in theirs_read.items()} == types
    for name, tensor in theirs_read.items():
        assert tensor.data.tobytes() == ours_read[name].data.tobytes(), name
    assert any(t not in (0, 8) for t in types.values()) or bpw > 8


def test_blocks_of_odd_rows_are_byte_equal_to_llama_cpps_quantiser(tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "model", moe_intermediate_size=352)
    float_file, theirs = tmp_path / "f32.gguf", tmp_path / "theirs.gguf"
    assert cli("convert", source, "-o", float_file, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    for name in ("Q4_0", "Q5_0", "Q5_1", "IQ4_NL"):
        ours = tmp_path / f"{name}.gguf"
        code, _, err = cli("convert", source, "-o", ours, "--bpw", 32, "--tensor-type", f"_exps={name}")
        assert code == 0, err
        ours_read = {t.name: t for t in GGUFReader(ours).tensors}
        types = {n: int(t.tensor_type) for n, t in ours_read.items()}
        assert ours_read["blk.0.ffn_down_exps.weight"].tensor_type.name == name
        theirs.unlink(missing_ok=True)
        quantize_with_llama_cpp(float_file, theirs, {n: t for n, t in types.items() if t != 0})
        for tensor in GGUFReader(theirs).tensors:
            assert int(tensor.tensor_type) == types[tensor.name]
            assert tensor.data.tobytes() == ours_read[tensor.name].data.tobytes(), tensor.name


@pytest.mark.parametrize(
    ("regex", "name"),
    [(QWEN2_REGEX, "qwen2"), (QWEN2_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|"), "llama-bpe"), (None, "gpt-2")],
)
def test_token_ids_equal_those_of_the_checkpoints_tokenizer(
    regex: str | None, name: str, tiny_copy: Path, tmp_path: Path, cli
) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(tiny_copy, regex=regex)
    out = tmp_path / "out.gguf"
    code, _, err = cli("convert", tiny_copy, "-o", out, "--bpw", 4)
    assert code == 0, err
    assert metadata(out)["tokenizer.ggml.pre"] == ("STRING", name)
    # The generic class takes tokenizer.json as it is; the Qwen2 class would put its own regex in.
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tiny_copy / "tokenizer.json"))
    reference.chat_template = json.loads((tiny_copy / "tokenizer_config.json").read_text())["chat_template"]
    with LlamaModel(out, n_ctx=64, threads=1) as model:
        for text in AWKWARD:
            # Qwen's tokenizer normalises to NFC and llama.cpp does not, so the text is NFC to begin with.
            composed = unicodedata.normalize("NFC", text)
            assert model.tokenize(composed) == reference.encode(composed, add_special_tokens=False), repr(composed)
        chat = reference.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
        assert model.tokenize(chat, special=True) == reference.encode(chat, add_special_tokens=False)
        assert len(model.tokenize("<|im_start|>", special=True)) == 1
        assert model.bos is None


def test_text_that_is_not_nfc_is_the_known_difference(tiny: Path, tmp_path: Path, cli) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out.gguf"
    assert cli("convert", tiny, "-o", out, "--bpw", 4)[0] == 0
    decomposed = unicodedata.normalize("NFD", "café")
    with LlamaModel(out, n_ctx=64, threads=1) as model:
        ours = model.tokenize(decomposed)
        theirs = AutoTokenizer.from_pretrained(tiny).encode(decomposed, add_special_tokens=False)
        assert ours != theirs
        assert model.tokenize(unicodedata.normalize("NFC", decomposed)) == theirs
