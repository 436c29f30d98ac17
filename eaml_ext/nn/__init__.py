"""State-space layers and models."""

from eaml_ext.nn.ssm import SSM, SSMLayer, Stateful

__all__ = ["SSM", "SSMLayer", "Stateful"]
