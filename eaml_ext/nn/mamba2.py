"""Mamba2: the layer of mamba_ssm with its parameter names, on a CPU too, with explicit states and episode resets."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn._decoding import linear_step
from eaml_ext.nn._mamba2_mixer import mamba2_scan, mamba2_step
from eaml_ext.nn._mamba_layer import MambaLayer, check_d_inner
from eaml_ext.nn._step_size import check_dt_range, draw_step_sizes, inverse_softplus
from eaml_ext.nn.padding import count_sequences
from eaml_ext.nn.precision import to_opmath
from eaml_ext.ops._sizes import check_size


class Mamba2(MambaLayer):
    """Mamba-2's layer: the constructor, parameter names and initialisation of ``mamba_ssm.Mamba2``, whose weights load.

    It runs on CPU and CUDA, takes and returns states, supports episode resets, and is differentiable twice. Under one
    seed the parameters are the numbers that mamba_ssm draws. A head is ``headdim`` channels with one decay and one step
    size; a group is the heads that share B and C.

    ``in_proj`` gives the gate z, the input x, B, C and the step sizes. x, B and C pass the convolution. The scan's
    output is ``norm(y * silu(z))``, ``norm(y) * silu(z)`` with ``norm_before_gate``, and ``y * silu(z)`` without
    ``rmsnorm``. With ``d_ssm`` below the inner width, the other channels are a gated MLP beside the scan.

    Args:
        d_model: width of input and output.
        d_state: states per channel.
        d_conv: width of the causal convolution.
        conv_init: its weights start uniform in ``[-conv_init, conv_init]``; PyTorch's initialisation if absent.
        expand: the layer is ``int(expand * d_model)`` channels wide inside.
        headdim: channels per head.
        d_ssm: channels of the scan; all inner channels if absent.
        ngroups: groups of heads, each with its own B and C; ``norm`` normalises each group by itself.
        A_init_range: decay rates start uniform between its two numbers.
        D_has_hdim: whether ``D`` has one number per channel instead of one per head.
        rmsnorm: whether there is a ``norm``, of epsilon 1e-5.
        norm_before_gate: whether the gate multiplies after ``norm``.
        dt_min, dt_max: step sizes start log-uniform between them.
        dt_init_floor: the smallest initial step size.
        dt_limit: step sizes are clamped between its two numbers, in a scan and in a step.
        bias: whether ``in_proj`` and ``out_proj`` have one.
        conv_bias: whether the convolution has a bias.
        chunk_size, use_mem_eff_path: accepted for compatibility; there is one path.
        layer_idx: the key of this layer's states in ``inference_params``.
        process_group: must be None; the layer is not divided among processes.
        sequence_parallel: accepted for compatibility; it has no effect without a ``process_group``.
        device, dtype: of the parameters; ``D`` is float32 or float64.
        learnable_init_states: whether sequences start from the parameter ``init_states``, as in
            ``mamba_ssm.modules.mamba2_simple.Mamba2Simple``, instead of zero states.

    Attributes:
        conv_state_shape: ``(d_ssm + 2 * ngroups * d_state, d_conv)``, of one row's ``conv_state``.
        ssm_state_shape: ``(nheads, headdim, d_state)``, of one row's ``ssm_state``.

    Raises:
        TypeError, ValueError: an argument is out of its range, or an input or state has the wrong shape, dtype or
            device. A scan with ``learnable_init_states`` refuses ``reset``, because a reset zeroes the state.

    Source: Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality" (arXiv 2405.21060), section 7.

    >>> layer = Mamba2(16, d_state=8, headdim=4)
    >>> x = torch.randn(2, 10, 16)
    >>> layer(x).shape
    torch.Size([2, 10, 16])
    >>> y, (conv_state, ssm_state) = layer.scan(x[:, :9])
    >>> y, conv_state, ssm_state = layer.step(x[:, 9:], conv_state, ssm_state)
    >>> torch.allclose(y, layer(x)[:, 9:], atol=1e-5), conv_state.shape, ssm_state.shape
    (True, torch.Size([2, 48, 4]), torch.Size([2, 8, 4, 8]))
    """

    init_states: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: Sequence[float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        learnable_init_states: bool = False,
    ):
        super().__init__()
        d_model, d_state = check_size("Mamba2", "d_model", d_model), check_size("Mamba2", "d_state", d_state)
        d_conv, (expand, d_inner) = check_size("Mamba2", "d_conv", d_conv), check_d_inner("Mamba2", expand, d_model)
        headdim, ngroups = check_size("Mamba2", "headdim", headdim), check_size("Mamba2", "ngroups", ngroups)
        d_ssm = d_inner if d_ssm is None else check_size("Mamba2", "d_ssm", d_ssm)
        if d_ssm > d_inner:
            raise ValueError(f"Mamba2: d_ssm must be at most expand * d_model = {d_inner}, got {d_ssm}")
        if d_ssm % headdim:
            raise ValueError(f"Mamba2: headdim must divide the {d_ssm} channels of the scan, got {headdim}")
        nheads = d_ssm // headdim
        if nheads % ngroups:
            raise ValueError(f"Mamba2: ngroups must divide the {nheads} heads, got {ngroups}")
        check_size("Mamba2", "chunk_size", chunk_size)
        if process_group is not None:
            raise ValueError(f"Mamba2: process_group must be None, got {type(process_group).__name__}")
        A_init_range = _check_range("A_init_range", A_init_range, zero=False)
        dt_limit = _check_range("dt_limit", dt_limit, zero=True)
        dt_min, dt_max = check_dt_range("Mamba2", dt_min, dt_max)
        dt_init_floor = _check.positive("Mamba2", "dt_init_floor", dt_init_floor)
        if conv_init is not None:
            conv_init = _check.positive("Mamba2", "conv_init", conv_init)
            if conv_init == math.inf:
                raise ValueError("Mamba2: conv_init must be finite, got inf")
        flags = {
            "D_has_hdim": D_has_hdim,
            "rmsnorm": rmsnorm,
            "norm_before_gate": norm_before_gate,
            "bias": bias,
            "conv_bias": conv_bias,
            "use_mem_eff_path": use_mem_eff_path,
            "sequence_parallel": sequence_parallel,
            "learnable_init_states": learnable_init_states,
        }
        flags = {name: _check.flag("Mamba2", name, value) for name, value in flags.items()}

        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.d_ssm, self.headdim, self.nheads = d_inner, d_ssm, headdim, nheads
        self.ngroups, self.dt_limit, self.layer_idx = ngroups, dt_limit, layer_idx
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = (
            flags[name] for name in ("D_has_hdim", "rmsnorm", "norm_before_gate")
        )
        conv_dim = d_ssm + 2 * ngroups * d_state
        self.conv_state_shape, self.ssm_state_shape = (conv_dim, d_conv), (nheads, headdim, d_state)
        # The parts of in_proj's output: the gate and the input of the MLP, z, (x, B, C), dt.
        self._in_proj_sizes = (d_inner - d_ssm, d_inner - d_ssm, d_ssm, conv_dim, nheads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, sum(self._in_proj_sizes), bias=flags["bias"], **factory)
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, d_conv, padding=d_conv - 1, groups=conv_dim, bias=flags["conv_bias"], **factory
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        states = torch.zeros(self.ssm_state_shape, **factory) if flags["learnable_init_states"] else None
        self.register_parameter("init_states", None if states is None else nn.Parameter(states))
        self.act = nn.SiLU()
        self.dt_bias = nn.Parameter(inverse_softplus(draw_step_sizes(nheads, dt_min, dt_max, dt_init_floor, **factory)))
        A = torch.empty(nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(self.dt_bias.dtype))
        opmath = to_opmath(self.dt_bias).dtype
        self.D = nn.Parameter(torch.ones(d_ssm if self.D_has_hdim else nheads, device=device, dtype=opmath))
        if self.rmsnorm:
            self.norm = GroupRMSNorm(d_ssm, ngroups, **factory)
        self.out_proj = nn.Linear(d_inner, d_model, bias=flags["bias"], **factory)
        for parameter in (self.dt_bias, self.A_log, self.D, self.init_states):
            if parameter is not None:  # mamba_ssm's training code reads this attribute
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the initial ``conv_state`` and ``ssm_state``: zeros, or ``init_states`` with its gradient.

        Arguments and shapes are those of :meth:`MambaLayer.allocate_inference_cache`.
        """
        conv_state, ssm_state = super().allocate_inference_cache(batch_size, max_seqlen, dtype)
        return conv_state, ssm_state if self.init_states is None else self._initial_state(len(conv_state))

    def _run_scan(
        self,
        x: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.init_states is not None:
            if reset is not None:
                raise ValueError("Mamba2.scan: reset and seq_idx must be None with learnable_init_states, got a tensor")
            ssm_state = self._initial_state(count_sequences(x, cu_seqlens)) if ssm_state is None else ssm_state
        mlp_gate, mlp, z, x, dt = self.in_proj(x).split(self._in_proj_sizes, dim=-1)
        gate = z if self._scan_gates() else None
        y, conv_state, ssm_state = mamba2_scan(
            self, x, dt, gate, conv_state, ssm_state, reset, None, lengths, cu_seqlens, self.dt_limit
        )
        return self._outputs(y, z, mlp_gate, mlp), conv_state, ssm_state

    def _run_step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mlp_gate, mlp, z, x, dt = linear_step(self.in_proj, x).split(self._in_proj_sizes, dim=-1)
        gate = z if self._scan_gates() else None
        y, conv_state, ssm_state = mamba2_step(self, x, dt, gate, conv_state, ssm_state, self.dt_limit)
        return self._outputs(y, z, mlp_gate, mlp), conv_state, ssm_state

    def _initial_state(self, batch: int) -> Tensor:
        assert self.init_states is not None
        return to_opmath(self.init_states).expand(batch, *self.ssm_state_shape)

    def _scan_gates(self) -> bool:
        """Return whether the op multiplies its output by silu(z)."""
        return not (self.rmsnorm and self.norm_before_gate)

    def _outputs(self, y: Tensor, z: Tensor, mlp_gate: Tensor, mlp: Tensor) -> Tensor:
        """Normalise the output of the scan, gate it where the op has not, append the MLP, and project."""
        y = self.norm(y) if self.rmsnorm else y
        y = y if self._scan_gates() else y * self.act(z)
        y = torch.cat([self.act(mlp_gate) * mlp, y], dim=-1) if mlp.shape[-1] else y
        return linear_step(self.out_proj, y)

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, "
            f"headdim={self.headdim}, ngroups={self.ngroups}"
        )


class GroupRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x ** 2) + 1e-5)``, with the mean over each of ``groups`` equal parts of the channels.

    Args:
        dim: channels, the last dimension of the input.
        groups: divides ``dim``.
        device, dtype: of ``weight``.

    >>> GroupRMSNorm(4, 2)(torch.tensor([3.0, 3.0, 0.5, 0.5]))
    tensor([1.0000, 1.0000, 1.0000, 1.0000], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, groups: int, **factory: Any):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """``(*, dim)``, floating -> the same shape and dtype; computed in float32 or float64."""
        grouped = to_opmath(x).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(grouped, grouped.shape[-1:], eps=1e-5).flatten(-2) * to_opmath(self.weight)
        return y.to(x.dtype)


def _check_range(name: str, value: Any, zero: bool) -> tuple[float, float]:
    """Return a pair of Python numbers; raise unless 0 < low <= high < inf, with ``zero`` 0 <= low <= high <= inf."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"Mamba2: {name} must be two numbers, got {value!r}")
    low, high = (_check.positive("Mamba2", name, v, zero=zero) for v in value)
    if low > high or (high == math.inf and not zero):
        wanted = "in ascending order" if zero else "finite and in ascending order"
        raise ValueError(f"Mamba2: {name} must be {wanted}, got {value!r}")
    return low, high
