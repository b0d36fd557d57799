"""Procedural tasks: problems with answers and worked solutions, made from a seed."""
