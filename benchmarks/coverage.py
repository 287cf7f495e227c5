"""Which architectures of transformers go through, unmodified: captured, planned, run, compared.

    python benchmarks/coverage.py --json Llama GPT2 T5
    python benchmarks/coverage.py --list well-known

Names are the prefixes of transformers' classes or its model types. Nothing is downloaded: each model is
built tiny from its configuration with random weights. For each architecture the inputs come from the
signature of its forward; it is captured, planned over 2 and over 3 emulated workers of unlike speed
(where the plan uses fewer, it is cut over all of them in proportion to their speed), run, and compared
with one device: outputs, loss, every gradient, and buffers after the step. Evaluation and training
without dropout are compared with the eager model, training with dropout with the captured graph on one
device under the same seed.

Each architecture runs in a process of its own under a limit of processor time, so that a machine with
other work does not fail a model; one that does nothing at all for minutes is ended as well.
"""

# numba looks for a package of this name when it is imported, and must not find the benchmark instead.
if __name__ != "__main__":
    raise ImportError("this is a benchmark of graphpar and not the package coverage")

from coverage_run import main

main(__doc__)
