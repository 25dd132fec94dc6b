"""llama.cpp's own converter, quantiser and tokenizer agree with ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import LAYOUTS, build_moe
from gguf import GGUFReader
from oracles import convert_all_with_llama_cpp, convert_with_llama_cpp, quantize_with_llama_cpp

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


def metadata(path: Path) -> dict[str, object]:
    fields = GGUFReader(path).fields
    return {
        key: (field.types[0].name, field.contents())
        for key, field in fields.items()
        if not key.startswith(("GGUF.", "alphaq.")) and key not in OWN_KEYS
    }


NAME = "Tiny-Test-Moe-2B-Instruct-v1.1"

VARIANTS = {
    **LAYOUTS,
    "bf16 shards": {"shards": True, "dtype": "bfloat16"},
    "rope scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    "Qwen3Moe fused and tied": {"family": "Qwen3Moe", "fused": True, "tie_word_embeddings": True},
}


def saved(layout: str) -> str:
    """A name for the layout's checkpoint as saved: their converter reads fused experts of few families."""
    return repr(sorted({**VARIANTS[layout], "fused": False}.items(), key=str))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What llama.cpp's converter makes of each checkpoint as saved, all in one process."""
    converted: dict[str, Path] = {}
    pairs = []
    for layout in VARIANTS:
        if saved(layout) not in converted:
            directory = tmp_path_factory.mktemp("theirs")
            converted[saved(layout)] = directory / "theirs.gguf"
            source = describe(build_moe(directory / NAME, **{**VARIANTS[layout], "fused": False}))
            pairs.append((source, converted[saved(layout)]))
    convert_all_with_llama_cpp(pairs)
    return converted


def describe(source: Path) -> Path:
    """Give a checkpoint a model card and settings of generation."""
    (source / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    generation = '{"temperature": 0.7, "top_k": 20, "top_p": 0.8}'
    (source / "generation_config.json").write_text(generation, encoding="utf-8")
    return source


@pytest.mark.parametrize("layout", VARIANTS)
def test_tensors_and_metadata_equal_those_of_llama_cpps_converter(layout: str, theirs, tmp_path: Path, cli) -> None:
    source, ours = describe(build_moe(tmp_path / NAME, **VARIANTS[layout])), tmp_path / "ours.gguf"
    code, _, err = cli("convert", source, "-o", ours, "--bpw", 32, "--tensor-type", r"\.weight$=F32")
    assert code == 0, err
    expected = theirs[saved(layout)]
    their_tensors = {t.name: t for t in GGUFReader(expected).tensors}
    our_tensors = {t.name: t for t in GGUFReader(ours).tensors}
    assert their_tensors.keys() == our_tensors.keys()
    for name, tensor in their_tensors.items():
        assert tensor.shape.tolist() == our_tensors[name].shape.tolist(), name
        np.testing.assert_array_equal(tensor.data, our_tensors[name].data, err_msg=name)
    assert metadata(ours) == metadata(expected)


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
