# SPDX-License-Identifier: Apache-2.0
"""``doctor`` and ``config``: the installation, its problems, and the settings."""

from __future__ import annotations

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.session import Session, common_options
from cuda_progcache.errors import ConfigError

DOCTOR_JSON = """
--json: {"ok": bool, "findings": [{"topic", "name", "value", "problem" (empty: none), "advice"}]}
"""


@click.command("doctor", short_help="Check the installation, the settings and the cache.", epilog=DOCTOR_JSON)
@common_options
@click.pass_obj
def doctor_command(session: Session) -> None:
    """Check compilers, headers, tools, settings and the cache, and try each compiler.

    Exit code 1: there is a problem.
    """
    from cuda_progcache.service.doctor import examine

    found = examine(session.cache_dir)
    problems = [one for one in found if one.problem]
    if session.json:
        output.emit({"ok": not problems, "findings": [one._asdict() for one in found]})
    else:
        width = max(len(one.name) for one in found)
        topic = None
        for one in found:
            if one.topic != topic:
                topic = one.topic
                output.line(click.style(topic, bold=True))
            mark = click.style("!", fg="red", bold=True) if one.problem else " "
            output.line(f"{mark} {one.name:<{width}}  {output.printable(one.value)}".rstrip())
            if one.problem:
                output.line(click.style(f"    {output.printable(one.problem)}", fg="red"))
            if one.advice:
                output.line(f"    {output.printable(one.advice)}")
        output.line(output.plural(len(problems), "problem") if problems else "no problems")
    if problems:
        click.get_current_context().exit(1)


CONFIG_JSON = """
--json: {"root": str, "mode": str, "settings": [{"name", "value" (null: not set), "source" ("environment" or
"default"), "default", "meaning"}], "tiers": {"source": str (a variable, or the path of a file; empty: no tiers),
"problem": str (empty: none), "tiers": [{"url", "mode", "trust", "keys", "max_bytes", "connect_timeout", "timeout",
"write_timeout", and any other options that are set; for a secret, its source}]}}
"""


@click.command("config", short_help="Show the settings: their values, sources and meanings.", epilog=CONFIG_JSON)
@common_options
@click.pass_obj
def config_command(session: Session) -> None:
    """Show the value, source, default and meaning of every setting.

    For a secret, only its source is shown. Exit code 2: the configuration of the tiers is invalid.
    """
    from cuda_progcache._util import modes
    from cuda_progcache.service.settings import SETTINGS, value_of
    from cuda_progcache.store.tiers.configuration import Configured, configured

    settings = [
        {
            **one._asdict(),
            "value": (value := value_of(one.name)),
            "source": "default" if value is None else "environment",
        }
        for one in SETTINGS
    ]
    tiers, problem = Configured((), ""), ""
    try:
        tiers = configured()
    except ConfigError as error:
        problem = str(error)
    if session.json:
        told = {"source": tiers.source, "problem": problem, "tiers": [tier.shown() for tier in tiers.tiers]}
        output.emit({"root": session.root(), "mode": modes.current(), "settings": settings, "tiers": told})
    else:
        made = output.table(("variable", "value", "default", "meaning"))
        for one in settings:
            made.add_row(one["name"], output.text(one["value"] or "-"), one["default"], one["meaning"])
        output.show(made)
        for tier in tiers.tiers:
            options = tier.shown()
            url = options.pop("url")
            output.line(f"tier {output.printable(url)}, from {output.printable(tiers.source)}")
            output.line("  " + ", ".join(f"{name} {_option(value)}" for name, value in options.items() if value != []))
        if problem:
            output.fail_line(problem)
    if problem:
        click.get_current_context().exit(2)


def _option(value: object) -> str:
    return output.printable(" ".join(value) if isinstance(value, list) else str(value))
