"""What of a wish for training a model and its optimiser allow, and the words that say why not all."""

import warnings
from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.optimizer_probe import optimizer_traits
from graphpar.partition.settings import Microbatches, ScheduleWish
from graphpar.preparation import Prepared
from graphpar.training import Training


def may_repeat(table: CostTable) -> bool:
    """Whether units may run a second time in a step, and their state be divided.

    What writes into buffers (there, samples mix) cannot run twice.
    """
    return table.training and not table.batch_reason and not table.in_step_reason


def uncut_note(optimizer: str) -> str:
    """Why a model stays in one piece."""
    return (
        f"the model is not cut: a step of {optimizer} on one parameter depends on all others, so that "
        "every device holds all of them"
    )


def allowed_microbatches(prepared: Prepared, train: Training | None) -> Microbatches:
    """How many microbatches to plan for; a batch that must stay whole is one, and says so."""
    wanted = train.microbatches if train else "auto"
    reason = whole_reason(prepared)
    if wanted in ("auto", 1) or not reason:
        return wanted
    warnings.warn(f"Training(microbatches={wanted}) is ignored: {reason}", stacklevel=4)
    return "auto"


def whole_reason(prepared: Prepared) -> str:
    """Why the samples of a pipeline are one microbatch; empty where they need not be."""
    reason = prepared.batch_reason or prepared.in_step_reason
    return reason and (
        f"{reason}, so that the samples of a pipeline must stay together to give the numbers of one "
        "device. They are one microbatch."
    )


def allowed_zero_levels(train: Training | None) -> tuple[int, ...]:
    """ZeRO levels besides 0 that stages may choose, with a warning where that is less than asked for."""
    if train is None or not train.zero:
        return ()
    traits = optimizer_traits(train.optimizer)
    levels = zero_levels(train, traits.by_slices, train.schedule)
    if not levels:
        warnings.warn(
            f"Training(zero={train.zero}) is ignored: {traits.name} needs "
            "whole parameters, so its state cannot be divided among replicas by rows.",
            stacklevel=4,
        )
    elif max(levels) < train.zero:
        warnings.warn(
            f"Training(zero={train.zero}) is taken for zero=1: under the schedule {train.schedule} "
            "gradients are not divided among replicas. Level 2 runs under 1f1b and gpipe.",
            stacklevel=4,
        )
    return levels


def possible_zero_levels(train: Training | None) -> tuple[int, ...]:
    """ZeRO levels that could be asked for, whatever was."""
    if train is None:
        return ()
    return zero_levels(
        replace(train, zero=2), optimizer_traits(train.optimizer).by_slices, train.schedule
    )


def zero_levels(train: Training | None, by_slices: bool, schedule: ScheduleWish) -> tuple[int, ...]:
    """ZeRO levels besides 0 that stages may choose under the schedule wished for.

    `by_slices` says whether the optimiser works on rows of parameters as on whole ones.
    """
    if train is None or not by_slices:
        return ()
    most = min(train.zero, 1) if schedule in ("interleaved", "zero-bubble") else train.zero
    return tuple(range(1, most + 1))


def allowed_schedule(prepared: Prepared, train: Training | None) -> ScheduleWish:
    """The schedule to plan for; where the whole batch has to be there before any backward it is GPipe."""
    wanted: ScheduleWish = train.schedule if train else "auto"
    reason = gpipe_reason(prepared)
    if wanted in ("auto", "gpipe") or not reason:
        return wanted
    warnings.warn(f"Training(schedule={wanted!r}) is ignored: {reason}", stacklevel=4)
    return "gpipe"


def gpipe_reason(prepared: Prepared) -> str:
    """Why no schedule but GPipe is possible; empty where others are."""
    return prepared.tail_reason and (
        f"{prepared.tail_reason}, so that all forwards have to come before the first backward. The "
        "schedule is GPipe."
    )
