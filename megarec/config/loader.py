"""Load a YAML recipe with dotted overrides; every error at once, one line each."""

import difflib
import importlib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from megarec.config.base import Registered, StrictModel
from megarec.config.schema import Config
from megarec.errors import UserError

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"
Tree = dict[str, Any]

# Where pydantic's words are about Python: what is missing, in those of YAML.
EXPECTED = {
    "tuple_type": "expected a list",
    "dict_type": "expected a section",
    "model_type": "expected a section",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (`3e-4` is a number), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: key '{key}' is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader subclass)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{place}: not valid YAML: {' '.join(problem.split())}") from error


def find_config(name: str) -> Path:
    """Return the file of a recipe, given as a path or as a file in configs/.

    Raises:
        UserError: there is no such file; the message names the nearest ones.
    """
    folders = [Path(), CONFIG_FOLDER]
    for candidate in [folder / name for folder in folders]:
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(CONFIG_FOLDER)) for p in CONFIG_FOLDER.rglob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise UserError(f"--config {name}: no such file here or in configs/; try: {', '.join(near)}")


def read_yaml(path: Path) -> Tree:
    """Read one YAML mapping safely.

    Raises:
        UserError: unreadable, not YAML, a key given twice, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def apply_override(tree: Tree, override: str) -> None:
    """Set one `a.b.c=value` in the tree; the value is YAML.

    Raises:
        UserError: no `=`, or a part of the path is not a mapping.
    """
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise UserError(f"override '{override}': expected key=value, e.g. optimizer.lr=3e-4")
    *parents, leaf = path.split(".")
    for i, part in enumerate(parents):
        child = tree.get(part)
        if child is None:
            child = tree[part] = {}
        if not isinstance(child, dict):
            at = ".".join(parents[: i + 1])
            raise UserError(f"override '{override}': {at} is {child!r}, not a section")
        tree = child
    tree[leaf] = _parse(text, f"override '{override}'")


def load_config(name: str, overrides: list[str] | None = None) -> Config:
    """Load and validate a recipe.

    Args:
        name: a path, or a file in configs/.
        overrides: `dotted.key=value`, each stronger than the file.

    Raises:
        UserError: every problem, one line each, with file, key and value.
    """
    path = find_config(name)
    tree = read_yaml(path)
    for override in overrides or []:
        apply_override(tree, override)
    return validate_config(tree, str(path))


def validate_config(tree: Tree, where: str) -> Config:
    """Validate a parsed recipe; `where` names its origin in errors (UserError).

    The modules that it lists under `imports` are imported first: they register mixers of one's own.
    """
    imports = tree.get("imports")
    for module in imports if isinstance(imports, list) else []:
        try:
            importlib.import_module(str(module))
        except ImportError as error:
            raise UserError(f"{where}: imports: cannot import {module}: {error}") from error
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*config_errors(error, tree, Config, where)) from None


def config_errors(
    error: ValidationError, tree: Tree, model: type[StrictModel], where: str
) -> list[str]:
    """Turn a pydantic error into lines `file: key=value: what is wrong`."""
    lines = []
    for item in error.errors():
        keys = [str(part) for part in item["loc"]]
        key = ".".join(keys)
        problem = EXPECTED.get(item["type"], item["msg"].removeprefix("Value error, "))
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, tree, keys[:-1])
            near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            problem = f"unknown key; {hint}"
        for line in problem.splitlines():
            lines.append(f"{where}: {key}{_shown(item)}: {line}" if key else f"{where}: {line}")
    return lines


def _shown(item: Any) -> str:
    value = item["input"]
    if item["type"] == "missing" or isinstance(value, dict | StrictModel):
        return ""
    text = repr(value)
    return f"={text if len(text) <= 60 else text[:57] + '...'}"


def _fields_at(model: type[StrictModel], tree: Any, keys: list[str]) -> list[str]:
    """Return the field names of the config class that validates the mapping at `keys`."""
    annotation: Any = model
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = annotation.model_fields[key].annotation
        if get_origin(annotation) in (Union, UnionType):
            annotation = next(a for a in get_args(annotation) if a is not type(None))
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if isinstance(annotation, type) and issubclass(annotation, Registered):
            tag = tree.get("type") if isinstance(tree, dict) else None
            annotation = annotation.member(tag) or annotation
    return list(annotation.model_fields)
