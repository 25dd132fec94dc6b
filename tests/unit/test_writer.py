"""Writing a GGUF: the bytes, what an interruption keeps, what an error removes, and refused outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType

from alphaq_gguf import writer
from alphaq_gguf.encode import encode_rows
from alphaq_gguf.errors import OutputError
from alphaq_gguf.gguf_file import TensorInfo, build_header, make_field
from alphaq_gguf.qtypes import QType
from alphaq_gguf.reporter import Silent
from alphaq_gguf.writer import check_output, check_space, replacing, write_atomically, write_gguf

# Odd sizes, so that every tensor but the last is followed by padding.
SHAPES = {"a": (3, 5), "b": (2, 3, 64), "c": (7,), "d": (2, 256), "e": (1, 3)}
QTYPES = {"a": QType.F32, "b": QType.Q8_0, "c": QType.F32, "d": QType.Q4_K, "e": QType.F16}
VALUES = {n: np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, (n, s) in enumerate(SHAPES.items())}


def layout(note: str = "first") -> tuple[bytes, list[TensorInfo], int]:
    infos = [TensorInfo(name, SHAPES[name], QTYPES[name]) for name in SHAPES]
    return build_header([make_field("note", GGUFValueType.STRING, note)], infos)


class Producer:
    """Encodes tensors row by row; raises `error` before the given (tensor, row) and remembers what it was asked for."""

    def __init__(self, at: tuple[str, int] | None = None, error: BaseException | None = None) -> None:
        self.at = at
        self.error = error
        self.asked: list[str] = []

    def __call__(self, info: TensorInfo) -> Iterator[np.ndarray]:
        self.asked.append(info.name)
        rows = VALUES[info.name].reshape(-1, info.n_cols)
        for i in range(len(rows)):
            if self.error is not None and self.at == (info.name, i):
                raise self.error
            yield encode_rows(rows[i : i + 1], info.qtype)


def write(out: Path, producer: Producer | None = None, note: str = "first") -> int:
    return write_gguf(out, *layout(note), producer or Producer())


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out.gguf"
    write(out)
    return out.read_bytes()


def test_the_gguf_package_reads_back_what_was_produced(tmp_path):
    producer = Producer()
    assert write(tmp_path / "out.gguf", producer) == 0
    assert producer.asked == list(SHAPES)
    assert files(tmp_path) == {"out.gguf"}
    assert (tmp_path / "out.gguf").stat().st_size == layout()[2]
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        rows = VALUES[tensor.name].reshape(-1, SHAPES[tensor.name][-1])
        expected = gguf.dequantize(encode_rows(rows, QTYPES[tensor.name]), QTYPES[tensor.name])
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


PLACES = [("a", 0), ("a", 2), ("b", 0), ("b", 3), ("c", 0), ("d", 1), ("e", 0)]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}{place[1]}")
def test_an_interrupted_run_goes_on_at_the_first_unfinished_tensor(tmp_path, whole, place):
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        write(out, Producer(place, KeyboardInterrupt()))
    assert files(tmp_path) == {"out.gguf.partial", "out.gguf.partial.json"}
    again = Producer()
    resumed = write(out, again)
    finished = list(SHAPES).index(place[0])
    assert again.asked == list(SHAPES)[finished:]
    header, placed, _ = layout()
    assert resumed == (len(header) + placed[finished].offset if finished else 0)
    assert out.read_bytes() == whole
    assert files(tmp_path) == {"out.gguf"}


def test_interruptions_may_follow_one_another(tmp_path, whole):
    out = tmp_path / "out.gguf"
    for place in PLACES:
        with pytest.raises(KeyboardInterrupt):
            write(out, Producer(place, KeyboardInterrupt()))
    write(out)
    assert out.read_bytes() == whole


def test_after_every_checkpoint_a_killed_run_can_go_on(tmp_path, whole, monkeypatch):
    # A kill is an exit without cleaning up; with a checkpoint after each tensor only one tensor is lost.
    monkeypatch.setattr(writer, "_CHECKPOINT_BYTES", 1)
    out = tmp_path / "out.gguf"
    with pytest.raises(SystemExit):
        write(out, Producer(("d", 1), SystemExit()))
    assert files(tmp_path) == {"out.gguf.partial", "out.gguf.partial.json"}
    again = Producer()
    write(out, again)
    assert again.asked == ["d", "e"]
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), OutputError("broken"), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("place", [("a", 0), ("c", 0), ("e", 0)], ids=lambda place: place[0])
def test_an_error_leaves_nothing_behind(tmp_path, place, error):
    with pytest.raises((RuntimeError, OutputError), match=r"broken|No space left"):
        write(tmp_path / "out.gguf", Producer(place, error))
    assert files(tmp_path) == set()


def test_an_error_leaves_an_older_output_alone(tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"older")
    with pytest.raises(RuntimeError):
        write(out, Producer(("c", 0), RuntimeError()))
    assert out.read_bytes() == b"older"


@pytest.mark.parametrize("change", [-1, 1])
def test_a_producer_of_the_wrong_length_is_a_bug_and_leaves_nothing(tmp_path, change):
    def produce(info: TensorInfo) -> Iterator[np.ndarray]:
        yield np.zeros(info.n_bytes + (change if info.name == "b" else 0), np.uint8)

    with pytest.raises(RuntimeError, match="b: produced"):
        write_gguf(tmp_path / "out.gguf", *layout(), produce)
    assert files(tmp_path) == set()


def test_another_header_starts_anew(tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        write(out, Producer(("d", 0), KeyboardInterrupt()), note="first")
    again = Producer()
    assert write(out, again, note="other") == 0
    assert again.asked == list(SHAPES)
    write(tmp_path / "fresh.gguf", note="other")
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


DAMAGE = {
    "journal missing": lambda partial, journal: journal.unlink(),
    "journal empty": lambda partial, journal: journal.write_text(""),
    "journal of another kind": lambda partial, journal: journal.write_text("[1, 2]"),
    "journal claims too much": lambda partial, journal: journal.write_text(journal.read_text().replace(": 3", ": 9")),
    "partial missing": lambda partial, journal: partial.unlink(),
    "partial empty": lambda partial, journal: partial.write_bytes(b""),
    "partial cut": lambda partial, journal: partial.write_bytes(partial.read_bytes()[:-700]),
    "partial of another file": lambda partial, journal: partial.write_bytes(bytes(len(partial.read_bytes()))),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_trusted_is_written_again(tmp_path, whole, kind):
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        write(out, Producer(("d", 0), KeyboardInterrupt()))
    DAMAGE[kind](out.with_name("out.gguf.partial"), out.with_name("out.gguf.partial.json"))
    assert write(out) == 0
    assert out.read_bytes() == whole


def test_a_file_stopped_just_before_its_renaming_is_finished_without_producing(tmp_path, whole, monkeypatch):
    out = tmp_path / "out.gguf"
    monkeypatch.setattr(writer, "_CHECKPOINT_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        write(out, Producer(("e", 0), KeyboardInterrupt()))
    partial, journal = out.with_name("out.gguf.partial"), out.with_name("out.gguf.partial.json")
    partial.write_bytes(whole)
    journal.write_text(journal.read_text().replace(": 4", ": 5"))
    again = Producer()
    assert write(out, again) == len(whole)
    assert again.asked == []
    assert out.read_bytes() == whole


def test_a_file_without_tensors_is_just_its_header(tmp_path):
    header, placed, size = build_header([], [])
    assert write_gguf(tmp_path / "out.gguf", header, placed, size, Producer()) == 0
    assert (tmp_path / "out.gguf").read_bytes() == header


class Progress(Silent):
    """Adds up what a task reports."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.total = total

        def advance(amount: int) -> None:
            self.done += amount

        yield advance


def test_progress_adds_up_to_all_tensor_bytes_also_when_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out.gguf", Producer(("d", 0), KeyboardInterrupt()))
    progress = Progress()
    write_gguf(tmp_path / "out.gguf", *layout(), Producer(), progress)
    expected = sum(info.n_bytes for info in layout()[1])
    assert (progress.total, progress.done) == (expected, expected)


def test_a_new_output_is_accepted_and_nothing_is_left_behind(tmp_path):
    check_output(tmp_path / "new.gguf", force=False, inputs=[tmp_path / "in.gguf"])
    assert files(tmp_path) == set()


def test_an_existing_output_needs_force(tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"kept")
    with pytest.raises(OutputError, match=r"out\.gguf exists") as refused:
        check_output(out, force=False)
    assert "--force" in refused.value.hint
    check_output(out, force=True)
    assert out.read_bytes() == b"kept"


@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_never_the_output_under_any_name(tmp_path, force):
    source = tmp_path / "in.gguf"
    source.write_bytes(b"model")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.gguf").symlink_to(source)
    for out in (source, tmp_path / "sub" / ".." / "in.gguf", tmp_path / "link.gguf"):
        with pytest.raises(OutputError, match="the source itself"):
            check_output(out, force=force, inputs=[tmp_path / "other", source])


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_is_no_output(tmp_path, force):
    with pytest.raises(OutputError, match="is a directory"):
        check_output(tmp_path, force=force)


def test_a_missing_directory_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(OutputError, match="does not exist") as refused:
        check_output(tmp_path / "no" / "such" / "out.gguf", force=False)
    assert refused.value.hint == f"mkdir -p {tmp_path / 'no' / 'such'}"


def test_a_file_cannot_hold_the_output(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError):
        check_output(tmp_path / "file" / "out.gguf", force=False)


@pytest.mark.parametrize("length", [250, 255, 300])
def test_a_name_too_long_for_the_file_system_is_an_output_error(tmp_path, length):
    with pytest.raises(OutputError, match="name too long"):
        check_output(tmp_path / ("x" * length), force=False)


def test_checking_an_output_touches_no_other_file(tmp_path):
    out = tmp_path / "out.gguf"
    for suffix in (".probe", ".partial", ".partial.json", ".tmp"):
        out.with_name(out.name + suffix).write_text("mine")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    check_output(out, force=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_file_larger_than_the_disk_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(
        OutputError, match=r"disk full: the file needs 1,152,921,504,606,846,976 bytes, [\d,]+ are free"
    ):
        check_space(tmp_path / "out.gguf", 2**60)
    check_space(tmp_path / "out.gguf", 1)


def test_a_replacement_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "text"
    write_atomically(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"
    for error in (ValueError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text(encoding="utf-8") == "größe"
    assert files(tmp_path) == {"text"}


def test_a_text_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomically(tmp_path / "no" / "text", "x")
