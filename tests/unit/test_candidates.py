"""Files to judge are described as the `gguf` package and plain counting see them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import build_moe
from gguf import GGUFReader

from alphaq_gguf.checkpoint import Source, open_source
from alphaq_gguf.compare.candidates import describe_candidate
from alphaq_gguf.compare.data import StackTypes
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert
from alphaq_gguf.qtypes import QType
from alphaq_gguf.recipe import save_recipe

# Bits of a weight by ggml's block structs: bytes of a block x 8 / its weights.
BITS = {"F32": 32, "Q2_K": 84 / 32, "Q3_K": 110 / 32, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 210 / 32, "Q8_0": 8.5}


@pytest.fixture(scope="module")
def source(trained: Path) -> Source:
    return open_source(trained)


def allocated(source: Source, cache_dir: Path, **settings):
    return allocate(source, AllocationSettings(strategy="mse", **settings), cache_dir=cache_dir)


@pytest.fixture(scope="module")
def ours(source: Source, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "small-model.gguf"
    convert(source, allocated(source, cache_dir, bpw=3.3), out)
    return out


def changed(path: Path, out: Path, old: bytes, new: bytes) -> Path:
    """A copy with one piece of its metadata replaced by another of the same length."""
    assert len(old) == len(new)
    data = path.read_bytes()
    assert data.count(old) == 1
    out.write_bytes(data.replace(old, new))
    return out


def test_a_file_of_ours_is_told_by_its_header(ours: Path) -> None:
    found, tensors = describe_candidate(ours), GGUFReader(ours).tensors
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    experts = {tensor.name: tensor for tensor in tensors if "_exps" in tensor.name}
    assert found.types == weights
    assert (found.name, found.origin, found.granularity, found.budget_bpw) == ("small-model", "mse", "stack", 3.3)
    assert found.n_bytes == ours.stat().st_size
    total = sum(int(tensor.n_bytes) for tensor in tensors)
    assert found.bpw == pytest.approx(8 * total / weights.total())
    assert found.bpw == pytest.approx(sum(BITS[name] * n for name, n in weights.items()) / weights.total())
    expert_weights = sum(int(tensor.n_elements) for tensor in experts.values())
    expert_bytes = sum(int(tensor.n_bytes) for tensor in experts.values())
    assert found.expert_bpw == pytest.approx(8 * expert_bytes / expert_weights)
    assert found.stacks == tuple(
        StackTypes(bid, proj, {experts[f"blk.{bid}.ffn_{proj}_exps.weight"].tensor_type.name: 8})
        for bid in (0, 1)
        for proj in ("gate", "up", "down")
    )
    assert found.stacking is not None
    assert 0 < found.stacking["kept"] < 1


def test_a_recipe_has_the_size_that_its_file_would_have(
    source: Source, ours: Path, cache_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.json"
    recipe = allocated(source, cache_dir, bpw=3.3)
    save_recipe(recipe, path)
    found, file = describe_candidate(path, source), describe_candidate(ours)
    same = ("bpw", "expert_bpw", "types", "stacks", "stacking", "origin", "granularity", "budget_bpw")
    assert {name: getattr(found, name) for name in same} == {name: getattr(file, name) for name in same}
    # All that the file has beside it is metadata of its own, most of it the recipe.
    embedded = next(f for f in GGUFReader(ours).fields.values() if f.name == "alphaq.recipe").contents()
    assert len(embedded) < file.n_bytes - found.n_bytes < len(embedded) + 1024


def test_a_type_per_expert_is_counted_stack_by_stack(source: Source, cache_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    recipe = allocated(source, cache_dir, bpw=3.2, granularity="expert")
    save_recipe(recipe, path)
    found = describe_candidate(path, source)
    units = json.loads(path.read_text(encoding="utf-8"))["units"]
    assert found.granularity == "expert"
    for stack in found.stacks:
        named = [u["qtype"] for u in units if (u["layer"], u["proj"]) == (stack.layer, stack.proj)]
        assert stack.experts == Counter(named)
    assert any(len(stack.experts) > 1 for stack in found.stacks)
    assert found.types is not None
    # Every expert matrix of the bundled model has as many weights.
    assert QType.Q3_K not in recipe.tensors.values()
    assert found.types["Q3_K"] == 256 * 256 * sum(u["qtype"] == "Q3_K" for u in units)
    # Stored bits count all that the file has for experts, used or not.
    convert(source, recipe, tmp_path / "out.gguf")
    stacks = [tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors if "_exps" in tensor.name]
    stored = sum(int(t.n_bytes) for t in stacks) * 8 / sum(int(t.n_elements) for t in stacks)
    assert found.expert_bpw == pytest.approx(stored)
    assert found.expert_bpw > sum(BITS[u["qtype"]] for u in units) / len(units)


def test_the_fingerprint_is_of_all_that_the_model_is_made_of(ours: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copy(ours, tmp_path / "other-name.gguf"))
    first = describe_candidate(ours).fingerprint
    assert describe_candidate(moved).fingerprint == first
    retold = changed(ours, tmp_path / "retold.gguf", b"alphaq.source_hash", b"alphaq.source_hush")
    assert describe_candidate(retold).fingerprint != first
    data = bytearray(ours.read_bytes())
    data[-100] ^= 1
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    assert describe_candidate(damaged).fingerprint != first


def test_a_file_is_a_preset_unless_its_own_recipe_made_it(ours: Path, tmp_path: Path) -> None:
    # As llama-quantize leaves it: the recipe of what it was made from, and types that are not the recipe's.
    requantised = changed(ours, tmp_path / "a.gguf", b"alphaq.recipe", b"alphaq.racipe")
    assert describe_candidate(requantised).origin == "preset Q3_K_M"
    reader = GGUFReader(ours)
    tensor = next(t for t in reader.tensors if "_exps" in t.name)
    old, new = tensor.tensor_type.name, "Q5_K" if tensor.tensor_type != QType.Q5_K else "Q4_K"
    piece = f'"tensor":"{tensor.name}"'
    embedded = reader.fields["alphaq.recipe"].contents()
    start = embedded.index(piece)
    at = embedded.index(f'"qtype":"{old}"', start)
    before = embedded[start:at]
    retold = changed(
        ours,
        tmp_path / "b.gguf",
        f'{before}"qtype":"{old}"'.encode(),
        f'{before}"qtype":"{new}"'.encode(),
    )
    found = describe_candidate(retold)
    assert (found.origin, found.stacking, found.budget_bpw) == ("preset Q3_K_M", None, None)


def test_floats_have_no_origin(source: Source, cache_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "f32.gguf"
    recipe = allocated(source, cache_dir, bpw=32, overrides=((r"\.weight$", QType.F32),))
    convert(source, recipe, out)
    plain = changed(out, tmp_path / "plain.gguf", b"alphaq.recipe", b"alphaq.racipe")
    found = describe_candidate(plain)
    assert (found.origin, found.bpw, found.expert_bpw) == ("", 32, 32)


def test_what_is_no_candidate_says_so(source: Source, cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AlphaQError, match=r"is not a file \(give a \.gguf"):
        describe_candidate(tmp_path / "absent.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("no model at all, but long enough", encoding="utf-8")
    with pytest.raises(AlphaQError, match="not a readable GGUF file"):
        describe_candidate(text)
    path = tmp_path / "recipe.json"
    save_recipe(allocated(source, cache_dir, bpw=3.3), path)
    with pytest.raises(AlphaQError, match="without the model it was made for"):
        describe_candidate(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    for damage, message in (
        ({"source": "0" * 64}, "made for another model, 000000000000"),
        ({"units": data["units"][1:]}, "does not cover the model's tensors exactly"),
        ({"units": [*data["units"], data["units"][0]]}, "does not cover the model's tensors exactly"),
        ({"tensors": {**data["tensors"], "blk.9.attn_q.weight": "F32"}}, "does not cover the model's tensors exactly"),
    ):
        path.write_text(json.dumps({**data, **damage}), encoding="utf-8")
        with pytest.raises(AlphaQError, match=message):
            describe_candidate(path, source)


def test_rows_that_blocks_do_not_divide_are_named(cache_dir: Path, tmp_path: Path) -> None:
    source = open_source(build_moe(tmp_path / "model", moe_intermediate_size=352))
    path = tmp_path / "recipe.json"
    save_recipe(allocated(source, cache_dir, bpw=8.5), path)
    text = path.read_text(encoding="utf-8")
    down = next(line for line in text.splitlines() if "ffn_down_exps" in line)
    path.write_text(text.replace(down, down.replace("Q8_0", "Q4_K")), encoding="utf-8")
    with pytest.raises(AlphaQError, match=r"ffn_down_exps\.weight has rows of 352, which Q4_K blocks do not divide"):
        describe_candidate(path, source)
