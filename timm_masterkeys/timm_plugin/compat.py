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

try:
    from timm.models import _registry
except ImportError:
    _registry = None

TESTED = ("1.0.31",)

Entrypoint = Callable[..., nn.Module]

_NAMES = "_model_entrypoints", "_model_has_pretrained", "_model_pretrained_cfgs", "_model_with_tags"
_MARK = "_timm_masterkeys_stock"


def unsupported() -> str:
    """Why tags cannot be added to this timm; empty if they can."""
    missing = [name for name in _NAMES if not hasattr(_registry, name)]
    if not missing:
        return ""
    return f"timm {timm.__version__} moved what timm_masterkeys needs ({missing[0]}); tested with {', '.join(TESTED)}"


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
    return set(_registry._model_entrypoints)


def cfgs(arch: str) -> dict[str, PretrainedCfg]:
    """The pretrained cfgs of an architecture by tag, the default under ''. Not copies: do not change them."""
    known = _registry._model_pretrained_cfgs
    names = [arch, *_registry._model_with_tags.get(arch, ())]
    return {name.partition(".")[2]: known[name] for name in names if name in known}


def add_tag(arch: str, tag: str, cfg: PretrainedCfg) -> None:
    """Registers ``arch.tag`` with timm, or replaces it; stock tags and the default stay as they are."""
    name, known, tagged = f"{arch}.{tag}", _registry._model_pretrained_cfgs, _registry._model_with_tags
    known[name] = cfg
    if not tagged.get(arch):  # an architecture registered without cfgs: list what timm falls back to
        tagged[arch] = [arch]
        known.setdefault(arch, PretrainedCfg(architecture=arch))
    if name not in tagged[arch]:
        tagged[arch].append(name)
    if cfg.has_weights:
        _registry._model_has_pretrained.add(name)
    else:
        _registry._model_has_pretrained.discard(name)


def wrap_entrypoint(arch: str, wrap: Callable[[Entrypoint], Entrypoint]) -> None:
    """Replaces the function that builds ``arch`` with ``wrap(function)``; a wrapped one stays as it is."""
    stock = _registry._model_entrypoints[arch]
    if not hasattr(stock, _MARK):
        wrapped = wrap(stock)
        setattr(wrapped, _MARK, stock)
        _registry._model_entrypoints[arch] = wrapped
