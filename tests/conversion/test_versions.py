"""The oldest versions pyproject.toml allows are the ones CI runs the tests with."""

import re
from pathlib import Path

from packaging.version import Version

from timm_masterkeys.timm_plugin import compat

ROOT = Path(__file__).parents[2]


def test_the_oldest_versions_allowed_are_tested():
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci/oldest.txt").read_text(), re.MULTILINE))
    declared = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [", 1)[1].split("]", 1)[0]
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', declared))
    assert len(allowed) == 5
    assert {name: Version(tested[name]) for name in allowed} == {name: Version(v) for name, v in allowed.items()}
    assert compat.TESTED[0] == allowed["timm"]
