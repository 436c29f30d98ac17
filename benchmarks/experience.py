"""The experience buffer: the cost of an add, a search, a draw and each retriever, in memory and on disk.

    python -m benchmarks.experience [--quick] [--threads 1]

An add stores a transition of CartPole with an embedding of 16 numbers, six fields. The bare copies are the same six
slices, written without checks and counters: a lower bound for a buffer of tensors. Searches use clustered embeddings of
64 numbers, beside addmm + topk + gather, and with inverted lists (retrieval.ivf) at their recall.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import flags, medians, wall_time, write
from eaml_ext import ExperienceBuffer, MetaMAML
from eaml_ext.experience import retrieval
from eaml_ext.meta import AdaptedTaskModels

SIZES = [1_000, 10_000, 100_000, 1_000_000]
DIM, K = 64, 8


def transitions(n: int | None) -> dict[str, Tensor]:
    lead = () if n is None else (n,)
    return {
        "state": torch.randn(*lead, 4),
        "action": torch.randn(*lead, 2),
        "reward": torch.randn(lead),
        "next_state": torch.randn(*lead, 4),
        "context_embedding": torch.randn(*lead, 16),
        "task": torch.zeros(lead, dtype=torch.int64),
    }


def bare_copies(fields: dict[str, Tensor], capacity: int) -> Callable[[], None]:
    """Writes the fields to a ring that they divide."""
    rows = {name: value if value.dim() and len(value) == 64 else value[None] for name, value in fields.items()}
    store = {name: torch.zeros(capacity, *value.shape[1:], dtype=value.dtype) for name, value in rows.items()}
    count = len(rows["task"])
    starts = itertools.cycle(range(0, capacity, count))

    def add() -> None:
        start = next(starts)
        for name, value in rows.items():
            store[name].narrow(0, start, count).copy_(value)

    return add


def adds(total: int, capacity: int) -> dict[str, Any]:
    """Microseconds per transition of ``total`` in batches of 64, and of a fifth of them one by one; the ring turns."""
    results = {}
    for size in (64, None):
        fields, count = transitions(size), size or 1
        calls = total // (64 if size else 5) // 10
        with tempfile.TemporaryDirectory() as folder:
            buffers = {
                "in memory": (ExperienceBuffer(capacity, 4, 2), fields),
                "with weights": (
                    ExperienceBuffer(capacity, 4, 2, age_half_life=capacity),
                    {**fields, "priority": torch.ones_like(fields["reward"])},
                ),
                "on disk": (ExperienceBuffer(capacity, 4, 2, directory=folder), fields),
            }
            functions: dict[str, Callable[[], Any]] = {
                name: lambda buffer=buffer, items=items: buffer.add(**items)
                for name, (buffer, items) in buffers.items()
            }
            functions["bare copies"] = bare_copies(fields, capacity // 64 * 64)
            seconds = dict.fromkeys(functions, 0.0)
            for function in functions.values():
                function()
            for _ in range(10):  # interleaved: a slow moment of the machine meets all of them
                for name, function in functions.items():
                    start = time.perf_counter()
                    for _ in range(calls):
                        function()
                    seconds[name] += time.perf_counter() - start
            buffers["on disk"][0].close()
        results[f"batches of {count}"] = {name: 1e5 * s / calls / count for name, s in seconds.items()}
    return results


def clustered(n: int) -> Tensor:
    """As tasks' embeddings stand: around centres, a hundred to each."""
    centres = torch.randn(max(1, n // 100), DIM)
    return centres[torch.randint(len(centres), (n,))] + 0.3 * torch.randn(n, DIM)


def filled(n: int, directory: str | None = None) -> ExperienceBuffer:
    buffer = ExperienceBuffer(n, seed=0, directory=directory)
    for part in clustered(n).split(65536):
        states = part[:, :8]
        buffer.add(
            state=states, next_state=states, context_embedding=part, priority=1.0, task=torch.arange(len(part)) // 40
        )
    return buffer


def searches(sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    results = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            buffer, disk = filled(n), filled(n, folder)
            fields = dict(buffer.storage.columns)
            keys, norms = fields["context_embedding"], fields["context_embedding"].square().sum(1)
            cells = retrieval.ivf(K)
            queries = keys[torch.randint(n, (64,))] + 0.1 * torch.randn(64, DIM)
            buffer.retrieve(queries[0], K)  # imports the ops
            build = wall_time(lambda: cells.search(buffer, queries[0]))  # noqa: B023 (called at once)
            for count in (1, 64):
                query = queries[:count]

                def topk(
                    query: Tensor = query, fields: Any = fields, keys: Tensor = keys, norms: Tensor = norms
                ) -> Any:
                    found = torch.addmm(norms, query, keys.T, alpha=-2).topk(K, largest=False).indices
                    return {name: value[found] for name, value in fields.items()}

                t = medians(
                    {
                        "retrieve": lambda query=query, buffer=buffer: buffer.retrieve(query, K),
                        "on disk": lambda query=query, disk=disk: disk.retrieve(query, K),
                        "addmm + topk": topk,
                        "with cells": lambda query=query, buffer=buffer, cells=cells: cells.search(buffer, query),
                    },
                    seconds=seconds,
                )
                recall = cells.recall(buffer, queries)
                results.append({"items": n, "queries": count, "build cells": build, "recall of cells": recall, **t})
            disk.close()
    return results


def strategies(tasks: int, seconds: float) -> dict[str, Any]:
    """One retrieval each, of 200 items, from a memory of ``tasks`` tasks of 40 items."""
    buffer = filled(40 * tasks)
    maml = MetaMAML(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)), inner_lr=0.05, outer_lr=1e-3)
    ids = torch.arange(40 * tasks) // 40
    buffer.storage.columns["task"].copy_(ids)
    models = AdaptedTaskModels(maml, buffer, F.mse_loss, 5)
    query = buffer.get_batch(1).context_embedding[0]
    batch = {"states": torch.randn(10, 8), "targets": torch.randn(10, 8), "context_embedding": query}
    retrievers = {
        "uniform": retrieval.uniform(200),
        "uniform, weighted": retrieval.uniform(200, weighted=True),
        "nearest": retrieval.nearest(200),
        "attention": retrieval.attention(200),
        "ivf": retrieval.ivf(200),
        "best_fit": retrieval.best_fit(models.score, 5),
    }
    functions = {name: lambda r=r: r(buffer, batch) for name, r in retrievers.items()}
    return {"items": len(buffer), "tasks": tasks, **medians(functions, seconds=seconds)}


def draws(n: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        memory, disk = filled(n), filled(n, folder)
        more = {name: value[:4096] for name, value in memory.get(torch.arange(n)).fields.items()}
        t = medians(
            {
                "get_batch(256)": lambda: memory.get_batch(256),
                "get_batch(256), on disk": lambda: disk.get_batch(256),
                "get_batch(256, weighted)": lambda: memory.get_batch(256, weighted=True),
                "flush after 4096 items": lambda: disk.flush(),
            },
            seconds=seconds,
            before=lambda name: disk.add(**more) if name.startswith("flush") else None,
        )
        disk.close()
    return {"items": n, **t}


def main() -> None:
    arguments = flags(__doc__)
    quick = arguments.quick
    seconds = 0.3 if quick else 1.0
    results: dict[str, Any] = {"threads": arguments.threads}
    results["adds"] = adds(100_000 if quick else 1_000_000, 200_000)
    for size, row in results["adds"].items():
        print(f"add, {size}: " + ", ".join(f"{name} {t:.2f} us" for name, t in row.items()) + " per transition")
    results["searches"] = searches(SIZES[: 2 if quick else None], seconds)
    print(f"{'items':>9}{'queries':>9}{'retrieve ms':>13}{'on disk':>9}{'addmm+topk':>12}{'cells':>8}{'recall':>8}")
    for row in results["searches"]:
        ours = row["retrieve"]
        print(
            f"{row['items']:>9}{row['queries']:>9}{1e3 * ours:>13.3f}{row['on disk'] / ours:>8.2f}x"
            f"{row['addmm + topk'] / ours:>11.2f}x{row['with cells'] / ours:>7.2f}x{row['recall of cells']:>8.3f}"
        )
    results["strategies"] = strategies(25 if quick else 1000, seconds)
    results["draws"] = draws(10_000 if quick else 1_000_000, seconds)
    for name in ("strategies", "draws"):
        row = results[name]
        print(
            f"{row['items']} items: " + ", ".join(f"{k} {1e3 * t:.3f} ms" for k, t in row.items() if type(t) is float)
        )
    if not quick:
        print(write(f"experience-{arguments.threads}-thread", results))


if __name__ == "__main__":
    main()
