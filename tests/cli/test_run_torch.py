"""`run --engine torch`: text from a GGUF or a recipe in PyTorch, and what it says when it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ASK = ("def __init__(", "--raw", "-n", 24, "--temperature", 0, "--threads", 1)


@pytest.fixture(scope="module")
def floats(trained: Path, tmp_path_factory, cache_dir: Path) -> Path:
    """The bundled model in float32, which both engines compute alike."""
    from alphaq_gguf.cli import main

    out = tmp_path_factory.mktemp("run") / "f32.gguf"
    types = ("--bpw", "32", "--tensor-type", r"\.weight$=F32")
    assert main(["convert", str(trained), "-o", str(out), "-q", "--cache-dir", str(cache_dir), *types]) == 0
    return out


def test_both_engines_say_the_same(floats: Path, cli) -> None:
    code, expected, err = cli("run", floats, *ASK)
    assert code == 0, err
    code, out, err = cli("run", floats, *ASK, "--engine", "torch", "--device", "cpu")
    assert code == 0, err
    assert out == expected != "\n"
    assert "Plain PyTorch operations" in err


def test_it_answers_in_chat_form_and_stops(floats: Path, cli) -> None:
    asked = ("What does json.dumps do?", "-n", 200, "--temperature", 0, "--threads", 1)
    code, out, err = cli("run", floats, *asked, "--engine", "torch", "-q")
    assert code == 0, err
    assert out == cli("run", floats, *asked, "-q")[1]
    assert "<|im_" not in out
    assert err == ""


def test_a_recipe_with_a_type_per_expert_talks(trained: Path, tmp_path: Path, cli) -> None:
    recipe = tmp_path / "recipe.json"
    options = ("--bpw", 5, "--strategy", "mse", "--granularity", "expert")
    assert cli("allocate", trained, "-o", recipe, *options)[0] == 0
    code, out, err = cli("run", recipe, *ASK, "--engine", "torch", "--model", trained)
    assert code == 0, err
    assert "self" in out


def test_a_directory_with_the_config_may_replace_that_of_the_file(
    floats: Path, trained: Path, tiny: Path, tmp_path: Path, cli
) -> None:
    shutil.copy(trained / "config.json", tmp_path)
    expected = cli("run", floats, *ASK, "--engine", "torch")
    assert cli("run", floats, *ASK, "--engine", "torch", "--model", tmp_path) == expected
    code, _, err = cli("run", floats, *ASK, "--engine", "torch", "--model", tiny)
    assert (code, err.count("error:")) == (1, 1)
    assert "has shape" in err


WRONG = {
    "options of the other engine": (("--device", "cpu"), 2, "--device has no meaning with --engine llama"),
    "layers on a GPU": (("--engine", "torch", "--gpu-layers", 3), 2, "--gpu-layers has no meaning"),
    "an unknown device": (("--engine", "torch", "--device", "abacus"), 2, "--device abacus: not available"),
    "no such directory": (("--engine", "torch", "--model", "nowhere"), 1, "nowhere is no directory"),
    "an unknown dtype": (("--engine", "torch", "--dtype", "int4"), 2, "int4"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_one_line(wrong: str, floats: Path, cli) -> None:
    options, expected, message = WRONG[wrong]
    code, _, err = cli("run", floats, *ASK, *options)
    assert code == expected
    assert message in err
    assert err.count("error:") == 1


def test_a_truncated_file_and_a_lone_recipe_are_one_line(floats: Path, tmp_path: Path, cli) -> None:
    damaged, recipe = tmp_path / "damaged.gguf", tmp_path / "recipe.json"
    damaged.write_bytes(floats.read_bytes()[:-1000])
    code, _, err = cli("run", damaged, *ASK, "--engine", "torch")
    assert (code, err.count("error:")) == (1, 1)
    assert "truncated" in err
    recipe.write_text("{}")
    code, _, err = cli("run", recipe, *ASK, "--engine", "torch")
    assert code == 1
    assert "not a recipe" in err
