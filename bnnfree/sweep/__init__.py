"""Sweeps: many trainings over a grid of recipe keys, and tables of their results.

file (the sweep's YAML), grid (its axes), formula (values computed from others), workers (processes that train),
run_folder (what a run left), tables.
"""
