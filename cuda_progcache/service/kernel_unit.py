# SPDX-License-Identifier: Apache-2.0
"""The compile unit of a rendered library kernel: the compiles it needs and the link, if any."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from cuda_progcache._util.fields import replace
from cuda_progcache._util.json_values import json_value
from cuda_progcache.compile.arch import known_arch
from cuda_progcache.compile.linking import LinkInput, linked_digest_here, look_up_linked, obtain_linked
from cuda_progcache.compile.lookup import digest_here
from cuda_progcache.compile.pipeline import find, obtain
from cuda_progcache.compile.policy import PLAIN, MissPolicy
from cuda_progcache.errors import ArchError, ManifestError
from cuda_progcache.keys.headers import CHECK_EACH_TIME, HeaderPolicy, Holds, holds
from cuda_progcache.keys.inputs import CompileInputs, normalize
from cuda_progcache.keys.options import LinkerOptions, ProgramOptions
from cuda_progcache.keys.schema import base_key
from cuda_progcache.keys.toolchain import header_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.keys.arch import Arch
    from cuda_progcache.provenance.step_records import Steps
    from cuda_progcache.service.manifest import KernelSpec, RenderedKernel, RenderedModule


class KernelUnit:
    """A rendered kernel, an architecture and a target: one compile, or one or more compiles and a link.

    Parameters
    ----------
    rendered : RenderedKernel
    arch : str
    target_type : {"cubin", "ptx", "ltoir"}
    header_policy : HeaderPolicy
    include_path : sequence of str
        Folders to search for headers before those that the manifest names.

    Raises
    ------
    ArchError
        If the architecture is invalid or below the kernel's ``min_arch``.
    ValueError
        If the kernel can't be compiled to this target.
    """

    def __init__(
        self,
        rendered: RenderedKernel,
        arch: str,
        target_type: str = "cubin",
        header_policy: HeaderPolicy = CHECK_EACH_TIME,
        include_path: Sequence[str] = (),
    ) -> None:
        require_arch(arch, rendered.spec)
        self.header_policy = header_policy
        self.include_path = tuple(include_path)
        self.rendered = rendered
        self.arch = arch
        self.target_type = target_type.lower()
        self.link_inputs: tuple[LinkInput, ...] = ()
        self.inputs: CompileInputs | None = None
        modules = rendered.modules
        code_type = rendered.spec.code_type
        if len(modules) > 1:
            self.link_inputs = tuple(self._stage(module, "ltoir") for module in modules)
        elif code_type == "nvvm" and self.target_type == "cubin":
            self.link_inputs = (self._stage(modules[0], "ptx"),)
        else:
            self.inputs = self._inputs(modules[0], self.target_type)

    def obtain(self, cache: Any, policy: MissPolicy = PLAIN) -> CompiledProgram:
        """Return the program from the cache, or compile and store it (raises CompileError, ToolchainError)."""
        rendered = self.rendered
        kernel = self._kernel(rendered.template_digests)
        if self.inputs is not None:
            lookup = _template_lines(rendered.modules[0])
            return obtain(self.inputs, cache, kernel=kernel, lookup=lookup, policy=policy)
        return obtain_linked(
            self.link_inputs, self._link_options(), self.target_type, cache, kernel=kernel, policy=policy
        )

    @property
    def kernel(self) -> dict[str, Any]:
        """The kernel's name and parameters as JSON types."""
        return {"name": self.rendered.spec.name, "parameters": json_value(self.rendered.params)}

    def _kernel(self, template_digests: Mapping[str, str]) -> dict[str, Any]:
        """Return the kernel's part of a record."""
        return {
            **self.kernel,
            "templates": [{"name": name, "digest": digest} for name, digest in template_digests.items()],
        }

    def _part(self, module: RenderedModule) -> dict[str, Any]:
        """Return the kernel's part of the record of a module to link."""
        return {**self._kernel(dict(sorted(module.template_digests.items()))), "module": module.name}

    def record_rendering(self, steps: Steps) -> None:
        """Record the rendering of each module's source, beside the programs compiled from it."""
        from cuda_progcache.provenance.steps import record_rendering
        from cuda_progcache.store.compile_record import Kernel

        rendered = self.rendered
        for module in rendered.modules:
            kernel = self._kernel(rendered.template_digests) if self.inputs is not None else self._part(module)
            if (told := Kernel.of(kernel)) is not None:
                record_rendering(steps, told, module.template, module.source, rendered.started, rendered.seconds)

    @property
    def compiles(self) -> tuple[CompileInputs, ...]:
        """The inputs of each compile that the unit needs."""
        if self.inputs is not None:
            return (self.inputs,)
        return tuple(item.compile for item in self.link_inputs if item.compile is not None)

    def missing_entry_point(self, done: CompiledProgram) -> str | None:
        """Return an entry point of the manifest that the binary lacks; None if it has all of them."""
        before, after = {"cubin": (b"\0", b"\0"), "ptx": (b".entry ", b"(")}.get(self.target_type, (b"", b""))
        names = self.rendered.entry_points if before else ()
        return next((name for name in names if before + name.encode() + after not in done.data), None)

    def wrong_entry_point(self, name: str) -> ManifestError:
        """Return the error for an entry point that the manifest names and the binary lacks."""
        return ManifestError(
            f"kernel {self.rendered.spec.name!r}, entry_points: the compiled {self.target_type} has no {name!r}; "
            'check its spelling, and that it is extern "C" __global__'
        )

    def digest_here(self, cache: Any, holds: Holds = holds) -> bytes | None:
        """Return the key; None if the headers its compiles read aren't known on this machine (ToolchainError)."""
        if self.inputs is not None:
            return digest_here(base_key(self.inputs), cache, holds)
        return linked_digest_here(self.link_inputs, self._link_options(), self.target_type, cache, holds)

    def look_up(self, cache: Any, holds: Holds = holds) -> CompiledProgram | None:
        """Return the program from the cache; None if it would have to be compiled. Loads no compiler library."""
        if self.inputs is not None:
            return find(self.inputs, cache, holds)
        return look_up_linked(self.link_inputs, self._link_options(), self.target_type, cache, holds)

    def _link_options(self) -> LinkerOptions:
        lto = any(item.target_type == "ltoir" for item in self.link_inputs)
        return LinkerOptions(name=self.rendered.spec.name, arch=self.arch, link_time_optimization=True if lto else None)

    def _stage(self, module: RenderedModule, target_type: str) -> LinkInput:
        return LinkInput(
            module.name,
            target_type,
            compile=self._inputs(module, target_type),
            kernel=functools.partial(self._part, module),
            lookup=_template_lines(module),
        )

    def _inputs(self, module: RenderedModule, target_type: str) -> CompileInputs:
        spec = self.rendered.spec
        options = ProgramOptions(name=f"{module.name}{_SUFFIXES[spec.code_type]}", arch=self.arch, **spec.options)
        if self.include_path or spec.headers:
            own = options.include_path or ()
            own = (own,) if isinstance(own, str) else tuple(own)
            given = (*self.include_path, *own, *(header_root(name) for name in spec.headers))
            options = replace(options, include_path=given)
        if spec.code_type == "c++" and len(self.rendered.modules) > 1:
            options = replace(options, relocatable_device_code=True)
        return normalize(
            code=module.source,
            code_type=spec.code_type,
            options=options,
            target_type=target_type,
            name_expressions=self.rendered.name_expressions,
            header_policy=self.header_policy,
        )


_SUFFIXES = {"c++": ".cu", "nvvm": ".ll"}


def _template_lines(module: RenderedModule) -> Callable[[int, int | None], tuple[str, int] | None]:
    """Return a lookup of template lines; the source map is made at the first call."""
    made: list[Any] = []

    def lookup(line: int, column: int | None) -> tuple[str, int] | None:
        if not made:
            made.append(module.source_map())
        place = made[0].lookup(line, column)
        return None if place is None else (place.template, place.line)

    return lookup


def require_arch(arch: object, spec: KernelSpec) -> Arch:
    """Return the architecture if it is valid and not below the kernel's ``min_arch``.

    Raises
    ------
    ArchError
        If it isn't.
    """
    known = known_arch(arch)
    if spec.min_arch is not None and known.capability < spec.min_arch:
        raise ArchError(f"kernel {spec.name!r} needs sm_{spec.min_arch} or later, not {arch}")
    return known
