"""Writes the figures of `docs/energy.md` that come from a run, so that they cannot differ from what the code gives.

`python -m benchmarks.docs_figures output/firing/demo/report.json`   after `make demo`, which `make figures` does
`python -m benchmarks.docs_figures REPORT --check`                   only says whether the text is up to date

Each such figure stands in the text between `<!-- demo: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs" / "energy.md"
_MARKED = re.compile(r"<!-- demo: (?P<name>[a-z_]+) -->(?P<text>.*?)<!-- end -->", re.DOTALL)


def figures(report: dict[str, Any]) -> dict[str, str]:
    """The text of each marked place, from a report.json of the demo network."""
    layers = {row["name"]: row for row in report["energy"]["layers"]}
    rates = {row["name"]: row["mean_rate"] for row in report["tensors"]}
    sums = [row for name, row in layers.items() if name.endswith(".kv_sum")]
    by_formula, needed = (sum(row[key] for row in sums) for key in ("formula_operations", "exact_operations"))
    third = layers["patch_embed.proj_conv3"]
    fired, entered = rates["MS_SPS_lif2"], sum(third["rate"]) / len(third["rate"])
    spread = report["energy"]["per_sample"]
    energy, mean = spread["energy_pJ"], spread["energy_pJ"]["mean"]
    return {
        "token_sum": f"demo: {by_formula:.1f} against {needed:.1f} additions",
        "pool": f"demo: Conv3's neurons fire at {fired:.3f}, its pooled spikes enter the next conv at {entered:.3f}",
        "spread": (
            f"demo: {mean / 1e6:.2f} µJ per image, standard deviation {energy['sd'] / 1e6:.2f} µJ, from "
            f"{energy['minimum'] / mean:.0%} to {energy['maximum'] / mean:.0%} of the mean"
        ),
    }


def rewritten(text: str, found: dict[str, str]) -> str:
    """`text` with every marked place filled.

    Raises:
        KeyError: a mark without a figure.
    """
    return _MARKED.sub(lambda mark: f"<!-- demo: {mark['name']} -->{found[mark['name']]}<!-- end -->", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="report.json of the demo network")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if the text would change")
    arguments = parser.parse_args()
    before = DOCS.read_text()
    after = rewritten(before, figures(json.loads(arguments.report.read_text())))
    if not arguments.check:
        DOCS.write_text(after)
    print(f"{DOCS.name}: {'up to date' if after == before else 'differs' if arguments.check else 'rewritten'}")
    return int(arguments.check and after != before)


if __name__ == "__main__":
    sys.exit(main())
