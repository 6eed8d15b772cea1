# SPDX-License-Identifier: Apache-2.0
"""Library kernels whose logs have what ``ptxas -v`` says."""

from __future__ import annotations

from typing import Any

from cuda_progcache._util.fields import replace
from cuda_progcache.service.kernel_unit import KernelUnit

VERBOSE = ("-v",)


class VerboseUnit(KernelUnit):
    """A library kernel whose log has what ``ptxas -v`` says; its code is that of the kernel as it is served."""

    def __init__(self, rendered: Any, arch: str) -> None:
        if len(rendered.modules) == 1 and rendered.spec.code_type == "c++":
            options = {**rendered.spec.options, "ptxas_options": VERBOSE}
            rendered = replace(rendered, spec=replace(rendered.spec, options=options))
        super().__init__(rendered, arch)

    def _link_options(self) -> Any:
        return replace(super()._link_options(), ptxas_options=VERBOSE)
