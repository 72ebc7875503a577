"""The source of a published model's weights, and their licence: inherited if known, else given by the user."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..conversion.record import Source
from ..errors import ConversionError

# https://huggingface.co/docs/hub/repositories-licenses; any other licence is published as "other" with its name.
HUB_LICENSES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community "
    "h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl "
    "postgresql unknown unlicense wtfpl zlib".split()
)
_TYPO = 0.75  # an unknown licence with a difflib ratio above this to a known one is taken as mistyped


def saved_source(known: Source | None, license: str | None, base_model: str | None) -> Source | None:
    """The source to save: the known one, and the caller's arguments where it is unknown; None if all are None.

    Raises:
        ConversionError: The caller's licence or model differs from the known one, or the licence is mistyped.
    """
    if known is None and license is None and base_model is None:
        return None
    known = known or Source()
    if base_model and "/" in (known.name or "") and known.name != base_model:
        raise ConversionError(
            f"base_model='{base_model}' was given, but the model was converted from '{known.name}'. Leave it out."
        )
    inherited, requested = (known.license or "").lower(), (license or "").lower()
    inherited = "" if inherited == "unknown" else inherited  # timm's registry has it for some weights
    if inherited and requested and requested != inherited:
        raise ConversionError(
            f"license='{license}' was given, but the source weights are under '{inherited}', which converted weights "
            "inherit. Leave it out."
        )
    if requested and not inherited:
        check_license(requested)
    return replace(
        known,
        name=base_model or known.name,
        license=inherited or requested or None,
        license_given=known.license_given or bool(requested and not inherited),
    )


def check_license(license: str) -> None:
    """Raises ConversionError for a licence that looks like a mistyped identifier of the Hub."""
    similar = difflib.get_close_matches(license.lower(), sorted(HUB_LICENSES), 1, _TYPO)
    if similar and license.lower() not in HUB_LICENSES:
        raise ConversionError(
            f"Got license='{license}', which the Hub does not know. Did you mean '{similar[0]}'? Another licence "
            "goes by its full name."
        )


def require_license(source: Source | None, cfg: Mapping[str, Any]) -> str:
    """The licence of a source; ConversionError if it has none, with the licence in the model's cfg as a suggestion."""
    if source and source.license:
        return source.license
    advice = ""
    if cfg.get("license", "unknown") not in (None, "unknown"):
        name = "stock weights of " + ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
        name = f"weights of {cfg.get('hf_hub_id')}" if cfg.get("source") == "hf-hub" else name
        advice = f"The {name} are under '{cfg['license']}': if the model comes from them, that is it. "
    raise ConversionError(
        "The licence of the source weights is not known: the dense model was yours, not loaded by this package. "
        f"{advice}Pass license='...' (--license)."
    )
