"""The import direction, the fences around heavy libraries, and safe loading: checked, not hoped for.

Every check reads the source with `ast`, so lazy imports count as well. Each has a planted breach below.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import itself and rooms of the levels above it in this list; rooms of one level never import each other.
LEVELS = [
    ["errors", "signals"],
    ["records", "schedules"],
    ["config", "sealed"],
    ["distributed", "keeping", "recomputation"],
    ["partition"],
    ["shuffle"],
    ["norms"],
    ["input_moments", "state"],
    ["population", "folding", "leakage", "evaluation"],
    ["data"],
    ["detection", "contrastive", "classification"],
    ["training"],
    ["launch", "integrations"],
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
READS_FILES_ONLY = {"report": {"errors", "records", "config"}}  # off the ladder: whatever made a run, it can be read
TOP = {"cli", "__init__"}  # may import every room; nobody imports cli

# library -> the only places that may import it
FENCES = {
    "lightning": ["training"],
    "pytorch_lightning": ["training"],
    "omegaconf": ["config"],
    "submitit": ["launch"],
    "faiss": ["evaluation"],
    "lightly": ["contrastive"],
    "detectron2": ["integrations/detectron2"],
    "timm": ["contrastive"],  # backbones by name; elsewhere its models are taken as they come
    "onnx": [],
}
TORCH_FREE = ["errors", "signals", "records", "config", "report"]
TORCH_LIBRARIES = {"torch", "torchvision", "torchmetrics", "lightning", "fvcore"}
OUTSIDE = {"projects", "tools", "tests"}
JUNK_DRAWERS = {"utils", "helpers", "common", "misc", "util", "helper"}


def source_files(root: Path, folders: list[str]) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, full dotted name) of everything a file imports; relative names are made absolute."""
    package = list(path.relative_to(root).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from leakfree import norms` imports leakfree.norms
            names = [alias.name for alias in node.names] if module == "leakfree" else [None]
            yield from ((node.lineno, f"{module}.{name}" if name else module) for name in names)
        elif isinstance(node, ast.Call) and _call_name(node).rpartition(".")[2] in ("import_module", "__import__"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _call_name(node: ast.Call) -> str:
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def room_of(path: Path, root: Path) -> str:
    return path.relative_to(root / "leakfree").with_suffix("").parts[0]


def direction_breaches(root: Path) -> Iterator[str]:
    for path in source_files(root, ["leakfree"]):
        room = room_of(path, root)
        if room not in LEVEL and room not in READS_FILES_ONLY and room not in TOP:
            yield f"{path.relative_to(root)}: room {room!r} has no place in the import order: add it to LEVELS"
            continue
        for line, name in imports(path, root):
            place = f"{path.relative_to(root)}:{line}"
            first, _, rest = name.partition(".")
            if first in OUTSIDE:
                yield f"{place}: leakfree never imports {first}"
            target = rest.partition(".")[0]
            if first != "leakfree" or not target or target == room or target.startswith("__"):
                continue
            if not _may_import(room, target):
                yield f"{place}: {room} imports {target}, against the direction"


def _may_import(room: str, target: str) -> bool:
    if room in READS_FILES_ONLY:
        return target in READS_FILES_ONLY[room]
    if room in TOP:
        return target != "cli"
    return target in LEVEL and LEVEL[target] < LEVEL[room]


def fence_breaches(root: Path) -> Iterator[str]:
    for path in source_files(root, ["leakfree"]):
        inside = path.relative_to(root / "leakfree").with_suffix("").as_posix()
        for line, name in imports(path, root):
            library = name.partition(".")[0]
            place = f"{path.relative_to(root)}:{line}"
            homes = FENCES.get(library)
            if homes is not None and not any(inside == home or inside.startswith(f"{home}/") for home in homes):
                yield f"{place}: {library} is only for {', '.join(homes) or 'tests'}"
            if library in TORCH_LIBRARIES and room_of(path, root) in TORCH_FREE:
                yield f"{place}: {room_of(path, root)} never imports {library}"


def naming_breaches(root: Path) -> Iterator[str]:
    for path in sorted((root / "leakfree").rglob("*")):
        if path.stem in JUNK_DRAWERS and (path.suffix == ".py" or path.is_dir()):
            yield f"{path.relative_to(root)}: a name that says nothing; put it in the room whose words it speaks"
    for path in sorted((root / "leakfree").rglob("__init__.py")):
        tree = ast.parse(path.read_text())
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            yield f"{path.relative_to(root)}: has no __all__"


def unsafe_loading(root: Path) -> Iterator[str]:
    for path in source_files(root, ["leakfree", "tools", "projects", "tests"]):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            problem = _unsafe(node) if isinstance(node, ast.Call) else None
            if problem and not (problem.startswith("pickle") and path.is_relative_to(root / "tests")):
                yield f"{path.relative_to(root)}:{node.lineno}: {problem}"


def _unsafe(node: ast.Call) -> str | None:
    name = _call_name(node)
    module, _, function = name.rpartition(".")
    flags = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name == "torch.load" and flags.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("eval", "exec"):
        return f"{name} runs text as code"
    if module in ("pickle", "cPickle", "dill", "joblib", "marshal") and function.startswith("load"):
        return f"{name} can run code; use JSON, YAML or torch.load(weights_only=True)"
    if module == "yaml" and "load" in function and not function.startswith("safe_"):
        return f"{name} can run code; use yaml.safe_load"
    if function == "load" and flags.get("allow_pickle") == "True":
        return f"{name} with allow_pickle can run code"
    return None


CHECKS = [direction_breaches, fence_breaches, naming_breaches, unsafe_loading]


@pytest.mark.parametrize("check", CHECKS)
def test_the_tree_has_no(check):
    breaches = list(check(ROOT))
    assert not breaches, "\n" + "\n".join(breaches)


PLANTED = [
    (direction_breaches, "leakfree/norms/a.py", "from leakfree.training import train", "norms imports training"),
    (direction_breaches, "leakfree/norms/a.py", "from leakfree import training", "norms imports training"),
    (direction_breaches, "leakfree/norms/a.py", "from ..training.x import y", "norms imports training"),
    (direction_breaches, "leakfree/norms/a.py", "from .. import cli", "norms imports cli"),
    (direction_breaches, "leakfree/norms/a.py", "def f():\n    import leakfree.data", "norms imports data"),
    (direction_breaches, "leakfree/norms/a.py", "import_module('leakfree.data')", "norms imports data"),
    (direction_breaches, "leakfree/shuffle/a.py", "import leakfree.norms", "shuffle imports norms"),
    (direction_breaches, "leakfree/detection/a.py", "import leakfree.contrastive", "detection imports contrastive"),
    (direction_breaches, "leakfree/population.py", "import leakfree.leakage.audit", "population imports leakage"),
    (direction_breaches, "leakfree/report/a.py", "from leakfree.training import x", "report imports training"),
    (direction_breaches, "leakfree/training/a.py", "from leakfree.report import x", "training imports report"),
    (direction_breaches, "leakfree/training/a.py", "from leakfree.cli import main", "training imports cli"),
    (direction_breaches, "leakfree/data/a.py", "from projects.paper import x", "never imports projects"),
    (direction_breaches, "leakfree/data/a.py", "import tests.ranks", "never imports tests"),
    (direction_breaches, "leakfree/engine.py", "", "'engine' has no place"),
    (fence_breaches, "leakfree/norms/a.py", "from lightning.pytorch import Trainer", "lightning is only for training"),
    (fence_breaches, "leakfree/training_x.py", "import lightning", "lightning is only for training"),
    (fence_breaches, "leakfree/training/a.py", "from omegaconf import OmegaConf", "omegaconf is only for config"),
    (fence_breaches, "leakfree/training/a.py", "import submitit", "submitit is only for launch"),
    (fence_breaches, "leakfree/norms/a.py", "import faiss", "faiss is only for evaluation"),
    (fence_breaches, "leakfree/norms/a.py", "import lightly.loss", "lightly is only for contrastive"),
    (fence_breaches, "leakfree/integrations/other/a.py", "import detectron2", "detectron2 is only for"),
    (fence_breaches, "leakfree/norms/a.py", "from timm.layers import BatchNormAct2d", "timm is only for contrastive"),
    (fence_breaches, "leakfree/report/a.py", "import torch.nn", "report never imports torch"),
    (fence_breaches, "leakfree/records.py", "def f():\n    from torch import Tensor", "records never imports torch"),
    (naming_breaches, "leakfree/norms/utils.py", "", "leakfree/norms/utils.py: a name that says nothing"),
    (naming_breaches, "leakfree/common/x.py", "", "leakfree/common: a name that says nothing"),
    (naming_breaches, "leakfree/norms/__init__.py", "import torch", "has no __all__"),
    (unsafe_loading, "leakfree/norms/a.py", "torch.load('x')", "without weights_only=True"),
    (unsafe_loading, "tools/a.py", "torch.load('x', weights_only=False)", "without weights_only=True"),
    (unsafe_loading, "tools/a.py", "yaml.load(text, Loader=yaml.Loader)", "yaml.load can run code"),
    (unsafe_loading, "tools/a.py", "yaml.unsafe_load(text)", "yaml.unsafe_load can run code"),
    (unsafe_loading, "tools/a.py", "eval('1')", "eval runs text"),
    (unsafe_loading, "tools/a.py", "pickle.loads(data)", "pickle.loads can run code"),
    (unsafe_loading, "tools/a.py", "np.load('x', allow_pickle=True)", "np.load with allow_pickle"),
]


@pytest.mark.parametrize(("check", "file", "code", "message"), PLANTED)
def test_a_planted_breach_is_found_and_named(tmp_path, check, file, code, message):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = list(check(tmp_path))
    assert len(found) == 1, found
    assert message in found[0]
    assert found[0].startswith(file) or found[0].startswith(str(Path(file).parent))


ALLOWED = [
    ("leakfree/norms/a.py", "import torch\nfrom leakfree.shuffle import x\nfrom . import b\nimport leakfree.errors"),
    ("leakfree/training/a.py", "import lightning\nfrom leakfree.detection import x\nmodel.eval()"),
    ("leakfree/config/a.py", "import omegaconf\nyaml.safe_load(text)\nfrom leakfree import errors"),
    ("leakfree/cli.py", "from leakfree import __version__\nfrom leakfree.report import compare"),
    ("tools/a.py", "torch.load('x', map_location='cpu', weights_only=True)\nnp.load('x')"),
]


@pytest.mark.parametrize(("file", "code"), ALLOWED)
@pytest.mark.parametrize("check", CHECKS)
def test_what_is_allowed_passes(tmp_path, check, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert list(check(tmp_path)) == []


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("leakfree", ["torch", "omegaconf", "yaml"]),
        ("leakfree.norms", ["lightning", "torchvision", "torchmetrics", "sklearn", "matplotlib", "omegaconf"]),
        ("leakfree.config", ["torch", "lightning", "matplotlib"]),
        ("leakfree.records", ["torch", "omegaconf"]),
        ("leakfree.sealed", ["torch", "omegaconf"]),
        ("leakfree.report", ["torch", "lightning", "torchvision"]),
        ("leakfree.cli", ["torch", "lightning", "matplotlib"]),
    ],
)
def test_importing_a_room_loads_nothing_heavier(module, banned):
    code = f"import sys, {module}; print(*[name for name in {banned} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"import {module} loads {done.stdout}"
