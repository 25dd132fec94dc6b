"""Files of calibration: written and read by ours against the `gguf` package, plain formulas and llama.cpp's formats."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from small_sources import stack_name

from alphaq_gguf.calibration import Calibration, LayerUsage, Moments
from alphaq_gguf.calibration.data import WHOLE
from alphaq_gguf.calibration.imatrix import ImportanceMatrix, open_importance
from alphaq_gguf.calibration.store import load_calibration, save_calibration
from alphaq_gguf.checkpoint import Source, open_source
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.qtypes import QType

N_EXPERTS, N_EMBD, N_FF, N_USED = 4, 32, 64, 2
N_TOKENS = 50
GATE, UP, DOWN = (stack_name(proj, 1) for proj in ("gate", "up", "down"))
HEADS = "blk.0.attn_k_b.weight"

Entries = dict[str, tuple[np.ndarray, np.ndarray]]


def write_model(
    path: Path, *, used: int | list[int] = N_USED, seed: int = 0, layers: int = 2, draft: int = 0
) -> Source:
    """A small model: expert stacks in every layer, and a tensor of three dimensions that holds no experts."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "testmoe")
    if isinstance(used, list):
        writer.add_array("testmoe.expert_used_count", used)
    else:
        writer.add_uint32("testmoe.expert_used_count", used)
    shapes: dict[str, tuple[int, ...]] = {HEADS: (3, 8, 16)}
    for bid in range(layers):
        for proj, shape in {"gate": (N_FF, N_EMBD), "up": (N_FF, N_EMBD), "down": (N_EMBD, N_FF)}.items():
            shapes[stack_name(proj, bid)] = (N_EXPERTS, *shape)
    shapes |= {f"blk.{bid}.nextn.eh_proj.weight": (N_EMBD, 2 * N_EMBD) for bid in range(layers - draft, layers)}
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_source(path)


def statistics(source: Source, seed: int = 1) -> Entries:
    """Sums and counts as llama-imatrix has them; no token reaches the last expert of layer 1."""
    rng = np.random.default_rng(seed)
    entries: Entries = {HEADS: (rng.random((1, 3 * 16), np.float32), np.full((1, 1), N_TOKENS, np.float32))}
    counts = {0: [40, 30, 20, 10], 1: [50, 37, 13, 0]}
    for stack in source.stacks:
        found = np.array(counts.get(stack.bid, counts[0]), np.float32)[:, None]
        entries[stack.name] = (rng.random((N_EXPERTS, stack.n_cols), np.float32) * found, found)
    return entries


def write_imatrix(path: Path, entries: Mapping, datasets: tuple[str, ...] = ("a.txt", "b.txt"), kind="imatrix") -> Path:
    """An imatrix.gguf; `entries` that are arrays become tensors of that name."""
    writer = GGUFWriter(path, "")
    # The package always writes an architecture, llama-imatrix does not.
    writer.kv_data[0].clear()
    writer.add_type(kind)
    if datasets:
        writer.add_array("imatrix.datasets", datasets)
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 10)
    for name, entry in entries.items():
        tensors = (
            {name: entry}
            if isinstance(entry, np.ndarray)
            else {f"{name}.in_sum2": entry[0], f"{name}.counts": entry[1]}
        )
        for full_name, tensor in tensors.items():
            writer.add_tensor(full_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_bytes(entries: Entries, n_calls: int = 7, dataset: bytes | None = b"old.txt") -> bytes:
    """What llama-imatrix writes with --output-format dat: means x calls, ones for experts without tokens."""
    parts = [struct.pack("<i", len(entries))]
    for name, (sums, counts) in entries.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(counts > 0, sums / counts, 1).astype(np.float32) * np.float32(n_calls)
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_calls, means.size), means.tobytes()]
    if dataset is not None:
        parts.append(struct.pack("<ii", n_calls, len(dataset)) + dataset)
    return b"".join(parts)


def weights(matrix: ImportanceMatrix, name: str) -> np.ndarray:
    found = matrix.weights(name)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_model(tmp_path_factory.mktemp("model") / "model.gguf")


def measured(source: Source) -> Calibration:
    """A calibration on two datasets with everything in it; all numbers are exact in single precision."""
    rng = np.random.default_rng(2)

    def sums() -> np.ndarray:
        return rng.integers(1, 1000, (2, N_EXPERTS)).astype(np.float64)

    layers = {0: LayerUsage(*(sums() for _ in range(6))), 1: LayerUsage(sums(), significance=sums())}
    errors = {(0, 2, "gate", QType.Q4_K): 0.25, (0, 3, WHOLE, QType.Q2_K): 0.0, (1, 0, "down", QType.IQ4_NL): 3.5}
    moments = {name: Moments(sums, counts[:, 0]) for name, (sums, counts) in statistics(source).items()}
    return Calibration("x", ("a.txt", "b.txt"), (30, 20), layers, errors, moments)


def save(path: Path, calibration: Calibration, source: Source) -> Path:
    settings = {"n_ctx": 10, "engine": "é"}
    fingerprint = source.fingerprint
    save_calibration(path, calibration, source_fingerprint=fingerprint, settings=settings, chunk_size=10)
    return path


def test_what_is_saved_is_loaded(source: Source, tmp_path: Path) -> None:
    before = measured(source)
    path = save(tmp_path / "c.gguf", before, source)
    after = load_calibration(path, source)
    assert (after.label, after.datasets, after.n_tokens) == (str(path), before.datasets, before.n_tokens)
    assert after.block_errors == before.block_errors
    assert after.layers.keys() == before.layers.keys()
    for bid, usage in before.layers.items():
        for key, expected in vars(usage).items():
            found = getattr(after.layers[bid], key)
            assert (found is None) == (expected is None), key
            if expected is not None:
                np.testing.assert_array_equal(found, expected, err_msg=key)
                assert found.dtype == np.float64


def test_a_saved_file_is_an_imatrix_to_other_readers(source: Source, tmp_path: Path) -> None:
    calibration = measured(source)
    reader = GGUFReader(save(tmp_path / "c.gguf", calibration, source))
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert json.loads(values.pop("alphaq.settings")) == {"n_ctx": 10, "engine": "é"}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "b.txt"],
        "imatrix.chunk_count": 5,
        "imatrix.chunk_size": 10,
        "alphaq.schema": 1,
        "alphaq.source": source.fingerprint,
        "alphaq.n_tokens": [30, 20],
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, moments in calibration.moments.items():
        np.testing.assert_array_equal(tensors[f"{name}.in_sum2"], moments.sums)
        np.testing.assert_array_equal(tensors[f"{name}.counts"], moments.counts[:, None])
    np.testing.assert_array_equal(tensors["blk.0.alphaq.block_error.gate.Q4_K"], [-1, -1, 0.25, -1])
    assert max(map(len, tensors)) < 64


def test_a_saved_file_weighs_rounding(source: Source, tmp_path: Path) -> None:
    """Also for a source with other bytes, such as the same model in another format, with a remark."""
    path = save(tmp_path / "c.gguf", measured(source), source)
    plain = open_importance(write_imatrix(tmp_path / "i.gguf", statistics(source)), source)
    ours = open_importance(path, source)
    assert ours.digest == plain.digest
    assert ours.remarks == ()
    other = write_model(tmp_path / "other.gguf", seed=9)
    elsewhere = open_importance(path, other)
    np.testing.assert_array_equal(weights(elsewhere, DOWN), weights(plain, DOWN))
    assert len(elsewhere.remarks) == 1
    assert "other weights" in elsewhere.remarks[0]
    assert load_calibration(path, source).remarks == ()
    usage = load_calibration(path, other)
    assert usage.remarks == elsewhere.remarks
    np.testing.assert_array_equal(usage.frequency(0), load_calibration(path, source).frequency(0))


def test_usage_without_moments_is_kept_too(source: Source, tmp_path: Path) -> None:
    path = save(tmp_path / "c.gguf", replace(measured(source), moments={}), source)
    assert load_calibration(path, source).layers.keys() == {0, 1}
    with pytest.raises(AlphaQError, match="no in_sum2 and counts of any expert stack"):
        open_importance(path, source)


@pytest.mark.parametrize("used", [N_USED, [N_USED, N_USED]])
def test_tokens_come_from_the_counts_of_an_imatrix(used: int | list[int], tmp_path: Path) -> None:
    source = write_model(tmp_path / "model.gguf", used=used)
    path = write_imatrix(tmp_path / "i.gguf", statistics(source))
    found = load_calibration(path, source)
    assert (found.datasets, found.n_tokens) == (("a.txt + b.txt",), (N_TOKENS,))
    assert found.frequency(0).tolist() == [0.8, 0.6, 0.4, 0.2]
    assert found.layers[1].tokens.tolist() == [[50, 37, 13, 0]]
    assert [value for key, value in vars(found.layers[0]).items() if key != "tokens"] == [None] * 5
    nameless = write_imatrix(tmp_path / "nameless.gguf", statistics(source), datasets=())
    assert load_calibration(nameless, source).datasets == ("nameless.gguf",)


def test_draft_layers_are_taken_to_use_all_experts_alike(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model.gguf", layers=3, draft=1)
    entries = {name: entry for name, entry in statistics(source).items() if not name.startswith("blk.2.")}
    path = write_imatrix(tmp_path / "i.gguf", entries)
    found = load_calibration(path, source)
    assert found.layers.keys() == {0, 1, 2}
    assert found.frequency(2).tolist() == [N_USED / N_EXPERTS] * N_EXPERTS
    assert open_importance(path, source).remarks == ()


def test_weights_are_those_of_llama_quantize(source: Source, tmp_path: Path) -> None:
    """Single-precision quotients, 1 without tokens, and counts rounded half away from zero."""
    entries, rounded = statistics(source), {name: counts for name, (_, counts) in statistics(source).items()}
    entries[UP] = (entries[UP][0], rounded[UP] + np.array([[0.5], [0.25], [-0.25], [0.25]], np.float32))
    rounded[UP][0] += 1
    matrix = open_importance(write_imatrix(tmp_path / "i.gguf", entries), source)
    for name, (sums, _) in entries.items():
        found = weights(matrix, name)
        n_cols = source.tensors[name].n_cols
        assert (found.shape, found.dtype) == ((sums.size // n_cols, n_cols), np.float32)
        divisors = np.repeat(rounded[name].ravel(), sums.size // rounded[name].size)
        for one, total, divisor in zip(found.ravel(), sums.ravel(), divisors, strict=True):
            assert one == (total / divisor if divisor else 1)
    assert matrix.weights("blk.0.ffn_norm.weight") is None
    assert matrix.datasets == ("a.txt", "b.txt")
    assert matrix.never_routed() == {GATE: 1, UP: 1, DOWN: 1}


def test_the_old_format_gives_the_same_weights(source: Source, tmp_path: Path) -> None:
    entries = statistics(source)
    new = open_importance(write_imatrix(tmp_path / "i.gguf", entries), source)
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_bytes(entries))
    old = open_importance(path, source)
    assert old.datasets == ("old.txt",)
    for name in entries:
        np.testing.assert_allclose(weights(old, name), weights(new, name), rtol=3e-7)
    assert old.never_routed() == new.never_routed()
    path.write_bytes(legacy_bytes(entries, n_calls=1, dataset=None))
    one = open_importance(path, source)
    assert one.datasets == ()
    np.testing.assert_array_equal(weights(one, UP), weights(new, UP))
    assert len({one.digest, old.digest, new.digest}) == 3
    # Zero calls mean that values are means already.
    path.write_bytes(legacy_bytes(entries, n_calls=1).replace(struct.pack("<ii", 1, 256), struct.pack("<ii", 0, 256)))
    np.testing.assert_array_equal(weights(open_importance(path, source), DOWN), weights(new, DOWN))


def test_an_old_file_made_new_still_counts_its_ones(source: Source, tmp_path: Path) -> None:
    """llama-imatrix --in-file old.dat -o new.gguf writes one count for all experts."""
    entries = statistics(source)
    for name in (GATE, UP, DOWN):
        sums, counts = entries[name]
        means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        entries[name] = (means.reshape(1, -1) * 35, np.full((1, 1), 35, np.float32))
    path = write_imatrix(tmp_path / "i.gguf", entries)
    matrix = open_importance(path, source)
    found = weights(matrix, DOWN)
    assert found.shape == (N_EXPERTS, N_FF)
    assert matrix.never_routed() == {GATE: 1, UP: 1, DOWN: 1}
    with pytest.raises(AlphaQError, match=f"{GATE}: expected counts of 4 experts, found one for all"):
        load_calibration(path, source)


def test_the_digest_is_of_what_the_file_says(source: Source, tmp_path: Path) -> None:
    entries = statistics(source)

    def digest(entries: Mapping, **options) -> str:
        return open_importance(write_imatrix(tmp_path / "i.gguf", entries, **options), source).digest

    first = digest(entries)
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert digest(dict(reversed(entries.items())), datasets=("other",)) == first
    for i, size in ((0, 0.5), (1, 1)):
        changed = [array.copy() for array in entries[DOWN]]
        changed[i][2, 0] += size
        assert digest({**entries, DOWN: tuple(changed)}) != first


def test_missing_stacks_are_remarked_on(source: Source, tmp_path: Path) -> None:
    entries = statistics(source)
    del entries[UP]
    path = write_imatrix(tmp_path / "i.gguf", entries)
    matrix = open_importance(path, source)
    assert matrix.weights(UP) is None
    assert matrix.remarks == (f"{path}: nothing of 1 of 6 expert stacks, first {UP}",)
    assert load_calibration(path, source).layers[1].tokens.tolist() == [[50, 37, 13, 0]]


def changed(name: str, part: int, where: tuple[int, int], value: float) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries[name][part][where] = value

    return change


def without_layer_1(entries: Entries) -> None:
    for name in (GATE, UP, DOWN):
        del entries[name]


def only(*names: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        for name in set(entries) - set(names):
            del entries[name]

    return change


def reshaped(name: str, *shape: int) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries[name] = (np.ones(shape, np.float32), np.ones((shape[0], 1), np.float32))

    return change


def alone(name: str, suffix: str) -> Callable[[dict], None]:
    def change(entries: dict) -> None:
        entries[name + suffix] = entries.pop(name)[suffix == ".counts"]

    return change


def halved(entries: dict) -> None:
    entries[f"{UP}.in_sum2"] = entries[UP][0].astype(np.float16)
    entries[f"{UP}.counts"] = entries.pop(UP)[1]


def odd_counts(entries: Entries) -> None:
    entries[UP] = (entries[UP][0], np.ones((3, 1), np.float32))


def no_tokens(entries: Entries) -> None:
    for name in entries:
        entries[name][1][:] = 0


def twice_the_tokens(entries: Entries) -> None:
    for name in (GATE, UP, DOWN):
        entries[name][1][:] *= 2


BOTH, USAGE, ROUNDING = (load_calibration, open_importance), (load_calibration,), (open_importance,)


@pytest.mark.parametrize(
    ("change", "readers", "expected"),
    [
        (changed(DOWN, 0, (2, 5), np.nan), ROUNDING, f"{DOWN}, expert 2: nan"),
        (changed(DOWN, 0, (1, 5), np.inf), ROUNDING, f"{DOWN}, expert 1: inf"),
        (changed(DOWN, 0, (1, 5), -37), ROUNDING, f"{DOWN}, expert 1: -1, expected at least 0"),
        (changed(DOWN, 0, (1, 5), 1e30), ROUNDING, f"{DOWN}, expert 1: 2.7027e+28, expected at least 0 and less than"),
        (changed(HEADS, 0, (0, 20), np.nan), ROUNDING, f"{HEADS}, matrix 1: nan"),
        (changed(UP, 1, (1, 0), np.nan), BOTH, f"{UP}.counts, expert 1: nan"),
        (changed(UP, 1, (3, 0), -1), BOTH, f"{UP}.counts, expert 3: -1"),
        (changed(UP, 1, (2, 0), 14), USAGE, f"{UP}, expert 2: 14 tokens, of the layer's other stacks 13"),
        (reshaped(UP, 8, N_EMBD), BOTH, f"{UP}: expected 4 x 32 values for "),
        (reshaped(UP, 4, N_FF), BOTH, "found 4 x 64 (it is of another model"),
        (reshaped(UP, 2, N_FF), BOTH, "found 2 x 64 (it is of another model"),
        (reshaped(HEADS, 1, 3 * 32), BOTH, f"{HEADS}: expected 3 x 16 values for "),
        (odd_counts, BOTH, f"{UP}: 128 sums do not divide into 3 counts"),
        (alone(UP, ".in_sum2"), BOTH, f"{UP}.in_sum2 without {UP}.counts"),
        (alone(UP, ".counts"), BOTH, f"{UP}.counts without {UP}.in_sum2"),
        (halved, BOTH, f"{UP}.in_sum2 is F16, expected F32"),
        (only(HEADS), BOTH, "no in_sum2 and counts of any expert stack of "),
        (without_layer_1, USAGE, "nothing of the experts of layer 1 of "),
        (no_tokens, USAGE, "no tokens in layer 0"),
        (twice_the_tokens, USAGE, "the counts of layer 1 sum to 200, expected 50 tokens x 2 experts"),
    ],
)
def test_impossible_statistics_are_refused(change, readers, expected: str, source: Source, tmp_path: Path) -> None:
    entries = statistics(source)
    change(entries)
    path = write_imatrix(tmp_path / "i.gguf", entries)
    for read in readers:
        with pytest.raises(AlphaQError, match=re.escape(expected)) as refusal:
            read(path, source)
        assert str(path) in refusal.value.message
        assert refusal.value.hint


def resaved(source: Source, path: Path, **changes) -> Path:
    return save(path, replace(measured(source), moments={}, **changes), source)


def test_impossible_calibrations_are_refused(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    good = measured(source)

    def refused(expected: str) -> None:
        with pytest.raises(AlphaQError, match=expected):
            load_calibration(path, source)

    resaved(source, path, n_tokens=(30, 0))
    refused(r"dataset b\.txt has no tokens")
    resaved(source, path, n_tokens=(30,))
    refused(r"2 datasets with tokens \[30\]")
    resaved(source, path, layers={1: good.layers[1]}, block_errors={})
    refused("nothing of the experts of layer 0")
    damaged = good.layers[0].tokens.copy()
    damaged[1, 3] = np.nan
    resaved(source, path, layers={**good.layers, 0: LayerUsage(damaged)})
    refused(r"blk\.0\.alphaq\.tokens, expert 3: nan")
    resaved(source, path, layers={**good.layers, 0: LayerUsage(damaged[:1])})
    refused(r"blk\.0\.alphaq\.tokens: expected shape \[2, 4\], found \[1, 4\]")
    resaved(source, path, block_errors={(0, 1, "up", QType.Q2_K): float("inf")})
    refused(r"blk\.0\.alphaq\.block_error\.up\.Q2_K, expert 1: inf")
    newer = struct.pack("<Q", 13) + b"alphaq.schema" + struct.pack("<I", 4)
    data = resaved(source, path).read_bytes()
    path.write_bytes(data.replace(newer + struct.pack("<I", 1), newer + struct.pack("<I", 2)))
    refused("calibration of schema 2, this version reads schema 1")


def test_other_files_are_refused(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "file"

    def refused(expected: str) -> None:
        for read in BOTH:
            with pytest.raises(AlphaQError, match=expected):
                read(path, source)

    refused("cannot be read: No such file")
    for data in (b"", b"abc", b"The quick brown fox jumps over the lazy dog.", b"\0" * 100, b"\1\0\0\0" * 100):
        path.write_bytes(data)
        refused("neither a GGUF file nor an imatrix")
    path.write_bytes(source.path.read_bytes())
    refused("no importance matrix: general.type is None, expected 'imatrix'")
    write_imatrix(path, statistics(source), kind="adapter")
    refused("general.type is 'adapter'")
    path.unlink()
    path.mkdir()
    refused("cannot be read: Is a directory")


def test_the_old_format_does_not_tell_usage(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_bytes(statistics(source)))
    with pytest.raises(AlphaQError, match=r"does not count tokens by expert .*calibrate"):
        load_calibration(path, source)


def test_a_model_that_does_not_say_how_many_experts_it_uses_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model.gguf", used=0)
    path = write_imatrix(tmp_path / "i.gguf", statistics(source))
    with pytest.raises(AlphaQError, match=r"no testmoe\.expert_used_count for layer 0"):
        load_calibration(path, source)


def test_truncated_files_are_refused_wherever_they_end(source: Source, tmp_path: Path) -> None:
    entries = {name: statistics(source)[name] for name in (GATE, DOWN)}
    whole, ends = legacy_bytes(entries, dataset=None), len(legacy_bytes({GATE: entries[GATE]}, dataset=None))
    path = tmp_path / "i.dat"
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        expected = "neither a GGUF" if length < ends else "truncated or damaged: 1 of 2 entries are readable"
        with pytest.raises(AlphaQError, match=expected):
            open_importance(path, source)
    whole = write_imatrix(tmp_path / "i.gguf", entries).read_bytes()
    tail = max(tensor.data_offset + tensor.n_bytes for tensor in GGUFReader(tmp_path / "i.gguf").tensors)
    for length in range(4, tail, 61):
        path.write_bytes(whole[:length])
        for read in BOTH:
            with pytest.raises(AlphaQError, match=r"truncated|not a readable GGUF file"):
                read(path, source)
