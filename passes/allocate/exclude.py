"""`--exclude` patterns: exact node or tensor names, globs over them, and `type:Op`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.passes.allocate.survey import Candidate

TYPE_PREFIX = "type:"


def excluded_by(candidates: Sequence[Candidate], patterns: Sequence[str]) -> dict[str, str]:
    """Which candidates the patterns exclude.

    Returns:
        tensor name -> the pattern that matched it.

    Raises:
        UsageError: when a pattern matches nothing; lists all such patterns and the nearest names.
    """
    hits: dict[str, str] = {}
    missed: list[str] = []
    for pattern in patterns:
        matched = [candidate.tensor for candidate in candidates if _matches(candidate, pattern)]
        if not matched:
            missed.append(pattern)
        hits.update((name, pattern) for name in matched if name not in hits)
    if missed:
        raise UsageError(
            "exclude matches no quantizable weight",
            got=", ".join(repr(pattern) for pattern in missed),
            remedy=_remedy(missed[0], candidates),
        )
    return hits


def _matches(candidate: Candidate, pattern: str) -> bool:
    if pattern.startswith(TYPE_PREFIX):
        return any(node.op_type == pattern[len(TYPE_PREFIX) :] for node in candidate.nodes)
    names = [candidate.tensor, *(node.name or "" for node in candidate.nodes)]
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)


def _remedy(pattern: str, candidates: Sequence[Candidate]) -> str:
    if pattern.startswith(TYPE_PREFIX):
        types = sorted({node.op_type for candidate in candidates for node in candidate.nodes})
        return catalog.nearest(pattern, [TYPE_PREFIX + op for op in types])
    names = [candidate.tensor for candidate in candidates]
    names += [node.name or "" for candidate in candidates for node in candidate.nodes]
    return catalog.nearest(pattern, names)
