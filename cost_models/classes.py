"""What a table of costs has rows and columns for: kinds of devices, and sizes of microbatches."""

from graphpar.cluster import Cluster, Device
from graphpar.cost import DeviceClass
from graphpar.cost_options import PricingOptions

MAX_SIZES = 24


def device_classes(cluster: Cluster) -> tuple[DeviceClass, ...]:
    """Devices that cost the same, in order of first appearance."""
    groups: dict[tuple[object, ...], list[Device]] = {}
    for device in cluster.devices:
        # Kinds described in place may share a name.
        peaks = tuple(sorted(device.peak_flops_per_s.items()))
        own = (device.kind, device.family, device.is_cpu, device.memory_bytes_per_s, peaks)
        key = (*own, device.slowdown, device.memory_bytes, device.threads)
        groups.setdefault(key, []).append(device)
    return tuple(
        DeviceClass(_class_name(g[0]), tuple(d.name for d in g), float(g[0].memory_bytes))
        for g in groups.values()
    )


def _class_name(device: Device) -> str:
    return device.kind + (f" x{device.slowdown:g} slower" if device.slowdown != 1 else "")


def microbatch_sizes(options: PricingOptions) -> tuple[int, ...]:
    """Sizes at which costs are tabulated: those that equal splits of the batch can have.

    >>> microbatch_sizes(PricingOptions(batch=6, training=True))
    (1, 2, 3, 6)
    >>> microbatch_sizes(PricingOptions(batch=6, training=True, max_microbatches=1, max_replicas=1))
    (6,)
    """
    if options.max_microbatches == 1 and options.max_replicas == 1:
        return (options.batch,)
    batch = options.batch
    wanted = sorted({-(-batch // m) for m in range(1, batch + 1)} | {1, batch})
    if len(wanted) <= MAX_SIZES:
        return tuple(wanted)
    # Small sizes lie close together and matter most; keep them, then thin out geometrically.
    kept, last = [], 0.0
    ratio = (wanted[-1] / wanted[0]) ** (1 / (MAX_SIZES - 2))
    for size in wanted:
        if size >= last * ratio or size == batch:
            kept.append(size)
            last = size
    return tuple(kept)
