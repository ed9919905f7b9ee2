"""The Audio Spectrogram Transformer and its position grids."""
