"""Adaptation of a trained model at test time, on the present data and on retrieved experience."""

from eaml_ext.adaptation.adapter import Adapter
from eaml_ext.adaptation.config import AdaptationConfig
from eaml_ext.adaptation.guards import UserHistory
from eaml_ext.meta.selection import last_block_parameters, norm_parameters, output_parameters

__all__ = [
    "AdaptationConfig",
    "Adapter",
    "UserHistory",
    "last_block_parameters",
    "norm_parameters",
    "output_parameters",
]
