"""The coverage harness: any architecture by name, failures and hangs of one leave the others alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from coverage_model import build_tiny  # noqa: E402 - benchmarks are no package
from coverage_run import without_folders  # noqa: E402
from tiny_configs import tiny_config, with_dropout, without_randomness  # noqa: E402
from tiny_scale import STYLES  # noqa: E402

from graphpar.hf.architectures import find_architecture, head_classes  # noqa: E402


def rows(*arguments: str) -> list[dict[str, Any]]:
    """What the harness prints for these arguments, and nothing else."""
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_architectures_of_every_sort_pass_whatever_happens_to_others() -> None:
    """Over three workers, and over two unlike pipelines side by side, the longer one of two stages;
    ProphetNet picks across samples, whose batch has to stay whole.
    """
    names = ["T5", "CLIP", "ProphetNet"]
    unknown, *found = rows("--workers", "3", "NoSuchModel", *names)
    assert (unknown["name"], unknown["status"], unknown["stage"]) == ("NoSuchModel", "fail", "model")
    assert "has no architecture 'NoSuchModel'" in unknown["reason"]
    assert not {row["name"]: row["reason"] for row in found if row["status"] != "pass"}
    assert [(row["name"], row["stage"]) for row in found] == [(name, "done") for name in names]
    assert [row["name"] for row in found if row["side_by_side"]] == ["T5", "CLIP"]
    assert all(row["seconds"] > 0 and set(row["stages"]) == {3} for row in found)
    assert found[0]["modes"] == ["eval", "train", "dropout"] and found[0]["max_error"] < 1e-5


@pytest.mark.slow
def test_one_that_takes_too_long_fails_and_the_next_goes_on() -> None:
    found = rows("--time-limit", "0.01", "Llama", "Bert")
    assert [row["status"] for row in found] == ["fail", "fail"]
    assert all("no end after" in row["reason"] for row in found)


def test_rows_tell_nothing_of_where_packages_are_kept() -> None:
    file = torch.__file__
    assert without_folders(f"at (Attention), {file}:19: no") == "at (Attention), torch/__init__.py:19: no"
    assert without_folders(f"{ROOT}/graphpar/ir/ops.py:3 and 1/2") == "graphpar/ir/ops.py:3 and 1/2"
    for path in (ROOT / "benchmarks" / "coverage_runs").glob("*.json"):
        assert without_folders(text := path.read_text(encoding="utf-8")) == text


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", "Llama"),
        ("GPT2", "GPT2"),
        ("gpt-2", "GPT2"),
        ("DeBERTa-v2", "DebertaV2"),
        ("T5Config", "T5"),
        ("LlamaForCausalLM", "Llama"),
        ("bertmodel", "Bert"),
        ("BarkCoarseConfig", "BarkCoarse"),  # a part that no mapping knows
    ],
)
def test_architectures_are_found_however_they_are_spelt(name: str, found: str) -> None:
    assert find_architecture(name).name == found


def test_a_model_class_that_is_named_is_the_one_that_is_taken() -> None:
    heads = head_classes(find_architecture("BertForTokenClassification"), is_encoder_decoder=False)
    assert [made.__name__ for made in heads] == ["BertForTokenClassification"]


@pytest.mark.parametrize(
    "name",
    ["", " ", "--json", "Config", "Model", "PreTrainedModel", "AutoModel", "../x", "Λλ", "T" * 5000],
)
def test_what_is_no_architecture_is_said_to_be_none(name: str) -> None:
    with pytest.raises(ValueError, match="has no architecture"):
        find_architecture(name)


def test_an_unknown_architecture_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'Lama'; the nearest are .*llama"):
        find_architecture("Lama")


def test_heads_come_before_the_bare_model() -> None:
    names = [c.__name__ for c in head_classes(find_architecture("Bart"), is_encoder_decoder=True)]
    assert names[0] == "BartForConditionalGeneration" and "BartModel" in names


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen3", "T5", "Swin", "CLIP", "DeepseekV3", "Whisper", "Segformer"]
)
def test_configurations_stay_consistent_when_they_shrink(name: str) -> None:
    config = tiny_config(find_architecture(name).config_class, STYLES[0])
    text = config.to_dict()
    width, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int):
        assert width % heads == 0 and width <= 128
    assert not [
        k for k, v in without_randomness(config).to_dict().items() if "drop" in k and v and v is not True
    ]
    assert with_dropout(config) is config


@pytest.mark.parametrize("name", ["Bert", "Mixtral", "ViT"])
def test_tiny_models_run_and_have_no_zero_weights(name: str) -> None:
    built = build_tiny(name)
    assert built.loss and sum(p.numel() for p in built.model.parameters()) < 1_000_000
    assert all(bool(p.any()) for p in built.model.parameters())


@pytest.mark.parametrize(
    ("name", "head", "given"),
    [
        ("step3p7", "Step3p7ForConditionalGeneration", "pixel_values"),  # an empty window
        ("glm5_next", "Glm5NextForConditionalGeneration", "labels"),  # sizes that must divide
        ("kosmos-2", "Kosmos2ForConditionalGeneration", "image_embeds_position_mask"),
        ("emu3", "Emu3ForCausalLM", "labels"),  # the class of a part
        ("bark", "BarkSemanticModel", "input_ids"),  # a composite that cannot be called
        ("rag", "RagModel", "context_input_ids"),  # undeclared parts, several texts for a sample
        ("dbrx", "DbrxForCausalLM", "labels"),  # a field that the class of its part lacks
    ],
)
def test_refusals_tell_what_models_need(name: str, head: str, given: str) -> None:
    built = build_tiny(name)
    assert type(built.model).__name__ == head and given in built.kwargs
