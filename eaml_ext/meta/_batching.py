"""out_i = f(x_i) for tasks or users: one vmapped call, or one call each where vmap cannot run the model."""

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from eaml_ext._torch_compat import tree_leaves, tree_map
from eaml_ext.meta.functional import without_saved_tensor_hooks

T = TypeVar("T")
Map = Callable[..., Callable[..., Any]]


class Batching:
    """Maps functions over tasks or users by ``vmap`` until that fails, then by a loop, after one RuntimeWarning.

    Recurrent layers of torch, control flow that depends on data and ``torch.utils.checkpoint`` fail under ``vmap``. A
    loop gives the same numbers, to rounding.

    Args:
        where: begins the warning.
        item: what is mapped over, in the warning.
    """

    def __init__(self, where: str, item: str):
        self.where, self.item, self.vmapped = where, item, True

    def run(self, compute: Callable[[Map], T], device: torch.device) -> T:
        """Return ``compute(map)``, where ``map(function)`` takes and returns tensors with a leading batch dimension.

        A computation that fails under ``vmap`` is repeated as a loop, from the same state of the random number
        generators; it must have no other side effect. Errors of the loop are raised.
        """
        if self.vmapped:
            restore = generator_states(device)
            try:
                return compute(vmapped)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).partition("\n")[0].partition(". ")[0]
            restore()
        result = compute(looped)
        if self.vmapped:
            self.vmapped = False
            text = f"{self.where}: vmap cannot run the model, so {self.item}s run one at a time from now on: {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=caller_level())
        return result


def generator_states(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the present states of torch's default generators of the CPU and of ``device``."""
    # A generator cannot be read during a capture, which follows a run of the same function.
    readable = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    cuda = torch.cuda.get_rng_state(device) if readable else None
    state = torch.get_rng_state()

    def restore() -> None:
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return restore


def vmapped(function: Callable[..., Any], in_dims: Any = 0, chunk_size: int | None = None) -> Callable[..., Any]:
    """``vmap`` with random numbers of its own for each item; hooks of saved tensors are errors."""
    batched = vmap(function, in_dims, randomness="different", chunk_size=chunk_size)

    def call(*args: Any) -> Any:
        with without_saved_tensor_hooks():
            return batched(*args)

    return call


def looped(function: Callable[..., Any], in_dims: Any = 0, chunk_size: int | None = None) -> Callable[..., Any]:
    """The loop that ``vmapped`` equals. All tensors have the batch dimension; other values go to every call."""

    def call(*args: Any) -> Any:
        count = next(len(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        results = [function(*tree_map(lambda leaf: _item(leaf, i), args)) for i in range(count)]  # noqa: B023
        return tree_map(lambda *leaves: torch.stack(leaves), *results)

    return call


def buckets(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the positions of equal keys, bucket by bucket, in the order of each bucket's first key.

    >>> buckets("abca")
    [[0, 3], [1], [2]]
    """
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        positions[key].append(i)
    return list(positions.values())


def stack(items: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the columns of items of equal shapes, each stacked to ``(len(items), ...)``.

    >>> x, y = stack([(torch.zeros(3), torch.zeros(2, 1))] * 4)
    >>> x.shape, y.shape
    (torch.Size([4, 3]), torch.Size([4, 2, 1]))
    """
    return [torch.stack(column) for column in zip(*items, strict=True)]


def caller_level() -> int:
    """The stacklevel of the first frame outside the package, for a warning by the caller of this function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("eaml_ext", "contextlib"):
        level, frame = level + 1, frame.f_back
    return level


def _item(leaf: Any, index: int) -> Any:
    return leaf[index] if isinstance(leaf, Tensor) else leaf
