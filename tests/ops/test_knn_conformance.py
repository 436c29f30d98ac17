"""knn passes the conformance tests of every op; test_knn.py tests its own properties."""

import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from op_calls import Build, Call
from op_conformance import Op, OpConformance
from torch import Tensor

from eaml_ext.ops import knn, knn_reference
from eaml_ext.ops.knn import METRICS


def build(
    *present: str,
    batch: tuple[int, ...] = (),
    queries: int = 3,
    size: int = 9,
    features: int = 5,
    k: int = 4,
    metric: str = "sqeuclidean",
    shared: bool = False,
    seed: int = 0,
) -> Build:
    def make(dtype: torch.dtype, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        memories = () if shared else batch
        tensors = {
            "queries": randn(*batch, queries, features).to(device, dtype),
            "keys": randn(*memories, size, features).to(device, dtype),
            "valid": (randn(*memories, size) > -0.5).to(device),
            "bias": randn(*memories, size).to(device, dtype),
        }
        kept = {n: x for n, x in tensors.items() if n in ("queries", "keys", *present)}
        return Call(kept, {"k": k, "metric": metric})

    return make


def finite(function: Any) -> Any:
    """Wrap knn so that values without a neighbour are 0 instead of infinite."""

    def run(**arguments: Any) -> tuple[Tensor, Tensor]:
        values, indices = function(**arguments)
        return torch.where(indices < 0, 0, values), indices

    return run


def raw_calls(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    x = [call.tensors.get(name) for name in ("queries", "keys", "valid", "bias")]
    return [
        (torch.ops.eaml_ext.knn.default, (*x[:2], call.options["k"], METRICS.index(call.options["metric"]), *x[2:]))
    ]


OPTIONS = [(), ("valid",), ("bias",), ("valid", "bias")]


class TestKnn(OpConformance):
    op = Op(
        function=finite(knn),
        reference=finite(knn_reference),
        differentiable=("queries", "keys", "bias"),
        cases={
            "-".join((metric, *present)): build(*present, metric=metric, batch=(2,), features=4, size=6, k=3)
            for metric, present in itertools.product(METRICS, OPTIONS)
        },
        shapes={
            "one_memory": build("valid", "bias"),
            "shared": build("valid", "bias", batch=(2,), shared=True, metric="cosine"),
            "k_above_size": build("bias", k=12, metric="inner_product"),
            "no_queries": build(queries=0),
            "no_keys": build("bias", size=0),
            "no_features": build("bias", features=0),
            "batch0": build("valid", batch=(0,)),
            "panels": build("valid", "bias", queries=14, size=70, features=33, k=9),
        },
        parallel=build("valid", "bias", batch=(4,), queries=13, size=500, features=24, k=8, metric="cosine"),
        drawn=st.builds(
            lambda present, **options: build(*present, **options),
            present=st.sampled_from(OPTIONS),
            batch=st.sampled_from(((), (0,), (1,), (3,), (2, 2))),
            queries=st.integers(0, 15),
            size=st.integers(0, 80),
            features=st.integers(0, 20),
            k=st.integers(1, 12),
            metric=st.sampled_from(METRICS),
            shared=st.booleans(),
            seed=st.integers(0, 999),
        ),
        raw=raw_calls,
        factor=32,  # a sum over the features, and the norms of a cosine, in each of two derivatives
    )
