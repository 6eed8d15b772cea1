# SPDX-License-Identifier: Apache-2.0
"""``render`` and ``kernels``: commands on the kernel library that compile nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.completion import kernels
from cuda_progcache.cli.session import (
    OutputFile,
    Session,
    common_options,
    library_at,
    manifest_option,
    parameter_option,
    parse_parameters,
)

if TYPE_CHECKING:
    from cuda_progcache.service.manifest import KernelLibrary, KernelSpec, Parameter

RENDER_JSON = """
--json: {"kernel", "parameters": {name: value}, "modules": [{"name", "template", "source"}], "entry_points": [str],
"name_expressions": [str], "templates": {file: SHA-256}}

With --list-parameters: {"kernel", "parameters": [{"name", "type", "values", "default", "min", "max", "description"}]}
"""


@click.command("render", short_help="Print the source rendered from a kernel template.", epilog=RENDER_JSON)
@click.argument("kernel", shell_complete=kernels)
@parameter_option
@click.option("--module", metavar="NAME", help="Print only this module of a kernel that is linked from several.")
@click.option("--list-parameters", is_flag=True, help="List the kernel's parameters instead.")
@click.option("-o", "--output", "target", type=OutputFile(), metavar="FILE", help="Write to this file.")
@manifest_option
@common_options
@click.pass_obj
def render_command(
    session: Session,
    kernel: str,
    parameters: tuple[str, ...],
    module: str | None,
    *,
    list_parameters: bool,
    target: Path | None,
    manifest: Path | None,
) -> None:
    """Print the source of KERNEL as it would be compiled."""
    library = library_at(manifest)
    spec = library[kernel]
    if list_parameters:
        if session.json:
            output.emit({"kernel": spec.name, "parameters": [_parameter_json(p) for p in spec.parameters.values()]})
        else:
            _print_parameters(spec)
        return
    rendered = library.render(kernel, **parse_parameters(library, kernel, parameters))
    modules = [m for m in rendered.modules if module in (None, m.name)]
    if not modules:
        names = ", ".join(m.name for m in rendered.modules)
        raise click.BadParameter(f"{kernel} has no module {module!r}; it has {names}", param_hint="--module")
    if session.json:
        output.emit(
            {
                "kernel": spec.name,
                "parameters": rendered.params,
                "modules": [{"name": m.name, "template": m.template, "source": m.source} for m in modules],
                "entry_points": rendered.entry_points,
                "name_expressions": rendered.name_expressions,
                "templates": rendered.template_digests,
            }
        )
    elif target is not None:
        if len(modules) > 1:
            names = ", ".join(m.name for m in modules)
            raise click.UsageError(f"{kernel} has {len(modules)} modules ({names}): with -o, choose one with --module")
        target.write_text(modules[0].source, encoding="utf-8")
    elif len(modules) == 1:
        output.write(_ended(modules[0].source))
    else:
        mark = ";" if spec.code_type == "nvvm" else "//"
        for each in modules:
            output.write(f"{mark} ==== module {each.name}, from {each.template}\n" + _ended(each.source))


def _ended(source: str) -> str:
    return source if source.endswith("\n") else source + "\n"


KERNELS_JSON = """
--json: {"kernels": [{"name", "description", "code_type", "templates", "min_arch", "variants": [{parameter: value}],
"parameters": [{"name", "type", "values", "default", "min", "max", "description"}]}]}

With --check: {"problems": [str]}
"""


@click.command("kernels", short_help="List the library's kernels and their parameters.", epilog=KERNELS_JSON)
@click.argument("names", nargs=-1, metavar="[KERNEL]...", shell_complete=kernels)
@click.option(
    "--check", is_flag=True, help="Check the manifest and the templates for mistakes; exit with 1 if there are any."
)
@manifest_option
@common_options
@click.pass_obj
def kernels_command(session: Session, names: tuple[str, ...], *, check: bool, manifest: Path | None) -> None:
    """List the library's kernels or, given names, the parameters of these kernels."""
    library = library_at(manifest)
    if check:
        _check(session, library, names)
        return
    specs = [library[name] for name in names or library.names]
    if session.json:
        output.emit({"kernels": [_kernel_json(spec) for spec in specs]})
    elif names:
        for number, spec in enumerate(specs):
            if number:
                click.echo()
            _print_parameters(spec)
    else:
        made = output.table(("kernel", "parameters", "description"))
        for spec in specs:
            made.add_row(
                output.text(spec.name, "bold"),
                output.text(", ".join(spec.parameters) or "-"),
                output.text(spec.description),
            )
        output.show(made)


def _check(session: Session, library: KernelLibrary, names: tuple[str, ...]) -> None:
    """Print the mistakes in a library, or in some of its kernels."""
    chosen = {library[name].name for name in names}
    problems = [line for line in library.check() if not chosen or line.partition(":")[0] in chosen]
    if session.json:
        output.emit({"problems": problems})
    else:
        for line in problems:
            output.write(f"{line}\n")
        if not problems:
            output.show(f"{library.manifest}: {len(chosen) or len(library)} kernels, no mistakes")
    if problems:
        raise SystemExit(1)


def _kernel_json(spec: KernelSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "description": spec.description,
        "code_type": spec.code_type,
        "templates": list(spec.templates),
        "min_arch": spec.min_arch,
        "variants": [dict(variant) for variant in spec.variants],
        "parameters": [_parameter_json(p) for p in spec.parameters.values()],
    }


def _parameter_json(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "type": parameter.type,
        "values": None if parameter.values is None else list(parameter.values),
        "default": parameter.default,
        "min": parameter.min,
        "max": parameter.max,
        "description": parameter.description,
    }


def _range(parameter: Parameter) -> str:
    """Format the values that a parameter accepts: its list, its range, or ``any``."""
    if parameter.values:
        return " | ".join(str(value) for value in parameter.values)
    if parameter.min is None and parameter.max is None:
        return "any"
    low = "" if parameter.min is None else str(parameter.min)
    high = "" if parameter.max is None else str(parameter.max)
    return f"{low} .. {high}"


def _print_parameters(spec: KernelSpec) -> None:
    output.show(output.text(spec.name, "bold") + output.text(f"  {spec.description}"))
    if not spec.parameters:
        output.show("no parameters")
        return
    made = output.table(("parameter", "type", "default", "values", "description"))
    for each in spec.parameters.values():
        made.add_row(
            output.text(each.name),
            each.type,
            output.text(str(each.default)),
            output.text(_range(each)),
            output.text(each.description),
        )
    output.show(made)
