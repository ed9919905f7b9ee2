"""Files, locks, archives, the Hugging Face Hub and signals; independent of sound."""
