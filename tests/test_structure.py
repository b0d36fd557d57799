"""The house keeps its shape: imports go down, files stay small, configs have no hidden defaults."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kdrl_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    1: (
        *("types", "config", "config_values", "config_reference", "foreign_names"),
        *("own_functions", "sharding", "processes", "network", "shapes", "versions"),
    ),
    2: ("models", "objectives", "rewards"),
    3: ("rollout", "data", "tasks"),
    4: ("training",),
    5: ("evaluation", "generation", "reproduction", "planning", "reporting"),
    6: (
        *("cli", "train", "evaluate", "generate", "difficulty", "reproduce", "convert", "report"),
        *("plan", "scripts"),
    ),
}
FLOORS[7] = ("api",)  # the commands as functions
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}


def room(path: Path) -> str:
    """'training' for kdrl_jax/training/step.py, 'train' for kdrl_jax/train.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "kdrl_jax":
                names = [f"kdrl_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("kdrl_jax.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for there in imported_rooms(path) - {here}:
        if there == "__version__":
            continue
        assert there in FLOOR_OF, f"{path}: {there} stands on no floor"
        low, high = FLOOR_OF[there], FLOOR_OF[here]
        same_entry_floor = low == high == 6 and there == "cli"
        same_ground_floor = low == high == 1
        same_data_floor = low == high == 3
        assert low < high or same_entry_floor or same_ground_floor or same_data_floor, (
            f"{path}: {here} (floor {high}) imports {there} (floor {low})"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_configs_are_read_by_attribute(path: Path) -> None:
    """`config.get("key", default)` hides a default and lets a misspelt key pass."""
    if room(path) == "models":  # there `config` is the JSON of another project's checkpoint
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr == "get":
                assert owner.split(".")[0] not in ("config", "role", "c"), f"{path}: {owner}.get("
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            assert not ast.unparse(node.args[0]).startswith("config"), f"{path}: getattr on config"


def test_objectives_know_no_configs() -> None:
    for path in (PACKAGE / "objectives").glob("*.py"):
        assert "ml_collections" not in path.read_text(encoding="utf-8")
