"""The only place where SI numbers become text for people, and the other way round."""

import math

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_TIME = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def format_bytes(num_bytes: float) -> str:
    """Bytes in binary units, three significant digits.

    >>> format_bytes(1536), format_bytes(0), format_bytes(80 * 2**30)
    ('1.5 KiB', '0 B', '80 GiB')
    """
    if num_bytes == 0:
        return "0 B"
    power = min(int(math.log(abs(num_bytes), 1024)), len(_BINARY) - 1) if abs(num_bytes) >= 1 else 0
    value = num_bytes / 1024**power
    if abs(value) >= 999.5 and power + 1 < len(_BINARY):
        power += 1
        value = num_bytes / 1024**power
    return f"{value:.3g} {_BINARY[power]}"


def enough_bytes(num_bytes: float) -> str:
    """Bytes as `format_bytes` has them, but rounded up: whoever has so many has enough.

    >>> enough_bytes(1541), format_bytes(1541)
    ('1.51 KiB', '1.5 KiB')
    """
    if num_bytes < 1:
        return format_bytes(num_bytes)
    unit = 1024 ** min(int(math.log(num_bytes, 1024)), len(_BINARY) - 1)
    step = unit * 10.0 ** (math.floor(math.log10(num_bytes / unit)) - 2)
    # A hair less, lest what has three digits already gets another one.
    return format_bytes(step * math.ceil(num_bytes / step * (1 - 1e-12)))


def format_seconds(seconds: float) -> str:
    """Seconds with a readable unit, three significant digits.

    >>> format_seconds(0.0123), format_seconds(2e-6), format_seconds(90.0)
    ('12.3 ms', '2 us', '90 s')
    """
    if not math.isfinite(seconds):
        return str(seconds)
    for scale, unit in _TIME:
        if abs(seconds) >= scale * 0.9995:
            value = seconds / scale
            return f"{value:.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.3g} ns"


def format_rate(per_s: float, unit: str) -> str:
    """A rate with an SI prefix.

    >>> format_rate(312e12, "FLOP")
    '312 TFLOP/s'
    """
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(per_s) >= scale:
            return f"{per_s / scale:.3g} {prefix}{unit}/s"
    return f"{per_s:.3g} {unit}/s"


def format_percent(fraction: float) -> str:
    """A fraction as a percentage.

    >>> format_percent(0.0123)
    '1.23 %'
    """
    return f"{100 * fraction:.3g} %"
