"""From bench/results/ to the tables and pictures of README.md and docs/."""
