"""From YAML files and `--set a.b=c` to one frozen `Config`, or to one error with its remedy."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megavideo.config.schema import Config

Tree = dict[str, Any]


def load_config(files: Sequence[str | Path], assignments: Sequence[str] = ()) -> Config:
    """Compose `files`, apply `assignments` (each `section.key=value`) and check the result.

    Raises:
        ValueError: with the key's path, its value, where it came from and the remedy.
    """
    tree, origin = _compose([Path(file) for file in files])
    for assignment in assignments:
        path, value = _parse_assignment(assignment)
        _assign(tree, path, value, assignment)
        origin[path] = f"--set {assignment}"
    try:
        # Through JSON, because strict validation of Python objects refuses a list for a tuple.
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ValueError(_explain(error, origin)) from None


def dump_config(config: Config) -> str:
    """`config` as YAML that `load_config` reads back to an equal value."""
    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def _compose(files: list[Path]) -> tuple[Tree, dict[str, str]]:
    tree: Tree = {}
    origin: dict[str, str] = {}
    for file in files:
        for path, value in leaves(_read(file)):
            if path in origin:
                raise ValueError(
                    f"{path} is set in both {origin[path]} and {file}; "
                    "remove one, or override it with --set"
                )
            origin[path] = str(file)
            _assign(tree, path, value, str(file))
    return tree, origin


def _read(file: Path) -> Tree:
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {file}; the shipped ones are in configs/")
    try:
        content = YAML(typ="safe", pure=True).load(file)
    except YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold sections such as `model:`, not {content!r}")
    return content


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's path, as `recipe.steps`, and value."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def _parse_assignment(assignment: str) -> tuple[str, Any]:
    path, equals, text = assignment.partition("=")
    if not equals or "." not in path:
        raise ValueError(f"--set {assignment}: write section.key=value, as --set recipe.steps=100")
    try:
        return path, YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(
            f"--set {assignment}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None


def _assign(tree: Tree, path: str, value: Any, source: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{path} (from {source}): {parent} is a value, not a section")
    if value == {}:
        tree.setdefault(last, {})  # a section without settings takes none away
    else:
        tree[last] = value


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    return "; ".join(_explain_one(detail, origin) for detail in error.errors())


def _explain_one(detail: Any, origin: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    place = next((f" ({origin[key]})" for key in origin if f"{key}.".startswith(f"{path}.")), "")
    if detail["type"] == "extra_forbidden":
        return f"unknown key {path}={detail['input']!r}{place}; {_nearest_key(path)}"
    if detail["type"] == "missing":
        return f"{path} is not set; name a file that sets it, or use --set {path}=..."
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    wish = detail["msg"].removeprefix("Input should be ")
    return f"{path}={detail['input']!r}{place}: use {wish}"


def _nearest_key(path: str) -> str:
    *parents, last = path.split(".")
    section: type[BaseModel] = Config
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    keys = list(section.model_fields)
    near = difflib.get_close_matches(last, keys, n=1)
    return f"did you mean {'.'.join([*parents, near[0]])}?" if near else f"use {', '.join(keys)}"
