"""Cores, inputs and models that the tests of cores share."""

import torch

from eaml_ext.nn import SSM
from eaml_ext.nn.cores import CORES, make_core

DIM, STATES = 32, 4
NAMES = sorted(CORES)


def make(name):
    return make_core(name, DIM, STATES).double()


def sequence(batch=2, length=7):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def net_of(name):
    return SSM(3, 16, 2, state_size=2, core=name).double()
