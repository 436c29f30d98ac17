"""Mamba: the block of mamba_ssm with its parameter names, on a CPU too, with explicit states and episode resets."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn._mamba_layer import MambaLayer, check_d_inner
from eaml_ext.nn._mamba_mixer import mixer_scan, mixer_step, plain_weights
from eaml_ext.nn._step_size import check_dt_range, draw_step_sizes, inverse_softplus
from eaml_ext.ops._sizes import check_size
from eaml_ext.ops.mamba_step import run_kernel


class Mamba(MambaLayer):
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

    Attributes:
        conv_state_shape: ``(d_inner, d_conv)``, of one row's ``conv_state``.
        ssm_state_shape: ``(d_inner, d_state)``, of one row's ``ssm_state``.

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

    Two sequences, of 3 and 7 steps, in one row:

    >>> cu_seqlens = torch.tensor([0, 3, 10], dtype=torch.int32)
    >>> y, (conv_state, ssm_state) = block.scan(x[:1], cu_seqlens=cu_seqlens)
    >>> torch.allclose(y[:, 3:], block(x[:1, 3:]), atol=1e-5), conv_state.shape, ssm_state.shape
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
        d_conv, (expand, d_inner) = check_size("Mamba", "d_conv", d_conv), check_d_inner("Mamba", expand, d_model)
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

        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = d_inner, dt_rank
        self.conv_state_shape, self.ssm_state_shape = (d_inner, d_conv), (d_inner, d_state)
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
        dt = draw_step_sizes(d_inner, dt_min, dt_max, dt_init_floor, **factory)
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

    def _run_scan(
        self,
        x: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return mixer_scan(self, x, conv_state, ssm_state, reset, lengths=lengths, cu_seqlens=cu_seqlens)

    def _run_step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mixer_step(self, x, conv_state, ssm_state)

    def _run_step_kernel(self, x: Any, conv_state: Any, ssm_state: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
            return None
        weights, rank = plain_weights(self), x.dim()
        if weights is None or not (rank == 2 or (rank == 3 and x.shape[1] == 1)):
            return None
        results = run_kernel(x if rank == 2 else x.flatten(1), conv_state, ssm_state, weights)
        if results is None or rank == 2:
            return results
        y, conv_state, ssm_state = results
        return y.unsqueeze(1), conv_state, ssm_state

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"
