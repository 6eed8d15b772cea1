# SPDX-License-Identifier: Apache-2.0
"""Links of several binaries, or of the outputs of compiles, with nvJitLink, through the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from cuda_progcache._util import modes
from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import NamedTuple, dataclass, replace
from cuda_progcache.compile.compiled import CompiledProgram
from cuda_progcache.compile.lookup import check_cache, fleet, leases_dir, load
from cuda_progcache.compile.manifests import headers_here, known_headers, remember_headers
from cuda_progcache.compile.pipeline import obtain
from cuda_progcache.compile.policy import PLAIN, MissPolicy
from cuda_progcache.errors import CompileError, OptionError
from cuda_progcache.keys import options as opt
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.flags import facts
from cuda_progcache.keys.headers import NO_HEADERS, HeaderSet, Holds, holds
from cuda_progcache.keys.inputs import CompileInputs, unkeyed_files
from cuda_progcache.keys.schema import SCHEMA, Component, ProgramKey, base_key, digest, refuse_side_effects

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.diagnostics import LineLookup
    from cuda_progcache.compile.output import Output
    from cuda_progcache.keys.schema import BaseKey

NOTHING_TO_LINK = "there is nothing to link. At least one ObjectCode object must be provided."


@dataclass(frozen=True)
class LinkInput:
    """An input of a link: bytes, or a compile that is done only if the link isn't in the cache.

    Attributes
    ----------
    name, target_type : str
    data : bytes or None
    digest : str or None
        The digest of the entry that the bytes came from.
    compile : CompileInputs or None
    kernel : callable or None
        Returns the ``kernel`` argument of :func:`~cuda_progcache.compile.pipeline.obtain`, for the compile's record.
    lookup : callable or None
        The ``lookup`` argument of the same function.
    """

    name: str
    target_type: str
    data: bytes | None = None
    digest: str | None = None
    compile: CompileInputs | None = None
    kernel: Callable[[], Mapping[str, Any]] | None = None
    lookup: LineLookup | None = None


class LinkStep(NamedTuple):
    """A link without its inputs: its name, target, architecture and flags."""

    name: str
    target_type: str
    arch: str
    flags: tuple[str, ...]

    @property
    def code_type(self) -> str:
        """``"link"``, in place of a compile's source type."""
        return "link"

    @property
    def name_expressions(self) -> tuple[str | bytes, ...]:
        """Empty: a link instantiates nothing."""
        return ()

    @property
    def unrepeatable(self) -> str | None:
        """Why the link can't be keyed; None if it can."""
        return unkeyed_files(facts(self.flags, "link"))


def obtain_linked(
    inputs: Sequence[LinkInput],
    options: Any,
    target_type: str,
    cache: Any = None,
    *,
    kernel: Mapping[str, Any] | None = None,
    policy: MissPolicy = PLAIN,
) -> CompiledProgram:
    """Link with nvJitLink, through the cache. A link is keyed by its inputs.

    An input that is itself a compile is keyed by *its* inputs. LTO-IR contains the working directory of its compile,
    which doesn't reach the linked binary. So the linked entry is shared between directories even if the LTO-IR isn't.

    Parameters
    ----------
    inputs : sequence of LinkInput
        In link order.
    options : LinkerOptions
        With ``arch``.
    target_type : {"cubin", "ptx"}
    cache, kernel, policy
        As in :func:`obtain`. Failures of the link itself aren't kept.

    Returns
    -------
    CompiledProgram

    Raises
    ------
    CompileError
        If a compiler or the linker refuses.
    OptionError
        For an empty list, or a target nvJitLink doesn't make.
    """
    if not inputs:
        raise OptionError(NOTHING_TO_LINK)
    if target_type not in ("cubin", "ptx"):
        raise OptionError(f"nvJitLink makes cubin or ptx, not {target_type!r}")
    own = _link_step(inputs, options, target_type)
    given = cache
    if (mode := modes.of(cache)) != "rw":
        from cuda_progcache.store.in_mode import in_mode

        if cache is not None:
            check_cache(cache)
        cache = in_mode(cache, mode)
    if cache is not None:
        check_cache(cache)
        refuse_side_effects(own.flags, own.code_type)
        if (found := _look_up(own, inputs, cache)) is not None:
            return found
    parts: list[CompiledProgram | None] = [
        None
        if item.compile is None
        else obtain(item.compile, given, kernel=item.kernel and item.kernel(), lookup=item.lookup, policy=policy)
        for item in inputs
    ]
    if mode == "frozen":  # all its parts are in the cache
        from cuda_progcache.compile.frozen import no_link

        raise no_link(own, cache, kernel)
    reasons = [own.unrepeatable] if cache is not None else []
    reason = next(filter(None, [*reasons, *(part.reason for part in parts if part is not None)]), None)
    key = _link_key(own, inputs, cache) if cache is not None and reason is None else None
    spared = sum(part.about.seconds for part in parts if part is not None)  # saved by a hit, in addition to the link
    if key is None:
        from cuda_progcache.compile.miss import tell_compiled

        output, seconds = _link(own, inputs, parts)
        tell_compiled(own, seconds)
        record = {"duration": seconds + spared}
        return CompiledProgram(output.data, target_type, own.name, own.arch, {}, output.log, record, reason=reason)

    from cuda_progcache.compile.miss import make_record, publish
    from cuda_progcache.compile.single_flight import fly

    def link_and_publish() -> CompiledProgram:
        output, seconds = _link(own, inputs, parts)
        _judge_paths(inputs, cache, output.data, target_type)
        judged = _link_key(own, inputs, cache) or key
        record = make_record(own, judged, output, seconds + spared, kernel)
        record["inputs"] = [_linked(item, part) for item, part in zip(inputs, parts, strict=True)]
        reason = output.unkept or toolchain.trouble("ptx", judged.toolchain)
        return publish(own, judged, output, record, cache, reason, seconds)

    flight = key.digest.hex()
    again = partial(load, key, own, cache, again=True)
    return fly(flight, leases_dir(cache), link_and_publish, again, fleet=fleet(cache, flight))


def _judge_paths(inputs: Iterable[LinkInput], cache: Any, output: bytes, target_type: str) -> None:
    """Store, with the headers of each compile, which of its paths are in the linked output."""
    from cuda_progcache.keys.paths import reaching

    for item in inputs:
        if item.compile is None or not item.compile.reads_headers:
            continue
        base = base_key(item.compile)
        headers = known_headers(base, cache)
        if headers is None:
            continue
        reached = {*headers.linked_paths, *reaching(base, headers, None, output, target_type)}
        if reached != set(headers.linked_paths):
            remember_headers(base, replace(headers, linked_paths=tuple(sorted(reached))), cache, headers.entry)


def _linked(item: LinkInput, part: CompiledProgram | None) -> dict[str, Any]:
    """Return an input for the link's record: its entry's digest, if it has one, and the SHA-256 of its bytes."""
    data, entry = (item.data or b"", item.digest) if part is None else (part.data, part.digest)
    content = sha256(data).hexdigest()
    return {"name": item.name, "target_type": item.target_type, "digest": entry, "sha256": content}


def look_up_linked(
    inputs: Sequence[LinkInput], options: Any, target_type: str, cache: Any, holds: Holds = holds
) -> CompiledProgram | None:
    """Look a link up in the cache, without compiling or linking; None is a miss."""
    if (mode := modes.of(cache)) != "rw":
        from cuda_progcache.store.in_mode import in_mode

        cache = in_mode(cache, mode)
        if cache is None:
            return None
    return _look_up(_link_step(inputs, options, target_type), inputs, cache, holds)


def linked_digest_here(
    inputs: Sequence[LinkInput], options: Any, target_type: str, cache: Any, holds: Holds = holds
) -> bytes | None:
    """Return the key of a link; None if this machine doesn't know the headers that its compiles read."""
    own = _link_step(inputs, options, target_type)
    key = _link_key(own, inputs, cache, holds, headers_here) if own.unrepeatable is None else None
    return None if key is None else key.digest


def _look_up(own: LinkStep, inputs: Sequence[LinkInput], cache: Any, holds: Holds = holds) -> CompiledProgram | None:
    if own.unrepeatable is not None:
        return None

    def look(again: bool = False) -> CompiledProgram | None:  # noqa: FBT001, FBT002 - the callback's signature
        key = _link_key(own, inputs, cache, holds)
        return None if key is None else load(key, own, cache, again=again)

    try:
        return look()
    except toolchain.NotInstalledError:
        from cuda_progcache.compile.toolchains import without_compiler

        return without_compiler(cache, look)


def _link_step(inputs: Sequence[LinkInput], options: Any, target_type: str) -> LinkStep:
    options = opt.with_plain_arch(options, target_type)
    flags = tuple(opt.linker_flags(options))
    if target_type == "ptx" and "-ptx" not in flags:
        flags += ("-ptx",)
    name = options.name or inputs[0].name
    return LinkStep(name, target_type, options.arch, flags)


def _link_key(
    own: LinkStep,
    inputs: Iterable[LinkInput],
    cache: Any,
    holds: Holds = holds,
    headers_of: Callable[[BaseKey, Any, Holds], HeaderSet | None] = known_headers,
) -> ProgramKey | None:
    """Return the key of a link; None if the headers of one of its compiles aren't known."""
    tools = toolchain.toolchain("ptx")
    used: dict[str, toolchain.ToolFile] = {tool.name: tool for tool in tools}
    headers: dict[str, Any] = {}
    components = [Component("schema", SCHEMA.encode())]
    components += [Component(f"tool {tool.name}", tool.identity.encode()) for tool in tools]
    components += [Component("environment", os.fsencode(variable)) for variable in toolchain.environment()]
    components += [Component("code_type", b"link"), Component("target_type", own.target_type.encode())]
    components += [Component("name", own.name.encode())]
    components += [Component("option", flag.encode()) for flag in own.flags]
    for index, item in enumerate(inputs):
        if item.compile is None:
            components.append(Component("input_type", item.target_type.encode()))
            components.append(Component("input", item.data or b""))
            continue
        base = base_key(item.compile)
        known = headers_of(base, cache, holds) if item.compile.reads_headers else NO_HEADERS
        if known is None:
            return None
        key = base.with_headers(known, output=own.target_type)
        used.update((tool.name, tool) for tool in key.toolchain)
        headers.update((h.name, h) for h in known.headers)
        components += [Component(f"input {index} {label}", payload) for label, payload in key.components]
    return ProgramKey(
        digest(components), tuple(components), HeaderSet(headers=tuple(headers.values())), tuple(used.values())
    )


def unknown_arch(options: Any) -> CompileError:
    """Return the error for linker options with an invalid architecture."""
    from cuda_progcache.compile.diagnostics import compile_error
    from cuda_progcache.compile.output import CompilerRefusal

    refusal = CompilerRefusal("UNSUPPORTED_ARCH", "")
    flags = opt.linker_flags(options)
    return compile_error(refusal, name=options.name or "", code_type="link", target_type="cubin", flags=flags)


def _link(own: LinkStep, inputs: Sequence[LinkInput], parts: Sequence[CompiledProgram | None]) -> tuple[Output, float]:
    """Link; return the output and the seconds that the link took."""
    import time

    from cuda_progcache.compile.arch import knows_arch
    from cuda_progcache.compile.compilers import link
    from cuda_progcache.compile.diagnostics import compile_error
    from cuda_progcache.compile.output import CompilerRefusal, LinkerInput

    ready = [
        LinkerInput(part.data if part is not None else item.data or b"", item.target_type, item.name)
        for item, part in zip(inputs, parts, strict=True)
    ]
    clock = time.perf_counter()
    try:
        if not knows_arch(own.arch):  # some versions of nvJitLink end the whole process on an unknown one
            raise CompilerRefusal("UNSUPPORTED_ARCH", "")
        output = link(ready, flags=own.flags, target_type=own.target_type)
    except CompilerRefusal as refusal:
        raise compile_error(
            refusal, name=own.name, code_type="link", target_type=own.target_type, flags=own.flags
        ) from None  # the new error contains the whole refusal
    return output, time.perf_counter() - clock
