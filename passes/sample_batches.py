"""Rules for ops that work on one matrix, spectrum, cell or row for each sample (see `samples.py`)."""

from collections.abc import Sequence

from graphpar.ir.ops import Argument, TensorType
from graphpar.ir.optable import packet
from graphpar.passes.sample_moves import along
from graphpar.passes.sample_rules import pointwise
from graphpar.passes.samples import SHARED, Call, Samples, dims_argument, rule

# --- matrices in the last two dimensions -----------------------------------------------------------


@rule(
    "linalg_inv", "linalg_inv_ex", "inverse", "linalg_det", "det", "linalg_slogdet", "slogdet",
    "logdet", "linalg_cholesky", "linalg_cholesky_ex", "cholesky", "linalg_qr", "linalg_svd", "svd",
    "linalg_eigh", "linalg_svdvals", "linalg_eigvalsh", "linalg_matrix_exp", "matrix_exp", "linalg_pinv",
    "linalg_matrix_power", "linalg_lu", "linalg_lu_factor",
)  # fmt: skip
def _matrices(call: Call) -> Samples:
    x = call.op.args[0]
    if call.state(x).kind != "sample" or not _is_before(call, x, 2):
        return call.mixed("works on a matrix of several samples")
    if any(call.state(r) != SHARED for r in call.operands()[1:]):
        return call.mixed("works on a matrix with what depends on the batch")
    return call.state(x)


@rule("linalg_solve_triangular", "linalg_solve", "cholesky_solve", "triangular_solve")
def _solve(call: Call) -> Samples:
    """One system for each sample, or one for all whose right-hand sides are columns of samples."""
    right, left = call.op.args[:2]
    if packet(call.op).startswith("linalg"):
        left, right = right, left
    if packet(call.op) == "linalg_solve" and _as_sizes_say(call.type(left), call.type(right)):
        return call.mixed("solves for a matrix, or for vectors where sizes happen to fit")
    if call.state(left) == SHARED and call.state(right).kind == "sample":
        kind = call.type(right)
        apart = kind is not None and call.dim(right) != max(len(kind.shape) - 2, 0)
        return call.like(right) if apart else call.mixed("solves for several samples at once")
    if not call.same_layout() or not all(_is_before(call, r, 2) for r in call.operands()):
        return call.mixed("solves for several samples at once")
    return call.state(call.first_sample() or left)


def _as_sizes_say(left: TensorType | None, right: TensorType | None) -> bool:
    """Whether `linalg_solve` may take a matrix of a part of the batch for one vector for each system."""
    if left is None or right is None or len(right.shape) < 2:
        return False
    return len(right.shape) == len(left.shape) - 1


@rule("diagonal", "diag_embed", "linalg_diagonal")
def _diagonal(call: Call) -> Samples:
    x = call.op.args[0]
    kind = call.type(x)
    pair: Argument = (call.op.argument(2, "dim1", 0), call.op.argument(3, "dim2", 1))
    if call.state(x).kind != "sample" or kind is None:
        return call.mixed("takes the diagonal of a sum over the batch")
    if packet(call.op) == "diagonal" and call.dim(x) in dims_argument(pair, len(kind.shape)):
        return call.mixed("takes a diagonal across samples")
    return call.like(x)


@rule("cdist")
def _distances(call: Call) -> Samples:
    """Distances of all rows of one set to all rows of another."""
    x, y = call.op.args[:2]
    kinds = call.type(x), call.type(y)
    if kinds[0] is None or kinds[1] is None or not call.same_layout():
        return call.mixed("measures distances between samples")
    if any(call.dim(a) == len(k.shape) - 1 for a, k in zip((x, y), kinds, strict=True) if k):
        return call.mixed("sums over samples in a distance")
    if {call.state(x).kind, call.state(y).kind} == {"sample"}:
        if not (_is_before(call, x, 2) and _is_before(call, y, 2)):
            return call.mixed("measures distances between samples")
    return call.like(call.first_sample() or x)


@rule("linalg_cross", "cross")
def _cross(call: Call) -> Samples:
    """Without a dimension `cross` takes the first of size 3, which may be that of a part's samples."""
    dim = call.op.argument(2, "dim", -1 if packet(call.op) == "linalg_cross" else None)
    if not isinstance(dim, int) or call.out_dim() in dims_argument(dim, len(call.op.type.shape)):
        return call.mixed("multiplies across samples")
    return pointwise(call)


@rule("pairwise_distance")
def _pairwise(call: Call) -> Samples:
    if any(not _is_before(call, r, 1) for r in call.operands()) or not call.same_layout():
        return call.mixed("measures distances between samples")
    return call.like(call.first_sample() or call.op.args[0])


def _is_before(call: Call, argument: Argument, behind: int) -> bool:
    """Whether a value's samples lie before its last dimensions; so they do where it has none."""
    kind, dim = call.type(argument), call.dim(argument)
    if call.state(argument) == SHARED:
        return True
    return kind is not None and dim is not None and dim < len(kind.shape) - behind


# --- spectra ---------------------------------------------------------------------------------------


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def _spectrum(call: Call) -> Samples:
    return along(call, 2, -1, "transforms along the batch")


@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2")
def _spectrum_of_pictures(call: Call) -> Samples:
    return along(call, 2, (-2, -1), "transforms along the batch")


@rule("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn")
def _spectrum_of_volumes(call: Call) -> Samples:
    return along(call, 2, None, "transforms along the batch")


@rule("fft_fftshift", "fft_ifftshift")
def _shifted_spectrum(call: Call) -> Samples:
    return along(call, 1, None, "shifts the batch")


@rule("stft", "istft")
def _short_spectra(call: Call) -> Samples:
    x = call.op.args[0]
    kind = call.type(x)
    rank = 2 if packet(call.op) == "stft" else 3
    alone = all(call.state(r) == SHARED for r in call.operands()[1:])
    if not alone or kind is None or len(kind.shape) != rank or call.dim(x) != 0:
        return call.mixed("transforms along the batch")
    return call.like(x)


# --- cells and bilinear forms ----------------------------------------------------------------------


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(call: Call) -> Samples:
    x, before, *weights = call.op.args
    hidden = before if isinstance(before, tuple) else (before,)
    if call.state(x).kind != "sample" or call.dim(x) != 0:
        return call.mixed("does not have the batch as its first dimension")
    if any(call.state(h) != call.state(x) or call.dim(h) != 0 for h in hidden):
        return call.mixed("starts from a state that is not one for each sample")
    if any(call.state(w) != SHARED for w in weights):
        return call.mixed("has weights that depend on the batch")
    return call.state(x)


@rule("graphpar.packed_rnn.default")
def _packed(call: Call) -> Samples:
    """Recurrent layers over sequences of unlike lengths (see `graphpar.runtime.packed`)."""
    x, lengths, *states, weights = call.op.args[:5]
    own = call.state(x)
    if own.kind != "sample" or call.dim(x) != 0 or call.state(lengths) != own:
        return call.mixed("runs along the batch")
    if any(call.state(state) != own or call.dim(state) != 1 for state in states):
        return call.mixed("starts from a state that is not one for each sample")
    if isinstance(weights, tuple) and any(call.state(w) != SHARED for w in weights):
        return call.mixed("has weights that depend on the batch")
    return own


@rule("bilinear")
def _bilinear(call: Call) -> Samples:
    x, y, *weights = call.op.args
    if any(call.state(w) != SHARED for w in weights):
        return call.mixed("has weights that depend on the batch")
    if call.state(x) != call.state(y) or not (_is_before(call, x, 1) and _is_before(call, y, 1)):
        return call.mixed("multiplies values whose samples are laid out differently")
    return call.like(x) if call.dim(x) == call.dim(y) else call.mixed("combines samples with each other")


# --- single elements by a table that all share -----------------------------------------------------


@rule("complex", "polar")
def _pairs(call: Call) -> Samples:
    return pointwise(call)


@rule("bucketize", "isin")
def _looked_up(call: Call) -> Samples:
    x, *table = call.operands()
    if call.state(x).kind != "sample" or any(call.state(r) != SHARED for r in table):
        return call.mixed("looks up in a table that depends on the batch")
    return call.like(x)


@rule("searchsorted")
def _searched(call: Call) -> Samples:
    rows, x = call.op.args[:2]
    if call.state(rows) == SHARED and call.state(x).kind == "sample":
        kind = call.type(rows)
        return call.like(x) if kind and len(kind.shape) == 1 else call.mixed("looks up by position")
    if not call.same_layout() or not (_is_before(call, rows, 1) and _is_before(call, x, 1)):
        return call.mixed("looks up across samples")
    return call.like(x)


@rule("index_add", "index_copy", "index_fill", "index_reduce")
def _written_along(call: Call) -> Samples:
    """Writes at places along another dimension than that of the samples."""
    x, dim, index, *rest = call.op.args
    kind = call.type(x)
    if call.state(x).kind != "sample" or kind is None or call.state(index) != SHARED:
        return call.mixed("writes across samples")
    if dims_argument(dim, len(kind.shape)) == (call.dim(x),):
        return call.mixed("writes across samples")
    for value in rest:
        own = call.type(value)
        if own is None or (call.state(value) == SHARED and own.shape == ()):
            continue
        if call.state(value) != call.state(x) or call.dim(value) != call.dim(x):
            return call.mixed("writes values whose samples are laid out differently")
    return call.like(x)


@rule("index_put")
def _put(call: Call) -> Samples:
    """Writes within each sample: its dimension is left out, or indexed by the sample's own position."""
    x, indices, value = call.op.args[:3]
    assert isinstance(indices, tuple)
    state, dim = call.state(x), call.dim(x)
    if state.kind != "sample" or dim is None:
        return call.mixed("writes across samples")
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    by_position = any(place == dim for place, _ in given)
    allowed = {"shared"}
    if by_position:
        own_row = call.state(indices[0]).kind == "iota" and call.dim(indices[0]) == 0
        if dim != 0 or not own_row or state != Samples("sample"):
            return call.mixed("writes across samples")
        allowed = {"shared", "sample"}
        if len({len(kind.shape) for _, index in given if (kind := call.type(index)) is not None}) != 1:
            return call.mixed("writes across samples")
    for place, index in given:
        kind = call.type(index)
        if kind is None or kind.dtype == "bool":
            return call.mixed("writes where a mask says, in the order of the whole batch")
        if place != dim and call.state(index).kind not in allowed:
            return call.mixed("writes across samples")
        if call.state(index).kind == "sample" and (call.state(index) != state or call.dim(index) != 0):
            return call.mixed("writes across samples")
    return call.like(x) if _fits(call, value, given, by_position) else call.mixed("writes across samples")


def _fits(call: Call, value: Argument, given: Sequence[tuple[int, Argument]], by_position: bool) -> bool:
    """Whether what is written has its samples where the places written to have theirs."""
    kind, x = call.type(value), call.op.args[0]
    if kind is None or call.state(value) == SHARED:
        return kind is None or not kind.batch_dims
    if call.state(value) != call.state(x):
        return False
    places = [place for place, _ in given]
    if places != list(range(places[0], places[0] + len(places))):
        return False
    shapes = [k.shape for _, index in given if (k := call.type(index)) is not None]
    written = max(map(len, shapes))
    whole, dim, own = call.type(x), call.dim(x), call.dim(value)
    if whole is None or dim is None or own is None:
        return False
    rank = len(whole.shape) - len(places) + written
    at = 0 if by_position else dim if dim < places[0] else dim - len(places) + written
    return at - rank == own - len(kind.shape)
