"""The running job: the only stateful object users meet."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from msgspec import structs

from graphpar.cluster_build import num_cores
from graphpar.device import LOCAL_KIND
from graphpar.errors import GraphparError, RunError
from graphpar.frontend.capture import Captured
from graphpar.frontend.torch_private import flatten
from graphpar.ir.graph import Graph
from graphpar.neighbours import other_work, reference_s
from graphpar.plans.plan import Plan
from graphpar.runtime import by_value
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.comparison import (
    NOTABLE_S,
    MachineNow,
    StepComparison,
    compare_step,
)
from graphpar.runtime.first_step import FirstStepCheck
from graphpar.runtime.fork_server import ForkServer
from graphpar.runtime.infer import copied_buffers, lower_again, lower_inference
from graphpar.runtime.job_state import JobState
from graphpar.runtime.last_step import LastStep
from graphpar.runtime.loaded import Loaded, with_own_constants
from graphpar.runtime.local import LocalWorkers
from graphpar.runtime.merge import check_inputs, inputs_of_rank, merge_results
from graphpar.runtime.optimizers import Recipe
from graphpar.runtime.pieces import sliced
from graphpar.runtime.program import Part, StepReport, in_part
from graphpar.runtime.prologue import Prologue
from graphpar.runtime.scaling import is_finite
from graphpar.runtime.starts import rank_starts, refuse_foreign_devices
from graphpar.runtime.subject import Subject
from graphpar.runtime.torchrun import TorchrunWorkers, under_torchrun
from graphpar.runtime.true_error import TrueError, true_error
from graphpar.runtime.weights import Weights
from graphpar.runtime.workers import Workers
from graphpar.schedule import Schedule
from graphpar.view.notebook import drawn_job, framed_job

_Capture = Callable[[Sequence[Any], Mapping[str, Any]], tuple[Captured, Lowered]]
_log = logging.getLogger("graphpar.job")

_TELLING_STEP = 2
"""The first step also allocates and warms up; the one after is what the plan predicts."""


class CompiledModel(JobState):
    """A model that runs on many devices; use it as a context manager, or call `close`.

    Made by `graphpar.compile`. `step` trains, calling it infers (in evaluation mode). Threads that share
    it take turns; processes forked from its own cannot use it.

    >>> import torch, graphpar
    >>> training = graphpar.Training(
    ...     optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss=torch.nn.functional.mse_loss
    ... )
    >>> x, y = torch.randn(6, 4), torch.randn(6, 2)
    >>> cluster = {"devices": [{"kind": "cpu", "threads": 1}]}
    >>> with graphpar.compile(torch.nn.Linear(4, 2), cluster, (x, y), train=training) as job:
    ...     losses = [job.step(x, y) for _ in range(3)]
    ...     sorted(job.state_dict())
    ['bias', 'weight']
    >>> losses[2] < losses[0]
    tensor(True)
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        workers: Workers,
        lowered: Lowered,
        weights: Weights,
    ) -> None:
        lowered = replace(lowered, whole=subject.whole_batch_only)
        super().__init__(subject, workers, lowered, weights)
        self.plan = plan
        self.last_step: LastStep | None = None
        self.true_error: TrueError | None = None
        self._devices = lowered.partition.used_devices
        self._profiles = False
        self._check, self._checks_step = subject.check, 0
        self._looked_after: LastStep | None = None
        self._machine_now: MachineNow | None = None
        main = Loaded(
            "train" if subject.training else "infer",
            replace(subject.captured, graph=subject.graph),
            lowered,
            Prologue.of(subject.graph, weights),
        )
        self._main = main
        self._reshaped: dict[tuple[str, Hashable], Loaded] = {}
        self._inference: dict[Hashable, Loaded] = {}

    @property
    def graph(self) -> Graph:
        """The captured graph of the model, which the plan cuts into units."""
        return self._subject.graph

    @property
    def _formats(self) -> set[str]:
        """The number formats of all units."""
        stages = [s for pipeline in self.plan.partition.pipelines for s in pipeline.stages]
        return {unit_format for stage in stages for unit_format in stage.formats}

    @staticmethod
    def warm_up() -> None:
        """Begin what a start needs anyway, so that it goes on while a plan is made."""
        if not under_torchrun():
            ForkServer.get()

    @classmethod
    def start(cls, subject: Subject, decide: Callable[[], Plan]) -> "CompiledModel":
        """Decide on a plan, start workers, hand out weights."""
        if under_torchrun():
            session = TorchrunWorkers.join(subject.cluster)
            plan = session.agree(decide, subject.model_hash)
            lowered = subject.lower(subject.graph, plan.partition, None)
            measured = plan.error_budget is not None
            weights = subject.find_weights()
            weights = replace(weights, here=session.same_everywhere(weights.here))
            starts = rank_starts(
                subject.cluster, subject.training, lowered, weights, measures_norm=measured
            )
            session.begin(starts, lowered.trained, Recipe.of(subject.training))
            return cls(subject, plan, session, lowered, weights)
        plan = decide()
        lowered = subject.lower(subject.graph, plan.partition, None)
        measured = plan.error_budget is not None
        refuse_foreign_devices(subject.cluster, lowered)
        weights = subject.find_weights()
        recipe = Recipe.of(subject.training)
        pickled = _pickle(recipe) if recipe else b""
        starts = rank_starts(subject.cluster, subject.training, lowered, weights, measures_norm=measured)
        workers = LocalWorkers(starts, lowered.trained, pickled)
        return cls(subject, plan, workers, lowered, weights)

    # --- running ---

    def step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One optimiser step on a global batch; returns the loss over all of it.

        Raises:
            ValueError: The job was compiled without `train=`, or the batch does not fit the model.
            RunError: A worker failed; names the rank at the root of it. The job is over then.
        """
        if self._subject.training is None:
            raise ValueError("This job only infers; pass train=Training(...) to graphpar.compile.")
        with self._turn:
            return self._step(args, kwargs)

    def _step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        loaded = self._main_for(args, kwargs)
        if self._check is not None and self._steps == self._checks_step:
            loss = self._checked_step(loaded, self._check, args, kwargs)
        else:
            (loss,) = self._run(loaded, args, kwargs)
        if loaded is self._main:
            self._compare([loss], args, kwargs)
        self._steps += 1
        if self._steps == _TELLING_STEP:
            self._tell_difference()
        return loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for a global batch in evaluation mode, with today's weights.

        Raises:
            ValueError: The batch does not fit the model.
            RunError: A worker failed; names the rank at the root of it. The job is over then.
        """
        with self._turn:
            return self._inferred(args, kwargs)

    def _inferred(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        training = self._subject.training is not None
        loaded = self._inference_for(args, kwargs) if training else self._main_for(args, kwargs)
        if training:
            self._copy_buffers(loaded)
        values = self._run(loaded, args, kwargs)
        if loaded is self._main:
            self._compare(values, args, kwargs)
        names = [r for r in loaded.captured.signature.results if isinstance(r, str)]
        return loaded.captured.signature.assemble(dict(zip(names, values, strict=True)))

    @contextmanager
    def profiling(self) -> Iterator[None]:
        """Run the steps inside under torch.profiler: a trace of the last one then shows its operations.

        Profiling costs time; the steps inside are slower than others.
        """
        self._profiles = True
        try:
            yield
        finally:
            self._profiles = False

    @property
    def comparison(self) -> StepComparison | None:
        """The last step beside its prediction, per device; None where the plan predicts another batch.

        Where they differ this machine is looked at, for the likely reason: once after each step, a tenth
        of a second.
        """
        last = self.last_step
        if last is None or last.predicted_s is None or last.failure or not last.reports:
            return None
        found = compare_step(self.plan, last.reports, last.seconds)
        if not found.off or max(found.measured_s, found.predicted_s) < NOTABLE_S:
            return found
        if self._looked_after is not last:
            self._looked_after, self._machine_now = last, _machine(self.plan)
        return compare_step(self.plan, last.reports, last.seconds, self._machine_now)

    def _tell_difference(self) -> None:
        """Once, after the first step without one-time work: warn where the prediction is off."""
        if under_torchrun() and dist.get_rank() != 0:
            return
        found = self.comparison
        if found is None or max(found.measured_s, found.predicted_s) < NOTABLE_S:
            return
        if found.off:
            _log.warning("%s", found)

    def _compare(
        self, results: Sequence[torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """After the first step of a plan with an error budget: what its formats really cost."""
        planned, reference = self.plan.error_budget, self._subject.reference
        if self.true_error is not None or planned is None or reference is None or self._weights_moved:
            return
        self._weights_moved = True
        if under_torchrun() and dist.get_rank() != 0:
            return
        assert self.last_step is not None
        wanted = reference(args, kwargs)
        self.true_error = true_error(planned, results, self.last_step.reports, wanted)
        level = logging.INFO if self.true_error.kept else logging.WARNING
        _log.log(level, "%s", self.true_error)

    def _main_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Loaded:
        """The job's graph for inputs of this shape; another shape than the example's has its own."""

        def again(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Captured, Lowered]:
            captured = self._apart(self._subject.prepare_again(args, kwargs))
            return captured, lower_again(captured, self._main.lowered, self._subject.lower)

        return self._fitting(self._main, args, kwargs, again)

    def _inference_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Loaded:
        """The inference graph of a training job for calls of this form; captured on first use."""

        def capture(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Captured, Lowered]:
            captured = self._apart(self._subject.prepare_inference(args, kwargs))
            return captured, lower_inference(captured, self._trained_on, self._subject.lower)

        form = _form(args, kwargs)
        if form not in self._inference:
            name = f"infer{len(self._inference)}"
            self._inference[form] = self._load(name, *capture(args, kwargs))
        return self._fitting(self._inference[form], args, kwargs, capture)

    def _fitting(
        self, loaded: Loaded, args: Sequence[Any], kwargs: Mapping[str, Any], capture: _Capture
    ) -> Loaded:
        """What is loaded, or where inputs of another shape came in, a graph for these."""
        inputs = loaded.captured.signature.bind(args, kwargs)
        misfit = loaded.misfit(inputs)
        if not misfit:
            return loaded
        key = loaded.name, loaded.shapes(inputs)
        if key not in self._reshaped:
            try:
                captured, lowered = capture(*loaded.at_captured_size(inputs, args, kwargs))
            except GraphparError as error:
                raise ValueError(f"{misfit} Capturing the model again failed: {error}") from error
            _log.warning(
                "The model was captured again for inputs of %s, with the stages of the plan; this "
                "happens once for each shape. %s",
                ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items()),
                misfit,
            )
            name = f"{loaded.name}:shape{len(self._reshaped)}"
            self._reshaped[key] = self._load(name, captured, lowered)
        # A graph for other lengths may be for some numbers of samples only.
        return self._fitting(self._reshaped[key], args, kwargs, capture)

    def _apart(self, captured: Captured) -> Captured:
        return with_own_constants(captured, f"{len(self._inference)}.{len(self._reshaped)}:")

    def _load(self, name: str, captured: Captured, lowered: Lowered) -> Loaded:
        known = self._weights.also(captured.constants)
        loaded = Loaded(name, captured, lowered, Prologue.of(captured.graph, known))
        self._hand_out_missing(loaded)
        return loaded

    def _hand_out_missing(self, loaded: Loaded) -> None:
        """Give ranks tensors that only this graph reads."""
        constants = loaded.captured.constants
        tensors = self._weights.also(self._workers.same_everywhere(constants))
        missing = []
        for rank, placement in enumerate(loaded.lowered.placements):
            new = [label for label in placement.labels if label not in self._held[rank]]
            self._held[rank].update(new)
            self._slices[rank].update({la: c for la, c in placement.slices.items() if la in new})
            missing.append({la: sliced(tensors[la], placement.slices.get(la)) for la in new})
        self._workers.write(missing)

    def _copy_buffers(self, loaded: Loaded) -> None:
        """Bring buffers that training changes to ranks that do not train with them and read them now."""
        copied = copied_buffers(loaded.lowered, self._trained_on)
        wanted = {label for labels in copied for label in labels}
        if not wanted:
            return
        giving = [labels & wanted for labels in self._trained_on.givers]
        now = self._whole(self._workers.read, self._slices, giving)
        placements = loaded.lowered.placements
        self._workers.write(
            [
                {label: sliced(now[label], placement.slices.get(label)) for label in labels}
                for labels, placement in zip(copied, placements, strict=True)
            ]
        )

    def _checked_step(
        self, loaded: Loaded, check: FirstStepCheck, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """A step that stops before the optimiser to compare loss and gradients with one device."""
        state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        (loss,) = self._run(loaded, args, kwargs, part="gradients")
        assert self.last_step is not None
        scale = self.last_step.reports[0].loss_scale
        gradients = {name: tensor.cpu() / (scale or 1.0) for name, tensor in self.gradients().items()}
        if scale is not None and not is_finite(gradients.values()):
            self._checks_step = self._steps + 1  # this one is skipped, and the factor halved
        else:
            is_exact = self._formats == {"float32"}
            check.compare(loss, gradients, state, args, kwargs, step=self._steps, is_exact=is_exact)
        signature = loaded.captured.signature
        samples = check_inputs(loaded.captured.graph, signature.bind(args, kwargs), signature.batched)
        self._schedule(loaded, samples, "optimizer")
        nothing: list[dict[str, torch.Tensor]] = [{} for _ in loaded.lowered.placements]
        stepped = self._workers.step(f"{loaded.name}:{samples}optimizer", nothing, self._steps)
        told = [(r.report.skipped, r.report.grad_norm) for r in stepped]
        reports = tuple(
            structs.replace(report, skipped=skipped, grad_norm=norm)
            for report, (skipped, norm) in zip(self.last_step.reports, told, strict=True)
        )
        self.last_step = replace(self.last_step, reports=reports)
        return loss

    def _run(
        self, loaded: Loaded, args: Sequence[Any], kwargs: Mapping[str, Any], part: Part = ""
    ) -> list[torch.Tensor]:
        signature = loaded.captured.signature
        inputs = signature.bind(args, kwargs)
        graph = loaded.captured.graph
        samples = check_inputs(graph, inputs, signature.batched)
        schedule = self._schedule(loaded, samples, part)
        if loaded.prologue is not None:
            inputs = {**inputs, **loaded.prologue.run(inputs, samples)}
        per_rank = [
            inputs_of_rank(placement.interfaces, rank, schedule, inputs, signature.batched)
            for rank, placement in enumerate(loaded.lowered.placements)
        ]
        try:
            results = self._workers.step(
                f"{loaded.name}:{samples}{part}", per_rank, self._steps, self._profiles
            )
        except RunError as error:
            reports = [report for report in error.reports if isinstance(report, StepReport)]
            self._note(reports, loaded, samples, failure=str(error))
            raise
        self._note([r.report for r in results], loaded, samples)
        return merge_results(loaded.lowered.graphs[0], results)

    def _schedule(self, loaded: Loaded, samples: int, part: Part = "") -> Schedule:
        if (samples, part) not in loaded.schedules:
            schedule = loaded.lowered.schedule(samples)
            programs = [in_part(p, part) for p in loaded.lowered.programs(schedule, samples)]
            self._workers.install(f"{loaded.name}:{samples}{part}", programs)
            loaded.schedules[samples, part] = schedule
        return loaded.schedules[samples, part]

    def _note(
        self, reports: Sequence[StepReport], loaded: Loaded, samples: int, failure: str = ""
    ) -> None:
        planned = samples == self.plan.batch and loaded.lowered is self._trained_on
        ends, starts = [r.end_s for r in reports], [r.start_s for r in reports]
        self.last_step = LastStep(
            seconds=max(ends) - min(starts) if reports else 0.0,
            predicted_s=self.plan.predicted_step_s if planned else None,
            reports=tuple(reports),
            failure=failure,
        )

    def close(self) -> None:
        """End all workers; safe to call again."""
        self._workers.close()

    def __enter__(self) -> "CompiledModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        return framed_job(self.plan, self.graph, self.last_step)

    def _repr_svg_(self) -> str:
        return drawn_job(self.plan, self.last_step)

    def __str__(self) -> str:
        found = self.comparison
        return str(self.plan) if found is None else f"{self.plan}\n\n{found}"

    def __repr__(self) -> str:
        name = self._subject.graph.name
        return f"CompiledModel({name}, {len(self._devices)} ranks, step {self._steps})"


def _machine(plan: Plan) -> MachineNow | None:
    """How this machine is between two steps, beside what it was; None where no worker runs here."""
    if not any(replica.kind.startswith(LOCAL_KIND) for replica in plan.replicas):
        return None
    shared = plan.timing.shared
    with other_work() as others:
        now_s = reference_s()
    drift = now_s / shared.reference_s if shared is not None and shared.reference_s else None
    return MachineNow(drift, others.cores, num_cores())


def _form(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What calls have in common that one captured graph can answer: structure and plain values."""
    leaves, spec = flatten((tuple(args), dict(kwargs)))
    plain = [repr(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    return str(spec), tuple(plain)


def _pickle(recipe: Recipe) -> bytes:
    """The user's functions for workers in other processes."""
    try:
        return by_value.dumps(recipe)
    except Exception as error:
        what = "optimizer=..., scheduler" if recipe.scheduler else "optimizer"
        raise ValueError(
            f"Training({what}=...) cannot be sent to the workers: {error}. Make it a function or a "
            "lambda that refers to nothing but modules and plain values."
        ) from error
