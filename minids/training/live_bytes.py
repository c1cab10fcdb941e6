"""Count the bytes of tensors that stay alive after a piece of code, such as what a forward pass keeps for backward."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Remembers every storage that an operation returns inside the block, without keeping it alive.

    `peak` is the largest `total` so far; what an operation allocates only while it runs is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if _key(tensor) not in given:  # a view belongs to whoever made its storage
                self._storages[_key(tensor)] = weakref.ref(tensor.untyped_storage())
        self.peak = max(self.peak, self.total)
        return result

    @property
    def total(self) -> int:
        """Bytes of the storages that are still alive."""
        alive = (reference() for reference in self._storages.values())
        return sum(storage.nbytes() for storage in alive if storage is not None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
