"""Repositories on the Hugging Face Hub: what they hold, their files on disk, and why they cannot be had."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants, errors

from ..errors import ConnectionLostError, SourceError
from ..reporter import Reporter
from .shards import INDEX, NUMBERED, SINGLE, list_shards

T = TypeVar("T")

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
CONFIG = ("config.json",)
# Besides the weights, all a conversion reads: what describes the model, and its tokenizer in any of its forms.
DESCRIPTION = (
    *CONFIG,
    "generation_config.json",
    "README.md",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates/"
_HASH_CHUNK = 1 << 22
# A request that brings nothing new is repeated this often, each time after twice the wait.
TRIES = 7
WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
# Whether there is a Hub at all shows sooner, and a user without a network should not wait for it.
_FIRST_TRIES = 2
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# What the HTTP library under huggingface_hub raises, which is not the same library in all versions.
TransportError: type[Exception] = errors.HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository; `sha256` only of large (LFS) files."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit, found under `revision`, with the files a conversion may read, by name."""

    repo_id: str
    revision: str | None
    commit: str
    files: dict[str, RepoFile]

    @property
    def label(self) -> str:
        return f"{self.repo_id}@{self.commit[:8]}"

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]


def is_repo_id(text: str) -> bool:
    """Whether `text` could name a repository: OWNER/NAME."""
    return _REPO_ID.match(text) is not None and ".." not in text


def find_repository(repo_id: str, revision: str | None) -> Repository:
    """Ask the Hub what `repo_id` holds at `revision` (None: its main branch); SourceError says why it cannot."""
    with explained(repo_id, revision):
        info = persist(
            lambda: huggingface_hub.HfApi().model_info(
                repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            ),
            tries=_FIRST_TRIES,
        )
    files = {
        entry.rfilename: RepoFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
        for entry in info.siblings or []
        if "/" not in entry.rfilename or entry.rfilename.startswith(_TEMPLATES)
    }
    if not info.sha:
        raise SourceError(f"{repo_id}: the Hub names no commit", "try again")
    if CONFIG[0] not in files:
        ggufs = [entry.rfilename for entry in info.siblings or [] if entry.rfilename.endswith(".gguf")]
        hint = f"download a float GGUF, such as {ggufs[0]}, and give the file" if ggufs else "give a model repository"
        raise SourceError(f"{repo_id}: the repository holds no config.json", hint)
    return Repository(repo_id, revision, info.sha, files)


def find_cached(repo_id: str, revision: str | None) -> Path | None:
    """The directory of a repository that was downloaded before, whole; None without one."""
    config = huggingface_hub.try_to_load_from_cache(repo_id, CONFIG[0], revision=revision)
    if not isinstance(config, str):
        return None
    directory = Path(config).parent
    try:
        list_shards(directory, repo_id, [file.name for file in directory.iterdir()])
    except SourceError:
        return None
    return directory


def needs_index(names: Iterable[str]) -> bool:
    """Whether only the index can tell which safetensors files make up the checkpoint."""
    names = list(names)
    return INDEX in names and SINGLE not in names and not any(map(NUMBERED.match, names))


def fetch_description(repository: Repository, wanted: tuple[str, ...], reporter: Reporter) -> Path:
    """Download those of the `wanted` small files that exist, and the shard index where it is needed."""
    # Asked for by its branch, so that the cache knows what the branch stood for when there is no network.
    with explained(repository.repo_id, repository.revision, CONFIG[0]):
        persist(
            lambda: huggingface_hub.hf_hub_download(
                repository.repo_id, CONFIG[0], revision=repository.revision, tqdm_class=_bar(lambda _: None)
            )  # pyright: ignore[reportCallIssue, reportArgumentType]
        )
    names = [name for name in repository.files if name in wanted or (wanted != CONFIG and name.startswith(_TEMPLATES))]
    if needs_index(repository.files):
        names.append(INDEX)
    return download(repository, names, reporter)


def download(repository: Repository, names: Iterable[str], reporter: Reporter) -> Path:
    """Bring the named files into the Hub's cache, unless they are there; returns their directory.

    Large files are checked against the sha256 the Hub names. SourceError says what is wrong;
    ConnectionLostError that the same call goes on with the files that are still missing.
    """
    files = [repository.files[name] for name in names]
    missing = find_missing(repository, [file.name for file in files])
    _check_space(repository, missing)
    directory = Path()
    task = reporter.task(f"Downloading {repository.label}", sum(file.size for file in missing), "bytes")
    with task if missing else nullcontext(lambda _: None) as advance:
        for file in files:
            with explained(repository.repo_id, repository.commit, file.name):
                path = persist(lambda file=file: _download_file(repository, file.name, advance))
            directory = Path(path).parents[file.name.count("/")]
            if file in missing:
                _verify(repository, file, Path(path))
    return directory


def persist(call: Callable[[], T], tries: int = TRIES) -> T:
    """`call`, repeated after a growing wait while it fails for a reason that may pass."""
    wait = WAIT_S
    for last in [False] * (tries - 1) + [True]:
        try:
            return call()
        except TransportError as error:
            response = getattr(error, "response", None)
            # An expired link is refused; asked again, the Hub gives a new one.
            expired = response is not None and response.status_code == 403 and not response.headers.get("X-Error-Code")
            if last or not (response is None or response.status_code in TRANSIENT or expired):
                raise
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
    raise AssertionError


def _download_file(repository: Repository, name: str, advance: Callable[[int], None]) -> str:
    """One file into the cache; what a failed try had fetched is taken off the progress bar again."""
    fetched = 0

    def count(amount: int) -> None:
        nonlocal fetched
        fetched += amount
        advance(amount)

    try:
        return huggingface_hub.hf_hub_download(
            repository.repo_id,
            name,
            revision=repository.commit,
            tqdm_class=_bar(count),  # pyright: ignore[reportArgumentType]
        )
    except BaseException:
        advance(-fetched)
        raise


def find_missing(repository: Repository, names: Iterable[str]) -> list[RepoFile]:
    """Those of the named files that the cache does not hold."""

    def is_cached(name: str) -> bool:
        found = huggingface_hub.try_to_load_from_cache(repository.repo_id, name, revision=repository.commit)
        return isinstance(found, str)

    return [repository.files[name] for name in names if not is_cached(name)]


def _check_space(repository: Repository, missing: list[RepoFile]) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    blobs = (
        cache / huggingface_hub.constants.REPO_ID_SEPARATOR.join(["models", *repository.repo_id.split("/")]) / "blobs"
    )
    begun = sum(path.stat().st_size for path in blobs.glob("*.incomplete"))
    need, free = sum(file.size for file in missing) - begun, shutil.disk_usage(existing).free
    if need > free:
        raise SourceError(
            f"{cache}: disk full: {repository.repo_id} needs {need:,} bytes more, {free:,} are free",
            "pass --stream to convert without keeping the checkpoint, or set HF_HOME to a larger disk",
        )


def _verify(repository: Repository, file: RepoFile, path: Path) -> None:
    """SourceError, and the file removed from the cache, when it is not what the Hub says it is."""
    if file.sha256 is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != file.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise SourceError(
            f"{repository.label}: hash mismatch: {file.name} has sha256 {digest.hexdigest()[:12]}, "
            f"the Hub says {file.sha256[:12]}",
            "it was removed from the cache: run the same command again to download it anew",
        )


def _bar(advance: Callable[[int], None]) -> type:
    """A progress bar class, as huggingface_hub wants one, that only reports how far a download has come."""

    class Bar:
        n, total = 0, None

        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            advance(initial)

        def update(self, amount: float = 1) -> None:
            advance(int(amount))

        def __getattr__(self, name: str) -> Callable[..., None]:
            # Everything else that bars can do is about looks.
            return lambda *_, **__: None

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    return Bar


@contextmanager
def explained(repo_id: str, revision: str | None, file: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do; its own log lines are held back."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{repo_id} is gated: {_server_message(error)}",
            f"accept its conditions at {constants.ENDPOINT}/{repo_id}, then run `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{repo_id} is neither a local path nor a repository on {constants.ENDPOINT} that you may see",
            "check the name; for a private repository run `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{repo_id} has no revision {revision!r}", "give a branch, tag or commit") from None
    except errors.LocalEntryNotFoundError:
        raise _unreachable(repo_id, file, "") from None
    except errors.EntryNotFoundError:
        raise SourceError(f"{repo_id} has no file {file}", "the repository is incomplete") from None
    except errors.HFValidationError as error:
        raise SourceError(f"{repo_id}: not a repository name: {error}", "give OWNER/NAME") from None
    except errors.OfflineModeIsEnabled:
        raise ConnectionLostError(
            f"{repo_id}: HF_HUB_OFFLINE is set", "unset it, or download the repository while it is not set"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise SourceError(
                f"{repo_id}: the Hub refuses access ({status}): {_server_message(error)}",
                "run `hf auth login` or set HF_TOKEN to a token that may read it",
            ) from None
        raise _unreachable(repo_id, file, f"HTTP {status}") from None
    except TransportError as error:
        raise _unreachable(repo_id, file, str(error) or type(error).__name__) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SourceError(
                f"{constants.HF_HUB_CACHE}: disk full while downloading {repo_id}",
                "free some space, pass --stream, or set HF_HOME to a larger disk",
            ) from None
        raise _unreachable(repo_id, file, str(error)) from None
    finally:
        logger.setLevel(level)


def _unreachable(repo_id: str, file: str, reason: str) -> ConnectionLostError:
    reason = f": {reason.splitlines()[0]}" if reason else ""
    if file:
        return ConnectionLostError(f"{repo_id}: connection lost while reading {file}{reason}")
    return ConnectionLostError(
        f"{repo_id} is no local path, and {constants.ENDPOINT} cannot be reached{reason}",
        "check the connection; HF_ENDPOINT names another Hub, and a local directory needs none",
    )


def _server_message(error: errors.HfHubHTTPError) -> str:
    text = error.server_message or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
