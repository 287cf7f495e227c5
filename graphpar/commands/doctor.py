"""`graphpar doctor`."""

import click

from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.doctor import examine


@click.command(name="doctor")
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Check that this machine has what graphpar needs.

    The exit code is 2 when something necessary is missing; what is only good to have is a warning.
    """
    with stdout_kept_clean(as_json):
        findings = examine()
    failed = any(f.state == "missing" for f in findings)
    if as_json:
        print_json({"ok": not failed, "checks": findings})
    else:
        width = max(len(f.name) for f in findings)
        for finding in findings:
            mark = {"ok": "ok  ", "warning": "warn", "missing": "FAIL"}[finding.state]
            click.echo(f"{mark} {finding.name:<{width}}  {finding.text}")
            if finding.remedy:
                click.echo(f"     {'':<{width}}  try: {finding.remedy}")
    if failed:
        context.exit(2)
