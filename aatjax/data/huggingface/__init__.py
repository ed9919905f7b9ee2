"""Data sets of the Hugging Face Hub, read from their files without the `datasets` library."""
