"""Optimisers of ranks that hold unlike parameters, with the settings of one optimiser of them all.

The user's function is called on every rank with what that rank holds. Where it looks at a parameter's
place in the list, or at how many there are, ranks would train otherwise than one device does, and a
function that takes `model.parameters()` in place of its argument would train nothing. So the driver calls
it once with all parameters, without their values, and every rank compares.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from graphpar.optimizer_probe import OptimizerFactory, refuse_foreign_parameters
from graphpar.runtime.plain import Plain, plain
from graphpar.training import Training

_log = logging.getLogger("graphpar.job")
SchedulerFactory = Callable[[Optimizer], LRScheduler]
_IMPLEMENTATION = frozenset({"params", "param_names", "foreach", "fused"})
"""Entries of a parameter group that change no number."""


@dataclass(frozen=True)
class Recipe:
    """What a rank makes its optimiser and its scheduler with: the user's functions, as they travel."""

    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None = None

    @classmethod
    def of(cls, training: Training | None) -> "Recipe | None":
        """Of a training job; None for inference."""
        return cls(training.optimizer, training.scheduler) if training is not None else None

    def made(
        self, parameters: Mapping[str, nn.Parameter], own: Mapping[str, Mapping[str, Plain]]
    ) -> Optimizer:
        """The optimiser of some parameters by name.

        Args:
            parameters: What it is to train.
            own: Settings by name, of parameters held here and elsewhere: every rank gets the same groups.

        Raises:
            ValueError: It holds other parameters than those.
        """
        given = list(parameters.values())
        made = self.optimizer(_groups(parameters, own) if own else given)  # type: ignore[arg-type]
        if not isinstance(made, Optimizer):
            raise ValueError(f"Training(optimizer=...) must make an optimiser, not {made!r}.")
        refuse_foreign_parameters(made.param_groups, given)
        return made

    def scheduled(self, optimizer: Optimizer, steps: int = 0) -> LRScheduler | None:
        """Its scheduler after so many steps; None where there is none.

        Raises:
            ValueError: The scheduler does not follow from the number of steps.
        """
        if self.scheduler is None:
            return None
        made = self.scheduler(optimizer)
        if isinstance(made, ReduceLROnPlateau) or not isinstance(made, LRScheduler):
            raise ValueError(
                f"Training(scheduler=...) made a {type(made).__name__}; it must be a scheduler of "
                "torch.optim.lr_scheduler whose rates follow from the number of steps, such as LambdaLR."
            )
        with warnings.catch_warnings():
            # Torch takes a scheduler that steps ahead of its optimiser for a mistake.
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(steps):
                made.step()
        return made


def _groups(
    parameters: Mapping[str, nn.Parameter], own: Mapping[str, Mapping[str, Plain]]
) -> list[dict[str, Any]]:
    """Parameters with equal settings together; groups that are empty here stand, too."""
    # Parameters without settings come first, on ranks that hold none of them, too.
    texts = {_text(settings): settings for settings in sorted(own.values(), key=bool)}
    groups: dict[str, dict[str, Any]] = {
        text: {"params": [], **_unfrozen(settings)} for text, settings in texts.items()
    }
    for name, parameter in parameters.items():
        groups[_text(own[name])]["params"].append(parameter)
    return list(groups.values())


def _unfrozen(settings: Mapping[str, Plain]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _text(settings: Mapping[str, Plain]) -> str:
    return json.dumps(settings, sort_keys=True)


def settings_in(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """For each parameter the settings that an optimiser has for it, as text; empty where it has none."""
    found = dict.fromkeys(parameters, "")
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        text = _text(plain({k: v for k, v in group.items() if k not in _IMPLEMENTATION}))
        found.update({names[id(p)]: text for p in group["params"] if id(p) in names})
    return found


@dataclass(frozen=True)
class Intended:
    """What one optimiser of all parameters would do.

    Attributes:
        own: Settings that the user gave by name.
        settings: For each parameter all its settings, as text; empty for one that is left out. Nothing
            where the optimiser cannot be made without values.
    """

    own: Mapping[str, Mapping[str, Plain]]
    settings: Mapping[str, str]

    @classmethod
    def of(
        cls, training: Training, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype]
    ) -> "Intended":
        """Of all trained parameters by name.

        Raises:
            ValueError: The optimiser is not made of what it is given, or a setting is none.
        """
        if not shapes:
            raise ValueError(
                "There is nothing to train: the loss depends on no parameter with requires_grad=True. "
                "Unfreeze some, or compile without train=."
            )
        own = _given(training, {n: _empty(s, dtypes[n], "meta") for n, s in shapes.items()})
        recipe = Recipe(training.optimizer, training.scheduler)
        for device in ("meta", "cpu"):  # fused optimisers want a real device
            parameters = {n: _empty(shape, dtypes[n], device) for n, shape in shapes.items()}
            try:
                made = recipe.made(parameters, own)
            except ValueError:
                raise
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            settings = settings_in(made, parameters)
            recipe.scheduled(made)
            if not any(settings.values()):
                raise ValueError(
                    "Training(optimizer=...) left out all of the parameters it was given: nothing would "
                    "be trained. Take them from its argument: lambda p: torch.optim.AdamW(p, lr=1e-3)."
                )
            return cls(own, settings)
        _log.warning(
            "This optimiser cannot be made without values (%s): whether every rank gives its parameters "
            "the settings that one optimiser of all of them would is not checked.",
            failure,
        )
        return cls(own, {})

    def part(self, names: Iterable[str]) -> tuple[dict[str, dict[str, Plain]], dict[str, str]]:
        """Settings given by name, which all ranks get, and all settings of some parameters."""
        return {n: dict(s) for n, s in self.own.items()}, {
            name: self.settings[name] for name in names if name in self.settings
        }


def _empty(shape: Sequence[int], dtype: torch.dtype, device: str) -> nn.Parameter:
    """A parameter that takes no memory."""
    return nn.Parameter(torch.empty((), dtype=dtype, device=device).expand(tuple(shape)))


def _given(training: Training, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Plain]]:
    """What `Training(settings=)` says of each parameter; nothing where it says nothing of any."""
    found: dict[str, dict[str, Plain]] = {}
    for name, parameter in parameters.items():
        given = training.settings(name, parameter) if training.settings is not None else None
        if given is None:
            given = {}
        if not isinstance(given, Mapping) or plain(given).keys() != given.keys():
            raise ValueError(
                f"Training(settings=...) gave {given!r} for {name}; it must give a dict of plain "
                'settings, such as {"lr": 1e-4}, or nothing.'
            )
        found[name] = plain(given)
    return found if any(found.values()) else {}


def made_as_intended(
    recipe: Recipe,
    parameters: Mapping[str, nn.Parameter],
    own: Mapping[str, Mapping[str, Plain]],
    intended: Mapping[str, str],
) -> Optimizer | None:
    """A rank's optimiser of its parameters; None where it has none to train.

    Raises:
        ValueError: It treats a parameter otherwise than one optimiser of all parameters would.
    """
    if not parameters or (intended and not any(intended.get(name) for name in parameters)):
        return None
    made = recipe.made(parameters, own)
    for name, text in settings_in(made, parameters).items():
        if name in intended and text != intended[name]:
            raise ValueError(
                f"Training(optimizer=...) treats {name} otherwise here, where there are "
                f"{len(parameters)} parameters, than among all parameters of the model: "
                f"{_difference(text, intended[name])}. It must not decide by place or number; "
                "decide by the parameter (p.ndim), or by name in Training(settings=...)."
            )
    return made


def _difference(here: str, there: str) -> str:
    """
    >>> _difference('{"lr": 0.5, "eps": 1}', '{"lr": 0.1, "eps": 1}')
    'lr 0.5 instead of 0.1'
    """
    if not here or not there:
        return "left out" if there else "trained, but left out there"
    has, wants = json.loads(here), json.loads(there)
    return ", ".join(
        f"{key} {has.get(key)} instead of {wants.get(key)}"
        for key in {**has, **wants}
        if has.get(key) != wants.get(key)
    )


def on_one_device(
    training: Training, parameters: Mapping[str, nn.Parameter]
) -> tuple[Optimizer, LRScheduler | None]:
    """Optimiser and scheduler of all parameters by name, as one device would have them."""
    recipe = Recipe(training.optimizer, training.scheduler)
    optimizer = recipe.made(parameters, _given(training, parameters))
    return optimizer, recipe.scheduled(optimizer)
