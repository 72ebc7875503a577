"""Saves converted models for timm and publishes them to the Hugging Face Hub."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, EvalResult, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]
from timm.models import save_for_hf
from torch import nn

from ..errors import ConversionError, HubError, MasterKeysError
from ..files import atomic_path, file_sha256, os_errors
from ..layers import MasterKeyConv2d
from ..models import _timm
from ..models.checkpoint import COMPACT_NAME, DENSE_NAME, FORMAT_VERSION, save_compact
from ..models.provenance import SOURCE_NOTE, TAG, is_known, is_masterkeys_tag
from ..models.report import conversion_report
from ..models.surgery import fuse_masterkeys, unwrapped
from ..repair.calibrate import evaluating
from ..version import __version__
from .card import inherited_license, make_card, read_readme

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

# What config.json says by itself; the rest (label names, entries of one's own) can be added.
OWN_ENTRIES = (
    "architecture",
    "num_classes",
    "num_features",
    "global_pool",
    "model_args",
    "pretrained_cfg",
    "masterkeys",
)

_SCRATCH, _UNKNOWN = "scratch", "weights of unknown origin"  # as sources: nobody else's weights, and anybody's
_FILES = (DENSE_NAME, COMPACT_NAME, "README.md", "config.json")  # config.json last: without it nothing loads
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


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] = (),
    tags: str | Sequence[str] = (),
    metrics: Sequence[EvalResult] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Saves a converted timm model: dense and compact safetensors, config.json and a model card.

    The dense weights load in stock timm under the stock architecture; with this package imported,
    ``timm.create_model("local-dir:DIR", pretrained=True)`` gives the converted model back bit for bit: this is tried
    before a file there is touched. Nothing is pickled. DataParallel, DistributedDataParallel, torch.compile and EMA
    wrappers are taken off.

    Args:
        model: A converted model made by ``timm.create_model``. Not changed.
        directory: Made if missing. Files of other names in it stay, and so does what a README there says elsewhere.
        repo_id: ``org/name`` for the card's examples; the directory's name if None.
        license: For the card, if the source weights' licence is unknown: it is inherited where timm loaded the weights
            of the model's cfg, also if the model was trained since; with a checkpoint of your own you say it.
        base_model: Hub id of the source weights; that of the model's cfg if None.
        datasets: Hub ids of training data, for the card.
        tags: More tags for the card.
        metrics: Measured results for the card's model-index.
        config: More top-level entries for config.json, such as ``label_names`` and ``label_descriptions``.

    Returns:
        The directory.

    Raises:
        ConversionError: Not converted, not a model that timm could load again (a head replaced by hand, NaN), a licence
            other than the inherited one, or a README there that cannot be read. Nothing was written.
        OSError: The directory cannot be written, or the disk is full. Each file there is then whole, old or new.

    Example:
        >>> save_pretrained(model, "out")
        >>> model = timm.create_model("local-dir:out", pretrained=True)
    """
    model = unwrapped(model)
    cfg = _timm_cfg(model)
    _check_config_entries(config or {})
    report = conversion_report(model)
    license = inherited_license(cfg, license) if cfg.get("license") or license else None
    cfg = {**cfg, "tag": _masterkeys_tag(cfg.get("tag")), "license": license, "notes": _noted(cfg, base_model)}
    base_model = base_model or _base_model(cfg)
    dense: Any = fuse_masterkeys(model).to(memory_format=torch.contiguous_format)
    dense.pretrained_cfg = cfg
    args = _timm.model_args(dense)  # the compact file has the settings; a bank need not fit in JSON
    for name in [name for name in args if name.startswith("mk_")]:
        del args[name]
    directory = Path(directory)
    existing = read_readme(directory / "README.md")
    with _saving(directory) as tmp:
        # The file name is pinned: without it timm takes a pickle if the Hub does not answer for the safetensors.
        extra = {"pretrained_cfg": {"hf_hub_filename": DENSE_NAME}, "masterkeys": _about(model, cfg, base_model)}
        with os_errors():
            save_for_hf(dense, str(tmp), model_config={**(config or {}), **extra}, safe_serialization=True)
        save_compact(model, tmp / COMPACT_NAME)
        saved = json.loads((tmp / "config.json").read_text())
        saved["masterkeys"]["sha256"] = {name: file_sha256(tmp / name) for name in (DENSE_NAME, COMPACT_NAME)}
        (tmp / "config.json").write_text(json.dumps(saved, indent=2))
        _check_reload(model, tmp)
        card = make_card(
            saved,
            report,
            repo_id or directory.resolve().name,
            license=license,
            base_model=base_model,
            datasets=datasets,
            tags=tags,
            metrics=metrics,
            existing=existing,
        )
        (tmp / "README.md").write_text(str(card), encoding="utf-8")
        for name in _FILES:
            with atomic_path(directory / name) as target:
                (tmp / name).replace(target)
    return directory


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
        license: Needed if the source weights' licence is unknown (see ``save_pretrained``).
        base_model: Hub id of the source weights; that of the model's cfg if None.
        datasets: Hub ids of training data, for the card.
        tags: More tags for the card.
        metrics: Measured results for the card's model-index.
        config: More top-level entries for config.json, such as ``label_names``.
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
    inherited_license(_timm_cfg(model), license)
    if create_pr and revision:
        raise HubError("create_pr opens a pull request to the default branch; leave revision out.")
    branch = revision or "main"
    api = HfApi(token=token, library_name="timm_masterkeys", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as folder:
        directory = Path(folder)
        with _telling(f"Nothing was published to {repo_id}"):
            account = api.whoami()["name"] if not dry_run or token or get_token() else ""
            info = _remote(api, repo_id, branch)
            default = info or (_remote(api, repo_id, "main") if revision else None)
            if default and any(sibling.rfilename == "README.md" for sibling in default.siblings or ()):
                readme = read_readme(api.hf_hub_download(repo_id, "README.md", revision=default.sha))
            (directory / "README.md").write_text(readme, encoding="utf-8")
            save_pretrained(
                model,
                directory,
                repo_id=repo_id,
                license=license,
                base_model=base_model,
                datasets=datasets,
                tags=tags,
                metrics=metrics,
                config=config,
            )
            _check_card(api, directory / "README.md")
            files = _compare(directory, info or default)
            changed = [name for name, state in files.items() if state != "unchanged"]
            if dry_run or (info and not changed):
                sha = info.sha if info else None
                return Publication(repo_id, branch, sha, files, committed=False, account=account)
            if default is None:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if info is None and revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            info = info or _remote(api, repo_id, branch)
            if info is None:
                raise HubError(f"{repo_id} was made, but branch {branch} cannot be read. Run again.")
            if not changed:  # a new branch of a repository that has these very files
                return Publication(repo_id, branch, info.sha, files, committed=False, account=account)
            files = _compare(directory, info)
            operations = [
                CommitOperationAdd(name, str(directory / name)) for name, s in files.items() if s != "unchanged"
            ]
        sha, url, ref = _commit(api, repo_id, branch, create_pr, commit_message, operations, info.sha, directory)
        with _telling(f"Commit {sha} was made in {repo_id}, but could not be confirmed"):
            remote = _remote(api, repo_id, sha)
            differing = [n for n, state in _compare(directory, remote).items() if state != "unchanged"]
            if differing:
                raise HubError(
                    f"{repo_id}@{sha} holds other bytes than were sent: {', '.join(differing)}. Publish again."
                )
    _logger.info("Published hf-hub:%s@%s", repo_id, sha)
    return Publication(repo_id, ref, sha, files, committed=True, url=url, account=account)


def _check_card(api: HfApi, path: Path) -> None:
    """Has the Hub check a card's metadata. (``ModelCard.validate`` of old clients asks huggingface.co always.)"""
    card = {"repoType": "model", "content": path.read_text(encoding="utf-8")}
    hf_raise_for_status(get_session().post(f"{api.endpoint}/api/validate-yaml", json=card))


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
                refs = _pulls(api, repo_id) if create_pr else {branch}
                for ref in refs - pulls:
                    info = _remote(api, repo_id, ref)
                    if info and info.sha and info.sha != parent:
                        if all(state == "unchanged" for state in _compare(directory, info).values()):
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
    for name in _FILES:
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


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[Path]:
    """A temporary folder in the directory, which is made if missing and taken away again if nothing comes of it.

    Those that killed saves have left are removed. Who is saving holds a shared lock on the directory, so that nobody
    else gets the exclusive one and takes the folder of a living save for a left one.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            if fcntl:
                lock = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, lock)
                with contextlib.suppress(OSError):  # somebody else is saving, or a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for left in directory.glob(".saving-*"):
                        shutil.rmtree(left, ignore_errors=True)
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_SH)
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix=".saving-")))
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                directory.rmdir()
        raise


def _check_config_entries(config: Mapping[str, Any]) -> None:
    own = [name for name in config if name in OWN_ENTRIES]
    if own:
        raise ConversionError(f"config holds {', '.join(own)}, which the model says by itself. Leave it out.")
    try:
        json.dumps(dict(config))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config cannot be written as JSON: {error}.") from None


def _check_reload(model: nn.Module, directory: Path) -> None:
    """Raises unless timm loads the saved files as the very same model."""
    given = model.state_dict()
    for name, value in given.items():
        if not value.isfinite().all():
            raise ConversionError(f"{name} holds NaN or Inf; repair the model first.")
    try:
        with torch.random.fork_rng(devices=[]):
            again = timm.create_model(f"local-dir:{directory}", pretrained=True)
    except OSError:
        raise
    except Exception as error:  # whatever timm makes of files of another structure
        raise ConversionError(
            f"What would be saved does not load again: {_told(error)} {_STRUCTURE} (Of an architecture of your own, "
            "call register_names with its name.)"
        ) from error
    saved = {name: value.cpu() for name, value in again.state_dict().items()}
    differing = sorted(saved.keys() ^ given.keys()) or [
        name for name, value in given.items() if not _same(saved[name], value.cpu())
    ]
    if differing:
        raise ConversionError(
            f"What would be saved does not load as the same model: {', '.join(differing[:3])} differ. {_STRUCTURE}"
        )
    if not _same_outputs(model, again):
        raise ConversionError(f"What would be saved loads with the same weights, but other outputs. {_STRUCTURE}")


@torch.no_grad()
def _same_outputs(model: nn.Module, again: nn.Module) -> bool:
    """Whether both put out the same for an image, as they do not with an activation replaced by hand."""
    first = next(model.parameters())
    if first.dtype != torch.float32 or first.is_meta:
        return True
    cfg: Any = model.pretrained_cfg
    image = torch.rand(1, *cfg["input_size"], generator=torch.Generator().manual_seed(0), device="cpu").to(first.device)
    with evaluating(model, again):
        try:
            out, back = model(image), again.to(first.device)(image)
        except Exception:  # it takes other images than its cfg says
            return True
    return not isinstance(out, torch.Tensor) or torch.allclose(out, back, rtol=1e-3, atol=1e-4)


_STRUCTURE = "Is the model's structure as timm.create_model made it?"


def _same(saved: torch.Tensor, given: torch.Tensor) -> bool:
    """Equal, up to the rounding to the dtype of either."""
    return saved.shape == given.shape and (
        torch.equal(saved.to(given.dtype), given) or torch.equal(saved, given.to(saved.dtype))
    )


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
    text = getattr(error, "server_message", None) or str(error)
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and "http" not in line and "Request ID" not in line
    ]
    return " ".join(lines[:3])[:300] or type(error).__name__


def _timm_cfg(model: nn.Module) -> dict[str, Any]:
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture") or not hasattr(model, "num_classes"):
        raise ConversionError(
            f"{type(model).__name__} is not a whole timm model (no pretrained_cfg), so timm could not load it again. "
            "Save its state_dict instead."
        )
    layers = [module for module in model.modules() if isinstance(module, MasterKeyConv2d)]
    if not layers or is_known(model):
        return dict(cfg)
    drawn = all(not layer.r2.is_meta and bool((layer.r2 < 0).all()) for layer in layers)
    notes = tuple(note for note in cfg.get("notes") or () if not note.startswith(SOURCE_NOTE))
    cfg = {key: value for key, value in cfg.items() if key not in ("license", "hf_hub_id", "url", "origin_url", "tag")}
    return {**cfg, "notes": (*notes, f"{SOURCE_NOTE}{_SCRATCH if drawn else _UNKNOWN}")}


def _masterkeys_tag(tag: str | None) -> str:
    return (f"{TAG}_{tag}" if tag else TAG) if not is_masterkeys_tag(tag) else str(tag)


def _noted(cfg: Mapping[str, Any], base_model: str | None) -> tuple[str, ...]:
    """The cfg's notes, with where the converted weights came from; kept when a published model is published again."""
    notes = tuple(cfg.get("notes") or ())
    if base_model:
        notes = tuple(f"{SOURCE_NOTE}{base_model}" if n == f"{SOURCE_NOTE}{_UNKNOWN}" else n for n in notes)
    if any(note.startswith(SOURCE_NOTE) for note in notes):
        return notes
    name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
    return (*notes, f"{SOURCE_NOTE}{cfg.get('hf_hub_id') or name}")


def _base_model(cfg: Mapping[str, Any]) -> str | None:
    sources = [note.removeprefix(SOURCE_NOTE) for note in cfg["notes"] if note.startswith(SOURCE_NOTE)]
    return sources[0].partition("@")[0] if sources and "/" in sources[0] else None


def _about(model: nn.Module, cfg: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The ``masterkeys`` section of config.json."""
    layers = [module for module in model.modules() if isinstance(module, MasterKeyConv2d)]
    report = conversion_report(model)
    revision = next((note for note in cfg["notes"] if note.startswith(SOURCE_NOTE)), "").partition("@")[2]
    return {
        "format_version": FORMAT_VERSION,
        "banks": {layer.bank.name: layer.bank.digest for layer in layers},
        "keys_per_kernel": max(layer.keys_per_kernel for layer in layers),
        "trainable": layers[0].trainable,
        "layers": len(layers),
        "kernels": report.total.channels,
        "mean_r2": None if math.isnan(report.total.mean_r2) else round(report.total.mean_r2, 4),
        "source": base_model,
        "source_revision": revision or None,
        "versions": {"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
