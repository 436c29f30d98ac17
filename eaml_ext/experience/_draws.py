"""The random generator of a buffer; each DataLoader worker replaces its copy by one with a seed of its own."""

from __future__ import annotations

import torch
import torch.utils.data

from eaml_ext._random import Purpose, derive_seed


class Draws:
    """The generator of all random draws of a buffer.

    Draws are made on the CPU, so that one seed gives the same batches on every device.

    Args:
        seed: in [0, 2**128); None: drawn from torch's global generator.

    Attributes:
        generator: its state decides all later draws.
        worker_seed: seed of the DataLoader worker that made the generator; None: the main process made it.
    """

    def __init__(self, seed: int | None):
        seed = int(torch.randint(2**62, ())) if seed is None else derive_seed(seed, Purpose.BUFFER_DRAWS)
        self.generator = torch.Generator().manual_seed(seed)
        self.worker_seed: int | None = None

    def current(self) -> torch.Generator:
        """Return the generator; in a DataLoader worker, first replace the copy of the parent's generator."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self.worker_seed:
            words = divmod(worker.seed, 2**32)  # high and low 32 bits
            seed = derive_seed(self.generator.initial_seed(), Purpose.WORKER_DRAWS, *words)
            self.generator, self.worker_seed = torch.Generator().manual_seed(seed), worker.seed
        return self.generator
