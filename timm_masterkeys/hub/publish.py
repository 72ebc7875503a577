"""Publishes converted models to the Hugging Face Hub, in one checked commit."""

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]
from torch import nn

from ..conversion.table import table
from ..errors import HubError, MasterKeysError, in_short
from ..files import file_sha256
from ..version import __version__
from .card import CardEntries, read_readme
from .contents import Contents, gather_contents
from .license import require_license
from .save import FILES, previous_section, write_contents

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What ``push_to_hub`` did, or would do.

    Attributes:
        repo_id: ``org/name``.
        revision: The branch, or the pull request's ref.
        sha: The commit that holds the files, to pin as ``hf-hub:org/name@sha``. In a dry run that would change files,
            the commit they would be made on; None if the branch does not exist.
        files: State of each file by name: "new", "changed" or "unchanged".
        sizes: Size of each file by name, in bytes.
        license: Licence of the weights.
        private: Whether the repository is private; None for a new one with the default of its owner.
        committed: Whether a commit was made.
        url: Address of the commit or pull request.
        account: Name of the token's account; empty in a dry run without a token.
    """

    repo_id: str
    revision: str
    sha: str | None
    files: dict[str, str]
    sizes: dict[str, int]
    license: str
    private: bool | None
    committed: bool = False
    url: str = ""
    account: str = ""

    def __str__(self) -> str:
        rows = [(name, state, _in_units(self.sizes[name])) for name, state in self.files.items()]
        holds = self.committed or not _changed(self.files)
        pin = f"@{self.sha}" if self.sha and holds else f", branch {self.revision}" if self.sha else " (new)"
        address = f"hf-hub:{self.repo_id}{pin}"
        outcome = "committed" if self.committed else "no commit made"
        visibility = {True: "private", False: "public", None: "public, unless the owner's repositories are private"}
        account = f"account {self.account}" if self.account else "no account: publishing needs `hf auth login`"
        summary = f"{address}: {outcome}\n{visibility[self.private]}, licence {self.license}\n{account}"
        return f"{table(('file', 'state', 'size'), rows, '<<>')}\n{summary}\n{self.url}".rstrip()


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

    Everything is checked before anything is sent: name, rights, licence, card, and that the saved files load as the
    same model. The commit names its parent, so a repeated call cannot commit twice if an answer is lost. Afterwards the
    remote files are compared with the local ones. Unchanged files make no commit, so the call can be repeated.

    Args:
        model: A converted model made by ``timm.create_model``. Not changed.
        repo_id: ``org/name``; made if missing.
        private: Whether a new repository is private; the owner's default if None.
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
        readme: A README for a repository that has none yet; its hand-written part and metadata are kept.

    Returns:
        A Publication with the commit's sha; ``str()`` lists the files, their sizes, the licence and who can see them.

    Raises:
        ConversionError: Not converted, not a whole timm model, or a licence missing or other than the inherited one.
        HubError: The Hub refused or could not be reached; the message says whether anything was published.

    Example:
        >>> print(push_to_hub(model, "me/convnext_tiny.mk8"))
    """
    check_target(repo_id, revision, create_pr)
    contents = gather_contents(model, license, base_model, config)
    weights_license = require_license(contents.source, contents.cfg)
    entries = CardEntries(repo_id, datasets, tags, metrics)
    branch = revision or "main"
    api = HfApi(token=token, library_name="timm_masterkeys", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as folder:
        directory = Path(folder)
        with _hub_errors(f"Nothing was published to {repo_id}"):
            account = api.whoami()["name"] if not dry_run or token or get_token() else ""
            head = _read_repository(api, repo_id, branch)
            base = head or (_read_repository(api, repo_id, "main") if revision else None)  # a new branch starts at main
            _save(contents, entries, directory, api, base, readme)
            files = _compare_files(directory, base)
            sizes = {name: (directory / name).stat().st_size for name in files}
            sha, is_private = head.sha if head else None, base.private if base else private
            publication = Publication(repo_id, branch, sha, files, sizes, weights_license, is_private, account=account)
            if dry_run or (head and not _changed(files)):
                return publication
            if base is None:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            head = head or _make_branch(api, repo_id, revision)
            publication = replace(publication, repo_id=repo_id, sha=head.sha, private=head.private)
        if _changed(files):  # else the new branch has the same files already
            publication = _commit(api, publication, commit_message, directory, create_pr)
            _logger.info("Published hf-hub:%s@%s", repo_id, publication.sha)
    return publication


def check_target(repo_id: str, revision: str | None, create_pr: bool) -> None:
    """Raises HubError for a target that ``push_to_hub`` refuses."""
    if not re.fullmatch(r"[^/@]+/[^/@]+", repo_id):
        raise HubError(f"Got repo_id '{repo_id}', expected 'org/name', with a user or an organisation.")
    if create_pr and revision:
        raise HubError("create_pr opens a pull request to the default branch; leave revision out.")


def _save(
    contents: Contents, entries: CardEntries, directory: Path, api: HfApi, base: ModelInfo | None, readme: str
) -> None:
    """Saves the model with a card that keeps what the repository's README says; lets the Hub validate the card."""
    remote = {sibling.rfilename for sibling in (base.siblings if base else None) or ()}
    previous = None
    if base and "README.md" in remote:
        readme = read_readme(api.hf_hub_download(entries.repo_id, "README.md", revision=base.sha))
        if "config.json" in remote:
            path = api.hf_hub_download(entries.repo_id, "config.json", revision=base.sha)
            previous = previous_section(Path(path))
    write_contents(contents, directory, entries, readme, previous)
    card = {"repoType": "model", "content": (directory / "README.md").read_text(encoding="utf-8")}
    # ``ModelCard.validate`` of old clients asks huggingface.co, whatever the endpoint is.
    hf_raise_for_status(get_session().post(f"{api.endpoint}/api/validate-yaml", json=card))


def _make_branch(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """The branch of that name, made if it is missing; the default branch if None."""
    branch = revision or "main"
    if revision:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    info = _read_repository(api, repo_id, branch)
    if info is None:
        raise HubError(f"{repo_id} was made, but its branch {branch} cannot be read. Run again.")
    return info


def _commit(api: HfApi, publication: Publication, message: str, directory: Path, create_pr: bool) -> Publication:
    """Commits the files that differ, and returns the publication after a check that the commit holds them.

    The Hub refuses a second commit on the same parent. So if its answer is unclear, one look shows whether the commit
    was made, and it is safe to run again; but a pull request may be opened twice.
    """
    repo_id, branch = publication.repo_id, publication.revision
    with _hub_errors(f"Nothing was committed to {repo_id}"):
        pulls_before = _list_pull_requests(api, repo_id) if create_pr else set()
    operations = [CommitOperationAdd(name, str(directory / name)) for name in _changed(publication.files)]
    target: dict[str, Any] = {"create_pr": True} if create_pr else {"revision": branch}
    try:
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=publication.sha, **target)
        sha, ref = commit.oid, commit.pr_revision or branch
    except Exception as error:
        reason = _in_words(error)
        status = getattr(getattr(error, "response", None), "status_code", 500)
        if isinstance(error, HfHubHTTPError) and status < 500 and status != 429:  # the Hub refused it
            raise HubError(f"Nothing was committed to {repo_id}: {reason}") from None
        unclear = f"No clear answer to the commit to {repo_id} ({reason})"
        with _hub_errors(f"{unclear}. Run again"):
            refs = _list_pull_requests(api, repo_id) - pulls_before if create_pr else {branch}
            infos = [(ref, _read_repository(api, repo_id, ref)) for ref in refs]
            matches = [(info.sha, ref) for ref, info in infos if info and not _changed(_compare_files(directory, info))]
        if not matches:
            advice = "Run again: a commit that was made is found, and not made twice."
            if create_pr:
                advice = "Look at its pull requests before you run again, which opens another one."
            raise HubError(f"{unclear}. {advice}") from None
        sha, ref = str(matches[0][0]), matches[0][1]
    with _hub_errors(f"Commit {sha} was made in {repo_id}, but could not be confirmed"):
        differing = _changed(_compare_files(directory, _read_repository(api, repo_id, sha)))
    if differing:
        raise HubError(f"{repo_id}@{sha} holds other bytes than were sent: {', '.join(differing)}. Run again.")
    page = f"discussions/{ref.rpartition('/')[2]}" if create_pr else f"commit/{sha}"
    return replace(publication, revision=ref, sha=sha, committed=True, url=f"{api.endpoint}/{repo_id}/{page}")


def _read_repository(api: HfApi, repo_id: str, revision: str) -> ModelInfo | None:
    """The commit and the files of a revision; None if the repository or the revision does not exist."""
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _list_pull_requests(api: HfApi, repo_id: str) -> set[str]:
    return {ref.ref for ref in api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []}


def _compare_files(directory: Path, info: ModelInfo | None) -> dict[str, str]:
    """The state of each local file against a revision: new, changed or unchanged, by SHA-256 (LFS) or git blob id."""
    remote = {sibling.rfilename: sibling for sibling in (info.siblings if info else None) or ()}
    states = dict.fromkeys(FILES, "new")
    for name in states.keys() & remote.keys():
        sibling = remote[name]
        if sibling.lfs is not None:
            same = file_sha256(directory / name) == sibling.lfs.sha256
        else:
            data = (directory / name).read_bytes()
            same = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == sibling.blob_id
        states[name] = "unchanged" if same else "changed"
    return states


def _changed(states: Mapping[str, str]) -> list[str]:
    return [name for name, state in states.items() if state != "unchanged"]


@contextmanager
def _hub_errors(outcome: str) -> Iterator[None]:
    """Raises an error of the Hub's client as a HubError that begins with the outcome."""
    try:
        yield
    except MasterKeysError:
        raise
    except Exception as error:
        raise HubError(f"{outcome}: {_in_words(error)}") from None


def _in_units(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _in_words(error: Exception) -> str:
    """The message of an error of the Hub's client, in the user's terms."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set HF_TOKEN."
    if getattr(getattr(error, "response", None), "status_code", 0) == 412:
        return "it was changed by somebody else meanwhile. Run again."
    if "Connect" in type(error).__name__:  # the class depends on the client's version
        return f"the Hub does not answer ({in_short(error)}). Try again online."
    return in_short(error)
