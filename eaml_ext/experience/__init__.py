"""A memory of past experience: a ring buffer with exact similarity search, its shards, and retrieval strategies."""

from eaml_ext.experience import retrieval
from eaml_ext.experience.buffer import ExperienceBuffer
from eaml_ext.experience.experiences import Experiences
from eaml_ext.experience.sharded import ShardedExperienceBuffer

__all__ = ["ExperienceBuffer", "Experiences", "ShardedExperienceBuffer", "retrieval"]
