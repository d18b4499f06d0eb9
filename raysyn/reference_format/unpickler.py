"""An unpickler of allowed opcodes, which looks no global up and calls nothing but what it is given."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any, ClassVar, Protocol

import torch

from raysyn.reference_format.objects import (
    CALLABLE,
    MODULES,
    STORAGES,
    Dtype,
    Functions,
    Record,
    Refused,
    Token,
    is_key,
)

MAX_ARGUMENTS = 8
ENTRY = 10  # of the allowance; what a call makes of an entry takes a hundred bytes where the file may have two
ALLOWED_OPCODES = {
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.BINBYTES8, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.EMPTY_SET, pickle.ADDITEMS),  # torch's modules keep an (empty) set of names
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
}


class Saved(Protocol):
    """A torch.save: a pickle in it names storages, which lie beside it."""

    def storage(self, pid: Any) -> torch.Tensor:
        """The flat tensor that `pid` names."""
        ...


class Reader(pickle._Unpickler):  # type: ignore[name-defined]  # the one in Python, whose opcodes can be replaced
    """Reads one pickle; `saved` is the torch.save that it lies in. Raises Refused for what the format does not have."""

    dispatch: ClassVar[dict[int, Any]] = {}
    stack: Any
    append: Any
    pop_mark: Any

    def __init__(
        self, data: io.BytesIO, allowance: int, saved: Saved | None = None, functions: Functions = CALLABLE
    ) -> None:
        super().__init__(data)
        self.allowance, self.saved, self.functions = allowance, saved, functions

    def _spend(self, amount: int) -> None:
        self.allowance -= amount
        if self.allowance < 0:
            raise Refused("it uses the same data again and again")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        if self.saved is None:
            raise Refused("it names data outside the pickle")
        return self.saved.storage(pid)

    def find_class(self, module: str, name: str) -> Token:
        known = (module, name) in self.functions or (module, name) in MODULES
        if not known and not (self.saved is not None and module == "torch" and name in STORAGES):
            inside = " inside of a torch.save" if self.saved is not None else ""
            raise Refused(f"it names {str(module)[:80]}.{str(name)[:80]}{inside}")
        return Token(module, name)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Token) or not isinstance(args, tuple):
            raise Refused("a call of something that is no function of the format")
        if (function.module, function.name) not in self.functions:
            raise Refused(f"a call of {function}")
        if len(args) > MAX_ARGUMENTS:
            raise Refused(f"{function} with other arguments than the format's")
        entries = sum(len(a) for a in args if isinstance(a, (list, tuple, dict)))
        self._spend(1 + ENTRY * entries + sum(len(a) for a in args if isinstance(a, (bytes, str))))
        try:
            self.stack[-1] = self.functions[function.module, function.name](*args)
        except TypeError as error:
            raise Refused(f"{function} with other arguments than the format's") from error

    def load_newobj(self) -> None:
        args = self.stack.pop()
        cls = self.stack[-1]
        if not isinstance(cls, Token) or args != ():
            raise Refused("an object of something that is no class of the format")
        if (cls.module, cls.name) in MODULES:
            self.stack[-1] = Record(cls.name)
        elif cls.name in ("OrderedDict", "EasyDict"):
            self.stack[-1] = OrderedDict()
        else:
            raise Refused(f"an object of {cls}")

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record) and isinstance(state, dict):
            target.state = state
        elif isinstance(target, OrderedDict) and (state is None or isinstance(state, dict)):
            pass  # attributes of a dict: EasyDict has none of interest
        elif not isinstance(target, Dtype):
            raise Refused("a state for something that takes none")
        elif isinstance(state, tuple) and state[1:2] not in (("<",), ("|",), ("=",)):
            raise Refused("a numpy dtype of another byte order")

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise Refused("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not is_key(key):
                raise Refused("a dict key that is no text and no small number")
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        target: dict[Any, Any] = {}
        self._set(target, items)
        self.append(target)

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("elements for something that is no list")
        self.stack[-1].extend(items)

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set or not all(is_key(i) for i in items):
            raise Refused("a set of something else than names")
        self.stack[-1].update(items)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(items)


def _refuse(reader: Any) -> None:
    raise Refused("it uses a pickle instruction that the format does not have")


_OWN = {
    pickle.REDUCE: Reader.load_reduce,
    pickle.NEWOBJ: Reader.load_newobj,
    pickle.BUILD: Reader.load_build,
    pickle.SETITEM: Reader.load_setitem,
    pickle.SETITEMS: Reader.load_setitems,
    pickle.DICT: Reader.load_dict,
    pickle.APPEND: Reader.load_append,
    pickle.APPENDS: Reader.load_appends,
    pickle.ADDITEMS: Reader.load_additems,
}
Reader.dispatch = {
    code: (base if bytes([code]) in ALLOWED_OPCODES else _refuse)
    for code, base in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
} | {op[0]: method for op, method in _OWN.items()}
