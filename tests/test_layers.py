"""Imports point down only; a file in no layer, too long, or named after nothing fails here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module may import modules of lower layers and of its own.
LAYERS: list[tuple[str, tuple[str, ...]]] = [
    (
        "config",
        (
            "t2i_lm",
            "t2i_lm.config",
            "t2i_lm.sections",
            "t2i_lm.remedy_sections",
            "t2i_lm.runs",
            "t2i_lm.assets",
            "t2i_lm.hub",
            "t2i_lm.hashing",
            "t2i_lm.protocol",
        ),
    ),
    ("load", ("t2i_lm.load", "t2i_lm.options")),
    ("vocab", ("t2i_lm.vocab", "t2i_lm.devices", "t2i_lm.seeds", "t2i_lm.parts", "t2i_lm.telling")),
    ("sequence", ("t2i_lm.sequence", "t2i_lm.losses")),
    ("models", ("t2i_lm.models", "t2i_lm.tokenizers", "t2i_lm.optim")),
    ("data", ("t2i_lm.data", "t2i_lm.modules", "t2i_lm.probes")),
    ("backbones", ("t2i_lm.backbones", "t2i_lm.aligned", "t2i_lm.flops")),
    ("grid", ("t2i_lm.grid", "t2i_lm.markdown")),
    (
        "build",
        ("t2i_lm.build", "t2i_lm.trainer", "t2i_lm.sharded", "t2i_lm.trained", "t2i_lm.subject"),
    ),
    ("drawing", ("t2i_lm.drawing", "t2i_lm.forgetting")),
    (
        "session",
        (
            "t2i_lm.scene_report",
            "t2i_lm.align_report",
            "t2i_lm.report",
            "t2i_lm.clip",
            "t2i_lm.coco_fid",
            "t2i_lm.coco_result",
            "t2i_lm.harness_result",
            "t2i_lm.session",
            "t2i_lm.dry_run",
        ),
    ),
    (
        "figures",
        (
            "t2i_lm.plots",
            "t2i_lm.figures",
            "t2i_lm.arms",
            "t2i_lm.pairing",
            "t2i_lm.figure_text",
            "t2i_lm.tradeoff",
            "t2i_lm.sweep_figure",
            "t2i_lm.published",
        ),
    ),
    (
        "commands",
        (
            "t2i_lm.train",
            "t2i_lm.ablate",
            "t2i_lm.jobs",
            "t2i_lm.prepare",
            "t2i_lm.export",
            "t2i_lm.sample",
            "t2i_lm.demo",
            "t2i_lm.evaluate",
            "t2i_lm.measurements",
            "t2i_lm.remedies",
            "t2i_lm.sweep",
        ),
    ),
]
MODULES = sorted(
    path
    for package in ("t2i_lm", "callbacks")
    for path in (ROOT / package).rglob("*.py")
    if "__pycache__" not in str(path)
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(name: str) -> int:
    best = (-1, 0)
    for rank, (_, prefixes) in enumerate(LAYERS):
        for prefix in prefixes:
            exact_package = prefix == "t2i_lm"
            if (name == prefix or (not exact_package and name.startswith(f"{prefix}."))) and len(prefix) > best[1]:
                best = (rank, len(prefix))
    assert best[1], f"{name} is in no layer: add it to LAYERS in tests/test_layers.py"
    return best[0]


def imports(path: Path, lazy: bool = True) -> set[str]:
    """Modules that a file imports; `lazy=False` leaves out those inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    if name.startswith("callbacks"):
        assert not any(imported.startswith("t2i_lm") for imported in imports(path))
        return
    own = layer(name)
    for imported in imports(path):
        if imported.startswith("t2i_lm"):
            assert layer(imported) <= own, f"{name} imports {imported}, which is above it"
        if imported.split(".")[0] == "callbacks":
            assert name == "t2i_lm.trainer", f"{name} imports callbacks; only t2i_lm.trainer may"


def test_models_do_not_know_lightning_and_config_knows_the_standard_library_alone() -> None:
    for path in (ROOT / "t2i_lm" / "models").glob("*.py"):
        assert not any("lightning" in imported for imported in imports(path)), path
    assert imports(ROOT / "t2i_lm" / "config.py") == {"dataclasses", "t2i_lm.sections", "t2i_lm.remedy_sections"}
    assert imports(ROOT / "t2i_lm" / "remedy_sections.py") == {"dataclasses", "t2i_lm.sections"}
    assert imports(ROOT / "t2i_lm" / "sections.py") == {"collections.abc", "dataclasses", "typing"}


def test_only_load_knows_omegaconf() -> None:
    for path in MODULES:
        if path.name not in ("load.py", "dry_run.py"):
            assert not any("omegaconf" in imported for imported in imports(path)), path


@pytest.mark.parametrize(
    "command", ["train", "ablate", "prepare", "export", "sample", "demo", "evaluate", "remedies", "sweep"]
)
def test_commands_import_torch_late(command: str) -> None:
    tree = imports(ROOT / "t2i_lm" / f"{command}.py", lazy=False)
    heavy = {"torch", "lightning.pytorch", "datasets", "diffusers", "t2i_lm.build", "t2i_lm.session"}
    assert not tree & heavy


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_are_short_and_named_after_something(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"}
