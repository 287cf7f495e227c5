"""Whole training steps: parts add up, and widening or speeding anything up never slows the step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpar import catalogue
from graphpar.cost_models.communication import Network
from graphpar.cost_models.training import step_time
from graphpar.cost_models.training_exchanges import Exchanges
from graphpar.cost_models.training_memory import fits, memory_bytes, stage_parts, weights_of_stage
from graphpar.cost_models.training_run import Run, parameters
from graphpar.cost_models.transformer import ModelShape, MoeShape, layer_work

GPT = ModelShape(24, 2048, 16, 16, 8192, 50257, 1024)
GPT3 = ModelShape(96, 12288, 96, 96, 49152, 51200, 2048)
LLAMA = ModelShape(32, 4096, 32, 8, 14336, 128256, 8192, gated=True)
BASE = Run(GPT, "a100-sxm-80gb", 8, 8, Network(200e9), batch=64, microbatch=2, data=8)


def seconds(run: Run) -> float:
    return step_time(run, parameters()).total_s


@pytest.mark.parametrize(
    ("device", "dtype", "less"),
    [
        ("h100-sxm-80gb", "bfloat16", True),
        ("gb300", "float16", True),
        ("gh200-96gb", "bfloat16", True),
        ("h100-sxm-80gb", "float32", False),
        ("h20-sxm-96gb", "bfloat16", False),
        ("a100-sxm-80gb", "bfloat16", False),
    ],
)
def test_steps_in_16_bits_hold_less_where_power_is_short(device: str, dtype: str, less: bool) -> None:
    run = replace(BASE, device=device, dtype=dtype)
    single = step_time(run, replace(parameters(), sustained_share=1.0)).total_s
    assert (seconds(run) > single) is less


def test_parameter_counts_are_the_published_ones() -> None:
    assert GPT3.parameters == pytest.approx(175e9, rel=0.01)
    assert LLAMA.parameters == pytest.approx(8.03e9, rel=0.01)
    mixtral = ModelShape(32, 4096, 32, 8, 14336, 32000, 4096, gated=True, moe=MoeShape(8, 2, 14336))
    assert mixtral.parameters == pytest.approx(46.7e9, rel=0.01)
    deepseek = ModelShape(
        61, 7168, 128, 128, 18432, 129280, 4096, gated=True,
        moe=MoeShape(256, 8, 2048, 3, 1), query_rank=1536, value_rank=512,
    )  # fmt: skip
    assert deepseek.parameters == pytest.approx(671e9, rel=0.01)


def test_layer_flops_are_two_per_weight_and_token() -> None:
    work = layer_work(GPT, 3)
    flops = sum(p.flops for p in work.products)
    assert flops == pytest.approx(2 * GPT.layer_parameters * 3 * GPT.seq_len)
    half = layer_work(GPT, 3, tensor=2)
    assert sum(p.flops for p in half.products) == pytest.approx(flops / 2)


@pytest.mark.parametrize(
    ("change", "at_most"),
    [
        ({"batch": 128}, 2.0),  # twice the work
        ({"recompute": "full"}, 1.5),
        ({"microbatch": 1}, 3.0),
    ],
)
def test_changes_that_add_work_cost_time_but_not_too_much(
    change: dict[str, float | str], at_most: float
) -> None:
    slower = seconds(replace(BASE, **change))  # type: ignore[arg-type]
    assert seconds(BASE) < slower <= at_most * seconds(BASE)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_a_faster_network_and_a_faster_device_never_hurt(tensor: int, pipeline: int, data: int) -> None:
    run = replace(
        BASE,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        devices=tensor * pipeline * data,
        per_node=4,
    )
    assert seconds(replace(run, network=Network(400e9))) <= seconds(run) * (1 + 1e-9)
    assert seconds(replace(run, device="h100-sxm-80gb")) <= seconds(run)


def test_memory_falls_with_sharding_and_rises_with_the_microbatch() -> None:
    sizes = [memory_bytes(replace(BASE, zero=zero)) for zero in (0, 1, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert memory_bytes(replace(BASE, microbatch=4)) > memory_bytes(BASE)
    for run in (BASE, replace(BASE, fused_attention=False), replace(BASE, dtype="float32")):
        sizes = [memory_bytes(replace(run, recompute=kind)) for kind in ("full", "selective", "none")]
        assert sizes == sorted(sizes)


def test_float32_keeps_twice_the_activations_and_no_second_weights() -> None:
    half, wide = (stage_parts(replace(BASE, dtype=dtype), 0) for dtype in ("bfloat16", "float32"))
    assert wide.activations == 2 * half.activations
    assert wide.weights + wide.gradients + wide.optimizer == 16 * GPT.parameters


@given(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4, 8]), st.sampled_from([1, 2]))
def test_what_stages_exchange_follows_where_they_lie_and_who_sends(
    tensor: int, pipeline: int, data: int
) -> None:
    devices = tensor * pipeline * data
    run = replace(BASE, tensor=tensor, pipeline=pipeline, data=data, devices=devices)
    in_turn = replace(run, sends_apart=True)
    whole = replace(in_turn, sends_whole=True)
    times = [Exchanges(r, parameters()).exchanges_s() for r in (run, in_turn, whole)]
    for stages in times:
        assert len(stages) == pipeline
        assert stages[0] <= min(stages[1:-1], default=stages[0])
    assert times[1] == pytest.approx([2 * s for s in times[0]])
    assert (times[2] > times[1]) is (tensor > 1)
    # Only neighbours on either side of a node's border feel the network.
    slow = Exchanges(replace(run, network=Network(1e6)), parameters()).exchanges_s()
    borders = [i for i in range(pipeline - 1) if (i + 1) * tensor * data % run.per_node == 0]
    felt = [i for i in range(pipeline) if slow[i] > 2 * times[0][i]]
    assert felt == sorted({stage for i in borders for stage in (i, i + 1)})


@given(st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 3]), st.integers(1, 4))
def test_every_slot_of_an_interleaved_schedule_but_the_last_ends_with_a_message(
    pipeline: int, virtual: int, rounds: int
) -> None:
    """Microbatches times chunks, and a slot more for each further stage, there and back."""
    passes = rounds * pipeline
    run = replace(BASE, data=1, pipeline=pipeline, virtual=virtual, devices=pipeline, batch=2 * passes)
    (there_s, back_s), *_ = Exchanges(run, parameters())._boundaries_s()
    # An end of a pipeline without chunks exchanges once for each microbatch, and it has the head.
    exchanged = 2 if virtual > 1 or pipeline > 2 else 1
    slots = exchanged * (passes * virtual - 1) / 2 + pipeline - 1
    found_s = step_time(replace(run, shape=replace(GPT, vocab=1, layers=24)), parameters()).pipeline_s
    assert found_s == pytest.approx(slots * (there_s + back_s))


def test_a_table_of_both_ends_is_summed_between_them() -> None:
    run = replace(BASE, pipeline=4, data=4, devices=16, overlaps=True)
    both = replace(run, sums_tables=True)
    table = GPT.vocab * GPT.hidden * both.sent_bytes
    assert Exchanges(run, parameters()).tables_sum_s() == 0
    assert Exchanges(replace(both, pipeline=1), parameters()).tables_sum_s() == 0
    # Each of a node's devices sends and receives the table once through their one network.
    assert Exchanges(both, parameters()).tables_sum_s() == pytest.approx(4 * table / 192e9, rel=0.02)
    assert seconds(both) > seconds(run)


def test_experts_are_divided_by_groups_of_their_own() -> None:
    shape = replace(LLAMA, moe=MoeShape(8, 2, 14336))
    experts = LLAMA.layers * 8 * 3 * 4096 * 14336
    for expert, width in ((1, 1), (2, 1), (4, 2), (8, 4)):
        run = replace(BASE, shape=shape, devices=32, tensor=4, data=8, expert=expert, expert_tensor=width)
        parts = stage_parts(replace(run, zero=1), 0)
        dense = shape.parameters - experts
        assert parts.weights == pytest.approx(2 * (dense / 4 + experts / (expert * width)))
        # However they are divided, all devices together hold the optimiser's state of each weight once.
        assert parts.optimizer * 32 == pytest.approx((12 + 4) * shape.parameters)


def test_a_pipeline_that_keeps_its_weights_gathered_holds_whole_gradients_too() -> None:
    run = replace(BASE, shape=LLAMA, tensor=2, pipeline=2, data=2, zero=3, gradient_bytes=4.0, batch=16)
    ends = [
        sum(vars(stage_parts(replace(run, keeps_gathered=keeps), 0)).values()) for keeps in (False, True)
    ]
    kept = stage_parts(replace(run, keeps_gathered=True), 0)
    assert kept.gathered == (2 + 4) * weights_of_stage(run, 0)
    assert ends[1] > ends[0]


def test_what_selective_recomputation_keeps_is_what_its_policy_lists() -> None:
    run = replace(
        BASE, shape=LLAMA, microbatch=1, recompute="selective", selects_products=True, fused_loss=True
    )
    tokens, h, kv, wide = 8192, 4096, 1024, 14336
    layers = 32 * tokens * 2  # in half precision
    eager, compiled = (stage_parts(replace(run, compiled=c), 0) for c in (False, True))
    assert compiled.activations - eager.activations == -layers * h  # the last product's result
    full = stage_parts(replace(run, compiled=True, recompute="full"), 0)
    assert compiled.tensors - full.tensors == pytest.approx(layers * (2 * h + kv + wide))


def test_what_frameworks_do_in_tensor_parallel_layers_is_counted() -> None:
    base = replace(
        BASE, shape=LLAMA, device="h100-sxm-80gb", tensor=8, data=1, sequence_parallel=True,
        recompute="selective", selects_products=True, compiled=True, fused_loss=True,
    )  # fmt: skip
    tensor_s = step_time(base, parameters()).tensor_s
    assert tensor_s == pytest.approx(
        5 / 4 * step_time(replace(base, recompute="none"), parameters()).tensor_s, rel=0.1
    )
    # Narrow slices lose by reading their input again, and backward adds up what comes of it.
    apart = seconds(replace(base, separate_projections=True)) / seconds(base)
    assert 1.03 < apart < 1.3
    assert seconds(replace(base, tensor=1, separate_projections=True)) < 1.03 * seconds(
        replace(base, tensor=1)
    )
    # Cast before it is gathered, an input travels as float8, unless each row has its own scale.
    float8 = replace(base, dtype="float8_e4m3fn")
    by_row = step_time(replace(float8, row_scales=True), parameters()).tensor_s
    assert 0.7 * by_row < step_time(float8, parameters()).tensor_s < 0.95 * by_row


def test_a_model_of_70_billion_needs_more_than_one_device() -> None:
    large = ModelShape(80, 8192, 64, 8, 28672, 128256, 2048, gated=True)
    one = Run(large, "h100-sxm-80gb", 1, 8, Network(400e9), batch=1, microbatch=1)
    assert not fits(one)
    assert fits(replace(one, devices=64, tensor=8, pipeline=8, batch=8, recompute="full"))


def test_constants_are_within_their_meaning() -> None:
    p = parameters()
    assert p.compiled_kernel_s <= p.host_kernel_s
    assert (catalogue.data_directory() / "training.toml").exists()


@pytest.mark.parametrize(
    "device",
    [k for k, d in catalogue.devices().items() if d.vendor in ("NVIDIA", "AMD") and not d.is_cpu],
)
def test_every_gpu_of_the_catalogue_reaches_a_sensible_share_of_its_peak(device: str) -> None:
    peaks = catalogue.devices()[device].peak_flops_per_s
    half = "bfloat16" if "bfloat16" in peaks else "float16"
    run = replace(
        BASE,
        shape=LLAMA,
        device=device,
        dtype=half,
        zero=3,
        overlaps=True,
        compiled=True,
        fused_loss=True,
    )
    peak = max(peaks.get(dtype, 0.0) for dtype in ("bfloat16", "float16", "float32"))
    flops = 6 * LLAMA.parameters * run.batch * LLAMA.seq_len / run.devices
    assert 0.15 < flops / (peak * seconds(run)) < 0.7
