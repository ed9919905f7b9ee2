"""Synthetic environmental sounds: a labelled data set that needs no download."""
