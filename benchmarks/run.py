"""All benchmarks, one after another: python -m benchmarks.run [--quick] [--threads 1].

--quick takes a few minutes: the kernels' tables for this machine, their plots in build/bench, nothing in results/.
"""

from benchmarks import decoding, experience, inner_steps, mamba, mamba2, meta, transformers_families
from benchmarks.ops import causal_conv1d, knn, packed, selective_scan


def main() -> None:
    models = (mamba, mamba2, decoding, transformers_families)
    for benchmark in (selective_scan, causal_conv1d, packed, knn, meta, inner_steps, experience, *models):
        print(f"\n== {benchmark.__name__}")
        benchmark.main()


if __name__ == "__main__":
    main()
