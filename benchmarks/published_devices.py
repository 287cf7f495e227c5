"""From the words of published tables to devices and networks of the catalogue."""

import re
from difflib import get_close_matches

from graphpar import catalogue
from graphpar.cost_models.communication import Network

NETWORK_PER_DEVICE = {
    "V100": 3.125e9, "A100": 25e9, "A800": 25e9, "H100": 50e9, "H800": 50e9, "H20": 50e9, "H200": 50e9,
    "GH200": 50e9, "B200": 50e9, "B300": 100e9, "GB200": 50e9, "GB300": 100e9,
    "MI300X": 50e9, "MI325X": 50e9, "MI355X": 50e9,
}  # fmt: skip
"""Usual network per device of that generation's reference design, where a row does not state it."""

_DEVICE_WORDS = (
    ("GB200", "gb200"), ("GB300", "gb300"), ("B200", "b200-sxm"), ("B300", "b300-sxm"),
    ("GH200", "gh200-96gb"), ("H200", "h200-sxm-141gb"), ("H20", "h20-sxm-96gb"),
    ("96GB-HBM2e", "h100-sxm-96gb-hbm2e"),
    (r"H100.*PCIe", "h100-pcie-80gb"), (r"H100.*NVL", "h100-nvl-94gb"), ("H100", "h100-sxm-80gb"),
    (r"A100.*40 ?G.*PCIe", "a100-pcie-40gb"), (r"A100.*PCIe.*40", "a100-pcie-40gb"),
    (r"A100.*PCIe", "a100-pcie-80gb"), (r"A100.*\b40 ?G", "a100-sxm-40gb"), ("A100", "a100-sxm-80gb"),
    ("SXM3", "v100-sxm3-32gb"), ("RTX ?8000", "rtx-8000"), ("6000 ?Ada", "rtx-6000-ada"),
    ("Quadro RTX ?6000", "rtx-6000"), ("Quadro RTX ?5000", "quadro-rtx-5000"),
    ("1080 ?Ti", "gtx-1080-ti"),
    (r"V100.*PCIe.*16", "v100-pcie-16gb"), (r"V100.*16", "v100-sxm2-16gb"),
    ("V100S", "v100s-pcie-32gb"), (r"V100.*PCIe", "v100-pcie-32gb"),
    ("V100", "v100-sxm2-32gb"), ("A6000", "rtx-a6000"), ("A10G", "a10g"), (r"A10\b", "a10"),
    (r"A40\b", "a40"), ("A30", "a30"), ("L40S", "l40s"), (r"L4\b", "l4"), (r"T4\b", "t4"),
    ("3090", "rtx-3090"), ("4090", "rtx-4090"), ("5090", "rtx-5090"), ("2080 ?Ti", "rtx-2080-ti"),
    ("A800", "a800-sxm-80gb"), ("H800", "h800-sxm-80gb"), ("P100", "p100-sxm2-16gb"),
    ("titan ?rtx", "titan-rtx"), ("3080 ?Ti", "rtx-3080-ti"), ("3080", "rtx-3080"),
    ("A5000", "rtx-a5000"), ("L40", "l40"), ("titan v", "titan-v"),
    ("MI300X", "mi300x"), ("MI325X", "mi325x"), ("MI355X", "mi355x"), ("MI250", "mi250x"),
    ("MI210", "mi210"), ("MI100", "mi100"), ("A4000", "rtx-a4000"),
    ("A4500", "rtx-a4500"), ("A5500", "rtx-a5500"), ("5000 Ada", "rtx-5000-ada"), ("L20", "l20"),
    ("4080", "rtx-4080"), ("3070", "rtx-3070"), ("2080", "rtx-2080"),
)  # fmt: skip


CARDS_OF_DIES = {"mi250x": 4}
"""Most cards in a node of those that are two devices each."""

VENDORS = ("NVIDIA", "AMD")
"""Whose devices run what the training model describes: kernels, streams, rings of collectives."""

VARIANT_WORDS = ("ti", "super", "nvl", "pcie", "d", "max")
"""Words of a name that tell a variant of a card; what stands for it should have them too."""

ALIKE = 0.8
"""How much of a name two variants of one device share at least ("MI300A", "MI300X")."""

MEMORY_RANGE = (0.4, 1.6)
"""A variant's memory over the catalogue's; a name that states more states the host's ("GH200 480GB")."""


def device_of(name: str) -> tuple[str, float, str]:
    """The catalogue's kind for a GPU's name, its memory where the name states another, and a remark.

    Raises:
        ValueError: If the catalogue has no such GPU, nor a variant of it.
    """
    known = catalogue.devices()
    remark = ""
    # Drivers say "A100-PCIE-40GB" and "H100 PCIe"; tables write names in any case.
    words = (k for pattern, k in _DEVICE_WORDS if re.search(pattern, name, re.IGNORECASE))
    kind = next((k for k in words if k in known), None)
    if kind is None:
        kind = _variant(name)
        if kind is None:
            raise ValueError(f"device {name!r} is not in the catalogue")
        names = {catalogue.normalize(a) for a in (kind, *known[kind].aliases)}
        if catalogue.normalize(name) not in names:
            remark = f"{name!r} is not in the catalogue; {kind} stands for it"
    if known[kind].vendor not in VENDORS or known[kind].is_cpu:
        raise ValueError(f"device {name!r} is no GPU; only those are predicted without a graph")
    own = " ".join((kind, *known[kind].aliases))
    others = [w for w in VARIANT_WORDS if _has_word(name, w) and not _has_word(own, w)]
    if others and not remark:
        remark = f"{name!r} is taken for {kind}, which is not {' '.join(others)}"
    stated = re.search(r"(\d+)\s*G(?:[Bi]|\b)", name)
    memory = float(stated[1]) * 2**30 if stated else 0.0
    low, high = (share * known[kind].memory_bytes for share in MEMORY_RANGE)
    other = low < memory < high and memory != known[kind].memory_bytes
    return kind, memory if other else 0.0, remark


def _has_word(text: str, word: str) -> bool:
    """Whether a word stands in a text, be it written with what is before it ("3080Ti").

    >>> _has_word("RTX 3080Ti", "ti"), _has_word("Titan V", "ti")
    (True, False)
    """
    return re.search(rf"(?<![a-z]){word}(?![a-z0-9])", text.lower()) is not None


NO_NVLINK = (
    r"\b(no|without)\s+(\w+\s+)?nvlink|"
    r"nvlink\W{0,2}((is|was)\s+)?\b(off|disabled|unused|not (used|installed|present|available))\b"
)


def link_of(words: str, kind: str) -> str:
    """The link inside a node: as words such as "PCIe Gen5" or "no NVLink" say, else the device's.

    >>> [link_of(words, "rtx-a6000") for words in ("", "PCIe Gen3 x16", "no NVLink")]
    ['nvlink3-bridge', 'pcie3', 'pcie4']
    """
    words = words.lower()
    own = catalogue.devices()[kind].link
    if "nvswitch" in words and own == "nvlink2":
        return "nvlink2-nvswitch"
    if re.search(NO_NVLINK, words) is None and ("pcie" not in words or "nvlink" in words):
        return own
    generation = re.search(r"pcie\D{0,8}([3-6])", words)
    bus = own if own.startswith("pcie") else catalogue.links()[own].beyond_pairs
    return f"pcie{generation[1]}" if generation else bus or "pcie4"


def die_of(kind: str, per_node: int) -> str:
    """One die of a card with two, where that is what a table counts: no node holds eight such cards.

    >>> die_of("mi250x", 8), die_of("mi250x", 4), die_of("a100-sxm-80gb", 8)
    ('mi250x-gcd', 'mi250x', 'a100-sxm-80gb')
    """
    return f"{kind}-gcd" if per_node >= CARDS_OF_DIES.get(kind, per_node + 1) * 2 else kind


def _variant(name: str) -> str | None:
    """The kind whose name is nearly this one, with the same first number, or nothing."""
    wanted = catalogue.normalize(name)
    names = {catalogue.normalize(a): k for k, d in catalogue.devices().items() for a in (k, *d.aliases)}
    near = get_close_matches(wanted, names, 1, ALIKE)
    numbers = [re.findall(r"\d+", text)[:1] for text in (wanted, *near)]
    # Without a number nothing tells Titan Xp from Titan RTX, a generation and tensor cores apart.
    alike = near[:1] == [wanted] or (numbers[0] and numbers[:1] == numbers[1:])
    return names[near[0]] if alike else None


NAMED_NETWORKS = (
    ("hdr100", 100), ("xdr", 800), ("ndr", 400), ("hdr", 200), ("edr", 100), ("fdr", 56), ("omni", 100),
    ("slingshot", 200),
)  # fmt: skip
"""Gbit/s of one port by the generation's name."""

TIMES_BEFORE = r"(\d+)\s*(?:[x×*](?![a-z])|(?:nics?|hcas?|ports?|cards?|rails?|adapters?)\b)"
TIMES_AFTER = r"(?<![a-z])[x×*]\s*(\d+)\b(?!\s*[gtm])"
"""How many ports: "8x200Gb/s", "4 HCAs of", "200 Gb/s x8"."""

OMNI_PATH_SHARE = 0.41
"""Omni-Path leaves the protocol and the copies to the host's processor. So much of 4 x 100 Gbit/s
was left to the sums of gradients, those of the table that two stages share too, of BLOOM's runs with
512 to 2048 samples, whose times lie on a line that begins at 3.8 s
(bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md)."""

BITS_PER_S = {"gb": 1e9, "tb": 1e12, "mb": 1e6}


def network_of(text: str, device: str, per_node: int) -> Network:
    """A node's network from words such as "8x200Gb/s HDR IB per node" or "400Gb/s RDMA per GPU".

    >>> network_of("8x200Gb/s HDR IB per node", "a100-sxm-80gb", 8).node_bytes_per_s
    200000000000.0
    >>> network_of("3.2 Tb/s EFA", "h100-sxm-80gb", 8).node_bytes_per_s
    400000000000.0
    >>> network_of("25 GB/s", "a100-sxm-80gb", 8).node_bytes_per_s
    25000000000.0
    """
    words = text.lower()
    share = OMNI_PATH_SHARE if "omni" in words else 1.0
    times = re.search(TIMES_BEFORE, words) or re.search(TIMES_AFTER, words)
    # A port per device, each of the stated rate, or so many cards.
    per_device = re.search(r"per (gpu|device|accelerator)", words) is not None
    cards = per_node if per_device else int(times[1]) if times else 1
    rate = re.search(r"(\d+(?:\.\d+)?)\s*([GTM])(?:(b|B|[bB]it)|\b)", text)
    if rate is not None:
        bits = 1 if rate[3] != "B" else 8
        each = float(rate[1]) * BITS_PER_S[rate[2].lower() + "b"] * bits / 8
        return Network(cards * each, host_share=share)
    named = next((gbit for name, gbit in NAMED_NETWORKS if name in words), None)
    if named is not None and (times or per_device):
        return Network(cards * named * 1e9 / 8, host_share=share)
    short = device.split("-")[0].upper()
    return Network(NETWORK_PER_DEVICE.get(short, 12.5e9) * per_node)
