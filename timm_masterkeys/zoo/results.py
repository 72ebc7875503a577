"""The files of a zoo: what was measured of each model, the table of all, and the list of names for ``use_weights``."""

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import timm
from huggingface_hub import EvalResult

from ..errors import ZooError
from ..files import atomic_path

TABLE, NAMES = "results.csv", "names.txt"


@dataclass(frozen=True)
class Result:
    """A row of results.csv. The first nine columns are those of timm's results files; accuracies are in percent.

    Attributes:
        model: The ``.mk8`` name of the calibrated network, which the next columns are about.
        top1: Top-1 accuracy.
        top1_err: 100 less that.
        top5: Top-5 accuracy.
        top5_err: 100 less that.
        param_count: Millions of parameters, as timm's validate.py counts them.
        img_size: Width of the images.
        crop_pct: Share of an image's sides that was taken, from its middle.
        interpolation: How the images were resized.
        dense_top1: Top-1 accuracy of the dense network, with timm's own weights.
        dense_top5: Its top-5 accuracy.
        uncalibrated_top1: Top-1 accuracy of the converted network before calibration.
        uncalibrated_top5: Its top-5 accuracy.
        keys: Keys per kernel, the mean over all kernels that could be converted. A k x k kernel that stayed dense, for
            the agreement that was asked for, counts as k * k keys.
        bank: Name of the bank.
        agreement: Percent of the held-out images with the same top class by the calibrated and the dense network.
        divergence: Kullback-Leibler divergence of their outputs in nats, on the same images.
        calibration_images: Images that were used to calibrate, as its record counts them.
        held_out_images: Images that agreement and divergence were measured on.
        images: Labelled images that the accuracies were measured on: all that can be read.
        classes: Classes that these images are of.
        seconds: Time for download, conversion, calibration and measurement.
        source: The name of the dense network in timm.
        repo: Where it is published, or would be.
        sha: The commit it is published in; empty if it is not.
    """

    model: str
    top1: float
    top1_err: float
    top5: float
    top5_err: float
    param_count: float
    img_size: int
    crop_pct: float
    interpolation: str
    dense_top1: float
    dense_top5: float
    uncalibrated_top1: float
    uncalibrated_top5: float
    keys: float
    bank: str
    agreement: float | None
    divergence: float | None
    calibration_images: int
    held_out_images: int
    images: int
    classes: int
    seconds: float
    source: str
    repo: str
    sha: str = ""

    def metrics(self, dataset: str) -> list[EvalResult]:
        """The published network's accuracy for the model-index of its card."""
        return [
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_args={"images": self.images, "classes": self.classes},
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for kind, name, value in (
                ("accuracy", "Top 1 Accuracy", self.top1),
                ("top-5-accuracy", "Top 5 Accuracy", self.top5),
            )
        ]

    def measured(self) -> dict[str, object]:
        """What was measured, for config.json: also of the dense network, and before calibration."""
        return {name: value for name, value in asdict(self).items() if name not in ("seconds", "repo", "sha")}


def read_result(path: Path) -> Result | None:
    """Reads what ``write_result`` wrote; None if there is nothing."""
    if not path.is_file():
        return None
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ZooError(f"'{path}' is damaged. Remove it, and the network is made again. ({error})") from None


def write_result(path: Path, result: Result) -> None:
    """Writes what was measured of a model; whole or not at all."""
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")


def write_table(path: Path, results: Iterable[Result]) -> None:
    """Writes results.csv, the best first as in timm's results files."""
    with atomic_path(path) as tmp, tmp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in sorted(results, key=lambda r: (-r.top1, r.model)))


def write_names(path: Path, results: Iterable[Result]) -> None:
    """Writes the list that ``use_weights`` reads: every published network, and ``<arch>.mk8`` for timm's default."""
    lines = []
    for result in results:
        if result.sha:
            arch = result.source.partition(".")[0]
            names = {result.model}
            if timm.get_pretrained_cfg(arch) == timm.get_pretrained_cfg(result.source):
                names.add(f"{arch}.mk8")
            lines += [f"{name}={result.repo}@{result.sha}" for name in names]
    with atomic_path(path) as tmp:
        tmp.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")
