"""The ggml plug-in is compiled once, and loads or says why not; what llama-cpp-python lacks for it is as in llama.h."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import llama_cpp
import pytest
from checkpoints import ROOT

from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate.isolated import run_isolated
from alphaq_gguf.plugin import build_plugin
from alphaq_gguf.plugin.build import find_headers
from alphaq_gguf.plugin.load import BACKEND_API_VERSION, SUPPORTED, BufferTypeOverride, try_plugin
from alphaq_gguf.reporter import Silent

SOURCES = ROOT / "kernels/ggml_plugin"
COMPILING = "Compiling the ggml plug-in"

# Libraries that ggml loads, but that are no backend for it.
OTHERS_VERSION = """
struct Registration { int api_version; void * functions[4]; void * context; };
static Registration registration = {1, {}, nullptr};
extern "C" void * ggml_backend_init() { return &registration; }
"""
REFUSING = r"""
#include <cstdio>
extern "C" void * ggml_backend_init() {
    fprintf(stderr, "something else\nalphaq: self-test of ALPHAQ failed: row 0 is 1\n");
    return nullptr;
}
"""
UNFINISHED = """
extern "C" void ggml_function_of_another_version();
extern "C" void * ggml_backend_init() { ggml_function_of_another_version(); return nullptr; }
"""
CRASHING = "__attribute__((constructor)) static void crash() { __builtin_trap(); }\n"


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a cache of its own, by two processes at once."""
    cache = tmp_path_factory.mktemp("plugin-cache")
    code = f"""
from pathlib import Path
from alphaq_gguf.console import Console
from alphaq_gguf.plugin import build_plugin
print(build_plugin(Path({str(cache)!r}), Console()))
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum(COMPILING in err for _, err in outputs) == 1
    return Path(outputs[0][0].strip())


def test_what_is_built_loads_and_is_kept(built: Path) -> None:
    before, notes = built.stat(), Notes()
    assert build_plugin(built.parents[1], notes) == built
    assert (built.stat(), notes.lines) == (before, [])
    assert [path.name for path in built.parent.iterdir()] == [built.name]
    run_isolated(try_plugin, built, label="", reporter=Silent())


def test_again_means_again(built: Path) -> None:
    before, notes = built.stat().st_ino, Notes()
    assert build_plugin(built.parents[1], notes, again=True) == built
    assert built.stat().st_ino != before
    assert COMPILING in notes.lines[0]


def test_without_a_compiler_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AlphaQError, match=r"no C\+\+ compiler was found") as caught:
        build_plugin(tmp_path, Silent())
    assert "install" in caught.value.hint
    with pytest.raises(AlphaQError, match="my-compiler: cannot be run: No such file"):
        build_plugin(tmp_path, Silent(), compiler=["my-compiler"])


def test_the_compilers_own_error_is_told_and_its_output_kept(tmp_path: Path) -> None:
    with pytest.raises(AlphaQError) as caught:
        build_plugin(tmp_path, Silent(), compiler=["c++", "-include", "not-there.h"])
    assert re.search(r"does not compile with c\+\+ .*error: not-there.h: No such file", caught.value.message)
    (log,) = tmp_path.glob("*/compiler.log")
    assert str(log) in caught.value.hint
    assert "not-there.h" in log.read_text()
    assert list(tmp_path.glob("*/*.so")) == []


def test_what_crashes_as_it_loads_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "crash.h").write_text(CRASHING)
    with pytest.raises(AlphaQError, match=r"does not run in llama-cpp-python .*: crashed") as caught:
        build_plugin(tmp_path, Silent(), compiler=["c++", "-include", str(tmp_path / "crash.h")])
    assert SUPPORTED[-1] in caught.value.hint
    assert list(tmp_path.glob("*/*.so")) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (OTHERS_VERSION, r"incompatible API version \(backend: 1, current: 2\)"),
        (REFUSING, "self-test of ALPHAQ failed: row 0 is 1"),
        (UNFINISHED, "undefined symbol: ggml_function_of_another_version"),
    ],
    ids=["of another version", "fails its test", "lacks a function"],
)
def test_what_does_not_load_says_why_and_what_would(code: str, reason: str, tmp_path: Path) -> None:
    source, library = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text(code)
    # Functions that it lacks are looked for when they are called, unless the loader asks for all of them at once.
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.raises(AlphaQError, match=reason) as caught:
        run_isolated(try_plugin, library, label="", reporter=Silent())
    assert "something else" not in str(caught.value)
    assert f"version {BACKEND_API_VERSION} of ggml's backend interface" in caught.value.hint
    assert f"llama-cpp-python {SUPPORTED[0]}" in caught.value.hint


def test_a_wheel_without_headers_is_to_be_reinstalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "llama_cpp_python-0.3.99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.99\n")
    (info / "RECORD").write_text("llama_cpp/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AlphaQError, match=r"0\.3\.99 was installed without ggml's headers") as caught:
        build_plugin(tmp_path / "cache", Silent())
    assert "--no-binary llama-cpp-python" in caught.value.hint


def test_on_windows_it_says_what_else_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(AlphaQError, match="Windows") as caught:
        build_plugin(tmp_path, Silent())
    assert "--granularity stack" in caught.value.hint


def test_all_sources_are_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["ggml_plugin"]
    sources = [path.name for path in SOURCES.iterdir() if path.is_file() and path.suffix != ".py"]
    assert sources
    assert [name for name in sources if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_the_interfaces_version_is_the_one_its_header_declares() -> None:
    header = (SOURCES / "ggml_backend_interface.h").read_text(encoding="utf-8")
    assert re.findall(r"BACKEND_API_VERSION = (\d+);", header) == [str(BACKEND_API_VERSION)]


def members(struct: str) -> list[str]:
    """Names of a structure's members, in order, in llama.h as it is installed."""
    text = re.sub(r"//[^\n]*", "", (find_headers() / "llama.h").read_text(encoding="utf-8"))
    match = re.search(rf"struct {struct} \{{(.*?)\}};", text, re.DOTALL)
    assert match
    return [re.split(r"[\s*]+", member.strip())[-1] for member in match[1].split(";") if member.strip()]


def test_overrides_of_buffer_types_are_as_llama_cpp_reads_them() -> None:
    # llama-cpp-python has neither the structure nor an argument for it: when it gets them, these here can go.
    assert not hasattr(llama_cpp, "llama_model_tensor_buft_override")
    assert members("llama_model_tensor_buft_override") == ["pattern", "buft"]
    assert [name for name, _ in BufferTypeOverride._fields_] == ["pattern", "buffer_type"]
    assert members("llama_model_params") == [field[0] for field in llama_cpp.llama_model_params._fields_]
    assert "tensor_buft_overrides" in members("llama_model_params")
