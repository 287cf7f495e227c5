"""A model captured at the sequence lengths and batches of a study, as seldom as can be.

Of many lengths three are captured, and those between follow from them (`lengths`). These three are
exported once each, for unlike batches in turn, if the ops are those of the example's capture: what
scales with the batch elsewhere than there, or the other way round, bends the line, and then each length
is captured in full.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from graphpar.errors import GraphparError
from graphpar.frontend.capture import unlike_size
from graphpar.preparation import Prepared, prepare, prepare_like
from graphpar.scenarios.lengths import FEWEST, are_straight, between, same_form, sequence_length, support
from graphpar.training import Training

Inputs = Callable[[int, int], tuple[Sequence[Any], Mapping[str, Any]]]
"""From a batch size and a sequence length to positional and keyword arguments."""


class Captures:
    """Captures of one model, each made when it is first asked for (see `PriceBook`)."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        train: Training | None,
        inputs: Inputs | None,
    ) -> None:
        self.model, self.args, self.kwargs, self.train, self.inputs = model, args, kwargs, train, inputs
        self._made: dict[tuple[int | None, int | None], Prepared] = {}
        self._failed: dict[tuple[int | None, int | None], Exception] = {}
        self._likes: dict[tuple[int, int], Prepared | None] = {}
        self._lengths: frozenset[int] = frozenset()
        self._support: tuple[int, ...] = ()
        self._known_ends: dict[int, Prepared] | None = None

    @cached_property
    def own_length(self) -> int:
        """The example's sequence length."""
        return sequence_length(self.args, self.kwargs)

    def baseline(self) -> Prepared:
        """The example batch's capture."""
        return self.at(None, None)

    def expect(self, lengths: Collection[int]) -> None:
        """Say which sequence lengths will be asked for: of many, few are captured, and others follow."""
        captured = {length for length, batch in self._made if length is not None and batch is None}
        self._lengths = frozenset(lengths)
        self._support = support(self._lengths, captured | {self.own_length})
        self._known_ends = None

    def at(self, seq_len: int | None, batch: int | None) -> Prepared:
        """The capture at a length and a batch, of which None is the example's.

        Raises:
            ValueError: It needs inputs that nobody can make.
            CaptureError: The model cannot be captured.
        """
        key = seq_len, batch
        if key not in self._made and key not in self._failed:
            try:
                found = self._following(seq_len) if seq_len is not None and batch is None else None
                self._made[key] = found or self._in_full(seq_len, batch)
            except (ValueError, GraphparError) as error:
                self._failed[key] = error
        if key in self._failed:
            raise self._failed[key]
        return self._made[key]

    def _following(self, seq_len: int) -> Prepared | None:
        """The capture at a length from those at others; None where it is to be made itself."""
        if seq_len == self.own_length or self.inputs is None:
            return None
        if self._known_ends is None:
            self._known_ends = self._ends()
        ends = self._known_ends
        return ends.get(seq_len) or (between(ends, seq_len) if len(ends) == FEWEST else None)

    def _ends(self) -> dict[int, Prepared]:
        """The captures that others follow from, as many as there are of them."""
        while True:
            made = {n: found for n in self._support if (found := self._like(n) or self._own(n))}
            if len(made) == len(self._support):
                break
            # A model may have too few positions for some: they tell nothing of others.
            self.expect(self._lengths - (set(self._support) - made.keys()))
        if len(made) == FEWEST and not are_straight(made):
            made = {n: found for n in made if (found := self._own(n))}
        for length, found in made.items():
            self._made.setdefault((length, None), found)
        return made

    def _like(self, seq_len: int) -> Prepared | None:
        """One of three captures from a single export, if it has the example's ops."""
        if len(self._support) < FEWEST or seq_len == self.own_length or (seq_len, None) in self._made:
            return None
        batch = self.baseline().graph.batch
        samples = batch if seq_len == self._support[1] else unlike_size(batch)
        if (seq_len, samples) not in self._likes:
            try:
                inputs = self._inputs(seq_len, None)
                found = prepare_like(self.baseline(), self.model, *inputs, self.train, samples)
            except (ValueError, GraphparError):
                found = None  # told where it is captured in full
            self._likes[seq_len, samples] = found
        return self._likes[seq_len, samples]

    def _own(self, seq_len: int) -> Prepared | None:
        """The capture at a length in full; None where the model cannot be captured there."""
        key = seq_len, None
        if key not in self._made and key not in self._failed:
            try:
                self._made[key] = self._in_full(seq_len, None)
            except (ValueError, GraphparError) as error:
                self._failed[key] = error
        return self._made.get(key)

    def _in_full(self, seq_len: int | None, batch: int | None) -> Prepared:
        args, kwargs = self.args, self.kwargs
        if (seq_len, batch) != (None, None):
            args, kwargs = self._inputs(seq_len, batch)
            if same_form((args, kwargs), (self.args, self.kwargs)):
                return self.baseline()
        return prepare(self.model, args, kwargs, self.train)

    def _inputs(self, seq_len: int | None, batch: int | None) -> tuple[Sequence[Any], Mapping[str, Any]]:
        if self.inputs is None:
            what = "the sequence length" if seq_len is not None else "the batch, which stays whole,"
            raise ValueError(
                f"changing {what} needs other example inputs; give inputs=lambda batch, seq_len: "
                "(args, kwargs)"
            )
        base = self.baseline().graph
        return self.inputs(batch or base.batch, seq_len if seq_len is not None else self.own_length)
