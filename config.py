"""One YAML file a run, `key=value` overrides, frozen dataclasses. No misspelled key becomes a default.

    python train_rl.py --config configs/tiny.yaml seed=1 agent.max_new_tokens=96
    python train_rl.py --help                 every key with its type, its default and its comment

The file holds one section per script, and a `common` section from which each script takes the keys
that it declares. Mappings merge key by key; later ones win: defaults, common, section, command line.

    common:   {run: tiny, seed: 0, agent: {max_new_tokens: 96}}
    train_rl: {steps: 30, agent: {thought: short}}

A script declares its section as a dataclass, whose fields may be dataclasses again. Types of fields:
int, float, bool, str, Literal[...], tuple[X, ...], tuple[X, Y], list[X], dict, dict[X, Y], and unions of these.
"""

import ast
import contextlib
import difflib
import inspect
import io
import json
import math
import os
import signal
import sys
import textwrap
import tokenize
import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml


class UserError(Exception):
    """Something the user can fix. The message is one line: which key, what is wrong, the fix."""


# ---- load ----------------------------------------------------------------------------------------


def load(cls, section, argv=None):
    """An instance of the dataclass `cls` from `--config FILE key=value ...` (default: sys.argv).

    Raises UserError for anything wrong with the file, a key, a value, or a combination of keys (a
    ValueError from the dataclass's __post_init__). `--help` prints every key and exits.
    """
    argv, path, overrides = list(sys.argv[1:] if argv is None else argv), None, {}
    while argv:
        arg = argv.pop(0)
        if arg in ("-h", "--help"):
            print(help_text(cls, section))
            sys.exit(0)
        elif arg == "--config" and argv:
            path = argv.pop(0)
        elif arg.startswith("-") or "=" not in arg:
            raise UserError(f"{arg}: not understood; write --config FILE, key=value or --help")
        else:  # agent.max_steps=5 becomes {agent: {max_steps: 5}}
            key, text = arg.split("=", 1)
            override = _parse(text, key)
            for name in reversed(key.split(".")):
                override = {name: override}
            overrides = _merge(overrides, override)
    common, own = _read(path, section) if path else ({}, {})
    names = {field.name for field in fields(cls)}
    for key in common.keys() - names:  # another script's key, unless it looks like a slip of ours
        near = _nearest(key, names - common.keys() - own.keys() - overrides.keys(), cutoff=0.75)
        if near:
            raise UserError(f"{path}: common.{key}: unknown key; did you mean {near!r}?")
    values = _check(cls, {k: v for k, v in common.items() if k in names}, f"{path}: common")
    values = _merge(values, _check(cls, own, f"{path}: {section}"))
    values = _merge(values, _check(cls, overrides, "command line"))
    return _build(cls, values, section)


def _read(path, section):
    """The mappings `common` and `section` of a file."""
    try:
        sections = _parse(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    found = list(map(str, sections)) if isinstance(sections, dict) else []
    if section not in found:
        raise UserError(f"{path}: no section {section!r} among {found}; add `{section}: {{}}`")
    pair = [sections.get(name) or {} for name in ("common", section)]
    if not all(isinstance(content, dict) for content in pair):
        raise UserError(f"{path}: common and {section} must hold `key: value` lines")
    return pair


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice; YAML itself keeps the last one, silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _parse(text, where):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        line = f" line {mark.line + 1}:" if mark and "\n" in text else ""
        raise UserError(f"{where}:{line} {problem}") from None


# ---- check and build -----------------------------------------------------------------------------


def _check(kind, value, where):
    """`value` (from YAML) as the type `kind`. A dataclass stays a dict, of checked values."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = dict(_hints(kind))
        for key in value.keys() - hints.keys():
            near = _nearest(key, hints)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(hints)}"
            raise UserError(f"{where}.{key}: unknown key; {hint}")
        return {key: _check(hints[key], v, f"{where}.{key}") for key, v in value.items()}
    if origin in (Union, types.UnionType):
        for arm in args:
            try:
                return _check(arm, value, where)
            except UserError:
                if is_dataclass(arm) and isinstance(value, dict):
                    raise  # this arm was meant: its own message is the better one
    elif kind is float and type(value) in (int, float, str):
        try:  # text too: YAML 1.1 reads 1e-6, which has no dot, as text
            if not math.isnan(float(value)):
                return float(value)
        except (ValueError, OverflowError):
            pass
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin in (tuple, list) and isinstance(value, list):
        any_length = origin is list or args[-1] is Ellipsis
        kinds = args[:1] * len(value) if any_length else args
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value))
            return origin(_check(item, v, f"{where}[{i}]") for i, (item, v) in items)
    elif origin is dict and isinstance(value, dict):
        return {_check(args[0], k, where): _check(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif type(value) is kind:
        return value
    quote = "; quote what is text" if "str" in _spell(kind) and value is not None else ""
    raise UserError(f"{where}: expected {_spell(kind)}, got {value!r:.60}{quote}")


def _build(cls, values, where, base=None):
    """The dataclass: checked `values` over `base`, an instance, or over the fields' defaults."""
    arguments, defaults = {}, _defaults(cls, base)
    for name, kind in _hints(cls):
        value, default = values.get(name, defaults[name]), defaults[name]
        if value is MISSING:
            raise UserError(f"{where}.{name}: missing; set it in the file or as {name}=VALUE")
        if isinstance(value, dict) and _nested(kind):
            value = _build(_nested(kind), value, f"{where}.{name}", default)
        arguments[name] = _merge(default, value)
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _hints(cls):
    """[(field name, its type)]"""
    hints = get_type_hints(cls)
    return [(field.name, hints[field.name]) for field in fields(cls)]


def _defaults(cls, base=None):
    """{field name: its value in `base`, when that is an instance, or its default, or MISSING}"""
    if is_dataclass(base):
        return {field.name: getattr(base, field.name) for field in fields(cls)}
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory()
            for f in fields(cls)}  # fmt: skip


def _nested(kind):
    """The dataclass in a type `X` or `X | None`, else None."""
    return next((arm for arm in (kind, *get_args(kind)) if is_dataclass(arm)), None)


def _merge(old, new):
    """`new` over `old`; where both are mappings, key by key."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}


def _nearest(key, names, cutoff=0.6):
    return next(iter(difflib.get_close_matches(str(key), names, 1, cutoff)), None)


def _spell(kind):
    return "mapping" if is_dataclass(kind) else inspect.formatannotation(kind).replace("typing.", "")


# ---- show and save -------------------------------------------------------------------------------


def help_text(cls, section):
    """The script's docstring, then each key with type, default and the comment of its field."""
    script = (sys.modules[cls.__module__].__doc__ or "").strip()
    return "\n".join([script, "", f"Keys of `{section}`, or of `common`:", *_help_rows(cls)])


def _help_rows(cls, prefix="", base=None):
    rows, comments, defaults = [], _comments(cls), _defaults(cls, base)
    for name, kind in _hints(cls):
        if _nested(kind):
            rows += _help_rows(_nested(kind), f"{prefix}{name}.", defaults[name])
            continue
        default = "required" if defaults[name] is MISSING else f"default {defaults[name]}"
        rows.append(f"  {prefix}{name}  ({_spell(kind)}, {default})")
        rows += textwrap.wrap(" " * 6 + comments[name], 96, subsequent_indent=" " * 6)
    return rows


def _comments(cls):
    """{field: the comment behind it, continued by comment lines that are indented deeper}"""
    found = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            line, text = node.end_lineno, []
            while line in comments and comments[line].start[1] > node.col_offset:
                text.append(comments[line].string.lstrip("# "))
                line += 1
                if line in comments and not comments[line].line.lstrip().startswith("#"):
                    break  # that is the next field's comment
            found[node.target.id] = " ".join(text)
    return found


def to_dict(cfg):
    """The resolved configuration as nested dicts and lists, ready for YAML and JSON."""
    return json.loads(json.dumps(asdict(cfg)))  # the round trip turns tuples into lists


def save(cfg, path, section=None):
    """Write the resolved configuration as YAML; under `section`, as a file that `load` reads back."""
    document = to_dict(cfg) if section is None else {section: to_dict(cfg)}
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")
    temporary.replace(path)


# ---- the frame of every script -------------------------------------------------------------------


@contextlib.contextmanager
def user_error():
    """Turn a ValueError of the block (a model that is not covered, a dtype that cannot be) into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def main(fn, user_errors=(), resume="the same command continues from the last saved step"):
    """Run a script's main function `fn()`. Exits with 2 for what the user can fix (UserError and the
    types in `user_errors`), 130 after Ctrl-C, 143 after SIGTERM, each with one line on stderr. Any
    other error keeps its traceback.
    """
    name = os.path.basename(sys.argv[0])
    if os.environ.get("RANK", "0") != "0":
        name = f"[rank {os.environ['RANK']}] {name}"

    def stop(signum, frame=None):
        print(f"\n{name}: {signal.Signals(signum).name}; {resume}", file=sys.stderr)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        fn()
    except (UserError, *user_errors) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        stop(signal.SIGINT)
