"""Files, locks, archives, the Hugging Face Hub, signals and the host; independent of sound."""
