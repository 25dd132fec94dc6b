"""Models on the Hub, by name: downloaded or streamed, whatever the connection does."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import build_moe
from hub_server import Fault, HubServer

from alphaq_gguf.checkpoint import hub as hub_client
from alphaq_gguf.checkpoint import open_source

REPO = "tiny/Tiny-MoE"
WEIGHTS = "*.safetensors"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, with files that a conversion has no use for."""
    directory = build_moe(tmp_path_factory.mktemp("hub") / "Tiny-MoE", dtype="bfloat16", shards=True)
    (directory / "pytorch_model.bin").write_bytes(b"\0" * 1000)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")
    (directory / "training_args.json").write_text("{}", encoding="utf-8")
    return directory


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(REPO, model)
        server.patch(monkeypatch, tmp_path / "hub-cache", timeout_s=1)
        monkeypatch.setattr(hub_client, "WAIT_S", 0.01)
        yield server


@pytest.fixture(scope="session")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> str:
    """The sha256 of the file that the same checkpoint gives when it lies on the disk."""
    from alphaq_gguf.cli import main

    out = tmp_path_factory.mktemp("local") / "out.gguf"
    assert main(["convert", str(model), "-o", str(out), "--bpw", "3.6", "--cache-dir", str(cache_dir)]) == 0
    return digest(out)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weight_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob(WEIGHTS))


def test_a_downloaded_model_gives_the_file_of_a_local_one(server, model, expected, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6)
    assert code == 0, err
    assert digest(out) == expected
    fetched = server.fetched()
    assert "pytorch_model.bin" not in fetched
    assert "training_args.json" not in fetched
    assert sum(server.fetched(WEIGHTS).values()) < 1.2 * weight_bytes(model) + (1 << 20)
    # A second run asks what the repository holds, and fetches none of it again.
    server.requests.clear()
    assert cli("convert", REPO, "-o", out, "--bpw", 3.6, "--force")[0] == 0
    assert sum(server.fetched(WEIGHTS).values()) < weight_bytes(model) / 4


def test_the_default_name_is_that_of_the_repository(server, tmp_path, cli, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("convert", REPO, "--bpw", 3.6)[0] == 0
    assert (tmp_path / "Tiny-MoE-alphaq-3.6bpw.gguf").is_file()


def test_a_revision_is_what_is_converted(server, model, tmp_path, cli) -> None:
    other = build_moe(tmp_path / "other", dtype="bfloat16", moe_intermediate_size=512)
    commit = server.add_repo(REPO, other, revision="wide")
    by_branch, by_commit = open_source(REPO, revision="wide"), open_source(REPO, revision=commit, stream=True)
    assert by_branch.fingerprint == by_commit.fingerprint == open_source(other).fingerprint
    assert by_branch.fingerprint != open_source(model).fingerprint


def test_without_a_network_the_cache_serves(server, expected, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    assert cli("convert", REPO, "-o", out, "--bpw", 3.6)[0] == 0
    server.down()
    code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6, "--force")
    assert code == 0, err
    assert "using the copy in the cache" in err
    assert digest(out) == expected


def test_streaming_gives_the_same_file_and_keeps_nothing(server, model, expected, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6, "--stream")
    assert code == 0, err
    assert digest(out) == expected
    kept = [path for path in (tmp_path / "hub-cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 200_000
    assert not [path for path in kept if path.name.endswith(".safetensors")]


def test_streaming_reads_once_to_measure_and_once_to_encode(server, model, tmp_path, cli) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out.gguf"
    source = open_source(REPO, stream=True)
    once = sum(info.n_bytes for info in source.tensors.values())
    assert source.fingerprint
    # A model this small is hashed whole for its fingerprint, and its headers are not small beside it.
    opening = sum(server.fetched(WEIGHTS).values()) - once
    server.requests.clear()
    arguments = ("--stream", "--cache-dir", tmp_path / "measured")
    assert cli("allocate", REPO, "--bpw", 3.6, "-o", recipe, *arguments)[0] == 0
    measured = sum(server.fetched(WEIGHTS).values()) - opening - once
    experts = sum(source.tensors[stack.name].n_bytes for stack in source.stacks)
    assert experts <= measured < 1.01 * experts
    server.requests.clear()
    assert cli("convert", REPO, "--recipe", recipe, "-o", out, *arguments)[0] == 0
    encoded = sum(server.fetched(WEIGHTS).values()) - opening - once
    assert once <= encoded < 1.01 * once


def cut_often() -> list[Fault]:
    return [Fault("cut", WEIGHTS, after=70_000, times=5)]


# Lists are made anew for each test, because a fault counts the requests it has seen.
FAULTS: dict[str, Callable[[], list[Fault]]] = {
    "cut in the middle": cut_often,
    "reset before any answer": lambda: [Fault("reset", WEIGHTS, times=3)],
    "server errors": lambda: [Fault("status", WEIGHTS, status=status, times=2) for status in (500, 503)],
    "too many requests": lambda: [Fault("status", WEIGHTS, status=429, retry_after=0, times=2)],
    "silence": lambda: [Fault("stall", WEIGHTS, after=10_000)],
    "expired links": lambda: [Fault("expire", WEIGHTS, skip=2, times=3)],
    "slow": lambda: [Fault("slow", WEIGHTS, delay_s=0.01, times=20)],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stream", [False, True], ids=["download", "stream"])
def test_faults_that_pass_leave_no_trace(stream, fault, server, expected, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    server.faults = FAULTS[fault]()
    code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6, *(["--stream"] if stream else []))
    assert code == 0, err
    assert all(fault.seen for fault in server.faults)
    assert digest(out) == expected


def test_a_connection_lost_for_good_says_how_to_go_on(server, expected, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    command = ("convert", REPO, "-o", out, "--bpw", 3.6, "--stream", "--cache-dir", tmp_path / "measured")
    server.faults = [Fault("cut", WEIGHTS, after=0, skip=60, times=1e9, where=lambda r: r.listener == "cdn")]
    code, _, err = cli(*command)
    assert code == 1
    assert "connection lost" in err
    assert "run it again to go on from there: alphaq-gguf convert tiny/Tiny-MoE" in err
    assert not out.exists()
    server.faults = []
    assert cli(*command)[0] == 0
    assert digest(out) == expected


def test_a_download_lost_for_good_keeps_the_files_that_are_whole(server, expected, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    server.faults = [Fault("cut", "*-00005-*", after=0, times=1e9, where=lambda r: r.range is None)]
    code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6)
    assert code == 1
    assert "connection lost while reading model-00005-of-00007.safetensors" in err
    assert "alphaq-gguf convert" in err
    server.faults, server.requests = [], []
    assert cli("convert", REPO, "-o", out, "--bpw", 3.6)[0] == 0
    whole = {request.file for request in server.requests if request.file and request.range is None and request.sent}
    assert not {file for file in whole if re.search("0000[1-4]", file)}
    assert digest(out) == expected


def test_a_damaged_download_is_noticed_and_fetched_anew(server, expected, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    whole = lambda request: request.range is None  # noqa: E731
    server.faults = [Fault("corrupt", "*-00003-*", offset=200_000, where=whole)]
    code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6)
    assert code == 1
    assert "hash mismatch: model-00003-of-00007.safetensors" in err
    assert not out.exists()
    assert cli("convert", REPO, "-o", out, "--bpw", 3.6)[0] == 0
    assert digest(out) == expected


def test_a_stream_that_reads_differently_the_second_time_is_noticed(server, tmp_path, cli) -> None:
    out = tmp_path / "out.gguf"
    server.faults = [Fault("corrupt", "*-00003-*", offset=400_000)]
    code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6, "--stream", "--cache-dir", tmp_path / "measured")
    assert code == 1
    assert "hash mismatch" in err
    assert not out.exists()


def test_a_file_that_changes_under_the_same_name_does_not_matter(server, model, expected, tmp_path, cli) -> None:
    source = open_source(REPO, stream=True)
    server.replace_file(REPO, "model-00002-of-00007.safetensors", b"\0" * 1000)
    assert source.fingerprint == open_source(model).fingerprint


def test_a_server_without_ranges_is_told_from_one_that_fails(server, tmp_path, cli) -> None:
    server.faults = [Fault("wrong_range", WEIGHTS, times=1e9)]
    code, _, err = cli("convert", REPO, "-o", tmp_path / "out.gguf", "--bpw", 3.6, "--stream")
    assert code == 1
    assert "does not serve ranges" in err


@pytest.mark.parametrize("stream", [False, True], ids=["download", "stream"])
def test_a_private_repository_opens_with_a_token_that_stays_on_the_hub(
    stream, model, expected, tmp_path, monkeypatch, cli
) -> None:
    with HubServer() as server:
        server.add_repo(REPO, model, private=True)
        server.patch(monkeypatch, tmp_path / "cache", token=server.token)
        out = tmp_path / "out.gguf"
        code, _, err = cli("convert", REPO, "-o", out, "--bpw", 3.6, *(["--stream"] if stream else []))
        assert code == 0, err
        assert digest(out) == expected
        assert {r.listener for r in server.requests if r.had_auth} == {"hub"}


def refused(server: HubServer, cli, *options: object) -> str:
    """The error line of a conversion that must fail and write nothing."""
    code, _, err = cli("convert", REPO, "-o", "never.gguf", "--bpw", 3.6, *options)
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert not Path("never.gguf").exists()
    return lines[0]


@pytest.mark.parametrize("token", [None, "other"], ids=["without token", "with a token that opens nothing"])
def test_gated_and_private_repositories_are_explained(token, model, tmp_path, monkeypatch, cli) -> None:
    with HubServer() as server:
        server.patch(monkeypatch, tmp_path / "cache", token=server.other_token if token else None)
        server.add_repo(REPO, model, gated=True)
        line = refused(server, cli)
        assert "is gated" in line
        assert f"accept its conditions at {server.url}/{REPO}" in line
        server.add_repo("tiny/Secret", model, private=True)
        code, _, err = cli("convert", "tiny/Secret", "--bpw", 3.6)
        assert code == 1
        assert "that you may see" in err
        assert "hf auth login" in err


def test_a_token_the_hub_does_not_know_is_explained(model, tmp_path, monkeypatch, cli) -> None:
    with HubServer() as server:
        server.add_repo(REPO, model)
        server.patch(monkeypatch, tmp_path / "cache", token="hf_stale")
        assert "refuses access (401)" in refused(server, cli)


def test_what_does_not_exist_is_named(server, cli) -> None:
    assert "has no revision 'v9'" in refused(server, cli, "--revision", "v9")
    code, _, err = cli("convert", "tiny/Nothing", "--bpw", 3.6)
    assert code == 1
    assert "tiny/Nothing is neither a local path nor a repository" in err


def test_a_repository_of_gguf_files_is_told_from_a_checkpoint(server, tmp_path, cli) -> None:
    directory = tmp_path / "ggufs"
    directory.mkdir()
    (directory / "Tiny-BF16.gguf").write_bytes(b"GGUF")
    server.add_repo("tiny/GGUFs", directory)
    code, _, err = cli("convert", "tiny/GGUFs", "--bpw", 3.6)
    assert code == 1
    assert "holds no config.json" in err
    assert "such as Tiny-BF16.gguf" in err


def test_a_hub_out_of_reach_is_named(server, cli) -> None:
    url = server.url
    server.down()
    assert f"{url} cannot be reached" in refused(server, cli)


def test_a_broken_repository_fails_before_its_weights_are_fetched(server, model, tmp_path, cli) -> None:
    server.replace_file(REPO, "config.json", b'{"model_type": "mystery_moe", "num_experts": 8}')
    assert "'mystery_moe' is not supported" in refused(server, cli)
    server.replace_file(REPO, "config.json", (model / "config.json").read_bytes())
    header = (10**9).to_bytes(8, "little")
    server.replace_file(REPO, "model-00002-of-00007.safetensors", header + b"\0" * 1000)
    assert "its header claims 1000000000 bytes, the file has 1008" in refused(server, cli)
    server.replace_file(REPO, "model-00002-of-00007.safetensors", (20).to_bytes(8, "little") + b"[" * 20)
    assert "damaged safetensors file" in refused(server, cli)
    assert not [request for request in server.requests if request.range is None and request.listener == "cdn"]


def test_a_repository_without_tokenizer_is_refused_before_its_weights_are_fetched(server, model, tmp_path, cli) -> None:
    directory = tmp_path / "bare"
    directory.mkdir()
    for path in model.iterdir():
        if "token" not in path.name:
            (directory / path.name).write_bytes(path.read_bytes())
    server.add_repo(REPO, directory)
    assert "tokenizer.json" in refused(server, cli)
    assert not [request for request in server.requests if request.range is None and request.listener == "cdn"]


def test_options_of_the_hub_make_no_sense_for_local_paths(model, cli) -> None:
    for option in (["--stream"], ["--revision", "main"]):
        code, _, err = cli("convert", model, "--bpw", 3.6, *option)
        assert code == 2
        assert f"{option[0]}:" in err


def test_an_interruption_ends_a_stalled_stream_at_once_and_the_same_command_goes_on(
    model, expected, tmp_path, cli
) -> None:
    out = tmp_path / "out.gguf"
    with HubServer() as server:
        server.add_repo(REPO, model)
        server.faults = [Fault("stall", WEIGHTS, skip=70, times=1e9, where=lambda r: r.listener == "cdn")]
        command = [sys.executable, "-m", "alphaq_gguf", "convert", REPO, "-o", out, "--bpw", "3.6", "--stream"]
        command += ["--cache-dir", tmp_path / "measured"]
        environment = {**os.environ, **server.environment(tmp_path / "cache", timeout_s=60)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not server.faults[0].seen > 70 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - start < 10
        assert process.returncode == 130
        assert "run the same command again" in err
        assert not out.exists()
        server.faults = []
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert digest(out) == expected


def test_a_plan_reads_config_and_headers_only(server, model, cli) -> None:
    code, out, err = cli("plan", REPO)
    assert code == 0, err
    assert "about" in out
    fetched = server.fetched()
    assert not [file for file in fetched if "token" in file]
    assert sum(server.fetched(WEIGHTS).values()) <= len(list(model.glob(WEIGHTS))) * (1 << 14)
