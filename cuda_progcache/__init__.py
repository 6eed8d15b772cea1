# SPDX-License-Identifier: Apache-2.0
"""Compilation of CUDA programs from Python, with a cache that persists, explains its misses and can be shared.

All public names can be imported from this package. Each is loaded when it is
first used, so that ``import cuda_progcache`` costs next to nothing.

>>> from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
>>> program = Program(source, "c++", ProgramOptions(arch="sm_90"))  # doctest: +SKIP
>>> with FileStreamProgramCache() as cache:  # doctest: +SKIP
...     object_code = program.compile("cubin", cache=cache)
"""

from __future__ import annotations

from cuda_progcache._util.lazy import take

TYPE_CHECKING = False  # importing typing takes 9 ms, twice as long as the rest of this module
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.compiled import CompiledProgram as CompiledProgram
    from cuda_progcache.compile.key import make_program_cache_key as make_program_cache_key
    from cuda_progcache.compile.key import program_key as program_key
    from cuda_progcache.compile.linker import Linker as Linker
    from cuda_progcache.compile.linker import link as link
    from cuda_progcache.compile.program import Program as Program
    from cuda_progcache.compile.recording import record as record
    from cuda_progcache.errors import AmbiguousDigestError as AmbiguousDigestError
    from cuda_progcache.errors import ArchError as ArchError
    from cuda_progcache.errors import BundleError as BundleError
    from cuda_progcache.errors import ClosedProgramError as ClosedProgramError
    from cuda_progcache.errors import CompileError as CompileError
    from cuda_progcache.errors import ConfigError as ConfigError
    from cuda_progcache.errors import Diagnostic as Diagnostic
    from cuda_progcache.errors import ExportError as ExportError
    from cuda_progcache.errors import FrozenMissError as FrozenMissError
    from cuda_progcache.errors import InspectError as InspectError
    from cuda_progcache.errors import KernelNotFoundError as KernelNotFoundError
    from cuda_progcache.errors import LockError as LockError
    from cuda_progcache.errors import ManifestError as ManifestError
    from cuda_progcache.errors import ModeError as ModeError
    from cuda_progcache.errors import OptionError as OptionError
    from cuda_progcache.errors import ParameterError as ParameterError
    from cuda_progcache.errors import ProgCacheError as ProgCacheError
    from cuda_progcache.errors import ProgCacheWarning as ProgCacheWarning
    from cuda_progcache.errors import ReadOnlyError as ReadOnlyError
    from cuda_progcache.errors import RecordingError as RecordingError
    from cuda_progcache.errors import StoreError as StoreError
    from cuda_progcache.errors import TemplateError as TemplateError
    from cuda_progcache.errors import ToolchainError as ToolchainError
    from cuda_progcache.errors import UncacheableError as UncacheableError
    from cuda_progcache.errors import UnsafeRootError as UnsafeRootError
    from cuda_progcache.errors import UnsupportedArchError as UnsupportedArchError
    from cuda_progcache.errors import UnsupportedCodeTypeError as UnsupportedCodeTypeError
    from cuda_progcache.errors import WorkerDiedError as WorkerDiedError
    from cuda_progcache.events import Event as Event
    from cuda_progcache.events import subscribe as subscribe
    from cuda_progcache.keys.headers import HeaderPolicy as HeaderPolicy
    from cuda_progcache.keys.options import LinkerOptions as LinkerOptions
    from cuda_progcache.keys.options import ProgramOptions as ProgramOptions
    from cuda_progcache.keys.schema import ProgramKey as ProgramKey
    from cuda_progcache.memo.memoize import memoize as memoize
    from cuda_progcache.service.compile_service import CompileService as CompileService
    from cuda_progcache.service.manifest import KernelLibrary as KernelLibrary
    from cuda_progcache.service.prewarm import PrewarmReport as PrewarmReport
    from cuda_progcache.store.base import ProgramCacheResource as ProgramCacheResource
    from cuda_progcache.store.file_stream import FileStreamProgramCache as FileStreamProgramCache
    from cuda_progcache.store.in_memory import InMemoryProgramCache as InMemoryProgramCache
    from cuda_progcache.store.in_mode import FrozenProgramCache as FrozenProgramCache
    from cuda_progcache.store.readonly import ReadOnlyProgramCache as ReadOnlyProgramCache
    from cuda_progcache.store.stack import ProgramCacheStack as ProgramCacheStack
    from cuda_progcache.templates.environment import KernelEnvironment as KernelEnvironment

__version__ = "0.1.0"

_HOME = {
    "AmbiguousDigestError": "errors",
    "ArchError": "errors",
    "BundleError": "errors",
    "ClosedProgramError": "errors",
    "CompileError": "errors",
    "CompileService": "service.compile_service",
    "CompiledProgram": "compile.compiled",
    "ConfigError": "errors",
    "Diagnostic": "errors",
    "Event": "events",
    "ExportError": "errors",
    "FileStreamProgramCache": "store.file_stream",
    "FrozenMissError": "errors",
    "FrozenProgramCache": "store.in_mode",
    "HeaderPolicy": "keys.headers",
    "InMemoryProgramCache": "store.in_memory",
    "InspectError": "errors",
    "KernelEnvironment": "templates.environment",
    "KernelLibrary": "service.manifest",
    "KernelNotFoundError": "errors",
    "Linker": "compile.linker",
    "LinkerOptions": "keys.options",
    "LockError": "errors",
    "ManifestError": "errors",
    "ModeError": "errors",
    "OptionError": "errors",
    "ParameterError": "errors",
    "PrewarmReport": "service.prewarm",
    "ProgCacheError": "errors",
    "ProgCacheWarning": "errors",
    "Program": "compile.program",
    "ProgramCacheResource": "store.base",
    "ProgramCacheStack": "store.stack",
    "ProgramKey": "keys.schema",
    "ProgramOptions": "keys.options",
    "ReadOnlyError": "errors",
    "ReadOnlyProgramCache": "store.readonly",
    "RecordingError": "errors",
    "StoreError": "errors",
    "TemplateError": "errors",
    "ToolchainError": "errors",
    "UncacheableError": "errors",
    "UnsafeRootError": "errors",
    "UnsupportedArchError": "errors",
    "UnsupportedCodeTypeError": "errors",
    "WorkerDiedError": "errors",
    "link": "compile.linker",
    "make_program_cache_key": "compile.key",
    "memoize": "memo.memoize",
    "program_key": "compile.key",
    "record": "compile.recording",
    "subscribe": "events",
}

__all__ = [
    "AmbiguousDigestError",
    "ArchError",
    "BundleError",
    "ClosedProgramError",
    "CompileError",
    "CompileService",
    "CompiledProgram",
    "ConfigError",
    "Diagnostic",
    "Event",
    "ExportError",
    "FileStreamProgramCache",
    "FrozenMissError",
    "FrozenProgramCache",
    "HeaderPolicy",
    "InMemoryProgramCache",
    "InspectError",
    "KernelEnvironment",
    "KernelLibrary",
    "KernelNotFoundError",
    "Linker",
    "LinkerOptions",
    "LockError",
    "ManifestError",
    "ModeError",
    "OptionError",
    "ParameterError",
    "PrewarmReport",
    "ProgCacheError",
    "ProgCacheWarning",
    "Program",
    "ProgramCacheResource",
    "ProgramCacheStack",
    "ProgramKey",
    "ProgramOptions",
    "ReadOnlyError",
    "ReadOnlyProgramCache",
    "RecordingError",
    "StoreError",
    "TemplateError",
    "ToolchainError",
    "UncacheableError",
    "UnsafeRootError",
    "UnsupportedArchError",
    "UnsupportedCodeTypeError",
    "WorkerDiedError",
    "__version__",
    "link",
    "make_program_cache_key",
    "memoize",
    "program_key",
    "record",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    return take(globals(), _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
