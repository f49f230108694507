"""Which column of a node or edge table means what; all that schemas tell is checked here, before a row is read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dngd.errors import UserError
from dngd.graph.arrays import MASK_FORMS
from dngd.graph.id_map import IdKind
from dngd.graph.manifest import MASK_NAMES
from dngd.graph.table_files import Table
from dngd.graph.table_readers import TableFile, check_encoding

Kind = Literal["int", "float", "bool", "string", "list", "empty", "other"]

_NUMBERS: tuple[Kind, ...] = ("int", "float", "bool")
_NUM_LISTED = 20
_PANDAS_INDEX = re.compile(r"|Unnamed: [\d.]+|__index_level_\d+__")
"""What pandas calls the rows' numbers, in CSV files (the second: read and written again) and in Parquet."""


@dataclass(frozen=True)
class TableColumns:
    """Names of the columns of node and edge tables, as the user gives them."""

    id: str = "id"
    label: str | None = None
    """class numbers or names, or lists of 0 and 1, one entry a class (several labels a node); missing values, empty
    names and -1 are unlabelled nodes, and in CSV files what stands for a missing number: NA, N/A, NaN, null and the
    like. None: `label`, if it is there"""
    labels: Sequence[str] = ()
    """several labels a node: a column of 0 and 1 a class, in the order of the classes; in place of label"""
    split: str | None = None
    """train, val (valid, validation) or test, or nothing. None: `split`, else train_mask, val_mask (or valid_mask),
    test_mask of booleans, or 0 and 1, as far as they are there"""
    features: Sequence[str] = ()
    """one list column, or numeric ones. Empty: `features` if that is a list, else all other columns, in their order"""
    ignore: Sequence[str] = ()
    """columns of the node table that are not used"""
    source: str = "src"
    target: str = "dst"
    weight: str | None = None
    """None: `weight`, if it is there; "": edges have no weights"""
    id_type: Literal["auto", "int", "string"] = "auto"
    """auto: as stored; in CSV files whole numbers wherever all ids look like them, without zeros in front"""


@dataclass(frozen=True)
class NodeColumns:
    """What the columns of a node table are."""

    id: str
    label: str | None = None
    label_is_name: bool = False
    """it is read as text; of a CSV file its values tell then whether they are numbers or names"""
    label_is_list: bool = False
    label_is_bool: bool = False
    labels: list[str] = field(default_factory=list)
    """columns of several labels a node; label is None then"""
    split: str | None = None
    masks: dict[str, str] = field(default_factory=dict)
    """train | val | test -> column"""
    features: list[str] = field(default_factory=list)
    is_list: bool = False
    """the one feature column holds lists"""
    left_out: dict[str, str] = field(default_factory=dict)
    """columns that are not used -> why"""

    @property
    def small(self) -> list[str]:
        """All but the features."""
        return [c for c in (self.id, self.label, *self.labels, self.split, *self.masks.values()) if c is not None]


@dataclass(frozen=True)
class EdgeColumns:
    """What the columns of an edge table are."""

    source: str
    target: str
    weight: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """columns that are not used -> why"""

    @property
    def all(self) -> list[str]:
        """Every column that is used."""
        return [c for c in (self.source, self.target, self.weight) if c is not None]


def kind_of(arrow_type: Any) -> Kind:
    """Return what an Arrow type holds; a dictionary (a categorical) is what its values are."""
    import pyarrow.types as t

    if t.is_dictionary(arrow_type):
        return kind_of(arrow_type.value_type)
    if t.is_integer(arrow_type):
        return "int"
    if t.is_floating(arrow_type) or t.is_decimal(arrow_type):
        return "float"
    if t.is_boolean(arrow_type):
        return "bool"
    if t.is_string(arrow_type) or t.is_large_string(arrow_type) or t.is_string_view(arrow_type):
        return "string"
    if t.is_fixed_size_list(arrow_type) or t.is_list(arrow_type) or t.is_large_list(arrow_type):
        return "list"
    return "empty" if t.is_null(arrow_type) else "other"


def node_columns(table: Table, names: TableColumns) -> NodeColumns:
    """Find the columns of a node table; raises UserError if one is missing or of a type that it cannot have."""
    for name in names.ignore:
        _need(table, name, "--ignore-column")
    ignored = set(names.ignore)
    _need(table, names.id, "--id-column")
    labels = _label_columns(table, names, ignored)
    taken = {*ignored, names.id, *labels, *(name for name in (names.label, names.split) if name is not None)}
    label = None if labels else _choose(table, names.label, "label", "--label-column", taken)
    split = _choose(table, names.split, "split", "--split-column", taken)
    found = {
        part: [form for form in MASK_FORMS[part] if _has(table, form) and form not in taken] for part in MASK_NAMES
    }
    masks = {part: forms[0] for part, forms in found.items() if forms}
    twice = next((forms for forms in found.values() if len(forms) > 1), None)
    if twice is not None and split is None:
        raise UserError(
            f"{table.shown} tells a part of its split twice, by {' and '.join(twice)}; leave one out, say by "
            f"--ignore-column {twice[1]}"
        )
    mask_forms = [form for forms in found.values() for form in forms]
    _one_use(
        table,
        [
            ("the node ids (--id-column)", [names.id]),
            ("the label (--label-column)", [label]),
            ("a label (--label-columns)", labels),
            ("the split (--split-column)", [split]),
            ("a mask", mask_forms),
            ("a feature (--feature-column)", names.features),
        ],
    )
    _one_use(table, [("a feature (--feature-column)", names.features), ("left out (--ignore-column)", names.ignore)])
    if split is not None and masks and names.split is None:
        raise UserError(
            f"{table.shown} tells its split twice, by {split!r} and {', '.join(masks.values())}; choose by "
            f"--split-column {split}, or leave it out by --ignore-column {split}"
        )
    has_label = label is not None or bool(labels)
    features, is_list = _features(table, names, {*taken, label, split, *mask_forms}, has_label=has_label)
    for usual, used in (("label", label), ("split", split)):
        if usual in features and usual not in names.features and used is not None:
            raise UserError(
                f"{table.shown} tells its {usual} twice, by {usual!r} and by --{usual}-column {used}; leave one out, "
                f"{usual!r} by --ignore-column {usual}, or choose the features by --feature-column"
            )
    if split is not None:
        masks = {}
    _expect(
        table,
        [label],
        (*_NUMBERS, "string", "list"),
        "a label is a number or name, one for each node, or a list of 0 and 1: cast it, to a string say, or choose "
        "another by --label-column",
    )
    _expect(table, labels, _NUMBERS, "of several labels a node each column holds 0 and 1")
    _expect(table, [split], ("string",), "a split is train, val or test")
    _expect(table, list(masks.values()), _NUMBERS, "a mask is true or false for each node")
    for name in masks.values():
        _need(table, name, "--ignore-column")
    label_kinds = _kinds(table, label) if label is not None else set()
    if "string" in label_kinds and label_kinds != {"string"} and table.files[0].format != "csv":
        raise UserError(
            f"column {label!r} of {table.shown} holds numbers in some files and names in others; give one kind"
        )
    if label is not None and "list" in label_kinds:
        _expect(table, [label], ("list", "empty"), "labels are one list of 0 and 1 in each file, or a number in each")
        rule = "labels are lists of 0 and 1, one entry a class: make it so, or a column of 0 and 1 for each class"
        _expect_list_of_numbers(table, label, rule + " (--label-columns)")
    in_use = {names.id, label, *labels, split, *masks.values(), *features}
    return NodeColumns(
        id=names.id,
        label=label,
        label_is_name="string" in label_kinds or (label is not None and table.files[0].format == "csv"),
        label_is_list="list" in label_kinds,
        label_is_bool=label_kinds == {"bool"},
        labels=labels,
        split=split,
        masks=masks,
        features=features,
        is_list=is_list,
        left_out={name: _reason(name, names, features, split) for name in _names(table) if name not in in_use},
    )


def edge_columns(table: Table, names: TableColumns) -> EdgeColumns:
    """Find the columns of an edge table; raises UserError if one is missing or of a type that it cannot have."""
    _need(table, names.source, "--source-column")
    _need(table, names.target, "--target-column")
    weight = None if names.weight == "" else _choose(table, names.weight, "weight", "--weight-column", set())
    _one_use(
        table,
        [
            ("the source (--source-column)", [names.source]),
            ("the target (--target-column)", [names.target]),
            ("the weight (--weight-column)", [weight]),
        ],
    )
    _expect(table, [weight], _NUMBERS, "a weight is one number for each edge")
    used = {names.source, names.target, weight}
    reasons = {name: "only ends and a weight of edges are used" for name in _names(table) if name not in used}
    return EdgeColumns(names.source, names.target, weight, reasons)


def _reason(name: str, names: TableColumns, features: list[str], split: str | None) -> str:
    """Return why a column of a node table is not used."""
    if name in names.ignore:
        return "--ignore-column"
    if any(name in forms for forms in MASK_FORMS.values()):
        return f"the split is in {split!r}"
    if names.features:
        return "the features are given by --feature-column"
    return f"the features are in {features[0]!r}"


def id_kind(columns: Sequence[tuple[Table, str]], id_type: str) -> IdKind:
    """Return the kind of the ids that the given columns of node and edge tables share.

    CSV ids that look like whole numbers are strings if other ids are, and so are dates, times, true and false; with
    id_type string, all are. Raises UserError if a column holds neither whole numbers nor strings, or kinds differ.
    """
    if id_type not in ("auto", "int", "string"):
        raise UserError(f"--id-type {id_type!r} is not known; give auto, int or string")
    found: dict[IdKind, list[tuple[TableFile, str, Any]]] = {"int": [], "string": []}
    other_kinds: list[tuple[TableFile, str, Any]] = []
    for table, name in columns:
        for file, schema in _typed(table):
            arrow_type = schema.field(name).type
            check_encoding(file, name, arrow_type)
            kind = kind_of(arrow_type)
            is_text = file.format == "csv" and kind not in ("int", "float", "empty") and id_type == "auto"
            if is_text or (file.format == "csv" and id_type == "string"):
                found["string"].append((file, name, arrow_type))
            elif kind == "int" or kind == "string":
                found[kind].append((file, name, arrow_type))
            elif kind != "empty":
                other_kinds.append((file, name, arrow_type))
    for file, name, arrow_type in other_kinds:
        # Fractions of a CSV file are text if other ids are.
        if file.format != "csv" or not found["string"]:
            fix = ", or read them as strings by --id-type string" if file.format == "csv" else ""
            raise UserError(
                f"column {name!r} of {file.shown} has type {arrow_type}, but node ids are whole numbers or strings: "
                f"cast it (pandas turns whole numbers with missing values into floats){fix}"
            )
    if id_type == "int" or id_type == "string":
        return "int" if id_type == "int" else "string"
    fixed = [entry for entry in found["int"] if entry[0].format != "csv"]
    if found["string"] and fixed:
        (file, name, one), (other_file, other_name, other) = fixed[0], found["string"][0]
        raise UserError(
            f"column {name!r} of {file.shown} has type {one} but column {other_name!r} of {other_file.shown} has type "
            f"{other}; give all node ids one type, or read all as strings by --id-type string"
        )
    return "string" if found["string"] else "int"


def csv_types(table: Table, used: NodeColumns | EdgeColumns) -> dict[str, Any]:
    """Return the types to read CSV columns as.

    Numbers are float64, however the beginning of a file looks: later lines may hold fractions or nothing. Ids and
    labels are text: whether they are numbers is known once all are read. So are masks, which may be blank for long.
    """
    import pyarrow as pa

    text = pa.large_string()
    if isinstance(used, EdgeColumns):
        types = {used.source: text, used.target: text}
        numbers = [used.weight]
    else:
        words = (used.id, used.split, used.label, *used.masks.values())
        types = {name: text for name in words if name is not None}
        numbers = [*used.features, *used.labels]
    for name in numbers:
        if name is not None:
            types[name] = pa.bool_() if _kinds(table, name) == {"bool"} else pa.float64()
    return types


def _label_columns(table: Table, names: TableColumns, ignored: set[str]) -> list[str]:
    """Return the columns of several labels a node; empty for one label, or a list of them."""
    labels = list(names.labels)
    if not labels:
        return []
    if len(labels) == 1:
        raise UserError(
            f"--label-columns names {labels[0]!r} alone, which makes one label a node; give it as --label-column"
        )
    _refuse_repeated(labels, "--label-columns")
    for name in labels:
        _need(table, name, "--label-columns")
    if names.label is not None:
        raise UserError(
            f"--label-column {names.label} and --label-columns are both given; give the first for one label a node, or "
            "the second for several"
        )
    if "label" not in (*labels, *ignored) and _has(table, "label"):
        raise UserError(
            f"{table.shown} tells its labels twice, by 'label' and by --label-columns; leave one out, 'label' by "
            "--ignore-column label"
        )
    return labels


def _features(table: Table, names: TableColumns, taken: set[str | None], *, has_label: bool) -> tuple[list[str], bool]:
    schemas = [schema for _, schema in _typed(table)]
    chosen = list(names.features)
    _refuse_repeated(chosen, "--feature-column")
    if not chosen and "features" not in taken and _kinds(table, "features") == {"list"}:
        chosen = ["features"]
    for name in chosen:
        _need(table, name, "--feature-column")
    if len(chosen) == 1 and "list" in _kinds(table, chosen[0]):
        _expect(table, chosen, ("list", "empty"), "features are one list in each file, or numbers in each")
        _expect_list_of_numbers(table, chosen[0], "features are lists of numbers: cast it")
        return chosen, True
    if not chosen:
        chosen = [name for name in (schemas[0].names if schemas else []) if name not in taken]
        for name in chosen:
            _need(table, name, "--ignore-column")
            if _PANDAS_INDEX.fullmatch(name):
                raise UserError(
                    f"column {name!r} of {table.shown} has a name that pandas gives to row numbers, which are no "
                    f"feature; leave it out by --ignore-column {name!r}, or choose the features by --feature-column"
                )
        for file, schema in _typed(table):
            extra = [name for name in schema.names if name not in taken and name not in chosen]
            if extra:
                raise UserError(
                    f"{file.shown} has the column {extra[0]!r} that {table.files[0].shown} lacks; give all files the "
                    "same columns, or choose the features by --feature-column"
                )
    _expect_numbers(table, chosen, is_chosen=bool(names.features), has_label=has_label)
    return chosen, False


def _expect_numbers(table: Table, features: list[str], *, is_chosen: bool, has_label: bool) -> None:
    """Raise UserError if feature columns hold something else. is_chosen: they were given by --feature-column.

    has_label: another column is the label, so that none of these is it.
    """
    for file, schema in _typed(table):
        types = {name: schema.field(name).type for name in features}
        for name, arrow_type in types.items():
            check_encoding(file, name, arrow_type)
        wrong = [name for name, arrow_type in types.items() if kind_of(arrow_type) not in (*_NUMBERS, "empty")]
        if not wrong:
            continue
        first = f"column {wrong[0]!r} of {file.shown} has type {types[wrong[0]]}; features are numbers"
        flags = " ".join(f"--ignore-column {shlex.quote(name)}" for name in wrong[:_NUM_LISTED])
        if is_chosen:
            raise UserError(f"{first}: cast it, or leave it out of --feature-column")
        lists = [name for name in wrong if kind_of(types[name]) == "list"]
        fix = "choose the features by --feature-column"
        if lists:
            fix = f"take a list alone as features by --feature-column {shlex.quote(lists[0])}"
        if not has_label:
            fix += ", and the label by --label-column if it is among them"
        if len(wrong) == 1:
            fix = fix.replace("among them", "this one")
            raise UserError(f"{first}: leave the column out by {flags}, or {fix}")
        shown = ", ".join(f"{name!r} ({types[name]})" for name in wrong[:_NUM_LISTED])
        more = f" and {len(wrong) - _NUM_LISTED} more" if len(wrong) > _NUM_LISTED else ""
        raise UserError(
            f"columns {shown}{more} of {file.shown} hold no numbers, as features are: leave them out by {flags}, or "
            f"{fix}"
        )


def _expect_list_of_numbers(table: Table, name: str, rule: str) -> None:
    widths: dict[int, TableFile] = {}
    for file, schema in _typed(table):
        arrow_type = schema.field(name).type
        if kind_of(arrow_type) == "empty":
            continue
        if kind_of(arrow_type.value_type) not in _NUMBERS:
            raise UserError(f"column {name!r} of {file.shown} has type {arrow_type}; {rule}")
        if getattr(arrow_type, "list_size", None) is not None:
            widths.setdefault(arrow_type.list_size, file)
    if len(widths) > 1:
        (one, file), (other, other_file) = list(widths.items())[:2]
        raise UserError(
            f"column {name!r} has {one} numbers a row in {file.shown} but {other} in {other_file.shown}; give every "
            "row the same number"
        )


def _choose(table: Table, name: str | None, default: str, option: str, ignored: set[str]) -> str | None:
    """Return the column to use: the named one, which must be there, or the default one if it is there."""
    if name is not None:
        _need(table, name, option)
        return name
    if default in ignored or not _has(table, default):
        return None
    _need(table, default, option)
    return default


def _refuse_repeated(names: list[str], option: str) -> None:
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{option} names {repeated[0]!r} {names.count(repeated[0])} times; name it once")


def _one_use(table: Table, uses: Sequence[tuple[str, Iterable[str | None]]]) -> None:
    """Raise UserError if a column has two of these uses, each given as what it is and the columns for it."""
    known: dict[str, str] = {}
    for use, columns in uses:
        for name in columns:
            if name is not None and known.setdefault(name, use) != use:
                raise UserError(
                    f"column {name!r} of {table.shown} is taken as {known[name]} and as {use}; give it for one of the "
                    "two, and another column for the other"
                )


def _kinds(table: Table, name: str) -> set[Kind]:
    """Return the kinds that a column has in the files that have it, where it is not empty."""
    schemas = [schema for _, schema in _typed(table) if name in schema.names]
    return {kind_of(schema.field(name).type) for schema in schemas} - {"empty"}


def _names(table: Table) -> list[str]:
    """Return the names of all columns, each once, in their order."""
    return list(dict.fromkeys(name for _, schema in _typed(table) for name in schema.names))


def _has(table: Table, name: str) -> bool:
    return any(name in schema.names for _, schema in _typed(table))


def _need(table: Table, name: str, option: str) -> None:
    for file, schema in _typed(table):
        count = schema.names.count(name)
        if count > 1:
            raise UserError(f"{file.shown} has {count} columns {name!r}; give each column a name of its own")
        if count == 0:
            listed = ", ".join(schema.names[:_NUM_LISTED]) or "none"
            more = f" and {len(schema.names) - _NUM_LISTED} more" if len(schema.names) > _NUM_LISTED else ""
            # One column whose name holds a delimiter is most often several.
            between = next((mark for mark in ";\t|, " if mark in listed), None) if len(schema.names) == 1 else None
            fix = f"choose another by {option}"
            if between is not None and file.format == "csv":
                fix += f", or give --delimiter {between!r} if that is between its values"
            raise UserError(f"{file.shown} has no column {name!r} (it has: {listed}{more}); {fix}")


def _expect(table: Table, names: Sequence[str | None], kinds: Sequence[Kind], rule: str) -> None:
    for file, schema in _typed(table):
        for name in names:
            if name is None:
                continue
            arrow_type = schema.field(name).type
            check_encoding(file, name, arrow_type)
            if kind_of(arrow_type) not in (*kinds, "empty"):
                raise UserError(f"column {name!r} of {file.shown} has type {arrow_type}; {rule}")


def _typed(table: Table) -> list[tuple[TableFile, Any]]:
    """Return the files that have a schema, with it."""
    return [(file, schema) for file, schema in zip(table.files, table.schemas()) if schema is not None]
