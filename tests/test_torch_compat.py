"""Private names of torch are used in eaml_ext/_torch_compat.py alone; the compiled module is imported in one place."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import eaml_ext
from eaml_ext import _torch_compat

ROOT = Path(eaml_ext.__file__).parent
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "_torch_compat.py"]


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_torch_names(source: str) -> list[str]:
    """Return the private names of torch that a file imports or reads, as dotted names from ``torch`` on."""
    modules = {"torch": "torch"}
    names = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
            modules |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            root, _, rest = ast.unparse(node).partition(".")
            names.append(f"{modules.get(root, root)}.{rest}")
    return [name for name in names if name.split(".")[0] == "torch" and is_private(name)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_torch_names_of_module_are_none(path):
    assert private_torch_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "code, name",
    [
        ("import torch\ntorch._C._x(1)", "torch._C._x"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.autograd import forward_ad\nforward_ad._level", "torch.autograd.forward_ad._level"),
        ("import torch.nn.modules.module as m\nm._hooks", "torch.nn.modules.module._hooks"),
    ],
)
def test_private_torch_names_of_code_are_found(code, name):
    assert name in private_torch_names(code)


def test_kernels_are_loaded_by_library_alone_and_binding_by_no_module():
    def imports(node: ast.AST) -> bool:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = [node.module] if isinstance(node, ast.ImportFrom) else []
        return any(str(name).split(".")[-1] == "_C" for name in (*names, *module))

    trees = {path.name: [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))] for path in SOURCES}
    loads = [n for n, tree in trees.items() if any(getattr(node, "attr", "") == "load_library" for node in tree)]
    assert loads == ["_library.py"]
    assert [n for n, tree in trees.items() if any(map(imports, tree))] == []


def test_transforms_active_inside_transform_and_forward_mode_only():
    x = torch.ones(2)
    active = []

    def function(x: torch.Tensor) -> torch.Tensor:
        active.append(_torch_compat.transforms_active())
        return x.sum()

    function(x)
    torch.func.grad(function)(x)
    torch.vmap(function)(x[None])
    torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        function(x)
    assert active == [False, True, True, True, True] and not _torch_compat.transforms_active()


def test_has_hooks_own_and_global_hooks_are_found():
    module = nn.Linear(1, 1)
    assert not _torch_compat.has_hooks(module)
    for register in (module.register_forward_hook, nn.modules.module.register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        assert _torch_compat.has_hooks(module)
        handle.remove()
    assert not _torch_compat.has_hooks(module)


def test_hooks_own_and_global_hooks_are_found_with_their_options():
    module, call = nn.Linear(1, 1), lambda *_: None
    assert not _torch_compat.hooks(module) and not _torch_compat.hooks(None)
    handle = module.register_forward_hook(call, with_kwargs=True)
    module.register_full_backward_pre_hook(call)
    own = [("forward_hooks", call, True, False, False), ("backward_pre_hooks", call, False, False, False)]
    assert _torch_compat.hooks(module) == own and not _torch_compat.hooks(None)
    handle.remove()
    assert _torch_compat.hooks(module) == own[1:]
    handle = nn.modules.module.register_module_forward_pre_hook(call)
    assert _torch_compat.hooks(None) == [("forward_pre_hooks", call, False, False, False)]
    handle.remove()


def test_dispatch_mode_active_inside_of_modes_alone():
    assert not _torch_compat.dispatch_mode_active()
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert _torch_compat.dispatch_mode_active()


def test_is_compiler_error_of_compiler_only():
    assert _torch_compat.is_compiler_error(torch._dynamo.exc.Unsupported("no"))
    assert not _torch_compat.is_compiler_error(ValueError("no"))


def test_own_tensors_of_module_are_without_submodules():
    module = nn.Sequential(nn.BatchNorm1d(2))
    assert not _torch_compat.own_parameters(module) and not _torch_compat.own_buffers(module)
    assert set(_torch_compat.own_parameters(module[0])) == {"weight", "bias"}
    assert set(_torch_compat.own_buffers(module[0])) == {"running_mean", "running_var", "num_batches_tracked"}


def test_plain_attributes_of_module_are_those_of_its_class_alone():
    module = nn.Sequential(nn.Dropout(0.3))
    module.register_buffer("mean", torch.zeros(1))
    module.scale = 2.0
    assert _torch_compat.plain_attributes(module) == {"scale": 2.0}
    assert _torch_compat.plain_attributes(module[0]) == {"p": 0.3, "inplace": False}
