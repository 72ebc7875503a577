"""A zoo: many timm networks converted, repaired, measured and published, by one process or several, in one run or more.

All that is known lies in the output folder, in files that appear whole: ``models/NAME/result.json`` once a network is
measured and saved (``weights`` beside it), its ``sha`` once it is published. So a run goes on where the last one ended,
however that was. Whoever works on a network holds a lock on it, which ends with the process.
"""

import copy
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock, Timeout
from huggingface_hub import get_token
from torch import nn

from ..errors import ZooError
from ..files import atomic_path
from ..hub.card import inherited_license
from ..hub.publish import push_to_hub
from ..hub.save import save_pretrained
from ..keys.banks import DEFAULT_BANK, get_bank
from ..layers import MasterKeyConv2d
from ..models.provenance import TAG, is_masterkeys_tag
from ..models.surgery import convert_to_masterkeys
from ..names.registry import list_architectures
from ..repair.budget import convert_to_agreement
from ..repair.calibrate import calibrate_masterkeys
from ..repair.images import BUILTIN, photographs_sha256
from ..version import __version__
from .evaluate import Labels, Measurement, measure
from .results import NAMES, TABLE, Result, read_result, write_names, write_result, write_table

SETTINGS = "zoo.json"


@dataclass(frozen=True)
class Zoo:
    """What is to be made of every network, and where.

    Attributes:
        org: User or organisation on the Hub; a network is published as ``org/<arch>.mk8_<tag>``.
        labels: Images to measure with, from ``find_labels``.
        output: Folder to work in, and for the results.
        images: Images to repair with: a folder, or "builtin".
        conversion: Arguments of ``convert_to_masterkeys``, or with ``agreement`` of ``convert_to_agreement``.
        dataset: What the cards call the images that were measured with; the folder's name if empty.
        license: For weights whose licence timm does not know; those without any are not made.
        private: New repositories are private.
        dry_run: Everything but publishing: the Hub is asked, nothing is changed there.
        keep_weights: Keep what was downloaded, in timm's usual cache, and the saved networks.
        batch_size: Images at a time when measuring.
        workers: Processes that read images.
        device: Where to work.
    """

    org: str
    labels: Labels
    output: Path
    images: str = BUILTIN
    conversion: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""
    license: str | None = None
    private: bool | None = None
    dry_run: bool = False
    keep_weights: bool = False
    batch_size: int = 64
    workers: int = 4
    device: str = "cpu"

    def folder(self, name: str) -> Path:
        """Where all is that belongs to a timm name."""
        return self.output / "models" / name

    def settings(self) -> dict[str, Any]:
        """What must not differ within one table."""
        bank = get_bank(self.conversion.get("bank", DEFAULT_BANK))
        return {
            "org": self.org,
            "images": photographs_sha256() if self.images == BUILTIN else _listing_sha256(Path(self.images)),
            "labels": self.labels.sha256,
            "conversion": {**self.conversion, "bank": bank.digest},
            "versions": {"timm_masterkeys": __version__, "timm": timm.__version__},
        }


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Attributes:
        name: timm's name of the dense one.
        result: What was measured; None if it was not.
        error: What went wrong in this run, in a line; empty if nothing.
        fresh: Whether it was done now, by this process.
    """

    name: str
    result: Result | None
    error: str = ""
    fresh: bool = True

    def __str__(self) -> str:
        told = [self.name]
        if self.result:
            r = self.result
            told.append(f"top-1 dense {r.dense_top1:.2f}, plain {r.plain_top1:.2f}, repaired {r.top1:.2f}")
            told.append(f"hf-hub:{r.repo}@{r.sha}" if r.sha else "not published")
        if self.error:
            told.append(f"FAILED: {self.error}")
        return "  ".join(told)


def plan_zoo(patterns: Sequence[str], num_classes: int) -> tuple[list[str], dict[str, str]]:
    """The timm networks with weights and depthwise convolutions that match, and those left out, each with the reason.

    Args:
        patterns: As ``timm.list_models`` takes them.
        num_classes: Of the labels: networks with other classes cannot be measured.

    Raises:
        ZooError: None that could be made.
    """
    convertible = set(list_architectures())
    names, left = [], {}
    for name in timm.list_models(list(patterns), pretrained=True):
        arch, _, tag = name.partition(".")
        cfg: Any = timm.get_pretrained_cfg(name)
        if is_masterkeys_tag(tag):
            continue
        if arch not in convertible:
            left[name] = "no depthwise convolutions"
        elif cfg.num_classes != num_classes:
            left[name] = f"{cfg.num_classes} classes, the labels are of {num_classes}"
        else:
            names.append(name)
    if not names:
        why = "".join(f" {name}: {reason}." for name, reason in list(left.items())[:3])
        raise ZooError(f"No timm network with weights to make of {', '.join(patterns)}; see timm.list_models.{why}")
    return names, left


def make_zoo(names: Sequence[str], zoo: Zoo) -> Iterator[Outcome]:
    """Makes every network that is not made yet, and tells of each when it is done or has failed.

    Several processes may do this at once, in one output folder: RANK and WORLD_SIZE, as of torchrun, say with which
    networks each begins, and whoever is done helps the others. Each ends when all networks are done, and tells of all.
    results.csv and names.txt are up to date after each.

    Args:
        names: From ``plan_zoo``.
        zoo: What to do.

    Raises:
        ZooError: The output folder is of a zoo with other settings, or there is no token. Nothing was done.
    """
    started = time.time()
    _open(zoo)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    pending = [*names[rank::world], *(name for i, name in enumerate(names) if i % world != rank)]
    for wait in (False, True):  # what others are at comes last: either they finish it, or they were killed
        for name in pending.copy():
            with _lock(zoo.output / f".{name}.lock", wait) as held:
                if not held:
                    continue
                outcome = _one(name, zoo, started)
                pending.remove(name)
            _write_tables(zoo.output)
            yield outcome


def _open(zoo: Zoo) -> None:
    """Notes the settings in a new output folder; raises if it has others."""
    path, settings = zoo.output / SETTINGS, json.loads(json.dumps(zoo.settings()))
    (zoo.output / "models").mkdir(parents=True, exist_ok=True)
    with _lock(zoo.output / ".zoo.lock"):
        if not path.exists():
            with atomic_path(path) as tmp:
                tmp.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        noted = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in settings if noted.get(name) != settings[name]]
    if differing:
        raise ZooError(
            f"'{zoo.output}' holds a zoo with other settings ({', '.join(differing)}), see {SETTINGS} there: their "
            "results do not belong in one table. Give the same settings, or another output folder."
        )
    if not zoo.dry_run and not get_token():
        raise ZooError(
            "There is no token to publish with. Log in with `hf auth login`, set HF_TOKEN, or try a dry run."
        )


def _listing_sha256(folder: Path) -> str:
    """Of the names and sizes of all files: that of the contents would take too long."""
    if not folder.is_dir():
        raise ZooError(f"There is no folder '{folder}' of images to repair with.")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


@contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the lock was had, which goes with the process."""
    try:
        with FileLock(path, timeout=-1 if wait else 0):
            yield True
    except Timeout:
        yield False


def _one(name: str, zoo: Zoo, started: float) -> Outcome:
    """Makes and publishes a network as far as that is not done. Only here whatever goes wrong is caught."""
    folder, failure = zoo.folder(name), zoo.folder(name) / "failure.txt"
    folder.mkdir(exist_ok=True)
    result = None
    try:
        result = read_result(folder / "result.json")
        if result and (result.sha or zoo.dry_run):
            return Outcome(name, result, fresh=False)
        if failure.exists() and failure.stat().st_mtime >= started:  # another process has just tried
            return Outcome(name, result, failure.read_text(encoding="utf-8").partition("\n")[0], fresh=False)
        if result is None or not (folder / "weights").is_dir():
            result = _make(name, zoo)
        result = _publish(name, result, zoo)
        failure.unlink(missing_ok=True)
        return Outcome(name, result)
    except Exception as error:
        told = " ".join(str(error).split())[:300] or type(error).__name__
        with atomic_path(failure) as tmp:
            tmp.write_text(f"{told}\n\n{traceback.format_exc()}", encoding="utf-8")
        return Outcome(name, result, told)
    finally:
        if not zoo.keep_weights:
            for done in ("download", "weights") if result and result.sha else ("download",):
                shutil.rmtree(folder / done, ignore_errors=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _make(name: str, zoo: Zoo) -> Result:
    """Downloads, converts, repairs, measures and saves a network."""
    start, folder = time.perf_counter(), zoo.folder(name)
    license = _license(name, zoo)
    cache = None if zoo.keep_weights else folder / "download"
    dense = timm.create_model(name, pretrained=True, cache_dir=cache).eval().to(zoo.device)
    plain, repaired, repair = _converted(dense, zoo)
    measured = measure(
        [repaired, dense, plain], zoo.labels, batch_size=zoo.batch_size, workers=zoo.workers, device=zoo.device
    )
    own = _own_name(name)
    result = Result(
        **timm_columns(own, repaired, measured),
        dense_top1=measured.accuracies[1].top1,
        dense_top5=measured.accuracies[1].top5,
        plain_top1=measured.accuracies[2].top1,
        plain_top5=measured.accuracies[2].top5,
        **repair,
        images=zoo.labels.images,
        classes=zoo.labels.classes,
        seconds=round(time.perf_counter() - start, 1),
        source=name,
        repo=f"{zoo.org}/{own}",
    )
    save_pretrained(repaired.cpu(), folder / "weights", license=license, **_about(result, zoo))
    write_result(folder / "result.json", result)
    return result


def _converted(dense: nn.Module, zoo: Zoo) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A network converted only, the same repaired, and what the repair says in our columns."""
    conversion = dict(zoo.conversion)
    bank, agreement = get_bank(conversion.pop("bank", DEFAULT_BANK)), conversion.pop("agreement", None)
    if agreement is None:
        plain = convert_to_masterkeys(dense, bank, **conversion)
        repaired = copy.deepcopy(plain)
        report = calibrate_masterkeys(repaired, dense, zoo.images)
        layers = [module for module in plain.modules() if isinstance(module, MasterKeyConv2d)]
        kernels = sum(layer.out_channels for layer in layers)
        keys = sum(layer.keys_per_kernel * layer.out_channels for layer in layers)
        agreed, divergence, images = report.agreement[1], report.divergence[1], report.images
    else:
        repaired, budget = convert_to_agreement(dense, agreement, zoo.images, bank=bank, **conversion)
        plain = copy.deepcopy(dense)
        for name, count in budget.chosen.keys_per_kernel.items():
            if count:
                convert_to_masterkeys(plain, bank, include=name, keys_per_kernel=count, inplace=True)
        kernels, keys = sum(budget.kernels.values()), budget.chosen.keys
        agreed, divergence = budget.chosen.agreement, budget.chosen.divergence
        images = budget.images + budget.held_out
    columns = {"keys": round(keys / kernels, 2), "bank": bank.name, "agreement": round(100 * agreed, 2)}
    return plain, repaired, {**columns, "divergence": round(divergence, 4), "repair_images": images}


def _publish(name: str, result: Result, zoo: Zoo) -> Result:
    """Publishes what ``_make`` saved, and notes the commit."""
    folder = zoo.folder(name)
    model = timm.create_model(f"local-dir:{folder / 'weights'}", pretrained=True)
    done = push_to_hub(
        model,
        private=zoo.private,
        dry_run=zoo.dry_run,
        commit_message=f"Publish {result.model}",
        **_about(result, zoo),
    )
    if zoo.dry_run:
        return result
    result = replace(result, sha=done.sha or "")
    write_result(folder / "result.json", result)
    return result


def _about(result: Result, zoo: Zoo) -> dict[str, Any]:
    """What card and config.json say of the measurement, the same when saved and when published."""
    dataset = zoo.dataset or zoo.labels.folder.name
    evaluation = {"dataset": dataset, **result.measured()}
    return {"repo_id": result.repo, "metrics": result.metrics(dataset), "config": {"evaluation": evaluation}}


def _own_name(name: str) -> str:
    arch, _, tag = name.partition(".")
    return f"{arch}.{TAG}_{tag}" if tag else f"{arch}.{TAG}"


def _license(name: str, zoo: Zoo) -> str:
    """The licence of a network; raises without one, before any work is done."""
    cfg: Any = timm.get_pretrained_cfg(name)
    return inherited_license({"license": cfg.license}, None if cfg.license else zoo.license)


def timm_columns(own: str, model: nn.Module, measured: Measurement) -> dict[str, Any]:
    """The columns of timm's results files."""
    best = measured.accuracies[0]
    return {
        "model": own,
        "top1": best.top1,
        "top1_err": round(100 - best.top1, 4),
        "top5": best.top5,
        "top5_err": round(100 - best.top5, 4),
        "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        "img_size": measured.img_size,
        "crop_pct": measured.crop_pct,
        "interpolation": measured.interpolation,
    }


def _write_tables(output: Path) -> None:
    """Writes results.csv and names.txt anew from the networks' own files."""
    with _lock(output / ".zoo.lock"):
        results: list[Result] = []
        for path in sorted((output / "models").glob("*/result.json")):
            with suppress(ZooError):  # told as the network's own failure
                results += filter(None, [read_result(path)])
        write_table(output / TABLE, results)
        write_names(output / NAMES, results)
