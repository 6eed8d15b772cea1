# SPDX-License-Identifier: Apache-2.0
"""`Environment` and `Template`: subclasses of Jinja2's that use our compiler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar

import jinja2
from jinja2 import nodes, runtime
from jinja2.utils import internalcode

from cuda_progcache.templates import jinja_runtime
from cuda_progcache.templates.bytecode_cache import BytecodeCache
from cuda_progcache.templates.compile_context import CacheApart, snapshot
from cuda_progcache.templates.context import TemplateModule
from cuda_progcache.templates.runtime import (
    Block,
    CodeInfo,
    adopted,
    bind,
    extend,
    extra_globals,
    gathered,
    refuse_static,
)

if TYPE_CHECKING:
    import ast

    from cuda_progcache.templates.compiler import Compiler
    from cuda_progcache.templates.source_map import SourceMap


class Template(jinja2.Template):
    """A compiled template; see `jinja2.Template`.

    In addition to Jinja2's methods, `render_stream` yields runs of text, and `render_block` renders a single block.
    """

    _namespace: MutableMapping[str, Any] | None
    _forms: dict[str, Mapping[str, Any]]
    _render: Callable[..., Any]
    _info: CodeInfo = CodeInfo()

    @classmethod
    def from_code(
        cls,
        environment: jinja2.Environment,
        code: CodeType,
        globals: MutableMapping[str, Any],  # noqa: A002  (Jinja2's name for it)
        uptodate: Callable[[], bool] | None = None,
    ) -> Template:
        """Return a template made from a code object; see `jinja2.Template.from_code`."""
        info = CodeInfo.of(code)
        if info is None:  # Jinja2's own compiler made it
            made: Template = _from_code(cls, environment, code, globals, uptodate)
            return made
        static = getattr(environment, "static_context", {})
        names = jinja_runtime.namespace(environment, code.co_filename, [static[name] for name in info.static])
        exec(code, names)  # noqa: S102  (made by our compiler)
        template = cls._from_namespace(environment, names, globals)
        template._info = info
        template._uptodate = uptodate
        return template

    @classmethod
    def _from_namespace(
        cls,
        environment: jinja2.Environment,
        namespace: MutableMapping[str, Any],
        globals: MutableMapping[str, Any],  # noqa: A002  (Jinja2's name for it)
    ) -> Template:
        if "root" in namespace and "source" not in namespace:  # Jinja2's own compiler made it
            made: Template = _from_namespace(cls, environment, namespace, globals)
            if isinstance(made, Template):
                made._namespace = None
                made._render = made._concatenated
            return made
        template: Template = object.__new__(compiled_class(cls))
        template.environment = environment
        template.globals = globals
        template.name = namespace["name"]
        template.filename = namespace["__file__"]
        template._module = None
        template._uptodate = None
        template._debug_info = namespace.get("debug_info", "")
        bind(namespace, environment)
        template._namespace = namespace
        template._forms = {}
        template._bind(namespace)
        namespace["__jinja_template__"] = template
        return template

    def _bind(self, names: MutableMapping[str, Any]) -> None:
        form = self._form
        if "render" in names:
            self._render = names["render"]
            self.blocks = {name: Block(name, names[f"_block_{name}"], form) for name in names["blocks"]}
        else:
            self._render = self._concatenated
            self.blocks = {
                name: Block(name, partial(self._concatenated, what=f"_block_{name}"), form) for name in names["blocks"]
            }
        names["_own"] = self.blocks
        self.root_render_func = self._pieces

    def _pieces(self, context: runtime.Context) -> Any:
        return self._form("pieces")["render_pieces"](adopted(context))

    def _concatenated(self, context: runtime.Context, blocks: Any = None, what: str = "render") -> Any:
        return gathered(self.environment, self._form("pieces")[f"{what}_pieces"](context, blocks))

    def _form(self, form: str) -> Mapping[str, Any]:
        """Return the namespace with the functions of a form, which is compiled on first use."""
        names = self._namespace
        if names is None:
            return {f"render_{form}": lambda context, blocks: self.root_render_func(context)}  # noqa: ARG005
        if f"render_{form}" in names:
            return names
        if form not in self._forms:
            source = names["source"]
            if source is None:
                return (
                    names if form == "pieces" else {f"{n.removesuffix('_pieces')}_stream": f for n, f in names.items()}
                )
            environment = self.environment
            compiler = compiler_for(environment)
            tree = environment._parse(source, self.name, self.filename)
            code = compiler.compile(tree, self.name, self.filename, form=form)
            made = jinja_runtime.namespace(environment, code.co_filename, compiler.precomputed)
            exec(code, made)  # noqa: S102  (made by our compiler)
            made["_own"] = self.blocks
            made["__jinja_template__"] = self
            self._forms[form] = made
        return self._forms[form]

    @property
    def references(self) -> tuple[str, ...]:
        """The names of the templates that this one includes, imports or extends by a constant name."""
        return self._info.references

    @property
    def warnings(self) -> tuple[tuple[str, str, int, str], ...]:
        """The likely mistakes in the template: the code, message, line and suggestion of each."""
        return self._info.warnings

    def new_context(
        self,
        vars: dict[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
        shared: bool = False,  # noqa: FBT001, FBT002  (as Jinja2's)
        locals: Mapping[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
    ) -> Any:
        """Return a context for this template; see `jinja2.Template.new_context`."""
        return jinja_runtime.new_context(self, vars, shared, locals)

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Return the text for the given variables; the arguments are those of `dict`."""
        environment = self.environment
        if environment.is_async:
            import asyncio

            return asyncio.run(self.render_async(*args, **kwargs))
        context = self._context_for(dict(*args, **kwargs))
        with _Placed(environment):
            text: str = self._render(context)
        return text

    async def render_async(self, *args: Any, **kwargs: Any) -> str:
        """Return the text, in an async environment; see `render`."""
        _require_async(self.environment)
        context = self._context_for(dict(*args, **kwargs))
        with _Placed(self.environment):
            text: str = await self._render(context)
        return text

    def render_stream(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Yield the text in runs, as it is produced: fewer, longer and far cheaper than the pieces of `generate`."""
        if self.environment.is_async:
            raise RuntimeError("an async environment streams with render_stream_async")
        context = self._context_for(dict(*args, **kwargs))
        with _Placed(self.environment):
            yield from self._form("stream")["render_stream"](context)

    async def render_stream_async(self, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        """Yield the text in runs, in an async environment; see `render_stream`."""
        _require_async(self.environment)
        context = self._context_for(dict(*args, **kwargs))
        runs = self._form("stream")["render_stream"](context)
        try:
            with _Placed(self.environment):
                async for run in runs:
                    yield run
        finally:
            await runs.aclose()

    def render_block(self, block: str, /, *args: Any, **kwargs: Any) -> str:
        """Return the text of one block or region.

        The ``{% globals %}`` and ``{% imports %}`` of this template, and of the templates that it extends by a constant
        name, are executed first, as are their imports by a constant name. Nothing else outside the block is executed.
        The parameters of a region are taken from the variables.

        Parameters
        ----------
        block : str
            The block's name, in this template or one that it extends.
        *args, **kwargs
            The variables; see `render`.

        Raises
        ------
        KeyError
            If there is no such block; the message lists the valid names.
        """
        if self.environment.is_async:
            import asyncio

            return asyncio.run(self.render_block_async(block, *args, **kwargs))
        context = self._context_for(dict(*args, **kwargs))
        with _Placed(self.environment):
            for setup in self._setups(context):
                setup(context)
            text: str = self._block_of(context, block).render(context, context.blocks)
        return text

    async def render_block_async(self, block: str, /, *args: Any, **kwargs: Any) -> str:
        """Return the text of one block or region, in an async environment; see `render_block`."""
        _require_async(self.environment)
        context = self._context_for(dict(*args, **kwargs))
        with _Placed(self.environment):
            for setup in self._setups(context):
                await setup(context)
            text: str = await self._block_of(context, block).render(context, context.blocks)
        return text

    def _context_for(self, variables: dict[str, Any]) -> Any:
        static = getattr(self.environment, "static_context", None)
        if static:
            refuse_static(variables, static)
        return self.new_context(variables)

    def _setups(self, context: runtime.Context) -> list[Callable[..., Any]]:
        """Add the blocks of the templates that this one extends to the context; return the setup functions of all."""
        found: list[Callable[..., Any]] = []
        template: Any = self
        while True:
            names = template._namespace or {}
            found += [names[setup] for setup in ("_imports_setup", "_globals_setup") if setup in names]
            if names.get("parent") is None:
                return found[::-1]  # the parent's first: the child's names override
            template = self.environment.get_template(names["parent"], template.name)
            extend(context, template)

    def _block_of(self, context: runtime.Context, block: str) -> Any:
        if block not in context.blocks:
            known = ", ".join(sorted(context.blocks)) or "none"
            raise KeyError(f"{self.name or 'the template'} has no block {block!r}; valid: {known}")
        return context.blocks[block][0]

    def source_map(self, *args: Any, **kwargs: Any) -> SourceMap:
        """Return the origin of each line of the text.

        The template is compiled and rendered a second time, with a mark before every piece of text, and the map is read
        from the marks. If the marked text without its marks differs from the text of `render`, the map is empty and has
        the reason. Use this to explain errors, not in every render.

        Parameters
        ----------
        *args, **kwargs
            The variables; see `render`.
        """
        from cuda_progcache.templates.marking import map_of
        from cuda_progcache.templates.source_map import SourceMap

        plain, variables = self.render(*args, **kwargs), dict(*args, **kwargs)
        source = None if self._namespace is None else self._namespace["source"]
        if source is None:
            return SourceMap(plain, reason="the template has no source text to compile with marks")

        def render(marked: Any) -> str:
            code = marked.compile(source, self.name, self.filename)
            return type(self).from_code(marked, code, marked.globals).render(variables)

        return map_of(self.environment, "the template", plain, render, self.globals)

    def list_blocks(self) -> list[str]:
        """Return the names of the blocks and regions that this template defines, in the order of their definition."""
        return list(self.blocks)

    def make_module(self, *args: Any, **kwargs: Any) -> Any:
        """Return the template as a module; see `jinja2.Template.make_module`."""
        context = self.new_context(*args, **kwargs)
        if self.environment.is_async:
            raise RuntimeError(
                "Async mode requires a body stream to be passed to a template module. Use make_module_async."
            )
        if "render" in (self._namespace or ()):
            return TemplateModule(self, context, [self._render(context)])
        return TemplateModule(self, context, list(self.root_render_func(context)))

    async def make_module_async(self, *args: Any, **kwargs: Any) -> Any:
        """Return the template as a module, in an async environment; see `make_module`."""
        context = self.new_context(*args, **kwargs)
        if "render" not in (self._namespace or ()):
            return TemplateModule(self, context, [piece async for piece in self.root_render_func(context)])  # type: ignore[attr-defined]
        return TemplateModule(self, context, [await self._render(context)])

    @internalcode
    def _get_default_module(self, ctx: runtime.Context | None = None) -> Any:
        if self.environment.is_async:
            raise RuntimeError("Module is not available in async mode.")
        extra = extra_globals(ctx, self.globals)
        if extra:
            return self.make_module(extra)
        if self._module is None:
            self._module = self.make_module()
        return self._module

    async def _get_default_module_async(self, ctx: runtime.Context | None = None) -> Any:
        extra = extra_globals(ctx, self.globals)
        if extra:
            return await self.make_module_async(extra)
        if self._module is None:
            self._module = await self.make_module_async()
        return self._module

    def get_corresponding_lineno(self, lineno: int) -> int:
        """Return the template's line for a line of its code: the same, unless the code was written as Python text."""
        return _corresponding_lineno(self, lineno) if self._debug_info else lineno


def _require_async(environment: jinja2.Environment) -> None:
    if not environment.is_async:
        raise RuntimeError("The environment was not created with async mode enabled.")


class _Placed:
    """A context manager that raises errors as Jinja2 does, with the template's lines in the traceback."""

    __slots__ = ("_environment",)

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, StopIteration):  # Jinja2's code is a generator, in which this becomes a RuntimeError
            try:
                raise RuntimeError("generator raised StopIteration") from error
            except RuntimeError:
                self._environment.handle_exception()
        if isinstance(error, Exception):
            self._environment.handle_exception()


def compiled_class(kind: type) -> Any:
    """Return our class for a template class: a subclass of both for a user's class, `Template` for Jinja2's own."""
    if issubclass(kind, Template):
        return kind
    if kind is jinja2.Template:
        return Template
    made = _compiled_classes.get(kind)
    if made is None:
        members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        made = _compiled_classes[kind] = type(kind.__name__, (kind, Template), members)
    return made


_compiled_classes: dict[type, type] = {}


def compiler_for(environment: jinja2.Environment, *, static: bool = True) -> Compiler:
    """Return a compiler for an environment's templates; with ``static=False``, it ignores the static context."""
    from cuda_progcache.templates.compiler import Compiler  # not needed if all code is cached

    kind: type[Compiler] = getattr(environment, "compiler_class", None) or Compiler
    return kind(environment, getattr(environment, "static_context", None) if static else None)


def compile_template(
    self: jinja2.Environment,
    source: str | nodes.Template,
    name: str | None = None,
    filename: str | None = None,
    raw: bool = False,  # noqa: FBT001, FBT002  (as Jinja2's)
    defer_init: bool = False,  # noqa: FBT001, FBT002  (as Jinja2's)
) -> str | CodeType:
    """Compile a template's text or tree to code; with `raw`, to Python text. See `jinja2.Environment.compile`."""
    from cuda_progcache.templates.compiler.settings import Settings, compilable

    if not compilable(self):
        made: str | CodeType = _base_compile(self, source, name, filename, raw, defer_init)
        return made
    text = source if isinstance(source, str) else None
    try:
        tree = self._parse(source, name, filename) if isinstance(source, str) else source
        compiler = compiler_for(self, static=not raw)  # Python text can't contain the values
        form = "render" if Settings(self, "render").text else "pieces"
        if raw:
            return _written(compiler.tree(tree, name, filename, source=text, form=form, raw=True))
        if text is None and form == "render":
            code = compiler.compile_all(tree, name, filename)
        else:
            code = compiler.compile(tree, name, filename, source=text, form=form)
    except jinja2.TemplateSyntaxError:
        self.handle_exception(source=text)
    return code


def _written(tree: ast.Module) -> str:
    """Return a tree as Python text that ends with its line table, ``debug_info``."""
    import ast

    from cuda_progcache._util.syntax_tree import parse

    text = ast.unparse(tree)
    pairs: list[str] = []
    last = 0
    for ours, written in zip(_statements(tree), _statements(parse(text)), strict=True):
        if ours.lineno != last:
            pairs.append(f"{ours.lineno}={written.lineno}")
            last = ours.lineno
    return f"{text}\ndebug_info = {'&'.join(pairs)!r}\n"


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements in the order of the text."""
    import ast

    for field in ast.iter_child_nodes(tree):
        if isinstance(field, ast.stmt):
            yield field
        if isinstance(field, (ast.stmt, ast.ExceptHandler)):
            yield from _statements(field)


class Environment(jinja2.Environment):
    """A `jinja2.Environment` that uses our compiler.

    Parameters
    ----------
    static_context : mapping, optional
        Names with the same value in every render. Expressions of these names alone are evaluated when a template is
        compiled.
    **options
        The options of `jinja2.Environment`.

    Attributes
    ----------
    compiler_class : type or None
        The subclass of `Compiler` to use.
    """

    compiler_class: ClassVar[type[Compiler] | None] = None
    template_class = Template
    context_class = jinja_runtime.Context

    def __init__(self, *args: Any, static_context: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.static_context = snapshot(static_context or {})
        super().__init__(*args, **options)
        self.globals.update(self.static_context)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        from cuda_progcache.templates.regions import parse

        return parse(self, source, name, filename)

    @property
    def bytecode_cache(self) -> Any:
        """The cache of compiled templates; a `jinja2.BytecodeCache` is wrapped to keep our code apart from Jinja2's."""
        return self._bytecode_cache

    @bytecode_cache.setter
    def bytecode_cache(self, cache: Any) -> None:
        ours = cache is None or isinstance(cache, (BytecodeCache, CacheApart))
        self._bytecode_cache = cache if ours else CacheApart(cache)

    compile = internalcode(compile_template)  # type: ignore[assignment]


Template.environment_class = Environment

# Jinja2's own methods, even while `patch_jinja2` has replaced them.
_base_compile: Any = jinja2.Environment.compile
_from_code: Any = jinja2.Template.__dict__["from_code"].__func__
_from_namespace: Any = jinja2.Template.__dict__["_from_namespace"].__func__
_corresponding_lineno = jinja2.Template.get_corresponding_lineno
