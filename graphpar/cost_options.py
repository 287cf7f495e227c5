"""What is asked of a cost model: the job that it prices, and what stages may choose."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PricingOptions:
    """What a cost model has to know besides the graph and the cluster.

    Attributes:
        batch: Samples in one global batch.
        training: Whether there is a backward pass and an optimiser.
        precision: Format that float32 values are computed in.
        optimizer_state_bytes_per_parameter_byte: 0 for plain SGD, 1 with momentum, 2 for Adam.
        update_share: Bytes that the optimiser's update takes for a while on a GPU, per byte of
            gradients: 1 for Adam as torch runs it there, 0 for SGD.
        update_copies: The same per byte of the largest parameter, where the update goes one by one.
        cpu_update_share: As `update_share`, on a processor.
        cpu_update_copies: As `update_copies`, on a processor.
        max_microbatches: 1 where samples mix and the batch must stay whole, or pipelines go in step.
        max_replicas: 1 where samples mix and the batch must stay whole.
        batch_reason: Why the batch may not be split, for people.
        tail_reason: What needs the whole batch after all forwards, for people; empty for nothing.
        in_step_reason: What needs sums over the whole batch within the model, for people.
        clips_gradients: Whether gradients are clipped by their global norm before the optimiser.
    """

    batch: int
    training: bool
    precision: str = "float32"
    optimizer_state_bytes_per_parameter_byte: float = 2.0
    update_share: float = 1.0
    update_copies: float = 0.0
    cpu_update_share: float = 0.0
    cpu_update_copies: float = 0.0
    max_microbatches: int = 64
    max_replicas: int = 64
    batch_reason: str = ""
    tail_reason: str = ""
    in_step_reason: str = ""
    clips_gradients: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "max_microbatches", "max_replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.optimizer_state_bytes_per_parameter_byte < 0:
            raise ValueError("optimizer_state_bytes_per_parameter_byte must not be negative.")
        for name in ("update_share", "update_copies", "cpu_update_share", "cpu_update_copies"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative.")


@dataclass(frozen=True)
class StageOptions:
    """What stages may choose besides the plain mode of each device class.

    Attributes:
        recompute: Whether a stage may keep only what enters its units and compute the rest again.
        zero: ZeRO levels besides 0.
        tensor_widths: Sizes of tensor groups of equal devices besides 1.
    """

    recompute: bool = False
    zero: tuple[int, ...] = ()
    tensor_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not set(self.zero) <= {1, 2, 3}:
            raise ValueError(f"zero={self.zero}: ZeRO levels are 1, 2 and 3 (0 is always allowed).")
        if any(t < 2 for t in self.tensor_widths):
            raise ValueError(f"tensor_widths={self.tensor_widths}: groups have at least 2 members.")
