"""Every array a cache holds, found by walking the objects themselves: `nbytes` and "left as it was" are
checked with this.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_ATOMS = (
    *(int, float, complex, str, bytes, bool, type(None)),
    *(np.dtype, np.generic, torch.dtype, torch.device, itertools.count),
)
_CODE = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def leaves(root: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything reachable from ``root`` that holds no further objects, such as an array.

    Modules, classes and functions are code, not state, and are left out.
    """
    seen: set[int] = set()

    def walk(path: str, x: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(x, _CODE):
            return
        if isinstance(x, (np.ndarray, torch.Tensor, *_ATOMS)):
            yield path, x
            return
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, dict):
            yield f"{path}.keys", repr(list(x))
            for key, value in x.items():
                yield from walk(f"{path}[{key!r}]", value)
        elif isinstance(x, functools.partial):
            yield from walk(f"{path}.args", (*x.args, *x.keywords.values()))
        elif isinstance(x, (list, tuple, set, frozenset)):
            for index, value in enumerate(x):
                yield from walk(f"{path}[{index}]", value)
        else:
            names = set(vars(x)) if hasattr(x, "__dict__") else set()
            names |= {n for cls in type(x).__mro__ for n in _slots(cls)}
            if dataclasses.is_dataclass(x):
                names |= {field.name for field in dataclasses.fields(x)}
            if not names and not type(x).__module__.startswith("kvlib"):
                raise TypeError(f"do not know how to look inside {path}, a {type(x)}")
            for name in sorted(names - {"__weakref__", "__dict__"}):
                if hasattr(x, name):
                    yield from walk(f"{path}.{name}", getattr(x, name))

    return walk("cache", root)


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def snapshot(root: Any) -> dict[str, Any]:
    """The whole state of ``root`` by value: arrays as their shape, dtype and bytes. Compare two with ==."""
    return {path: _value(x) for path, x in leaves(root)}


def _value(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return (
            tuple(x.shape),
            str(x.dtype),
            x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(x, np.ndarray):
        return (x.shape, str(x.dtype), x.tobytes())
    return repr(x)


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The paths at which two snapshots differ."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def buffer_bytes(root: Any) -> int:
    """Bytes of the memory behind every array reachable from ``root``; arrays that share memory count once."""
    buffers: dict[int, int] = {}
    for _, x in leaves(root):
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            buffers[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, np.ndarray):
            while isinstance(x.base, np.ndarray):
                x = x.base
            buffers[x.__array_interface__["data"][0]] = x.nbytes
    return sum(buffers.values())
