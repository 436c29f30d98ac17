"""y_t = act(bias + sum_j weight_{width-1-j} x_{t-j}): the causal depthwise convolution of Mamba's block.

Gu & Dao 2023, "Mamba", figure 3. Arguments are those of the package causal-conv1d, with resets and packed sequences.

``_schema`` declares the ops, their fake kernels and operation counts. ``_reference`` is the specification and runs
where no kernel is registered. ``_autograd`` has derivatives and vmap, ``_validation`` the checks of arguments,
``_functional`` the public functions. The kernels are in ``csrc/causal_conv1d``.
"""

from eaml_ext.ops.causal_conv1d._functional import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from eaml_ext.ops.causal_conv1d._schema import MAX_KERNEL_WIDTH, ConvInputs, ConvOptions

__all__ = [
    "MAX_KERNEL_WIDTH",
    "ConvInputs",
    "ConvOptions",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_step",
]
