# SPDX-License-Identifier: Apache-2.0
"""The ways in which a template is rendered, and what comes out of each: three texts, or errors."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2.nativetypes import NativeEnvironment, NativeTemplate
from jinja2.sandbox import SandboxedEnvironment

from ci.differential.values import ROUNDS, variables
from cuda_progcache.errors import TemplateError
from cuda_progcache.templates import BytecodeCache, Environment, KernelEnvironment, Template

CASE = "case.txt"
"""The file of a template that is rendered from disk."""

Outcome = tuple[Any, ...]
Run = Callable[[Any, int], str]

_WHERE = re.compile(r"\b(?:jinja2|cuda_progcache)(?:\.\w+)*\.(\w+)")
_ADDRESS = re.compile(r"\b0x[0-9a-f]+")


@dataclass(frozen=True)
class Case:
    """A template, and how its environment is set up.

    Parameters
    ----------
    source : str
    options : mapping
        Of the environment.
    kernel : bool
        Whether kernel environments render it, too, which have their own options.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kernel: bool = True


@dataclass(frozen=True)
class Difference:
    """A way that didn't give what stock Jinja2 gave."""

    way: str
    case: Case
    ours: Sequence[Outcome]
    theirs: Sequence[Outcome]

    def __str__(self) -> str:
        head = f"{self.way} {dict(self.case.options)}\n  {self.case.source!r}"
        return f"{head}\n  ours   {self.ours}\n  jinja2 {self.theirs}"


def plain(text: str) -> str:
    """Return a text without what differs between any two processes, and between our classes and Jinja2's."""
    return _ADDRESS.sub("0x", _WHERE.sub(r"\1", text))


def outcomes(make: Callable[[], Any], run: Run, filename: str = "<template>") -> list[Outcome]:
    """Return what the rounds of one template object give."""
    try:
        template = make()
    except jinja2.TemplateSyntaxError as error:
        return [("syntax", type(error).__name__, error.message, error.lineno)]
    except Exception as error:  # noqa: BLE001  (whatever it is, the other has to raise it, too)
        return [("compiler", repr(error))]
    return [_outcome(run, template, number, filename) for number in range(ROUNDS)]


def _outcome(run: Run, template: Any, number: int, filename: str) -> Outcome:
    try:
        return "text", plain(run(template, number))
    except RecursionError:
        return ("recursion",)
    except Exception as error:  # noqa: BLE001  (as above)
        lines = []
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == filename:
                lines.append(traceback.tb_lineno)
            traceback = traceback.tb_next
        return "error", type(error).__name__, plain(str(error)), lines[-1:]


def same(case: Case, ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> bool:
    """Whether outcomes are alike, as far as they have to be."""
    if theirs[0][0] == "compiler":
        return True  # Jinja2's stumbles: over its bookkeeping, a break outside a loop, a constant that raises
    if len(ours) != len(theirs):
        return False
    # Jinja2 has no line for {% with %} and in recursive loops: it names that of another statement.
    unsure = "{% with" in case.source or " recursive " in case.source
    for one, other in zip(ours, theirs, strict=True):
        if one[0] == other[0] == "error" and len(one) == 4:
            if one[1:3] != other[1:3] or not (unsure or not other[3] or one[3] == other[3]):
                return False
        elif one[0] == other[0] == "error" and unsure:  # a kernel's, with line and values in the message
            if _unplaced(one[1]) != _unplaced(other[1]):
                return False
        elif one != other:
            return False
    return True


def _unplaced(message: str) -> str:
    return re.sub(r"^\S+?:\d+: ", "", message).partition(" (")[0]


# Environments like jinja2.Environment


def text(template: Any, number: int) -> str:
    """Render."""
    return str(template.render(variables(number)))


def _generated(template: Any, number: int) -> str:
    return "".join(template.generate(variables(number)))


def _streamed(template: Any, number: int) -> str:
    return "".join(template.render_stream(variables(number)))


def _module(template: Any, number: int) -> str:
    return str(template.make_module(variables(number)))


def _waited(template: Any, number: int) -> str:
    return str(asyncio.run(template.render_async(variables(number))))


def _streamed_async(template: Any, number: int) -> str:
    async def gather() -> str:
        return "".join([run async for run in template.render_stream_async(variables(number))])

    return asyncio.run(gather())


def _native(template: Any, number: int) -> str:
    return repr(template.render(variables(number)))


class OurNativeTemplate(Template, NativeTemplate):
    """A template of ours that renders to Python's values."""

    render = NativeTemplate.render
    render_async = NativeTemplate.render_async


class OurNativeEnvironment(Environment, NativeEnvironment):
    """`NativeEnvironment` with our compiler."""

    template_class = OurNativeTemplate


OurNativeTemplate.environment_class = OurNativeEnvironment


class Sandbox(SandboxedEnvironment):
    """A sandbox that sees to some operators itself."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002  (Jinja2's)
        """Say what it was given."""
        return f"{left}{operator}{right}"

    def call_unop(self, context: Any, operator: str, arg: Any) -> Any:  # noqa: ARG002  (as above)
        """Say what it was given."""
        return f"{operator}{arg}"


class OurSandbox(Sandbox, Environment):
    """The same with our compiler."""


def sandbox(kind: Any, **options: Any) -> Any:
    """Return a sandbox that has some operators intercepted, by its instance alone."""
    made = kind(**options)
    made.intercepted_binops, made.intercepted_unops = frozenset({"**", "-"}), frozenset({"-"})
    return made


class Workplace:
    """A folder with the library, the templates to render, and the caches.

    Parameters
    ----------
    folder : Path
        Empty.
    library : mapping
        Names to texts: what the templates include, import and extend.
    """

    def __init__(self, folder: Path, library: Mapping[str, str]) -> None:
        self.folder = folder
        self.templates = folder / "templates"
        self.templates.mkdir()
        for name, source in library.items():
            (self.templates / name).write_text(source, encoding="utf-8")
        self.renders = 0
        self.ways: set[str] = set()
        self._made: dict[Any, Any] = {}

    def environment(self, kind: Any, label: str, options: Mapping[str, Any]) -> Any:
        """Return an environment over the library; the same again for the same options."""
        key = (kind, label, repr(sorted(options.items(), key=repr)))
        if key not in self._made:
            self._made[key] = kind(loader=jinja2.FileSystemLoader(self.templates), **options)
        return self._made[key]

    def differences(self, case: Case, chosen: Callable[[], bool] = lambda: True) -> Iterator[Difference]:
        """Yield the ways of an environment like Jinja2's in which a template comes out otherwise.

        `chosen` is asked for each group of costly ways whether this template goes through it.
        """
        for way, ours, theirs in self._environment_ways(case, chosen):
            self.renders += ROUNDS
            self.ways.add(way)
            if not same(case, ours, theirs):
                yield Difference(way, case, ours, theirs)

    def _environment_ways(
        self, case: Case, chosen: Callable[[], bool]
    ) -> Iterator[tuple[str, list[Outcome], list[Outcome]]]:
        options = dict(case.options)
        stock = self.environment(jinja2.Environment, "", options)
        ours = self.environment(Environment, "", options)
        (self.templates / CASE).write_text(case.source, encoding="utf-8")

        def made(environment: Any) -> Callable[[], Any]:
            return once(lambda: environment.from_string(case.source))  # one object goes through all ways

        expected, make = outcomes(made(stock), text), made(ours)
        for way, run in (("render", text), ("generate", _generated), ("stream", _streamed), ("module", _module)):
            yield way, outcomes(make, run), expected
        if chosen():
            yield from self._from_disk(options)
        if chosen():
            yield from self._of_other_kinds(case, options)
        if chosen():
            natives = (self.environment(kind, "native", options) for kind in (NativeEnvironment, OurNativeEnvironment))
            expected, found = (outcomes(made(native), _native) for native in natives)
            yield "native", found, expected
        if not chosen():
            return
        options["enable_async"] = True
        stock, ours = (self.environment(kind, "async", options) for kind in (jinja2.Environment, Environment))
        expected, make = outcomes(made(stock), _waited), made(ours)
        yield "async", outcomes(make, _waited), expected
        yield "async stream", outcomes(make, _streamed_async), expected

    def _of_other_kinds(
        self, case: Case, options: dict[str, Any]
    ) -> Iterator[tuple[str, list[Outcome], list[Outcome]]]:
        stock, ours = (self.environment(kind, "", options) for kind in (jinja2.Environment, Environment))
        # Overlays share what their environment has, and differ in an option that the code depends on.
        more: dict[str, Any] = {"autoescape": not options.get("autoescape"), "trim_blocks": True}
        expected, found = (
            outcomes(partial(one.overlay(**more).from_string, case.source), text) for one in (stock, ours)
        )
        yield "overlay", found, expected
        loader = jinja2.FileSystemLoader(self.templates)
        expected = outcomes(partial(sandbox(Sandbox, loader=loader, **options).from_string, case.source), text)
        yield (
            "sandbox",
            outcomes(partial(sandbox(OurSandbox, loader=loader, **options).from_string, case.source), text),
            expected,
        )
        stock = sandbox(Sandbox, loader=loader, **options)
        expected = outcomes(partial(stock.get_template, CASE), text, str(self.templates / CASE))
        for warmth in ("an unguarded one's cache", "its own cache"):
            cache = BytecodeCache(self.folder / "ours")
            made = OurSandbox(loader=loader, bytecode_cache=cache, cache_size=0, **options)
            if warmth == "an unguarded one's cache":
                outcomes(partial(made.get_template, CASE), text)
            made = sandbox(OurSandbox, loader=loader, bytecode_cache=cache, cache_size=0, **options)
            found = outcomes(partial(made.get_template, CASE), text, str(self.templates / CASE))
            yield f"sandbox, {warmth}", found, expected

    def _from_disk(self, options: dict[str, Any]) -> Iterator[tuple[str, list[Outcome], list[Outcome]]]:
        name = CASE
        path = str(self.templates / name)
        theirs = (
            self.folder / f"theirs-{zlib.crc32(repr(sorted(options.items(), key=repr)).encode())}"
        )  # a directory for each set of options: Jinja2 needs that
        stock = jinja2.Environment(loader=jinja2.FileSystemLoader(self.templates), **options)
        expected = outcomes(lambda: stock.get_template(name), text, path)
        caches: dict[str, Callable[[], Any]] = {
            "our cache": lambda: BytecodeCache(self.folder / "ours"),
            "Jinja2's cache": lambda: jinja2.FileSystemBytecodeCache(str(_private(theirs))),
        }
        for label, cache in caches.items():
            for warmth in ("cold", "warm"):
                loader = jinja2.FileSystemLoader(self.templates)
                ours = Environment(loader=loader, bytecode_cache=cache(), cache_size=0, **options)
                found = outcomes(partial(ours.get_template, name), text, path)
                yield f"{label}, {warmth}", found, expected
        stock = jinja2.Environment(
            loader=jinja2.FileSystemLoader(self.templates), bytecode_cache=caches["Jinja2's cache"](), **options
        )
        yield "stock Jinja2 on a cache of ours", outcomes(lambda: stock.get_template(name), text, path), expected

    def process_differences(
        self, cases: Sequence[Case], chosen: Callable[[], bool] = lambda: True
    ) -> Iterator[Difference]:
        """Yield the differences of templates in processes of their own: on a cache that others filled, and patched.

        `chosen` is asked for each template.
        """
        cases = [case for case in cases if case.options.keys() <= {"autoescape", "undefined"} and chosen()]
        cases = [case for case in cases if isinstance(case.options.get("autoescape", False), bool)]
        for number, case in enumerate(cases):
            (self.templates / f"{number}.txt").write_text(case.source, encoding="utf-8")
        expected = [
            outcomes(partial(environment.get_template, f"{number}.txt"), text, str(self.templates / f"{number}.txt"))
            for number, case in enumerate(cases)
            for environment in (self.environment(jinja2.Environment, "", dict(case.options)),)
        ]
        asked = [[bool(case.options.get("autoescape")), "undefined" in case.options] for case in cases]
        kinds = [case.options.get("undefined", jinja2.StrictUndefined) is jinja2.StrictUndefined for case in cases]
        for way in ("environment, process", "environment, another process", "patched, process", "patched, cached"):
            self.ways.add(way)
            for case, ours, theirs, strict in zip(
                cases, self._in_a_process(asked, str(self.folder / "ours"), way.partition(",")[0]), expected, kinds,
                strict=True,
            ):  # fmt: skip
                self.renders += ROUNDS
                if strict and not same(case, ours, theirs):
                    yield Difference(way, case, ours, theirs)

    # Kernel environments

    def kernel_differences(
        self, cases: Sequence[Case], chosen: Callable[[], bool] = lambda: True
    ) -> Iterator[Difference]:
        """Yield the ways of a kernel environment in which templates come out otherwise.

        `chosen` is asked for each template whether it goes through the costly ones.
        """
        cases = [case for case in cases if case.kernel]
        cache = str(self.folder / "kernels")
        stock = stock_like_kernels(KernelEnvironment(self.templates))
        expected = {id(case): kernel_outcomes(partial(stock.from_string, case.source)) for case in cases}
        share = [case for case in cases if chosen()]

        def here(made: KernelEnvironment, cases: list[Case]) -> list[list[Outcome]]:
            return [kernel_outcomes(partial(made.from_string, case.source)) for case in cases]

        def elsewhere(cases: list[Case]) -> list[list[Outcome]]:
            return self._in_a_process([case.source for case in cases], cache, "kernels")

        loops = ["jinja2.ext.loopcontrols"]
        for way, taken, found in (
            ("kernel, cold", cases, here(KernelEnvironment(self.templates, bytecode_cache=cache), cases)),
            ("kernel, warm", share, here(KernelEnvironment(self.templates, bytecode_cache=cache), share)),
            ("kernel, no cache", share, here(KernelEnvironment(self.templates), share)),
            ("kernel, extension", share, here(KernelEnvironment(self.templates, extensions=loops), share)),
            ("kernel, process", cases, elsewhere(cases)),
            ("kernel, another process", share, elsewhere(share)),
        ):
            self.renders += ROUNDS * len(taken)
            self.ways.add(way)
            for case, ours in zip(taken, found, strict=True):
                if not same(case, ours, expected[id(case)]):
                    yield Difference(way, case, ours, expected[id(case)])

    def _in_a_process(self, sources: list[Any], cache: str, kind: str) -> list[list[Outcome]]:
        done = subprocess.run(
            [sys.executable, "-m", "ci.differential.child", str(self.templates), cache, kind],
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        if done.returncode:
            raise RuntimeError(f"the child failed:\n{done.stderr}")
        return [[_tuple(outcome) for outcome in rounds] for rounds in json.loads(done.stdout)]


def _tuple(outcome: list[Any]) -> Outcome:
    return tuple(outcome)


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class StockKernelTemplate:
    """A template of stock Jinja2, whose errors are told as a kernel's."""

    def __init__(self, kernels: KernelEnvironment, template: jinja2.Template, source: str) -> None:
        self._kernels, self._template, self._source = kernels, template, source

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Render."""
        params = dict(*args, **kwargs)
        try:
            return self._template.render(params)
        except Exception as error:  # whatever it is, it has to be the same
            raise self._kernels._error(error, "<string>", params, source=self._source) from error


class StockKernels(jinja2.Environment):
    """Stock Jinja2, set up as kernel environments are."""

    kernels: KernelEnvironment

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a template, whose errors are told as a kernel's."""
        try:
            made = super().from_string(source, *args, **kwargs)
        except Exception as error:
            raise self.kernels._error(error, "<string>", {}, source=source) from error
        return StockKernelTemplate(self.kernels, made, source)


def stock_like_kernels(kernels: KernelEnvironment) -> StockKernels:
    """Return stock Jinja2 with a kernel environment's templates, filters, tests and settings."""
    beneath = kernels.jinja()
    made = StockKernels(
        loader=beneath.digest_loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=[type(extension) for extension in beneath.extensions.values()],
    )
    made.filters.update(beneath.filters)
    made.tests.update(beneath.tests)
    made.globals.update(beneath.globals)
    made.kernels = kernels
    return made


def kernel_outcomes(make: Callable[[], Any]) -> list[Outcome]:
    """Return what the rounds of one kernel template give."""
    try:
        template = make()
    except TemplateError as error:
        if error.line is None:  # a constant that raised in Jinja2's compiler
            return [("compiler", plain(str(error)))]
        return [("syntax", plain(str(error)), error.line)]
    found: list[Outcome] = []
    for number in range(ROUNDS):
        try:
            found.append(("text", plain(template.render(**variables(number)))))
        except TemplateError as error:
            recursion = "RecursionError" in str(error)
            found.append(("recursion",) if recursion else ("error", plain(str(error)), error.line))
    return found
