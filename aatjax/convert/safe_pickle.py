"""Pickles read as plain data: no object is built, no function called, no module imported.

PyTorch files are pickles, and a pickle is a program. This reader walks its opcodes
(`pickletools.genops`) on a stack of its own and supports only what a file of tensors needs; every
other opcode and every global outside the allow-list is refused by name.
"""

import dataclasses
import io
import pickletools
from typing import Any

from aatjax.errors import DataError

STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = {_ORDERED_DICT, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in STORAGES)}

MOST_OPCODES = 500_000  # a tensor takes about 40
MOST_VALUES = 20_000  # on the stack; pickle writes items in groups of 1,000
MOST_LEVELS = 100  # of open marks
_PUSH = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat run of numbers in the file: `count` items of `dtype` under the name `key`."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class TensorReference:
    """A tensor as the pickle describes it; nothing is checked or read yet."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


def read_pickle(stream: io.BytesIO, where: str) -> Any:
    """Read one pickle from a stream, which is left behind its STOP.

    Args:
        stream: bytes in memory.
        where: the file, for messages.

    Returns:
        Dictionaries, lists, tuples, numbers, strings and `TensorReference`s.

    Raises:
        DataError: a damaged pickle, or one that needs more than tensors.
    """
    try:
        return _Machine(where).run(stream)
    except DataError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{where}: damaged or truncated pickle ({reason})") from None


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self, where: str):
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> DataError:
        return DataError(
            f"{self.where}: the pickle {what}; a file of weights needs only tensors, nothing was "
            "run or loaded: take the weights as .safetensors, or only from someone you trust"
        )

    def run(self, stream: io.BytesIO) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name == "STOP":
                return self.pop()
            if count > MOST_OPCODES:
                raise self.refuse(f"has more than {MOST_OPCODES:,} opcodes")
            self.step(opcode.name, argument)
            if len(self.stack) > MOST_VALUES or len(self.marks) > MOST_LEVELS:
                raise self.refuse(
                    f"has more than {MOST_VALUES:,} values or {MOST_LEVELS} levels at a time"
                )
        raise ValueError("no STOP")

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("stack underflow")
        return self.stack.pop()

    def pop_items(self, count: int | None = None) -> list[Any]:
        """Some items from the top of the stack, or all down to the last mark."""
        if count is not None:
            return [self.pop() for _ in range(count)][::-1]
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "MARK":
                self.marks.append(len(stack))
            case "APPEND" | "APPENDS":
                items = self.pop_items(1 if name == "APPEND" else None)
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop_items(2 if name == "SETITEM" else None)
                self.top(dict).update(self.make_dict(items))
            case "BUILD":
                self.pop()  # the _metadata of a state dict: not needed, not applied
                self.top(dict)
            case _:
                stack.append(self.make_value(name, argument))

    def make_value(self, name: str, argument: Any) -> Any:
        """The value that an opcode pushes."""
        if name in _PUSH:
            return argument
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _TUPLES:
            return tuple(self.pop_items(_TUPLES[name]))
        match name:
            case "GET" | "BINGET" | "LONG_BINGET":
                return self.memo[argument]
            case "TUPLE":
                return tuple(self.pop_items())
            case "EMPTY_LIST":
                return []
            case "LIST":
                return self.pop_items()
            case "EMPTY_DICT":
                return {}
            case "DICT":
                return self.make_dict(self.pop_items())
            case "GLOBAL":
                return self.find(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                return self.find(*self.pop_items(2))
            case "REDUCE":
                return self.call(*self.pop_items(2))
            case "BINPERSID":
                return self.make_storage(self.pop())
        raise self.refuse(f"uses opcode {name}")

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise ValueError(f"{kind.__name__} expected, {type(value).__name__} found")
        return value

    def make_dict(self, items: list[Any]) -> dict[Any, Any]:
        keys = items[0::2]
        for key in keys:
            if not isinstance(key, str | int | float | None):
                raise ValueError(f"a dictionary key is a {type(key).__name__}")
        return dict(zip(keys, items[1::2], strict=True))

    def find(self, module: Any, attribute: Any) -> _Global:
        name = f"{module}.{attribute}"
        if name not in _ALLOWED:
            raise self.refuse(f"names {name[:120]!r}")
        return _Global(name)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is not a function")
        name, count = function.name, len(arguments)
        if name == _ORDERED_DICT and count <= 1:
            items = arguments[0] if arguments else ()
            return self.make_dict([part for key, value in items for part in (key, value)])
        if name == _TENSOR and count >= 4:
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, Storage):
                raise ValueError("a tensor without storage")
            return TensorReference(storage, offset, shape, strides)
        if name == _PARAMETER and arguments:
            if not isinstance(arguments[0], TensorReference):
                raise ValueError("a parameter that is not a tensor")
            return arguments[0]
        raise self.refuse(f"calls {name} with {count} arguments")

    def make_storage(self, identity: Any) -> Storage:
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise ValueError("a persistent id that is not a storage")
        _, kind, key, _, count, *view = identity
        if view not in ([], [None]):
            raise self.refuse("holds a view of a storage (a form from before PyTorch 0.4)")
        if not isinstance(kind, _Global) or not kind.name.startswith("torch."):
            raise ValueError("a storage without type")
        dtype = STORAGES[kind.name.removeprefix("torch.")]
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError(f"a storage of {count!r} items")
        return Storage(key, dtype, count)
