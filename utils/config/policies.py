"""The words of an augmentation policy, as rand-m9-n1-mstd0.4-inc1.

timm, which builds the policies, leaves out parts that it cannot read; here they are refused.
"""

from __future__ import annotations

import re

from utils.errors import did_you_mean

_SHARE, _NUMBER = r"0(\.\d+)?|1(\.0+)?", r"\d{1,3}(\.\d+)?"
_WHOLE, _COUNT = r"\d{1,2}", r"[1-9]\d?"
# Of each policy the parts after its name, and which values they take.
_RAND = {"m": _WHOLE, "n": _COUNT, "p": _SHARE, "mstd": _NUMBER, "mmax": _WHOLE, "inc": "[01]", "t": "3a|3aw|weights"}
_AUGMIX = {"m": _WHOLE, "w": _COUNT, "d": _COUNT, "b": "[01]", "mstd": _NUMBER}
_AUTO = {name: {"mstd": _NUMBER} for name in ("original", "originalr", "v0", "v0r", "3a")}
_POLICIES = {"rand": _RAND, "augmix": _AUGMIX, **_AUTO}
_EXAMPLES = {
    **{"m": "m9 (strength)", "n": "n2 (operations)", "p": "p0.5 (probability)", "mstd": "mstd0.5 (spread of m)"},
    **{"mmax": "mmax10 (highest m)", "inc": "inc1 (stronger with m)", "t": "tweights or t3a (operations)"},
    **{"w": "w3 (width)", "d": "d2 (depth)", "b": "b1 (blend)"},
}


def why_no_policy(text: str) -> str:
    """What is wrong about a policy, to complete 'aa X', with the valid words; '' for a valid one, and for none."""
    if not text:
        return ""
    name, *parts = text.split("-")
    if name not in _POLICIES:
        return f"is not valid: {name!r} is no policy{did_you_mean(name, _POLICIES)}; valid: {', '.join(_POLICIES)}"
    known, seen = _POLICIES[name], set()
    for part in parts:
        key = next((key for key, values in known.items() if re.fullmatch(f"{key}({values})", part, re.ASCII)), None)
        if key is None or key in seen:
            problem = "is there twice" if key else f"is no part of {name}"
            return f"is not valid: {part!r} {problem}; valid: {', '.join(_EXAMPLES[key] for key in known)}"
        seen.add(key)
    return ""
