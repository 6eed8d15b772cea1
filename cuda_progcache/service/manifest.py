# SPDX-License-Identifier: Apache-2.0
"""Kernel libraries: folders of templates with a ``manifest.toml``.

The manifest is TOML with ``format = 1``. Each ``[kernels.NAME]`` table has the fields of `KernelSpec`; ``template`` may
replace ``templates`` for a single file. The tables in ``[kernels.NAME.parameters]`` have the fields of `Parameter`.
"""

from __future__ import annotations

import marshal
import os
import time
from collections.abc import Iterator, Mapping

from cuda_progcache._util import modes
from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import dataclass, field, replace
from cuda_progcache._util.suggest import did_you_mean
from cuda_progcache.errors import KernelNotFoundError, ManifestError, ParameterError, StoreError, TemplateError
from cuda_progcache.events import Event, emit, wanted
from cuda_progcache.service.kernel_spec import (
    Constraint,
    KernelSpec,
    Launch,
    Parameter,
)
from cuda_progcache.templates.environment import KernelEnvironment, KernelTemplate, expression_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from cuda_progcache.service.unpacked import Resource
    from cuda_progcache.templates.bytecode_cache import BytecodeCache
    from cuda_progcache.templates.source_map import SourceMap

__all__ = ["Constraint", "KernelLibrary", "KernelSpec", "Launch", "Parameter", "RenderedKernel", "RenderedModule"]


@dataclass(frozen=True)
class RenderedModule:
    """The source of one module of a kernel.

    Parameters
    ----------
    name : str
        The kernel's name; if the kernel has several modules, the template's name without suffix.
    source : str
        The source that is compiled.
    template : str
        The template file, relative to the library.
    template_digests : dict
        ``{template file: SHA-256 of it}``, for the template and the templates it includes.
    """

    name: str
    source: str
    template: str
    template_digests: Mapping[str, str]
    _environment: KernelEnvironment = field(repr=False, compare=False)
    _params: Mapping[str, Any] = field(repr=False, compare=False)

    def source_map(self) -> SourceMap:
        """Return the source map of `source`: the template line of each line. This renders the template again.

        The map is empty and has a reason if it can't be made, for example because the template was edited since.
        """
        from cuda_progcache.templates.source_map import SourceMap

        try:
            found = self._environment.source_map(self.template, **self._params)
        except TemplateError as error:
            return SourceMap(self.source, reason=f"the template changed since it was rendered: {error}")
        if found.text != self.source:
            return SourceMap(self.source, reason=f"{self.template} changed since it was rendered")
        return found


@dataclass(frozen=True)
class RenderedKernel:
    """A kernel's sources for one set of parameters.

    Parameters
    ----------
    spec : KernelSpec
        The kernel.
    params : dict
        All parameters, including defaults.
    modules : tuple of RenderedModule
        One module, or several to link.
    entry_points, name_expressions : tuple of str
        The names for these parameters.
    template_digests : dict
        ``{template file: SHA-256 of it}``, for all templates and the templates they include.
    started, seconds : float
        When rendering started (Unix time), and how long it took.
    """

    spec: KernelSpec
    params: dict[str, Any]
    modules: tuple[RenderedModule, ...]
    entry_points: tuple[str, ...]
    name_expressions: tuple[str, ...]
    template_digests: dict[str, str]
    started: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)


class KernelLibrary:
    """The kernels of a manifest, by name.

    Parameters
    ----------
    path : path or importlib.resources.abc.Traversable, optional
        A folder with a ``manifest.toml``, or that file. A folder in an archive, as ``importlib.resources.files``
        returns it, is unpacked while the process runs. None: the library that comes with the package.
    bytecode_cache : BytecodeCache, path, "default" or None
        The cache of compiled templates. The default is a directory of the user (``CUDA_PROGCACHE_TEMPLATES``, ``off``
        for none). If that directory can't be used, or with None, each process compiles the templates.
    generated_from : bool
        Begin each source with a comment that names its template and digest. The comment becomes part of the key.
    line_directives : bool
        Make the compiler, ``-lineinfo`` and profilers report the lines of C++ templates; see `KernelEnvironment`.
    options : mapping, optional
        Compiler options for all kernels, such as ``{"lineinfo": True}``; the manifest's options override them.
    mode : {"rw", "ro", "off", "frozen"}, optional
        How a directory of compiled templates is used; None: the mode in ``CUDA_PROGCACHE``.

    Attributes
    ----------
    environment : KernelEnvironment
        The environment of the library's templates.

    Raises
    ------
    ManifestError
        If the manifest doesn't exist or is invalid; the message names file, kernel and field.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Resource | None = None,
        *,
        bytecode_cache: BytecodeCache | str | os.PathLike[str] | None = "default",
        generated_from: bool = False,
        line_directives: bool = False,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> None:
        folder = _bundled_folder() if path is None else _folder_of(path).rstrip(os.sep) or os.sep
        if os.path.basename(folder) == "manifest.toml" and not os.path.isdir(folder):
            folder = os.path.dirname(folder) or os.curdir
        self._folder = folder
        if bytecode_cache == "default":
            bytecode_cache = _default_bytecode_cache(mode)
        elif isinstance(bytecode_cache, str | os.PathLike):
            from cuda_progcache.templates.bytecode_cache import BytecodeCache

            bytecode_cache = BytecodeCache(bytecode_cache, mode=mode)
        self.environment = KernelEnvironment(
            folder,
            bytecode_cache=bytecode_cache,
            generated_from=generated_from,
            line_directives=line_directives,
        )
        kernels = _read(os.path.join(folder, "manifest.toml"), self.environment.bytecode_cache)
        self._options = dict(options or {})
        self._kernels = {name: _placed(spec, folder, self._options) for name, spec in kernels.items()}
        self._names: dict[str, KernelTemplate] = {}

    @property
    def path(self) -> Path:
        """The library's folder."""
        from pathlib import Path

        return Path(self._folder)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make the same library in another process."""
        environment = self.environment
        kept = environment.bytecode_cache
        return {
            "path": self._folder,
            "bytecode_cache": None if kept is None else kept.directory,
            "generated_from": environment.generated_from,
            "line_directives": environment.line_directives,
            "options": self._options,
            **({} if kept is None or kept.mode == "rw" else {"mode": kept.mode}),
        }

    @property
    def manifest(self) -> Path:
        """The path of the manifest."""
        return self.path / "manifest.toml"

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels' names, in the manifest's order."""
        return tuple(self._kernels)

    def __getitem__(self, name: str) -> KernelSpec:
        try:
            return self._kernels[name]
        except KeyError:
            hint = did_you_mean(name, self._kernels, listing="there are")
            raise KernelNotFoundError(f"no kernel {name!r} in {self.manifest}{hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._kernels

    def __iter__(self) -> Iterator[KernelSpec]:
        return iter(self._kernels.values())

    def __len__(self) -> int:
        return len(self._kernels)

    def __repr__(self) -> str:
        return f"KernelLibrary({self._folder!r})"

    def render(self, kernel: str, /, **params: Any) -> RenderedKernel:
        """Render a kernel's sources; omitted parameters have their defaults.

        Raises
        ------
        KernelNotFoundError
            If there is no such kernel.
        ParameterError
            If a parameter is unknown or its value not allowed, before anything is rendered.
        TemplateError
            If a template is missing or invalid, or can't be rendered with these parameters.
        ManifestError
            If a name or a constraint in the manifest can't be evaluated.
        """
        spec = self[kernel]
        started, clock = time.time(), time.perf_counter()
        bound = spec.bind(params, self.environment)
        modules = []
        digests: dict[str, str] = {}
        for template in spec.templates:
            source, used = self.environment.get_template(template).render_traced(**bound)
            digests |= used
            name = spec.name if len(spec.templates) == 1 else template.rpartition("/")[2].split(".", 1)[0]
            modules.append(RenderedModule(name, source, template, used, self.environment, bound))
        return RenderedKernel(
            spec,
            bound,
            tuple(modules),
            self._render_names(spec, "entry_points", bound),
            self._render_names(spec, "name_expressions", bound),
            dict(sorted(digests.items())),
            started,
            time.perf_counter() - clock,
        )

    def _render_names(self, spec: KernelSpec, field_name: str, bound: Mapping[str, Any]) -> tuple[str, ...]:
        rendered = []
        for text in getattr(spec, field_name):
            if "{" not in text:
                rendered.append(text)
                continue
            try:
                template = self._names.get(text)
                if template is None:
                    template = self._names[text] = self.environment.from_string(text)
                rendered.append(template.render(**bound))
            except TemplateError as error:
                raise ManifestError(f"{self.manifest}: kernel {spec.name!r}, {field_name} {text!r}: {error}") from error
        return tuple(rendered)

    def launches(self, kernel: str, /, **params: Any) -> dict[str, Launch]:
        """Return the launch of each entry point of a kernel, by name; empty if the manifest has none.

        Raises
        ------
        KernelNotFoundError, ParameterError, TemplateError, ManifestError
            As for `render`.
        """
        spec = self[kernel]
        bound = spec.bind(params, self.environment)
        names = (*self._render_names(spec, "entry_points", bound), *self._render_names(spec, "name_expressions", bound))
        return dict(zip(names, spec.launches(bound, self.environment), strict=bool(spec.launch)))

    def undeclared(self, kernel: str) -> tuple[str, ...]:
        """Return the names that a kernel's templates use but its manifest doesn't declare as parameters.

        Raises
        ------
        KernelNotFoundError
            If there is no such kernel.
        TemplateError
            If a template is missing or invalid.
        """
        spec = self[kernel]
        return tuple(sorted(self._used(spec) - set(spec.parameters)))

    def _used(self, spec: KernelSpec) -> set[str]:
        return {name for template in spec.templates for name in self.environment.undeclared_parameters(template)}

    def check(self) -> list[str]:
        """Check the library; return one line per problem, or an empty list.

        The problems are missing templates, names that templates use but the manifest doesn't declare, unused
        parameters, invalid constraints, missing include paths and entry points, duplicate variants, variants that can't
        be rendered, and likely mistakes in templates.
        """
        return [f"{spec.name}: {problem}" for spec in self for problem in self._check(spec)]

    def _check(self, spec: KernelSpec) -> Iterator[str]:
        try:
            used = self._used(spec)
        except TemplateError as error:
            yield str(error)
            return
        for name in sorted(used - set(spec.parameters)):
            yield f"a template uses {name!r}, which is not a parameter{did_you_mean(name, spec.parameters)}"
        in_names = "\n".join((*spec.entry_points, *spec.name_expressions))
        try:
            used |= self.environment.from_string(in_names).undeclared()
            expressions = {
                "a constraint": [constraint.require for constraint in spec.constraints],
                "a launch": [v for launch in spec.launch for v in vars(launch).values() if isinstance(v, str)],
            }
            for what, texts in expressions.items():
                for name in sorted(set().union(*map(expression_names, texts)) - set(spec.parameters)):
                    yield f"{what} uses {name!r}, which is not a parameter{did_you_mean(name, spec.parameters)}"
        except TemplateError as error:
            yield str(error)
            return
        for name in spec.parameters:
            if name not in used:
                yield f"parameter {name!r} is not used"
        paths = spec.options.get("include_path") or ()
        for path in (paths,) if isinstance(paths, str) else paths:
            if not os.path.isdir(path):
                yield f"options, include_path: there is no folder {path}"
        for template in spec.templates:
            for _, message, line, suggestion in self.environment.get_template(template).warnings:
                yield f"{template}:{line}: {message}{'; ' + suggestion if suggestion else ''}"
        yield from self._check_variants(spec)

    def _check_variants(self, spec: KernelSpec) -> Iterator[str]:
        import re

        seen: list[dict[str, Any]] = []
        complete = all(p.default is not None for p in spec.parameters.values())
        defaults: list[tuple[str, dict[str, Any]]] = (
            [("the defaults", {})] if complete and {} not in spec.variants else []
        )
        for label, variant in [*defaults, *((f"variant {n}", v) for n, v in enumerate(spec.variants, 1))]:
            try:
                rendered = self.render(spec.name, **variant)
                spec.launches(variant, self.environment)
            except (ParameterError, TemplateError, ManifestError) as error:
                yield f"{label}: {error}"
                continue
            sources = "\n".join(module.source for module in rendered.modules)
            for symbol in (*rendered.entry_points, *rendered.name_expressions):
                called = symbol.partition("<")[0].rpartition("::")[2].strip()
                found = re.search(rf"\b{re.escape(called)}\s*\(", sources)
                if not found and "__global__" in sources and "##" not in sources:
                    yield f"{label}: the source has no entry point {symbol!r}"
            if rendered.params in seen and label != "the defaults":
                yield f"{label} ({variant}) is a duplicate"
            if label != "the defaults":
                seen.append(rendered.params)


def _default_bytecode_cache(mode: str | None) -> BytecodeCache | None:
    from cuda_progcache.templates.bytecode_cache import BytecodeCache, default_directory

    directory = default_directory()
    if directory is None or modes.chosen(mode) == "off":
        return None
    try:
        return BytecodeCache(directory, mode=mode)
    except StoreError as error:
        if wanted("drop"):
            reason = f"compiled templates are not cached: {error.strerror}: {directory}"
            emit(Event("drop", "kernel templates", "bytecode", "", reasons=(reason,)))
        return None


def bundled_library() -> Path:
    """Return the folder of the library that comes with the package.

    An installed package contains it (``cuda_progcache/kernels``); in a checkout, it is next to the package.

    Raises
    ------
    ManifestError
        If it is in neither place.
    """
    from pathlib import Path

    return Path(_bundled_folder())


def _folder_of(path: str | os.PathLike[str] | Resource) -> str:
    if isinstance(path, str | os.PathLike):
        return os.fspath(path)
    from cuda_progcache.service.unpacked import folder_of

    return folder_of(path)


def _bundled_folder() -> str:
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    candidates = (os.path.join(package, "kernels"), os.path.join(os.path.dirname(package), "kernels"))
    for folder in candidates:
        if os.path.isfile(os.path.join(folder, "manifest.toml")):
            return folder
    if not os.path.isdir(package):  # the package is in an archive
        from importlib.resources import files

        if (packed := files("cuda_progcache") / "kernels").is_dir():
            return _folder_of(packed)
    raise ManifestError(
        f"the bundled kernel library is neither in {candidates[0]} nor in {candidates[1]}; reinstall cuda-progcache"
    )


def _read(file: str, kept: BytecodeCache | None) -> dict[str, KernelSpec]:
    """Return the kernels of a manifest, decoded or, if possible, loaded from the cache of compiled templates."""
    try:
        with open(file, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise ManifestError(f"can't read the kernel manifest {file}: {error.strerror or error}") from error
    decoder = _decoder() if kept is not None else None
    if kept is None or decoder is None:
        from cuda_progcache.service.kernel_tables import decode

        return decode(content, file)
    digest = sha256(content).hexdigest()
    found = kept.load("manifest.toml", digest, context_hash=decoder)
    if found is not None:
        return {name: _spec(table) for name, table in marshal.loads(found.code.co_consts[0]).items()}  # noqa: S302  ours
    from cuda_progcache.service.kernel_tables import decode
    from cuda_progcache.templates.frames import Compiled

    kernels = decode(content, file)
    tables = {name: _table(spec) for name, spec in kernels.items()}
    code = compile(repr(marshal.dumps(tables)), "manifest.toml", "eval")  # a constant: bytes
    kept.save("manifest.toml", digest, Compiled(code), context_hash=decoder)
    return kernels


_PATHS = ("include_path",)  # not pre_include: those headers are searched for in include_path


def _placed(spec: KernelSpec, folder: str, options: Mapping[str, Any]) -> KernelSpec:
    """Return a kernel with the library's options added and its include paths made absolute, relative to the library."""
    placed = {name: _inside(folder, spec.options[name]) for name in _PATHS if name in spec.options}
    return replace(spec, options={**options, **spec.options, **placed}) if placed or options else spec


def _inside(folder: str, paths: Any) -> Any:
    if isinstance(paths, str):
        return os.path.abspath(os.path.join(folder, paths))
    return [_inside(folder, path) for path in paths]


def _decoder() -> str | None:
    """Return a digest of the code that decodes manifests; None if the package isn't installed as files."""
    try:
        sources = [_source_beside(name) for name in ("kernel_spec.py", "kernel_tables.py")]
    except OSError:
        return None
    return sha256(b"\0".join(sources)).hexdigest()


def _source_beside(name: str) -> bytes:
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), "rb") as file:
        return file.read()


def _table(spec: KernelSpec) -> dict[str, Any]:
    parameters = {name: vars(parameter) for name, parameter in spec.parameters.items()}
    lists = {"constraints": [vars(one) for one in spec.constraints], "launch": [vars(one) for one in spec.launch]}
    return {**vars(spec), "parameters": parameters, **lists}


def _spec(table: dict[str, Any]) -> KernelSpec:
    parameters = {name: Parameter(**parameter) for name, parameter in table["parameters"].items()}
    constraints = tuple(Constraint(**one) for one in table["constraints"])
    launch = tuple(Launch(**one) for one in table["launch"])
    return KernelSpec(**{**table, "parameters": parameters, "constraints": constraints, "launch": launch})
