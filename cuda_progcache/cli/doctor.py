# SPDX-License-Identifier: Apache-2.0
"""``doctor`` and ``config``: what is installed here, what is wrong with it, and what is set."""

from __future__ import annotations

import os

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.session import Session, common_options

DOCTOR_JSON = """\b
--json: {"ok": bool, "findings": [{"topic", "name", "value", "problem" (empty: none), "advice"}]}
"""


@click.command("doctor", short_help="What is installed here, and what is wrong with it.", epilog=DOCTOR_JSON)
@common_options
@click.pass_obj
def doctor_command(session: Session) -> None:
    """Look at compilers, headers, tools, settings and the cache, and try each compiler. Exit code 1: a problem."""
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


CONFIG_JSON = """\b
--json: {"root": str, "mode": str, "settings": [{"name", "value" (null: not set), "default", "meaning"}]}
"""


@click.command("config", short_help="The settings: what is set, and what each means.", epilog=CONFIG_JSON)
@common_options
@click.pass_obj
def config_command(session: Session) -> None:
    """Show every environment variable that counts, its value here, and what holds without it."""
    from cuda_progcache._util import modes
    from cuda_progcache.service.settings import SETTINGS

    if session.json:
        listed = [{**one._asdict(), "value": os.environ.get(one.name)} for one in SETTINGS]
        output.emit({"root": session.root(), "mode": modes.current(), "settings": listed})
        return
    made = output.table(("variable", "value", "without it", "sets"))
    for one in SETTINGS:
        made.add_row(one.name, output.text(os.environ.get(one.name, "-")), one.default, one.meaning)
    output.show(made)
