"""Meta-learning: MAML and its relatives with exact second-order gradients, tasks batched by vmap."""

from eaml_ext.meta.learner import MetaLearner
from eaml_ext.meta.maml import MetaMAML
from eaml_ext.meta.past_models import PastModels
from eaml_ext.meta.task_batch import MetaBatch, MetaTask, TaskBatch
from eaml_ext.meta.trainer import MetaMAMLTrainer

__all__ = ["MetaBatch", "MetaLearner", "MetaMAML", "MetaMAMLTrainer", "MetaTask", "PastModels", "TaskBatch"]
