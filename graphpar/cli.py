"""The command `graphpar`: finds the subcommand, runs it, turns errors into exit codes.

Each subcommand lives in a module of its own that is imported only when it is called, so that commands
that need no torch never load it; others load it when their options are known to make sense. Results go
to stdout, everything else to stderr.

Exit codes: 0 ok, 2 usage or configuration, 3 infeasible, 4 capture failed, 5 run failed, 6 numbers
differ, 130 interrupted; 1, without a word, when the reader of stdout went away.
"""

import contextlib
import importlib
import importlib.metadata
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import click

from graphpar.errors import GraphparError
from graphpar.files import is_full
from graphpar.loading import uncollected

EXIT_USAGE = 2
EXIT_FAILED = 5
EXIT_INTERRUPTED = 130


COMMANDS: dict[str, str] = {
    "demo": "Train a small GPT on unlike local workers.",
    "doctor": "Check that this machine has what graphpar needs.",
    "plan": "Plan a model on a cluster.",
    "show": "Print a plan.",
    "view": "Draw a plan into one file.",
    "rehearse": "Play a plan's steps here, without computing.",
    "explain": "Tell why a plan is as it is.",
    "diff": "Tell what differs between two plans.",
    "what-if": "Ask what other devices or settings would change.",
    "estimate": "Tell what memory a model needs, and on what it fits.",
    "run": "Run a model on a cluster for some steps.",
    "verify": "Compare a parallel run with one device.",
    "calibrate": "Measure this machine for better predictions.",
    "solve": "Solve a partition problem given as a file.",
}
"""Subcommands and their lines in the help; each is `command` of a module of its name."""


@dataclass
class Settings:
    """What the options before the subcommand ask for."""

    debug: bool = False


class LazyGroup(click.Group):
    """A group that imports a subcommand's module when the subcommand is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the subcommands in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand, imported now."""
        if cmd_name not in COMMANDS:
            return None
        with uncollected():
            module = importlib.import_module(f"graphpar.commands.{cmd_name.replace('-', '_')}")
        assert isinstance(module.command, click.Command)
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of subcommands, from the table and without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand the arguments name; an unknown name is answered with the known ones."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}; the commands are {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


def _version() -> str:
    try:
        return importlib.metadata.version("graphpar")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"graphpar {_version()}")
        ctx.exit()


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--debug", is_flag=True, help="Show tracebacks and detailed logs.")
@click.option("-v", "--verbose", is_flag=True, help="Show what is being done.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@click.pass_obj
def graphpar(settings: Settings, debug: bool, verbose: bool) -> None:
    """Turn a PyTorch model and a description of unlike devices into a parallel job."""
    settings.debug = debug
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("graphpar").setLevel(level)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    warnings.formatwarning = _plain_warning
    _open_closed_streams()
    code = run(arguments, Settings())
    if arguments is None and "graphpar.solve_command" in sys.modules:
        # Freeing what a large search held, or waiting for its compiler, would pass a time limit.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _open_closed_streams() -> None:
    """Let what was closed (`>&-`) lead nowhere: the next file opened would else take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number free is the one that is missing.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _plain_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning without the place in our code, which means nothing to a user."""
    return f"warning: {message}\n"


def run(arguments: Sequence[str] | None, settings: Settings) -> int:
    """Run the command line and return its exit code; errors are printed to stderr."""
    try:
        result = graphpar.main(arguments, prog_name="graphpar", obj=settings, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show(sys.stderr)
        return EXIT_USAGE
    except GraphparError as error:
        return _report(f"error: {error}", error.exit_code, settings)
    except ValueError as error:
        return _report(f"error: {error}", EXIT_USAGE, settings)
    except OSError as error:
        if error.filename is None and is_full(error):
            _leave_stdout()
        return _report(f"error: {_told(error)}", EXIT_FAILED, settings)
    except Exception as error:
        hint = "" if settings.debug else "; `graphpar --debug ...` shows where it happened"
        text = f"unexpected error: {type(error).__name__}: {error}{hint}"
        return _report(text, EXIT_FAILED, settings)
    return result if isinstance(result, int) else 0


def _leave_stdout() -> None:
    """Send what is still to be flushed nowhere; the interpreter would fail with it once more."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told(error: OSError) -> str:
    """What the system refused, and of which file; results go to standard output where none is named."""
    where = error.filename if error.filename is not None else "a file or standard output"
    return f"{where}: {error.strerror or error}"


def _report(text: str, code: int, settings: Settings) -> int:
    if settings.debug:
        traceback.print_exc()
    click.echo(text, err=True)
    return code
