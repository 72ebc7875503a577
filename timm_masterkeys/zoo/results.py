"""The files of a zoo: the figures of each network, the table of all, and the list of names for ``use_weights``."""

import csv
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult
from torch import nn

from ..calibration.agreement import KeyBudget
from ..calibration.calibrate import CalibrationReport
from ..conversion.plan import converted_layers
from ..errors import ZooError
from ..files import atomic_path
from .evaluate import Measurement

TABLE, NAMES = "results.csv", "names.txt"


@dataclass(frozen=True)
class Result:
    """A row of results.csv. The first nine columns are those of timm's results files; accuracies are in percent.

    The columns of a ``Measurement`` are those of the calibrated network.
    """

    model: str  # the ``.mk8`` name of the calibrated network
    top1: float  # to interpolation: see ``Measurement``
    top1_err: float
    top5: float
    top5_err: float
    param_count: float
    img_size: int
    crop_pct: float
    interpolation: str
    dense_top1: float  # of the dense network, with timm's own weights
    dense_top5: float
    uncalibrated_top1: float  # of the converted network before calibration
    uncalibrated_top5: float
    keys: float  # keys per kernel, the mean over all kernels that could be converted; a dense k x k kernel counts k * k
    bank: str
    agreement: float | None  # percentage of the held-out images with the dense network's top class
    divergence: float | None  # Kullback-Leibler divergence from the dense network's outputs in nats, same images
    calibration_images: int  # as the calibration's record counts them
    held_out_images: int  # that agreement and divergence were measured on
    images: int  # labelled images that the accuracies were measured on, and classes: see ``Measurement``
    classes: int
    seconds: float  # for download, conversion, calibration and measurement
    source: str  # the name of the dense network in timm
    repo: str  # its repository on the Hub, published or not
    sha: str = ""  # the commit that published it; empty if it is not published

    def card_entries(self, dataset: str) -> dict[str, Any]:
        """Arguments of ``save_pretrained`` and ``push_to_hub``: accuracies for the card, figures for config.json."""
        top1 = EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_args={name: getattr(self, name) for name in ("images", "classes", "img_size", "crop_pct")},
            metric_type="accuracy",
            metric_name="Top 1 Accuracy",
            metric_value=self.top1,
        )
        top5 = replace(top1, metric_type="top-5-accuracy", metric_name="Top 5 Accuracy", metric_value=self.top5)
        figures = {name: value for name, value in asdict(self).items() if name not in ("seconds", "repo", "sha")}
        evaluation = {"dataset": dataset, **figures}
        return {"metrics": [top1, top5], "config": {"evaluation": evaluation}}


def make_result(
    network: nn.Module,
    report: CalibrationReport | KeyBudget,
    *,
    calibrated: Measurement,
    dense: Measurement,
    uncalibrated: Measurement,
    **columns: Any,
) -> Result:
    """The row of a calibrated network.

    Args:
        network: The network.
        report: Of its calibration.
        calibrated: Its accuracy.
        dense: That of the dense network.
        uncalibrated: That of the converted network before calibration.
        **columns: The columns model, bank, seconds, source and repo.
    """
    record = report.record
    agreement, divergence = (record.after.get(name) for name in ("agreement", "divergence"))
    return Result(
        **asdict(calibrated),
        dense_top1=dense.top1,
        dense_top5=dense.top5,
        uncalibrated_top1=uncalibrated.top1,
        uncalibrated_top5=uncalibrated.top5,
        keys=round(_keys_per_kernel(network, report), 2),
        agreement=None if agreement is None else round(100 * agreement, 2),
        divergence=None if divergence is None else round(divergence, 4),
        calibration_images=record.images,
        held_out_images=record.held_out,
        **columns,
    )


def _keys_per_kernel(network: nn.Module, report: CalibrationReport | KeyBudget) -> float:
    """The mean over all kernels that could be converted, of which only an agreement leaves some dense."""
    if isinstance(report, KeyBudget):
        return report.chosen.keys / sum(report.kernels.values())
    layers = converted_layers(network).values()
    keys = sum(layer.keys_per_kernel * layer.out_channels for layer in layers)
    return keys / sum(layer.out_channels for layer in layers)


def read_result(path: Path) -> Result | None:
    """Reads a row that ``write_result`` wrote; None if there is no file."""
    if not path.is_file():
        return None
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ZooError(f"'{path}' is damaged. Remove it, and the network is made again. ({error})") from None


def write_result(path: Path, result: Result) -> None:
    """Writes the row of a network, atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")


def write_tables(output: Path) -> None:
    """Writes results.csv and names.txt anew from all ``models/NAME/result.json`` of the output folder.

    The table has the best network first, as timm's results files. The names are what ``use_weights`` reads: every
    published network, and ``<arch>.mk8`` for the one with timm's default weights.
    """
    results: list[Result] = []
    for path in output.glob("models/*/result.json"):
        with suppress(ZooError):  # a damaged result is that network's failure
            results += filter(None, [read_result(path)])
    with atomic_path(output / TABLE) as tmp, tmp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in sorted(results, key=lambda r: (-r.top1, r.model)))
    names = {}
    for result in results:
        if result.sha:
            names[result.model] = f"{result.repo}@{result.sha}"
            arch = result.source.partition(".")[0]
            if timm.get_pretrained_cfg(arch) == timm.get_pretrained_cfg(result.source):
                names[f"{arch}.mk8"] = names[result.model]
    with atomic_path(output / NAMES) as tmp:
        lines = sorted(f"{name}={address}\n" for name, address in names.items())
        tmp.write_text("".join(lines), encoding="utf-8")
