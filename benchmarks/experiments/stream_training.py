"""Train with equal CPU time, and print errors by variant: for experiments on streams."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments import runs
from eaml_ext import AdaptationConfig, Adapter, ExperienceBuffer
from eaml_ext.meta import StreamMAML

TUNING_SEED, TUNING_SHARE = 1000, 0.4  # of the trainings that choose the learning rate; their part of the CPU time
STEP_SIZES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of plain + Adapter
OPEN = AdaptationConfig(grad_clip_norm=None, trust_region_eps=None, ema_decay=None, max_steps_per_call=1)
"""No guards."""


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw streams without end, each once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            yield x[rows], y[rows]


def train(
    maml: StreamMAML,
    training: str,
    lr: float,
    seconds: float,
    source: Iterator[tuple[Tensor, Tensor]],
    plain_share: float,
    without_experience: float = 1.0,
) -> list[int]:
    """Train ``maml.model`` on mean squared errors for ``seconds`` of CPU time; return the updates of each phase.

    The learning rate decays linearly to zero with the CPU time used.

    Args:
        maml: the method, whose ``outer_lr`` is ``lr``.
        training: "plain": no meta-updates.
        lr: learning rate at the start.
        seconds: CPU time.
        source: streams and targets.
        plain_share: the part of the time until which the updates are plain, in all trainings.
        without_experience: the part until which a method with experience trains without it.
    """
    start, model = time.process_time(), maml.model
    plain = torch.optim.Adam(model.parameters(), lr=lr)

    def until(end: float, optimizer: torch.optim.Optimizer, update: Callable[[Tensor, Tensor], object]) -> int:
        count = 0
        while (used := (time.process_time() - start) / seconds) < end:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - used)
            update(*next(source))
            count += 1
        return count

    def plain_update(x: Tensor, y: Tensor) -> None:
        plain.zero_grad()
        prediction = model.scan(x)[0]  # type: ignore[operator]
        F.mse_loss(prediction, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()

    def meta_update(x: Tensor, y: Tensor) -> None:
        maml.meta_update(x, y, F.mse_loss)

    counts = [until(1.0 if training == "plain" else plain_share, plain, plain_update)]
    experience, maml.experience = maml.experience, None
    if experience is not None:
        counts.append(until(without_experience, maml.optimizer, meta_update))
    maml.experience = experience
    return [*counts, until(1.0, maml.optimizer, meta_update)]


def adapted(model: nn.Module, x: Tensor, y: Tensor, step_size: float, **options: Any) -> Tensor:
    """The predictions with updates of one step size; ``options`` are those of StreamMAML.

    An Adapter without guards has the same predictions, one stream at a time: see :func:`check_adapter`.
    """
    maml = StreamMAML(model, step_size, 1.0, learn_inner_lr=False, **options)
    return maml.predict(x, y, F.mse_loss)


def check_adapter(maml: StreamMAML, x: Tensor, y: Tensor) -> None:
    """Raise AssertionError unless Adapter.adapt_stream predicts the first stream as StreamMAML.predict does."""
    x, y, experience = x[:1], y[:1], maml.experience
    options: dict[str, Any] = {}
    if experience is not None:
        options = {
            "experience_buffer": ExperienceBuffer(experience.slots),
            "experience_weight": float(experience.weight.detach()),
            "retriever": experience,
        }
    adapter = Adapter(copy.deepcopy(maml.model), OPEN, step_sizes=maml.step_sizes, **options)
    pairs = zip(x.split(maml.chunk_size, 1), y.split(maml.chunk_size, 1), strict=True)
    stream = adapter.adapt_stream(F.mse_loss, [{"states": a, "targets": b} for a, b in pairs])
    found = torch.cat([prediction for prediction, _ in stream], 1)
    # Updates amplify rounding errors along a stream.
    torch.testing.assert_close(found, maml.predict(x, y, F.mse_loss), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------------- results


def learning_rate(results: runs.Runs, training: str, variant: str) -> float:
    """The learning rate with the least mean error of a variant in the tuning runs."""
    lines = results.find(training=training, seed=TUNING_SEED)
    errors = {line["settings"]["lr"]: line["errors"][variant]["mean"] for line in lines}
    return float(min(errors, key=lambda lr: errors[lr] if math.isfinite(errors[lr]) else math.inf))


def errors_by_variant(
    results: runs.Runs, trained: Mapping[str, Sequence[str]], seeds: int
) -> dict[str, list[dict[str, Any]]]:
    """The errors of each variant by seed, with the learning rate that the tuning runs choose for it.

    Args:
        results: the runs.
        trained: the variants of each training.
        seeds: number of seeds.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for training, variants in trained.items():
        if results.find(training=training, seed=TUNING_SEED):
            for variant in variants:
                lr = learning_rate(results, training, variant)
                lines = [results.find(training=training, lr=lr, seed=seed, split="test") for seed in range(seeds)]
                found[variant] = [line[0]["errors"][variant] for line in lines if line]
    return found


def run_all(
    results: runs.Runs,
    function: Callable[..., runs.Line],
    trained: Mapping[str, Sequence[str]],
    flags: Any,
    lrs: Sequence[float],
) -> None:
    """Run the tuning of every training, then its seeds with the learning rates that its variants choose.

    Args:
        results: the runs.
        function: takes ``training``, ``lr``, ``seed``, ``seconds``, ``split`` and ``brief``.
        trained: the variants of each training.
        flags: of :func:`benchmarks.experiments.runs.parser`, and ``seconds``.
        lrs: the learning rates to try.
    """
    wanted = {*(flags.variants or ())}
    chosen = {name: variants for name, variants in trained.items() if not wanted or wanted & {name, *variants}}
    seconds, brief = (0.2 if flags.quick else flags.seconds), flags.quick
    for training, lr in itertools.product(chosen, lrs[:1] if flags.quick else lrs):
        settings = {"seed": TUNING_SEED, "split": "valid", "seconds": TUNING_SHARE * seconds, "brief": brief}
        results.run(function, training=training, lr=lr, **settings)
    for seed, (training, variants) in itertools.product(range(1 if flags.quick else flags.seeds), chosen.items()):
        for lr in sorted({learning_rate(results, training, variant) for variant in variants}):
            settings = {"seed": seed, "split": "test", "seconds": seconds, "brief": brief}
            results.run(function, training=training, lr=lr, **settings)


def error_table(errors: Mapping[str, Sequence[dict[str, Any]]], parts: Mapping[str, str]) -> runs.Table:
    """Return means with intervals over seeds, and the seeds' errors of the first part.

    Args:
        errors: by variant and seed, then by part.
        parts: their headings.
    """
    first, rows = next(iter(parts)), []
    for variant, found in errors.items():
        if not found:  # of an experiment that has not ended
            continue
        cells = [runs.interval(row[part] for row in found) if part in found[0] else "" for part in parts]
        rows.append([variant, *cells, ", ".join(f"{row[first]:.4f}" for row in found)])
    return "", ["variant", *parts.values(), f"{parts[first]}, by seed"], rows


def difference_table(
    errors: Mapping[str, Sequence[dict[str, Any]]], parts: Mapping[str, str], pairs: Sequence[tuple[str, str]]
) -> runs.Table:
    """Return differences of variants, paired by seed, with 95 % intervals."""
    rows = []
    for first, second in pairs:
        a, b = errors.get(first, []), errors.get(second, [])
        if len(a) == len(b) > 1:
            gaps = [runs.paired([r[part] for r in a], [r[part] for r in b]) for part in parts if part in b[0]]
            cells = [f"{g['mean']:+.4f} ± {g['half']:.4f}" for g in gaps]
            rows.append([f"{first} - {second}", *cells, *[""] * (len(parts) - len(cells))])
    return "", ["paired by seed", *parts.values()], rows
