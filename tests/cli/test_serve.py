"""`alphaq-gguf serve` as its users meet it: a process that answers requests until Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from container_bytes import by_expert

from alphaq_gguf.checkpoint.huggingface import HuggingFaceSource
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert
from alphaq_gguf.qtypes import QType

TIMEOUT_S = 60
PROMPT = "def main(argv=None):\n"


@pytest.fixture(scope="module")
def files(trained: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ordinary file, and one with a type per expert."""
    directory = tmp_path_factory.mktemp("served")
    source = HuggingFaceSource(trained)
    uniform = allocate(source, AllocationSettings(bpw=8.5, strategy="uniform"), cache_dir=cache_dir)
    types = {s.name: [QType.Q6_K, QType.Q8_0] * (s.n_experts // 2) for s in source.stacks}
    recipes = {"stack": uniform, "expert": by_expert(uniform, source, types)}
    for name, recipe in recipes.items():
        convert(source, recipe, directory / f"{name}.gguf")
    return {name: directory / f"{name}.gguf" for name in recipes}


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def open(self, path: str, body: Any = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)

    def ask(self, path: str, body: Any = None) -> Any:
        with self.open(path, body) as response:
            return json.load(response)

    def interrupt(self) -> tuple[int, str]:
        """Exit code and stderr."""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, err


@contextmanager
def serving(file: Path, *options: object) -> Iterator[Server]:
    command = [sys.executable, "-m", "alphaq_gguf", "serve", file, "--port", 0, "--threads", 1, *options]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # Whatever happens, it ends.
    limit = threading.Timer(4 * TIMEOUT_S, process.kill)
    limit.start()
    try:
        assert process.stdout
        line = process.stdout.readline()
        match = re.fullmatch(rf"Serving {re.escape(file.name)} at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert match, process.communicate(timeout=TIMEOUT_S)
        yield Server(process, match[1])
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["stack", "expert"])
def test_it_completes_as_run_does_and_ends_at_ctrl_c(files: dict[str, Path], kind: str) -> None:
    with LlamaModel(files[kind], n_ctx=256, threads=1, all_logits=False) as model:
        expected = "".join(model.generate(PROMPT, max_tokens=12, temperature=0, chat=False))
    with serving(files[kind], "--ctx", 256) as server:
        assert [model["id"] for model in server.ask("/models")["data"]] == [kind]
        answer = server.ask("/completions", {"prompt": PROMPT, "max_tokens": 12, "temperature": 0})
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["completion_tokens"] == 12
        messages = [{"role": "user", "content": "What does json.dumps do?"}]
        said = server.ask("/chat/completions", {"messages": messages, "max_tokens": 4})["choices"][0]["message"]
        assert said["role"] == "assistant"
        assert said["content"]
        code, err = server.interrupt()
    assert code == 0, err
    assert "Traceback" not in err


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_ends_an_answer_that_is_being_written(files: dict[str, Path], stream: bool) -> None:
    endless = {"prompt": PROMPT, "max_tokens": 1_000_000, "stream": stream, "logit_bias": {"0": -100}}
    with serving(files["expert"], "--ctx", 500_000, "--quiet") as server:
        if stream:
            with server.open("/completions", endless) as response:
                assert response.readline().startswith(b"data: {")
                code, err = server.interrupt()
        else:
            answers: list[Any] = []
            asking = threading.Thread(target=lambda: answers.append(server.ask("/completions", endless)))
            asking.start()
            assert any(is_at_work(server) for _ in range(TIMEOUT_S))
            code, err = server.interrupt()
            asking.join(TIMEOUT_S)
            assert answers[0]["choices"][0]["finish_reason"] == "length"
            assert 0 < answers[0]["usage"]["completion_tokens"] < 1_000_000
    assert (code, err) == (0, "")


def is_at_work(server: Server) -> bool:
    """Whether it does not answer because of another request, which it answers first."""
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        try:
            return not connection.recv(1)
        except TimeoutError:
            return True


def test_a_port_that_is_taken_is_told(files: dict[str, Path], cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = cli("serve", files["stack"], "--port", port)
    assert (code, out) == (1, "")
    assert err == f"error: 127.0.0.1:{port}: Address already in use -> choose another --host or --port\n"


def test_missing_packages_are_told(files: dict[str, Path]) -> None:
    code = f"""
import sys
sys.modules["uvicorn"] = None
from alphaq_gguf.cli import main
sys.exit(main(["serve", {str(files["stack"])!r}, "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: the server's packages are not installed: uvicorn is missing -> pip install 'alphaq-gguf[serve]'\n"
    )


def test_a_host_that_is_none_is_told(files: dict[str, Path], cli) -> None:
    code, out, err = cli("serve", files["stack"], "--host", "no host")
    assert (code, out) == (1, "")
    assert err.startswith("error: no host:8000: ")
    assert len(err.splitlines()) == 1


def test_a_file_that_does_not_load_is_told(tmp_path: Path, cli) -> None:
    code, _, err = cli("serve", tmp_path / "none.gguf")
    assert code == 1
    assert "is not a file" in err


def test_settings_come_from_the_command_line_alone(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # llama-cpp-python's server reads its settings from variables as common as these.
    monkeypatch.setenv("CONFIG_FILE", str(tmp_path / "none.json"))
    monkeypatch.setenv("VOCAB_ONLY", "true")
    monkeypatch.setenv("API_KEY", "secret")
    with serving(files["stack"], "--ctx", 64) as server:
        assert server.ask("/completions", {"prompt": PROMPT, "max_tokens": 2})["usage"]["completion_tokens"] == 2
