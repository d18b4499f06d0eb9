"""The house of DESIGN: a file imports from its own floor or below, never up; heavy outsiders live in one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "raysyn"
FLOORS = {
    0: ("types", "labels", "config", "compose"),
    1: ("diffusion", "nets", "metrics"),
    2: ("data",),
    3: (
        *("models", "tasks", "checkpoint", "reference_format", "pipeline", "diffusers_pipeline"),
        *("training", "training_state", "training_batches", "training_objectives", "training_run"),
    ),
    4: ("cluster", "tracking", "report"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    parts = [m.split(".") for m in imported_modules(path) if m.startswith("raysyn.")]
    return {p[1] for p in parts}


def outsiders(path: Path) -> set[str]:
    return {m.split(".")[0] for m in imported_modules(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_own_floor_or_below(path: Path) -> None:
    assert room_of(path) in FLOOR_OF, f"{path.name} has no floor: give it one in FLOORS"
    floor = FLOOR_OF[room_of(path)]
    up = {r for r in rooms_imported(path) if FLOOR_OF.get(r, 0) > floor}
    assert not up, f"floor {floor} imports from above: {up}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outsiders_stay_in_their_rooms(path: Path) -> None:
    found, floor = outsiders(path), FLOOR_OF[room_of(path)]
    if "ray" in found:
        assert room_of(path) == "cluster", "Ray lives in cluster/ and nowhere below"
    if "mlflow" in found:
        assert room_of(path) == "tracking", "tracking.py is the only importer of mlflow"
    if floor == 0 or floor == 2:
        assert not found & {"torch", "torchvision", "timm", "monai", "diffusers"}, "no torch on this floor"
    if floor == 1:
        assert "data" not in rooms_imported(path), "F1 and F2 do not know each other"
    if floor == 2:
        assert not {r for r in rooms_imported(path) if FLOOR_OF.get(r) == 1}, "F1 and F2 do not know each other"


def test_jobs_know_only_the_vocabulary_and_the_cluster() -> None:
    for path in sorted((ROOT / "jobs").glob("*.py")):
        allowed = {room for floor in (0, 4) for room in FLOORS[floor]}
        assert rooms_imported(path) <= allowed, path.name
        assert not outsiders(path) & {"ray", "torch", "mlflow"}, path.name
