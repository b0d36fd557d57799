"""Evaluation of a policy on benchmarks: what is asked, how answers are counted, what is written."""
