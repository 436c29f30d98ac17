"""SeedSequence(seed, spawn_key=(purpose, *indices)): seeds of all random draws, with a different key for each use.

Two kinds of seed have no key. A job seeds torch's global generator with the user's seed, for initial parameters.
Planner and RandomPolicy draw their seeds from a generator whose seed has a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, unique
from hashlib import blake2b
from typing import Any

import numpy as np

from eaml_ext import _check


@unique
class Purpose(IntEnum):
    """First word of a key; comments list the indices that follow it.

    Each use has its own number. Numbers never change, because results depend on them.
    """

    TRAIN_TASKS = 0  # epoch, index; the splits in the order of tasks.base.SPLITS
    VALID_TASKS = 1
    TEST_TASKS = 2
    MLP_FIT = 3
    TASK_ORDER = 10  # pass over the list
    TASK_CHOICE = 11  # meta-update
    TASK_DATA = 12  # meta-update
    META_UPDATE = 13  # meta-update, rank
    BUFFER_DRAWS = 20
    WORKER_DRAWS = 21  # seed of a DataLoader's worker, high and low word
    CENTROIDS = 22
    PLANNING = 30
    OBSERVATION_NORMALISATION = 40
    RL2_TRIALS = 41  # update
    RL2_MINIBATCHES = 42  # update
    RL2_EVALUATION = 43
    MAML_RL_TRAINING = 45  # update, inner step
    MAML_RL_ADAPTATION = 46  # inner step
    MAML_RL_EVALUATION = 47
    RANDOM_ACTIONS = 48
    REWARD_SCALE = 49


def check_seed(where: str, name: str, value: Any) -> int:
    """Return ``value`` as an int. Raises TypeError or ValueError unless it is an integer in [0, 2**32)."""
    seed = _check.integer(where, name, value)
    if not 0 <= seed < 2**32:
        raise ValueError(f"{where}: {name} must be in [0, 2**32), got {seed}")
    return seed


def seed_sequence(seed: int, purpose: Purpose, *indices: int) -> np.random.SeedSequence:
    """Return the seed sequence of one use; other arguments give an independent sequence.

    Args:
        seed: the user's, in [0, 2**128).
        purpose: the use.
        indices: the indices that :class:`Purpose` lists for it, each in [0, 2**32), one word of the key.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range.

    >>> seed_sequence(0, Purpose.TRAIN_TASKS, 3, 7).spawn_key
    (0, 3, 7)
    """
    where = "seed_sequence"
    # NumPy pads the seed to four words before a spawn key, so each word of the key has one position for all seeds.
    seed = _check.integer(where, "seed", seed, 0, 2**128)
    key = (int(purpose), *(_check.integer(where, "indices", index, 0, 2**32) for index in indices))
    return np.random.SeedSequence(seed, spawn_key=key)


def derive_seed(seed: int, purpose: Purpose, *indices: int, bits: int = 63) -> int:
    """Return a seed in [0, 2**bits) from :func:`seed_sequence`: 63 bits for torch's generators, 32 for a collection.

    >>> derive_seed(0, Purpose.PLANNING, bits=32) < 2**32
    True
    """
    return int(seed_sequence(seed, purpose, *indices).generate_state(1, np.uint64)[0]) >> (64 - bits)


def collection_sequence(seed: int, ids: Sequence[str]) -> np.random.SeedSequence:
    """Return the seed sequence of one collection of data from the tasks with these ids.

    The key is a 64-bit digest of the ids. It equals a key of :func:`seed_sequence` with a probability below 2**-50.
    """
    # Ids with a newline are hashed as a repr, because joined by newlines they would equal other lists.
    text, person = ("\n".join(ids), b"") if not any("\n" in name for name in ids) else (repr(list(ids)), b"newline")
    digest = blake2b(text.encode(), digest_size=8, person=person).digest()
    return np.random.SeedSequence(seed, spawn_key=(int.from_bytes(digest, "little"),))
