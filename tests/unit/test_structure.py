"""The dependency rules between modules, read from their syntax trees, and what importing the package loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from alphaq_gguf.arch import FAMILIES

ROOT = Path(__file__).parents[2]
PACKAGE, KERNELS = ROOT / "alphaq_gguf", ROOT / "kernels" / "alphaq_kernels"
MODULES = {
    ".".join(path.relative_to(base.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for base in (PACKAGE, KERNELS)
    for path in sorted(base.rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Every module and name that `module` imports anywhere in it, absolute, with `a.b` for `from a import b`."""
    parts = module.split(".")
    package = parts if MODULES[module].name == "__init__.py" else parts[:-1]
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def reaches(module: str, *targets: str) -> set[str]:
    """Imports of `module` that are one of `targets` or lie inside one."""
    return {name for name in imports(module) if any(f"{name}.".startswith(f"{target}.") for target in targets)}


def modules(prefix: str) -> list[str]:
    return [module for module in MODULES if f"{module}.".startswith(f"{prefix}.")]


def test_the_walk_sees_the_imports_it_must_judge():
    # Guards the guards: a walk that saw nothing would pass every rule below.
    assert reaches("alphaq_gguf.meters", "alphaq_gguf.spectral")
    assert reaches("alphaq_gguf.cli.main", "alphaq_gguf.errors")
    assert reaches("alphaq_gguf.checkpoint.huggingface", "alphaq_gguf.arch", "torch")
    assert reaches("alphaq_gguf.strategies", "alphaq_gguf.strategies.alphaq")
    assert len(MODULES) > 30


NUMERICS = ("alphaq_gguf.spectral", "alphaq_gguf.allocate", "alphaq_gguf.knapsack")


@pytest.mark.parametrize("module", ["alphaq_gguf.errors", "alphaq_gguf.qtypes"])
def test_the_lowest_modules_import_nothing_else_of_ours(module):
    assert not reaches(module, "alphaq_gguf", "alphaq_kernels")


@pytest.mark.parametrize("module", [*NUMERICS, *modules("alphaq_kernels")])
def test_numeric_modules_know_no_files_and_no_console(module):
    outside = ("alphaq_gguf.console", "alphaq_gguf.cli", "alphaq_gguf.pipeline", "alphaq_gguf.reporter")
    assert not reaches(module, *outside, "pathlib", "os", "io", "shutil", "tempfile", "logging", "rich", "typer")
    called = {
        node.func.id
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"print", "open", "input"}


def test_spectra_and_kernels_import_nothing_else_of_the_package():
    for module in ("alphaq_gguf.spectral", *modules("alphaq_kernels")):
        assert not reaches(module, "alphaq_gguf")


def test_the_solver_needs_no_torch():
    found = reaches("alphaq_gguf.allocate", "alphaq_gguf", "torch")
    assert not found - reaches("alphaq_gguf.allocate", "alphaq_gguf.errors", "alphaq_gguf.knapsack")
    assert not reaches("alphaq_gguf.knapsack", "alphaq_gguf", "torch")


def test_the_writer_knows_neither_alphas_nor_the_solver():
    strangers = (
        "measure",
        "measurements",
        "meters",
        "spectral",
        "allocate",
        "strategies",
        "spread",
        "recipe",
        "pipeline",
        "checkpoint",
    )
    assert not reaches("alphaq_gguf.writer", *(f"alphaq_gguf.{name}" for name in strangers))


def test_only_the_command_line_imports_the_command_line():
    allowed = {*modules("alphaq_gguf.cli"), "alphaq_gguf.__main__"}
    assert [m for m in MODULES if m not in allowed and reaches(m, "alphaq_gguf.cli")] == []


def test_only_the_command_line_prints():
    allowed = {*modules("alphaq_gguf.cli"), "alphaq_gguf.console"}
    assert [m for m in MODULES if m not in allowed and reaches(m, "rich", "typer", "alphaq_gguf.console")] == []


def test_only_the_command_line_reads_the_environment():
    readers = [
        module
        for module in MODULES
        for node in ast.walk(tree(module))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "getenvb"})
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {"environ", "getenv"} & {a.name for a in node.names}
        )
    ]
    assert [module for module in readers if module not in modules("alphaq_gguf.cli")] == []


def test_triton_is_imported_under_kernels_only():
    assert [module for module in modules("alphaq_gguf") if reaches(module, "triton")] == []


def family_words() -> set[str]:
    """Names of model families that mean nothing else (`llama` is also a program)."""
    words = {name for family in FAMILIES.values() for name in (family.model_type, family.gguf_arch)}
    return words - {"llama"}


def mentions(module: str) -> set[str]:
    """Family names in the strings and identifiers of a module, docstrings left out."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [
        node.value if isinstance(node, ast.Constant) else getattr(node, "id", None) or getattr(node, "attr", None)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant | ast.Name | ast.Attribute) and id(node) not in docstrings
    ]
    tokens = {token for text in texts if isinstance(text, str) for token in re.findall(r"\w+", text.lower())}
    return (tokens & family_words()) | {name.rsplit(".", 1)[-1] for name in imports(module)} & family_words()


def test_model_families_are_named_only_under_arch():
    named = {module: mentions(module) for module in MODULES}
    assert named["alphaq_gguf.arch.qwen2_moe"] == {"qwen2_moe", "qwen2moe"}
    inside = modules("alphaq_gguf.arch")
    assert {module: words for module, words in named.items() if words and module not in inside} == {}


def test_kernels_is_no_package_of_its_own():
    # A root package named `kernels` would shadow the one that transformers imports.
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def loaded_by(statement: str, *names: str) -> str:
    """Which of `names` a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sorted(set({names!r}) & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "numpy", "scipy", "gguf", "llama_cpp", "transformers", "triton", "typer")
    assert loaded_by("import alphaq_gguf", *heavy) == ""
    assert loaded_by("import alphaq_gguf, torch", *heavy[:1]) == "torch"


def test_importing_the_kernels_loads_no_triton():
    assert loaded_by("import alphaq_kernels", "triton", "alphaq_gguf") == ""


def test_importing_the_api_loads_neither_llama_cpp_nor_transformers():
    assert loaded_by("import alphaq_gguf.pipeline", "llama_cpp", "transformers", "triton", "typer", "rich") == ""


@pytest.mark.parametrize("module", MODULES)
def test_every_module_with_code_says_in_a_sentence_what_it_is(module):
    if tree(module).body:
        assert (ast.get_docstring(tree(module)) or "").split("\n\n")[0].rstrip().endswith(".")
