"""Large clusters and decoders drawn by seed: mixes of kinds, counts, shapes, networks and batches.

What is drawn has nothing to do with what the planner finds easy. One to six kinds of the catalogue, 8
to 2,048 devices of each, half of them in numbers that do not fill their nodes; 32 to 256 layers, dense
or with experts; vocabularies of 32,000 to 256,000; networks of 25 to 400 Gb/s. A model whose state would
take more than two thirds of all memory is drawn again.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline_cases import ALL_OPTIONS, DEVICES_PER_NODE, KINDS, Shape, decoder_table

from graphpar.cost import CostTable, LinkCost

_HIDDEN = (4096, 5120, 6144, 7168, 8192, 12288, 16384, 18432)
_VOCABULARY = (32_000, 50_304, 128_256, 151_936, 202_048, 256_000)
_BATCH = (256, 512, 1000, 1024, 1536, 2048, 4096)
_GIGABITS_PER_S = (25, 50, 100, 200, 400)

_STATE_BYTES = 16
"""Bytes of weights, gradients and optimiser state per parameter in 16-bit formats."""

_MOST_HELD = 2 / 3
"""Share of all memory that the state of a model may take."""


@dataclass(frozen=True)
class Drawn:
    """A cluster, a model and a batch."""

    shape: Shape
    counts: dict[str, int]
    batch: int
    network: LinkCost

    @property
    def parameters(self) -> float:
        """Of the whole model."""
        return self.shape.layers * self.shape.layer_parameters + 2 * self.shape.end_parameters

    @property
    def words(self) -> str:
        """What was drawn, in short."""
        devices = " ".join(f"{n}{k}" for k, n in self.counts.items())
        experts = " with experts" if self.shape.active < 1 else ""
        return (
            f"{self.parameters / 1e9:.0f}B{experts}, {self.shape.layers} layers, {devices}, "
            f"batch {self.batch}, {8 * self.network.bytes_per_s / 1e9:.0f} Gb/s"
        )


def draw(seed: int) -> Drawn:
    """The cluster, the model and the batch of a seed."""
    rng = random.Random(seed)
    while True:
        found = Drawn(_shape(rng), _counts(rng), rng.choice(_BATCH), _network(rng))
        memory = sum(found.counts.get(k.name, 0) * k.memory_bytes for k in KINDS)
        if found.parameters * _STATE_BYTES <= _MOST_HELD * memory:
            return found


def _shape(rng: random.Random) -> Shape:
    hidden, layers = rng.choice(_HIDDEN), rng.randint(32, 256)
    layer = 12 * hidden**2 * rng.uniform(0.8, 1.2)
    active = 1.0
    if rng.random() < 0.25:
        experts = rng.choice((8, 16, 64))
        # A third of a layer stays dense; two experts are asked for each token.
        layer, active = layer * (1 + 2 * experts) / 3, 5 / (1 + 2 * experts)
    return Shape(layers, hidden, layer, float(rng.choice(_VOCABULARY) * hidden), active)


def _counts(rng: random.Random) -> dict[str, int]:
    kinds = rng.sample(KINDS, rng.randint(1, len(KINDS)))
    whole = rng.random() < 0.5
    counts = {k.name: round(8 * 256 ** rng.random()) for k in kinds}
    if whole:
        counts = {k: n // DEVICES_PER_NODE * DEVICES_PER_NODE for k, n in counts.items()}
    return counts


def _network(rng: random.Random) -> LinkCost:
    return LinkCost(rng.choice((5e-6, 1e-5, 3e-5)), rng.choice(_GIGABITS_PER_S) * 1e9 / 8)


def drawn_cases(seeds: Iterable[int]) -> Iterator[tuple[str, CostTable]]:
    """All options over clusters drawn with some seeds."""
    for seed in seeds:
        found = draw(seed)
        table = decoder_table(found.shape, found.counts, found.batch, ALL_OPTIONS, found.network)
        yield f"large drawn {seed}: {found.words}", table
