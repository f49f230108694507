"""What people write a configuration in: YAML files and `--set` assignments, and pydantic's errors as sentences."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard

import yaml
from pydantic import BaseModel, ValidationError

from dngd.errors import UserError
from dngd.paths import expanded
from dngd.yaml_text import NOT_YAML, BoundedLoader, RefusedError, load


class _Loader(BoundedLoader):
    """As in YAML 1.2, and in flags, 010 is ten, not eight, and 1:30 a text, not ninety. 1e9, a number there, stays a
    text as in YAML 1.1: fields of numbers take it for one (config.py), and in a field of texts it is as it was typed.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Raise RefusedError for a key that is there twice, of which YAML would take the last."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and name in lines:
                raise RefusedError(
                    f"has the key {_cut(key.value)!r} twice, in lines {lines[name]} and {line}; keep one"
                )
            if isinstance(key, yaml.ScalarNode):
                lines[name] = line
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        """Return an integer, or the text of what only YAML 1.1 reads as one."""
        text = str(self.construct_scalar(node))
        if ":" in text:
            return text
        is_decimal = text.lstrip("+-").replace("_", "").isdecimal()
        return int(text.replace("_", "")) if is_decimal else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        """Return a number, or the text of what only YAML 1.1 reads as one."""
        text = str(self.construct_scalar(node))
        return text if ":" in text else super().construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping. Raises UserError if it cannot be read or is not a mapping."""
    try:
        return parse_yaml(expanded(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(
            f"configuration file {path} cannot be read: {error.strerror}; give the path of a YAML file"
        ) from None


def parse_yaml(content: bytes, shown: str, fix: str = "mend it there, or give another file") -> dict[str, Any]:
    """Return the mapping in a YAML file's content. shown: the file's name in messages. Raises UserError."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise UserError(f"configuration file {shown} is no text in UTF-8, as YAML is; {fix}") from None
    try:
        data = load(text, _Loader)
    except RefusedError as error:
        raise UserError(f"configuration file {shown} {error}") from None
    except NOT_YAML as error:
        raise UserError(f"configuration file {shown} is not YAML: {_reason(error)}; {fix}") from None
    _check_keys(data, f"configuration file {shown}")
    if data is None:
        raise UserError(f"configuration file {shown} is empty; {fix}")
    if not isinstance(data, dict):
        kind = {"list": "a list", "str": "one text"}.get(type(data).__name__, "one value")
        raise UserError(f"configuration file {shown} holds {kind}, not fields as in 'hidden: 64'; {fix}")
    return data


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown(value: object, write: Callable[[object], str] = repr) -> str:
    """Return a value as `write` writes it, cut to a line of a message."""
    try:
        return _cut(write(value))
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; aliases of aliases, thousands deep
        return f"({'a number of thousands of digits' if isinstance(value, int) else 'values nested thousands deep'})"


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said = " ".join(str(error).split())
    return f"a value cannot be read ({said}); quote what is text but looks like a date or a number"


def _check_keys(data: object, shown: str) -> None:
    """Raise UserError for a key at any depth that is no string."""
    seen: set[int] = set()  # aliases may lead to one part many times over
    waiting = [data]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict | list) or id(part) in seen:
            continue
        seen.add(id(part))
        waiting += part.values() if isinstance(part, dict) else part
        for key in part if isinstance(part, dict) else ():
            if not isinstance(key, str):
                quoted = "YAML reads on, off, yes and no as true and false: quote" if isinstance(key, bool) else "quote"
                raise UserError(f"{shown} has the key {_shown(key)}, which is no text; {quoted} it, or remove it")


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return base with overrides laid over it, nested mappings merged."""
    out = dict(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def parse_assignment(text: str) -> dict[str, Any]:
    """Return `{"kfac": {"damping": 0.01}}` for "kfac.damping=0.01"; the value is read as YAML.

    Raises UserError if there is no '='.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text!r} is not key=value; write e.g. --set kfac.damping=0.01")
    try:
        parsed = load(value, _Loader)
    except RefusedError as error:
        raise UserError(f"--set {_cut(text)!r} {error}") from None
    except NOT_YAML as error:
        # Where in the text YAML's own errors are is of no use in one that is this short.
        reason = "" if isinstance(error, yaml.YAMLError) else f": {_reason(error)}"
        raise UserError(f"--set {_cut(text)!r}: {_cut(value)!r} is not a YAML value{reason}") from None
    _check_keys(parsed, f"--set {_cut(text)!r}")
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    result: dict[str, Any] = parsed
    return result


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a pydantic error as one sentence a field: the value received, what is allowed, the fix."""
    sentences: dict[str, str] = {}
    for item in error.errors():
        path = _field_path(model, item["loc"])
        # A union reports each branch; the first says enough.
        sentences.setdefault(".".join(path), _sentence(item["type"], item["msg"], item["input"], path, model))
    return "; ".join(sentences.values())


def _sentence(kind: str, message: str, value: object, path: list[str], model: type[BaseModel]) -> str:
    """Return what is wrong with the field at a path, and the fix; an error without a path says it itself."""
    name = ".".join(path)
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "missing":
        return f"{name} is required; give it as --{name.replace('_', '-')} or in the configuration file"
    fields = _fields_at(model, path[:-1])
    if kind == "extra_forbidden":
        section, _, inner = path[-1].partition(".")
        if inner and section in fields:
            hint = f"in a file it is nested: {section}: {{{inner}: {_shown(value, str)}}}"
        else:
            known = _names_below(model, path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
            hint = f"did you mean {known[near[0]]}?" if near else "known: " + ", ".join(fields)
        return f"configuration key {_cut(name)!r} is unknown; {hint}"
    if kind in ("string_type", "path_type") and not isinstance(value, dict | list | bool | NoneType):
        shown = _shown(value, str)
        return f"{name}={shown} is not valid: it is no text; put it in quotes, as in --set '{name}=\"{shown}\"'"
    if kind == "model_type":
        return f"{name}={_shown(value)} is not valid: it is a group of fields; set each by its name, {name}.KEY=VALUE"
    allowed = fields.get(path[-1], "")
    message = re.sub(r"\b10{8,}\b", lambda found: f"1e{len(found[0]) - 1}", message)
    return f"{name}={_shown(value)} is not valid: {message[:1].lower()}{message[1:]} ({allowed})"


def _field_path(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return a location's field names, without pydantic's tags for the branches of a union."""
    path = []
    for part in location:
        path.append(str(part))
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not _is_section(annotation):
            break
        model = annotation
    return path


def _names_below(model: type[BaseModel], path: list[str]) -> dict[str, str]:
    """Return the dotted names of the fields of the section at a path, and of those of the sections in it, by their last
    parts."""
    section = _section_at(model, path)
    names = {name: ".".join([*path, name]) for name in section.model_fields}
    for outer, field in section.model_fields.items():
        if _is_section(field.annotation):
            names = {inner: ".".join([*path, outer, inner]) for inner in field.annotation.model_fields} | names
    return names


def _fields_at(model: type[BaseModel], path: list[str]) -> dict[str, str]:
    """Return the field names, with their descriptions, of the section at a path."""
    return {name: field.description or "" for name, field in _section_at(model, path).model_fields.items()}


def _section_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if _is_section(annotation):
            model = annotation
    return model


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
