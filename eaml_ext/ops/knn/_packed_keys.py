"""PackedKeys: a memory of keys in the layout of knn's kernels, packed when written.

A kernel reads panels of 32 centred keys with bounds of their errors (csrc/knn), so a search computes little more than
products. Keys and bias are also stored as given, and every value is computed from them: ``search`` finds what knn
finds, bit for bit. Without compiled kernels there are no panels, and knn's reference searches the same keys.
"""

import contextlib
import math
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import has_kernel
from eaml_ext.ops._library import library
from eaml_ext.ops._sizes import SIZE_LIMIT, check_size
from eaml_ext.ops._typed import register_fake
from eaml_ext.ops.knn._functional import Neighbors, search
from eaml_ext.ops.knn._reference import DTYPES, METRICS, KnnArgs

PANEL = 32  # kPanel of csrc/knn/params.h: keys of a panel
HUGE_PAGE_BYTES = 1 << 22  # size from which memory is allocated in huge pages

# ---- schema -----------------------------------------------------------------------------------------------------

# Shapes: keys (*, M, d); bias and live (*, M); panels (*, ceil(M / 32), rows, 32); state (*, 2 d + 3).
# Shapes of an update: slots (*, n); new_keys (*, n, d); new_bias (*, n).
# Without new_keys the slots are erased. Without slots, panels and state are computed from keys, bias and live.
torch.library.define(
    "eaml_ext::knn_write",
    "(Tensor(a!) keys, Tensor(b!) bias, Tensor(c!) live, Tensor(d!) panels, Tensor(e!) state, int metric, "
    "Tensor? slots, Tensor? new_keys, Tensor? new_bias) -> ()",
)

# ---- reference --------------------------------------------------------------------------------------------------


def _write(
    keys: Tensor,
    bias: Tensor,
    live: Tensor,
    panels: Tensor,
    state: Tensor,
    metric: int,
    slots: Tensor | None,
    new_keys: Tensor | None,
    new_bias: Tensor | None,
) -> None:
    """Update keys, bias and live. No reference reads panels and state."""
    if slots is None or slots.numel() == 0:
        return
    count, size = slots.shape[-1], keys.shape[-2]
    memories = slots.numel() // count
    flat = (slots.reshape(memories, count) + size * torch.arange(memories, device=slots.device)[:, None]).flatten()
    live.view(-1)[flat] = new_keys is not None
    if new_keys is None:
        return
    order = torch.arange(len(flat), device=flat.device)
    last = order.new_full((memories * size,), -1).scatter_reduce_(0, flat, order, "amax")  # the last write to each slot
    kept = last[flat] == order
    keys.view(-1, keys.shape[-1])[flat[kept]] = new_keys.reshape(len(flat), keys.shape[-1])[kept]
    bias.view(-1)[flat[kept]] = 0 if new_bias is None else new_bias.flatten()[kept]


torch.library.impl("eaml_ext::knn_write", "CompositeExplicitAutograd", _write)


@register_fake("eaml_ext::knn_write")
def _write_fake(*_: object) -> None:
    return None


# ---- memory -----------------------------------------------------------------------------------------------------


def _panel_rows(dim: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """Return the rows of a panel for the kernels of a device; None if no kernel reads panels."""
    if device.type == "cpu" and hasattr(library, "_knn_panel_rows"):  # an op of the CPU kernels
        rows: int = library._knn_panel_rows(dim, dtype is torch.float32)
        return rows
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if dtype is torch.float64 or key is None:
        return None
    if not has_kernel("eaml_ext::knn_write", key):
        return None
    return -(-(dim + 2) // 16) * 8 + 4  # panel_words of csrc/knn/cuda/launch.h


def _zeros(size: int, device: torch.device) -> Tensor:
    """Allocate ``size`` zero bytes, in huge pages if possible: memory limits the speed of a search with few queries."""
    if device.type != "cpu" or size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8, device=device)
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process must not write to it
    with contextlib.suppress(OSError):  # a system without huge pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8)


# ---- public -----------------------------------------------------------------------------------------------------


def _to_bytes(x: Tensor) -> np.ndarray:
    return x.cpu().reshape(-1).view(torch.uint8).numpy()


def _from_pickle(value: Any) -> Tensor:
    """Return the tensor of ``(dtype, shape, bytes)``. Version 0.1 pickled the tensor itself."""
    if isinstance(value, Tensor):
        return value
    dtype, shape, data = value
    return torch.from_numpy(data).view(dtype).view(shape)


class PackedKeys:
    """A memory of ``capacity`` slots, or many of them, searched exactly and packed when written.

    Args:
        capacity: the number of slots of a memory.
        dim: the number of features of a key.
        memories: the number of independent memories; None is one memory, without a leading dimension in the arguments.
        metric: ``"sqeuclidean"``, ``"cosine"`` or ``"inner_product"``, as in :func:`~eaml_ext.ops.knn`.
        dtype: the dtype of keys, queries and bias: float32, float64, bfloat16 or float16.
        device: the device of the keys.

    Writing or erasing a slot takes time proportional to ``dim``, whatever the capacity. On a CPU with compiled kernels
    a memory takes twice the bytes of its keys, or three times in reduced precision. On a GPU it takes 1.5 times the
    bytes of its keys, or twice in reduced precision. ``len`` counts the live slots of all memories. Keys and bias are
    copied when written, so only queries get gradients. On a GPU, ``write`` and ``erase`` synchronise, to check that the
    slots exist. While a CUDA graph is captured they do not, and slots that do not exist are skipped.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: ``capacity``, ``dim`` or ``memories`` is not in [1, 2^31), or ``metric`` is unknown.

    >>> import torch
    >>> memory = PackedKeys(capacity=4, dim=2)
    >>> memory.write(torch.tensor([0, 2]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    >>> memory.search(torch.zeros(1, 2), k=3)
    Neighbors(values=tensor([[ 0., 25., inf]]), indices=tensor([[ 0,  2, -1]]))
    >>> memory.erase(torch.tensor([0]))
    >>> len(memory), memory.search(torch.zeros(1, 2), k=1).indices.tolist()
    (1, [[2]])
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        memories: int | None = None,
        metric: str = "sqeuclidean",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        capacity, dim = check_size("PackedKeys", "capacity", capacity), check_size("PackedKeys", "dim", dim)
        memories = None if memories is None else check_size("PackedKeys", "memories", memories)
        if metric not in METRICS:
            raise ValueError(f"PackedKeys: metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self.capacity, self.dim, self.memories, self.metric = capacity, dim, memories, metric
        self._code = METRICS.index(metric)
        self._allocate(self._dtype_of("PackedKeys", dtype), self._device_of("PackedKeys", device))

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode(False):  # inference tensors could not be written outside of that mode
            lead = () if self.memories is None else (self.memories,)
            options: Any = {"dtype": dtype, "device": device}
            self._keys = torch.zeros(*lead, self.capacity, self.dim, **options)
            self._bias = torch.zeros(*lead, self.capacity, **options)
            self._live = torch.zeros(*lead, self.capacity, dtype=torch.bool, device=device)
            self._panels = self._state = None
            opmath = torch.promote_types(dtype, torch.float32)
            rows = _panel_rows(self.dim, opmath, device)
            if rows is not None:
                panels = (*lead, -(-self.capacity // PANEL), rows, PANEL)
                self._panels = _zeros(math.prod(panels) * opmath.itemsize, device).view(opmath).view(panels)
                self._state = torch.zeros(*lead, 2 * self.dim + 3, dtype=torch.float64, device=device)
        self.dtype, self.device = self._keys.dtype, self._keys.device
        self._count: int | None = 0  # live slots; None: not counted yet
        self._biased = False

    # ------------------------------------------------------------------------------------------------- writing

    def write(self, slots: Tensor, keys: Tensor, bias: Tensor | None = None) -> None:
        """Write ``keys`` to ``slots``, replacing their keys; the last write to a slot wins.

        Args:
            slots: ``(n,)`` or, with memories, ``(memories, n)``, int64 in 0 ... capacity - 1.
            keys: ``(n, dim)`` or ``(memories, n, dim)``, the dtype of the memory.
            bias: ``(n,)`` or ``(memories, n)``, the dtype of the memory; a log-weight: a larger one makes a key nearer.
                None is 0.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: an argument has the wrong shape or device, or a slot does not exist.
        """
        where = "PackedKeys.write"
        self._check_slots(where, slots)
        given: list[tuple[str, Tensor, tuple[int, ...]]] = [("keys", keys, (*slots.shape, self.dim))]
        if bias is not None:
            given.append(("bias", bias, tuple(slots.shape)))
        for name, x, shape in given:
            _check.tensor(where, name, x)
            _check.dtype(where, name, x, (self.dtype,))
            _check.device(where, name, x, self.device, "the memory")
            _check.shape(where, name, x, shape, str(shape))
        self._biased = self._biased or bias is not None
        self._update(slots, keys.detach(), None if bias is None else bias.detach())

    def erase(self, slots: Tensor) -> None:
        """Erase ``slots``; searches skip them until they are written again.

        Args:
            slots: ``(n,)`` or, with memories, ``(memories, n)``, int64 in 0 ... capacity - 1.

        Raises:
            TypeError: ``slots`` is not an int64 tensor.
            ValueError: it has the wrong shape or device, or a slot does not exist.
        """
        self._check_slots("PackedKeys.erase", slots)
        self._update(slots, None, None)

    def _check_slots(self, where: str, slots: Tensor) -> None:
        _check.tensor(where, "slots", slots)
        _check.dtype(where, "slots", slots, (torch.int64,))
        _check.device(where, "slots", slots, self.device, "the memory")
        _check.shape(where, "slots", slots, (*self._lead, None), self._shape("n"))
        if slots.numel() and not (slots.is_cuda and torch.cuda.is_current_stream_capturing()):
            least, most = (int(x) for x in torch.aminmax(slots))
            if least < 0 or most >= self.capacity:
                wrong = least if least < 0 else most
                raise ValueError(f"{where}: slots must lie in 0 ... {self.capacity - 1}, got {wrong}")

    def _update(self, slots: Tensor | None, keys: Tensor | None, bias: Tensor | None) -> None:
        self._count = None
        contents = self._keys, self._bias, self._live
        if self._panels is None or self._state is None:
            none = self._keys.new_empty(0)
            _write(*contents, none, none, self._code, slots, keys, bias)
        else:
            write = torch.ops.eaml_ext.knn_write.default
            write(*contents, self._panels, self._state, self._code, slots, keys, bias)

    # ----------------------------------------------------------------------------------------------- searching

    def search(self, queries: Tensor, k: int, valid: Tensor | None = None) -> Neighbors:
        """Find the ``k`` live keys nearest to every query: :func:`~eaml_ext.ops.knn` over them, bit for bit.

        Args:
            queries: ``(*, Q, dim)`` or, with memories, ``(memories, Q, dim)``, the dtype of the memory.
            k: the number of neighbours.
            valid: ``(capacity,)`` or ``(*, capacity)``, bool; False excludes a slot from this search.

        Returns:
            ``Neighbors(values, indices)``: ``values``: ``(*, Q, k)``; ``indices``: ``(*, Q, k)``, int64 slots. If fewer
            than ``k`` slots are live and valid, the rest has index -1 and an infinite value. Values are twice
            differentiable with respect to ``queries``.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: an argument has the wrong shape or device, or ``k`` is not in [1, 2^31).
        """
        shape = queries.shape if isinstance(queries, Tensor) else ()
        if not (
            len(shape) >= 2
            and shape[-1] == self.dim
            and (self.memories is None or shape[:-2] == self._lead)
            and queries.dtype is self.dtype
            and queries.device == self.device
            and queries.layout is torch.strided
        ):
            self._raise_on_queries(queries)
        if type(k) is not int or not 0 < k < SIZE_LIMIT:
            k = check_size("PackedKeys.search", "k", k)
        if valid is not None:
            self._check_valid(valid, shape[:-2])
        live: Tensor | None = self._live
        counted = self._count is not None or self.device.type == "cpu"  # counting would synchronise with a GPU
        if counted and not torch.compiler.is_compiling() and len(self) == self._live.numel():
            live = None
        if valid is not None:
            live = valid if live is None else valid & live
        bias = self._bias if self._biased else None
        return search(KnnArgs(queries, self._keys, k, self._code, live, bias, self._panels, self._state))

    def _raise_on_queries(self, queries: Any) -> None:
        where = "PackedKeys.search"
        _check.tensor(where, "queries", queries)
        _check.dtype(where, "queries", queries, (self.dtype,))
        _check.device(where, "queries", queries, self.device, "the memory")
        wanted = f"(*, Q, {self.dim})" if self.memories is None else f"({self.memories}, Q, {self.dim})"
        raise ValueError(f"{where}: queries must have shape {wanted}, got {tuple(queries.shape)}")

    def _check_valid(self, valid: Any, batch: tuple[int, ...]) -> None:
        where = "PackedKeys.search"
        _check.tensor(where, "valid", valid)
        _check.dtype(where, "valid", valid, (torch.bool,))
        _check.device(where, "valid", valid, self.device, "the memory")
        shapes = [(self.capacity,), *([(*batch, self.capacity)] if batch else [])]
        if tuple(valid.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{where}: valid must have shape {wanted}, got {tuple(valid.shape)}")

    # -------------------------------------------------------------------------------------- saving and loading

    def __len__(self) -> int:
        if self._count is None:
            self._count = int(self._live.sum())
        return self._count

    def __repr__(self) -> str:
        options = [f"{self.capacity}, {self.dim}"]
        options += [] if self.memories is None else [f"memories={self.memories}"]
        options += [f"metric={self.metric!r}, dtype={self.dtype}, device={str(self.device)!r}"]
        return f"PackedKeys({', '.join(options)})"

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of ``keys``, ``bias`` and ``live``; panels and state are computed from them."""
        return {"keys": self._keys.clone(), "bias": self._bias.clone(), "live": self._live.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the contents of :meth:`state_dict`: searches then find the same bits.

        Args:
            state: ``keys``: ``([memories,] capacity, dim)``; ``bias`` and ``live``: ``([memories,] capacity)``.

        Raises:
            TypeError: ``state`` is not a mapping of tensors, or one has the wrong dtype.
            ValueError: an entry is missing, unknown or of another shape.
        """
        where, own = "PackedKeys.load_state_dict", {"keys": self._keys, "bias": self._bias, "live": self._live}
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}: state must be a mapping, got {type(state).__name__}")
        if set(state) != set(own):
            raise ValueError(f"{where}: state must have the entries bias, keys, live, got {', '.join(sorted(state))}")
        for name, x in own.items():
            _check.tensor(where, name, state[name])
            _check.dtype(where, name, state[name], (x.dtype,))
            _check.shape(where, name, state[name], x.shape, str(tuple(x.shape)))
        with torch.no_grad():
            for name, x in own.items():
                x.copy_(state[name])
        self._biased = bool((self._bias != 0).any())
        self._update(None, None, None)

    def to(self, target: torch.device | torch.dtype | str) -> "PackedKeys":
        """Move to a device or convert to a dtype, in place; return the memory itself.

        Raises:
            TypeError: ``target`` is neither, or a dtype that keys cannot have.
        """
        where = "PackedKeys.to"
        dtype, device = self.dtype, self.device
        if isinstance(target, torch.dtype):
            dtype = self._dtype_of(where, target)
        else:
            device = self._device_of(where, target)
        if (dtype, device) != (self.dtype, self.device):
            state = self.state_dict()
            self._allocate(dtype, device)
            self.load_state_dict({n: x.to(device, x.dtype if n == "live" else dtype) for n, x in state.items()})
        return self

    def __getstate__(self) -> dict[str, Any]:
        names = ("capacity", "dim", "memories", "metric", "dtype", "device")
        # Bytes instead of tensors: a spawned process cannot receive tensors that end with this call.
        contents = {name: (x.dtype, x.shape, _to_bytes(x)) for name, x in self.state_dict().items()}
        return {**{name: getattr(self, name) for name in names}, "contents": contents}

    def __setstate__(self, state: dict[str, Any]) -> None:
        contents = state.pop("contents")
        self.__init__(**state)  # type: ignore[misc]
        self.load_state_dict({name: _from_pickle(value).to(self.device) for name, value in contents.items()})

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.memories is None else (self.memories,)

    def _shape(self, last: str) -> str:
        return f"({last},)" if self.memories is None else f"({self.memories}, {last})"

    @staticmethod
    def _dtype_of(where: str, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPES:
            wanted = " or ".join(str(x).removeprefix("torch.") for x in DTYPES)
            raise TypeError(f"{where}: dtype must be {wanted}, got {str(dtype).removeprefix('torch.')}")
        return dtype

    @staticmethod
    def _device_of(where: str, device: Any) -> torch.device:
        if not isinstance(device, (torch.device, str)):
            raise TypeError(f"{where}: device must be a torch.device or a str, got {type(device).__name__}")
        return torch.empty(0, device=device).device
