"""The largest batch per device that fits its memory, with and without rematerialisation."""

import dataclasses
from collections.abc import Callable
from typing import Any

from aatjax.analysis.plan import StepPlan, plan_step
from aatjax.analysis.topology import find_devices, find_memory
from aatjax.config import Config
from aatjax.io.host import measure_memory

MOST = 1 << 16  # clips per device


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The largest batch that fits, for one setting of rematerialisation.

    Attributes:
        remat: whether activations are recomputed in the backward pass.
        memory: bytes that a device has.
        per_device: clips per device and step; 0 where not even one fits.
        plan: of that batch; of a single clip where not even that fits.
        compiled: bytes that a device needs, by the clips per device that were compiled.
    """

    remat: bool
    memory: int
    per_device: int
    plan: StepPlan
    compiled: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_json()}


def search_largest(measure: Callable[[int], int], memory: int, most: int = MOST) -> int:
    """Return the largest count whose bytes fit, or 0; bytes must not fall as the count rises.

    Doubles the count until it does not fit, then narrows: by the straight line between the two
    nearest counts, as memory is nearly linear in the batch, and by halves in turn.

    Args:
        measure: returns the bytes that a count needs; called once per count.
        memory: bytes that there are.
        most: largest count to try.
    """
    found: dict[int, int] = {}
    low, high = 0, 1
    while (needed := measure(high)) <= memory:
        found[high] = needed
        if high >= most:
            return high
        low, high = high, min(2 * high, most)
    found[high] = needed
    is_line = True
    while high - low > 1:
        middle = (low + high) // 2
        if is_line and low:
            slope = (found[high] - found[low]) / (high - low)
            middle = low + int((memory - found[low]) / slope) if slope > 0 else middle
        is_line = not is_line
        middle = max(low + 1, min(high - 1, middle))
        found[middle] = measure(middle)
        if found[middle] <= memory:
            low = middle
        else:
            high = middle
    return low


def find_largest_batch(
    config: Config,
    topology: str,
    *,
    remat: bool,
    num_classes: int = 50,
    memory: int | None = None,
) -> LargestBatch:
    """Return the largest batch of a config whose train step fits the devices of a topology.

    Each size that is tried is compiled.

    Args:
        config: the experiment; its data is not read.
        topology: see `plan_step`.
        remat: whether activations are recomputed.
        num_classes: outputs of the head.
        memory: bytes of a device; by default those of the chip, or of this machine.
    """
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    devices, chip = find_devices(topology)
    memory = memory or find_memory(devices, chip) or measure_memory() // len(devices)
    plans: dict[int, StepPlan] = {}

    def measure(clips: int) -> int:
        plans[clips] = plan_step(
            config, topology, num_classes=num_classes, batch_per_device=clips, memory=memory
        )
        # The compiler refuses what is larger than the chip, whatever limit was given.
        return max(plans[clips].needed, memory + plans[clips].over if plans[clips].over else 0)

    count = search_largest(measure, memory)
    needed = {clips: plan.needed for clips, plan in sorted(plans.items())}
    return LargestBatch(remat, memory, count, plans[max(1, count)], needed)
