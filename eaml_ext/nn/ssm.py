"""h = embed(x);  h = h + core(norm(h)) per layer;  y = head(norm(h)): sequence models over a state-space core."""

import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check, checkpoint
from eaml_ext._torch_compat import has_hooks
from eaml_ext.nn._row_invariant import linear
from eaml_ext.nn.cores import Core, make_core
from eaml_ext.nn.padding import check_boundaries, check_lengths, count_sequences, given, zero_padding
from eaml_ext.nn.submodule import reference_weight
from eaml_ext.ops._sizes import check_size


class SSM(nn.Module):
    """Sequence model on a state-space core. A call returns one tensor; :meth:`scan` and :meth:`step` have states.

    **Two-dimensional input is a batch** of single steps; :class:`SSMLayer` reads it as one sequence in time.

    Args:
        state_dim: size of an observation.
        hidden_dim: width of the model.
        output_dim: size of an output.
        device: device of the parameters.
        state_size: states per channel; in the cores "s5" and "lru" the states that all channels share.
        num_layers: residual layers.
        core: "s6" (Mamba's scan), "mamba", "s4d", "s5", "lru", "ssd", "retention", "rwkv", or a callable
            ``(hidden_dim, state_size) -> core``, see :mod:`eaml_ext.nn.cores`.
        dt_min, dt_max: step sizes of "s6", "mamba", "s4d", "s5" and "ssd" start log-uniform between them; 0.001 and 0.1
            as in the papers, if absent. With large step sizes the state depends on few recent steps.

    Raises:
        TypeError, ValueError: a size is not a positive integer, ``core`` is unknown, or an input has the wrong shape.

    >>> model = SSM(state_dim=10)
    >>> model(torch.randn(32, 10)).shape
    torch.Size([32, 32])
    >>> y, state = model.scan(torch.randn(4, 7, 10))
    >>> y, state = model.step(torch.randn(4, 10), state)
    >>> y.shape, state.shape
    (torch.Size([4, 32]), torch.Size([4, 1, 128, 16]))
    """

    def __init__(
        self,
        state_dim: int,
        hidden_dim: int = 128,
        output_dim: int = 32,
        device: str | torch.device = "cpu",
        *,
        state_size: int = 16,
        num_layers: int = 1,
        core: str | Callable[[int, int], nn.Module] = "s6",
        dt_min: float | None = None,
        dt_max: float | None = None,
    ):
        super().__init__()
        sizes = {
            "state_dim": state_dim,
            "hidden_dim": hidden_dim,
            "output_dim": output_dim,
            "state_size": state_size,
            "num_layers": num_layers,
        }
        sizes = {name: check_size("SSM", name, value) for name, value in sizes.items()}
        state_dim, hidden_dim, output_dim, state_size, num_layers = sizes.values()
        dt_min = None if dt_min is None else _check.number("SSM", "dt_min", dt_min)
        dt_max = None if dt_max is None else _check.number("SSM", "dt_max", dt_max)
        self.options = {**sizes, "core": core, "dt_min": dt_min, "dt_max": dt_max}
        self.state_dim, self.hidden_dim, self.output_dim = state_dim, hidden_dim, output_dim
        self.embed = nn.Linear(state_dim, hidden_dim)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_dim) for _ in range(num_layers))
        self.cores = nn.ModuleList(make_core(core, hidden_dim, state_size, dt_min, dt_max) for _ in range(num_layers))
        self._state_shape = (num_layers, *self.cores[0].state_shape)  # type: ignore[misc]
        self.norm = nn.RMSNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, output_dim)
        self.to(device)

    def forward(
        self,
        x: Tensor,
        hidden_state: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Run a batch of single steps, or of sequences.

        Args:
            x: ``(batch, state_dim)`` or ``(batch, time, state_dim)``, floating.
            hidden_state: ``(batch, num_layers, *core.state_shape)``, floating; the first state, zeros if absent.
            lengths: ``(batch,)``, int64 or int32, of sequences; row b has ``lengths[b]`` steps, followed by padding.
            cu_seqlens, seq_idx: as in :meth:`scan`.

        Returns:
            ``(batch, output_dim)`` or ``(batch, time, output_dim)``; zero on padding.
        """
        of_sequences = lengths is not None or cu_seqlens is not None or seq_idx is not None
        self._check_input("SSM", x, (3,) if of_sequences else (2, 3))
        if x.dim() == 3:
            return self.scan(x, hidden_state, **given(lengths=lengths, cu_seqlens=cu_seqlens, seq_idx=seq_idx))[0]
        return self.step(x, hidden_state)[0]

    def init_hidden(self, batch: int) -> Tensor:
        """Return the state of zeros, ``(batch, num_layers, *core.state_shape)``."""
        batch = check_size("SSM.init_hidden", "batch", batch, zero=True)
        return reference_weight(self.embed, self.norm).new_zeros(batch, *self._state_shape)

    def scan(
        self,
        x: Tensor,
        state: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run a sequence from a state.

        Args:
            x: ``(batch, time, state_dim)``, floating.
            state: ``(batch, num_layers, *core.state_shape)``, floating; the state before the first step, from
                :meth:`init_hidden`, :meth:`scan` or :meth:`step`; zeros if absent.
            reset: ``(batch, time)``, bool; the state is zeroed before step t.
            lengths: ``(batch,)``, int64 or int32; row b has ``lengths[b]`` steps, followed by padding.
            cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row of ``x``,
                from 0 to ``time``; each has one row of the state. Excludes ``lengths``.
            seq_idx: ``(batch, time)``, int32 or int64; the state is zeroed where it changes. Excludes ``reset`` and
                ``cu_seqlens``.

        Returns:
            y ``(batch, time, output_dim)``, zero on padding, and the state after the last step of each row or packed
            sequence.

        >>> model, cu_seqlens = SSM(3, 8, 2), torch.tensor([0, 2, 7], dtype=torch.int32)  # 2 and 5 steps in one row
        >>> y, state = model.scan(torch.randn(1, 7, 3), cu_seqlens=cu_seqlens)
        >>> y.shape, state.shape
        (torch.Size([1, 7, 2]), torch.Size([2, 1, 8, 16]))
        """
        self._check_input("SSM.scan", x, (3,))
        reset = check_boundaries("SSM.scan", x, reset, lengths, cu_seqlens, seq_idx)
        self._check_state("SSM.scan", count_sequences(x, cu_seqlens), state)
        options: dict[str, Tensor] = {}
        if cu_seqlens is not None:
            self._check_cores_pack()
            options["cu_seqlens"] = cu_seqlens
        if lengths is not None:
            check_lengths("SSM.scan", lengths, x)
            options["lengths"] = lengths
            x, reset, padding = zero_padding(x, reset, lengths)
        h, states = linear(self.embed, x), []
        for i, (norm, core) in enumerate(zip(self.norms, self.cores, strict=True)):
            y, last = _method_or_call(core, "scan")(norm(h), None if state is None else state[:, i], reset, **options)
            h = h + y
            states.append(last)
        y = linear(self.head, self.norm(h))
        return y if lengths is None else y.masked_fill(padding, 0), torch.stack(states, dim=1)

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            x: ``(batch, state_dim)``, floating.
            state: ``(batch, num_layers, *core.state_shape)``, floating; zeros if absent.

        Returns:
            y ``(batch, output_dim)``, and the next state.
        """
        self._check_input("SSM.step", x, (2,))
        self._check_state("SSM.step", x.shape[0], state)
        state = self.init_hidden(x.shape[0]) if state is None else state
        h, states = linear(self.embed, x), []
        for i, (norm, core) in enumerate(zip(self.norms, self.cores, strict=True)):
            y, last = _method_or_call(core, "step")(norm(h), state[:, i])
            h = h + y
            states.append(last)
        return linear(self.head, self.norm(h)), torch.stack(states, dim=1)

    def save(self, path: str | PathLike[str]) -> None:
        """Write weights and options, without code, to the file ``path``.

        Raises:
            ValueError: ``core`` is a callable, or a layer is quantised; such models save their ``state_dict``.
        """
        checkpoint.save_module("SSM.save", self, self.options, path, kind="SSM")

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device = "cpu") -> "SSM":
        """Return the model that :meth:`save` wrote. Loading runs no code from the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds another kind of object.
        """
        return checkpoint.load_module("SSM.load", cls, path, device, kind="SSM")

    def _check_input(self, where: str, x: Any, ranks: tuple[int, ...]) -> None:
        _check.tensor(where, "x", x)
        if x.dim() not in ranks or x.shape[-1] != self.state_dim:
            shapes = {2: f"(batch, {self.state_dim})", 3: f"(batch, time, {self.state_dim})"}
            wanted = " or ".join(shapes[r] for r in ranks)
            raise ValueError(f"{where}: x must have shape {wanted}, got {tuple(x.shape)}")
        like = reference_weight(self.embed, self.norm)
        _check.dtype(where, "x", x, (like.dtype,))
        _check.device(where, "x", x, like.device, "the model")

    def _check_state(self, where: str, rows: int, state: Any) -> None:
        if state is None:
            return
        _check.tensor(where, "state", state)
        shape = (rows, *self._state_shape)
        _check.shape(where, "state", state, shape, str(shape))

    def _check_cores_pack(self) -> None:
        """Raise unless the cores, which may be a user's own, take ``cu_seqlens``."""
        for core in self.cores:
            parameters = inspect.signature(core.scan).parameters  # type: ignore[arg-type]
            if "cu_seqlens" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
                kind = type(core).__name__
                raise ValueError(f"SSM.scan: cu_seqlens must be None for the core {kind}, whose scan lacks it")


def _method_or_call(core: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the core's method, or the core itself where hooks are attached to it, because only a call runs them."""
    has_call = has_hooks(core) and getattr(type(core), "forward", None) is Core.forward
    method: Callable[..., tuple[Tensor, Tensor]] = core if has_call else getattr(core, name)
    return method


class SSMLayer(nn.Module):
    """Sequence encoder; the mean of its output over time is a task's context embedding.

    **Two-dimensional input is one sequence in time**; :class:`SSM` reads it as a batch of single steps.

    Args:
        input_dim: size of an observation.
        hidden_dim: size of the encoding.
        state_size, num_layers, core, dt_min, dt_max: as in :class:`SSM`.

    >>> encoder = SSMLayer(4, 16)
    >>> encoder(torch.randn(50, 4)).mean(dim=0).shape
    torch.Size([16])
    >>> encoder(torch.randn(3, 50, 4)).shape
    torch.Size([3, 50, 16])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        state_size: int = 16,
        num_layers: int = 1,
        core: str | Callable[[int, int], nn.Module] = "s6",
        dt_min: float | None = None,
        dt_max: float | None = None,
    ):
        super().__init__()
        self.input_dim = input_dim = check_size("SSMLayer", "input_dim", input_dim)
        self.hidden_dim = hidden_dim = check_size("SSMLayer", "hidden_dim", hidden_dim)
        options: dict[str, Any] = {"state_size": state_size, "num_layers": num_layers, "core": core}
        self.model = SSM(input_dim, hidden_dim, hidden_dim, **options, dt_min=dt_min, dt_max=dt_max)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Encode one sequence, a batch of sequences, or sequences packed into one.

        Args:
            x: ``(time, input_dim)`` or ``(batch, time, input_dim)``, floating.
            cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of packed sequences, as in :meth:`SSM.scan`.

        Returns:
            ``(time, hidden_dim)`` or ``(batch, time, hidden_dim)``.
        """
        _check.tensor("SSMLayer", "x", x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_dim:
            wanted = f"(time, {self.input_dim}) or (batch, time, {self.input_dim})"
            raise ValueError(f"SSMLayer: x must have shape {wanted}, got {tuple(x.shape)}")
        y: Tensor = self.model(x if x.dim() == 3 else x.unsqueeze(0), cu_seqlens=cu_seqlens)
        return y if x.dim() == 3 else y.squeeze(0)


class Stateful(nn.Module):
    """Wrap a model with ``scan``, ``step`` and ``init_hidden`` so that it keeps its state from call to call.

    The state is detached, so no gradient reaches an earlier call. It is zero before the first call, after
    :meth:`reset`, and when the batch size, dtype or device of the input changes.

    Args:
        model: :class:`SSM`, or a module with the same three methods.

    >>> model = Stateful(SSM(3, 8, 2))
    >>> a, b = model(torch.ones(1, 3)), model(torch.ones(1, 3))
    >>> torch.equal(a, b)
    False
    >>> model.reset()
    >>> torch.equal(model(torch.ones(1, 3)), a)
    True
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.state: Tensor | None = None
        self._kind: Any = None  # batch size, dtype and device of the last input

    def forward(self, x: Tensor) -> Tensor:
        """Run one step or a sequence from the state of the last call.

        Args:
            x: ``(batch, state_dim)`` or ``(batch, time, state_dim)``, floating.

        Returns:
            y of the same shape, with the model's output size last.
        """
        _check.tensor("Stateful", "x", x)
        state = self.state
        kind = (x.shape[0], x.dtype, x.device)
        if state is None or self._kind != kind:
            state = self.model.init_hidden(x.shape[0])
        y: Tensor
        y, state = self.model.scan(x, state) if x.dim() == 3 else self.model.step(x, state)
        self.state, self._kind = state.detach(), kind
        return y

    def reset(self, rows: Tensor | None = None) -> None:
        """Zero the state.

        Args:
            rows: ``(batch,)``, bool; the rows to zero, all of them if absent.
        """
        if rows is None or self.state is None:
            self.state = None
            return
        _check.tensor("Stateful.reset", "rows", rows)
        _check.dtype("Stateful.reset", "rows", rows, (torch.bool,))
        _check.shape("Stateful.reset", "rows", rows, self.state.shape[:1], str(tuple(self.state.shape[:1])))
        keep = ~rows.view(-1, *[1] * (self.state.dim() - 1))
        self.state = torch.where(keep, self.state, torch.zeros_like(self.state))
