"""Rows of published tables made regular: every group present, every number a number, every doubt said.

Tables are transcribed by hand. A number may stand as text ("2,048"), a count may be zero or missing, the
widths may not multiply to the devices. What can be told is put right; what cannot is left out, so that
the reader's defaults apply; either way a remark says so.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml
from published_models import is_gated

GROUPS = ("model", "hardware", "parallel", "batch", "measured")

COUNTS = {
    "model": ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq_len"),
    "hardware": ("gpus_per_node", "count", "nodes"),
    "parallel": ("tp", "pp", "dp", "cp", "ep", "etp", "virtual_stages", "plan_gpus"),
    "batch": (),
    "measured": (),
}
"""Whole numbers of at least one."""

AMOUNTS = {
    "model": ("params_b",),
    "hardware": (),
    "parallel": (),
    "batch": ("global_batch", "micro_batch", "local_batch", "grad_accum"),
    "measured": (
        "step_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "samples_per_s", "tflops_per_gpu",
        "mem_gib", "mem_gb",
    ),
}  # fmt: skip
"""Numbers above zero."""

FLAGS = (
    ("model", "gated_mlp"), ("model", "tied_embeddings"), ("parallel", "sequence_parallel"),
    ("parallel", "compile"), ("parallel", "async_tp"), ("parallel", "cpu_offload"), ("measured", "oom"),
)  # fmt: skip
"""Said or not; text such as "no" says not, such as "unknown" nothing."""

DENIALS = frozenset({"0", "false", "no", "none", "off", "disabled"})
UNSAID = frozenset({"", "-", "n/a", "unknown", "not stated"})

MOE_COUNTS = ("experts", "topk", "moe_ffn", "ffn", "shared_experts", "q_lora", "kv_lora")

LARGEST_COUNT = 10**7
LARGEST_NODE = 1024
SMALLEST_AMOUNT, LARGEST_AMOUNT = 1e-9, 1e15
"""Beyond these a number is a slip of the pen: no step, rate, model or cluster is so large or so small."""

SUFFIXES = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}


def rows_of(path: Path) -> list[Any]:
    """The rows of a table's file.

    Raises:
        SystemExit: If it cannot be read, is no YAML, or holds no list `rows`.
    """
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"{path} cannot be read as a table: {error}") from error
    rows = table.get("rows") if isinstance(table, dict) else table
    if not isinstance(rows, list):
        raise SystemExit(f"{path} is no table: a list `rows` with one mapping for each run is needed")
    return rows


def cleaned(given_row: Any) -> tuple[dict[str, Any], list[str]]:
    """The row in regular form, and what had to be changed or assumed.

    >>> row, remarks = cleaned({"id": "x", "model": {"hidden": "2,048"}, "hardware": {"count": 0}})
    >>> row["model"]["hidden"], row["hardware"].get("count"), remarks
    (2048, None, ['hardware.count is 0, which says nothing'])
    """
    remarks: list[str] = []
    row = given_row if isinstance(given_row, dict) else {}
    found: dict[str, Any] = {**row, "id": str(row.get("id", "?")), "set": str(row.get("set", "?"))}
    found["source"] = row["source"] if isinstance(row.get("source"), dict) else {}
    for group in GROUPS:
        given = row.get(group)
        found[group] = dict(given) if isinstance(given, dict) else {}
        for key in COUNTS[group]:
            _settle(found[group], key, f"{group}.{key}", remarks, whole=True)
        for key in AMOUNTS[group]:
            _settle(found[group], key, f"{group}.{key}", remarks, whole=False)
    for group, key in FLAGS:
        if isinstance(found[group].get(key), str):
            words = found[group].pop(key).strip().lower()
            found[group] |= {} if words in UNSAID else {key: words not in DENIALS}
    _count_devices(found["hardware"], remarks)
    found["model"]["name"] = str(found["model"].get("name"))
    if found["hardware"].get("gpus_per_node", 0) > LARGEST_NODE:
        remarks.append(f"hardware.gpus_per_node is {found['hardware'].pop('gpus_per_node')}, too many")
    _clean_experts(found["model"], remarks)
    _clean_zero(found["parallel"], remarks)
    _fill_shape(found["model"], remarks)
    _match_widths(found, remarks)
    return found, remarks


def number(value: Any) -> float | None:
    """A number, from text too; None of anything else.

    >>> number("2,048"), number("1.5k"), number("A100"), number(True), number(10**400), number("1e999")
    (2048.0, 1500.0, None, None, None, None)
    """
    if isinstance(value, bool) or value is None:
        return None
    try:
        found = float(value) if isinstance(value, int | float) else _from_text(str(value))
    except OverflowError:
        return None
    return found if found is not None and math.isfinite(found) else None


def _from_text(text: str) -> float | None:
    found = re.fullmatch(r"\s*([\d,]*\.?\d+(?:[eE][+-]?\d+)?)\s*([kKmMbBgG]?)\s*", text)
    return float(found[1].replace(",", "")) * SUFFIXES[found[2].lower()] if found else None


def _settle(group: dict[str, Any], key: str, name: str, remarks: list[str], *, whole: bool) -> None:
    """A number in place of what stands there, or nothing where it says nothing."""
    given = group.get(key)
    if given is None:
        group.pop(key, None)
        return
    value = number(given)
    least, most = (1, LARGEST_COUNT) if whole else (SMALLEST_AMOUNT, LARGEST_AMOUNT)
    if value is None or not least <= value <= most:
        del group[key]
        remarks.append(f"{name} is {given!r}, which says nothing")
        return
    group[key] = round(value) if whole else value


def _count_devices(hardware: dict[str, Any], remarks: list[str]) -> None:
    """As many as all nodes have, where a row does not state them."""
    nodes, each = hardware.get("nodes"), hardware.get("gpus_per_node")
    if not hardware.get("count") and nodes and each:
        hardware["count"] = nodes * each
        remarks.append(f"hardware.count is not stated; {nodes} nodes of {each} are {nodes * each}")


def _clean_experts(model: dict[str, Any], remarks: list[str]) -> None:
    moe = model.get("moe")
    if not isinstance(moe, dict):
        model.pop("moe", None)
        return
    moe = dict(moe)
    for key in MOE_COUNTS:
        if moe.get(key) == 0:
            del moe[key]
        _settle(moe, key, f"model.moe.{key}", remarks, whole=True)
    moe["dense_layers"] = min(round(number(moe.get("dense_layers")) or 0), model.get("layers", 0))
    if not moe.get("experts") or not moe.get("topk"):
        remarks.append("experts without their number or choice are taken for a dense feed-forward")
        del model["moe"]
        return
    moe["topk"] = min(moe["topk"], moe["experts"])
    model["moe"] = moe


def _clean_zero(parallel: dict[str, Any], remarks: list[str]) -> None:
    """A stage of ZeRO from words such as "stage 3"."""
    given = parallel.get("zero")
    if given is None:
        return
    digits = re.search(r"[0-3]", str(given))
    if digits is None or isinstance(given, bool):
        remarks.append(f"parallel.zero is {given!r}, which says nothing")
        del parallel["zero"]
    else:
        parallel["zero"] = int(digits[0])


def _fill_shape(model: dict[str, Any], remarks: list[str]) -> None:
    """What follows from layers and hidden size by the usual proportions."""
    if not model.get("layers") or not model.get("hidden"):
        return
    hidden, gated = model["hidden"], is_gated(model)
    usual = {
        "heads": max(hidden // 128, 1),
        "kv_heads": model.get("heads") or max(hidden // 128, 1),
        "ffn": round(8 * hidden / 3 / 256) * 256 if gated else 4 * hidden,
        "seq_len": 2048,
        "vocab": 128256 if gated or model.get("moe") else 50304,
    }
    for key, value in usual.items():
        if not model.get(key):
            model[key] = value
            if key != "kv_heads":
                remarks.append(f"model.{key} is not stated; {value} assumed")


def _match_widths(row: dict[str, Any], remarks: list[str]) -> None:
    """A data-parallel width that fits the devices, and no groups of experts that do not fit a stage's."""
    parallel, count = row["parallel"], row["hardware"].get("count")
    if parallel.get("plan_gpus"):
        return
    dp, stages = parallel.get("dp"), parallel.get("pp") or 1
    others = math.prod(parallel.get(key) or 1 for key in ("tp", "cp"))
    if count and dp and others * stages * dp != count:
        if count % (others * stages) == 0:
            parallel["dp"] = count // (others * stages)
            remarks.append(f"dp {dp} does not fit {count} devices; {parallel['dp']} assumed")
        else:
            remarks.append(f"the widths make {others * stages * dp} devices, and {count} are stated")
    dp = parallel.get("dp") or max((count or 1) // (others * stages), 1)
    experts = (parallel.get("ep") or 1) * (parallel.get("etp") or 1)
    if (others * dp) % experts:
        remarks.append(f"experts in groups of {experts} do not fit the {others * dp} devices of a stage")
        parallel.pop("ep", None)
        parallel.pop("etp", None)
