"""State-space layers and models, and layers that read from a learned memory."""

from eaml_ext.nn._decoding import linear_step, norm_step
from eaml_ext.nn.episodic import EpisodicRead, KNNAttention
from eaml_ext.nn.lora import LORA_FACTORS, add_lora, merge_lora
from eaml_ext.nn.mamba import Mamba
from eaml_ext.nn.mamba2 import Mamba2
from eaml_ext.nn.ssm import SSM, SSMLayer, Stateful

__all__ = [
    "LORA_FACTORS",
    "SSM",
    "EpisodicRead",
    "KNNAttention",
    "Mamba",
    "Mamba2",
    "SSMLayer",
    "Stateful",
    "add_lora",
    "linear_step",
    "merge_lora",
    "norm_step",
]
