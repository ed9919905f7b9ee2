"""Files, locks, archives, the Hugging Face Hub and signals; knows nothing of sound."""
