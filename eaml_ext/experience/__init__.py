"""What was met on the way, and how to find what matters now: a ring of tensors with exact similarity search."""

from eaml_ext.experience import retrieval
from eaml_ext.experience.buffer import ExperienceBuffer
from eaml_ext.experience.experiences import Experiences
from eaml_ext.experience.sharded import ShardedExperienceBuffer

__all__ = ["ExperienceBuffer", "Experiences", "ShardedExperienceBuffer", "retrieval"]
