"""Presets are what llama-quantize writes, byte for byte, and what it cannot write is said in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import build_moe
from gguf import GGUFReader
from oracles import convert_with_llama_cpp, llama_cpp_sources

from alphaq_gguf.checkpoint import Source, open_source
from alphaq_gguf.compare.presets import PRESETS, float_file, write_preset
from alphaq_gguf.errors import AlphaQError, OutputError, UsageError
from alphaq_gguf.qtypes import QType
from alphaq_gguf.reporter import Silent


def llama_quantize(gguf: Path, out: Path, preset: str, *options: object) -> None:
    program = llama_cpp_sources() / "build/bin/llama-quantize"
    if not program.is_file():
        pytest.skip("llama-quantize is absent: run python tools/fetch_llama_cpp.py --build")
    command = [program, *map(str, options), gguf, out, preset, "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gguf.parent)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def source(trained: Path) -> Source:
    return open_source(trained)


@pytest.fixture(scope="module")
def floats(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("floats")
    return float_file(source, directory, Silent()).rename(directory / "float.gguf")


@pytest.fixture(scope="module")
def imatrix(floats: Path) -> Path:
    """An importance matrix with made-up figures in llama-imatrix' form."""
    from gguf import GGUFWriter

    path = floats.with_name("imatrix.gguf")
    writer, rng = GGUFWriter(path, "none"), np.random.default_rng(0)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["made-up.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in GGUFReader(floats).tensors:
        if len(tensor.shape) > 1:
            n_cols, n_matrices = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) == 3 else 1
            sums = rng.lognormal(size=(n_matrices, n_cols)).astype(np.float32)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums * 64)
            writer.add_tensor(f"{tensor.name}.counts", np.full((n_matrices, 1), 64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_preset_is_byte_equal_to_llama_quantizes(floats: Path, tmp_path: Path) -> None:
    # One process for all: the quantiser takes over llama.cpp's log, and starting it takes longer than these files.
    code = f"""
from pathlib import Path
from alphaq_gguf.compare.presets import PRESETS, _quantize
from alphaq_gguf.reporter import Silent
for preset in set(PRESETS) - {{"Q2_K_S"}}:
    out = Path({str(tmp_path)!r}, f"{{preset}}.gguf")
    _quantize(Path({str(floats)!r}), out, preset, 1, {{}}, None, Silent())
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    theirs = tmp_path / "theirs.gguf"
    for preset in PRESETS:
        if preset != "Q2_K_S":  # not without an importance matrix
            llama_quantize(floats, theirs, preset)
            assert (tmp_path / f"{preset}.gguf").read_bytes() == theirs.read_bytes(), preset


def test_an_importance_matrix_weighs_as_it_does_in_llama_quantize(floats: Path, imatrix: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write_preset(floats, "Q2_K_S", ours, imatrix=imatrix)
    llama_quantize(floats, theirs, "Q2_K_S", "--imatrix", imatrix.name)
    found, expected = GGUFReader(ours), GGUFReader(theirs)
    for tensor, other in zip(found.tensors, expected.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (other.name, other.tensor_type)
        assert tensor.data.tobytes() == other.data.tobytes(), tensor.name
    for key in ("quantize.imatrix.file", "quantize.imatrix.dataset"):
        assert found.fields[key].contents() == expected.fields[key].contents()


def test_types_of_single_tensors_can_be_chosen(floats: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    # The later one wins here; of llama-quantize's, the first.
    overrides = [("attn_", QType.Q8_0), ("attn_q", QType.F16), ("^(output|token_embd)", QType.Q6_K)]
    write_preset(floats, "Q3_K_M", ours, overrides=overrides)
    types = tmp_path / "types.txt"
    types.write_text("attn_q.weight=f16\nattn_.*weight=q8_0\n^(output|token_embd)=q6_k\n", encoding="utf-8")
    llama_quantize(floats, theirs, "Q3_K_M", "--tensor-type-file", types)
    assert ours.read_bytes() == theirs.read_bytes()
    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(ours).tensors}
    assert found["blk.0.attn_q.weight"] == "F16"
    assert found["blk.0.attn_k.weight"] == "Q8_0"
    assert found["blk.0.attn_q.bias"] == "F32"
    assert found["blk.0.ffn_gate_exps.weight"] == "Q3_K"


def test_the_float_file_holds_what_llama_cpps_converter_writes(tmp_path: Path) -> None:
    model = build_moe(tmp_path / "model", dtype="bfloat16")
    theirs = tmp_path / "theirs.gguf"
    convert_with_llama_cpp(model, theirs, "bf16")
    path = float_file(open_source(model), tmp_path, Silent())
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    expected = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.data.tobytes() == found[name].data.tobytes(), name
    keys = [key for key in GGUFReader(path).fields if key.startswith("alphaq.")]
    assert keys == ["alphaq.config"]
    assert float_file(open_source(path), tmp_path, Silent()) == path
    written = path.stat().st_mtime_ns
    assert float_file(open_source(model), tmp_path, Silent()) == path
    assert path.stat().st_mtime_ns == written


def test_what_llama_cpp_refuses_is_told_in_its_words(floats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(
        AlphaQError, match="cannot quantise it to Q2_K_S: this quantization requires an imatrix!"
    ) as info:
        write_preset(floats, "Q2_K_S", out)
    assert "--imatrix FILE" in info.value.hint
    assert "\n" not in info.value.message
    broken = tmp_path / "broken.gguf"
    data = floats.read_bytes()
    assert data.count(b"qwen2moe.block_count") == 1
    broken.write_bytes(data.replace(b"qwen2moe.block_count", b"qwen2moe.block_caunt"))
    with pytest.raises(AlphaQError, match=r"key not found in model: qwen2moe\.block_count"):
        write_preset(broken, "Q4_0", out)
    assert list(tmp_path.iterdir()) == [broken]


def test_bad_requests_are_refused_before_anything_is_done(floats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(UsageError, match="preset 'Q4_K_X': unknown"):
        write_preset(floats, "Q4_K_X", out)
    with pytest.raises(UsageError, match="matches no tensor"):
        write_preset(floats, "Q4_0", out, overrides=[("nothing", QType.Q8_0)])
    with pytest.raises(OutputError, match="the output is the source itself"):
        write_preset(floats, "Q4_0", floats, force=True)
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        write_preset(floats, "Q4_0", out)
    assert out.read_bytes() == b"mine"


def test_a_full_disk_leaves_nothing_behind(floats: Path, tmp_path: Path) -> None:
    # A limit on the size of files, under which writing fails as on a full disk.
    code = f"""
import resource
from pathlib import Path
from alphaq_gguf.compare.presets import write_preset
from alphaq_gguf.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    write_preset(Path({str(floats)!r}), "Q4_0", Path({str(tmp_path / "out.gguf")!r}))
except OutputError as error:
    print(error)
"""
    if sys.platform == "win32":
        pytest.skip("limits are of Unix")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is the disk full?" in done.stdout, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []
