"""What MODEL may be on the command line."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from graphpar.hf.models import PRESETS, build_hf_model, hf_inputs
from graphpar.model_spec import LoadedModel, load_model

MODULE = """
import torch

def build():
    return torch.nn.Linear(4, 2)

def number():
    return 3

instance = torch.nn.Linear(4, 3)

def example_inputs(batch_size, seq_len):
    return {inputs}
"""


def write_module(folder: Path, name: str, inputs: str) -> None:
    (folder / f"{name}.py").write_text(MODULE.format(inputs=inputs))


def load(spec: str, *, train: bool = False, weights: bool = False) -> LoadedModel:
    return load_model(spec, batch_size=3, seq_len=5, train=train, weights=weights)


@pytest.mark.parametrize(
    ("name", "inputs", "num_args", "keywords"),
    [
        ("one_tensor", "torch.ones(batch_size, 4)", 1, []),
        ("a_tuple", "(torch.ones(batch_size, 4), torch.ones(seq_len))", 2, []),
        ("a_dict", "{'input': torch.ones(batch_size, 4)}", 0, ["input"]),
        ("a_pair", "((torch.ones(batch_size, 4),), {'x': torch.ones(seq_len)})", 1, ["x"]),
    ],
)
def test_a_factory_with_inputs_beside_it(
    name: str,
    inputs: str,
    num_args: int,
    keywords: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_module(tmp_path, f"spec_{name}", inputs)
    monkeypatch.chdir(tmp_path)
    loaded = load(f"spec_{name}:build", train=True)
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.model.training
    assert (len(loaded.args), list(loaded.kwargs)) == (num_args, keywords)


def test_a_factory_that_fails_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import torch\n\ndef build():\n    return torch.nn.Linear(4, 'two')\n"
    (tmp_path / "spec_failing.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'spec_failing:build': building the model failed at .*:\d+"):
        load("spec_failing:build")


def test_an_architecture_that_cannot_be_built_is_told_with_a_remedy_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(PRESETS, "odd-bert", ("bert", {"hidden_size": 10, "num_attention_heads": 3}))
    with pytest.raises(ValueError) as caught:
        load("hf:odd-bert")
    message = str(caught.value)
    for told in (
        "hf:odd-bert could not be built in BertForSequenceClassification > BertModel > BertEncoder",
        "modeling_bert.py:",
        "The hidden size (10) is not a multiple",
        "with a BertConfig of your own in a function and give package.module:function",
    ):
        assert told in message
    (tmp_path / "spec_own.py").write_text(
        "from transformers import BertConfig, BertForMaskedLM\n\n"
        "def build():\n"
        "    config = BertConfig(hidden_size=10, num_attention_heads=2, num_hidden_layers=1)\n"
        "    return BertForMaskedLM(config)\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load("spec_own:build")
    assert loaded.model(**loaded.kwargs).logits.shape[:2] == (3, 5)


def test_a_module_object_serves_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "spec_object", "torch.ones(batch_size, 4)")
    monkeypatch.chdir(tmp_path)
    loaded = load("spec_object:instance")
    assert loaded.model(*loaded.args).shape == (3, 3)
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("gpt", "none of the known forms"),
        ("a:", "none of the known forms"),
        ("no_such_module_here:f", "cannot be imported"),
        ("spec_wrong:nothing", "has no nothing"),
        ("spec_wrong:number", "gives a int, not a torch.nn.Module"),
        ("spec_wrong:build", "example_inputs gives a str"),
        ("torch.nn:Identity", "there are no example inputs"),
        ("missing.pt2", "there is no such file"),
        ("hf:no-such-model", "hf:no-such-model is not known; give one of bert-base"),
    ],
)
def test_wrong_models_are_told(
    spec: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, "spec_wrong", "'text'")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=told):
        load(spec)


def test_an_export_file(tmp_path: Path) -> None:
    path = tmp_path / "linear.pt2"
    example = (torch.ones(3, 4),)
    torch.export.save(torch.export.export(nn.Linear(4, 2), example), path)
    loaded = load(str(path))
    assert loaded.model(*loaded.args).shape == (3, 2)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_an_export_file_cannot_run_code(tmp_path: Path) -> None:
    good, bad, sprung = tmp_path / "good.pt2", tmp_path / "bad.pt2", tmp_path / "sprung"
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.ones(3, 4),)), good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            if "sample_inputs" in entry:
                data = pickle.dumps(Trap(sprung))
            target.writestr(entry, data)
    with pytest.raises(ValueError, match="is not an export that can be loaded"):
        load(str(bad))
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("name", "head", "train_keys", "eval_keys"),
    [
        ("bert", "BertForSequenceClassification", ["input_ids", "labels"], ["input_ids"]),
        ("gpt2", "GPT2LMHeadModel", ["input_ids", "labels"], ["input_ids"]),
        (
            "t5",
            "T5ForConditionalGeneration",
            ["input_ids", "labels"],
            ["input_ids", "decoder_input_ids"],
        ),
        ("vit", "ViTForImageClassification", ["pixel_values", "labels"], ["pixel_values"]),
        ("Gemma2", "Gemma2ForCausalLM", ["input_ids", "labels"], ["input_ids"]),
        (
            "whisper",
            "WhisperForConditionalGeneration",
            ["input_features", "labels"],
            ["input_features", "decoder_input_ids"],
        ),
        ("ResNet", "ResNetForImageClassification", ["pixel_values", "labels"], ["pixel_values"]),
    ],
)
def test_hf_models_without_weights(
    name: str, head: str, train_keys: list[str], eval_keys: list[str]
) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    loaded = load(f"hf:{name}", train=True)
    assert type(loaded.model).__name__ == head
    assert all(p.device.type == "meta" for p in loaded.model.parameters())
    assert list(loaded.kwargs) == train_keys
    assert all(v.device.type == "meta" and v.shape[0] == 3 for v in loaded.kwargs.values())
    assert list(load(f"hf:{name}").kwargs) == eval_keys


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-8b", 8.03),
        ("llama-70b", 70.55),
        ("llama-405b", 405.85),
        ("mixtral-8x7b", 46.70),
        ("gpt2-xl", 1.56),
    ],
)
def test_presets_have_their_published_size(name: str, billions: float) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    with torch.device("meta"):
        model = build_hf_model(name, seq_len=16)
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e9, 2) == billions


def test_long_sequences_widen_the_position_table() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    with torch.device("meta"):
        model = build_hf_model("gpt2", seq_len=2048)
    assert model.get_parameter("transformer.wpe.weight").shape[0] == 2048


def test_hf_models_with_weights_run() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForSequenceClassification(config)
    inputs = hf_inputs(model, batch_size=2, seq_len=7, train=True)
    assert torch.isfinite(model(**inputs).loss)
    assert inputs["input_ids"].equal(hf_inputs(model, 2, 7, train=True)["input_ids"])


def test_presets_are_model_types_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    assert {kind for kind, _ in PRESETS.values()} <= set(transformers.CONFIG_MAPPING)


def test_weights_that_do_not_fit_this_machine_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("graphpar.model_spec.system_memory_bytes", lambda otherwise: 4e8)
    with pytest.raises(
        ValueError, match=r"418 MiB of weights, more than .* memory of 381 MiB; graphpar plan"
    ):
        load_model("hf:bert-base", batch_size=2, seq_len=8, train=True, weights=True)
