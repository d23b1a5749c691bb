"""The CPU kernels compute what the library computes."""

import pytest
import torch
from test_model import assert_gradients_equal, build, gradients, random_ids
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from minimind.model import kernels_minimind
from minimind.model.modeling_minimind import apply_rotary_pos_emb as rotary


def left_padding_mask(ids):
    mask = torch.ones_like(ids)
    mask[1, :140] = 0
    return mask


def two_documents_mask(ids):
    """(B, 1, S, S), causal and block-diagonal: True where a token sees another."""
    document = torch.arange(ids.shape[1]) >= 170
    return (document[:, None] == document) & torch.ones(
        ids.shape[1], ids.shape[1], dtype=torch.bool
    ).tril()


def packed_rows_mask(ids):
    """Documents of other lengths in each row, so that each block of each row has its own keys."""
    places = torch.arange(ids.shape[1])
    masks = [torch.zeros(len(places), len(places)) for _ in ids]
    for mask, starts in zip(masks, ([0, 290], [0, 30, 128, 250]), strict=True):
        document = torch.bucketize(places, torch.tensor(starts), right=True)
        mask += document[:, None] == document
    return torch.stack(masks).bool().tril()[:, None]


MASKS = {
    "packed rows": packed_rows_mask,
    "none": lambda ids: None,
    "left padding": left_padding_mask,
    "two documents": lambda ids: two_documents_mask(ids).expand(len(ids), 1, -1, -1),
    "both ways": lambda ids: torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool),
}


def results(function, *inputs):
    """The output of a function, and the gradients of all inputs for one fixed gradient of it."""
    inputs = [each.clone().requires_grad_() for each in inputs]
    output = function(*inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, inputs, grad.to(output.dtype))]


# Half precision: two roundings more or less, of gradients up to 8
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float, 2e-6), (torch.bfloat16, 2e-2)])
def test_norms_gates_and_rotations_are_those_of_the_library(dtype, tolerance):
    numbers = torch.Generator().manual_seed(0)
    states, other = torch.randn(2, 2, 7, 4, 16, generator=numbers).to(dtype)
    weight = torch.rand(16, generator=numbers) + 0.5
    norm = Qwen3RMSNorm(16, eps=1e-2)
    angles = torch.rand(2, 7, 8, generator=numbers)
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1) for f in (torch.cos, torch.sin))
    signed = torch.cat((-sin[..., :8], sin[..., 8:]), dim=-1)

    def expected_rotation(x):
        return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    def expected_norm(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, x)

    for actual, expected, inputs in (
        (lambda x, w: kernels_minimind.rms_norm(x, w, 1e-2), expected_norm, (states, weight)),
        (kernels_minimind.SwiGLU.apply, lambda x, y: silu(x) * y, (states, other)),
        (lambda x: rotary(x, cos, signed), expected_rotation, (states,)),
    ):
        pairs = zip(results(actual, *inputs), results(expected, *inputs), strict=True)
        for value, wanted in pairs:
            assert value.dtype == wanted.dtype
            torch.testing.assert_close(value, wanted, atol=tolerance, rtol=tolerance)


def test_under_autocast_the_layers_share_one_copy_of_their_normed_input():
    """Each of the five projections of a layer would otherwise cast it to a copy of its own."""
    model, ids = build().train(), random_ids(2, 40)
    width = model.config.hidden_size
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model(ids, labels=ids, use_cache=False)
    # After two norms per layer and the last; queries twice, and the input of each o_proj
    inputs = [t for t in kept.values() if t.dtype == torch.bfloat16 and t.numel() == 80 * width]
    assert len(inputs) <= 5 * model.config.num_hidden_layers + 1


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [64, 65, 300])
def test_attention_in_blocks_gives_the_logits_and_gradients_of_eager_attention(mask, length):
    """Lengths of one block of queries, one and a bit, and several; masks that let tokens see less,
    or more."""
    ids, found = random_ids(2, length), []
    mask = MASKS[mask](ids)
    seen = torch.ones_like(ids).bool() if mask is None or mask.ndim == 4 else mask.bool()
    for attention in ("eager", "sdpa"):
        model = build(attn_implementation=attention, max_position_embeddings=512).train()
        # A mask of shape (B, 1, S, S) goes to the layers as it is; eager attention adds it to the
        # weights.
        given = mask
        if attention == "eager" and mask is not None and mask.ndim == 4:
            given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float).min)
        logits = model(ids, attention_mask=given, use_cache=False).logits
        logits[seen].square().mean().backward()
        found.append((logits[seen].detach(), gradients(model)))
    (expected_logits, expected), (logits, actual) = found
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    assert_gradients_equal(actual, expected)


def test_a_block_of_queries_meets_only_keys_of_its_own_documents():
    """Row by row where the rows differ, else for all at once, rounded to multiples of 16."""
    ids = random_ids(2, 300)
    assert kernels_minimind.key_ranges(packed_rows_mask(ids)) == [
        [[0, 64], [0, 128], [0, 192], [0, 256], [0, 300]],
        [[0, 64], [16, 128], [128, 192], [128, 256], [240, 300]],
    ]
    two = two_documents_mask(ids)[None, None]
    assert kernels_minimind.key_ranges(two) == [
        [[0, 64], [0, 128], [0, 192], [160, 256], [160, 300]]
    ]


def test_attention_in_blocks_computes_hardly_more_than_the_documents_of_a_row():
    documents = (torch.arange(1024) // 128)[None]
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    layer, states = build().model.layers[0].self_attn, torch.randn(1, 4, 1024, 8)
    counts = []
    for visible in (None, mask):
        with FlopCounterMode(display=False) as counter:
            kernels_minimind.blocked_attention_forward(
                layer, states, states[:, :2], states[:, :2], visible, 1.0
            )
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 4 * 8 * 64**2 * blocks for blocks in (136, 24)]


def test_attention_in_blocks_drops_probabilities_in_training_and_keeps_their_mean():
    layer = build(attention_dropout=0.25).model.layers[0].self_attn
    # Flat attention to ones: each output is 1
    query, value = torch.zeros(2, 4, 200, 8), torch.ones(2, 2, 200, 8)

    def outputs():
        return kernels_minimind.blocked_attention_forward(
            layer.train(), query, value, value, None, 1.0, dropout=p
        )[0]

    torch.manual_seed(0)
    p = 0.25
    # The first token sees itself alone
    assert outputs()[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert outputs().mean() == pytest.approx(1, abs=0.02)
    p = 0.0
    torch.testing.assert_close(outputs(), torch.ones(2, 200, 4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items", [None, 7])
def test_the_loss_and_its_gradient_are_those_of_the_library_piece_by_piece(
    monkeypatch, num_items, dtype
):
    # 16 rows in pieces of 3
    monkeypatch.setattr(kernels_minimind, "PIECE", {True: 3 * 97, False: 3 * 97})
    logits = torch.randn(2, 8, 97, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    labels = random_ids(2, 8)
    labels[0, 2:5] = labels[1, 7] = -100
    found = []
    for function in (kernels_minimind.causal_lm_loss, ForCausalLMLoss):
        leaf = logits.clone().requires_grad_()
        loss = function(logits=leaf, labels=labels, vocab_size=97, num_items_in_batch=num_items)
        (3 * loss).backward()
        found.append((loss.detach(), leaf.grad))
    (loss, grad), (expected_loss, expected_grad) = found
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad, expected_grad)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
