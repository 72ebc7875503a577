"""Publishes converted models to the Hugging Face Hub, in one checked commit."""

import contextlib
import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, EvalResult, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]
from torch import nn

from ..errors import HubError, MasterKeysError
from ..files import file_sha256
from ..models.wrapped import unwrapped
from ..version import __version__
from .card import inherited_license, read_readme
from .save import FILES, in_short, save_pretrained, timm_cfg

_logger = logging.getLogger(__name__)

_TRIES = 4


@dataclass(frozen=True)
class Publication:
    """What ``push_to_hub`` did, or would do.

    Attributes:
        repo_id: ``org/name``.
        revision: The branch, or the pull request's ref.
        sha: The commit that holds the files, to pin as ``hf-hub:org/name@sha``; None in a dry run of a new repository.
        files: File name to "new", "changed" or "unchanged".
        committed: Whether a commit was made.
        url: Of the commit or pull request.
        account: Whose token it is; empty in a dry run without one.
    """

    repo_id: str
    revision: str
    sha: str | None
    files: dict[str, str]
    committed: bool
    url: str = ""
    account: str = ""

    def __str__(self) -> str:
        lines = [f"{name:<{max(map(len, self.files))}}  {state}" for name, state in self.files.items()]
        at = f"hf-hub:{self.repo_id}@{self.sha}" if self.sha else f"hf-hub:{self.repo_id} (new)"
        done = "committed" if self.committed else "no commit made"
        who = f"account {self.account}" if self.account else "no account: publishing needs `hf auth login`"
        return "\n".join([*lines, f"{at}: {done}", who, *([self.url] if self.url else [])])


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Publish a master key filters model",
    dry_run: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] = (),
    tags: str | Sequence[str] = (),
    metrics: Sequence[EvalResult] = (),
    config: Mapping[str, Any] | None = None,
    readme: str = "",
) -> Publication:
    """Publishes a converted timm model to the Hugging Face Hub in one commit.

    Everything is checked before the first byte leaves: name, rights, licence, card, and that the saved files load as
    the same model. The commit names its parent, so an answer lost on the way cannot make a second one; afterwards
    the remote files are compared with the local ones. Unchanged content makes no commit.

    Args:
        model: A converted model made by ``timm.create_model``. Not changed.
        repo_id: ``org/name``; made if missing.
        private: For a new repository.
        revision: Branch, made if missing; the default branch if None.
        create_pr: Open a pull request instead of committing.
        token: Hub token; the one of ``hf auth login`` or HF_TOKEN if None.
        commit_message: Title of the commit or pull request.
        dry_run: Check and compare, but change nothing on the Hub.
        license: As for ``save_pretrained``; here the weights must have one.
        base_model: As for ``save_pretrained``.
        datasets: As for ``save_pretrained``.
        tags: As for ``save_pretrained``.
        metrics: As for ``save_pretrained``.
        config: As for ``save_pretrained``.
        readme: A README whose hand-written part and metadata to keep, where the repository has none yet.

    Returns:
        A Publication with the commit's sha; ``str()`` lists the files.

    Raises:
        ConversionError: Not converted, not a whole timm model, or a licence missing or other than the inherited one.
        HubError: The Hub refused or could not be reached; the message says whether anything was published.

    Example:
        >>> print(push_to_hub(model, "me/convnext_tiny.mk8"))
    """
    model = unwrapped(model)
    inherited_license(timm_cfg(model), license)
    if create_pr and revision:
        raise HubError("create_pr opens a pull request to the default branch; leave revision out.")
    about: dict[str, Any] = {"license": license, "base_model": base_model, "datasets": datasets, "tags": tags}
    about |= {"metrics": metrics, "config": config}
    branch = revision or "main"
    api = HfApi(token=token, library_name="timm_masterkeys", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as folder:
        directory = Path(folder)
        with _telling(f"Nothing was published to {repo_id}"):
            account = api.whoami()["name"] if not dry_run or token or get_token() else ""
            info, default, readme = _read(api, repo_id, branch, revision, readme)
            (directory / "README.md").write_text(readme, encoding="utf-8")
            save_pretrained(model, directory, repo_id=repo_id, **about)
            _check_card(api, directory / "README.md")
            files = _compare(directory, info or default)
            changed = _changed(files)
            if dry_run or (info and not changed):
                sha = info.sha if info else None
                return Publication(repo_id, branch, sha, files, committed=False, account=account)
            if default is None:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            info = info or _new_branch(api, repo_id, branch, revision)
            if not changed:  # a new branch of a repository that has these very files
                return Publication(repo_id, branch, info.sha, files, committed=False, account=account)
            files = _compare(directory, info)
            operations = [CommitOperationAdd(name, str(directory / name)) for name in _changed(files)]
        sha, url, ref = _commit(api, repo_id, branch, create_pr, commit_message, operations, info.sha, directory)
        _confirm(api, repo_id, sha, directory)
    _logger.info("Published hf-hub:%s@%s", repo_id, sha)
    return Publication(repo_id, ref, sha, files, committed=True, url=url, account=account)


def _read(
    api: HfApi, repo_id: str, branch: str, revision: str | None, readme: str
) -> tuple[ModelInfo | None, ModelInfo | None, str]:
    """What the branch holds, what the branch holds that it would be made from, and the README there or else ours."""
    info = _remote(api, repo_id, branch)
    default = info or (_remote(api, repo_id, "main") if revision else None)
    if default and any(sibling.rfilename == "README.md" for sibling in default.siblings or ()):
        readme = read_readme(api.hf_hub_download(repo_id, "README.md", revision=default.sha))
    return info, default, readme


def _check_card(api: HfApi, path: Path) -> None:
    """Has the Hub check a card's metadata. (``ModelCard.validate`` of old clients asks huggingface.co always.)"""
    card = {"repoType": "model", "content": path.read_text(encoding="utf-8")}
    hf_raise_for_status(get_session().post(f"{api.endpoint}/api/validate-yaml", json=card))


def _new_branch(api: HfApi, repo_id: str, branch: str, asked: str | None) -> ModelInfo:
    """A branch, made if it was asked for by name; a new repository has its default one."""
    if asked:
        api.create_branch(repo_id, branch=asked, exist_ok=True)
    info = _remote(api, repo_id, branch)
    if info is None:
        raise HubError(f"{repo_id} was made, but branch {branch} cannot be read. Run again.")
    return info


def _confirm(api: HfApi, repo_id: str, sha: str, directory: Path) -> None:
    """Raises unless the commit holds the very files."""
    with _telling(f"Commit {sha} was made in {repo_id}, but could not be confirmed"):
        differing = _changed(_compare(directory, _remote(api, repo_id, sha)))
        if differing:
            raise HubError(f"{repo_id}@{sha} holds other bytes than were sent: {', '.join(differing)}. Publish again.")


def _commit(
    api: HfApi,
    repo_id: str,
    branch: str,
    create_pr: bool,
    message: str,
    operations: list[CommitOperationAdd],
    parent: str | None,
    directory: Path,
) -> tuple[str, str, str]:
    """Commits once -> (sha, url, ref). After an unclear answer, looks whether the commit was made, then tries again."""
    with _telling(f"Nothing was committed to {repo_id}"):
        pulls = _pulls(api, repo_id) if create_pr else set()
    problem: Exception | None = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            if attempt:  # an answer was lost: was the commit made?
                for ref in _pulls(api, repo_id) - pulls if create_pr else {branch}:
                    info = _remote(api, repo_id, ref)
                    if info and info.sha and info.sha != parent:
                        if not _changed(_compare(directory, info)):
                            return info.sha, f"{api.endpoint}/{repo_id}/commit/{info.sha}", ref
                        if not create_pr:
                            raise HubError(f"{repo_id} was changed by somebody else meanwhile. Run again.")
            commit: CommitInfo = api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=None if create_pr else branch,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return commit.oid, commit.pr_url or commit.commit_url, commit.pr_revision or branch
        except MasterKeysError:
            raise
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 500)
            if status == 412:
                raise HubError(
                    f"{repo_id} was changed by somebody else meanwhile, nothing was committed. Run again."
                ) from None
            if status < 500 and status != 429:
                raise HubError(f"Nothing was committed to {repo_id}: {_told(error)}") from None
            problem = error
        except Exception as error:  # a dropped connection, a garbled answer
            problem = error
    raise HubError(
        f"No clear answer to the commit from {api.endpoint} in {_TRIES} tries ({_told(problem)}). "
        "Run again: a commit that was made is found and not made twice."
    )


def _remote(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo | None:
    """What a revision holds; None if the repository or the revision does not exist."""
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _pulls(api: HfApi, repo_id: str) -> set[str]:
    return {ref.ref for ref in api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []}


def _compare(directory: Path, info: ModelInfo | None) -> dict[str, str]:
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


def _changed(states: Mapping[str, str]) -> list[str]:
    return [name for name, state in states.items() if state != "unchanged"]


@contextlib.contextmanager
def _telling(outcome: str) -> Iterator[None]:
    """Turns what the Hub's client raises into a HubError that says the outcome, without addresses and causes."""
    try:
        yield
    except (MasterKeysError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise HubError(f"{outcome}: {_told(error)}") from None


def _told(error: Exception | None) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set HF_TOKEN."
    return in_short(error)
