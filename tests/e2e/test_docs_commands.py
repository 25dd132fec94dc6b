"""The commands that the documentation shows: they exist, they run, and they print what it says."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template

import pytest
import typer
from checkpoints import ROOT

from alphaq_gguf.cli.main import app
from alphaq_gguf.compare import data
from alphaq_gguf.evaluate.speed import Rate

DOCS = ROOT / "docs"
RUN = [DOCS / "tutorial.md", *sorted(DOCS.glob("how-to*.md"))]
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
_BLOCK = re.compile(r"(?:^<!-- ([^\n]+) -->\n)?^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]\d+)?")


@dataclass(frozen=True)
class Block:
    """Commands (`sh`) or their output (`text`), with what the comment above it says."""

    place: str
    mark: str
    kind: str
    body: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}", *found.groups(default=""))
        for found in _BLOCK.finditer(text)
    ]


def commands(body: str) -> Iterator[list[str]]:
    """The words of each command, as a shell reads them."""
    for line in body.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in (";", "&&", "||", "|"):
                words.append(word)
            elif words:
                yield words
                words = []


def shape(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).replace("*", " ").split())


def check_output(shown: Block, printed: str) -> None:
    """What is shown is printed in this order, with numbers of the same size; speeds are another machine's."""
    lines = iter(printed.splitlines())
    header: list[str] = []
    for line in shown.body.splitlines():
        if line == "...":
            continue
        actual = next((other for other in lines if shape(other) == shape(line)), None)
        assert actual is not None, f"{shown.place}: {line!r} is not in the output:\n{printed}"
        expected, found = _NUMBER.findall(line), _NUMBER.findall(actual)
        if line.startswith("file "):
            header = line.split()
        elif header[-1:] == ["tok/s"] and len(shape(line).split()) == len(header) and not line.endswith("-"):
            expected, found = expected[:-1], found[:-1]
        for one, other in zip(expected, found, strict=True):
            same = math.isclose(float(one.replace(",", "")), float(other.replace(",", "")), rel_tol=0.5)
            assert same, f"{shown.place}: {line!r} is now {actual!r}"


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_blocks_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch, cli) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/models").symlink_to(ROOT / "tests/models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    variables: dict[str, str] = {}
    printed = None

    def run(block: Block) -> Iterator[tuple[int, str]]:
        for words in commands(Template(block.body).substitute(variables)):
            if set_ := re.fullmatch(r"(\w+)=(.*)", words[0]):
                variables[set_[1]] = set_[2]
                continue
            assert words[0] == "alphaq-gguf", f"{block.place}: cannot be run here, mark it: {shlex.join(words)}"
            # On a busy machine llama.cpp crawls with a thread per core.
            code, out, err = cli(*words[1:], *(() if words[1] in ("plan", "plugin") else ("--threads", 1)))
            yield code, out + err

    for block in blocks(page):
        if block.kind == "text":
            if not re.fullmatch(r"varies: \w.+", block.mark):
                assert block.mark == "", f"{block.place}: unknown mark {block.mark!r}"
                assert printed is not None, f"{block.place}: output of nothing that was run"
                check_output(block, printed)
        elif re.fullmatch(r"not run: \w.+", block.mark):
            printed = None
        else:
            wanted = re.fullmatch(r"(?:exit code: (\d+))?", block.mark)
            assert wanted, f"{block.place}: unknown mark {block.mark!r}"
            done = list(run(block))
            printed = "".join(text for _, text in done)
            codes = [code for code, _ in done]
            assert codes == [0] * (len(codes) - 1) + [int(wanted[1] or 0)] * bool(codes), f"{block.place}: {printed}"


def test_every_command_shown_is_one_that_the_program_takes() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = 0
    for page in PAGES:
        for block in blocks(page):
            for program, *words in commands(block.body) if block.kind == "sh" else ():
                if program != "alphaq-gguf":
                    continue
                assert words[0] in known, f"{block.place}: no command {words[0]!r}"
                try:
                    known[words[0]].make_context(words[0], words[1:])
                except typer.TyperException as error:
                    pytest.fail(f"{block.place}: alphaq-gguf {shlex.join(words)}: {error}")
                seen += 1
    assert seen > 20


def test_every_field_of_a_comparison_is_explained() -> None:
    section = (DOCS / "formats.md").read_text(encoding="utf-8").split("## Comparison (JSON)")[1].split("\n## ")[0]
    kinds = (data.Comparison, data.Candidate, data.StackTypes, data.Evaluation, data.CrossEngine, data.TaskScore)
    parts = (data.ReferenceInfo, data.TextInfo, data.ProjectionAlphas, data.Divergence, data.Speed, Rate, data.Estimate)
    names = [field.name for kind in kinds + parts for field in fields(kind)]
    assert [name for name in ("format", "schema", *names) if f"`{name}`" not in section] == []
