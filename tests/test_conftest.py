"""The selection of tests: only `make test-all` runs the exhaustive ones."""

import itertools
from types import SimpleNamespace

import pytest
from conftest import pytest_collection_modifyitems

DTYPES, SHAPES, CASES = ["float32", "float64"], [(2, 3), (4, 5), (6, 7)], ["all", "plain"]


def collected(option: str, marked: tuple[str, ...] = ()) -> dict[str, bool]:
    """Return whether each test is exhaustive; tests of the functions in ``marked`` have the mark ``kernels``."""
    exhaustive: dict[str, bool] = {}

    def item(function: str, **params: object) -> SimpleNamespace:
        name = "-".join([function, *map(str, params.values())])
        exhaustive[name] = False
        return SimpleNamespace(
            parent=SimpleNamespace(nodeid="test_x.py"),
            originalname=function,
            get_closest_marker=lambda mark: mark == "kernels" and function in marked,
            add_marker=lambda mark: exhaustive.update({name: mark == "exhaustive"}),
            **({"callspec": SimpleNamespace(params=params)} if params else {}),
        )

    items = [item("a", dtype=d, shape=s) for s, d in itertools.product(SHAPES, DTYPES)]
    items += [item("b", dtype=d, case=c) for c, d in itertools.product(CASES, DTYPES)]
    items += [item("c"), item("d")]
    config = SimpleNamespace(getoption=lambda name: name == option)
    pytest_collection_modifyitems(config, items)
    return exhaustive


@pytest.mark.parametrize("marked", [(), ("a",), ("c",)])
def test_selection_all_kernels_every_test_is_kept(marked):
    assert len(collected("", marked)) == 12 and not any(collected("", marked).values())


def test_selection_reference_every_value_of_every_parameter_is_kept():
    kept = [name for name, exhaustive in collected("--reference").items() if not exhaustive]
    assert kept == [
        *("a-float32-(2, 3)", "a-float64-(2, 3)", "a-float32-(4, 5)", "a-float32-(6, 7)"),
        *("b-float32-all", "b-float64-all", "b-float32-plain", "c", "d"),
    ]


@pytest.mark.parametrize("option, kept", [("--reference", 4), ("--cuda-emulator", 5)])
def test_selection_without_kernels_leaves_out_their_tests(option, kept):
    exhaustive = collected(option, ("a", "c"))
    assert [name[0] for name, left in exhaustive.items() if not left] == ["b"] * (kept - 1) + ["d"]
    assert all(left for name, left in exhaustive.items() if name[0] in "ac")
