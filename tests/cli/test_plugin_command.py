"""`alphaq-gguf plugin`: builds the plug-in, says where it is, and tells whether a file can run."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from container_bytes import by_expert

from alphaq_gguf.checkpoint.huggingface import HuggingFaceSource
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert
from alphaq_gguf.qtypes import QType


@pytest.fixture(scope="module")
def mixed(trained: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one container, of Q4_K and Q8_0."""
    source = HuggingFaceSource(trained)
    uniform = allocate(source, AllocationSettings(bpw=4.5, strategy="uniform"), cache_dir=cache_dir)
    types = {source.stacks[0].name: [QType.Q8_0] + [QType.Q4_K] * (source.stacks[0].n_experts - 1)}
    out = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    convert(source, by_expert(uniform, source, types), out)
    return out


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user-cache")


@pytest.fixture(autouse=True)
def _of_this_user(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "darwin":
        monkeypatch.setenv("HOME", str(own_cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache))
    monkeypatch.delenv("CXX", raising=False)


def test_path_builds_and_prints_nothing_but_the_path(cli, own_cache: Path) -> None:
    code, out, err = cli("plugin", "path")
    assert code == 0, err
    assert "Compiling" in err
    path = Path(out.removesuffix("\n"))
    assert path.is_file()
    assert own_cache in path.parents
    assert cli("plugin", "path") == (0, out, "")


def test_build_says_where_and_compiles_again_only_if_told_to(cli) -> None:
    path = Path(cli("plugin", "path")[1].strip())
    before = path.stat().st_ino
    assert cli("plugin", "build") == (0, f"Plug-in: {path}\n", "")
    assert path.stat().st_ino == before
    code, out, err = cli("plugin", "build", "--force")
    assert (code, out) == (0, f"Plug-in: {path}\n")
    assert "Compiling" in err
    assert path.stat().st_ino != before


def test_the_compiler_is_the_one_that_cxx_names(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cli("plugin", "path")[1]
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    code, out, err = cli("plugin", "build", "--force")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: no-such-compiler: cannot be run")
    # What was there still is, for whatever compiler.
    assert cli("plugin", "path") == (0, kept, "")


def test_check_tells_of_plugin_and_file(cli, mixed: Path, tmp_path: Path) -> None:
    code, out, err = cli("plugin", "check", mixed)
    assert code == 0, err
    assert f"llama-cpp-python: {version('llama-cpp-python')}, tested with" in out
    assert out.splitlines()[-1] == f"{mixed}: can run: 1 container is whole, its types are Q4_K, Q8_0"
    assert cli("plugin", "check")[1].splitlines() == out.splitlines()[:-1]
    damaged = tmp_path / "damaged.gguf"
    data = bytearray(mixed.read_bytes())
    data[data.index(b"ALPHAQEX") + 40] ^= 1
    damaged.write_bytes(data)
    code, out, err = cli("plugin", "check", damaged)
    assert (code, out) == (1, "")
    assert "the checksum of its table does not match" in err
    assert len(err.strip().splitlines()) == 1


def test_check_of_an_ordinary_file_says_that_nothing_is_needed(cli, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.gguf"
    assert cli("convert", trained, "-o", file, "--bpw", 3.5, "--strategy", "uniform", "-q")[0] == 0
    code, out, err = cli("plugin", "check", file)
    assert code == 0, err
    assert out.splitlines()[-1] == f"{file}: no containers, it runs in any llama.cpp"
