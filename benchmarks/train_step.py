"""One training step: forward, loss, backward, AdamW's update; plain against ours.

    python -m benchmarks.train_step --size cifar --candidates plain:fp32 ours:fp32 ours:bf16

plain: this model as the published implementation computes it (benchmarks/plain.py). ours: the model as it is. Steps
are interleaved in this process; the speed-up is the median of the ratios of the rounds, with quartiles. Memory is
the peak of two steps in a child process, less what its libraries take. GFLOP/s counts three forward passes' worth
of convolutions per step, whatever a candidate really computes. Candidates: see benchmarks/candidates.py.
"""

from __future__ import annotations

from benchmarks import compare
from benchmarks.candidates import Candidate


def main() -> None:
    args = compare.options(__doc__, ["plain:fp32", "ours:fp32", "ours:bf16"]).parse_args()
    compare.run("benchmarks.train_step", args, lambda name: Candidate(name).training_step, passes=3)


if __name__ == "__main__":
    main()
