# SPDX-License-Identifier: Apache-2.0
"""Suggestions of valid names for messages about misspelled ones."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most similar to `name`, or None if none is similar.

    Parameters
    ----------
    name : str
        The unknown name.
    candidates : iterable of str
        The valid names.

    Returns
    -------
    str or None
    """
    import difflib  # takes 5 ms, and only an error needs it

    choices = sorted(set(candidates))
    folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    if close:
        return folded[close[0]]
    # difflib's ratio is low for an abbreviation ("block" for "threads_per_block").
    short = name.casefold()
    return next((c for c in choices if len(short) >= 3 and (short in c.casefold() or c.casefold() in short)), None)


def did_you_mean(name: str, candidates: Iterable[str], *, listing: str = "valid") -> str:
    """Return the end of a message about an unknown `name`: the nearest candidate, or else up to 20 candidates.

    Parameters
    ----------
    name : str
        The unknown name.
    candidates : iterable of str
        The valid names.
    listing : str
        The word before the list of candidates if none is similar.

    Returns
    -------
    str
        ``"; did you mean 'block'?"``, ``"; valid: block, dtype"``, or ``""`` if there are no candidates.
    """
    choices = sorted(set(candidates))
    if not choices:
        return ""
    near = nearest(name, choices)
    if near is not None:
        return f"; did you mean {near!r}?"
    more = f" and {len(choices) - 20} more" if len(choices) > 20 else ""
    return f"; {listing}: {', '.join(choices[:20])}{more}"
