"""Checkpoints, whatever their layout, as one shape: GGUF tensor names, rows of weights, expert stacks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..errors import ConnectionLostError, SourceError, UsageError
from ..reporter import Reporter, Silent
from .base import ExpertMatrix, ExpertStack, Source
from .gguf import GGUFSource
from .huggingface import HuggingFaceSource

__all__ = ["ExpertMatrix", "ExpertStack", "Source", "open_source"]


def open_source(
    source: str | Path,
    *,
    allow_requantize: bool = False,
    pre_tokenizer: str | None = None,
    revision: str | None = None,
    stream: bool = False,
    headers_only: bool = False,
    reporter: Reporter | None = None,
) -> Source:
    """Open a Hugging Face directory, a GGUF file, or a repository OWNER/NAME on the Hub.

    `allow_requantize` admits GGUF files whose experts are already quantised; `pre_tokenizer` names
    llama.cpp's pre-tokenizer for a Hugging Face tokenizer whose regex is unknown. Of repositories,
    `revision` is a branch, tag or commit; `stream` leaves the weights on the Hub and reads them by range
    requests; `headers_only` fetches nothing but config and tensor headers, so that `fields` lacks
    the tokenizer. Files with containers are refused in any case. SourceError says why a source cannot be one.
    """
    path = Path(source)
    if not path.exists():
        from . import hub

        if not hub.is_repo_id(str(source)):
            raise SourceError(
                f"{source} does not exist", "give a checkpoint directory, a .gguf file, or OWNER/NAME on the Hub"
            )
        return _open_repository(str(source), revision, stream, headers_only, pre_tokenizer, reporter or Silent())
    if revision is not None or stream:
        option = "--stream" if stream else "--revision"
        raise UsageError(f"{option}: {path} is on this machine", f"leave out {option}, or give OWNER/NAME on the Hub")
    if path.is_dir():
        return HuggingFaceSource(path, pre_tokenizer=pre_tokenizer)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise SourceError(
            f"{path} is a pickle checkpoint, which can run code when opened", "convert it to safetensors first"
        )
    if path.suffix == ".safetensors":
        raise SourceError(f"{path} is a single weight file", f"give its directory: {path.parent}")
    source_file = GGUFSource(path, allow_requantize=allow_requantize)
    source_file.refuse_containers()
    return source_file


def _open_repository(
    repo_id: str, revision: str | None, stream: bool, headers_only: bool, pre_tokenizer: str | None, reporter: Reporter
) -> Source:
    from . import hub
    from .remote import open_shard
    from .shards import list_shards

    try:
        repository = hub.find_repository(repo_id, revision)
    except ConnectionLostError as error:
        cached = hub.find_cached(repo_id, revision)
        if cached is None:
            raise
        reporter.warn(f"{error.message}: using the copy in the cache")
        return HuggingFaceSource(cached, pre_tokenizer=pre_tokenizer, label=repo_id, name=repo_id.split("/")[1])
    directory = hub.fetch_description(repository, hub.CONFIG if headers_only else hub.DESCRIPTION, reporter)
    names = list_shards(directory, repository.label, repository.files)
    open_directory = partial(
        HuggingFaceSource,
        pre_tokenizer=pre_tokenizer,
        label=repository.label,
        name=repository.name,
        with_tokenizer=not headers_only,
    )
    shards = {name: partial(open_shard, repository, repository.files[name]) for name in names}
    if stream or headers_only:
        return open_directory(directory, shards=shards)
    if hub.find_missing(repository, names):
        # Whatever is wrong with the model shows in its headers, before hundreds of gigabytes are fetched.
        open_directory(directory, shards=shards).require_metadata()
    return open_directory(hub.download(repository, names, reporter))
