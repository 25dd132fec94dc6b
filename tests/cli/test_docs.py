"""The documentation says what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from checkpoints import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_cli_reference_is_generated_from_the_current_command_line() -> None:
    script = ROOT / "tools/generate_cli_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_option_shown_in_the_pages_exists() -> None:
    reference = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    known = {"--version", "--help", *re.findall(r"`(--?[\w-]+)`", reference)}
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("alphaq-gguf "):
                for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", line):
                    assert option in known, f"{page.name}: {line.strip()}"


def test_the_python_example_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_path_named_in_the_readme_and_contributing_exists() -> None:
    for page in PAGES[:2]:
        for path in re.findall(r"`((?:alphaq_gguf|kernels|tests|tools|docs|benchmarks)/[\w./-]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    commands = [line for line in Path(ROOT / ".ci/run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make test"]
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_model_family_is_in_the_documentation():
    from alphaq_gguf.arch import FAMILIES, UNFIT

    text = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    assert [name for name in (*FAMILIES, *UNFIT) if f"`{name}`" not in text] == []
