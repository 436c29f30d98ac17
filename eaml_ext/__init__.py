"""Experience-augmented meta-learning with state-space models.

Names are imported on first use, so ``import eaml_ext`` takes little time::

    >>> import eaml_ext
    >>> model = eaml_ext.SSM(state_dim=10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The names of _EXPORTS for type checkers. Ops are imported from their modules, because eaml_ext.ops has modules that
# are named after their functions.
if TYPE_CHECKING:
    from eaml_ext.adaptation import AdaptationConfig as AdaptationConfig
    from eaml_ext.adaptation import Adapter as Adapter
    from eaml_ext.experience import ExperienceBuffer as ExperienceBuffer
    from eaml_ext.experience import Experiences as Experiences
    from eaml_ext.experience import ShardedExperienceBuffer as ShardedExperienceBuffer
    from eaml_ext.meta import MetaLearner as MetaLearner
    from eaml_ext.meta import MetaMAML as MetaMAML
    from eaml_ext.meta import MetaMAMLTrainer as MetaMAMLTrainer
    from eaml_ext.meta import StreamExperience as StreamExperience
    from eaml_ext.meta import StreamMAML as StreamMAML
    from eaml_ext.meta import TaskBatch as TaskBatch
    from eaml_ext.nn import SSM as SSM
    from eaml_ext.nn import Mamba as Mamba
    from eaml_ext.nn import Mamba2 as Mamba2
    from eaml_ext.nn import SSMLayer as SSMLayer
    from eaml_ext.nn import Stateful as Stateful
    from eaml_ext.ops.knn import Neighbors as Neighbors
    from eaml_ext.ops.knn import PackedKeys as PackedKeys
    from eaml_ext.ops.knn import knn as knn
    from eaml_ext.ops.selective_scan import selective_scan as selective_scan
    from eaml_ext.ops.selective_scan import selective_scan_step as selective_scan_step
    from eaml_ext.rl import SSMMetaPolicy as SSMMetaPolicy

__version__ = "0.1.0"

_EXPORTS = {
    "selective_scan": "ops",
    "selective_scan_step": "ops",
    "knn": "ops",
    "Neighbors": "ops",
    "PackedKeys": "ops",
    "SSM": "nn",
    "SSMLayer": "nn",
    "Mamba": "nn",
    "Mamba2": "nn",
    "Stateful": "nn",
    "MetaLearner": "meta",
    "MetaMAML": "meta",
    "MetaMAMLTrainer": "meta",
    "StreamExperience": "meta",
    "StreamMAML": "meta",
    "TaskBatch": "meta",
    "ExperienceBuffer": "experience",
    "Experiences": "experience",
    "ShardedExperienceBuffer": "experience",
    "Adapter": "adaptation",
    "AdaptationConfig": "adaptation",
    "SSMMetaPolicy": "rl",
}
_SUBPACKAGES = (
    "adaptation",
    "distributed",
    "experience",
    "integrations",
    "jobs",
    "meta",
    "nn",
    "ops",
    "rl",
    "tasks",
    "testing",
)

# Subpackages are left out, because a star import would replace torch's nn by eaml_ext.nn.
__all__ = ["__version__", "build_info", *_EXPORTS]


def build_info() -> dict[str, Any]:
    """Describe the compiled kernels and the running torch.

    Returns:
        A dict with ``kernels`` (bool: the compiled kernels are loaded) and ``torch`` (its version). With kernels also
        ``compiler``, ``simd`` (the instruction set in use), ``cuda`` (version or None) and ``torch_target`` (the oldest
        torch release that this build supports).

    >>> sorted(build_info())[:2]
    ['compiler', 'cuda']
    """
    import json

    import torch

    from eaml_ext.ops._library import library, load_error

    compiled: dict[str, Any] = {} if load_error else json.loads(library._build_info())
    return {**compiled, "kernels": load_error is None, "torch": torch.__version__}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"eaml_ext.{_EXPORTS[name]}"), name)
    if name in _SUBPACKAGES:
        return import_module(f"eaml_ext.{name}")
    raise AttributeError(f"module 'eaml_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
