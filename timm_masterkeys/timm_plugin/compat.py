"""The only module that touches timm's private names: it adds tags to timm's architectures.

Tested with the timm versions in ``TESTED``. ``register_model`` cannot do this: registering an architecture again
deletes its stock tags and default.
"""

import os
import re
from collections.abc import Callable

import timm
from timm.models import PretrainedCfg
from torch import nn

TESTED = ("1.0.31",)

Entrypoint = Callable[..., nn.Module]

_MARK = "_timm_masterkeys_stock"


def unsupported() -> str:
    """Why tags cannot be added to this timm; empty if they can."""
    try:
        from timm.models._registry import (  # noqa: F401
            _model_entrypoints,
            _model_has_pretrained,
            _model_pretrained_cfgs,
            _model_with_tags,
        )
    except ImportError as error:
        return f"timm {timm.__version__} moved what timm_masterkeys needs ({error}); tested with {', '.join(TESTED)}"
    return ""


def too_old() -> str:
    """A warning if timm is older than the oldest version tested, as in an old checkout; empty if it is not."""
    running, oldest = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (timm.__version__, TESTED[0]))
    if running >= oldest:
        return ""
    where = os.path.dirname(timm.__file__)
    return (
        f"timm {timm.__version__} in {where} is older than {TESTED[0]}, the oldest timm_masterkeys is tested with. "
        "A script in a checkout of timm imports the checkout's own: update it, or run a copy of the script elsewhere"
    )


def architectures() -> set[str]:
    """All architectures timm knows."""
    from timm.models._registry import _model_entrypoints

    return set(_model_entrypoints)


def cfgs(arch: str) -> dict[str, PretrainedCfg]:
    """The pretrained cfgs of an architecture by tag, the default under ''. Not copies: do not change them."""
    from timm.models._registry import _model_pretrained_cfgs, _model_with_tags

    names = [arch, *_model_with_tags.get(arch, ())]
    return {name.partition(".")[2]: _model_pretrained_cfgs[name] for name in names if name in _model_pretrained_cfgs}


def add_tag(arch: str, tag: str, cfg: PretrainedCfg) -> None:
    """Registers ``arch.tag`` with timm, or replaces it; stock tags and the default stay as they are."""
    from timm.models._registry import _model_has_pretrained, _model_pretrained_cfgs, _model_with_tags

    name = f"{arch}.{tag}"
    _model_pretrained_cfgs[name] = cfg
    if not _model_with_tags.get(arch):  # an architecture registered without cfgs: list what timm falls back to
        _model_with_tags[arch] = [arch]
        _model_pretrained_cfgs.setdefault(arch, PretrainedCfg(architecture=arch))
    if name not in _model_with_tags[arch]:
        _model_with_tags[arch].append(name)
    if cfg.has_weights:
        _model_has_pretrained.add(name)
    else:
        _model_has_pretrained.discard(name)


def wrap_entrypoint(arch: str, wrap: Callable[[Entrypoint], Entrypoint]) -> None:
    """Replaces the function that builds ``arch`` with ``wrap(function)``; a wrapped one stays as it is."""
    from timm.models._registry import _model_entrypoints

    stock = _model_entrypoints[arch]
    if not hasattr(stock, _MARK):
        wrapped = wrap(stock)
        setattr(wrapped, _MARK, stock)
        _model_entrypoints[arch] = wrapped
