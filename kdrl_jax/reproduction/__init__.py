"""The papers' comparisons as a grid of runs: methods, runner, statistics, claims, report."""
