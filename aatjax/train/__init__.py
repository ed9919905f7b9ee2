"""Training of what is trainable: steps, loop, checkpoints, sharding and evaluation."""
