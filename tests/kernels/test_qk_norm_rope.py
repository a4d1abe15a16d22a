"""Per-head RMSNorm, RoPE and the joint layout: both paths against diffusers' own pieces, outputs and gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaflux_kernels.qk_norm_rope import backward, forward, invertible, qk_norm_rope, reference
from megaflux_kernels.qk_norm_rope.streams import Saved, Stream
from tests.kernels.accuracy import assert_within_twice, randn, run
from tests.kernels.conftest import DEVICE, DTYPES

# (B, L, T, H, D): odd token counts, heads that do not fill a program, a text stream or none
SHAPES = [(2, 7, 3, 3, 32), (1, 5, 0, 10, 64), (1, 3, 6, 2, 128), (3, 1, 1, 1, 32)]


def table(tokens, D, dtype=torch.float32):
    """cos and sin (tokens, D), each number twice, as FluxPosEmbed gives them."""
    angles = randn(tokens, D // 2, seed=7, dtype=dtype, device=DEVICE) * 3
    return tuple(part.repeat_interleave(2, dim=1) for part in (angles.cos(), angles.sin()))


def inputs(shape, dtype, needs=(True,) * 6):
    """([qkv, txt_qkv or None, norm_q, norm_k, txt_norm_q, txt_norm_k], gradients of q, k, v)."""
    B, L, T, H, D = shape
    device = DEVICE
    values = [
        randn(B, L, 3 * H * D, seed=1, dtype=dtype, device=device) * 2,
        randn(B, T, 3 * H * D, seed=2, dtype=dtype, device=device) if T else None,
    ]
    for seed in range(3, 7):
        weight = 1 + 0.2 * randn(D, seed=seed, dtype=dtype, device=device).clamp(-2, 2)
        values.append(weight if seed < 5 or T else None)
    values = [v if v is None else v.requires_grad_(n) for v, n in zip(values, needs)]
    return values, [randn(B, H, L + T, D, seed=s, dtype=dtype, device=device) for s in (8, 9, 10)]


def call(op, shape, **options):
    """`op` as a function of the six tensors; the tables in at least float32."""
    cos, sin = table(shape[1] + shape[2], shape[4])

    def run(qkv, *others):
        wide = torch.promote_types(qkv.dtype, torch.float32)
        image, text = streams(qkv, *others)
        return op(image, (cos.to(wide), sin.to(wide)), shape[3], text, **options)

    return run


def streams(qkv, txt_qkv, norm_q, norm_k, txt_norm_q, txt_norm_k):
    """The image's Stream and the text's, or None."""
    return Stream(qkv, norm_q, norm_k), None if txt_qkv is None else Stream(txt_qkv, txt_norm_q, txt_norm_k)


def forward_saved(tensors, heads, keep_input=False):
    """What `forward` of the six tensors leaves for `backward`, and its v."""
    image, text = streams(*tensors)
    qkv, txt_qkv, norm_q, norm_k, txt_norm_q, txt_norm_k = tensors
    T = 0 if txt_qkv is None else txt_qkv.shape[1]
    rope = table(qkv.shape[1] + T, norm_q.shape[0])
    q, k, v, rstd = forward(image, rope, heads, text)
    kept = (qkv, txt_qkv) if keep_input else (None, None)
    return Saved(q, k, rstd, norm_q, norm_k, *rope, txt_norm_q, txt_norm_k, *kept, T), v


def as_given(douts):
    """Gradients (B, H, S, D) as `backward` takes them: (B, S, H, D)."""
    return tuple(d.transpose(1, 2) for d in douts)


def test_definition_is_diffusers_own():
    from megaflux.common import compat  # noqa: F401  (before diffusers)
    from diffusers.models.embeddings import apply_rotary_emb  # isort: skip

    shape = (2, 7, 3, 3, 32)
    (qkv, txt_qkv, norm_q, norm_k, txt_norm_q, txt_norm_k), _ = inputs(shape, torch.float32)
    q, k, v = call(reference.definition, shape)(qkv, txt_qkv, norm_q, norm_k, txt_norm_q, txt_norm_k)
    pairs = zip((txt_qkv, qkv), (txt_norm_q, norm_q), (txt_norm_k, norm_k))
    parts = [(x.chunk(3, -1), wq, wk) for x, wq, wk in pairs]
    norm = torch.nn.functional.rms_norm
    for out, i, w in ((q, 0, 1), (k, 1, 2)):
        joint = torch.cat([norm(p[0][i].unflatten(-1, (3, -1)), (32,), p[w], 1e-6) for p in parts], dim=1)
        torch.testing.assert_close(out.transpose(1, 2), apply_rotary_emb(joint, table(10, 32), sequence_dim=1))
    assert torch.equal(v.transpose(1, 2).flatten(2), torch.cat([p[0][2] for p in parts], dim=1))


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_op_is_its_definition(path, shape, dtype, keep_input):
    values, douts = inputs(shape, dtype)
    ours = call(qk_norm_rope, shape, keep_input=keep_input)
    assert_within_twice(ours, call(reference.definition, shape), values, douts, dtype)


def test_small_rows_feel_epsilon_as_in_torch(path):
    shape = (1, 2, 1, 1, 32)
    values, douts = inputs(shape, torch.float32)
    values[:2] = [(v.detach() * 1e-3).requires_grad_() for v in values[:2]]
    assert_within_twice(call(qk_norm_rope, shape), call(reference.definition, shape), values, douts, torch.float32)


@pytest.mark.parametrize("keep_input", [False, True])
def test_torch_path_in_bfloat16(keep_input):
    if DEVICE == "cpu":
        values, douts = inputs(SHAPES[0], torch.bfloat16)
        ours = call(qk_norm_rope, SHAPES[0], keep_input=keep_input)
        assert_within_twice(ours, call(reference.definition, SHAPES[0]), values, douts, torch.bfloat16)


def test_float64_is_exact():
    values, douts = inputs(SHAPES[0], torch.float64)
    want = run(call(reference.definition, SHAPES[0]), values, douts, torch.float64)
    for keep_input in (False, True):
        ours = run(call(qk_norm_rope, SHAPES[0], keep_input=keep_input), values, douts, torch.float64)
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "needs",
    [
        (True, False, False, False, False, False),
        (False, True, False, False, False, False),
        (False, False, True, False, False, True),
    ],
)
def test_only_what_is_needed_has_a_gradient(path, needs):
    values, douts = inputs(SHAPES[0], torch.float32, needs)
    if any(needs[:2]):
        ours, plain = call(qk_norm_rope, SHAPES[0]), call(reference.definition, SHAPES[0])
    else:  # v depends on no norm weight
        ours, plain = (lambda *v, op=op: call(op, SHAPES[0])(*v)[:2] for op in (qk_norm_rope, reference.definition))
        douts = douts[:2]
    assert_within_twice(ours, plain, values, douts, torch.float32)


def test_outputs_are_attentions_layout(path):
    values, _ = inputs(SHAPES[0], torch.float32)
    for part in call(qk_norm_rope, SHAPES[0])(*values):
        assert part.shape == (2, 3, 10, 32)
        assert part.transpose(1, 2).is_contiguous()  # (B, S, H, D) in memory


def test_slices_of_a_wider_product_are_read_where_they_lie(path):
    B, L, T, H, D = shape = (2, 5, 2, 2, 32)
    wide = randn(B, L, 5 * H * D, seed=1, dtype=torch.float32, device=DEVICE).requires_grad_()
    values, douts = inputs(shape, torch.float32)

    def sliced(op):
        run = call(op, shape)
        return lambda wide, *others: run(wide[..., H * D : 4 * H * D], *others)

    assert_within_twice(sliced(qk_norm_rope), sliced(reference.definition), [wide, *values[1:]], douts, torch.float32)


def test_norm_weights_of_any_strides_are_read(path):
    shape = (1, 3, 2, 2, 32)
    values, douts = inputs(shape, torch.float32)
    values[2:] = [torch.stack([v.detach(), v.detach() * 9], dim=1).requires_grad_() for v in values[2:]]
    values[0] = torch.stack([values[0].detach(), values[0].detach() * 9], dim=-1).requires_grad_()

    def strided(op, **options):
        run = call(op, shape, **options)
        return lambda qkv, txt_qkv, *norms: run(qkv[..., 0], txt_qkv, *(n[:, 0] for n in norms))

    for keep_input in (False, True):
        ours = strided(qk_norm_rope, keep_input=keep_input)
        assert_within_twice(ours, strided(reference.definition), values, douts, torch.float32)


def test_raw_backward_reads_inputs_of_any_strides(path):
    shape = (1, 3, 2, 2, 32)
    values, douts = inputs(shape, torch.float32)
    tensors = [v.detach() for v in values]
    found = []
    for given in (tensors, [torch.stack([t, t * 9], dim=-1)[..., 0] for t in tensors]):
        saved, _ = forward_saved(given, 2, keep_input=True)
        found.append(backward(as_given(douts), saved, True))
    outs = call(qk_norm_rope, shape, keep_input=True)(*values)
    qkv, txt_qkv, *norms = torch.autograd.grad(outs, values, douts)
    for result in found:
        assert len(result) == 6
        for a, b in zip(result, (qkv, txt_qkv, *norms)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("text", [0, 2])
def test_raw_backward_leaves_out_what_is_not_there(path, text):
    values, douts = inputs((1, 3, text, 2, 32), torch.float32)
    saved, _ = forward_saved([v if v is None else v.detach() for v in values], 2)
    for need in (False, True):
        found = backward(as_given(douts), saved, need)
        assert [g is not None for g in found] == [True, text > 0, need, need, need and text > 0, need and text > 0]


def test_gradients_of_any_strides_are_read(path):
    shape = (2, 5, 2, 3, 32)
    values, douts = inputs(shape, torch.float32)
    outs = call(qk_norm_rope, shape)(*values)
    want = torch.autograd.grad(outs, values, douts, retain_graph=True)
    strided = [d.transpose(1, 2).contiguous().transpose(1, 2) for d in douts]  # as flash attention returns them
    strided[1] = torch.cat([strided[1]] * 2, dim=-1)[..., :32]
    for a, b in zip(torch.autograd.grad(outs, values, strided), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_weights_near_zero_need_the_input(path, weight):
    shape = (1, 6, 2, 2, 32)
    values, douts = inputs(shape, torch.float32)
    with torch.no_grad():
        values[2][[3, 8]] = weight
        values[5][::2] = weight
    assert not invertible(values[2]) and invertible(values[3])
    for keep_input in (True, None):
        ours = call(qk_norm_rope, shape, keep_input=keep_input)
        assert_within_twice(ours, call(reference.definition, shape), values, douts, torch.float32)
    outs = call(qk_norm_rope, shape, keep_input=False)(*values)  # less exact, never NaN
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(outs, values, douts))


def test_uneven_pairs_are_not_invertible():
    weight = torch.ones(8)
    assert invertible(weight, weight * 1e-3)  # small, but alike
    weight[5] = -0.126
    assert invertible(weight)
    weight[5] = 0.124
    assert not invertible(weight)


@pytest.mark.parametrize("keep_input", [False, True])
def test_backward_keeps_what_attention_keeps(path, keep_input):
    shape = (1, 50, 14, 2, 32)
    values, _ = inputs(shape, torch.float32)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        outs = call(qk_norm_rope, shape, keep_input=keep_input)(*values)
    large = {t.untyped_storage().data_ptr() for t in seen if t.ndim > 2 and t.shape[-1] > 2}
    attention = {out.untyped_storage().data_ptr() for out in outs}
    inputs_kept = {t.untyped_storage().data_ptr() for t in values[:2]}
    assert large - attention == (inputs_kept if keep_input else set())


@pytest.mark.parametrize("keep_input", [False, True])
def test_every_element_is_written(triton_path, poisoned, keep_input):
    shape = (2, 7, 3, 3, 32)
    values, douts = inputs(shape, torch.float32)
    saved, v = forward_saved([value.detach() for value in values], 3, keep_input)
    grads = backward(as_given(douts), saved, True)
    assert all(torch.isfinite(t).all() for t in (*saved[:3], v, *grads))


@pytest.mark.parametrize("keep_input", [False, True])
def test_the_gradient_may_be_columns_of_a_wider_tensor(path, keep_input):
    values, douts = inputs((2, 7, 3, 3, 32), torch.float32)
    saved, _ = forward_saved([v.detach() for v in values], 3, keep_input)
    given = as_given(douts), saved, True
    wide = torch.full((2, 7, 3 * 96 + 40), 7.0, device=DEVICE)
    want, found = backward(*given), backward(*given, out=wide[..., 8:-32])
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert torch.equal(wide[..., 8:-32], want[0])
    assert (wide[..., :8] == 7).all() and (wide[..., -32:] == 7).all()
    for bad in (wide[..., 8:-31], wide[:1, :, 8:-32], torch.zeros(2, 288, 7, device=DEVICE).transpose(1, 2)):
        with pytest.raises(ValueError, match="want out"):
            backward(*given, out=bad)


def test_gradients_are_the_same_every_time(path):
    values, douts = inputs((2, 40, 9, 3, 32), torch.float32)
    run = call(qk_norm_rope, (2, 40, 9, 3, 32))
    first, second = (torch.autograd.grad(run(*values), values, douts) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("text", [True, False])
def test_opcheck(triton_path, text):
    shape = (1, 3, 2 if text else 0, 2, 32)
    (qkv, txt_qkv, norm_q, norm_k, txt_norm_q, txt_norm_k), douts = inputs(shape, torch.float32)
    cos, sin = table(3 + shape[2], 32)
    arguments = (qkv, norm_q, norm_k, cos, sin, 2, txt_qkv, txt_norm_q, txt_norm_k, 1e-6, False)
    torch.library.opcheck(torch.ops.megaflux.qk_norm_rope.default, arguments)
    q, k, v, rstd = (t.detach() for t in torch.ops.megaflux.qk_norm_rope(*arguments))
    qkv, txt_qkv, norm_q, norm_k, txt_norm_q, txt_norm_k = (
        t if t is None else t.detach() for t in (qkv, txt_qkv, norm_q, norm_k, txt_norm_q, txt_norm_k)
    )
    grads = [d.transpose(1, 2) for d in douts]
    for need, kept in ((False, (None, None)), (True, (qkv, txt_qkv))):
        saved = Saved(q, k, rstd, norm_q, norm_k, cos, sin, txt_norm_q, txt_norm_k, *kept, shape[2])
        torch.library.opcheck(torch.ops.megaflux.qk_norm_rope_backward.default, (*grads, *saved, need))
        out = torch.zeros(1, 3, 3 * 64 + 8)[..., 4:-4]
        torch.library.opcheck(torch.ops.megaflux.qk_norm_rope_backward_out.default, (*grads, *saved, need, out))
    if not text:  # weights of a stream without tokens
        saved = Saved(q, k, rstd, norm_q, norm_k, cos, sin, norm_q, norm_k)
        torch.library.opcheck(torch.ops.megaflux.qk_norm_rope_backward.default, (*grads, *saved, True))


def test_compiles_and_checkpoints(triton_path):
    values, douts = inputs(SHAPES[0], torch.float32)
    run = call(qk_norm_rope, SHAPES[0])
    want = torch.autograd.grad(run(*values), values, douts)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*values)
    again = checkpoint(run, *values, use_reentrant=False)
    for outs in (compiled, again):
        for a, b in zip(torch.autograd.grad(outs, values, douts), want):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"heads": 5}, "for 5 heads"),
        ({"heads": 0}, "for 0 heads"),
        ({"cos": torch.ones(5, 8, device="meta")}, "move them"),
        ({"norm_q": torch.ones(8, dtype=torch.float16)}, "cast them"),
        ({"norm_k": torch.ones(4)}, "norm weights of shape"),
        ({"cos": torch.ones(4, 8)}, "cos and sin of shape"),
        ({"sin": torch.ones(5, 8, requires_grad=True)}, "detach"),
        ({"txt_qkv": torch.ones(1, 2, 24)}, "beside image.qkv"),
    ],
)
def test_unsupported_input_is_refused(bad, match):
    good = {
        "qkv": torch.ones(1, 3, 48),
        "norm_q": torch.ones(8),
        "norm_k": torch.ones(8),
        "cos": torch.ones(5, 8),
        "sin": torch.ones(5, 8),
        "heads": 2,
        "txt_qkv": torch.ones(1, 2, 48),
        "txt_norm_q": torch.ones(8),
        "txt_norm_k": torch.ones(8),
    }

    def run(qkv, norm_q, norm_k, cos, sin, heads, txt_qkv, txt_norm_q, txt_norm_k):
        text = Stream(txt_qkv, txt_norm_q, txt_norm_k)
        return qk_norm_rope(Stream(qkv, norm_q, norm_k), (cos, sin), heads, text)

    run(**good)
    with pytest.raises(ValueError, match=match):
        run(**(good | bad))


def test_head_sizes_of_the_triton_path_are_named(triton_path):
    with pytest.raises(ValueError, match="use 32, 64, 128"):
        ones = [torch.ones(*shape, device=DEVICE) for shape in ((1, 3, 48), (8,), (8,), (3, 8), (3, 8))]
        qk_norm_rope(Stream(*ones[:3]), tuple(ones[3:]), 2)
