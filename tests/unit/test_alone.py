"""One run at a time in a directory of the cache."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from alphaq_gguf.alone import alone
from alphaq_gguf.reporter import Silent

HOLD = """
import sys, time
from pathlib import Path
from alphaq_gguf.alone import alone
from alphaq_gguf.reporter import Silent
with alone(Path(sys.argv[1]), Silent()):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def hold(directory: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that is in the directory, and leaves it after so long."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    reporter, start = Noting(), time.monotonic()
    with hold(tmp_path / "judged", 1.0) as other:
        with alone(tmp_path / "judged", reporter):
            assert time.monotonic() - start > 0.9
        assert other.wait() == 0
    assert len(reporter.notes) == 1
    assert str(tmp_path / "judged") in reporter.notes[0]


def test_a_killed_run_is_not_waited_for(tmp_path: Path) -> None:
    with hold(tmp_path / "judged", 600) as other:
        other.kill()
        other.wait()
    reporter = Noting()
    with alone(tmp_path / "judged", reporter):
        assert (tmp_path / "judged").is_dir()
    assert reporter.notes == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_lets_go(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), alone(tmp_path, Silent()):
        raise error
    with hold(tmp_path, 0.0) as other:
        assert other.wait() == 0
