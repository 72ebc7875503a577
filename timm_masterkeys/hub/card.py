"""The model card of a published model: description, loading, preprocessing, fit, licence and citations."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..conversion.record import Source
from ..conversion.report import ConversionReport
from ..conversion.table import number
from ..errors import ConversionError
from .contents import Contents
from .license import HUB_LICENSES
from .weights import FUSED_NAME, SECTION

_BEGIN, _END = "<!-- timm_masterkeys: begin (rewritten at every publication) -->", "<!-- timm_masterkeys: end -->"

_CITATIONS = """```bibtex
@inproceedings{babaiee2025quest,
  title={The Quest for Universal Master Key Filters in DS-CNNs},
  author={Babaiee, Zahra and Kiasari, Peyman and Rus, Daniela and Grosu, Radu},
  booktitle={NeurIPS}, year={2025}, note={arXiv:2509.11711}
}
@article{lindeberg2026modelling,
  title={Modelling and analysis of the 8 filters from the master key filters hypothesis},
  author={Lindeberg, Tony and Babaiee, Zahra and Kiasari, Peyman},
  journal={Journal of Mathematical Imaging and Vision}, volume={68}, number={3}, year={2026}, note={arXiv:2509.12746}
}
@misc{rw2019timm,
  title={PyTorch Image Models}, author={Wightman, Ross}, year={2019},
  howpublished={github.com/huggingface/pytorch-image-models}
}
```"""

_UNMEASURED = """\
**Not calibrated: unless it was trained since its conversion, this network is of little use as it is.** Nothing has
measured what the conversion does to its accuracy. Calibrate it, or fine-tune it, before use.

"""

_LOADING = """## Load it

With the plug-in: the keys frozen, bit for bit as published.

```python
import timm, timm_masterkeys

model = timm.create_model("{address}", pretrained=True)
```

Without it: the same outputs, ordinary convolutions.

```python
import timm

model = timm.create_model("{address}", pretrained=True)
```"""


@dataclass(frozen=True)
class CardEntries:
    """What a user says of a model for its card."""

    repo_id: str  # appears in the examples; the name of a folder, if it has no "/"
    datasets: str | Sequence[str] = ()  # these three are as for ``save_pretrained``
    tags: str | Sequence[str] = ()
    metrics: Sequence[EvalResult] = ()


def make_card(
    contents: Contents,
    config_json: Mapping[str, Any],
    entries: CardEntries,
    existing: str,
    previous: Mapping[str, Any] | None,
) -> ModelCard:
    """The card of a converted model.

    It begins with a warning if no results are listed and the model was not calibrated.

    Args:
        contents: What is saved of the model.
        config_json: The saved config.json.
        entries: What the user says of the model.
        existing: The text of the README to replace. The text outside this package's marks is kept, and the metadata,
            but for what they say of other weights: results, licence and base model.
        previous: The section ``masterkeys`` of the config.json beside it: empty if there is none in it, None if there
            is no config.json. It tells which metadata are of other weights.

    Raises:
        ConversionError: The metadata or the marks of the README cannot be read.
    """
    before, after, fields = _hand_written(existing)
    source, name = contents.source, entries.repo_id.rpartition("/")[2]
    license, base_model = source.license, _base_model(source)
    for outdated in _outdated(fields, previous, source, config_json[SECTION]["files"][FUSED_NAME]):
        fields.pop(outdated, None)
    on_hub = license in HUB_LICENSES
    task = "image-classification" if config_json["num_classes"] else "image-feature-extraction"
    generated: dict[str, Any] = {
        "license": license if on_hub else "other" if license else None,
        "license_name": None if on_hub else license,
        "license_link": f"https://huggingface.co/{base_model}" if license and base_model and not on_hub else None,
        "library_name": "timm",
        "pipeline_tag": task,
        "base_model": base_model,
        "base_model_relation": "finetune" if base_model else None,
    }
    merged = {**fields, **{key: value for key, value in generated.items() if value is not None}}
    for key, values in (
        ("tags", (task, "timm", "master-key-filters", *_as_list(entries.tags))),
        ("datasets", _as_list(entries.datasets)),
    ):
        merged[key] = [*values, *(value for value in _as_list(fields.get(key)) if value not in values)] or None
    if metrics := entries.metrics:
        merged["model_name"] = name
        _, results = model_index_to_eval_results(merged.pop("model-index", [{"name": name, "results": []}]))
        others = [old for old in results if not any(old.is_equal_except_value(new) for new in metrics)]
        merged["eval_results"] = [*metrics, *others]
    data = ModelCardData(**merged)
    warn = not contents.is_usable and "model-index" not in data.to_dict()
    body = _body(config_json, contents.report, entries.repo_id, source, warn)
    title = "" if before or after else f"# {name}\n\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{before}{title}{_BEGIN}\n{body}\n{_END}\n{after}")


def read_readme(path: str | os.PathLike[str]) -> str:
    """The text of a README, "" if the file does not exist; ConversionError if it is not UTF-8."""
    if not os.path.isfile(path):
        return ""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL")
    except ValueError as error:  # includes UnicodeDecodeError
        raise ConversionError(f"'{path}' is not UTF-8 ({error}). Save it as UTF-8, or move it away.") from None
    return text


def _hand_written(existing: str) -> tuple[str, str, dict[str, Any]]:
    """The text of a README before this package's marks, the text after them, and the metadata."""
    existing = existing.removeprefix("\ufeff")
    if not existing.strip():
        return "", "", {}
    try:
        card = ModelCard(existing)
    except Exception as error:  # of the YAML parser, or an invalid model-index
        reason = " ".join(str(error).split())
        raise ConversionError(f"The README has metadata that cannot be read: {reason}. Mend it by hand.") from None
    fields = card.data.to_dict()
    text = card.text
    before, begin, rest = text.partition(_BEGIN)
    between, end, after = rest.partition(_END)
    if not begin and _END not in text:
        return text.rstrip() + "\n\n", "", fields
    if not end or _END in before + after or _BEGIN in between + after:
        raise ConversionError(
            f"The README should hold '{_BEGIN}' once, and after it '{_END}': what is between them is rewritten, the "
            "rest is yours. Mend it by hand."
        )
    return before, after.lstrip("\n"), fields


def _outdated(
    fields: Mapping[str, Any], previous: Mapping[str, Any] | None, source: Source, weights_sha256: str
) -> list[str]:
    """The names of the metadata that a publication of other weights, or from another source, has left."""
    outdated: list[str] = []
    if previous is None:
        return outdated
    before = Source(**(previous.get("source") or {}))
    license = fields.get("license_name") or fields.get("license")
    if previous.get("files", {}).get(FUSED_NAME) != weights_sha256:
        outdated += ["model-index"]
    if license != source.license and (source.license or license == before.license):
        outdated += ["license", "license_name", "license_link"]
    if fields.get("base_model") == _base_model(before) != _base_model(source):
        outdated += ["base_model", "base_model_relation"]
    return outdated


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _base_model(source: Source) -> str | None:
    """The Hub id of the dense weights; None if they have none."""
    return source.name if source.name and "/" in source.name else None


def _origin(report: ConversionReport, source: Source) -> str:
    if base_model := _base_model(source):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    if source.name:
        return f"the weights `{source.name}`"
    random = report.total.random == report.total.channels
    return "its own random initialisation" if random else "weights whose source is not recorded"


def _measured(report: ConversionReport) -> str:
    if not report.calibration:
        return "Only results listed in the metadata were\nmeasured."
    return (
        "Only results listed in the metadata\nwere measured, and this, of these very weights:\n\n"
        f"Calibrated ({report.calibration.metric}) {report.calibration.summary()}."
    )


def _shared(layers: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """The text of one setting of all layers; if values differ, each with the number of layers that have it."""
    counts = Counter(layer[name] for layer in layers.values())
    if len(counts) == 1:
        return str(*counts)
    return ", ".join(f"{value} ({n} layer{'s' * (n > 1)})" for value, n in sorted(counts.items()))


def _conversion(section: Mapping[str, Any], report: ConversionReport) -> str:
    """The Markdown of the conversion's settings and report; ``section`` is that of config.json."""
    total = report.total
    return f"""| | |
|---|---|
| bank | {", ".join(f"{bank['name']} (SHA-256 {digest[:16]}...)" for digest, bank in section["banks"].items())} |
| keys per kernel | {_shared(section["layers"], "keys_per_kernel")} |
| trainable | {_shared(section["layers"], "trainable")} |
| layers, kernels | {len(report.layers)}, {total.channels:,} |
| R2 of the fit: mean, median, worst | {", ".join(map(number, (total.mean_r2, total.median_r2, total.worst_r2)))} |
| {FUSED_NAME} | SHA-256 {section["files"][FUSED_NAME]} |

<details><summary>Layer by layer</summary>

```
{report}
```

</details>"""


def _body(config_json: Mapping[str, Any], report: ConversionReport, repo_id: str, source: Source, warn: bool) -> str:
    cfg = config_json["pretrained_cfg"]
    size = "x".join(map(str, cfg["input_size"]))
    total = report.total
    banks = [f"`{bank['name']}`" for bank in config_json[SECTION]["banks"].values()]
    keys = f"{len(total.key_histogram)} frozen *master keys* of the bank {banks[0]}"
    keys = keys if len(banks) == 1 else f"frozen *master keys* of the banks {', '.join(banks)}"
    licence = f"{source.license}, {'given by the author' if source.license_given else 'inherited from them'}"
    first, architecture = _UNMEASURED if warn else "", config_json["architecture"]
    return f"""
{first}A timm `{architecture}` whose {total.channels:,} depthwise kernels are affine images `a*x + b` of the
{keys}, converted with
`timm_masterkeys` from {_origin(report, source)}.
Licence: {licence if source.license else "unknown"}.

Conversion costs accuracy unless the model was calibrated or trained afterwards. {_measured(report)}

{_LOADING.format(address=f"hf-hub:{repo_id}" if "/" in repo_id else f"local-dir:{repo_id}")}

## Preprocessing

Input {size}, {cfg.get("interpolation", "bicubic")}, crop {cfg.get("crop_pct")}, mean {tuple(cfg["mean"])},
std {tuple(cfg["std"])}; {config_json["num_classes"]} classes.

## The conversion

{_conversion(config_json[SECTION], report)}

## Cite

{_CITATIONS}
"""
