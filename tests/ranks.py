"""Functions of a test module run on several processes that form a group: `python ranks.py <module> <folder> <rank>`.

Each function is called on every rank as ``function(group, folder)``, one after the other until one raises.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
import weakref
from datetime import timedelta
from pathlib import Path

TIMEOUT = 60.0  # seconds a rank waits for others


def failures(module: str, functions: list, folder: Path, size: int = 2) -> list[str]:
    """Run the functions on ``size`` processes; return the errors with rank and traceback."""
    names = ",".join(f.__name__ for f in functions)
    command = [sys.executable, __file__, module, str(folder), names, str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    options = {"stderr": subprocess.STDOUT, "text": True, "env": environment}
    children = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, **options) for rank in range(size)]
    outputs = [child.communicate(timeout=240)[0] for child in children]
    failed = []
    for rank, (child, output) in enumerate(zip(children, outputs, strict=True)):
        path = folder / f"outcome-{rank}.json"
        if child.returncode or not path.exists():
            failed.append(f"rank {rank} ended with {child.returncode}:\n{output}")
            continue
        failed += [f"rank {rank}, {name}:\n{text}" for name, text in json.loads(path.read_text()).items() if text]
    return failed


def main(module: str, folder: str, names: str, size: str, rank: str) -> None:
    import torch.distributed as dist

    from eaml_ext.distributed import Group, destroy_process_group, init_process_group

    store = dist.FileStore(os.path.join(folder, "store"), int(size))
    options = {"store": store, "rank": int(rank), "world_size": int(size), "timeout": timedelta(seconds=TIMEOUT)}
    init_process_group(**options)
    try:
        run(module, folder, names, rank, Group())
    finally:
        process_group = weakref.ref(dist.group.WORLD)
        destroy_process_group()
        assert process_group() is None, "the process group and its threads are still alive"


def run(module: str, folder: str, names: str, rank: str, group) -> None:
    sys.path.insert(0, os.path.dirname(module))
    spec = importlib.util.spec_from_file_location("on_ranks", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    outcome = {}
    for name in names.split(","):
        try:
            getattr(loaded, name)(group, Path(folder))
            outcome[name] = None
        except BaseException:
            outcome[name] = traceback.format_exc()
            break  # the ranks are out of step
    (Path(folder) / f"outcome-{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
