# SPDX-License-Identifier: Apache-2.0
"""The specification of one kernel in a manifest: its parameters, names, options, launches and variants."""

from __future__ import annotations

from collections.abc import Mapping

from cuda_progcache._util.fields import dataclass, field
from cuda_progcache._util.suggest import did_you_mean, nearest
from cuda_progcache.errors import ManifestError, ParameterError, TemplateError
from cuda_progcache.templates.dtypes import dtype_name
from cuda_progcache.templates.environment import KernelEnvironment, evaluate, expression_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

LAUNCH_LIMITS = {"threads": (1, 1024), "min_blocks": (0, 32), "shared_bytes": (0, 227 * 1024)}
"""The range of each field of a `Launch`; no GPU up to sm_121 has more."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Parameters
    ----------
    name : str
        The parameter's name in templates.
    type : {"int", "float", "bool", "str", "dtype"}
        A dtype is a NumPy name such as ``"float16"``.
    values : tuple, optional
        The allowed values.
    default : optional
        Without a default, the parameter is required.
    min, max : int or float, optional
        The range of a number, both ends allowed.
    description : str
        Text for display.
    """

    name: str
    type: Literal["int", "float", "bool", "str", "dtype"]
    values: tuple[Any, ...] | None = None
    default: Any = None
    min: int | float | None = None
    max: int | float | None = None
    description: str = ""

    def check(self, value: Any) -> Any:
        """Return `value` as the parameter's type; NumPy scalars become Python's, a dtype its name.

        Raises
        ------
        ParameterError
            If the type is wrong or the value isn't allowed; the message names the nearest allowed value.
        """
        value = self._typed(value)
        if self.values is not None and value not in self.values:
            allowed = ", ".join(map(str, self.values))
            near = self._nearest(value)
            raise ParameterError(
                f"{self.name} = {value!r} is not one of {allowed}"
                + (f"; nearest: {near!r}" if near is not None else "")
            )
        # Written so that a NaN is outside every range.
        if self.min is not None and not value >= self.min:
            raise ParameterError(f"{self.name} = {value!r} is below its minimum; nearest: {self.min!r}")
        if self.max is not None and not value <= self.max:
            raise ParameterError(f"{self.name} = {value!r} is above its maximum; nearest: {self.max!r}")
        return value

    def _nearest(self, value: Any) -> Any:
        if self.values is None:
            return None
        if self.type in {"int", "float"}:
            return min(self.values, key=lambda allowed: abs(allowed - value))
        return nearest(value, self.values) if isinstance(value, str) else None

    def _typed(self, value: Any) -> Any:
        if self.type == "dtype":
            try:
                return dtype_name(value)
            except ParameterError as error:
                near = self._nearest(value)
                said = near is None or repr(near) in str(error)
                hint = "" if said else f"; nearest of this kernel's: {near!r}"
                raise ParameterError(f"{self.name}: {error}{hint}") from None
        plain = value
        if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
            plain = value.item()
        if self.type == "float" and isinstance(plain, int) and not isinstance(plain, bool):
            plain = float(plain)
        expected = {"int": int, "float": float, "bool": bool, "str": str}[self.type]
        if not isinstance(plain, expected) or (self.type == "int" and isinstance(plain, bool)):
            article = "an" if self.type == "int" else "a"
            raise ParameterError(f"{self.name} must be {article} {self.type}, not {value!r} ({type(value).__name__})")
        return plain


@dataclass(frozen=True)
class Constraint:
    """A condition over the parameters, and the message if it doesn't hold.

    Parameters
    ----------
    require : str
        A Jinja2 expression.
    message : str
        Text for display.
    """

    require: str
    message: str


@dataclass(frozen=True)
class Launch:
    """The launch of an entry point: each field is a number, or a Jinja2 expression over the parameters.

    Parameters
    ----------
    threads : int or str
        The largest number of threads per block, or the exact number if the kernel's description says so.
    min_blocks : int or str
        Blocks per multiprocessor that registers must suffice for, the second argument of ``__launch_bounds__``; 0 if
        the kernel leaves that to the compiler.
    shared_bytes : int or str
        Dynamic shared memory per block in bytes. Above 48 KiB, the launcher must first request it with
        ``cudaFuncAttributeMaxDynamicSharedMemorySize``.
    """

    threads: int | str
    min_blocks: int | str = 0
    shared_bytes: int | str = 0


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, as its manifest declares it.

    Parameters
    ----------
    name : str
        The kernel's name in the library.
    templates : tuple of str
        Template files. If there are several, each is a module; they are compiled to LTO-IR and linked.
    description : str
        Text for display.
    code_type : {"c++", "nvvm"}
        The language of the rendered templates.
    parameters : dict of str to Parameter
        In the manifest's order.
    entry_points : tuple of str
        ``extern "C"`` symbols; templates over the parameters.
    name_expressions : tuple of str
        C++ names to instantiate and look up, such as ``gemm<float>``; templates over the parameters.
    headers : tuple of str
        Include roots: "cuda", "cccl".
    options : dict
        `ProgramOptions` fields.
    constraints : tuple of Constraint
        Conditions over the parameters.
    launch : tuple of Launch
        One launch for all entry points, or one per entry point in the order of `entry_points` and `name_expressions`;
        empty if the manifest has none.
    variants : tuple of dict
        The parameters that each variant to prewarm sets; ``{}`` means the defaults.
    min_arch : int, optional
        The lowest compute capability: 80 for sm_80.
    reference : str
        A NumPy expression, or statements that set ``out``, over the named inputs.
    tolerance : dict
        ``rtol`` and ``atol`` for comparing with the reference.
    """

    name: str
    templates: tuple[str, ...]
    description: str = ""
    code_type: Literal["c++", "nvvm"] = "c++"
    parameters: dict[str, Parameter] = field(default_factory=dict)
    entry_points: tuple[str, ...] = ()
    name_expressions: tuple[str, ...] = ()
    headers: tuple[Literal["cuda", "cccl"], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    launch: tuple[Launch, ...] = ()
    variants: tuple[dict[str, Any], ...] = ()
    min_arch: int | None = None
    reference: str = ""
    tolerance: dict[str, float] = field(default_factory=dict)

    def bind(
        self, params: Mapping[str, Any] | None = None, environment: KernelEnvironment | None = None
    ) -> dict[str, Any]:
        """Return all parameters with their values, including defaults, in the manifest's order.

        Parameters
        ----------
        params : mapping, optional
            The parameters to set; the others have their defaults.
        environment : KernelEnvironment, optional
            The environment that evaluates the constraints; its bytecode cache, if any, keeps them compiled.

        Raises
        ------
        ParameterError
            If a parameter is unknown, missing, of the wrong type or not allowed, or a constraint doesn't hold.
        ManifestError
            If a constraint can't be evaluated.
        """
        bound = self.fill(params or {})
        for constraint in self.constraints:
            try:
                holds = evaluate(constraint.require, bound, environment)
                names = None if holds else expression_names(constraint.require)
            except TemplateError as error:
                raise ManifestError(f"kernel {self.name!r}, constraint {constraint.require!r}: {error}") from error
            if names is not None:
                values = ", ".join(f"{name} = {bound[name]!r}" for name in bound if name in names)
                raise ParameterError(
                    f"kernel {self.name!r}: {constraint.message} ({constraint.require} is false for {values})"
                )
        return bound

    def launches(
        self, params: Mapping[str, Any] | None = None, environment: KernelEnvironment | None = None
    ) -> tuple[Launch, ...]:
        """Return the launch of each entry point for these parameters, with numbers; empty if the manifest has none.

        Parameters
        ----------
        params, environment
            As for `bind`.

        Raises
        ------
        ParameterError
            As for `bind`.
        ManifestError
            If an expression can't be evaluated, or its value isn't an int in the range that a GPU can launch.
        """
        bound = self.bind(params, environment)
        found = tuple(self._evaluated(launch, bound, environment) for launch in self.launch)
        entries = len(self.entry_points) + len(self.name_expressions)
        return found * entries if len(found) == 1 else found

    def _evaluated(self, launch: Launch, bound: Mapping[str, Any], environment: KernelEnvironment | None) -> Launch:
        values = {}
        for name, (least, most) in LAUNCH_LIMITS.items():
            text = getattr(launch, name)
            where = f"kernel {self.name!r}, launch, {name} {text!r}"
            try:
                value = evaluate(text, bound, environment) if isinstance(text, str) else text
            except TemplateError as error:
                raise ManifestError(f"{where}: {error}") from error
            if type(value) is not int or not least <= value <= most:
                raise ManifestError(f"{where} is {value!r}, not an int from {least} to {most}")
            values[name] = value
        return Launch(**values)

    def fill(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters with their values, as `bind` does, without checking the constraints.

        Raises
        ------
        ParameterError
            As for `bind`.
        """
        for name in params:
            if name not in self.parameters:
                hint = did_you_mean(name, self.parameters, listing="it has") or "; it has none"
                raise ParameterError(f"kernel {self.name!r} has no parameter {name!r}{hint}")
        bound = {}
        for name, parameter in self.parameters.items():
            if name not in params:
                if parameter.default is None:
                    raise ParameterError(
                        f"kernel {self.name!r}: parameter {name!r} ({parameter.type}) has no default; give it"
                    )
                bound[name] = parameter.default
                continue
            try:
                bound[name] = parameter.check(params[name])
            except ParameterError as error:
                raise ParameterError(f"kernel {self.name!r}: {error}") from None
        return bound
