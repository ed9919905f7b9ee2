"""Comparison of methods on one data set: the grid of runs, its statistics, tables and plots."""
