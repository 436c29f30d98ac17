"""Adapting a trained model at test time, on what it meets and on what it remembers."""

from eaml_ext.adaptation.adapter import Adapter
from eaml_ext.adaptation.config import AdaptationConfig

__all__ = ["AdaptationConfig", "Adapter"]
