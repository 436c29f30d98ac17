"""Mamba: the block of mamba_ssm with its parameter names, on a CPU too, with explicit states and episode resets."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn._mamba_mixer import mixer_scan, mixer_step
from eaml_ext.nn._step_size import check_dt_range, inverse_softplus
from eaml_ext.nn.padding import check_lengths, check_reset, zero_padding
from eaml_ext.nn.precision import to_opmath
from eaml_ext.nn.submodule import reference_weight
from eaml_ext.ops._sizes import SIZE_LIMIT, check_size


class Mamba(nn.Module):
    """Mamba's block: the constructor, parameter names and initialisation of ``mamba_ssm.Mamba``, whose weights load.

    It runs on CPU and CUDA, takes and returns states, supports episode resets, and is differentiable twice. Under one
    seed the parameters are the numbers that mamba_ssm draws.

    Args:
        d_model: width of input and output.
        d_state: states per channel.
        d_conv: width of the causal convolution.
        expand: the block is ``int(expand * d_model)`` channels wide inside.
        dt_rank: rank of ``dt_proj``; ``"auto"``: ``ceil(d_model / 16)``.
        dt_min, dt_max: step sizes start log-uniform between them.
        dt_init: ``"random"`` or ``"constant"`` weights of ``dt_proj``.
        dt_scale: the weights of ``dt_proj`` start with the scale ``dt_scale * dt_rank ** -0.5``.
        dt_init_floor: the smallest initial step size.
        conv_bias: whether the convolution has a bias.
        bias: whether ``in_proj`` and ``out_proj`` have one.
        use_fast_path: accepted for compatibility; there is one path.
        layer_idx: the key of this layer's states in ``inference_params``.
        device, dtype: of the parameters; ``A_log`` and ``D`` are float32 or float64.

    Raises:
        TypeError, ValueError: an argument is out of its range, or an input or state has the wrong shape, dtype or
            device.

    Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.4.

    >>> block = Mamba(16)
    >>> x = torch.randn(2, 10, 16)
    >>> block(x).shape
    torch.Size([2, 10, 16])
    >>> y, (conv_state, ssm_state) = block.scan(x[:, :9])
    >>> y, conv_state, ssm_state = block.step(x[:, 9:], conv_state, ssm_state)
    >>> torch.allclose(y, block(x)[:, 9:], atol=1e-5), conv_state.shape, ssm_state.shape
    (True, torch.Size([2, 32, 4]), torch.Size([2, 32, 16]))
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d_model, d_state = check_size("Mamba", "d_model", d_model), check_size("Mamba", "d_state", d_state)
        d_conv, expand = check_size("Mamba", "d_conv", d_conv), _check.positive("Mamba", "expand", expand)
        dt_min, dt_max = check_dt_range("Mamba", dt_min, dt_max)
        dt_scale = _check.positive("Mamba", "dt_scale", dt_scale)
        dt_init_floor = _check.positive("Mamba", "dt_init_floor", dt_init_floor)
        for name, flag in (("conv_bias", conv_bias), ("bias", bias), ("use_fast_path", use_fast_path)):
            _check.flag("Mamba", name, flag)
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"Mamba: dt_rank must be 'auto' or an integer, got {dt_rank!r}")
        dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else check_size("Mamba", "dt_rank", dt_rank)
        if not 1 <= expand * d_model < SIZE_LIMIT:
            raise ValueError(
                f"Mamba: expand must make d_model {d_model} at least 1 channel and less than {SIZE_LIMIT} channels "
                f"wide, got {expand}"
            )
        d_inner = int(expand * d_model)

        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = d_inner, dt_rank
        self.layer_idx, self.use_fast_path = layer_idx, bool(use_fast_path)
        conv_bias, bias = bool(conv_bias), bool(bias)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, padding=d_conv - 1, groups=d_inner, bias=conv_bias, **factory)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(dt_rank, d_inner, **factory)
        scale = dt_scale * dt_rank**-0.5
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        else:
            nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        uniform = torch.rand(d_inner, **factory)
        dt = torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus(dt))
        opmath = torch.float64 if dtype == torch.float64 else torch.float32
        n = torch.arange(1, d_state + 1, dtype=opmath, device=device)
        self.A_log = nn.Parameter(n.log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner, dtype=opmath, device=device))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **factory)
        # mamba_ssm's training code reads these attributes.
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, inference_params: Any = None, *, _method: Callable[[Tensor], Any] | None = None
    ) -> Tensor:
        """Run a sequence, from zero states or from those in ``inference_params``.

        Args:
            x: ``(batch, length, d_model)``, floating.
            inference_params: mamba_ssm's ``InferenceParams``. ``key_value_memory_dict[layer_idx]`` holds both states
                between calls. A call with ``seqlen_offset`` 0 starts from zero states; later calls may have any length.

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
        if inference_params is None:
            return self.scan(x)[0]
        if self.layer_idx is None:
            raise ValueError("Mamba: inference_params needs a layer_idx, got a layer without one")
        for name in ("key_value_memory_dict", "seqlen_offset"):
            if not hasattr(inference_params, name):
                kind = type(inference_params).__name__
                raise TypeError(f"Mamba: inference_params must have the attribute {name}, got {kind} without it")
        if getattr(inference_params, "batch_size_offset", 0):
            offset = inference_params.batch_size_offset
            raise ValueError(f"Mamba: inference_params.batch_size_offset must be 0, got {offset}")
        memory, state = inference_params.key_value_memory_dict, None
        if inference_params.seqlen_offset:
            state = memory.get(self.layer_idx)
            if state is None:
                raise ValueError(
                    f"Mamba: inference_params.key_value_memory_dict must hold the states of layer {self.layer_idx} "
                    f"where seqlen_offset is {inference_params.seqlen_offset}, got none: begin with seqlen_offset 0"
                )
        y, memory[self.layer_idx] = self.scan(x, state)
        return y

    def scan(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run a sequence from a state.

        Args:
            x: ``(batch, length, d_model)``, floating.
            state: ``(conv_state, ssm_state)`` before the first step, with the shapes of :meth:`step`; zeros if absent.
            reset: ``(batch, length)``, bool; an episode starts at t, without state or convolution inputs from before.
            lengths: ``(batch,)``, int64 or int32; row b has ``lengths[b]`` steps, followed by padding.

        Returns:
            y ``(batch, length, d_model)``, zero on padding, and ``(conv_state, ssm_state)`` after each row's last step.
        """
        self._check_input("Mamba.scan", x, (3,))
        conv_state, ssm_state = (None, None) if state is None else state
        if state is not None:
            self._check_states("Mamba.scan", x, conv_state, ssm_state)
        if reset is not None:
            check_reset("Mamba.scan", reset, x)
        if lengths is not None:
            check_lengths("Mamba.scan", lengths, x)
            x, reset, padding = zero_padding(x, reset, lengths)
        y, conv_state, ssm_state = mixer_scan(self, x, conv_state, ssm_state, reset, lengths=lengths)
        return y if lengths is None else y.masked_fill(padding, 0), (conv_state, ssm_state)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run one step. The states are returned, not changed in place as in mamba_ssm, so that gradients pass.

        Args:
            x: ``(batch, 1, d_model)`` or ``(batch, d_model)``, floating.
            conv_state: ``(batch, d_inner, d_conv)``, floating; the last inputs of the convolution, the newest last.
            ssm_state: ``(batch, d_inner, d_state)``, floating.

        Returns:
            y, of the shape of ``x``, then ``conv_state`` and ``ssm_state`` after the step.
        """
        self._check_input("Mamba.step", x, (2, 3))
        if x.dim() == 3 and x.shape[1] != 1:
            raise ValueError(f"Mamba.step: x must have length 1, got {x.shape[1]}")
        self._check_states("Mamba.step", x, conv_state, ssm_state)
        y, conv_state, ssm_state = mixer_step(self, x.flatten(1) if x.dim() == 3 else x, conv_state, ssm_state)
        return y.reshape(*x.shape[:-1], self.d_model), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``conv_state`` and ``ssm_state`` of zeros.

        Args:
            batch_size: rows.
            max_seqlen: accepted for compatibility; the sizes do not depend on it.
            dtype: of ``conv_state``, the weights' if absent; ``ssm_state`` is float32 or float64.

        Returns:
            ``(batch_size, d_inner, d_conv)`` and ``(batch_size, d_inner, d_state)``.
        """
        batch_size = check_size("Mamba.allocate_inference_cache", "batch_size", batch_size, zero=True)
        weight = reference_weight(self.conv1d, self.in_proj)
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return conv_state, to_opmath(weight).new_zeros(batch_size, self.d_inner, self.d_state)

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"

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

    def _check_states(self, where: str, x: Tensor, conv_state: Any, ssm_state: Any) -> None:
        for name, value, width in (("conv_state", conv_state, self.d_conv), ("ssm_state", ssm_state, self.d_state)):
            _check.tensor(where, name, value)
            shape = (x.shape[0], self.d_inner, width)
            _check.shape(where, name, value, shape, str(shape))
            _check.device(where, name, value, x.device, "x")
            if not value.is_floating_point():
                raise TypeError(
                    f"{where}: {name} must be floating point, got {str(value.dtype).removeprefix('torch.')}"
                )
