"""Options that several commands share: which model, which cluster, how to plan."""

import math
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from graphpar.partition.settings import ScheduleWish
from graphpar.plans.plan import Plan

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A number of a range; click's own takes NaN, which is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


MOST = 2**31 - 1
"""The largest size of a dimension that is taken; beyond it torch fails with a page of frames."""

model_argument = click.argument("model")
cluster_option = click.option(
    "--cluster",
    "cluster_file",
    required=True,
    type=click.Path(dir_okay=False),
    help="The devices to use, as a YAML file.",
)
plan_option = click.option(
    "--plan",
    "plan_file",
    type=click.Path(dir_okay=False),
    help="Use this plan instead of making one.",
)
steps_option = click.option(
    "--steps",
    default=5,
    show_default=True,
    type=click.IntRange(min=1),
    help="Steps to run.",
)


def load_plan(path: str | None, *, train: bool) -> Plan | None:
    """The plan of `--plan`, which must be for what `--train` says; None without one."""
    if path is None:
        return None
    plan = Plan.load(path)
    plan.check_mode(training=train)
    return plan


def input_options(command: _Command) -> _Command:
    """The size of the example inputs, and whether they are for training."""
    for option in (
        click.option("--train/--inference", default=False, help="Training steps, or forwards only."),
        click.option(
            "--seq-len",
            default=128,
            show_default=True,
            type=click.IntRange(min=1, max=MOST),
            help="Tokens per sample, for models that take tokens.",
        ),
        click.option(
            "--batch-size",
            default=8,
            show_default=True,
            type=click.IntRange(min=1, max=MOST),
            help="Samples per global batch.",
        ),
    ):
        command = option(command)
    return command


def _width(ctx: click.Context, param: click.Parameter, value: str) -> int | str | tuple[int, ...]:
    if value == "auto":
        return value
    try:
        widths = tuple(map(int, value.split("x")))
    except ValueError:
        widths = ()
    if len(widths) not in (1, 2):
        raise click.BadParameter(f"{value!r} is neither a number nor auto, nor two numbers as 2x4")
    if min(widths) < len(widths):
        raise click.BadParameter(f"{min(widths)} is not in the range x>={len(widths)}")
    return widths if len(widths) == 2 else widths[0]


tensor_option = click.option(
    "--tensor",
    default="1",
    show_default=True,
    metavar="N|AxB|auto",
    callback=_width,
    help="Most devices of a node that may share every layer of a stage; AxB along two axes; auto: any.",
)


gap_option = click.option(
    "--gap",
    default=0.01,
    show_default=True,
    type=Number(min=0, max=1, max_open=True),
    help="Stop when a plan is proven this close to the best.",
)


def planning_options(command: _Command) -> _Command:
    """How the plan is made; the command takes these as `**planning`, named as in `graphpar.compile`."""
    for option in (
        click.option(
            "--precision",
            default="float32",
            show_default=True,
            metavar="FORMAT",
            help="Number format to compute in: float32, bfloat16, float16, or auto.",
        ),
        click.option(
            "--precision-budget",
            default=1e-2,
            show_default=True,
            type=Number(min=0),
            help="Largest relative error of result and gradient under --precision auto.",
        ),
        tensor_option,
        click.option(
            "--schedule",
            default="auto",
            show_default=True,
            type=click.Choice(get_args(ScheduleWish)),
            help="Order of work in training; auto takes the one with the shortest step.",
        ),
        click.option(
            "--zero",
            default=0,
            show_default=True,
            type=click.IntRange(0, 2),
            help="Most that replicas may divide (ZeRO): 1 optimiser state, 2 gradients too.",
        ),
        gap_option,
        click.option(
            "--time-limit",
            "time_limit_s",
            default=60.0,
            show_default=True,
            type=Number(min=0, min_open=True),
            help="Seconds to search for the plan, once the model is captured and priced.",
        ),
    ):
        command = option(command)
    return command
