"""The key of Python values and tensors: it changes with all on which a function depends, and with nothing else."""

import dataclasses
import functools
import gc
import math
import types
import weakref
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn

from eaml_ext.meta._python_state import PythonState


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), nn.Dropout(0.1)
        self.scale, self.shift, self.act = 2.0, torch.ones(2), torch.tanh
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        return self.act(self.drop(self.layer(x))) * self.scale + self.shift


CHANGES = {
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "function": lambda m: setattr(m, "act", torch.relu),
    "submodule": lambda m: setattr(m.drop, "p", 0.2),
    "mode": lambda m: m.eval(),
    "hook": lambda m: m.layer.register_forward_hook(lambda *_: None),
    "layer": lambda m: setattr(m, "drop", nn.Dropout(0.1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_python_state_changed_module_has_another_key(change):
    module = Scaled()
    before = PythonState(module)
    assert PythonState(module).key == before.key and hash(before.key) is not None
    assert {id(t) for t in before.tensors} == {id(t) for t in (*module.parameters(), module.mean, module.shift)}
    change(module)
    assert PythonState(module).key != before.key


def test_python_state_changed_closure_has_another_key():
    weight, scale = torch.ones(2), 1.0

    def loss(prediction, target, *, power=2):
        return scale * (weight * (prediction - target).abs() ** power).mean()

    before = PythonState(loss)
    assert [id(t) for t in before.tensors] == [id(weight)]
    scale = 2.0
    assert PythonState(loss).key != before.key
    scale = 1.0
    assert PythonState(loss).key == before.key
    powers = [PythonState(functools.partial(loss, power=power)).key for power in (3, 3, 4)]
    assert powers[0] == powers[1] != powers[2]


def test_python_state_variable_without_value_is_left_out():
    def loss(prediction, target):
        return later * prediction

    empty = PythonState(loss)
    later = 2.0
    assert not empty.tensors and PythonState(loss).key != empty.key


def test_python_state_bound_method_includes_its_module():
    module = Scaled()
    before = PythonState(module.forward)
    assert {id(t) for t in before.tensors} >= {id(p) for p in module.parameters()}
    assert PythonState(module.forward).key == before.key
    module.scale = 3.0
    assert PythonState(module.forward).key != before.key


class Loss:
    def __init__(self):
        self.weight, self.table = 1.0, {"scale": [1.0, torch.ones(1)]}

    def __call__(self, prediction, target):
        return self.weight * (prediction - target).abs().mean()

    def loss(self, prediction, target):
        return self(prediction, target)


class Slotted:
    __slots__ = ("__hidden", "later", "weight")

    def __init__(self):
        self.weight, self.__hidden = 1.0, 2.0


@dataclasses.dataclass
class Config:
    weight: float = 1.0


class Numbers(list):
    weight = 1.0


OBJECTS = {
    "attribute": (Loss, lambda o: setattr(o, "weight", 2.0)),
    "name": (Loss, lambda o: setattr(o, "other", 2.0)),
    "slot": (Slotted, lambda o: setattr(o, "weight", 2.0)),
    "private slot": (Slotted, lambda o: setattr(o, "_Slotted__hidden", 1.0)),
    "empty slot": (Slotted, lambda o: setattr(o, "later", 1.0)),
    "inner list": (Loss, lambda o: o.table["scale"].append(1.0)),
    "inner dict": (Loss, lambda o: o.table.update(scale=None)),
    "list": (lambda: [1.0, 2.0], lambda o: o.reverse()),
    "set": (lambda: {1, 2}, lambda o: o.add(3)),
    "deque": (lambda: deque([1]), lambda o: o.append(1)),
    "order": (lambda: OrderedDict(a=1, b=2), lambda o: o.move_to_end("a")),
    "tuple": (lambda: ([1.0], 2.0), lambda o: o[0].append(1)),
    "dataclass": (Config, lambda o: setattr(o, "weight", 2.0)),
    "namespace": (lambda: types.SimpleNamespace(weight=1.0), lambda o: setattr(o, "weight", 2.0)),
    "list with attributes": (Numbers, lambda o: setattr(o, "weight", 2.0)),
    "array": (lambda: np.zeros(3000), lambda o: o.__setitem__(1000, 1.0)),
    "bytes": (lambda: bytearray(3), lambda o: o.__setitem__(1, 1)),
    "sign of zero": (lambda: [0.0], lambda o: o.__setitem__(0, -0.0)),
    "type of number": (lambda: [1], lambda o: o.__setitem__(0, True)),
    "tensor": (lambda: [torch.ones(1), 1.0], lambda o: o.reverse()),
    "no longer shared": (lambda: [[1], [1]], lambda o: o.__setitem__(1, o[0]) or o[0].append(2)),
    "requires grad": (lambda: [torch.ones(1)], lambda o: o[0].requires_grad_()),
    "function attribute": (lambda: lambda: None, lambda o: setattr(o, "weight", 2.0)),
}


@pytest.mark.parametrize(("make", "change"), OBJECTS.values(), ids=OBJECTS)
def test_python_state_changed_object_has_another_key(make, change):
    value = make()

    def loss():
        return value

    before = PythonState(loss).key
    assert PythonState(loss).key == before and hash(PythonState(loss).key) == hash(before)
    change(value)
    assert PythonState(loss).key != before


def test_python_state_bound_method_and_callable_object_include_attributes():
    for pick in (lambda o: o.loss, lambda o: o.__call__, lambda o: o):
        owner = Loss()
        before = PythonState(pick(owner))
        assert [t is owner.table["scale"][1] for t in before.tensors] == [True]
        assert PythonState(pick(owner)).key == before.key
        owner.weight = 2.0
        assert PythonState(pick(owner)).key != before.key


def test_python_state_containers_give_their_tensors_once():
    tensors = [torch.ones(1) for _ in range(4)]
    nest = {"a": [tensors[0]], "b": (tensors[1], types.SimpleNamespace(c=tensors[2])), "d": deque([tensors[3]])}
    nest["self"] = nest
    assert [id(t) for t in PythonState(nest).tensors] == [id(t) for t in tensors]


def test_python_state_replaced_hook_has_another_key():
    layer, scale = nn.Linear(1, 1), [2.0]

    def register(factor):
        return layer.register_forward_hook(lambda module, args, output: output * factor * scale[0])

    keys = []
    for factor in (1, 1, 5):
        handle = register(factor)
        keys.append(PythonState(layer).key)
        handle.remove()
    assert keys[0] == keys[1] != keys[2]
    register(5)
    assert PythonState(layer).key == keys[2]
    scale[0] = 3.0
    assert PythonState(layer).key not in keys


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_python_state_script_module_has_its_tensors_in_the_key():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
    before = PythonState(model)
    assert PythonState(model).key == before.key
    addresses = {t.data_ptr() for t in before.tensors}
    assert addresses == {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    model.eval()
    assert PythonState(model).key != before.key


def test_python_state_global_hook_has_another_key():
    before = PythonState(nn.Linear).key
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert PythonState(nn.Linear).key != before
    handle.remove()
    assert PythonState(nn.Linear).key == before


def test_python_state_function_defined_again_has_the_same_key():
    def define(scale, *, power=2, other=None):
        return lambda p, t, power=power: scale * (p - t) ** power if other is None else other

    keys = [PythonState(define(*args, **options)).key for args, options in (((1,), {}), ((1,), {}), ((2,), {}))]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] != PythonState(define(1, power=3)).key
    assert keys[0] != PythonState(lambda p, t: p).key


def test_python_state_exchanged_submodules_have_another_key():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.Tanh()

    pair = Pair()
    before = PythonState(pair).key
    pair.a, pair.b = pair.b, pair.a
    assert PythonState(pair).key != before


def test_python_state_key_keeps_no_model_alive():
    class Owner:
        def __init__(self):
            self.key = PythonState(self, lambda: self).key

    gc.disable()
    try:
        owner, layer = Owner(), nn.Sequential(nn.Linear(1, 1))
        key = PythonState(layer).key
        alive = [weakref.ref(owner), weakref.ref(layer)]
        del owner, layer
        assert [reference() for reference in alive] == [None, None]
        assert key != PythonState(nn.Sequential(nn.Linear(1, 1))).key
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [lambda: [*range(100_000)], lambda: np.zeros(10**6)], ids=["list", "array"])
def test_python_state_too_many_values_equal_no_other_key(make):
    value = make()
    assert PythonState(value).key != PythonState(value).key


def test_python_state_deep_nest_equals_no_other_key():
    nest = []
    for _ in range(5000):
        nest = [nest]
    assert PythonState(nest).key != PythonState(nest).key


def test_python_state_counters_of_optimizer_are_left_out():
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(layer.parameters())

    def loss():
        return optimizer

    before = PythonState(loss)
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert PythonState(loss).key == before.key and not before.tensors


def test_python_state_not_a_number_is_equal_to_itself():
    assert PythonState([math.nan]).key == PythonState([float("nan")]).key
