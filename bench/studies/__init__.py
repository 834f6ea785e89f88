"""One question each, asked once: scripts whose answers are in docs/ and bench/results/."""
