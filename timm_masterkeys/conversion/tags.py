"""timm's pretrained tags of converted weights: ``mk8`` and ``mk8_<tag of the dense weights>``."""

TAG = "mk8"


def masterkeys_tag(tag: str | None) -> str:
    """The tag of converted weights for a tag of dense weights; a tag of converted weights is returned unchanged.

    Example:
        >>> masterkeys_tag("in12k"), masterkeys_tag("mk8_in12k"), masterkeys_tag(None)
        ('mk8_in12k', 'mk8_in12k', 'mk8')
    """
    if is_masterkeys_tag(tag):
        return str(tag)
    return f"{TAG}_{tag}" if tag else TAG


def is_masterkeys_tag(tag: str | None) -> bool:
    """Whether a pretrained tag is one of this package's: ``mk8`` or ``mk8_...``."""
    return tag is not None and (tag == TAG or tag.startswith(f"{TAG}_"))


def dense_tag(tag: str | None) -> str:
    """The tag of dense weights, "" if none, for a tag of converted weights; other tags are returned unchanged.

    Example:
        >>> dense_tag("mk8_in12k"), dense_tag("mk8"), dense_tag("in12k")
        ('in12k', '', 'in12k')
    """
    tag = tag or ""
    return tag.removeprefix(TAG).removeprefix("_") if is_masterkeys_tag(tag) else tag
