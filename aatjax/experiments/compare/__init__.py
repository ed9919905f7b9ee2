"""Comparison of methods on one data set: runs, statistics, tables."""
