# SPDX-License-Identifier: Apache-2.0
"""The key of a program, for callers that run the compiler themselves."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from cuda_progcache._util.fields import replace
from cuda_progcache.compile.arch import with_arch
from cuda_progcache.compile.manifests import known_headers, remember_headers
from cuda_progcache.errors import UncacheableError
from cuda_progcache.keys.headers import NO_HEADERS, HeaderSet
from cuda_progcache.keys.includes import folders_of, headers_read
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.paths import reaching
from cuda_progcache.keys.schema import BaseKey, ProgramKey, base_key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def program_key(
    *,
    code: str | bytes,
    code_type: str,
    options: Any,
    target_type: str,
    name_expressions: Iterable[str | bytes] | None = (),
    extra_digest: bytes | None = None,
) -> ProgramKey:
    """Return the key of a compile, with all its components.

    If the source's headers aren't known from an earlier compile in this process, NVRTC's front end runs once to find
    them (a syntax check: no code is generated). If the source or a header uses paths (``__FILE__``, ``assert``), the
    whole program is compiled, because a path is in the key if it is in the output.

    Parameters
    ----------
    code, code_type, options, target_type, name_expressions, extra_digest
        As in :func:`make_program_cache_key`.

    Returns
    -------
    ProgramKey

    Raises
    ------
    ValueError, TypeError
        As for :func:`make_program_cache_key`.
    """
    base, headers = _identify(code, code_type, options, target_type, name_expressions, extra_digest)
    return base.with_headers(headers)


def _identify(
    code: str | bytes,
    code_type: str,
    options: Any,
    target_type: str,
    name_expressions: Iterable[str | bytes] | None,
    extra_digest: bytes | None,
) -> tuple[BaseKey, HeaderSet]:
    inputs = normalize(
        code=code,
        code_type=code_type,
        options=options if options.arch is not None else with_arch(options),
        target_type=target_type,
        name_expressions=name_expressions,
        extra_digest=extra_digest,
    )
    if reason := inputs.unrepeatable:
        vouched = "; pass a digest of its content as extra_digest=" if inputs.facts.reads_unkeyed else ""
        raise UncacheableError(f"{inputs.name}: {reason}{vouched}")
    base = base_key(inputs)
    if not inputs.reads_headers:
        return base, NO_HEADERS
    headers = known_headers(base, None)
    if headers is None:
        headers = _learn_headers(base)
        remember_headers(base, headers, None)
    return base, headers


def make_program_cache_key(
    *,
    code: str | bytes,
    code_type: str,
    options: Any,
    target_type: str,
    name_expressions: Iterable[str | bytes] | None = (),
    extra_digest: bytes | None = None,
) -> bytes:
    """Return the cache key of a compile.

    This accepts everything that ``cuda.core.utils.make_program_cache_key`` does, and also inputs whose content can be
    read: headers and include paths, ``pre_include``, libdevice, a ``name`` with a directory.

    Parameters
    ----------
    code : str or bytes
        The source; bytes for ``code_type="nvvm"`` only.
    code_type : {"c++", "ptx", "nvvm"}
        In any case.
    options : ProgramOptions
        Ours or ``cuda.core``'s: both give the same key.
    target_type : {"ptx", "cubin", "ltoir"}
        In any case.
    name_expressions : iterable of str or bytes, optional
        Their order doesn't matter; ``"k"`` and ``b"k"`` differ.
    extra_digest : bytes, optional
        Anything else the output depends on; non-empty.

    Returns
    -------
    bytes
        32 bytes, SHA-256.

    Raises
    ------
    ValueError
        For pairs of types that no compiler supports, for options that write files while compiling (``create_pch``,
        ``time``, ``fdevice_time_trace``), for precompiled headers without ``extra_digest``, for ``__TIME__`` and the
        like in the source or a header, and for a source that the compiler refuses.
    TypeError
        For arguments of the wrong type.
    """
    base, headers = _identify(code, code_type, options, target_type, name_expressions, extra_digest)
    return base.digest(headers)


def _learn_headers(base: BaseKey) -> HeaderSet:
    """Find the program's headers with NVRTC's front end or, if paths may reach the output, by a whole compile."""
    from cuda_progcache.compile.compilers import compile_cpp
    from cuda_progcache.compile.output import CompilerRefusal
    from cuda_progcache.keys.include_text import PRINTED

    inputs = base.inputs
    run = functools.partial(
        compile_cpp, inputs.compiler_code, name=inputs.compiler_name, flags=inputs.flags, target_type=inputs.target_type
    )
    before = folders_of(base)
    try:
        output = run(front_end_only=True)
        headers = headers_read(base, output.trace, before)
        if headers.mentions_file == PRINTED:
            output = run(name_expressions=inputs.name_expressions)
    except CompilerRefusal as refusal:
        raise UncacheableError(
            f"{inputs.name}: the headers it reads can't be determined, because it doesn't compile "
            f"({refusal.status}):\n{refusal.log}"
        ) from refusal
    if headers.uncacheable:
        raise UncacheableError(f"{inputs.name}: {headers.uncacheable}")
    return replace(headers, paths=reaching(base, headers, output.trace, output.data, inputs.target_type))
