"""selective_scan and selective_scan_step pass the conformance tests of every op, and match in all combinations."""

import itertools

import pytest
import torch
from hypothesis import strategies as st
from op_calls import close, derivatives, outputs
from op_conformance import Op, OpConformance
from scan_cases import (
    CASES,
    FACTOR,
    OPTIONAL,
    REPRESENTATIVE,
    SHAPES,
    as_scan,
    as_step,
    build,
    differentiable,
    drawn,
    raw_calls,
    step_reference,
)

from eaml_ext.ops import selective_scan, selective_scan_reference, selective_scan_step
from eaml_ext.ops.selective_scan import ARGUMENTS


class TestScan(OpConformance):
    op = Op(
        function=selective_scan,
        reference=selective_scan_reference,
        differentiable=ARGUMENTS,
        cases=CASES,
        shapes=SHAPES,
        parallel=build(*OPTIONAL, batch=4, dim=130, length=20, state=16, softplus=True),
        drawn=drawn(),
        raw=raw_calls,
        factor=FACTOR,
        compiled=("plain", "per_task", "packed", "all"),
        representative=REPRESENTATIVE,
    )


class TestStep(OpConformance):
    op = Op(
        function=selective_scan_step,
        reference=step_reference,
        differentiable=("state", "u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
        cases={
            "plain": as_step(build("initial_state", length=1, state=1)),
            "per_task": as_step(build("initial_state", "D", tasks=("A", "D"), batch=4, dim=2, length=1)),
            "groups": as_step(build("initial_state", groups=2, dim=4, length=1)),
            "all": as_step(build("initial_state", "D", "z", "delta_bias", length=1, softplus=True)),
        },
        shapes={
            "batch0": as_step(build("initial_state", "D", length=1, batch=0)),
            "state33": as_step(build("initial_state", "z", length=1, state=33)),
            "units": as_step(build("initial_state", "D", "z", batch=3, dim=150, length=1)),
        },
        parallel=as_step(build("initial_state", "D", "z", batch=64, dim=300, state=16, length=1)),
        drawn=st.builds(
            lambda *present, **sizes: as_step(build("initial_state", *present, length=1, **sizes)),
            batch=st.integers(0, 5),
            dim=st.integers(1, 100),
            state=st.integers(1, 20),
            softplus=st.booleans(),
            seed=st.integers(0, 999),
        ),
        raw=lambda call: raw_calls(as_scan(**call.tensors, **call.options)),
        factor=FACTOR,
        compiled=("all",),
    )


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("layout", ["variable", "groups", "B_invariant", "C_invariant", "invariant"])
def test_selective_scan_every_combination_of_options_matches_reference(softplus, layout, device):
    invariant = {"B_invariant": ("B",), "C_invariant": ("C",), "invariant": ("B", "C")}.get(layout, ())
    groups = 2 if layout == "groups" else None
    for n in range(len(OPTIONAL) + 1):
        for present in itertools.combinations(OPTIONAL, n):
            options = {"groups": groups, "invariant": invariant, "softplus": softplus}
            call = build(*present, dim=2, length=3, state=2, **options)(torch.float64, device)
            names = differentiable(call)
            for last in (False, True):
                call.options["return_last_state"] = last
                close(outputs(selective_scan, call), outputs(selective_scan_reference, call), FACTOR)
            call.options["return_last_state"] = n % 2 == 0
            got, want = (derivatives(f, call, names) for f in (selective_scan, selective_scan_reference))
            close(got, want, FACTOR)


@pytest.mark.parametrize("name", ["B", "C"])
def test_vmap_invariant_matrix_per_task_matches_reference(name, device):
    """vmap hides the tasks of (tasks, dim, dstate), which must not be read as (batch, dstate, length)."""
    call = build("initial_state", invariant=(name,), batch=3, dim=3, length=3, state=3)(torch.float64, device)
    many = torch.stack([call.tensors[name] * (i + 1) for i in range(3)])
    got = torch.vmap(lambda x: outputs(selective_scan, call, **{name: x}))(many)
    for i in range(3):
        want = outputs(selective_scan_reference, call, **{name: many[i]})
        close([out[i] for out in got], want, FACTOR)
