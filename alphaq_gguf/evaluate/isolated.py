"""Run a function in a process of its own: its memory counts for it alone, and its crash is only an error."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import AlphaQError
from ..reporter import Reporter

# Progress is told no more often than so.
_INTERVAL_S = 0.1
# What a process gets to end by itself.
_GRACE_S = 3
_TAIL_BYTES = 1 << 16


class ProcessDiedError(AlphaQError):
    """The process ended before the function did; `reason` says how, as a clause."""

    def __init__(self, message: str, hint: str = "", reason: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason


def run_isolated(function: Callable[..., Any], *args: Any, label: str, reporter: Reporter) -> tuple[Any, int | None]:
    """`function(*args, reporter)` in a fresh process: its result and its peak of resident bytes, None if unknown.

    The function is one of a module, and all that crosses over can be pickled. `reporter` is told what the function
    tells the one it is given. What the function raises is raised here, with its traceback as a note. ProcessDiedError
    when the process crashes or is killed, AlphaQError when it is out of memory; `label` names in them what ran. The
    process ends with this one, and on any exception here; what it writes to stdout and stderr is not shown.
    """
    job = pickle.dumps((function, args, label))
    # multiprocessing would import the program's main module, the command line and torch with it, whose memory counts.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    command = [sys.executable, "-c", code]
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        assert process.stdin
        assert process.stdout
        try:
            # Where it could not even begin, its exit code tells.
            with suppress(BrokenPipeError):
                process.stdin.write(job)
                process.stdin.flush()
            outcome = _follow(process.stdout, reporter)
        except BaseException:
            process.terminate()
            raise
        finally:
            _wait(process)
            with suppress(BrokenPipeError):
                process.stdin.close()
        if outcome is None:
            raise _explain(label, process.returncode, stderr)
        return outcome


def _follow(messages: IO[bytes], reporter: Reporter) -> tuple[Any, int | None] | None:
    """Hand on what the process reports until it ends: its result and peak, or None when it died."""
    tasks: dict[int, ExitStack] = {}
    advances: dict[int, Callable[[int], None]] = {}
    with ExitStack() as all_tasks:
        while True:
            try:
                kind, *rest = pickle.load(messages)
            except (EOFError, pickle.UnpicklingError):
                return None
            match kind, rest:
                case "task", [number, *shown]:
                    tasks[number] = all_tasks.enter_context(ExitStack())
                    advances[number] = tasks[number].enter_context(reporter.task(*shown))
                case "advance", [number, amount]:
                    advances[number](amount)
                case "end", [number]:
                    tasks[number].close()
                case "note", [message]:
                    reporter.note(message)
                case "warn", [message]:
                    reporter.warn(message)
                case "failed", [error]:
                    raise error
                case "done", [value, peak]:
                    return value, peak


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _explain(label: str, code: int, stderr: IO[bytes]) -> AlphaQError:
    """The error for a process that ended with `code`, negative for a signal, without a result."""
    name = signal.Signals(-code).name if code < 0 else ""
    if name == "SIGKILL":
        error = _out_of_memory(label)
        return ProcessDiedError(f"{error.message}: its process was killed", error.hint, "ran out of memory")
    reason = f"crashed ({name})" if name else f"ended without a result, exit code {code}"
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - _TAIL_BYTES))
    lines = [line.strip() for line in stderr.read().decode("utf-8", "replace").splitlines()]
    said = [line for line in lines if line]
    message = f"{label}: {reason}" + (f": {said[-1]}" if said else "")
    return ProcessDiedError(message, "see whether it runs at all: alphaq-gguf run", reason)


def _out_of_memory(label: str) -> AlphaQError:
    return AlphaQError(f"{label}: out of memory", "use a smaller file or a shorter context, or close other programs")


class _Relay:
    """The reporter of the process: writes to `pipe` what it is told."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._n_tasks = 0

    def send(self, *message: Any) -> None:
        # First the whole, so that what cannot be pickled does not leave half a message.
        self._pipe.write(pickle.dumps(message))
        self._pipe.flush()

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self._n_tasks += 1
        number, pending, sent_at = self._n_tasks, 0, time.monotonic()
        self.send("task", number, label, total, unit)

        def advance(amount: int) -> None:
            nonlocal pending, sent_at
            pending += amount
            if time.monotonic() - sent_at >= _INTERVAL_S:
                self.send("advance", number, pending)
                pending, sent_at = 0, time.monotonic()

        try:
            yield advance
        finally:
            self.send("advance", number, pending)
            self.send("end", number)

    def note(self, message: str) -> None:
        self.send("note", message)

    def warn(self, message: str) -> None:
        self.send("warn", message)


def serve() -> None:
    """What the process runs: the function that stdin gives it, with messages on what was its stdout."""
    # The process that started this one decides what an interruption means for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # ggml explains its aborts in a line, which a debugger's output would bury.
    os.putenv("GGML_NO_BACKTRACE", "1")
    relay = _Relay(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    try:
        function, args, label = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            value = function(*args, relay)
        except MemoryError:
            raise _out_of_memory(label) from None
        relay.send("done", value, peak_resident_bytes())
    except Exception as error:
        relay.send("failed", _portable(error))


def _end_with_parent() -> None:
    """Nothing more comes on stdin but its end, when the other side is gone."""
    os.read(0, 1)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """An exception that can cross over, with its traceback as a note."""
    try:
        pickle.loads(pickle.dumps(error))
        carried = error
    except Exception:
        carried = RuntimeError(f"{type(error).__name__}: {error}")
    carried.add_note("".join(traceback.format_exception(error)))
    return carried


def peak_resident_bytes() -> int | None:
    """The most memory that this process has had resident so far; None where the system does not tell."""
    if sys.platform == "linux":
        # ru_maxrss would count what its parent had.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        return None if found is None else int(found[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "win32":
        counters, kernel = _MemoryCounters(), ctypes.WinDLL("kernel32")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        asked = ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(counters), ctypes.sizeof(counters)
        return counters.peak if kernel.K32GetProcessMemoryInfo(*asked) else None
    return None


class _MemoryCounters(ctypes.Structure):
    """`PROCESS_MEMORY_COUNTERS` of psapi.h."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    ]
