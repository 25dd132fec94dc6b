"""What `--encoder` promises: less error, errors measured with what encodes, and no file made by two encoders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from alphaq_kernels.quantize import quantize
from gguf import GGUFReader, dequantize

from alphaq_gguf.encode import ENCODERS, encode_rows, find_encoder
from alphaq_gguf.ledger import read_ledger
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert, open_source
from alphaq_gguf.qtypes import FLOAT_TYPES, QType
from alphaq_gguf.recipe import load_recipe, save_recipe
from alphaq_gguf.reporter import Silent
from alphaq_gguf.writer import partial_path

OPTIONS = ("--bpw", 4.5, "--types", "Q3_K,Q5_K", "--strategy", "mse")


def squared_errors(path: Path, model: Path) -> dict[str, float]:
    """By quantised tensor, decoded by gguf-py."""
    source = open_source(model)
    errors = {}
    for tensor in GGUFReader(path).tensors:
        if tensor.tensor_type != QType.F32:
            rows = np.asarray(source.read_rows(tensor.name)).astype(np.float64)
            decoded = dequantize(tensor.data, tensor.tensor_type).reshape(rows.shape)
            errors[tensor.name] = float(np.square(rows - decoded).sum())
    return errors


@pytest.fixture(scope="module")
def recipes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same allocation, Q3_K and Q5_K by turns, for either encoder."""
    directory = tmp_path_factory.mktemp("recipes")
    source, found = open_source(tiny), {}
    for name in ("libggml", "torch"):
        settings = AllocationSettings(bpw=4.5, types=(QType.Q3_K, QType.Q5_K), strategy="mse")
        recipe = allocate(source, settings, cache_dir=directory, encoder=find_encoder(name))
        found[name] = directory / f"{name}.json"
        save_recipe(recipe, found[name])
    return found


def test_torch_encodes_every_tensor_with_less_error(tiny: Path, recipes, tmp_path: Path, cli) -> None:
    recipe, errors = load_recipe(recipes["libggml"]), {}
    for name in recipes:
        saved, out = tmp_path / f"{name}.json", tmp_path / f"{name}.gguf"
        save_recipe(replace(recipe, settings=recipe.settings | {"encoder": name}), saved)
        code, _, err = cli("convert", tiny, "-o", out, "--recipe", saved, "--encoder", name)
        assert code == 0, err
        assert {t.name: t.tensor_type for t in GGUFReader(out).tensors} == recipe.types
        errors[name] = squared_errors(out, tiny)
    assert len(errors["torch"]) > 10
    assert all(error < 0.99 * errors["libggml"][name] for name, error in errors["torch"].items())


def test_the_predicted_error_is_that_of_the_file(tiny: Path, tmp_path: Path, cache_dir: Path, cli) -> None:
    out, saved = tmp_path / "out.gguf", tmp_path / "recipe.json"
    code, _, err = cli("convert", tiny, "-o", out, "--save-recipe", saved, *OPTIONS, "--encoder", "torch")
    assert code == 0, err
    recipe = load_recipe(saved)
    errors = squared_errors(out, tiny)
    assert recipe.result["cost"] == pytest.approx(sum(errors[unit.tensor] for unit in recipe.units), rel=1e-5)
    # Each encoder's errors are kept apart, and the file says whose it is.
    header = recipe.settings["distortions"]
    assert header["encoder"].startswith("alphaq-kernels quantize ")
    assert header in [read_ledger(path)[0] for path in cache_dir.glob("distortion-*.csv")]
    written = GGUFReader(out).get_field("alphaq.recipe")
    assert written is not None
    assert json.loads(written.contents())["settings"]["encoder"] == "torch"


@pytest.mark.parametrize(("made", "given"), [("torch", "libggml"), ("libggml", "torch")])
def test_a_recipe_asks_for_its_encoder(made: str, given: str, tiny: Path, recipes, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    code, _, err = cli("convert", tiny, "-o", out, "--recipe", recipes[made], "--encoder", given)
    assert code == 1
    assert f"allocated for the encoder {made}, not {given}" in err.replace("\n", " ")
    assert f"--encoder {made}" in err.replace("\n", " ")
    assert not out.exists()
    code, _, err = cli("convert", tiny, "-o", out, "--recipe", recipes[made], "--encoder", made)
    assert code == 0, err


def test_a_recipe_that_names_no_encoder_is_libggmls(tiny: Path, recipes, tmp_path: Path, cli) -> None:
    recipe = load_recipe(recipes["libggml"])
    old = {key: value for key, value in recipe.settings.items() if key != "encoder"}
    save_recipe(replace(recipe, settings=old), tmp_path / "old.json")
    options = ("-o", tmp_path / "out.gguf", "--recipe", tmp_path / "old.json", "--dry-run")
    assert cli("convert", tiny, *options)[0] == 0
    assert cli("convert", tiny, *options, "--encoder", "torch")[0] == 1


class Impatient(Silent):
    """Interrupts writing once half is done."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator:
        done = 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            if done > total / 2:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_file_is_continued_by_its_own_encoder_only(tiny: Path, recipes, tmp_path: Path) -> None:
    source = open_source(tiny)
    made = {name: (load_recipe(path), find_encoder(name)) for name, path in recipes.items()}
    whole = {}
    for name, (recipe, encoder) in made.items():
        convert(source, recipe, tmp_path / name, encoder=encoder)
        whole[name] = (tmp_path / name).read_bytes()
    assert whole["torch"] != whole["libggml"]
    for first in made:
        for second in made:
            out = tmp_path / "out.gguf"
            recipe, encoder = made[first]
            with pytest.raises(KeyboardInterrupt):
                convert(source, recipe, out, encoder=encoder, force=True, reporter=Impatient())
            assert partial_path(out).exists()
            recipe, encoder = made[second]
            done = convert(source, recipe, out, encoder=encoder, force=True)
            assert (done.resumed_bytes > 0) == (first == second)
            assert out.read_bytes() == whole[second]


def test_strategies_are_compared_by_the_encoders_errors(tiny: Path, tmp_path: Path, cli) -> None:
    errors = {}
    for name in ("libggml", "torch"):
        options = ("--bpw", 4.5, "--types", "Q3_K,Q5_K", "--strategy", "all", "--encoder", name, "--json")
        code, out, err = cli("allocate", tiny, *options)
        assert code == 0, err
        errors[name] = {s["strategy"]: s["squared_error"] for s in json.loads(out)["strategies"]}
    assert errors["torch"]["mse"] < 0.95 * errors["libggml"]["mse"]


@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_are_encoded_the_same_on_any_number_of_threads(threads: int) -> None:
    # Matrices of 70 rows, in chunks of 64.
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((140, 4096)).astype(np.float32)
    importance = rng.gamma(0.3, size=(2, 4096)).astype(np.float32)
    for array in (rows, importance):
        array.setflags(write=False)
    found = find_encoder("torch").encode(rows, QType.Q6_K, threads, importance)
    expected = quantize(torch.from_numpy(rows.copy()), "Q6_K", torch.from_numpy(importance.copy()))
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("qtype", FLOAT_TYPES, ids=lambda q: q.name)
def test_floats_are_libggmls(qtype: QType) -> None:
    rows = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    np.testing.assert_array_equal(find_encoder("torch").encode(rows, qtype), encode_rows(rows, qtype))


@pytest.mark.parametrize(
    ("rows", "importance", "cause"),
    [
        pytest.param(np.zeros((2, 256)), None, "float32", id="float64"),
        pytest.param(np.zeros(256, np.float32), None, "float32", id="one-dimensional"),
        pytest.param(np.zeros((2, 512), np.float32)[:, ::2], None, "float32", id="strided"),
        pytest.param(np.zeros((2, 96), np.float32), None, "Q4_K needs rows", id="broken-block"),
        pytest.param(np.zeros((2, 256), np.float32), np.ones((3, 256), np.float32), "3 matrices", id="left-over"),
        pytest.param(np.zeros((2, 256), np.float32), -np.ones(256, np.float32), "between 0", id="negative"),
    ],
)
@pytest.mark.parametrize("name", ENCODERS)
def test_either_encoder_refuses_the_same(name: str, rows, importance, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        find_encoder(name).encode(rows, QType.Q4_K, importance=importance)


def test_another_encoder_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="'numpy': expected one of libggml, torch"):
        find_encoder("numpy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_as_well_as_the_cpu(tiny: Path, recipes, tmp_path: Path, cli) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.gguf"
        options = ("--recipe", recipes["torch"], "--encoder", "torch", "--device", device)
        code, _, err = cli("convert", tiny, "-o", out, *options)
        assert code == 0, err
        errors.append(squared_errors(out, tiny))
    assert errors[1] == pytest.approx(errors[0], rel=0.002)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--encoder", "numpy"), "numpy"),
        (("--encoder", "torch", "--device", "cuda:99"), "--device cuda:99: not available"),
        (("--encoder", "torch", "--device", "nowhere"), "--device nowhere: not available"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "allocate"])
def test_an_unknown_encoder_or_device_is_a_usage_error(command: str, options, cause: str, tiny: Path, cli) -> None:
    code, _, err = cli(command, tiny, "--bpw", 4, *options)
    assert code == 2
    assert cause in err
