"""h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) silu(z_t);  dt = softplus(delta + delta_bias).

The recurrence of Mamba (Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", eq. 2 with
the zero-order hold on A and Euler's rule on B), with states and episode resets as arguments. With a complex A (S4D,
Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models") a state represents a
conjugate pair: 2 Re(C_t . h_t) takes the place of C_t . h_t.

``_schema`` declares the ops, their fake kernels and operation counts. ``_reference`` is the specification and runs
where no kernel is registered. ``_autograd`` has derivatives and vmap, ``_validation`` the checks of arguments,
``_functional`` the public functions. The kernels are in ``csrc/selective_scan``.
"""

from eaml_ext.ops.selective_scan._functional import selective_scan, selective_scan_reference, selective_scan_step
from eaml_ext.ops.selective_scan._schema import ARGUMENTS, CHUNK_SIZE, MAX_CUDA_STATE_SIZE, ScanInputs, ScanOptions
from eaml_ext.ops.selective_scan._split_invariance import split_invariant

__all__ = [
    "ARGUMENTS",
    "CHUNK_SIZE",
    "MAX_CUDA_STATE_SIZE",
    "ScanInputs",
    "ScanOptions",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_step",
    "split_invariant",
]
