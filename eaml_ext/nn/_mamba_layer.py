"""MambaLayer: the calls that Mamba and Mamba2 share, with their checks: forward, scan, step, states of zeros."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn.padding import check_boundaries, check_lengths, count_sequences, given, zero_padding
from eaml_ext.nn.precision import to_opmath
from eaml_ext.nn.submodule import reference_weight
from eaml_ext.ops._sizes import SIZE_LIMIT, check_size


def check_d_inner(where: str, expand: Any, d_model: int) -> tuple[float, int]:
    """Return ``expand`` as a Python number and the width ``int(expand * d_model)``; raise unless both are in range."""
    expand = _check.positive(where, "expand", expand)
    if not 1 <= expand * d_model < SIZE_LIMIT:
        raise ValueError(
            f"{where}: expand must make d_model {d_model} at least 1 channel and less than {SIZE_LIMIT} channels "
            f"wide, got {expand}"
        )
    return expand, int(expand * d_model)


# Not an ABC: libraries that derive classes from a module's type need the metaclass ``type``.
class MambaLayer(nn.Module):
    """A layer of a projection, a causal convolution and a selective scan, with the states of the last two.

    A derived class sets the attributes and defines ``_run_scan`` and ``_run_step``.

    Attributes:
        d_model: width of input and output.
        layer_idx: the key of this layer's states in ``inference_params``, or None.
        conv_state_shape: shape of one row's ``conv_state``, the last inputs of the convolution, the newest last.
        ssm_state_shape: shape of one row's ``ssm_state``.
    """

    d_model: int
    layer_idx: int | None
    conv_state_shape: tuple[int, ...]
    ssm_state_shape: tuple[int, ...]
    in_proj: nn.Module
    conv1d: nn.Module

    def _run_scan(
        self,
        x: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run :meth:`scan` on checked arguments; the padding of ``x`` is zero and without resets."""
        raise NotImplementedError(f"{type(self).__name__}: _run_scan is not defined")

    def _run_step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run :meth:`step` on checked arguments, ``x`` and y ``(batch, d_model)``."""
        raise NotImplementedError(f"{type(self).__name__}: _run_step is not defined")

    def _run_step_kernel(self, x: Any, conv_state: Any, ssm_state: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Run :meth:`step` on a kernel that checks its arguments; None where there is none, or it refused them."""
        return None

    def forward(
        self,
        x: Tensor,
        inference_params: Any = None,
        *,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        _method: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """Run a sequence, from the initial states or from those in ``inference_params``.

        Args:
            x: ``(batch, length, d_model)``, floating.
            inference_params: mamba_ssm's ``InferenceParams``. ``key_value_memory_dict[layer_idx]`` holds both states
                between calls. A call with ``seqlen_offset`` 0 starts from the initial states; later calls may have any
                length.
            cu_seqlens, seq_idx: as in :meth:`scan`.

        Returns:
            ``(batch, length, d_model)``.

        Raises:
            TypeError: ``inference_params`` lacks an attribute.
            ValueError: the layer has no ``layer_idx``; ``seqlen_offset`` is not 0 and there are no states to continue
                from; or ``batch_size_offset`` is not 0.
        """
        if _method is not None:  # a method of this layer, called from here so that hooks run
            y: Tensor = _method(x)
            return y
        options = given(cu_seqlens=cu_seqlens, seq_idx=seq_idx)
        if inference_params is None:
            return self.scan(x, None, **options)[0]
        where = type(self).__name__
        if self.layer_idx is None:
            raise ValueError(f"{where}: inference_params needs a layer_idx, got a layer without one")
        for name in ("key_value_memory_dict", "seqlen_offset"):
            if not hasattr(inference_params, name):
                kind = type(inference_params).__name__
                raise TypeError(f"{where}: inference_params must have the attribute {name}, got {kind} without it")
        if getattr(inference_params, "batch_size_offset", 0):
            offset = inference_params.batch_size_offset
            raise ValueError(f"{where}: inference_params.batch_size_offset must be 0, got {offset}")
        memory, state = inference_params.key_value_memory_dict, None
        if inference_params.seqlen_offset:
            state = memory.get(self.layer_idx)
            if state is None:
                raise ValueError(
                    f"{where}: inference_params.key_value_memory_dict must hold the states of layer {self.layer_idx} "
                    f"where seqlen_offset is {inference_params.seqlen_offset}, got none: begin with seqlen_offset 0"
                )
        y, memory[self.layer_idx] = self.scan(x, state, **options)
        return y

    def scan(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run a sequence from a state.

        Args:
            x: ``(batch, length, d_model)``, floating.
            state: ``(conv_state, ssm_state)`` before the first step, with the shapes of :meth:`step`; the initial
                states if absent.
            reset: ``(batch, length)``, bool; an episode starts at t, without state or convolution inputs from before.
            lengths: ``(batch,)``, int64 or int32; row b has ``lengths[b]`` steps, followed by padding.
            cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row of ``x``,
                from 0 to ``length``; each has one row of the states. Excludes ``lengths``.
            seq_idx: ``(batch, length)``, int32 or int64; an episode starts where it changes. Excludes ``reset`` and
                ``cu_seqlens``.

        Returns:
            y ``(batch, length, d_model)``, zero on padding, and ``(conv_state, ssm_state)`` after the last step of each
            row or packed sequence.
        """
        where = f"{type(self).__name__}.scan"
        self._check_input(where, x, (3,))
        reset = check_boundaries(where, x, reset, lengths, cu_seqlens, seq_idx)
        conv_state, ssm_state = (None, None) if state is None else state
        if state is not None:
            self._check_states(where, x, conv_state, ssm_state, count_sequences(x, cu_seqlens))
        if lengths is not None:
            check_lengths(where, lengths, x)
            x, reset, padding = zero_padding(x, reset, lengths)
        y, conv_state, ssm_state = self._run_scan(x, conv_state, ssm_state, reset, lengths, cu_seqlens)
        return y if lengths is None else y.masked_fill(padding, 0), (conv_state, ssm_state)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run one step. The states are returned, not changed in place as in mamba_ssm, so that gradients pass.

        Args:
            x: ``(batch, 1, d_model)`` or ``(batch, d_model)``, floating.
            conv_state: ``(batch, *conv_state_shape)``, floating; the last inputs of the convolution, the newest last.
            ssm_state: ``(batch, *ssm_state_shape)``, floating.

        Returns:
            y, of the shape of ``x``, then ``conv_state`` and ``ssm_state`` after the step.
        """
        results = self._run_step_kernel(x, conv_state, ssm_state)
        if results is not None:
            return results
        where = f"{type(self).__name__}.step"
        self._check_input(where, x, (2, 3))
        if x.dim() == 3 and x.shape[1] != 1:
            raise ValueError(f"{where}: x must have length 1, got {x.shape[1]}")
        self._check_states(where, x, conv_state, ssm_state, x.shape[0])
        y, conv_state, ssm_state = self._run_step(x.flatten(1) if x.dim() == 3 else x, conv_state, ssm_state)
        return y.reshape(*x.shape[:-1], self.d_model), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the initial ``conv_state`` and ``ssm_state``, zeros.

        Args:
            batch_size: rows.
            max_seqlen: accepted for compatibility; the sizes do not depend on it.
            dtype: of ``conv_state``, the weights' if absent; ``ssm_state`` is float32 or float64.

        Returns:
            ``(batch_size, *conv_state_shape)`` and ``(batch_size, *ssm_state_shape)``.
        """
        where = f"{type(self).__name__}.allocate_inference_cache"
        batch_size = check_size(where, "batch_size", batch_size, zero=True)
        weight = reference_weight(self.conv1d, self.in_proj)
        conv_state = weight.new_zeros(batch_size, *self.conv_state_shape, dtype=dtype)
        return conv_state, to_opmath(weight).new_zeros(batch_size, *self.ssm_state_shape)

    def _check_input(self, where: str, x: Any, ranks: tuple[int, ...]) -> None:
        _check.tensor(where, "x", x)
        if x.dim() not in ranks or x.shape[-1] != self.d_model:
            wanted = f"(batch, {self.d_model}) or (batch, 1, {self.d_model})"
            wanted = wanted if 2 in ranks else f"(batch, length, {self.d_model})"
            raise ValueError(f"{where}: x must have shape {wanted}, got {tuple(x.shape)}")
        like = reference_weight(self.in_proj, self.conv1d)
        _check.device(where, "x", x, like.device, "the layer")
        if not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            _check.dtype(where, "x", x, (like.dtype,))

    def _check_states(self, where: str, x: Tensor, conv_state: Any, ssm_state: Any, rows: int) -> None:
        for name, value, row_shape in (
            ("conv_state", conv_state, self.conv_state_shape),
            ("ssm_state", ssm_state, self.ssm_state_shape),
        ):
            _check.tensor(where, name, value)
            shape = (rows, *row_shape)
            if value.shape != shape:
                _check.shape(where, name, value, shape, str(shape))
            _check.device(where, name, value, x.device, "x")
            if not value.is_floating_point():
                raise TypeError(
                    f"{where}: {name} must be floating point, got {str(value.dtype).removeprefix('torch.')}"
                )
