"""The rooms of the house: who may import whom, and what only one of them may touch."""

import ast
from functools import lru_cache
from pathlib import Path

import timm_masterkeys

HOUSE = Path(timm_masterkeys.__file__).parent

# From the ground up: a room imports from the rooms before it alone.
ROOMS = ["version", "errors", "files", "keys", "layers", "conversion", "calibration", "hub", "timm_plugin", "__init__"]
ROOMS += ["study", "zoo", "cli"]
DOORS = ["__main__", "launch"]


@lru_cache
def imports():
    """(file, its rooms, the node) for every import of the package."""
    found = []
    for path in HOUSE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.append((path, path.relative_to(HOUSE).parts, node))
    return found


def own_imports():
    """(file, its room, the room that is imported) for every import of this package's own modules."""
    for path, inside, node in imports():
        if isinstance(node, ast.ImportFrom) and node.level:
            above = inside[: len(inside) - node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                other = (*above, *name.split("."))[0]
                known = (HOUSE / other).exists() or (HOUSE / f"{other}.py").exists()
                yield path, inside[0].removesuffix(".py"), other if known else "__init__"


def test_few_ways_lead_from_room_to_room():
    """Those to the ground floor apart, which everybody stands on."""
    ways = {(room, other) for _, room, other in own_imports() if room != other}
    assert len([way for way in ways if way[1] not in ("version", "errors", "files")]) < 40


def test_nobody_imports_upward():
    for path, room, other in own_imports():
        if room != other and room not in DOORS:
            assert ROOMS.index(other) < ROOMS.index(room), f"{path} imports {other}"


def test_nobody_reaches_for_private_names_of_a_neighbour():
    for path, _, node in imports():
        if isinstance(node, ast.ImportFrom) and node.level:
            private = [a.name for a in node.names if a.name.startswith("_") and a.name != "__version__"]
            assert not private, f"{path} imports {private}"


def test_every_room_and_every_module_is_known():
    found = {path.relative_to(HOUSE).parts[0].removesuffix(".py") for path in HOUSE.rglob("*.py")}
    assert found == {*ROOMS, *DOORS}


def test_the_keys_know_no_timm_and_the_layers_no_model():
    barred = {"keys": ("timm",), "layers": ("timm.models", "timm.data")}
    for path, inside, node in imports():
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [] if node.level else [node.module]
        for name in barred.get(inside[0], ()):
            assert not [n for n in names if n == name or n.startswith(f"{name}.")], path
