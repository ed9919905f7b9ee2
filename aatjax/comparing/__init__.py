"""Methods side by side on one data set: the grid of runs, its statistics, tables and pictures."""
