"""Export to ONNX: translations of the ops for ``torch.onnx.export(..., custom_translation_table=)``.

A scan becomes ONNX's ``Scan``, whose body is one step; a step becomes that body. A convolution becomes ``Conv``; with
resets, weights per task or in float64 it becomes a sum of products. Sums have the dtype of the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eaml_ext._torch_compat import record_onnx_nodes
from eaml_ext.ops._library import library
from eaml_ext.ops.selective_scan._schema import NUM_INPUTS, NUM_OPTIONS, ScanInputs, ScanOptions, split_args

try:
    from onnxscript import ir
except ImportError as error:
    raise ImportError(
        f"eaml_ext.integrations.onnx: onnx and onnxscript are needed, pip install 'eaml_ext[onnx]' ({error})"
    ) from error

Value = Any  # ir.Value, or None for an absent argument


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the ONNX translations of the ops in a form that ``torch.onnx.export`` takes.

    They cover ``selective_scan``, ``selective_scan_step``, ``causal_conv1d`` and ``causal_conv1d_step`` with every
    option but ``cu_seqlens`` and a complex ``A``; an export of these raises an error. The layers on these ops are thus
    exported: ``nn.Mamba``, ``nn.Mamba2``, and ``nn.SSM`` with the cores "s6", "mamba", "ssd" and "rwkv". The cores
    "s4d", "s5", "lru" and "retention" have a complex ``A``. Batch and length may be dynamic, the sizes of parameters
    not. onnxruntime runs sequences of at least one step.

    Returns:
        A new dict from ops to functions, to which translations of other ops may be added.

    >>> import torch
    >>> from eaml_ext import SSM
    >>> model, x = SSM(3, 8, 2).eval(), torch.randn(2, 7, 3)
    >>> shapes = ({0: "batch", 1: "time"},)
    >>> table = translation_table()
    >>> program = torch.onnx.export(model, (x,), dynamic_shapes=shapes, custom_translation_table=table, verbose=False)
    >>> y = program(x)[0]  # computed by onnxruntime
    >>> torch.allclose(y, model(x), atol=1e-5)
    True
    """
    table = {
        library.selective_scan.default: _selective_scan,
        library.selective_scan_step.default: _selective_scan_step,
        library.causal_conv1d.default: _causal_conv1d,
    }
    return {op: _recorded(translation) for op, translation in table.items()}


class _Nodes:
    """A list of ONNX nodes. A call adds one and returns its output: ``nodes("Add", a, b)``.

    Args:
        outer: the nodes of the graph around, for those of a subgraph; receives its constants.
        prefix: begins the names of a subgraph's values, which must differ from all names of the graph around.
    """

    def __init__(self, outer: _Nodes | None = None, prefix: str = ""):
        self.outer, self.prefix = outer or self, prefix
        self.all: list[Any] = []

    def __call__(self, op_type: str, *inputs: Value, **attributes: Any) -> Value:
        return self.multiple(1, op_type, *inputs, **attributes)[0]

    def multiple(self, num_outputs: int, op_type: str, *inputs: Value, **attributes: Any) -> Any:
        """Add a node with several outputs."""
        named = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", op_type, inputs, named, num_outputs=num_outputs)
        if self.prefix:
            for output in node.outputs:
                output.name = f"{self.prefix}{len(self.all)}"
        self.all.append(node)
        return node.outputs

    def squeezed(self, value: Value) -> Value:
        """``(*, 1)`` -> ``(*)``."""
        output = self("Squeeze", value, self.ints(-1))
        output.dtype, output.shape = value.dtype, ir.Shape(value.shape[:-1])
        return output

    def constant(self, value: Any, dtype: Any) -> Value:
        return self.outer("Constant", value=ir.tensor(value, dtype=dtype))

    def ints(self, *values: int) -> Value:
        return self.constant(list(values), ir.DataType.INT64)

    def reshape(self, value: Value, *sizes: int) -> Value:
        """Reshape ``value``; a size of 0 is that of ``value``."""
        return self("Reshape", value, self.ints(*sizes))

    def size(self, value: Value, dim: int) -> Value:
        """The size of a dimension, ``(1,)``."""
        return self("Shape", value, start=dim, end=dim + 1)

    def cast(self, value: Value, dtype: Any) -> Value:
        """Convert a value, which may be None."""
        if value is None or value.dtype == dtype:
            return value
        converted = self("Cast", value, to=dtype)
        converted.shape = value.shape
        return converted


def _recorded(translation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of an op's arguments that hands the nodes of their translation to the exporter."""

    @functools.wraps(translation)
    def translate(*args: Any) -> Any:
        nodes = _Nodes()
        outputs = translation(nodes, *args)
        record_onnx_nodes(nodes.all)
        return outputs

    return translate


def _per_row(nodes: _Nodes, parameter: Value, rank: int, like: Value) -> Value:
    """Return a parameter ``(tasks, *)`` as ``(batch, *)``, and a shared one, of ``rank`` dimensions, as ``(1, *)``.

    The batch is that of ``like`` ``(batch, *)``.
    """
    if len(parameter.shape) == rank:
        return nodes("Unsqueeze", parameter, nodes.ints(0))
    batch = nodes("Squeeze", nodes.size(like, 0))
    zero, one = (nodes.constant(i, ir.DataType.INT64) for i in (0, 1))
    rows = nodes("Mul", nodes("Range", zero, batch, one), nodes.size(parameter, 0))
    return nodes("Gather", parameter, nodes("Div", rows, batch), axis=0)


def _softplus(nodes: _Nodes, x: Value, dtype: Any) -> Value:
    """max(x, 0) + log1p(e) with e = exp(-|x|); log1p(e) = log(u) e / (u - 1) with u = 1 + e, and e where u is 1.

    ONNX's Softplus may compute log(1 + exp(x)), which loses the digits of small step sizes.
    """
    one, zero = (nodes.constant(float(i), dtype) for i in (1, 0))
    e = nodes("Exp", nodes("Neg", nodes("Abs", x)))
    u = nodes("Add", one, e)
    rounded_e = nodes("Sub", u, one)
    log1p = nodes("Div", nodes("Mul", nodes("Log", u), e), rounded_e)
    log1p = nodes("Where", nodes("Equal", rounded_e, zero), e, log1p)
    return nodes("Add", nodes("Max", x, zero), log1p)


def _silu(nodes: _Nodes, x: Value) -> Value:
    return nodes("Mul", x, nodes("Sigmoid", x))


def _zeros(nodes: _Nodes, rows: Value, sizes: Sequence[int], dtype: Any) -> Value:
    """``(batch, *sizes)`` for ``rows`` ``(batch, *)``."""
    shape = nodes("Concat", nodes.size(rows, 0), nodes.ints(*sizes), axis=0)
    return nodes("ConstantOfShape", shape, value=ir.tensor([0.0], dtype=dtype))


def _check_static(where: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{where}: {name} must be static in an export to ONNX, got the dynamic size {size}")


def _refuse_cu_seqlens(where: str, cu_seqlens: Value) -> None:
    if cu_seqlens is not None:
        raise ValueError(f"{where}: cu_seqlens must be None in an export to ONNX, got a tensor")


# ---- the scan ----------------------------------------------------------------------------------------------------


def _selective_scan(nodes: _Nodes, *args: Any) -> Sequence[Value]:
    inputs, flat_options, _ = split_args(args, NUM_INPUTS, NUM_OPTIONS)
    x, options = ScanInputs(*inputs), ScanOptions(*flat_options)
    _refuse_cu_seqlens("selective_scan", options.cu_seqlens)
    if x.u.shape[2] != 1:
        return _recurrence(nodes, x, options, has_time=True)
    variable = {"B": not options.B_invariant, "C": not options.C_invariant, "z": x.z is not None}
    names = ("u", "delta", *(name for name, has_time in variable.items() if has_time))
    one_step = x._replace(**{name: nodes.squeezed(getattr(x, name)) for name in names})
    y, last = _recurrence(nodes, one_step, options, has_time=False)
    return nodes("Unsqueeze", y, nodes.ints(-1)), last


def _selective_scan_step(nodes: _Nodes, state: Value, *args: Any) -> Sequence[Value]:
    *inputs, softplus = args
    options = ScanOptions(None, None, softplus, False, False, False)
    return _recurrence(nodes, ScanInputs._make([*inputs, state]), options, has_time=False)


def _recurrence(nodes: _Nodes, x: ScanInputs, options: ScanOptions, has_time: bool) -> Sequence[Value]:
    """Translate a scan, or without ``has_time`` a step, whose sequences have no last dimension.

    Returns:
        y, and the last state.
    """
    dtype, u_dtype = x.A.dtype, x.u.dtype
    u, delta, A, B, C, D, z, delta_bias, initial_state = (nodes.cast(v, dtype) for v in x)
    dim, dstate = A.shape[-2:]
    variable = [v for v, invariant in ((B, options.B_invariant), (C, options.C_invariant)) if not invariant]
    groups = next((v.shape[1] for v in variable if len(v.shape) == 3 + has_time), 1)
    _check_static("selective_scan", dim=dim, dstate=dstate, groups=groups)
    channels = dim // groups

    def per_channel(matrix: Value) -> Value:
        """``([tasks,] dim, dstate)`` -> ``(batch or 1, groups, dstate, channels)``, the layout of the state."""
        rows = nodes.reshape(_per_row(nodes, matrix, 2, x.u), 0, groups, channels, dstate)
        return nodes("Transpose", rows, perm=[0, 1, 3, 2])

    def time_first(value: Value) -> Value:
        rank = len(value.shape)
        return nodes("Transpose", value, perm=[rank - 1, *range(rank - 1)]) if has_time else value

    u, delta = time_first(u), time_first(delta)
    if delta_bias is not None:
        delta = nodes("Add", delta, _per_row(nodes, delta_bias, 1, x.u))
    if options.delta_softplus:
        delta = _softplus(nodes, delta, dtype)
    if initial_state is None:
        h = _zeros(nodes, x.u, (groups, dstate, channels), dtype)
    else:
        h = nodes("Transpose", nodes.reshape(initial_state, 0, groups, channels, dstate), perm=[0, 1, 3, 2])
    # The values of each step, and the shape of a step's value that broadcasts to the state.
    steps = {
        "dt": (delta, (0, groups, 1, channels)),
        "dt_u": (nodes("Mul", delta, u), (0, groups, 1, channels)),
    }
    fixed = {"A": per_channel(A)}
    for name, matrix, invariant, shape in (
        ("B", B, options.B_invariant, (0, groups, dstate, 1)),
        ("C", C, options.C_invariant, (0, groups, 1, dstate)),
    ):
        if invariant:
            fixed[name] = per_channel(matrix)
        else:
            steps[name] = time_first(matrix), shape
    if options.reset is not None:
        steps["reset"] = time_first(options.reset), (0, 1, 1, 1)

    def step(nodes: _Nodes, h: Value, slices: dict[str, Value]) -> tuple[Value, Value]:
        """Return the next state and y ``(batch, dim)``, without skip and gate."""
        at = {name: nodes.reshape(slices[name], *shape) for name, (_, shape) in steps.items()} | fixed
        if "reset" in at:
            h = nodes("Where", at["reset"], nodes.constant(0.0, dtype), h)
        h = nodes("Mul", nodes("Exp", nodes("Mul", at["dt"], at["A"])), h)
        h = nodes("Add", h, nodes("Mul", at["dt_u"], at["B"]))
        if options.C_invariant:
            y = nodes("ReduceSum", nodes("Mul", at["C"], h), nodes.ints(2))
        else:
            y = nodes("MatMul", at["C"], h)
        return h, nodes.reshape(y, 0, dim)

    if has_time:
        prefix = "selective_scan_body_"
        body, state = _Nodes(nodes, prefix), ir.Value(name=f"{prefix}h")
        slices = {name: ir.Value(name=f"{prefix}{name}") for name in steps}
        graph = ir.Graph([state, *slices.values()], step(body, state, slices), nodes=body.all, name="selective_scan")
        sequences = [sequence for sequence, _ in steps.values()]
        h, y = nodes.multiple(2, "Scan", h, *sequences, body=graph, num_scan_inputs=len(sequences))
    else:
        h, y = step(nodes, h, {name: value for name, (value, _) in steps.items()})
    if D is not None:
        y = nodes("Add", y, nodes("Mul", u, _per_row(nodes, D, 1, x.u)))
    if z is not None:
        y = nodes("Mul", y, _silu(nodes, time_first(z)))
    y = nodes("Transpose", y, perm=[1, 2, 0]) if has_time else y
    last = nodes.reshape(nodes("Transpose", h, perm=[0, 1, 3, 2]), 0, dim, dstate)
    return y if u_dtype == dtype else nodes("Cast", y, to=u_dtype), last


# ---- the convolution ---------------------------------------------------------------------------------------------


def _causal_conv1d(
    nodes: _Nodes,
    x: Value,
    weight: Value,
    bias: Value,
    initial_states: Value,
    reset: Value,
    cu_seqlens: Value,
    silu: bool,
) -> Value:
    _refuse_cu_seqlens("causal_conv1d", cu_seqlens)
    dtype, (dim, width) = weight.dtype, weight.shape[-2:]
    _check_static("causal_conv1d", dim=dim, width=width)
    if initial_states is None:
        before = _zeros(nodes, x, (dim, width - 1), dtype)
    else:
        before = nodes("Squeeze", nodes.cast(initial_states, dtype), nodes.ints(1))
    inputs = nodes("Concat", before, nodes.cast(x, dtype), axis=2)
    if len(weight.shape) == 2 and reset is None and dtype == ir.DataType.FLOAT:
        y = nodes("Conv", inputs, nodes("Unsqueeze", weight, nodes.ints(1)), bias, group=dim)
    else:
        y = _sum_of_products(nodes, inputs, _per_row(nodes, weight, 2, x), width, reset, dtype)
        if bias is not None:
            y = nodes("Add", y, nodes("Unsqueeze", _per_row(nodes, bias, 1, x), nodes.ints(2)))
    y = _silu(nodes, y) if silu else y
    return y if x.dtype == dtype else nodes("Cast", y, to=x.dtype)


def _sum_of_products(nodes: _Nodes, inputs: Value, taps: Value, width: int, reset: Value, dtype: Any) -> Value:
    """Sum taps times shifted inputs of the same episode.

    Args:
        nodes: receives the nodes.
        inputs: ``(batch, dim, width - 1 + length)``.
        taps: ``(batch or 1, dim, width)``.
        width: number of taps.
        reset: ``(batch, length)``, bool, or None.
        dtype: of inputs and taps.

    Returns:
        ``(batch, dim, length)``.
    """

    def shifted(value: Value, distance: int, axis: int) -> Value:
        """Return the values ``distance`` steps before each step."""
        stop = -distance if distance else np.iinfo(np.int64).max
        return nodes("Slice", value, nodes.ints(width - 1 - distance), nodes.ints(stop), nodes.ints(axis))

    episodes = None
    if reset is not None:
        # The number of resets up to each step; it is 0 for the inputs before the first step.
        episode = nodes("CumSum", nodes("Cast", reset, to=ir.DataType.INT64), nodes.constant(1, ir.DataType.INT64))
        episodes = nodes("Pad", episode, nodes.ints(0, width - 1, 0, 0))
    y = None
    for distance in reversed(range(width)):
        values = shifted(inputs, distance, 2)
        if reset is not None and distance:
            same = nodes("Unsqueeze", nodes("Equal", shifted(episodes, distance, 1), episode), nodes.ints(1))
            values = nodes("Where", same, values, nodes.constant(0.0, dtype))
        product = nodes("Mul", values, nodes("Gather", taps, nodes.ints(width - 1 - distance), axis=2))
        y = product if y is None else nodes("Add", y, product)
    return y
