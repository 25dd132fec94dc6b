"""Imatrices that llama-imatrix writes are read as they are meant, and llama-quantize takes ours for its own."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CORPUS, build_moe
from gguf import GGUFReader
from oracles import convert_with_llama_cpp, run_tool

from alphaq_gguf.calibration import Calibration, Moments
from alphaq_gguf.calibration.imatrix import open_importance
from alphaq_gguf.calibration.store import load_calibration, save_calibration
from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.encode import encode_rows
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.qtypes import QType

N_EXPERTS, N_USED, N_CTX = 16, 3, 32


@dataclass(frozen=True)
class Files:
    checkpoint: Path
    model: Path
    text: Path
    gguf: Path
    """Over the whole text."""
    dat: Path
    brief_gguf: Path
    """Over one window, which leaves experts without tokens."""
    brief_dat: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("imatrix")
    model, text = directory / "f32.gguf", directory / "text.txt"
    outputs = [directory / name for name in ("all.gguf", "all.dat", "brief.gguf", "brief.dat")]
    run_tool("llama-imatrix", "--version")
    checkpoint = build_moe(directory / "model", num_experts=N_EXPERTS, num_experts_per_tok=N_USED)
    convert_with_llama_cpp(checkpoint, model)
    text.write_text("\n".join(CORPUS * 4), encoding="utf-8")
    for out in outputs:
        options = ["--chunks", 1] if out.stem == "brief" else []
        arguments = ["-m", model, "-f", text, "-o", out, "--output-format", out.suffix[1:], "-c", N_CTX, "-t", 1]
        run_tool("llama-imatrix", *arguments, "--no-ppl", "--process-output", *options)
    return Files(checkpoint, model, text, *outputs)


def read_gguf(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums [matrices, n_cols] and counts [matrices, 1] by tensor, as the `gguf` package reads them."""
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    counts = {name.removesuffix(".counts"): n.reshape(-1, 1) for name, n in tensors.items() if name.endswith(".counts")}
    return {name: (tensors[f"{name}.in_sum2"].reshape(n.size, -1), n) for name, n in counts.items()}


def read_dat(path: Path) -> dict[str, np.ndarray]:
    """Means by tensor, in the old format."""
    found = {}
    with path.open("rb") as file:
        for _ in range(*struct.unpack("<i", file.read(4))):
            name = file.read(*struct.unpack("<i", file.read(4))).decode()
            n_calls, n_values = struct.unpack("<ii", file.read(8))
            found[name] = np.frombuffer(file.read(4 * n_values), np.float32) / np.float32(n_calls)
    return found


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_usage_is_that_of_the_text(kind: str, files: Files) -> None:
    source = open_source(getattr(files, kind))
    n_tokens = len(open_tokens(files)) // N_CTX * N_CTX
    for path, expected in ((files.gguf, n_tokens), (files.brief_gguf, N_CTX)):
        found = load_calibration(path, source)
        assert found.datasets == (str(files.text),)
        assert found.n_tokens == (expected,)
        assert found.layers.keys() == {0, 1}
        for bid, usage in found.layers.items():
            counts = read_gguf(path)[f"blk.{bid}.ffn_down_exps.weight"][1]
            np.testing.assert_array_equal(usage.tokens, counts.reshape(1, N_EXPERTS))
            assert usage.tokens.sum() == expected * N_USED
            assert found.frequency(bid).sum() == pytest.approx(N_USED)


def open_tokens(files: Files) -> list[int]:
    """The text's tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.checkpoint)(files.text.read_text(encoding="utf-8"))["input_ids"]


@pytest.mark.parametrize("which", ["gguf", "brief_gguf"])
def test_weights_are_mean_squares(which: str, files: Files) -> None:
    path = getattr(files, which)
    matrix = open_importance(path, open_source(files.model))
    assert matrix.remarks == ()
    expected = read_gguf(path)
    assert {"output.weight", "blk.1.attn_q.weight", "blk.1.ffn_gate_exps.weight"} <= expected.keys()
    for name, (sums, counts) in expected.items():
        found = matrix.weights(name)
        assert found is not None, name
        assert found.dtype == np.float32
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(found, np.where(counts > 0, sums / counts, np.float32(1)), err_msg=name)


def test_the_old_format_says_the_same(files: Files) -> None:
    source = open_source(files.model)
    for new_path, old_path in ((files.gguf, files.dat), (files.brief_gguf, files.brief_dat)):
        new, old = open_importance(new_path, source), open_importance(old_path, source)
        assert old.datasets == new.datasets == (str(files.text),)
        means = read_dat(old_path)
        assert means.keys() == read_gguf(new_path).keys()
        for name, expected in means.items():
            found, again = old.weights(name), new.weights(name)
            assert found is not None, name
            assert again is not None, name
            np.testing.assert_array_equal(found.ravel(), expected, err_msg=name)
            np.testing.assert_allclose(found, again, rtol=1e-6, err_msg=name)
        counts = {name: entry[1] for name, entry in read_gguf(new_path).items()}
        unrouted = {name: int((n == 0).sum()) for name, n in counts.items() if (n == 0).any()}
        assert bool(unrouted) == (new_path == files.brief_gguf)
        assert new.never_routed() == old.never_routed() == unrouted
    with pytest.raises(AlphaQError, match="does not count tokens by expert"):
        load_calibration(files.dat, source)


def test_an_old_file_made_new_by_llama_imatrix_keeps_its_meaning(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    run_tool("llama-imatrix", "-m", files.model, "--in-file", files.brief_dat, "-o", path, "--output-format", "gguf")
    source = open_source(files.model)
    before, after = open_importance(files.brief_dat, source), open_importance(path, source)
    for name in read_dat(files.brief_dat):
        expected, found = before.weights(name), after.weights(name)
        assert expected is not None
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    assert after.never_routed() == before.never_routed()
    with pytest.raises(AlphaQError, match=f"expected counts of {N_EXPERTS} experts, found one for all"):
        load_calibration(path, source)


def calibration_of(files: Files) -> Calibration:
    """What a measurement of ours over the same text would have found."""
    usage = load_calibration(files.gguf, open_source(files.model))
    moments = {name: Moments(sums, counts.ravel()) for name, (sums, counts) in read_gguf(files.gguf).items()}
    return replace(usage, block_errors={(1, 3, "down", QType.Q4_K): 0.5}, moments=moments)


def test_llama_quantize_takes_our_file_for_its_own(files: Files, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    source = open_source(files.model)
    save_calibration(
        ours, calibration_of(files), source_fingerprint=source.fingerprint, settings={"n_ctx": N_CTX}, chunk_size=N_CTX
    )
    tensors = {}
    for imatrix in (ours, files.gguf):
        out = tmp_path / f"quantised-by-{imatrix.name}"
        printed = run_tool("llama-quantize", "--imatrix", imatrix, "--pure", files.model, out, "q4_k", 1)
        n_entries = len(read_gguf(files.gguf))
        assert re.search(rf"loaded {n_entries} importance matrix entries .* computed on \d+ chunks", printed)
        reader = GGUFReader(out)
        tensors[imatrix] = {tensor.name: tensor for tensor in reader.tensors}
        assert reader.fields["quantize.imatrix.dataset"].contents() == str(files.text)
        assert reader.fields["quantize.imatrix.entries_count"].contents() == n_entries
    for name, tensor in tensors[files.gguf].items():
        assert tensor.data.tobytes() == tensors[ours][name].data.tobytes(), name
    # The weights we hand out are those that llama-quantize rounds by.
    matrix = open_importance(ours, source)
    for stack in source.stacks:
        expected = tensors[ours][stack.name]
        assert expected.tensor_type == QType.Q4_K
        blocks = encode_rows(source.read_rows(stack.name), QType.Q4_K, importance=matrix.weights(stack.name))
        assert blocks.tobytes() == expected.data.tobytes(), stack.name


def test_llama_imatrix_adds_our_file_to_its_own(files: Files, tmp_path: Path) -> None:
    ours, both = tmp_path / "ours.gguf", tmp_path / "both.gguf"
    source = open_source(files.model)
    save_calibration(ours, calibration_of(files), source_fingerprint="other", settings={}, chunk_size=N_CTX)
    inputs = ["--in-file", ours, "--in-file", files.brief_gguf]
    run_tool("llama-imatrix", "-m", files.model, *inputs, "-o", both, "--output-format", "gguf", "-c", N_CTX)
    parts = [load_calibration(path, source) for path in (files.gguf, files.brief_gguf)]
    found = load_calibration(both, source)
    assert found.n_tokens == (sum(part.n_tokens[0] for part in parts),)
    for bid, usage in found.layers.items():
        np.testing.assert_array_equal(usage.tokens, sum(part.layers[bid].tokens for part in parts))


def test_an_imatrix_of_another_model_is_refused(files: Files, tmp_path: Path) -> None:
    other = open_source(build_moe(tmp_path / "other", num_experts=8))
    for read in (load_calibration, open_importance):
        with pytest.raises(AlphaQError, match=rf"expected 8 x 256 values .* found {N_EXPERTS} x 256 .*another model"):
            read(files.gguf, other)
    with pytest.raises(AlphaQError, match=rf"expected 8 x 256 values .* found {N_EXPERTS * 256} .*another model"):
        open_importance(files.dat, other)
