"""The architecture: every folder of t2i_lm is a layer, and imports point to earlier layers only."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In order: a folder imports itself and those before it. Files at the top of t2i_lm are commands, which import any.
LAYERS = (
    "storage",
    "config",
    "assets",
    "runtime",
    "tokenizers",
    "models",
    "data",
    "modules",
    "experiment",
    "generation",
    "evaluation",
    "comparison",
    "plots",
    "training",
    "analysis",
    "reporting",
)
COMMANDS = (
    "ablate",
    "collect",
    "compare",
    "demo",
    "evaluate",
    "export",
    "figures",
    "prepare",
    "probe",
    "remedies",
    "report",
    "sample",
    "study",
    "sweep",
    "train",
)
MODULES = sorted(path for package in ("t2i_lm", "callbacks") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, lazy: bool = True) -> set[str]:
    """Modules that a file imports; `lazy=False` leaves out those inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else iter(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            # `from t2i_lm.data import coco` imports the module t2i_lm.data.coco
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> str | None:
    """The folder of t2i_lm that a module lies in; None for a command and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "t2i_lm" and len(parts) > 1 and (ROOT / "t2i_lm" / parts[1]).is_dir() else None


def test_every_folder_is_a_layer_and_every_file_beside_them_a_command() -> None:
    package = ROOT / "t2i_lm"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(LAYERS)
    assert {path.stem for path in package.glob("*.py")} == {"__init__", *COMMANDS}


def test_imports_point_to_earlier_layers() -> None:
    upward = []
    for path in MODULES:
        name = module_name(path)
        own = layer(name)
        for imported in imports(path):
            if name.startswith("callbacks"):
                allowed = not imported.startswith("t2i_lm")
            elif own is None or not imported.startswith("t2i_lm."):
                allowed = True
            else:
                target = layer(imported)
                allowed = target is not None and LAYERS.index(target) <= LAYERS.index(own)
            if not allowed:
                upward.append(f"{name} imports {imported}")
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {module_name(path) for path in MODULES}
    graph = {module_name(path): (imports(path) & names) - {module_name(path)} for path in MODULES}
    # A package's own file may be imported by what it holds.
    graphlib.TopologicalSorter(graph).prepare()


def test_models_do_not_import_lightning_and_config_imports_the_standard_library_alone() -> None:
    for path in (ROOT / "t2i_lm" / "models").glob("*.py"):
        assert not any("lightning" in imported for imported in imports(path)), path
    for path in (ROOT / "t2i_lm" / "config").glob("*.py"):
        if path.stem != "load":
            outside = {name.split(".")[0] for name in imports(path)}
            assert outside <= {*sys.stdlib_module_names, "t2i_lm"}, path


def test_only_readers_of_yaml_and_the_dry_run_import_omegaconf() -> None:
    for path in MODULES:
        if path.name not in ("load.py", "plan.py", "dry_run.py"):
            assert not any("omegaconf" in imported for imported in imports(path)), path


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_import_heavy_packages_late(command: str) -> None:
    heavy = {"torch", "lightning.pytorch", "datasets", "diffusers", "t2i_lm.experiment.build", "t2i_lm.training.run"}
    assert not imports(ROOT / "t2i_lm" / f"{command}.py", lazy=False) & heavy


def test_files_have_at_most_500_lines_and_are_named_after_something() -> None:
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 500, path
        assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"}, path
