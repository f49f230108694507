"""What people write a configuration in: YAML files and `--set` assignments, and pydantic's errors as sentences."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dngd.errors import UserError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping. Raises UserError if it cannot be read or is not a mapping."""
    try:
        return parse_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"configuration file {path} cannot be read: {error.strerror}; check the path") from None


def parse_yaml(content: bytes, shown: str) -> dict[str, Any]:
    """Return the mapping in a YAML file's content. shown: the file's name in messages. Raises UserError."""
    try:
        data = yaml.safe_load(content.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration file {shown} is not YAML: {reason}") from None
    if not isinstance(data, dict):
        raise UserError(f"configuration file {shown} holds a {type(data).__name__}; it must be a mapping of fields")
    return data


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
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text!r}: {value!r} is not a YAML value") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    result: dict[str, Any] = parsed
    return result


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a pydantic error as one sentence a field: the value received, what is allowed, the fix."""
    sentences = []
    seen = set()
    for item in error.errors():
        path = _field_path(model, item["loc"])
        name = ".".join(path)
        if item["type"] == "extra_forbidden":
            fields = _fields_at(model, path[:-1])
            near = difflib.get_close_matches(path[-1], fields, n=1, cutoff=0.4)
            hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else "known: " + ", ".join(fields)
            sentence = f"configuration key {name!r} is unknown; {hint}"
        elif item["type"] == "missing":
            sentence = f"{name} is required; give it as --{name.replace('_', '-')} or in the configuration file"
        elif item["type"] == "value_error":
            sentence = item["msg"].removeprefix("Value error, ")
        else:
            message = item["msg"]
            allowed = _fields_at(model, path[:-1]).get(path[-1], "")
            sentence = f"{name}={item['input']!r} is not valid: {message[:1].lower()}{message[1:]} ({allowed})"
        if name in seen:
            continue  # a union reports each branch; the first says enough
        seen.add(name)
        sentences.append(sentence)
    return "; ".join(sentences)


def _field_path(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return a location's field names, without pydantic's tags for the branches of a union."""
    path = []
    for part in location:
        path.append(str(part))
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return path


def _fields_at(model: type[BaseModel], path: list[str]) -> dict[str, str]:
    """Return the field names, with their descriptions, of the section at a path."""
    for part in path:
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return {name: field.description or "" for name, field in model.model_fields.items()}
