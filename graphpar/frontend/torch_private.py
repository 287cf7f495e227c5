"""Every use of torch that is not public API, in one place; `tests/test_torch_private.py` watches it.

`torch.utils._pytree` is what torch.export itself uses to flatten arguments; there is no public name
for it that also knows registered classes such as transformers' `ModelOutput`.
"""

import dataclasses
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._export import non_strict_utils
from torch._export import utils as export_utils
from torch._export.passes import replace_set_grad_with_hop_pass
from torch._functorch import eager_transforms, predispatch
from torch._functorch import vmap as vmap_module
from torch._guards import detect_fake_mode
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.export import ExportedProgram
from torch.export import _trace as export_trace
from torch.fx import proxy as fx_proxy
from torch.fx import traceback as fx_traceback
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpoint_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._traceback import CapturedTraceback

TreeSpec = pytree.TreeSpec
DispatchMode: Any = TorchDispatchMode
"""A mode that sees every operator below autograd."""


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], TreeSpec]:
    """Leaves of nested tuples, lists, dicts, dataclasses, registered classes, and how to put them back.

    A dataclass that torch does not know yet is made known to it. What `is_leaf` holds for stays whole.
    """
    leaves, spec = pytree.tree_flatten(tree, is_leaf)
    kept = is_leaf or (lambda x: False)
    unknown = {
        type(x) for x in leaves if dataclasses.is_dataclass(x) and not isinstance(x, type) and not kept(x)
    }
    if not unknown:
        return leaves, spec
    for made in unknown:
        torch.export.register_dataclass(made)
    return flatten(tree, is_leaf)


def register_node(
    made: type, flat: Callable[[Any], tuple[list[Any], Any]], put_back: Callable[[Any, Any], Any]
) -> None:
    """Make a class a node: `flat` gives its children and what else tells it, `put_back` makes it."""
    pytree.register_pytree_node(made, flat, put_back)


def unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    """The inverse of `flatten`."""
    return pytree.tree_unflatten(leaves, spec)


def output_spec(program: ExportedProgram) -> TreeSpec:
    """How the flat results of an exported program become the user's output structure."""
    spec: TreeSpec = program.call_spec.out_spec
    return spec


_apply: Any = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


@contextmanager
def code_on_demand() -> Iterator[None]:
    """Let graph modules write and compile their Python source when it is first run, not when made.

    torch.export makes dozens of intermediate modules that nobody runs; without their source the
    capture of a model of 2,300 nodes takes two thirds of the time.
    """
    with _use_lazy_graph_module(True):
        yield


class _Forwards:
    """The stack at a node as torch leaves it: frames of `forward`s, from the outermost on."""

    @staticmethod
    def extract() -> "_Forwards":
        return _Forwards()

    def summary(self) -> traceback.StackSummary:
        frames = traceback.walk_stack(sys._getframe(1))
        names = ((f.f_code.co_filename, line) for f, line in frames if f.f_code.co_name == "forward")
        made = [traceback.FrameSummary(file, line, "forward", lookup_line=False) for file, line in names]
        return traceback.StackSummary.from_list(made[::-1])


@contextmanager
def short_stacks() -> Iterator[None]:
    """Keep torch from reading a source line for each frame at each node: a sixth of a capture's time."""
    module: Any = fx_proxy
    module.CapturedTraceback = _Forwards
    try:
        yield
    finally:
        module.CapturedTraceback = CapturedTraceback


@contextmanager
def quiet_failures() -> Iterator[None]:
    """Keep torch.export from writing to stderr when it fails: whole graphs, tracebacks, guesses."""
    module: Any = export_trace
    asked = torch.export, export_trace, symbolic_shapes, fake_tensor
    loggers = [logging.getLogger(made.__name__) for made in asked]
    before = [logger.disabled for logger in loggers]
    module.print = lambda *_, **__: None
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        del module.print
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextmanager
def functional_gradients_call(function: Callable[[], None]) -> Iterator[None]:
    """Within it, `torch.func.grad`, `vjp`, `jvp` and what is made of them call a function first."""
    module: Any = eager_transforms
    before = module.grad_increment_nesting, module.jvp_increment_nesting

    def first(original: Any) -> Any:
        def entered() -> Any:
            function()
            return original()

        return entered

    module.grad_increment_nesting, module.jvp_increment_nesting = map(first, before)
    try:
        yield
    finally:
        module.grad_increment_nesting, module.jvp_increment_nesting = before


@contextmanager
def gradient_modes_in_autocast() -> Iterator[None]:
    """Within it, torch.export keeps a `no_grad` that begins inside of an autocast.

    It cuts the graph where gradients are switched, and enters the autocast anew in each part; a part
    that does not begin with the switch itself is then taken for one without.
    """
    module: Any = replace_set_grad_with_hop_pass
    before = module._is_set_grad_enabled_sub_mod

    def switches(node: fx.Node, omit_if_same_with_ambient: bool = False) -> Any:
        if node.op != "call_module":
            return False
        nodes = getattr(node.graph.owning_module, str(node.target)).graph.nodes
        called = (n for n in nodes if n.op != "placeholder" and n.target is not enter_autocast)
        first = next(called, None)
        if first is None or not sets_gradient_mode(first.target):
            return False
        return first.args[0] != torch.is_grad_enabled() if omit_if_same_with_ambient else True

    module._is_set_grad_enabled_sub_mod = switches
    try:
        yield
    finally:
        module._is_set_grad_enabled_sub_mod = before


@contextmanager
def as_if_not_exported() -> Iterator[None]:
    """Within it, a model that asks torch whether it is being exported is told that it is not."""
    before = torch.compiler.is_exporting, torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling

    def no() -> bool:
        return False

    torch.compiler.is_exporting = torch.compiler.is_compiling = no
    torch.compiler.is_dynamo_compiling = no
    try:
        yield
    finally:
        torch.compiler.is_exporting, torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling = (
            before
        )


as_if_exported: Any = export_utils._compiling_state_context  # a model that asks is told that it is


class _IndicesOfVmap(TorchFunctionMode):
    """Leaves indexing by the tensors of a vmap to torch.

    torch.export asks an index of one number for its value; a tensor that stands for many has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and any(map(_is_batched, pytree.tree_leaves(args))):
            with torch._C.DisableTorchFunction():
                return func(*args)
        return func(*args, **(kwargs or {}))


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_batchedtensor(value)


@contextmanager
def vmap_can_be_exported() -> Iterator[None]:
    """Within it, `torch.vmap` does in an export what it does in eager torch.

    Functions may index with mapped numbers, and the mapped dimension may be anywhere in arguments and
    results: torch.export records only where it comes first.
    """
    module: Any = vmap_module
    flat, add, remove = module._flat_vmap, module._add_batch_dim, module._remove_batch_dim

    def flat_vmap(*args: Any, **kwargs: Any) -> Any:
        with _IndicesOfVmap():
            return flat(*args, **kwargs)

    def add_batch_dim(tensor: torch.Tensor, dim: int, level: int) -> torch.Tensor:
        made: torch.Tensor = add(tensor.movedim(dim, 0) if dim else tensor, 0, level)
        return made

    def remove_batch_dim(batched: torch.Tensor, level: int, size: int, dim: int) -> torch.Tensor:
        made: torch.Tensor = remove(batched, level, size, 0)
        return made.movedim(0, dim) if dim else made

    module._flat_vmap, module._add_batch_dim, module._remove_batch_dim = (
        flat_vmap, add_batch_dim, remove_batch_dim,
    )  # fmt: skip
    try:
        yield
    finally:
        module._flat_vmap, module._add_batch_dim, module._remove_batch_dim = flat, add, remove


def prepares_vmap(function: Any) -> bool:
    """Whether a node's function is what torch does before its first vmap."""
    return function is predispatch.lazy_load_decompositions


def enters_vmap(function: Any) -> bool:
    """Whether a node's function begins a level of vmap."""
    return function is predispatch._vmap_increment_nesting


def leaves_vmap(function: Any) -> bool:
    """Whether a node's function ends a level of vmap."""
    return function is predispatch._vmap_decrement_nesting


def sets_gradient_mode(function: Any) -> bool:
    """Whether a node's function switches the recording of gradients."""
    return function is torch._C._set_grad_enabled


def leave_vmap() -> None:
    """End a level of vmap."""
    predispatch._vmap_decrement_nesting()


def traced_below_autograd(function: Callable[..., Any], given: Sequence[Any]) -> fx.GraphModule:
    """The operators that a function of (fake) tensors comes down to below autograd and functorch."""
    mode = detect_fake_mode(list(given))
    with torch.no_grad(), fx_traceback.preserve_node_meta():
        if mode is None:
            return make_fx(function)(*given)
        with mode:
            plain = [g.detach() if isinstance(g, torch.Tensor) else g for g in given]
            return make_fx(function)(*plain)


def fake_tensors() -> AbstractContextManager[Any]:
    """Within it, tensors are made without memory, on any device."""
    made: AbstractContextManager[Any] = fake_tensor.FakeTensorMode()
    return made


def steps_together(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser that is left the choice updates all parameters at once on a GPU."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not torch.optim.Optimizer]
    modules = [sys.modules.get(kind.__module__) for kind in kinds]
    return any(hasattr(module, "_default_to_fused_or_foreach") for module in modules)


def standing_for(node: fx.Node) -> AbstractContextManager[None]:
    """Within it, operators that are traced take over what is known of a node's place in the model."""
    made: AbstractContextManager[None] = fx_traceback.set_current_meta(node)
    return made


def lookup_op(target: str) -> Any:
    """The torch operator with a name such as `aten.linear.default`.

    Raises:
        AttributeError: torch has no such operator.
    """
    namespace, _, rest = target.partition(".")
    packet, _, overload = rest.rpartition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def op_name(function: Any) -> str | None:
    """The name of a torch operator overload, None for anything else."""
    return str(function) if isinstance(function, torch._ops.OpOverload) else None


def higher_order_name(function: Any) -> str | None:
    """The name of a higher-order operator such as `wrap_with_set_grad_enabled`."""
    if not isinstance(function, torch._ops.HigherOrderOperator):
        return None
    name: str = function.__name__
    return name


def is_random(function: Any) -> bool:
    """Whether torch marks the operator as drawing from a random stream."""
    return torch.Tag.nondeterministic_seeded in function.tags


def mutated_arguments(function: Any) -> tuple[int, ...]:
    """Positions of the arguments an operator writes to, by its schema."""
    return tuple(i for i, argument in enumerate(function._schema.arguments) if _is_written(argument))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def without_out(function: Any) -> Any:
    """The overload of an `out=` operator that takes all but `out`; None if there is none."""
    if op_name(function) is None:
        return None
    packet = function.overloadpacket
    candidates = (getattr(packet, name) for name in packet.overloads())
    wanted = [a for a in _arguments(function) if a[0] != "out"]
    return next((c for c in candidates if _arguments(c) == wanted), None)


def functional_twin(function: Any) -> Any:
    """The overload without side effects of what an in-place operator takes; None if there is none."""
    # Names do not tell: `pow_.Scalar` takes a tensor and a number, `pow.Scalar` a number and a tensor.
    name = function.overloadpacket.__name__
    packet = getattr(getattr(torch.ops, function.namespace), name.removesuffix("_"), None)
    if packet is None or name == packet.__name__:
        return None
    wanted = _kinds(function)
    names = sorted(packet.overloads(), key=lambda name: name != function._overloadname)
    fitting = (c for c in (getattr(packet, name) for name in names) if _kinds(c) == wanted)
    return next((c for c in fitting if not mutated_arguments(c)), None)


def _kinds(function: Any) -> list[str]:
    """Types of an operator's arguments, but for the generator that a random one may take."""
    return [kind for name, kind in _arguments(function) if name != "generator"]


def _arguments(function: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in function._schema.arguments]


def views_first_argument(function: Any) -> bool:
    """Whether the result may share storage with the first argument, by schema or by tag.

    Dropout in evaluation mode returns its very argument without saying so in the schema.
    """
    if torch.Tag.maybe_aliasing_or_mutating in function.tags:
        return True
    first = function._schema.arguments[0].alias_info if function._schema.arguments else None
    return first is not None and not first.is_write


def parsed_conversion(
    *args: Any, **kwargs: Any
) -> tuple[torch.device | None, torch.dtype | None, torch.memory_format | None]:
    """What the arguments of `Module.to` ask for: a device, a type, an order in memory."""
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, layout


def min_and_max_of_export() -> str:
    """The file of what stands for `min` and `max` while torch.export traces."""
    return str(non_strict_utils.__file__)


def memory_of(tensor: torch.Tensor) -> int:
    """What tells one piece of memory from another, for real and for fake tensors."""
    place: int = tensor.untyped_storage()._cdata
    return place


def writes_to(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


def apply_function(function: Any, *args: Any) -> Any:
    """Apply an `autograd.Function`, whatever stands for `apply` at the moment."""
    return _apply(function, *args)


def has_gradient_hook(part: torch.Tensor | torch.nn.Module) -> bool:
    """Whether a parameter or a module does something to gradients in a backward."""
    names = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(part, name, None) for name in names)


def shares_storage(value: Any, other: Any) -> bool:
    """Whether two (fake) tensors, or a tuple of tensors and a tensor, lie in the same memory."""
    parts = value if isinstance(value, (tuple, list)) else (value,)
    places = {p.untyped_storage()._cdata for p in parts if isinstance(p, torch.Tensor)}
    return isinstance(other, torch.Tensor) and other.untyped_storage()._cdata in places


@dataclass(frozen=True)
class OpDefinition:
    """What `torch.library.custom_op` was told about an operator.

    Attributes:
        name: Such as `mylib::scale`.
        schema: Its arguments and results in torch's notation.
        function: What it computes.
        fake: The shapes of its results, where registered.
        backward: Its gradient, where registered.
        setup_context: What the gradient keeps of the forward, where registered.
    """

    name: str
    schema: str
    function: Callable[..., Any]
    fake: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    setup_context: Callable[..., Any] | None


def op_definition(target: str) -> OpDefinition | None:
    """How the operator with a name such as `mylib.scale.default` was defined; None if not in Python."""
    namespace, packet, *_ = target.split(".")
    made = OPDEFS.get(f"{namespace}::{packet}")
    if made is None:
        return None
    return OpDefinition(
        name=made._qualname,
        schema=made._schema,
        function=made._init_fn,
        fake=made._abstract_fn,
        backward=made._backward_fn,
        setup_context=made._setup_context_fn,
    )


def _schema(name: str, schema: str) -> Any:
    return torch._C.parse_schema(f"{name}{schema}")


def define_op(definition: OpDefinition) -> None:
    """Make an operator known to torch; one that is known already is left as it is."""
    if definition.name in OPDEFS:
        return
    written = [a.name for a in _schema(definition.name, definition.schema).arguments if _is_written(a)]
    made = torch.library.custom_op(
        definition.name, definition.function, mutates_args=written, schema=definition.schema
    )
    if definition.fake is not None:
        made.register_fake(definition.fake)
    if definition.backward is not None:
        made.register_autograd(definition.backward, setup_context=definition.setup_context)


@contextmanager
def checkpoints_within(around: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within it, `torch.utils.checkpoint` with `use_reentrant=False` runs its part within `around()`."""
    original = checkpoint_module._checkpoint_without_reentrant_generator

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        with around():
            yield from original(*args, **kwargs)

    checkpoint_module._checkpoint_without_reentrant_generator = generator
    try:
        yield
    finally:
        checkpoint_module._checkpoint_without_reentrant_generator = original
