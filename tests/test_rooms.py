"""The rooms of the house: who may import whom, and what only one of them may touch."""

import ast
from pathlib import Path

import timm_masterkeys

HOUSE = Path(timm_masterkeys.__file__).parent

# From the ground up: a room imports from the rooms before it alone.
ROOMS = ["version", "errors", "files", "keys", "layers", "conversion", "calibration", "hub", "timm_plugin", "__init__"]
ROOMS += ["study", "zoo", "cli"]
DOORS = ["__main__", "launch"]


def imports():
    """(file, its room, the module imported) for every import of this package's own modules."""
    for path in HOUSE.rglob("*.py"):
        inside = path.relative_to(HOUSE).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = inside[: len(inside) - node.level]
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    yield path, inside[0].removesuffix(".py"), (*above, *name.split("."))


def room_of(module):
    return module[0] if (HOUSE / module[0]).exists() or (HOUSE / f"{module[0]}.py").exists() else "__init__"


def test_few_ways_lead_from_room_to_room():
    """Those to the ground floor apart, which everybody stands on."""
    ways = {(room, room_of(module)) for _, room, module in imports()}
    assert len([way for way in ways if way[0] != way[1] and way[1] not in ("version", "errors", "files")]) < 40


def test_nobody_imports_upward():
    for path, room, module in imports():
        other = room_of(module)
        if room != other and room not in DOORS:
            assert ROOMS.index(other) < ROOMS.index(room), f"{path} imports {'.'.join(module)}"


def test_nobody_reaches_for_private_names_of_a_neighbour():
    for path in HOUSE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = {alias.name for alias in node.names} - {"__version__"}
                private = [name for name in names if name.startswith("_")]
                assert not private, f"{path} imports {private}"


def test_every_room_and_every_module_is_known():
    found = {path.relative_to(HOUSE).parts[0].removesuffix(".py") for path in HOUSE.rglob("*.py")}
    assert found == {*ROOMS, *DOORS}


def test_the_keys_know_no_timm_and_the_layers_no_model():
    for room, barred in (("keys", ("timm",)), ("layers", ("timm.models", "timm.data"))):
        for path in (HOUSE / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not [n for n in names for b in barred if n == b or n.startswith(f"{b}.")], path
