"""`graphpar what-if MODEL --cluster FILE ...`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from graphpar.cluster import Cluster
from graphpar.commands.options import (
    Number,
    cluster_option,
    gap_option,
    input_options,
    model_argument,
    tensor_option,
)
from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.errors import ClusterError
from graphpar.files import check_writable, write_whole
from graphpar.loading import uncollected
from graphpar.partition.types import TensorWidth
from graphpar.scenarios.asked import as_scenarios, instance_types
from graphpar.scenarios.mixes import Objective
from graphpar.scenarios.plots import check_plot
from graphpar.scenarios.sweeps import as_sweeps, scenarios_of
from graphpar.scenarios.types import Scenario
from graphpar.training import Training

if TYPE_CHECKING:
    from graphpar.scenarios.api import Study
    from graphpar.scenarios.study import Progress

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _several(name: str, metavar: str, text: str) -> Callable[[_Command], _Command]:
    return click.option(name, multiple=True, metavar=metavar, help=text)


@click.command(name="what-if")
@model_argument
@cluster_option
@_several("--scenario", "[NAME:]CHANGES", "Changes made together, separated by `;`.")
@_several("--set", "PATH=VALUE", "Set one thing, such as network.bytes_per_s=25e9 or batch=64.")
@_several("--drop", "NAME", "Without a device, a node, or a kind.")
@_several("--down", "NAME", "The same, as a failure.")
@_several("--add", "[N] KIND [to NODE]", "With more devices or cloud instances.")
@_several("--replace", "NAME=KIND", "With another kind in place of a device, node or kind.")
@_several("--config", "tp=A pp=B dp=C", "A hand-made configuration.")
@_several("--sweep", "PATH=V1,V2,...", "Every value; given twice, every combination.")
@click.option("--budget", type=Number(min=0, min_open=True), help="Dollars per hour to spend.")
@click.option("--instances", default="", help="Cloud instance types for the budget, by commas.")
@click.option(
    "--objective",
    default="time",
    show_default=True,
    type=click.Choice(get_args(Objective)),
    help="What the budget's cluster is best in: the step, or dollars per sample.",
)
@_several("--price", "NODE=USD", "Dollars per hour of a node.")
@click.option("--worth", is_flag=True, help="What a little more of everything is worth.")
@click.option("--leave-out", is_flag=True, help="Plan without each device.")
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False), help="Write the table here.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False), help="Draw into a PNG or SVG.")
@click.option("--processes", type=click.IntRange(min=1), help="How many plan at once.")
@click.option("--cache/--no-cache", default=True, help="Keep answers, and use kept ones.")
@click.option(
    "--time-limit",
    "time_limit_s",
    type=Number(min=0, min_open=True),
    help="Seconds to search for each scenario's plan, and for the whole budget.  [default: all scenarios "
    "in about 20 s, a budget in 30]",
)
@gap_option
@click.option("--precision", default="float32", show_default=True, help="Number format of the baseline.")
@tensor_option
@input_options
@json_option
def command(
    model: str,
    cluster_file: str,
    scenario: Sequence[str],
    sweep: Sequence[str],
    budget: float | None,
    instances: str,
    objective: Objective,
    price: Sequence[str],
    worth: bool,
    leave_out: bool,
    csv_file: str | None,
    plot_file: str | None,
    processes: int | None,
    cache: bool,
    batch_size: int,
    seq_len: int,
    train: bool,
    time_limit_s: float | None,
    gap: float,
    precision: str,
    tensor: TensorWidth,
    as_json: bool,
    **single: Sequence[str],
) -> int:
    """Ask what other devices or settings would change.

    Each scenario is planned anew. Every --set, --drop, --down, --add, --replace and --config is a
    question of its own; --scenario makes several changes at once.
    """
    asked = (*_scenarios(scenario), *_single(single))
    types = instance_types(instances)
    if types and budget is None:
        raise click.BadParameter(
            "instance types are for a budget; add --budget", param_hint="--instances"
        )
    if objective != "time" and budget is None:
        raise click.BadParameter("it is what a budget buys; add --budget", param_hint="--objective")
    _check_files(csv_file, plot_file)
    with stdout_kept_clean():
        cluster = Cluster.load(cluster_file)
        with uncollected():
            from graphpar.commands.training import default_training
            from graphpar.scenarios.api import baseline_setting, check_scenarios
            from graphpar.scenarios.budget import affordable_mixes
        training = default_training() if train else None
        money = _prices(price)
        baseline = baseline_setting(
            cluster, batch_size, training, precision=precision, tensor=tensor, prices=money
        )
        if budget is not None:
            affordable_mixes(budget, types, objective)
        check_scenarios(baseline, (*scenarios_of(as_sweeps(sweep)), *asked))
        study = _study(
            model,
            cluster,
            asked,
            sweep=sweep,
            budget_usd_per_h=budget,
            instances=types,
            objective=objective,
            prices=money,
            worth=worth,
            leave_out=leave_out,
            processes=processes,
            cache=cache,
            sizes=(batch_size, seq_len),
            train=training,
            time_limit_s=time_limit_s,
            gap=gap,
            precision=precision,
            tensor=tensor,
        )
    if as_json:
        print_json(study.to_dict())
    else:
        click.echo(str(study))
    _write(study, csv_file, plot_file)
    return _told_unanswered(study)


def _study(
    spec: str,
    cluster: Cluster,
    scenarios: Sequence[Scenario],
    *,
    sizes: tuple[int, int],
    train: Training | None,
    **options: Any,
) -> "Study":
    from graphpar.model_spec import load_model
    from graphpar.scenarios.api import what_if

    batch_size, seq_len = sizes
    how = {"train": train is not None, "weights": False}
    loaded = load_model(spec, batch_size=batch_size, seq_len=seq_len, **how)

    def inputs(batch: int, length: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
        other = load_model(spec, batch_size=batch, seq_len=length, **how)
        return other.args, other.kwargs

    with _progress() as progress:
        return what_if(
            loaded.model,
            cluster,
            scenarios,
            loaded.args,
            loaded.kwargs,
            train=train,
            inputs=inputs,
            progress=progress,
            **options,
        )


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar on stderr, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("planning scenarios", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _scenarios(texts: Sequence[str]) -> Iterator[Scenario]:
    for text in texts:
        name, colon, changes = text.partition(":")
        yield from as_scenarios({name.strip(): changes} if colon else [text])


def _single(options: Mapping[str, Sequence[str]]) -> Iterator[Scenario]:
    """One scenario per option given, in the words of changes."""
    for verb in ("set", "drop", "down", "add"):
        for text in options[verb]:
            yield Scenario("", (f"{verb} {text}",))
    for text in options["replace"]:
        name, sign, kind = text.partition("=")
        if not sign:
            raise click.BadParameter(f"{text!r} is not NAME=KIND", param_hint="--replace")
        yield Scenario("", (f"replace {name} with {kind}",))
    for text in options["config"]:
        yield Scenario("", (text.replace(",", " "),))


def _prices(texts: Sequence[str]) -> dict[str, float]:
    prices: dict[str, float] = {}
    for text in texts:
        node, sign, value = text.partition("=")
        try:
            usd_per_h = float(value)
        except ValueError:
            sign = ""
        if not sign:
            raise click.BadParameter(f"{text!r} is not NODE=DOLLARS", param_hint="--price")
        if node in prices:
            raise click.BadParameter(f"two prices of {node!r}; leave one out", param_hint="--price")
        prices[node] = usd_per_h
    return prices


def _check_files(csv_file: str | None, plot_file: str | None) -> None:
    """Refuse files that could not be written, before anything is planned."""
    if csv_file is not None:
        check_writable(csv_file)
    if plot_file is not None:
        check_plot(plot_file)


def _told_unanswered(study: "Study") -> int:
    """The exit code, after saying which scenarios turned out to make no sense."""
    wrong = [a for a in study.answers if a.status == "invalid"]
    for answer in wrong:
        click.echo(f"error: scenario {answer.title!r}: {answer.problem}", err=True)
    return NO_SENSE if wrong else 0


NO_SENSE = ClusterError.exit_code
"""Exit code where a scenario has no answer, for it asks for what there is not."""


def _write(study: "Study", csv_file: str | None, plot_file: str | None) -> None:
    if csv_file is not None:
        write_whole(Path(csv_file), study.to_csv().encode())
        click.echo(f"table written to {csv_file}", err=True)
    if plot_file is not None:
        click.echo(f"picture written to {study.plot(plot_file)}", err=True)
