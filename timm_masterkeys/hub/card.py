"""The model card of a published model: what it is, what it cost, how to load it, whose licence it inherits."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import ConversionError
from ..models.report import ConversionReport

_BEGIN, _END = "<!-- timm_masterkeys: begin (rewritten at every publication) -->", "<!-- timm_masterkeys: end -->"

# Licences the Hub has an identifier for; any other is published as "other" with its name.
_HUB_LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "apple-amlr", "gemma"}

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

_LOADING = """## Load it

With the plugin: the keys frozen, bit for bit as published.

```python
import timm, timm_masterkeys

model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
```

Without it: the same outputs, ordinary convolutions.

```python
import timm

model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
```"""


def inherited_license(pretrained_cfg: Mapping[str, Any], license: str | None) -> str:
    """The licence a converted model must be published under: that of the weights it comes from.

    Args:
        pretrained_cfg: The model's cfg.
        license: What the caller says; needed where the source weights' licence is unknown.

    Raises:
        ConversionError: No licence is known, or the caller names another than the inherited one.

    Example:
        >>> inherited_license({"license": "cc-by-nc-4.0"}, None)
        'cc-by-nc-4.0'
    """
    inherited = (pretrained_cfg.get("license") or "").lower()
    given = (license or "").lower()
    if not inherited and not given:
        raise ConversionError(
            "The licence of the source weights is unknown. Find it out and pass it: license='...' (--license)."
        )
    if inherited and given and given != inherited:
        raise ConversionError(
            f"license='{license}' was given, but the source weights are under '{inherited}', which converted weights "
            "inherit. Leave it out."
        )
    return inherited or given


def make_card(
    config: Mapping[str, Any],
    report: ConversionReport,
    repo_id: str,
    *,
    license: str | None,
    base_model: str | None = None,
    datasets: str | Sequence[str] = (),
    tags: str | Sequence[str] = (),
    metrics: Sequence[EvalResult] = (),
    existing: str = "",
) -> ModelCard:
    """Writes the card of a converted model.

    Args:
        config: The saved config.json.
        report: The conversion's report.
        repo_id: ``org/name`` (or a folder's name), as it appears in the examples.
        license: From ``inherited_license``; None if unknown.
        base_model: As for ``save_pretrained``; None if unknown.
        datasets: As for ``save_pretrained``.
        tags: As for ``save_pretrained``.
        metrics: As for ``save_pretrained``; none are made up.
        existing: The README there is: its text outside this package's marks and its own metadata stay.

    Raises:
        ConversionError: A README of which those cannot be told.

    Example:
        >>> make_card(config, report, "me/convnext_tiny.mk8", license="apache-2.0").save("README.md")
    """
    before, after, fields = _hand_written(existing)
    named = license in _HUB_LICENCES
    own: dict[str, Any] = {
        "license": license if named else "other" if license else None,
        "license_name": None if named else license,
        "license_link": f"https://huggingface.co/{base_model}" if license and base_model and not named else None,
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "base_model": base_model,
        "base_model_relation": "finetune" if base_model else None,
    }
    merged = {**fields, **{key: value for key, value in own.items() if value is not None}}
    for key, values in (
        ("tags", ("image-classification", "timm", "master-key-filters", *_listed(tags))),
        ("datasets", _listed(datasets)),
    ):
        kept = [value for value in _listed(fields.get(key)) if value not in values]
        merged[key] = [*values, *kept] or None
    if metrics:
        merged["model_name"] = repo_id.rpartition("/")[2]
        merged["eval_results"] = list(metrics)
        merged.pop("model-index", None)
    data = ModelCardData(**merged)
    body = _body(config, report, repo_id, license, base_model)
    title = "" if before or after else f"# {repo_id.rpartition('/')[2]}\n\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{before}{title}{_BEGIN}\n{body}\n{_END}\n{after}")


def read_readme(path: str | os.PathLike[str]) -> str:
    """The text of a README whose hand-written part is to be kept; empty if there is none.

    Raises:
        ConversionError: It is not UTF-8.
        OSError: It cannot be read.
    """
    if not os.path.isfile(path):
        return ""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConversionError(f"'{path}' is not UTF-8 ({error}). Save it as UTF-8, or move it away.") from None
    if "\0" in text:
        raise ConversionError(f"'{path}' holds NUL: it is not UTF-8. Save it as UTF-8, or move it away.")
    return text


def _hand_written(existing: str) -> tuple[str, str, dict[str, Any]]:
    """The text before and after this package's marks, and the metadata, of an existing README."""
    existing = existing.removeprefix("\ufeff")
    if not existing.strip():
        return "", "", {}
    try:
        card = ModelCard(existing)
    except Exception as error:  # YAML's, or of a model-index that is none
        told = " ".join(str(error).split())
        raise ConversionError(f"The README has metadata that cannot be read: {told}. Mend it by hand.") from None
    fields = card.data.to_dict()
    text = card.text
    before, begin, rest = text.partition(_BEGIN)
    own, end, after = rest.partition(_END)
    if not begin and _END not in text:
        return text.rstrip() + "\n\n", "", fields
    if not end or _END in before + after or _BEGIN in own + after:
        raise ConversionError(
            f"The README should hold '{_BEGIN}' once, and after it '{_END}': what is between them is rewritten, the "
            "rest is yours. Mend it by hand."
        )
    return before, after.lstrip("\n"), fields


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _source(cfg: Mapping[str, Any]) -> str:
    scratch = any(note.endswith("converted from scratch") for note in cfg.get("notes") or ())
    return "weights of its own" if scratch else "weights whose source is not recorded"


def _measured(report: ConversionReport) -> str:
    if not report.calibration:
        return "Only results listed in the metadata were\nmeasured."
    measured = report.calibration[0].upper() + report.calibration[1:]
    before = "Only results listed in the metadata\nwere measured, and this, before any training that came after"
    return f"{before}:\n\n{measured}."


def _histogram(counts: Sequence[int]) -> str:
    """A bar a key."""
    most = max(*counts, 1)
    return "\n".join(f"key {i + 1}  {n:>8,}  {'#' * round(40 * n / most)}".rstrip() for i, n in enumerate(counts))


def _layer_rows(report: ConversionReport) -> str:
    return "\n".join(
        f"| {layer.name} | {layer.kernel_size[0]}x{layer.kernel_size[1]} | {layer.channels:,} | {layer.mean_r2:.3f} "
        f"| {layer.worst_r2:.3f} | {' '.join(map(str, layer.key_histogram))} |"
        for layer in report.layers
    )


def _conversion(about: Mapping[str, Any], report: ConversionReport) -> str:
    total = report.total
    return f"""| | |
|---|---|
| bank | {", ".join(f"{name} (SHA-256 {digest[:16]}...)" for name, digest in about["banks"].items())} |
| keys per kernel | {about["keys_per_kernel"]} |
| trainable | {about["trainable"]} |
| layers, kernels | {len(report.layers)}, {total.channels:,} |
| R2 of the projection: mean, median, worst | {total.mean_r2:.3f}, {total.median_r2:.3f}, {total.worst_r2:.3f} |
| kernels with R2 above 0.5, 0.9 | {total.above_50:.0%}, {total.above_90:.0%} |
| trainable parameters, before and now | {report.trainable_before:,}, {report.trainable_after:,} |

How many kernels have each key:

```
{_histogram(total.key_histogram)}
```

<details><summary>Layer by layer</summary>

| layer | kernel | channels | mean R2 | worst | kernels of each key |
|---|---|---|---|---|---|
{_layer_rows(report)}

</details>"""


def _body(
    config: Mapping[str, Any], report: ConversionReport, repo_id: str, license: str | None, base_model: str | None
) -> str:
    cfg = config["pretrained_cfg"]
    size = "x".join(map(str, cfg["input_size"]))
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else _source(cfg)
    inherited = ", inherited from them" if base_model else ""
    total = report.total
    return f"""
A timm `{config["architecture"]}` whose {total.channels:,} depthwise kernels are affine images `a*x + b` of the
{len(total.key_histogram)} frozen *master keys* of the bank `{report.bank}`, converted with
`timm_masterkeys` from {source}.
Licence: {license or "unknown"}{inherited}.

Conversion costs accuracy unless the model was repaired or trained afterwards. {_measured(report)}

{_LOADING.format(repo_id=repo_id)}

## Preprocessing

Input {size}, {cfg.get("interpolation", "bicubic")}, crop {cfg.get("crop_pct")}, mean {tuple(cfg["mean"])},
std {tuple(cfg["std"])}; {config["num_classes"]} classes.

## The conversion

{_conversion(config["masterkeys"], report)}

## Cite

{_CITATIONS}
"""
