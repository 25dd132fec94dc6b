"""The local Hub: its oracle is the real client, `huggingface_hub`; bytes on the wire are read with `http.client`."""

from __future__ import annotations

import hashlib
import http.client
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub as hf
import numpy as np
import pytest
from hub_server import CHUNK_BYTES, Fault, HubServer
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import save_file

REPO = "org/moe"
WEIGHTS = random.Random(0).randbytes(300_000)
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": b'{"model_type": "qwen2_moe"}',
    "empty.txt": b"",
    "a folder/odd #1%.txt": b"hello\n",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "model"


@pytest.fixture
def hub(directory: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(REPO, directory)
        yield server


@pytest.fixture
def waits(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """This process' `huggingface_hub` asks `hub`, with an empty cache; what it would have waited before retries."""
    return hub.patch(monkeypatch, tmp_path / "cache")


@pytest.fixture
def link(hub: HubServer, waits: list[float]) -> str:
    """Where the weights lie on the CDN."""
    return hf.get_hf_file_metadata(hf.hf_hub_url(REPO, "model.safetensors")).location


def ask(url: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=5)
    try:
        connection.request(method, f"{address.path}?{address.query}", headers=headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def download(name: str = "model.safetensors", repo: str = REPO, **options) -> bytes:
    return Path(hf.hf_hub_download(repo, name, **options)).read_bytes()


@pytest.mark.usefixtures("waits")
def test_both_listings_describe_every_file(directory):
    info = hf.model_info(REPO, files_metadata=True)
    assert re.fullmatch("[0-9a-f]{40}", info.sha or "")
    assert {file.rfilename: file.size for file in info.siblings or ()} == {n: len(data) for n, data in FILES.items()}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    assert hashes == {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    assert [file.size for file in hf.model_info(REPO).siblings or ()] == [None] * len(FILES)
    # It compares what it hashes itself with the tree: sha256 of LFS files, git's blob ids of others.
    checked = hf.HfApi().verify_repo_checksums(REPO, local_dir=directory)
    assert checked.checked_count == len(FILES)
    assert not (checked.mismatches or checked.missing_paths or checked.extra_paths)


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("name", FILES)
def test_a_download_has_the_bytes_and_the_cdn_never_sees_the_token(hub, name):
    assert download(name, token=hub.token) == FILES[name]
    assert {(request.listener, request.had_auth) for request in hub.requests} <= {("hub", True), ("cdn", False)}
    assert hub.fetched("*.safetensors") == ({name: len(WEIGHTS)} if name == "model.safetensors" else {})


@pytest.mark.usefixtures("waits")
def test_a_snapshot_fetches_what_was_asked_for_once(hub):
    wanted = {"model.safetensors", "config.json"}
    first, second = (Path(hf.snapshot_download(REPO, allow_patterns=["*.safetensors", "*.json"])) for _ in range(2))
    assert first == second and {path.name for path in first.iterdir()} == wanted
    assert first.name == hf.resolve_revision(REPO).resolved == hub.repos[REPO].branches["main"]
    assert hub.fetched() == {name: len(FILES[name]) for name in wanted}


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_an_interrupted_download_resumes_where_the_client_stands(hub, waits, kind):
    hub.faults.append(Fault(kind, "*.safetensors", after=100_000))
    assert download() == WEIGHTS
    bodies = [(request.range, request.status, request.sent) for request in hub.requests if request.listener == "cdn"]
    rest = len(WEIGHTS) - CHUNK_BYTES
    assert bodies == [(None, 200, 100_000), (f"bytes={CHUNK_BYTES}-", 206, rest)]
    assert waits == [1]


@pytest.mark.usefixtures("waits")
def test_a_client_that_resumes_survives_a_server_that_ignores_ranges(hub):
    hub.faults += [Fault("cut", "*.safetensors", after=100_000), Fault("wrong_range")]
    assert download() == WEIGHTS
    assert hub.fetched() == {"model.safetensors": 100_000 + len(WEIGHTS)}


def test_a_download_cut_too_often_fails_and_leaves_nothing(hub, waits, tmp_path):
    hub.faults.append(Fault("cut", "*.safetensors", after=0, times=float("inf")))
    with pytest.raises(Exception, match="peer closed connection"):
        download()
    assert waits == [1] * 5 and not list(tmp_path.rglob("*.incomplete"))


def test_a_server_that_is_busy_says_when_to_come_back(hub, waits):
    busy = Fault("status", "*.safetensors", lambda request: request.listener == "cdn", status=429, retry_after=7)
    hub.faults.append(busy)
    assert download() == WEIGHTS
    assert waits == [7 + 1]


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(
    ("repo", "token", "error", "status"),
    [
        ("org/missing", None, RepositoryNotFoundError, 401),
        ("missing", None, RepositoryNotFoundError, 401),
        ("org/missing", "hf_member", RepositoryNotFoundError, 404),
        ("org/private", None, RepositoryNotFoundError, 401),
        ("org/private", "hf_other", RepositoryNotFoundError, 404),
        ("org/gated", None, GatedRepoError, 401),
        ("org/gated", "hf_other", GatedRepoError, 403),
        (REPO, "hf_stale", HfHubHTTPError, 401),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_refusals_raise_what_the_real_hub_makes_the_client_raise(hub, directory, repo, token, error, status, name):
    hub.add_repo("org/private", directory, private=True)
    hub.add_repo("org/gated", directory, gated=True)
    with pytest.raises(HfHubHTTPError) as refusal:
        download(name, repo, token=token)
    assert type(refusal.value) is error and refusal.value.response.status_code == status
    assert not hub.fetched()
    if repo == "org/gated":  # all may see what is there
        assert hf.model_info(repo, token=token).gated == "manual"
        assert f"Access to model {repo} is restricted" in str(refusal.value)
    if repo in hub.repos:
        assert download(name, repo, token=hub.token) == FILES[name]


@pytest.mark.usefixtures("waits")
def test_missing_revisions_and_files_and_stale_tokens_are_told_apart(hub):
    for revision in ("nowhere", "refs/pr/9", "a" * 40):
        for call in (lambda **at: download("config.json", **at), lambda **at: hf.model_info(REPO, **at)):
            with pytest.raises(RevisionNotFoundError):
                call(revision=revision)
    with pytest.raises(RemoteEntryNotFoundError):
        download("nothing.json")
    assert hf.whoami(hub.token)["name"] == "member" and hf.whoami(hub.other_token)["name"] == "other"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hf.whoami("hf_stale")


@pytest.mark.usefixtures("waits")
def test_a_branch_moves_and_its_old_commit_stays(hub, directory):
    old = hf.model_info(REPO).sha
    hub.add_repo(REPO, directory, "refs/pr/1")
    assert hf.snapshot_download(REPO).endswith(str(old))
    hub.requests.clear()
    new = hub.replace_file(REPO, "model.safetensors", WEIGHTS[::-1])
    assert hf.snapshot_download(REPO).endswith(new) and new != old
    assert hub.fetched() == {"model.safetensors": len(WEIGHTS)}  # all else is in the cache
    assert download() == WEIGHTS[::-1] and download(revision=old) == download(revision="refs/pr/1") == WEIGHTS
    assert download("config.json", revision=new[:8]) == FILES["config.json"]


@pytest.mark.usefixtures("waits")
def test_tensors_of_a_remote_file_are_found_by_its_header_alone(hub, directory):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((200, 300), np.float32)}
    save_file(tensors, directory / "model.safetensors")
    hub.add_repo(REPO, directory)
    header = hf.parse_safetensors_file_metadata(REPO, "model.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("F32", [200, 300]),
    }
    assert hub.fetched() == {"model.safetensors": 100_001}  # the client's first guess at the header's size
    begin, end = header.tensors["a"].data_offsets
    base = 8 + int.from_bytes((directory / "model.safetensors").read_bytes()[:8], "little")
    part = hf.get_session().get(
        hf.hf_hub_url(REPO, "model.safetensors"), headers={"Range": f"bytes={base + begin}-{base + end - 1}"}
    )
    assert part.status_code == 206 and part.content == tensors["a"].tobytes()
    assert hub.requests[-1].sent == tensors["a"].nbytes


def test_metadata_of_a_large_file_comes_with_the_redirect(hub, link):
    found = hf.get_hf_file_metadata(hf.hf_hub_url(REPO, "model.safetensors"))
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert (found.etag, found.size, found.xet_file_data) == (sha256, len(WEIGHTS), None)
    assert found.commit_hash == hub.repos[REPO].branches["main"]
    assert link.startswith(f"{hub.cdn_url}/{sha256}?")
    response, body = ask(link)
    assert response.headers["ETag"] == f'"{sha256}"' and body == WEIGHTS


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=299990-", slice(299_990, None)),
        ("bytes=-10", slice(-10, None)),
        ("bytes=-999999", slice(None)),
        ("bytes=70000-999999", slice(70_000, None)),
    ],
)
def test_a_range_is_that_slice_of_the_file(link, asked, part):
    response, body = ask(link, Range=asked)
    start, stop, _ = part.indices(len(WEIGHTS))
    assert (response.status, response.headers["Content-Range"]) == (206, f"bytes {start}-{stop - 1}/{len(WEIGHTS)}")
    assert body == WEIGHTS[part]


def test_a_range_beyond_the_end_is_refused(link):
    response, _ = ask(link, Range="bytes=300000-")
    assert (response.status, response.headers["Content-Range"]) == (416, "bytes */300000")


def test_a_link_expires_and_cannot_be_forged_and_takes_no_token(hub, link):
    assert ask(link, "HEAD")[0].status == 200
    assert ask(link, Authorization="Bearer hf_member")[0].status == 400
    assert ask(link.replace("expires=", "expires=9"))[0].status == 403
    hub.faults.append(Fault("expire"))
    assert [ask(link)[0].status for _ in range(2)] == [403, 200]
    hub.link_lifetime_s = -1
    with pytest.raises(HfHubHTTPError, match="expired") as refusal:
        download()
    assert refusal.value.response.status_code == 403


def test_a_cut_is_an_early_end_and_a_reset_is_an_error(hub, link):
    hub.faults += [Fault("cut"), Fault("reset"), Fault("cut", after=1000), Fault("reset", after=1000)]
    with pytest.raises(http.client.RemoteDisconnected):
        ask(link)
    with pytest.raises(ConnectionResetError):
        ask(link)
    with pytest.raises(http.client.IncompleteRead) as early:
        ask(link)
    assert early.value.partial == WEIGHTS[:1000]
    with pytest.raises(ConnectionResetError):
        ask(link)
    assert [(request.status, request.sent) for request in hub.requests[-4:]] == [
        (0, 0),
        (0, 0),
        (200, 1000),
        (200, 1000),
    ]
    assert ask(link)[1] == WEIGHTS


def test_a_corrupt_byte_is_the_only_one_and_strikes_the_part_that_has_it(hub, link):
    hub.faults.append(Fault("corrupt", "*.safetensors", offset=70_000))
    assert ask(link, Range="bytes=0-69999")[1] == WEIGHTS[:70_000]
    _, body = ask(link, Range="bytes=69990-")
    differing = [i for i, (ours, theirs) in enumerate(zip(body, WEIGHTS[69_990:], strict=True)) if ours != theirs]
    assert differing == [10]


def test_a_slow_body_comes_chunk_by_chunk(hub, link):
    hub.faults.append(Fault("slow", delay_s=0.05))
    begin = time.monotonic()
    assert ask(link)[1] == WEIGHTS
    assert time.monotonic() - begin > 0.05 * (len(WEIGHTS) // CHUNK_BYTES)


def test_a_fault_strikes_the_requests_it_names(hub):
    hub.faults += [
        Fault("status", "config.json", skip=1, times=2, status=500),
        Fault("status", "/api/*", lambda request: request.method == "HEAD", times=float("inf")),
    ]
    config, other, api = (
        f"{hub.url}/{path}" for path in (f"{REPO}/resolve/main/config.json", "x", f"api/models/{REPO}")
    )
    assert [ask(config)[0].status for _ in range(4)] == [307, 500, 500, 307]
    assert [ask(api, method)[0].status for method in ("GET", "HEAD", "GET", "HEAD")] == [200, 503, 200, 503]
    assert ask(other)[0].status == 401
    assert [(request.method, request.file) for request in hub.requests[3:6]] == [
        ("GET", "config.json"),
        ("GET", None),
        ("HEAD", None),
    ]


def test_a_hub_that_is_down_refuses_and_comes_back(hub, waits):
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    for _ in range(2):  # kept alive in between
        connection.request("GET", f"/api/models/{REPO}")
        assert connection.getresponse().read()
    hub.down()
    with pytest.raises(ConnectionError):
        connection.request("GET", f"/api/models/{REPO}")
        connection.getresponse()
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        ask(hub.url)
    with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
        download()
    assert waits == [1, 2, 4, 8, 8]
    hub.up()
    assert download() == WEIGHTS


def test_another_process_talks_to_the_hub_and_its_own_cache(hub, directory, monkeypatch, tmp_path):
    hub.add_repo("org/private", directory, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    code = "import huggingface_hub as hf; print(hf.hf_hub_download('org/private', 'model.safetensors'))"
    environment = hub.environment(tmp_path / "cache", token=hub.token)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path = Path(run.stdout.strip())
    assert path.is_relative_to(tmp_path / "cache") and path.read_bytes() == WEIGHTS
    assert {request.path.split("/")[1] for request in hub.requests if request.listener == "hub"} == {"org"}
