"""The cost of many ranks: the constants of docs/scaling.md, measured on one machine with two processes, and its tables.

    python -m benchmarks.scaling [--quick]

Two processes of one thread each use gloo over the loopback device. This measures the cost of the software; a network
adds its own. Messages are the fastest of many, and computing is in CPU seconds, to exclude other work on the machine.

    python -m benchmarks.scaling --page docs/scaling.md    writes the tables of the results into the page
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.common import flags, load, result_path, write
from eaml_ext import SSM, ExperienceBuffer, MetaMAML
from eaml_ext.distributed import Group, destroy_process_group, init_process_group
from eaml_ext.experience import ShardedExperienceBuffer

DIM, K, ITEM = 64, 8, 512  # size of an embedding, neighbours, bytes of an item's other fields


def filled(n: int) -> ExperienceBuffer:
    buffer = ExperienceBuffer(n, seed=0)
    for part in torch.randn(n, DIM).split(65536):
        buffer.add(state=torch.zeros(len(part), ITEM // 4), context_embedding=part)
    return buffer


def scan(n: int, calls: int) -> dict[str, Any]:
    """One thread searches n keys for one query and for 64, and writes a batch of 64 items; bytes of an item."""
    buffer = filled(n)
    queries = torch.randn(64, DIM)
    buffer.retrieve(queries, K)
    adds = {"state": torch.zeros(64, ITEM // 4), "context_embedding": torch.randn(64, DIM)}
    took = {
        "1 query": median(lambda: buffer.retrieve(queries[0], K), calls),
        "64 queries": median(lambda: buffer.retrieve(queries, K), calls),
    }
    adding = median(lambda: [buffer.add(**adds) for _ in range(20)], calls) / 20
    stored = sum(s.element_size() * s.numel() for s in buffer.storage.columns.values())
    index = buffer._index
    assert index is not None
    packed = index._packed
    kept: list[Any] = (
        [] if packed is None else [packed._keys, packed._bias, packed._live, packed._panels, packed._state]
    )
    total = stored + sum(t.element_size() * t.numel() for t in kept if t is not None)
    return {
        "keys": n,
        "seconds": took,
        "keys per second, 1 query": n / took["1 query"],
        "key-query pairs per second, 64 queries": 64 * n / took["64 queries"],
        "seconds of an add, batches of 64": adding / 64,
        "bytes of an item": total / n,
        "of these stored fields": stored / n,
    }


def median(function: Callable[[], Any], calls: int) -> float:
    """CPU seconds of a call, the median: what else runs on the machine does not count."""
    function()
    samples = []
    for _ in range(calls):
        start = time.process_time()
        function()
        samples.append(time.process_time() - start)
    return sorted(samples)[calls // 2]


def fastest(group: Group, function: Callable[[], Any], seconds: float) -> float:
    """Wall seconds of the fastest call on this rank; all ranks make the same number of calls."""
    for _ in range(3):
        function()
    start = time.perf_counter()
    function()
    calls = group.broadcast_object(0, max(10, min(500, int(seconds / (time.perf_counter() - start)))))
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return min(samples)


def fit(points: list[tuple[int, float]]) -> dict[str, float]:
    """Latency of the smallest message, and bytes per second between the two largest."""
    least, (a, slow), (b, slowest) = points[0][1], points[-2], points[-1]
    return {"seconds of a message of 8 bytes": least, "bytes per second": (b - a) / (slowest - slow)}


def on_a_rank(seconds: float, keys: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    group = Group()
    sizes = [8, 4096, 1 << 18, 1 << 20, 1 << 22]
    gathers, sums = [], []
    for size in sizes:
        numbers = torch.zeros(size // 4)
        gathers.append((size, fastest(group, lambda: group.all_gather(numbers), seconds)))  # noqa: B023
        sums.append((size, fastest(group, lambda: group.all_reduce_([numbers]), seconds)))  # noqa: B023
    sharded = ShardedExperienceBuffer(2 * keys, group=group)
    for part in torch.randn(keys, DIM).split(65536):
        sharded.add(state=torch.zeros(len(part), ITEM // 4), context_embedding=part)
    query = torch.randn(DIM)
    retrieve = {
        "sharded, seconds": fastest(group, lambda: sharded.retrieve(query, K), seconds),
        "its own shard alone, CPU seconds": median(lambda: sharded.local.retrieve(query, K), 10),
        "keys of a shard": keys,
    }
    torch.manual_seed(1)
    pair = torch.randn(1, 100, 4), torch.randn(1, 100, 1)
    tasks = [(*pair, *pair)] * 64
    share, alone = MetaMAML(SSM(4, 64, 1), 0.05, 1e-3, group=group), MetaMAML(SSM(4, 64, 1), 0.05, 1e-3)
    mine = [tasks[i] for i in group.shard(len(tasks))]
    update = {
        "64 tasks on 2 ranks, CPU seconds of each": median(lambda: share.meta_update(mine, F.mse_loss), 10),
        "32 tasks, no group, CPU seconds": median(lambda: alone.meta_update(mine, F.mse_loss), 10),
        "64 tasks, no group, CPU seconds": median(lambda: alone.meta_update(tasks, F.mse_loss), 10),
        "bytes of the meta-gradient": sum(p.numel() * p.element_size() for p in share.parameters().values()),
    }
    return {
        "all_gather": {**fit(gathers), "points": gathers},
        "all_reduce": {**fit(sums), "points": sums},
        "retrieve": retrieve,
        "meta_update": update,
    }


def two_processes(seconds: float, keys: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scaling", "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        children = [
            subprocess.Popen([*command, str(rank), folder, str(seconds), str(keys)], env=environment)
            for rank in range(2)
        ]
        if any([child.wait() for child in children]):
            raise RuntimeError("a rank has failed")
        with open(os.path.join(folder, "results")) as file:
            return json.load(file)


def predicted(constants: dict[str, Any]) -> list[dict[str, Any]]:
    """The model of docs/scaling.md: one query a rank, K neighbours."""
    rate, per_item = constants["scan"]["key-query pairs per second, 64 queries"], constants["scan"]["bytes of an item"]
    gather = constants["ranks"]["all_gather"]
    latency, bandwidth = gather["seconds of a message of 8 bytes"], gather["bytes per second"]
    record = 16 + DIM * 4 + ITEM
    rows = []
    for items, ranks in ((10**6, 1), (10**7, 4), (10**8, 32), (10**8, 128), (10**9, 256), (10**9, 1024)):
        received = (ranks - 1) * (56 + DIM * 4 + K * record) if ranks > 1 else 0
        rows.append(
            {
                "items": items,
                "ranks": ranks,
                "GB a rank": items / ranks * per_item / 1e9,
                "scan of one query, ms": 1e3 * items / ranks / constants["scan"]["keys per second, 1 query"],
                "scan of one query of every rank, ms": 1e3 * items / rate,
                "kB received a rank": received / 1e3,
                "exchange, ms": 1e3 * (3 * (ranks - 1) * latency + received / bandwidth),
            }
        )
    return rows


def tables(results: dict[str, Any]) -> str:
    """The page's tables."""
    scan, ranks = results["scan"], results["ranks"]
    gather, reduce = ranks["all_gather"], ranks["all_reduce"]
    updates, found = list(ranks["meta_update"].values()), list(ranks["retrieve"].values())
    one, many = scan["keys per second, 1 query"], scan["key-query pairs per second, 64 queries"]
    lines = ["| constant | measured |", "|---|---|"]
    lines += [
        f"| pairs of key and query a core scans a second, one query | {one / 1e6:.0f} million |",
        f"| the same, 64 queries at once | {many / 1e6:.0f} million |",
        f"| writing an item, batches of 64 | {1e6 * scan['seconds of an add, batches of 64']:.2f} µs |",
        f"| memory of an item with {ITEM} bytes beside its embedding | {scan['bytes of an item']:.0f} bytes |",
        f"| all-gather, 8 bytes | {1e6 * gather['seconds of a message of 8 bytes']:.0f} µs |",
        f"| all-gather, large | {gather['bytes per second'] / 1e9:.2g} GB/s |",
        f"| all-reduce, 8 bytes | {1e6 * reduce['seconds of a message of 8 bytes']:.0f} µs |",
        f"| all-reduce, large | {reduce['bytes per second'] / 1e9:.2g} GB/s |",
        f"| retrieve, two shards of {found[2]} keys each, one query a rank | {1e3 * found[0]:.2f} ms |",
        f"| the search of one shard in it, CPU | {1e3 * found[1]:.2f} ms |",
        f"| meta-update of 64 tasks by two ranks, CPU of each | {1e3 * updates[0]:.1f} ms |",
        f"| of 32 tasks by one process | {1e3 * updates[1]:.1f} ms |",
        f"| of 64 tasks by one process | {1e3 * updates[2]:.1f} ms |",
        f"| its meta-gradient | {updates[3] / 1e3:.1f} kB |",
        "",
        "| items | ranks | memory a rank | search if one rank asks "
        "| search if every rank asks, at the rate of 64 queries | received a rank | exchange |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["predicted"]:
        lines.append(
            f"| 10^{len(str(row['items'])) - 1} | {row['ranks']} | {row['GB a rank']:.2g} GB "
            f"| {row['scan of one query, ms']:.1f} ms | {row['scan of one query of every rank, ms']:.0f} ms "
            f"| {row['kB received a rank']:.0f} kB | {row['exchange, ms']:.1f} ms |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = flags(__doc__)
    seconds, keys = (0.2, 20_000) if arguments.quick else (3.0, 500_000)
    results: dict[str, Any] = {"scan": scan(2 * keys, 10), "ranks": two_processes(seconds, keys)}
    results["predicted"] = predicted(results)
    print(tables(results))
    if not arguments.quick:
        write("scaling", results)


def rank_main(rank: str, folder: str, seconds: str, keys: str) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    init_process_group(store=store, rank=int(rank), world_size=2)
    results = on_a_rank(float(seconds), int(keys))
    if rank == "0":
        with open(os.path.join(folder, "results"), "w") as file:
            json.dump(results, file)
    destroy_process_group()


def written_tables() -> str:
    """What docs/scaling.md shows: the tables of the results in the repository."""
    paths = sorted(result_path("scaling").parent.glob("scaling-*.json"))
    return tables(load(paths[0])["results"])


def update_page(path: str) -> None:
    """Put the tables between the page's markers."""
    with open(path) as file:
        page = file.read()
    begin, end = "<!-- python -m benchmarks.scaling -->\n", "\n<!-- end -->"
    with open(path, "w") as file:
        file.write(re.sub(f"{begin}.*?{end}", lambda _: begin + written_tables() + end, page, flags=re.S))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(*sys.argv[2:])
    elif sys.argv[1:2] == ["--page"]:
        update_page(sys.argv[2])
    else:
        main()
