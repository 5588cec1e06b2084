"""Frozen dataclasses that are pytrees: the one way this package holds arrays.

`@struct` makes a frozen dataclass whose fields are pytree children; a changed copy of one is made
by `dataclasses.replace`.
A field declared with `static()` is part of the tree's *type* instead: it is hashed into the jit
cache, so it must be hashable and must not change inside a loop.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

from flax import struct as flax_struct

T = TypeVar("T")


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field that is metadata of the tree and not one of its leaves."""
    if default is dataclasses.MISSING:
        return flax_struct.field(pytree_node=False)
    return flax_struct.field(pytree_node=False, default=default)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def struct(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and a pytree."""
    return flax_struct.dataclass(cls)
