"""Meta-learning: MAML and its relatives with exact second-order gradients, tasks batched by vmap."""

from eaml_ext.meta.adapted_task_models import AdaptedTaskModels
from eaml_ext.meta.learner import MetaLearner
from eaml_ext.meta.maml import MetaMAML
from eaml_ext.meta.masked_loss import MaskedLoss
from eaml_ext.meta.stream import StreamMAML
from eaml_ext.meta.stream_experience import StreamExperience
from eaml_ext.meta.task_batch import MetaBatch, MetaTask, TaskBatch, TaskSource
from eaml_ext.meta.trainer import MetaMAMLTrainer

__all__ = [
    "AdaptedTaskModels",
    "MaskedLoss",
    "MetaBatch",
    "MetaLearner",
    "MetaMAML",
    "MetaMAMLTrainer",
    "MetaTask",
    "StreamExperience",
    "StreamMAML",
    "TaskBatch",
    "TaskSource",
]
