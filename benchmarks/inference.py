"""One evaluation forward pass, dense; plain against ours, with BatchNorm folded and without.

    python -m benchmarks.inference --size cifar --candidates plain:fp32 ours:fp32 ours:fp32:fuse ours:bf16:fuse

Measured as in benchmarks/train_step.py.
"""

from __future__ import annotations

from benchmarks import compare
from benchmarks.candidates import Candidate


def main() -> None:
    args = compare.options(__doc__, ["plain:fp32", "ours:fp32", "ours:fp32:fuse", "ours:bf16:fuse"]).parse_args()
    compare.run("benchmarks.inference", args, lambda name: Candidate(name).evaluation, passes=1)


if __name__ == "__main__":
    main()
