"""A trace of some training steps by `jax.profiler`, for TensorBoard, XProf or Perfetto."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"


@dataclasses.dataclass
class StepTrace:
    """Traces the steps from `first` to `last`, both counted from 1, into a folder.

    Attributes:
        running: whether the trace has begun.
    """

    folder: Path
    first: int
    last: int
    running: bool = False

    def begin(self, step: int) -> None:
        """Start the trace where this is its first step, or one after it in a run that goes on."""
        if not self.running and self.first <= step <= self.last:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def end(self, step: int, result: Any) -> bool:
        """Wait for the last step and stop the trace; return whether it was that one."""
        if not self.running or step < self.last:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Stop the trace if it is running, as where the run ends before its last step."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
