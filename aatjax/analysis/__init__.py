"""Cost estimates without training: FLOPs, memory, traffic and step times of the methods."""
