"""The files of a zoo: the figures of each network, the table of all, and the list of names for ``use_weights``."""

import csv
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult
from torch import nn

from ..conversion.plan import ConversionPlan, converted_layers
from ..conversion.record import read_record
from ..errors import ZooError
from ..files import atomic_path
from .evaluate import Measurement

TABLE, NAMES = "results.csv", "names.txt"


@dataclass(frozen=True)
class Result:
    """A row of results.csv. The first nine columns are those of timm's results files; accuracies are in percent."""

    model: str  # the ``.mk8`` name of the calibrated network, to which the next columns belong
    top1: float
    top1_err: float  # 100 less top1
    top5: float
    top5_err: float
    param_count: float  # millions of parameters, as timm's validate.py counts them
    img_size: int  # width of the images
    crop_pct: float  # share of an image's sides that was taken, from its middle
    interpolation: str  # how the images were resized
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
    images: int  # labelled images that the accuracies were measured on: all that can be read
    classes: int  # number of classes among these images
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
        return {"repo_id": self.repo, "metrics": [top1, top5], "config": {"evaluation": evaluation}}


def timm_columns(name: str, model: nn.Module, measured: Measurement) -> dict[str, Any]:
    """The columns of timm's results files, for the first network in ``measured``."""
    top1, top5 = measured.top1[0], measured.top5[0]
    return {
        "model": name,
        "top1": top1,
        "top1_err": round(100 - top1, 4),
        "top5": top5,
        "top5_err": round(100 - top5, 4),
        "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        "img_size": measured.img_size,
        "crop_pct": measured.crop_pct,
        "interpolation": measured.interpolation,
    }


def make_result(
    name: str, calibrated: nn.Module, plan: ConversionPlan, measured: Measurement, **columns: Any
) -> Result:
    """The row of a calibrated network.

    Args:
        name: Its ``.mk8`` name.
        calibrated: The network.
        plan: Of its conversion.
        measured: The accuracies of the calibrated, the dense and the uncalibrated network, in this order.
        **columns: The columns seconds, source and repo.
    """
    record = read_record(calibrated).calibration
    assert record is not None
    agreement, divergence = (record.after.get(name) for name in ("agreement", "divergence"))
    kernels = {layer.name: layer.out_channels for layer in plan.converted}
    keys = {layer.name: math.prod(layer.kernel_size) for layer in plan.converted}  # of a kernel, if it stays dense
    keys |= {name: layer.keys_per_kernel for name, layer in converted_layers(calibrated).items()}
    return Result(
        **timm_columns(name, calibrated, measured),
        dense_top1=measured.top1[1],
        dense_top5=measured.top5[1],
        uncalibrated_top1=measured.top1[2],
        uncalibrated_top5=measured.top5[2],
        keys=round(sum(keys[name] * count for name, count in kernels.items()) / sum(kernels.values()), 2),
        bank=plan.config.bank.name,
        agreement=None if agreement is None else round(100 * agreement, 2),
        divergence=None if divergence is None else round(divergence, 4),
        calibration_images=record.images,
        held_out_images=record.held_out,
        images=measured.images,
        classes=measured.classes,
        **columns,
    )


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
