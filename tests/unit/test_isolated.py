"""Functions run in a process of their own: results, memory, progress, and every way that such a process can end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import ROOT

from alphaq_gguf.errors import AlphaQError, BudgetError
from alphaq_gguf.evaluate.isolated import ProcessDiedError, run_isolated
from alphaq_gguf.reporter import Reporter, Silent

MB = 1 << 20


class Listing:
    """Notes what it is told; raises `interruption` at the first advance, if there is one."""

    def __init__(self, interruption: BaseException | None = None) -> None:
        self.told: list[tuple] = []
        self.interruption = interruption

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(amount: int) -> None:
            self.told.append(("advance", label, amount))
            if self.interruption is not None:
                raise self.interruption

        self.told.append(("begin", label, total, unit))
        try:
            yield advance
        finally:
            self.told.append(("end", label))

    def note(self, message: str) -> None:
        self.told.append(("note", message))

    def warn(self, message: str) -> None:
        self.told.append(("warn", message))


def advanced(reporter: Listing, label: str) -> int:
    return sum(told[2] for told in reporter.told if told[:2] == ("advance", label))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def busy(reporter: Reporter) -> tuple[int, np.ndarray, list[str]]:
    print("not for the terminal")
    os.write(2, b"neither is this\n")
    with reporter.task("outer", 3, "things") as outer:
        reporter.note("a note")
        outer(1)
        with reporter.task("inner", 5000, "steps") as inner:
            for _ in range(5000):
                inner(1)
        reporter.warn("a warning")
        outer(2)
    heavy = [name for name in ("torch", "typer", "alphaq_gguf.cli") if name in sys.modules]
    return os.getpid(), np.arange(5), heavy


def test_results_and_progress_cross_over(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Listing()
    (pid, array, heavy), _ = run_isolated(busy, label="busy", reporter=reporter)
    assert pid != os.getpid()
    np.testing.assert_array_equal(array, np.arange(5))
    assert heavy == []
    marks = [told[:2] for told in reporter.told if told[0] != "advance"]
    assert marks == [
        ("begin", "outer"),
        ("note", "a note"),
        ("begin", "inner"),
        ("end", "inner"),
        ("warn", "a warning"),
        ("end", "outer"),
    ]
    assert reporter.told[0] == ("begin", "outer", 3, "things")
    assert (advanced(reporter, "outer"), advanced(reporter, "inner")) == (3, 5000)
    # Far fewer messages than steps.
    assert len(reporter.told) < 100
    assert capfd.readouterr() == ("", "")


def allocate(n_bytes: int, reporter: Reporter) -> None:
    np.ones(n_bytes, np.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="counts as Linux does")
def test_peak_memory_is_the_childs_own() -> None:
    mine = np.ones(500 * MB, np.uint8)
    small, large = (run_isolated(allocate, n * MB, label="", reporter=Silent())[1] for n in (1, 200))
    assert small is not None
    assert large is not None
    assert small < 150 * MB < mine.nbytes
    # What else the process holds differs by a little.
    assert abs(large - small - 199 * MB) < 10 * MB


def kill_itself(reporter: Reporter) -> None:
    with reporter.task("work", 2, "steps") as advance:
        advance(1)
        os.kill(os.getpid(), signal.SIGKILL)


def abort(reporter: Reporter) -> None:
    os.abort()


def abort_in_ggml(reporter: Reporter) -> None:
    from llama_cpp.llama_cpp import _lib

    print("something before")
    _lib.ggml_abort(b"ggml.c", 7, b"GGML_ASSERT(%s) failed", ctypes.c_char_p(b"a == b"))


def exit_early(reporter: Reporter) -> None:
    os.write(2, b"so long\n\n")
    os._exit(3)


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
@pytest.mark.parametrize(
    ("function", "message", "reason"),
    [
        (kill_itself, "model.gguf: out of memory: its process was killed", "ran out of memory"),
        (abort, "model.gguf: crashed (SIGABRT)", "crashed (SIGABRT)"),
        (abort_in_ggml, "model.gguf: crashed (SIGABRT): ggml.c:7: GGML_ASSERT(a == b) failed", "crashed (SIGABRT)"),
        (exit_early, "model.gguf: ended without a result, exit code 3: so long", "ended without a result, exit code 3"),
    ],
)
def test_a_process_that_dies_is_an_error_in_one_line(
    function: Callable, message: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    reporter = Listing()
    with pytest.raises(ProcessDiedError) as caught:
        run_isolated(function, label="model.gguf", reporter=reporter)
    assert (caught.value.message, caught.value.reason) == (message, reason)
    assert caught.value.hint
    # Whatever was shown is closed.
    assert [told[0] for told in reporter.told] in ([], ["begin", "end"], ["begin", "advance", "end"])
    assert capfd.readouterr() == ("", "")


class OddError(Exception):
    """One that pickle cannot make again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def fail(kind: str, reporter: Reporter) -> None:
    if kind == "budget":
        raise BudgetError("no such budget", "give more")
    if kind == "bug":
        raise ValueError("a bug")
    if kind == "memory":
        np.ones(1 << 60, np.uint8)
    raise OddError("odd", "one")


def test_errors_cross_over_as_they_are() -> None:
    with pytest.raises(BudgetError) as budget:
        run_isolated(fail, "budget", label="", reporter=Silent())
    assert (budget.value.message, budget.value.hint) == ("no such budget", "give more")
    with pytest.raises(ValueError, match="a bug") as bug:
        run_isolated(fail, "bug", label="", reporter=Silent())
    assert str(bug.value) == "a bug"
    assert 'raise ValueError("a bug")' in bug.value.__notes__[0]
    with pytest.raises(RuntimeError, match="OddError: odd one"):
        run_isolated(fail, "odd", label="", reporter=Silent())
    with pytest.raises(AlphaQError, match=r"model\.gguf: out of memory"):
        run_isolated(fail, "memory", label="model.gguf", reporter=Silent())


def test_a_function_that_cannot_be_found_or_result_that_cannot_cross_is_a_bug(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        run_isolated(return_a_lock, label="", reporter=Silent())
    (tmp_path / "passing_by.py").write_text("def function(reporter): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import passing_by  # pyright: ignore[reportMissingImports]

    run_isolated(passing_by.function, label="", reporter=Silent())
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError, match="passing_by"):
        run_isolated(passing_by.function, label="", reporter=Silent())


def return_a_lock(reporter: Reporter) -> object:
    import threading

    return threading.Lock()


def nest(reporter: Reporter) -> tuple[object, str]:
    result, _ = run_isolated(busy, label="inner", reporter=reporter)
    try:
        run_isolated(abort, label="inner", reporter=reporter)
    except ProcessDiedError as error:
        return result[0], error.message
    return result[0], ""


def test_a_child_can_have_a_child() -> None:
    reporter = Listing()
    (pid, message), _ = run_isolated(nest, label="outer", reporter=reporter)
    assert pid != os.getpid()
    assert message.startswith("inner: crashed")
    assert (advanced(reporter, "outer"), advanced(reporter, "inner")) == (3, 5000)


def linger(file: Path, reporter: Reporter) -> None:
    """Leaves its id in `file`, which is gone when it ends in good order."""
    try:
        file.write_text(str(os.getpid()))
        with reporter.task("waiting", 1000, "steps") as advance:
            for _ in range(1000):
                time.sleep(0.05)
                advance(1)
    finally:
        file.rename(file.with_suffix(".ended"))


def linger_below(file: Path, reporter: Reporter) -> None:
    run_isolated(linger, file, label="", reporter=reporter)


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("function", [linger, linger_below])
def test_an_interruption_ends_the_child_and_goes_on(function: Callable, tmp_path: Path) -> None:
    reporter = Listing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_isolated(function, tmp_path / "child", label="", reporter=reporter)
    assert reporter.told[-1] == ("end", "waiting")
    pid = int((tmp_path / "child.ended").read_text())
    assert wait_for(lambda: not is_alive(pid))


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from alphaq_gguf.evaluate.isolated import run_isolated
from alphaq_gguf.reporter import Silent
from test_isolated import linger, linger_below
print("started", flush=True)
# No guard of the main module: nobody may import it again.
try:
    run_isolated({function}, Path({file!r}), label="", reporter=Silent())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@contextmanager
def started(function: str, file: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A program that runs a lingering function, in a group of its own, and the id of the process that lingers."""
    code = PROGRAM.format(paths=[str(ROOT / "tests"), str(ROOT / "tests/unit")], function=function, file=str(file))
    script = file.with_name("program.py")
    script.write_text(code)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        try:
            assert wait_for(lambda: file.exists() and file.read_text() != "")
            yield program, int(file.read_text())
        finally:
            program.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("function", ["linger", "linger_below"])
def test_ctrl_c_reaches_all_processes_and_is_said_once(function: str, tmp_path: Path) -> None:
    with started(function, tmp_path / "child") as (program, pid):
        # As a terminal does.
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=20)
        assert (program.returncode, out, err) == (0, "started\ninterrupted\n", "")
        assert wait_for(lambda: not is_alive(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    with started("linger_below", tmp_path / "child") as (program, pid):
        program.kill()
        assert wait_for(lambda: not is_alive(pid))
