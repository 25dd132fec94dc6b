"""Rounding weighed by an importance matrix is llama.cpp's own, byte for byte, and never half one and half another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import build_moe
from gguf import GGUFReader, GGUFWriter
from oracles import llama_cpp_sources, quantize_with_llama_cpp

from alphaq_gguf.budget import AllocationSettings
from alphaq_gguf.calibration.imatrix import ImportanceMatrix, open_importance
from alphaq_gguf.checkpoint import Source, open_source
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.pipeline import allocate, convert, plan_file
from alphaq_gguf.qtypes import FLOAT_TYPES, QType
from alphaq_gguf.recipe import Recipe, tensor_type_lines

UNROUTED = 2
UNKNOWN = "blk.1.attn_k.weight"

K_QUANTS = {
    "token_embd": QType.Q4_K,
    "output.weight": QType.Q6_K,
    "blk.0.ffn_gate_exps": QType.Q2_K,
    "blk.0.ffn_up_exps": QType.Q3_K,
    "blk.0.ffn_down_exps": QType.Q4_K,
    "blk.1.ffn_gate_exps": QType.Q5_K,
    "blk.1.ffn_up_exps": QType.Q6_K,
    "blk.1.ffn_down_exps": QType.Q8_0,
    "blk.0.attn_q": QType.Q2_K,
    "blk.0.attn_k": QType.Q3_K,
    "blk.0.attn_v": QType.Q4_K,
    "blk.0.attn_output": QType.Q5_K,
    "blk.1.attn_": QType.Q6_K,
    "shexp": QType.Q3_K,
}
# Down projections of 352 columns.
LEGACY = {
    "blk.0.ffn_gate_exps": QType.IQ4_NL,
    "blk.0.ffn_up_exps": QType.Q4_0,
    "blk.0.ffn_down_exps": QType.Q5_0,
    "blk.1.ffn_gate_exps": QType.Q5_1,
    "blk.1.ffn_up_exps": QType.Q5_0,
    "blk.1.ffn_down_exps": QType.Q4_0,
    "blk.2.ffn_down_exps": QType.Q5_1,
    "attn_": QType.Q4_0,
}
CASES: dict[str, tuple[dict[str, QType], dict[str, Any]]] = {
    "K-quants": (K_QUANTS, {}),
    "odd rows": (LEGACY, {"moe_intermediate_size": 352, "num_hidden_layers": 3}),
}


def write_imatrix(path: Path, source: Source, seed: int = 0) -> dict[str, np.ndarray]:
    """A file as llama-imatrix writes it, of unequal moments; returns the mean squares in it.

    It has all matrices but the embedding and UNKNOWN, and expert UNROUTED of layer 0 without tokens.
    """
    rng = np.random.default_rng(seed)
    # The package insists on an architecture, which these files have none of.
    writer = GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    means = {}
    for info in source.tensors.values():
        if len(info.shape) < 2 or info.name in ("token_embd.weight", UNKNOWN):
            continue
        n_matrices = info.shape[0] if len(info.shape) == 3 else 1
        counts = rng.integers(1, 300, (n_matrices, 1)).astype(np.float32)
        sums = (rng.gamma(0.3, size=(n_matrices, info.n_cols)) * counts).astype(np.float32)
        if info.name.startswith("blk.0.") and n_matrices > 1:
            counts[UNROUTED], sums[UNROUTED] = 0, 0
        writer.add_tensor(f"{info.name}.in_sum2", sums)
        writer.add_tensor(f"{info.name}.counts", counts)
        means[info.name] = np.where(counts, sums / np.maximum(counts, 1), np.float32(1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means


def write_floats(source: Source, out: Path, cache_dir: Path) -> Path:
    """`source` as a GGUF of F32, for llama.cpp to quantise."""
    settings = AllocationSettings(bpw=32, strategy="uniform", overrides=((r"\.weight$", QType.F32),))
    return convert(source, allocate(source, settings, cache_dir=cache_dir), out).path


def decide(source: Source, types: dict[str, QType], imatrix: Path | None, cache_dir: Path) -> Recipe:
    settings = AllocationSettings(bpw=32, strategy="uniform", overrides=tuple(types.items()), imatrix=imatrix)
    return allocate(source, settings, cache_dir=cache_dir)


def read_tensors(path: Path) -> dict[str, tuple[QType, bytes]]:
    return {t.name: (QType(t.tensor_type), t.data.tobytes()) for t in GGUFReader(path).tensors}


Weighed = tuple[Source, Path, ImportanceMatrix, Recipe]


@pytest.fixture
def weighed(tiny: Path, tmp_path: Path, cache_dir: Path) -> Weighed:
    """The tiny model, an importance matrix of it, and a recipe made with that."""
    source, file = open_source(tiny), tmp_path / "imatrix.gguf"
    write_imatrix(file, source)
    return source, file, open_importance(file, source), decide(source, K_QUANTS, file, cache_dir)


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_byte_equal_to_llama_cpps_quantiser(case: str, tmp_path: Path, cache_dir: Path) -> None:
    wanted, changes = CASES[case]
    source, file = open_source(build_moe(tmp_path / "model", **changes)), tmp_path / "imatrix.gguf"
    means = write_imatrix(file, source)
    assert len(means) > 20
    recipe = decide(source, wanted, file, cache_dir)
    ours = read_tensors(convert(source, recipe, tmp_path / "ours.gguf", imatrix=open_importance(file, source)).path)
    types = {name: qtype for name, (qtype, _) in ours.items()}
    assert set(wanted.values()) <= set(types.values())
    floats = write_floats(source, tmp_path / "f32.gguf", cache_dir)
    theirs = tmp_path / "theirs.gguf"
    quantised = {name: int(qtype) for name, qtype in types.items() if qtype != QType.F32}
    quantize_with_llama_cpp(floats, theirs, quantised, imatrix=means)
    found = read_tensors(theirs)
    assert {name: qtype for name, (qtype, _) in found.items()} == types
    for name, (_, data) in found.items():
        assert data == ours[name][1], name
    # So that both did not just leave the importance out: it changes all that it knows and can change.
    plain = read_tensors(convert(source, decide(source, wanted, None, cache_dir), tmp_path / "plain.gguf").path)
    changed = {name for name, tensor in plain.items() if tensor != ours[name]}
    assert changed == {n for n, q in types.items() if n in means and q not in (QType.Q8_0, *FLOAT_TYPES)}


def test_the_file_is_the_one_llama_quantize_makes_of_the_recipe(weighed: Weighed, tmp_path: Path, cache_dir) -> None:
    tool = llama_cpp_sources() / "build/bin/llama-quantize"
    if not tool.exists():
        pytest.skip("llama-quantize is not built: run python tools/fetch_llama_cpp.py --build")
    source, file, imatrix, recipe = weighed
    ours = convert(source, recipe, tmp_path / "ours.gguf", imatrix=imatrix).path
    floats, theirs, types = write_floats(source, tmp_path / "f32.gguf", cache_dir), tmp_path / "theirs", tmp_path / "t"
    types.write_text(tensor_type_lines(recipe))
    options = ["--imatrix", file, "--tensor-type-file", types, "--token-embedding-type", "q4_K"]
    command = [tool, *options, "--output-tensor-type", "q6_K", floats, theirs, "Q8_0", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_tensors(theirs) == read_tensors(ours)
    our_fields, their_fields = GGUFReader(ours).fields, GGUFReader(theirs).fields
    # They have the path, and the first dataset of several.
    assert our_fields["quantize.imatrix.file"].contents() == "imatrix.gguf"
    assert their_fields["quantize.imatrix.file"].contents() == str(file)[:127]
    assert our_fields["quantize.imatrix.dataset"].contents() == "some.txt, more.txt"
    assert their_fields["quantize.imatrix.dataset"].contents() == "some.txt"


# A tensor of 4 experts of 256 x 256 in one piece, two experts at once, and pieces of an expert.
@pytest.mark.parametrize("weights_at_once", [1 << 22, 256 * 600, 256 * 100])
def test_how_much_is_read_at_once_changes_nothing(
    weighed: Weighed, tmp_path: Path, monkeypatch, weights_at_once
) -> None:
    source, _, imatrix, recipe = weighed
    expected = convert(source, recipe, tmp_path / "expected.gguf", imatrix=imatrix).path.read_bytes()
    monkeypatch.setattr(sys.modules[convert.__module__], "_CHUNK_WEIGHTS", weights_at_once)
    found = convert(source, recipe, tmp_path / "found.gguf", imatrix=imatrix, threads=2).path
    assert found.read_bytes() == expected


def test_a_recipe_and_an_imatrix_that_do_not_belong_together_are_refused(
    weighed: Weighed, tmp_path: Path, cache_dir: Path
) -> None:
    source, file, imatrix, recipe = weighed
    write_imatrix(tmp_path / "other.gguf", source, seed=1)
    other = open_importance(tmp_path / "other.gguf", source)
    without = decide(source, K_QUANTS, None, cache_dir)
    out = tmp_path / "out.gguf"
    with pytest.raises(
        AlphaQError, match=r"with the importance matrix .*imatrix\.gguf, none is given \(--imatrix .*\)"
    ):
        convert(source, recipe, out)
    digests = f"{imatrix.digest[:12]}: .*other.gguf is {other.digest[:12]}"
    with pytest.raises(AlphaQError, match=rf"with the importance matrix .*imatrix\.gguf, {digests}"):
        convert(source, recipe, out, imatrix=other)
    with pytest.raises(AlphaQError, match=r"without an importance matrix, .*other\.gguf is given \(allocate again"):
        convert(source, without, out, imatrix=other)
    assert not list(tmp_path.glob("out*"))
    # Where the file lies is not what it says.
    moved = open_importance(file.rename(tmp_path / "moved.gguf"), source)
    assert convert(source, recipe, out, imatrix=moved).path.exists()


class Interrupted:
    """A source that is interrupted when the last tensors are read."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name.startswith("blk.1.attn_output"):
            raise KeyboardInterrupt
        return self.source.read_rows(name, start, stop)


def test_an_interrupted_conversion_goes_on_with_the_same_imatrix_only(
    weighed: Weighed, tmp_path: Path, cache_dir: Path
) -> None:
    source, _, imatrix, recipe = weighed
    write_imatrix(tmp_path / "other.gguf", source, seed=1)
    other = open_importance(tmp_path / "other.gguf", source)
    of_other = decide(source, K_QUANTS, tmp_path / "other.gguf", cache_dir)
    without = decide(source, K_QUANTS, None, cache_dir)
    out = tmp_path / "out.gguf"
    for then, given in ((of_other, other), (without, None)):
        with pytest.raises(KeyboardInterrupt):
            convert(Interrupted(source), recipe, out, imatrix=imatrix, force=True)
        done = convert(source, then, out, imatrix=given, force=True)
        assert done.resumed_bytes == 0
        assert (
            out.read_bytes() == convert(source, then, tmp_path / "again", imatrix=given, force=True).path.read_bytes()
        )
    with pytest.raises(KeyboardInterrupt):
        convert(Interrupted(source), recipe, out, imatrix=imatrix, force=True)
    done = convert(source, recipe, out, imatrix=imatrix, force=True)
    assert done.resumed_bytes > 0
    assert out.read_bytes() == convert(source, recipe, tmp_path / "a", imatrix=imatrix).path.read_bytes()


def test_a_file_is_as_large_as_planned_and_forgets_the_imatrix_of_its_source(
    weighed: Weighed, tmp_path: Path, cache_dir: Path
) -> None:
    source, _, imatrix, recipe = weighed
    out = convert(source, recipe, tmp_path / "out.gguf", imatrix=imatrix).path
    assert out.stat().st_size == plan_file(source, recipe, imatrix).size == recipe.result["file_bytes"]
    again = open_source(out, allow_requantize=True)
    settings = AllocationSettings(bpw=8.5, strategy="uniform", types=(QType.Q8_0,))
    plain = convert(again, allocate(again, settings, cache_dir=cache_dir), tmp_path / "again.gguf").path
    assert "quantize.imatrix.file" in GGUFReader(out).fields
    assert not [key for key in GGUFReader(plain).fields if "imatrix" in key]
