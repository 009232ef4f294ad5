"""What the annotations of a model's ``run`` ask for: checks of its input and args, and JSON schemas for its callers.

A value comes from ``codec.decode``, so ``type`` recognizes it. Nothing is imported that the model has not imported:
pydantic's models are recognized by their base class.
"""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import difflib
import enum
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin

import numpy as np

from model_interface import ModelInterface
from tiny_model_server import codec
from tiny_model_server.errors import InvalidInput, message_of

MAX_SCHEMA = 1 << 18
"""Characters of the JSON of a model's schemas."""
_MOST_PROBLEMS = 5  # that one message names
_LONGEST_NOUN = 300
_LISTS = (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_STREAMS = (abc.Iterator, abc.Generator, abc.AsyncIterator, abc.AsyncIterable, abc.AsyncGenerator)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_UNIONS = (Union, getattr(types, "UnionType", Union))
_Wheres = tuple[Any, ...]  # the keys and indices that lead to a value
_Seen = dict[tuple[int, int], Any]  # what a union has found for a value, by the ids of both


def _same(value: Any, seen: Any = None) -> Any:
    return value


@dataclasses.dataclass
class Type:
    """What one annotation asks of a value."""

    noun: str
    schema: dict[str, Any]
    kinds: tuple[type, ...] = ()
    """The classes that its values have; empty if they may have any."""
    convert: Callable[[Any, _Seen], Any] = _same
    """Returns what the model gets for a value of one of these classes; raises _Wrong."""

    def fits(self, value: Any) -> bool:
        """Whether the value is of one of these classes."""
        return not self.kinds or type(value) in self.kinds


class Types(NamedTuple):
    """What the annotations of a model ask for."""

    data: Callable[[Any], Any]
    """What ``run`` gets for an input; InvalidInput names the field that is wrong."""
    args: Callable[[Any], Any]
    """The same for the args of a call."""
    schema: dict[str, Any]
    """JSON schemas of "data", "args" and "answer", {} for what may be anything; empty if all may be."""
    metadata: dict[str, list[dict[str, Any]]]
    """The "inputs" and "outputs" as a model's ``metadata`` describes tensors, if all are arrays or texts."""
    problems: list[str]
    """What was not understood, and is not checked."""


class _Wrong(Exception):
    """Problems of a value, each (where in it, what)."""

    def __init__(self, *problems: tuple[_Wheres, str]) -> None:
        self.problems = problems[:_MOST_PROBLEMS]


def types_of(plugin: type[ModelInterface]) -> Types:
    """What ``run`` asks for, or ``run_batch`` where ``run`` does not say. What is not understood is a problem.

    The names of parameters don't matter, their order does.
    """
    problems: list[str] = []
    data, args, answer = _annotations(plugin, "run", problems)
    if plugin.run_batch is not ModelInterface.run_batch:
        items, batch_args, _ = _annotations(plugin, "run_batch", problems)
        item = [*get_args(items), Any][0] if get_origin(items) in _LISTS else Any
        data, args = (item if data is Any else data), (batch_args if args is Any else args)
    readers = {"data": _Reader(), "args": _Reader(), "answer": _Reader("serialization")}
    found = {name: readers[name].read(one) for name, one in {"data": data, "args": args, "answer": answer}.items()}
    if found["args"].schema.get("type", "object") != "object" or found["args"].schema == {"type": "object"}:
        found["args"] = ANYTHING  # args are an object in any case
    problems += [f"{name} of run: {one}" for name in ("data", "args") for one in readers[name].problems]
    schemas = {name: readers[name].schema(one) for name, one in found.items()}
    tensors = {"inputs": _tensors(schemas["data"]), "outputs": _tensors(schemas["answer"])}
    return Types(
        _checker("data", found["data"]),
        _checker("args", found["args"]),
        _bounded(schemas, problems) if any(schemas.values()) else {},
        {name: tensor for name, tensor in tensors.items() if tensor},
        problems,
    )


def _annotations(plugin: type[ModelInterface], method: str, problems: list[str]) -> list[Any]:
    """The annotations of the first two parameters after self, and of what is returned; Any for those without."""
    found: list[Any] = []
    if not inspect.isroutine(getattr(plugin, method)):  # an object that can be called
        return [Any, Any, Any]
    lazy: Any = sys.modules.get("annotationlib")  # since Python 3.14
    for index in (1, 2, -1):
        try:
            function = inspect.unwrap(getattr(plugin, method))
            bound = isinstance(inspect.getattr_static(plugin, method), (staticmethod, classmethod))
            names = [*["self"] * bound, *function.__code__.co_varnames[: function.__code__.co_argcount]]
            name = "return" if index < 0 else next(iter(names[index:]), "")  # there may be *args alone
            # Each alone, because one may have a name that only a type checker knows.
            written = (
                lazy.get_annotations(function, format=lazy.Format.FORWARDREF) if lazy else function.__annotations__
            )
            holder = type("holder", (), {"__annotations__": {"it": written.get(name, Any)}})
            scope = {name: one for name, one in vars(plugin).items() if isinstance(one, type)} | function.__globals__
            found.append(typing.get_type_hints(holder, scope, include_extras=True)["it"])
        except Exception as error:  # the model's own code may raise anything
            found.append(Any)
            if index > 0:
                problems.append(f"parameter {index} of {method} is not checked: {message_of(error, named=True)}")
    return found


def _checker(name: str, kind: Type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        try:
            return _each([(name, value)], kind, {})[0][1]
        except _Wrong as wrong:
            texts = (f"{'.'.join(str(key)[:60] for key in where)}: {what}" for where, what in wrong.problems)
            raise InvalidInput("; ".join(texts)) from None

    return _same if kind is ANYTHING else check


def _bounded(schemas: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The schemas as values of JSON; none if they are too long, or not JSON."""
    try:
        text = codec.json_only(schemas)
        if len(text) > MAX_SCHEMA:
            raise ValueError(f"they have {len(text)} characters, more than {MAX_SCHEMA}")
        return dict(codec.parse_json(text))
    except Exception as error:
        problems.append(f"callers do not see the JSON schemas: {message_of(error)}")
        return {}


def _tensors(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An array, a text, or an object of several of them, as a model's metadata describes tensors."""
    fields = schema.get("properties", {})
    fields = fields if len(fields) > 1 else {"": schema}
    found = []
    for name, field in fields.items():
        is_text = field.get("type") == "string" and "contentEncoding" not in field
        tensor = {"name": name, "dtype": field.get("x-dtype"), "shape": field.get("x-shape")}
        tensor |= {"dtype": "str", "shape": [1]} if is_text else {}
        found.append({key: value for key, value in tensor.items() if value})
    return found if all("dtype" in tensor for tensor in found) else []


# ---- from annotations to types


class _Reader:
    """Reads annotations, and collects the definitions to which their schemas refer."""

    def __init__(self, mode: str = "validation") -> None:
        """``mode`` is pydantic's: "serialization" for what a model returns."""
        self.problems: list[str] = []
        self._mode = mode
        self._named: dict[Any, Type] = {}
        self._definitions: dict[str, Any] = {}

    def read(self, annotation: Any) -> Type:
        """What the annotation asks for: anything if it is not understood."""
        return self._attempt(self._read, annotation)

    def schema(self, kind: Type) -> dict[str, Any]:
        """The whole schema of the type that was read."""
        name, definitions = str(kind.schema.get("$ref", "")).rpartition("/")[2], dict(self._definitions)
        found: dict[str, Any] = definitions.get(name, kind.schema)
        if f'"#/$defs/{name}"' not in json.dumps(definitions, default=str):
            definitions.pop(name, None)
        return found | ({"$defs": definitions} if definitions else {})

    def _attempt(self, read: Callable[[Any], Type], annotation: Any) -> Type:
        try:
            return read(annotation)
        except Exception as error:  # of the model's code, too
            self.problems.append(f"{message_of(error)}; this part is not checked")
            return ANYTHING

    def _read(self, annotation: Any, metadata: Iterable[Any] = ()) -> Type:
        origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
        if hasattr(annotation, "__metadata__"):  # of Annotated
            return self._read(annotation.__origin__, annotation.__metadata__)
        if arguments and hasattr(origin, "__value__"):  # of an alias with arguments, which NDArray is since numpy 2.5
            return self._read(origin.__value__[arguments], metadata)
        if origin is np.ndarray:
            return _array(annotation, metadata)
        if origin in (Any, object) or isinstance(origin, typing.TypeVar):
            return ANYTHING
        if origin in _SCALARS:
            return _SCALARS[origin]
        if origin in _UNIONS:
            return _union([self.read(one) for one in arguments])
        if str(origin).endswith("Literal"):
            return _choice([(one.value if isinstance(one, enum.Enum) else one, one) for one in arguments])
        if origin in (*_LISTS, *_STREAMS):  # callers who want no stream get the list
            return _list(self.read([*arguments, Any][0]))
        if origin in _MAPPINGS:
            return self._mapping(*arguments or (str, Any))
        return self._class(origin)

    def _class(self, cls: Any) -> Type:
        if hasattr(cls, "__value__"):  # of "type Name = ..."
            return self._name(cls, lambda one: self.read(one.__value__))
        if isinstance(cls, type):
            if issubclass(cls, enum.Enum):
                return _choice([(member.value, member) for member in cls])
            if any(base.__name__ == "BaseModel" and base.__module__.startswith("pydantic.") for base in cls.__mro__):
                return self._pydantic(cls)
            if dataclasses.is_dataclass(cls) or hasattr(cls, "__total__"):
                return self._name(cls, self._fields)
        raise TypeError(f"the annotation {cls!r:.80} is not understood")

    def _name(self, cls: Any, build: Callable[[Any], Type]) -> Type:
        """A type that may contain itself: its schema refers to a definition."""
        if cls not in self._named:
            name = cls.__name__
            while name in self._definitions:
                name += "_"
            self._definitions[name] = {}
            self._named[cls] = kind = Type(name, {"$ref": f"#/$defs/{name}"})
            built = self._attempt(build, cls)
            kind.noun, kind.kinds, kind.convert = built.noun, built.kinds, built.convert
            self._definitions[name] = built.schema
        return self._named[cls]

    def _fields(self, cls: Any) -> Type:
        """A dataclass or a TypedDict."""
        hints = typing.get_type_hints(cls, include_extras=True)
        defaults: dict[str, Any] = {}
        if is_dataclass := dataclasses.is_dataclass(cls):
            parameters = inspect.signature(cls).parameters  # type: ignore[arg-type]
            hints = {name: hints.get(name, Any) for name in parameters}
            defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
            required = hints.keys() - defaults.keys()
        else:
            required = set(cls.__required_keys__)
            hints = {name: _without_required(name, hint, required) for name, hint in hints.items()}
        fields = {name: self.read(hint) for name, hint in hints.items()}
        shown = {name: {"default": one} for name, one in defaults.items() if one is None or type(one) in _SCALARS}
        properties = {name: one.schema | shown.get(name, {}) for name, one in fields.items()}
        schema = {"title": cls.__name__, "type": "object", "properties": properties, "additionalProperties": False}
        schema["required"] = sorted(required)

        def convert(value: Any, seen: _Seen) -> Any:
            missing = sorted(required - value.keys())
            unknown = [key for key in value if key not in fields][:_MOST_PROBLEMS]
            problems = [((key,), _unknown(key, fields)) for key in unknown]
            if problems := problems + [((key,), f"is missing; it must be {fields[key].noun}") for key in missing]:
                raise _Wrong(*problems)
            found = dict(_each(value.items(), fields, seen))
            return _validated(lambda: cls(**found)) if is_dataclass else found

        return Type(f"an object ({cls.__name__})", schema, (dict,), convert)

    def _mapping(self, key: Any, of: Any) -> Type:
        if key not in (str, Any):
            raise TypeError(f"the keys of a JSON object are texts, not {key!r:.80}")
        inner = self.read(of)
        schema = {"type": "object"} | ({"additionalProperties": inner.schema} if inner.schema else {})
        return Type("an object", schema, (dict,), lambda value, seen: dict(_each(value.items(), inner, seen)))

    def _pydantic(self, cls: Any) -> Type:
        validate = getattr(cls, "model_validate", None) or cls.parse_obj  # of pydantic 2 or 1
        try:
            schema = _schema_by_pydantic(cls, self._mode)
            for name, one in (schema.pop("$defs", None) or schema.pop("definitions", {})).items():
                if self._definitions.setdefault(name, one) != one:
                    raise TypeError(f"there are two classes {name!r}")
        except Exception as error:
            schema = {"title": cls.__name__, "type": "object"}
            self.problems.append(f"{cls.__name__} has no JSON schema: {message_of(error)}")
        return Type(f"an object ({cls.__name__})", schema, (), lambda value, seen: _validated(lambda: validate(value)))


def _schema_by_pydantic(cls: Any, mode: str) -> dict[str, Any]:
    if not hasattr(cls, "model_json_schema"):
        return dict(cls.schema(ref_template="#/$defs/{model}"))
    standard = sys.modules["pydantic.json_schema"].GenerateJsonSchema
    # Without this, a field of another class, such as np.ndarray, has no schema, and so its model has none.
    generator = type("Generator", (standard,), {"handle_invalid_for_json_schema": lambda *_: {}})
    return dict(cls.model_json_schema(mode=mode, schema_generator=generator))


def _without_required(name: str, hint: Any, required: set[str]) -> Any:
    """The annotation of a key of a TypedDict without Required and NotRequired, which change ``required``."""
    words: dict[str, Callable[[str], Any]] = {"Required": required.add, "NotRequired": required.discard}
    while (word := str(get_origin(hint)).rpartition(".")[2]) in words:
        words[word](name)
        hint = get_args(hint)[0]
    return hint


def _list(inner: Type) -> Type:
    def convert(value: Any, seen: _Seen) -> Any:
        if inner.convert is _same and (not inner.kinds or {*map(type, value)} <= {*inner.kinds}):
            return value  # a long list of numbers is checked quickly
        return [item for _, item in _each(enumerate(value), inner, seen)]

    return Type("a list", {"type": "array"} | ({"items": inner.schema} if inner.schema else {}), (list,), convert)


def _union(kinds: Sequence[Type]) -> Type:
    """The first type that fits. A value is checked once: nested unions would take time that doubles with each level."""
    noun = " or ".join(dict.fromkeys(kind.noun for kind in kinds))[:_LONGEST_NOUN]

    def convert(value: Any, seen: _Seen) -> Any:
        key = id(value), id(kinds)
        if key not in seen:
            problems: list[tuple[_Wheres, str]] = []
            for kind in filter(lambda kind: kind.fits(value), kinds):
                try:
                    seen[key] = kind.convert(value, seen)
                    break
                except _Wrong as wrong:
                    problems += wrong.problems
            else:
                deepest = max((len(where) for where, _ in problems), default=0)
                best = [one for one in problems if len(one[0]) == deepest]  # of the type that fits best
                seen[key] = _Wrong(*best) if best and type(value) in (dict, list) else _misfit(noun, value)
        if type(seen[key]) is _Wrong:
            raise seen[key]
        return seen[key]

    return Type(noun, {"anyOf": [kind.schema for kind in kinds]}, (), convert)


def _choice(pairs: Sequence[tuple[Any, Any]]) -> Type:
    """One of some JSON values, each (value, what the model gets)."""
    choices = [choice for choice, _ in pairs]
    if not all(type(choice) in (str, int, float, bool, type(None)) for choice in choices):
        raise TypeError(f"the annotation has values that are not JSON: {choices!r:.80}")
    results = {(type(choice), choice): result for choice, result in pairs}  # True == 1
    noun = f"{'one of ' if len(choices) > 1 else ''}{', '.join(map(repr, choices))}"[:_LONGEST_NOUN]

    def convert(value: Any, seen: _Seen) -> Any:
        if (type(value), value) not in results:
            raise _Wrong(((), f"must be {noun}"))
        return results[type(value), value]

    return Type(noun, {"enum": choices}, tuple(map(type, choices)), convert)


def _array(annotation: Any, metadata: Iterable[Any]) -> Type:
    """An array; its dtype and shape are in the annotation (``NDArray[np.uint8]``), or beside it in ``Annotated``."""
    dtype, shape = np.generic, None
    for one in (*(part for dtype in get_args(annotation)[1:] for part in get_args(dtype)), *metadata):
        kind = get_origin(one) or one  # of np.floating[Any]
        if isinstance(kind, tuple):
            shape = [-1 if size is None else int(size) for size in kind]
        elif kind is not Any and not isinstance(kind, typing.TypeVar):
            dtype = kind if isinstance(kind, type) and issubclass(kind, np.generic) else np.dtype(kind).type
    numeric = issubclass(dtype, (np.number, np.bool_)) and dtype in np.sctypeDict.values()  # np.floating is no dtype
    name = np.dtype(dtype).name if numeric else None
    facts = {"x-dtype": name, "x-shape": shape}
    sizes = "" if shape is None else f" of shape [{', '.join('any' if size < 0 else str(size) for size in shape)}]"
    kinds = {np.generic: "", np.number: " of numbers", np.integer: " of whole numbers", np.floating: " of floats"}
    noun = f"an array{kinds.get(dtype, f' of {dtype.__name__}')}{sizes}"

    def convert(value: Any, seen: _Seen) -> Any:
        array = _from_list(value, name) if type(value) is list else value
        if not (codec.has_shape(array, shape) and np.issubdtype(array.dtype, dtype)):
            raise _misfit(noun, array)
        return array

    schema = {"type": "array"} | {key: fact for key, fact in facts.items() if fact is not None}
    return Type(noun, schema, (np.ndarray, list), convert)


def _from_list(value: list[Any], dtype: str | None) -> Any:
    """The array of a nested list of numbers, as JSON has them."""
    try:
        if _are_numbers(value):  # numpy would make room for the longest text at each place
            with np.errstate(all="ignore"):
                array = np.asarray(value)
                fitted = array.astype(dtype or array.dtype)
            if fitted.dtype.kind in "fc" or (fitted.dtype.kind in "biu" and (fitted == array).all()):
                return fitted
    except (ValueError, OverflowError):
        pass
    raise _Wrong(((), f"must be an array, or a nested list of numbers that are {dtype or 'alike'}"))


def _are_numbers(value: list[Any]) -> bool:
    kinds = {*map(type, value)}
    return kinds <= {int, float, bool} or (kinds == {list} and all(map(_are_numbers, value)))


# ---- from values to what the model gets


def _each(values: Iterable[tuple[Any, Any]], kinds: Type | dict[str, Type], seen: _Seen) -> list[tuple[Any, Any]]:
    """(key, what the model gets) for each (key, value) of a list or an object; ``kinds`` of all, or by key."""
    found = []
    for key, value in values:
        try:
            kind = kinds if isinstance(kinds, Type) else kinds[key]
            if not kind.fits(value):
                raise _misfit(kind.noun, value)
            found.append((key, kind.convert(value, seen)))
        except _Wrong as wrong:
            raise _Wrong(*(((key, *where), what) for where, what in wrong.problems)) from None
    return found


def _validated(validate: Callable[[], Any]) -> Any:
    """What the model's own validation returns. A ValueError is the caller's mistake, anything else the model's."""
    try:
        return validate()
    except ValueError as error:
        if not hasattr(error, "errors"):  # pydantic's have several
            raise _Wrong(((), message_of(error))) from None
        problems = [(tuple(one["loc"]), one["msg"]) for one in error.errors()]
    raise _Wrong(*problems)


def _unknown(key: str, fields: Iterable[str]) -> str:
    near = difflib.get_close_matches(key[:60], fields, 1)
    return f"there is no such field; {f'did you mean {near[0]}?' if near else 'there are: ' + ', '.join(fields)}"


def _misfit(noun: str, value: Any) -> _Wrong:
    if isinstance(value, np.ndarray):
        found = f"an array of {codec.dtype_name(value.dtype)} of shape {list(value.shape)}"
    else:
        found = _NOUNS.get(type(value)) or repr(value)[:60]
    return _Wrong(((), f"must be {noun}, not {found}"))


ANYTHING = Type("anything", {})
_NOUNS = {str: "a text", bytes: "bytes", list: "a list", dict: "an object", type(None): "null"}
_SCALARS: dict[Any, Type] = {
    str: Type("a text", {"type": "string"}, (str,)),
    int: Type("a whole number", {"type": "integer"}, (int,)),
    float: Type("a number", {"type": "number"}, (int, float)),
    bool: Type("true or false", {"type": "boolean"}, (bool,)),
    bytes: Type("bytes", {"type": "string", "contentEncoding": "base64"}, (bytes,)),
    type(None): Type("null", {"type": "null"}, (type(None),)),
}
