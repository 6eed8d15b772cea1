# SPDX-License-Identifier: Apache-2.0
"""What the record of a compile says of the program, as people know it."""

from __future__ import annotations

from collections.abc import Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def rendered_kernel(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The library kernel that a program is, or is a module of: ``name``, ``parameters``; empty where it is neither."""
    found: Mapping[str, Any] = record.get("kernel") or record.get("part_of") or {}
    return found


def program_name(record: Mapping[str, Any]) -> str:
    """What people know a program by: the library kernel's name, else the program's."""
    kernel = record.get("kernel") or {}
    return str(kernel.get("name") or record.get("name") or "-")


def variant_text(record: Mapping[str, Any]) -> str:
    """What tells a program from others of its name: parameters of a kernel; else name expressions and options."""
    kernel = rendered_kernel(record)
    if kernel:
        words = [f"{name}={value}" for name, value in (kernel.get("parameters") or {}).items()]
        return " ".join([*words, *([f"module={kernel['module']}"] if "module" in kernel else [])])
    return " ".join([*names_of(record), *options_of(record)])


def names_of(record: Mapping[str, Any]) -> list[str]:
    """A program's name expressions."""
    return [value.partition(":")[2] for value in components(record, "name_expression")]


def options_of(record: Mapping[str, Any]) -> list[str]:
    """A program's options as flags, without the architecture."""
    return [flag.replace("\0", " ") for flag in components(record, "option") if not flag.startswith("-arch")]


def components(record: Mapping[str, Any], label: str) -> list[str]:
    """The components of a program's key that have this label."""
    return [str(value) for name, value in record.get("components") or () if name == label]
