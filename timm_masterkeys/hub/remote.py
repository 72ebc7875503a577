"""A repository on the Hub: what it holds beside our files, and what the Hub's client raises, in our words."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError, MasterKeysError
from ..files import file_sha256
from .check import in_short
from .save import FILES


def is_unclear(error: Exception) -> bool:
    """Whether a commit may have been made all the same: the Hub did not refuse it."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return not isinstance(error, HfHubHTTPError) or status >= 500 or status == 429


def read_repository(api: HfApi, repo_id: str, revision: str) -> ModelInfo | None:
    """What a revision holds; None if the repository or the revision does not exist."""
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def list_pull_requests(api: HfApi, repo_id: str) -> set[str]:
    """The refs of the pull requests."""
    return {ref.ref for ref in api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []}


def compare_files(directory: Path, info: ModelInfo | None) -> dict[str, str]:
    """Our files against those of a revision: new, changed or unchanged, by SHA-256 (LFS) or git's blob id."""
    remote = {sibling.rfilename: sibling for sibling in (info.siblings if info else None) or ()}
    states = {}
    for name in FILES:
        path, sibling = directory / name, remote.get(name)
        if sibling is None:
            states[name] = "new"
        elif sibling.lfs is not None:
            states[name] = "unchanged" if file_sha256(path) == sibling.lfs.sha256 else "changed"
        else:
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            states[name] = "unchanged" if blob == sibling.blob_id else "changed"
    return states


def changed(states: Mapping[str, str]) -> list[str]:
    """The files that are not unchanged."""
    return [name for name, state in states.items() if state != "unchanged"]


@contextmanager
def hub_errors(outcome: str) -> Iterator[None]:
    """Turns what the Hub's client raises into a HubError that says the outcome."""
    try:
        yield
    except MasterKeysError:
        raise
    except Exception as error:
        raise HubError(f"{outcome}: {in_words(error)}") from None


def in_words(error: Exception) -> str:
    """What went wrong, without addresses and causes."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set HF_TOKEN."
    if getattr(getattr(error, "response", None), "status_code", 0) == 412:
        return "it was changed by somebody else meanwhile. Run again."
    return in_short(error)
