"""The shape of the repository: which way imports point, how long files are, what is not used."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"megarec": ROOT / "megarec", "megarec_kernels": ROOT / "kernels/megarec_kernels"}
SOURCES = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]
SCRIPTS = [
    path
    for folder in ("pretrain", "data_prep", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# Layer -> what it may not import. Arrows: kernels <- models <- parallel <- train <- pretrain.
FORBIDDEN = {
    "megarec_kernels": ("megarec.",),
    "megarec.config": ("megarec.models", "megarec.data", "megarec.parallel", "megarec.train"),
    "megarec.models": (
        "torch.distributed",
        "megarec.parallel",
        "megarec.train",
        "megarec.data",
        "megarec.checkpoint",
        "megarec.conversion",
    ),
    "megarec.data": ("megarec.models", "megarec.parallel", "megarec.train"),
    "megarec.optim": ("megarec.parallel", "megarec.train"),
    "megarec.parallel": ("megarec.train", "megarec.conversion", "megarec.checkpoint"),
    "megarec": ("pretrain", "tools", "launch", "data_prep", "configs", "pickle", "mlstm_kernels"),
}


def module_name(path: Path) -> str:
    for name, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            return ".".join([name, *(part for part in parts if part != "__init__")])
    raise ValueError(path)


def imports(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def runtime_source(path: Path) -> str:
    return re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    wrong = [
        (imported, layer)
        for layer, forbidden in FORBIDDEN.items()
        if f"{name}.".startswith(f"{layer}.")
        for imported in imports(path)
        if f"{imported}.".startswith(tuple(f"{rule.rstrip('.')}." for rule in forbidden))
    ]
    assert not wrong


def test_torch_cuda_is_behind_the_device_helper() -> None:
    users = [p for p in [*SOURCES, *SCRIPTS] if "torch.cuda" in runtime_source(p)]
    assert [p.name for p in users] == ["device.py"]


def test_no_unsafe_loading() -> None:
    pattern = re.compile(r"weights_only=False|pickle\.loads?|yaml\.(unsafe_load|full_load)")
    assert not [p for p in [*SOURCES, *SCRIPTS] if pattern.search(runtime_source(p))]


def test_file_sizes() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in [*SOURCES, *SCRIPTS]}
    limit = {p: 900 if "megarec_kernels" in p.parts else 600 for p in lengths}
    assert not {p: n for p, n in lengths.items() if n > limit[p]}
    ordered = sorted(lengths.values())
    assert ordered[int(0.9 * len(ordered))] < 400


def test_entry_points_are_thin() -> None:
    for path in (ROOT / "pretrain").glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path


def test_the_name_kernels_stays_free() -> None:
    # Hugging Face's package of that name must never resolve to our folder.
    spec = find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
    assert not (ROOT / "kernels/__init__.py").exists()
