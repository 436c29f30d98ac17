"""Scans and recurrent layers of other packages for benchmarks.second_order_peers, each with a formula of its values.

A case imports its package when it is called. Kernels that need a GPU run by Triton's interpreter, or are replaced by
the formula behind the package's own autograd function. The table of the page has a column for this.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight

from benchmarks.second_order_formulas import (
    combine,
    conv,
    decay,
    delta_rule,
    gru,
    linear_attention,
    linear_scan,
    log_decay,
    lpc,
    lstm,
    normal,
    ssd,
)
from eaml_ext.ops import selective_scan, selective_scan_reference

Function = Callable[..., Any]

CPU, INTERPRETER, REPLACED = "CPU", "Triton's interpreter", "replaced"
LENGTH = 16


@dataclass
class Case:
    """A function of a package, a formula of the same values in plain PyTorch, and arguments for both."""

    function: Function
    formula: Function
    inputs: list[Tensor]


@dataclass
class Peer:
    """A case, the distribution on PyPI that has its function, and how the function's kernel runs here."""

    distribution: str
    kernel: str
    case: Callable[[], Case]


# --- kernels ---------------------------------------------------------------------------------------------------------


def interpret_triton() -> None:
    """Run each kernel of Triton with the first of its tuning configurations, on a CPU; TRITON_INTERPRET is 1."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.best_config = config = self.configs[0]
        kwargs |= config.all_kwargs()
        if config.pre_hook is not None:  # zeroes the results that a kernel adds to
            config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        return self.fn.run(*args, **kwargs)

    Autotuner.run = run
    torch.cuda.device = contextlib.nullcontext
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=1)


def as_kernel(formula: Function, *x: Any) -> Any:
    """The formula as autograd sees a compiled kernel: its results are constants."""
    with torch.no_grad():
        return formula(*x)


def as_backward_kernel(formula: Function, x: Sequence[Tensor | None], grad: Tensor) -> list[Any]:
    """The gradients of the formula as constants, None for an argument that is None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in x]
    with torch.enable_grad():
        y = formula(*leaves)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad.detach()))
    return [None if t is None else next(grads) for t in leaves]


def module(name: str, **functions: Function) -> None:
    """Put a module with these functions where the import of a compiled one finds it."""
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(functions)


# --- packages that run on a CPU --------------------------------------------------------------------------------------


def scan_arguments(length: int = LENGTH) -> list[Tensor]:
    """u, delta, A, B, C, D and z of a selective scan."""
    u, delta, z = (normal(2, 4, length) for _ in range(3))
    B, C = normal(2, 3, length), normal(2, 3, length)
    return [u, delta, (-torch.rand(4, 3)).requires_grad_(), B, C, normal(4), z]


def reference(*x: Any) -> Tensor:
    return selective_scan_reference(*x, delta_softplus=True)


def eaml_ext() -> Case:
    return Case(lambda *x: selective_scan(*x, delta_softplus=True), reference, scan_arguments())


def mambapy() -> Case:
    from mambapy.pscan import pscan

    return Case(pscan, linear_scan, [decay(2, LENGTH, 3, 4), normal(2, LENGTH, 3, 4)])


def transformers() -> Case:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
        return mamba_selective_scan(u, delta, A, B, C, delta_softplus=True)

    return Case(scan, reference, scan_arguments(8)[:5])  # it rounds to float32, and differences lose digits with length


def associative_scan() -> Case:
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def states(a: Tensor, x: Tensor) -> Tensor:
        pair: Any = scan(combine, (a, x), dim=1, combine_mode="generic")
        return pair[1]

    return Case(states, linear_scan, [decay(2, LENGTH, 3), normal(2, LENGTH, 3)])


def torch_gru() -> Case:
    weights = [normal(12, 3), normal(12, 4), normal(12), normal(12)]

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        h = x.new_zeros(1, x.shape[1], 4)
        return torch.gru(x, h, weights, True, 1, 0.0, False, False, False)[0]

    return Case(layer, gru, [normal(LENGTH, 2, 3), *weights])


def torchlpc() -> Case:
    from torchlpc import sample_wise_lpc

    return Case(sample_wise_lpc, lpc, [normal(2, LENGTH), (0.2 * torch.randn(2, LENGTH, 2)).requires_grad_()])


def philtorch() -> Case:
    from philtorch.lpv import linear_recurrence

    def scan(a: Tensor, x: Tensor) -> Tensor:
        return linear_recurrence(a, x.new_zeros(len(x)), x)

    return Case(scan, linear_scan, [decay(3, LENGTH), normal(3, LENGTH)])


def s5() -> Case:
    from s5.jax_compat import associative_scan as scan

    def states(a: Tensor, x: Tensor) -> Tensor:
        return scan(combine, (a, x), axis=0)[1]

    return Case(states, lambda a, x: linear_scan(a, x, 0), [decay(LENGTH, 3), normal(LENGTH, 3)])


def heinsen() -> Case:
    layer = importlib.import_module("minGRU_pytorch.minGRU")
    scan = vars(layer)["heinsen_associative_scan_log"]
    return Case(scan, lambda a, x: linear_scan(a.exp(), x.exp()), [log_decay(2, LENGTH, 3), normal(2, LENGTH, 3)])


def lstm_arguments() -> list[Tensor]:
    return [normal(2, LENGTH, 4, 1, 3), normal(4, 1, 3, 3), normal(4, 1, 3)]


def flashrnn_torch() -> Case:
    from flashrnn import flashrnn

    def layer(*x: Tensor) -> Tensor:
        return flashrnn(*x, function="lstm", backend="vanilla_fwbw", dtype="float32")[0]

    return Case(layer, lstm, lstm_arguments())


# --- Triton kernels --------------------------------------------------------------------------------------------------


def accelerated_scan() -> Case:
    interpret_triton()
    from accelerated_scan.scalar import scan

    arguments = [decay(1, 2, LENGTH), normal(1, 2, LENGTH)]  # few, because a block of the kernel has 2048 steps
    return Case(scan, lambda a, x: linear_scan(a, x, 2), arguments)


def fla_case(package: str, name: str, formula: Function, inputs: list[Tensor]) -> Case:
    interpret_triton()
    function = getattr(importlib.import_module(f"fla.ops.{package}"), name)
    return Case(lambda *x: function(*x)[0], formula, inputs)


def heads() -> list[Tensor]:
    """q, k and v of one head."""
    return [normal(1, LENGTH, 1, 16) for _ in range(3)]


def fla_hgrn() -> Case:
    inputs = [normal(2, LENGTH, 16), log_decay(2, LENGTH, 16)]
    return fla_case("hgrn", "fused_recurrent_hgrn", lambda x, g: linear_scan(g.exp(), x), inputs)


def fla_gla() -> Case:
    return fla_case("gla", "fused_recurrent_gla", linear_attention, [*heads(), log_decay(1, LENGTH, 1, 16)])


def fla_rwkv6() -> Case:
    inputs = [*heads(), log_decay(1, LENGTH, 1, 16), normal(1, 16)]
    return fla_case("rwkv6", "fused_recurrent_rwkv6", linear_attention, inputs)


def fla_delta_rule() -> Case:
    q, k, v = heads()
    inputs = [q, F.normalize(k.detach(), dim=-1).requires_grad_(), v, decay(1, LENGTH, 1)]
    return fla_case("delta_rule", "fused_recurrent_delta_rule", delta_rule, inputs)


def mamba_ssd() -> Case:
    interpret_triton()
    module("selective_scan_cuda")
    module("causal_conv1d_cuda")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    dt, A = torch.rand(1, LENGTH, 2).requires_grad_(), (-torch.rand(2)).requires_grad_()
    inputs = [normal(1, LENGTH, 2, 16), dt, A, normal(1, LENGTH, 1, 16), normal(1, LENGTH, 1, 16)]
    return Case(lambda *x: mamba_chunk_scan_combined(*x, chunk_size=LENGTH), ssd, inputs)


# --- replaced kernels ------------------------------------------------------------------------------------------------


def mamba_ssm() -> Case:
    def forward(*arguments: Any) -> list[Tensor]:
        u, delta, A, B, C, D, z, bias, _ = arguments
        _, last = as_kernel(selective_scan_reference, u, delta, A, B, C, D, None, bias, True, True)
        chunks = torch.stack([torch.zeros_like(last), last], dim=-1).flatten(2).unsqueeze(2)  # decays are not read
        ungated, gated = (as_kernel(reference, u, delta, A, B, C, D, gate, bias) for gate in (None, z))
        return [ungated, chunks, gated]

    def backward(*arguments: Any) -> list[Any]:
        u, delta, A, B, C, D, z, bias, grad_y, *_ = arguments
        *grads, dz, dbias = as_backward_kernel(reference, (u, delta, A, B, C, D, z, bias), grad_y)
        return [*grads, dbias, dz]

    module("selective_scan_cuda", fwd=forward, bwd=backward)
    module("causal_conv1d_cuda")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return Case(lambda *x: selective_scan_fn(*x, delta_softplus=True), reference, scan_arguments())


def causal_conv1d() -> Case:
    def forward(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> None:
        rest[2].copy_(as_kernel(conv, x, weight, bias))

    def backward(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, *rest: Any) -> None:
        """The gradients without autograd, which is off inside of the package's custom op."""
        padded, kernel, groups = F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), len(weight)
        y = F.conv1d(padded, kernel, bias, groups=groups)
        grad = grad_y * y.sigmoid() * (1 + y * (1 - y.sigmoid()))
        dx, dweight, dbias = rest[3:6]
        dx.copy_(conv1d_input(padded.shape, kernel, grad, groups=groups)[..., weight.shape[1] - 1 :])
        dweight.copy_(conv1d_weight(padded, kernel.shape, grad, groups=groups).squeeze(1))
        dbias.copy_(grad.sum((0, 2)))

    module("causal_conv1d_cuda", causal_conv1d_fwd=forward, causal_conv1d_bwd=backward)
    from causal_conv1d import causal_conv1d_fn

    inputs = [normal(2, 3, LENGTH), normal(3, 4), normal(3)]
    return Case(lambda *x: causal_conv1d_fn(*x, activation="silu"), conv, inputs)


def accelerated_scan_warp() -> Case:
    def scan(a: Tensor, x: Tensor) -> Tensor:
        return linear_scan(a, x, 2)

    def forward(a: Tensor, x: Tensor, states: Tensor, reverse: bool) -> None:
        states.copy_(as_kernel(scan, a, x))

    def backward(a: Tensor, states: Tensor, grad: Tensor, grad_a: Tensor, grad_x: Tensor) -> None:
        previous = torch.cat([torch.zeros_like(states[..., :1]), states[..., :-1]], dim=-1)
        found = as_backward_kernel(scan, (a, states - a * previous), grad)
        for result, value in zip((grad_a, grad_x), found, strict=True):
            result.copy_(value)

    compiled = SimpleNamespace(warpscan_forward=forward, warpscan_backward=backward)
    with mock.patch("torch.utils.cpp_extension.load_inline", lambda **_: compiled):
        from accelerated_scan.warp import scan as function
    return Case(function, scan, [decay(2, 3, LENGTH), normal(2, 3, LENGTH)])


def fla_gla_chunk() -> Case:
    """Its kernels fail in Triton's interpreter."""
    inputs = [*heads(), log_decay(1, LENGTH, 1, 16)]
    case = fla_case("gla", "chunk_gla", linear_attention, inputs)
    chunk: Any = importlib.import_module("fla.ops.gla.chunk")

    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **_: Any) -> tuple[Any, ...]:
        return g.cumsum(1), None, None, None, as_kernel(linear_attention, q, k, v, g)

    def backward(q: Tensor, k: Tensor, v: Tensor, g: Any, g_cumsum: Any, do: Tensor, **_: Any) -> tuple[Any, ...]:
        if g is None:
            g = torch.diff(g_cumsum.detach(), dim=1, prepend=torch.zeros_like(g_cumsum[:, :1]))
        return (*as_backward_kernel(linear_attention, (q, k, v, g), do), None)

    chunk.chunk_gla_fwd, chunk.chunk_gla_bwd = forward, backward
    return case


def flashrnn_cuda() -> Case:
    from flashrnn import FlashRNNConfig, flashrnn

    implementation: Any = importlib.import_module("flashrnn.flashrnn.flashrnn")

    def layer(Wx: Tensor, states: Tensor, R: Tensor, b: Tensor) -> Tensor:
        """The formula in the layout of the kernel; ``states`` are zero."""
        found = lstm(Wx.permute(1, 0, 3, 2, 4), R.permute(2, 0, 3, 1), b.transpose(0, 1)).transpose(1, 2)
        return torch.cat([states.unsqueeze(1), found], dim=1)

    class Kernel:
        def forward(self, training: bool, *x: Tensor) -> tuple[Tensor, ...]:
            return as_kernel(layer, *x), x[0], x[1]

        def backward(self, R: Tensor, b: Tensor, _: Tensor, Wx: Tensor, states: Tensor, grad: Tensor) -> list[Any]:
            return as_backward_kernel(layer, (Wx, states, R.permute(0, 3, 1, 2), b), grad)

    implementation._FlashRNNCUDA.instance = lambda config: Kernel()

    def function(*x: Tensor) -> Tensor:
        config = FlashRNNConfig(backend="cuda", function="lstm", num_heads=1, head_dim=3, dtype="float32")
        return flashrnn(*x, config=config)[0]

    return Case(function, lstm, lstm_arguments())


PEERS = {
    "eaml_ext: `selective_scan`": Peer("eaml_ext", CPU, eaml_ext),
    "torch: `gru`": Peer("torch", CPU, torch_gru),
    "torch: `associative_scan`, generic": Peer("torch", CPU, associative_scan),
    "transformers: Mamba's slow path": Peer("transformers", CPU, transformers),
    "s5-pytorch: `associative_scan`": Peer("s5-pytorch", CPU, s5),
    "minGRU-pytorch: `heinsen_associative_scan_log`": Peer("minGRU-pytorch", CPU, heinsen),
    "torchlpc: `sample_wise_lpc`": Peer("torchlpc", CPU, torchlpc),
    "philtorch: `linear_recurrence`": Peer("philtorch", CPU, philtorch),
    "mambapy: `pscan`": Peer("mambapy", CPU, mambapy),
    "flashrnn: LSTM, `vanilla_fwbw`": Peer("flashrnn", CPU, flashrnn_torch),
    "flashrnn: LSTM, `cuda`": Peer("flashrnn", REPLACED, flashrnn_cuda),
    "mamba_ssm: `selective_scan_fn`": Peer("mamba-ssm", REPLACED, mamba_ssm),
    "mamba_ssm: `mamba_chunk_scan_combined`": Peer("mamba-ssm", INTERPRETER, mamba_ssd),
    "causal-conv1d: `causal_conv1d_fn`": Peer("causal-conv1d", REPLACED, causal_conv1d),
    "accelerated-scan: `scalar.scan`": Peer("accelerated-scan", INTERPRETER, accelerated_scan),
    "accelerated-scan: `warp.scan`": Peer("accelerated-scan", REPLACED, accelerated_scan_warp),
    "fla: `fused_recurrent_hgrn`": Peer("fla-core", INTERPRETER, fla_hgrn),
    "fla: `fused_recurrent_gla`": Peer("fla-core", INTERPRETER, fla_gla),
    "fla: `chunk_gla`": Peer("fla-core", REPLACED, fla_gla_chunk),
    "fla: `fused_recurrent_rwkv6`": Peer("fla-core", INTERPRETER, fla_rwkv6),
    "fla: `fused_recurrent_delta_rule`": Peer("fla-core", INTERPRETER, fla_delta_rule),
}
