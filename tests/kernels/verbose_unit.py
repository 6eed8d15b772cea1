# SPDX-License-Identifier: Apache-2.0
"""Library kernels whose compile logs contain the output of ``ptxas -v``."""

from __future__ import annotations

from typing import Any

from cuda_progcache._util.fields import replace
from cuda_progcache.service.kernel_unit import KernelUnit

VERBOSE = ("-v",)


class VerboseUnit(KernelUnit):
    """A library kernel whose log contains the output of ``ptxas -v``; its code is that of the served kernel."""

    def __init__(self, rendered: Any, arch: str) -> None:
        if len(rendered.modules) == 1 and rendered.spec.code_type == "c++":
            options = {**rendered.spec.options, "ptxas_options": VERBOSE}
            rendered = replace(rendered, spec=replace(rendered.spec, options=options))
        super().__init__(rendered, arch)

    def _link_options(self) -> Any:
        return replace(super()._link_options(), ptxas_options=VERBOSE)
