"""The loss and gradients of rows of chats, in the trainer and packed."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from example_chats import CONVERSATIONS, IGNORED, LONG, PAD, SHORT, tokenized
from peft import LoraConfig
from pipeline import assistant, user
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.conversations import Conversation
from minimind.data.packing import PackedCollator
from minimind.training.trainers import ChatSFTTrainer

WEIGHTED = [
    Conversation(
        [user("a"), assistant("fox dog", weight=0.5), user("c"), assistant("d", weight=2.0)],
        weight=3.0,
    ),
    Conversation(SHORT),
    Conversation(LONG, weight=0.25),
    Conversation([user("q"), assistant("no", weight=0.0), user("q"), assistant("yes", weight=1.5)]),
]


def loss_by_hand(model, tokenizer, options):
    """The formulas of docs/data.md, conversation by conversation, from log-probabilities."""
    numerator = denominator = 0.0
    for messages, _, row_weight in WEIGHTED:
        ids, ends, message_weights = [], [], []
        for index, message in enumerate(messages):
            (prompt,) = (
                encode_prompts([messages[:index]], ChatEncoder(tokenizer)) if index else ([],)
            )
            if message["role"] == "assistant":
                (whole,) = ChatEncoder(tokenizer).encode([Conversation(messages[: index + 1])])
                ids = whole.ids
                ends.append((len(prompt), len(ids)))
                message_weights.append(message.get("weight", 1.0))
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        if not options.get("weighted_loss"):
            message_weights, row_weight = [float(weight > 0) for weight in message_weights], 1.0
        losses, weights = [], []
        for (start, end), weight in zip(ends, message_weights, strict=True):
            losses += [-log_probabilities[i - 1, ids[i]] for i in range(start, end)]
            weights += [weight] * (end - start)
        weighted = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        if options.get("loss_normalization") == "conversation":
            numerator += row_weight * weighted / sum(weights)
            denominator += row_weight
        else:
            numerator += row_weight * weighted
            denominator += row_weight * sum(weights)
    return numerator / denominator


@pytest.fixture
def sft(model, tokenizer, tmp_path):
    """Builds a trainer of a given class."""

    def build(trainer_class, rows, packing, peft_config=None, **options):
        arguments = SFTConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            # The library's default; TRL's True is the old name of another argument
            gradient_checkpointing=None,
            dataloader_pin_memory=False,
            report_to="none",
            max_length=192,
            packing=packing,
            **options,
        )
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return trainer_class(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return build


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(actual, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"weighted_loss": True},
        {"loss_normalization": "conversation"},
        {"loss_normalization": "conversation", "weighted_loss": True},
    ],
)
def test_weighted_and_normalised_losses_follow_their_formulas(
    model, tokenizer, sft, options, packing, accumulation
):
    chosen = {"weighted_loss": False} | options
    expected = loss_by_hand(model, tokenizer, chosen)
    expected.backward()
    expected_gradients = gradients(model)
    args = ChatArguments(**chosen)
    found = tokenize_conversations(WEIGHTED, ChatEncoder(tokenizer), 192, args)
    trainer = sft(ChatSFTTrainer, [row for each in found for row in each.rows], packing)
    rows = list(trainer.train_dataset)
    assert all("loss_weights" in row for row in rows)
    middle = (len(rows) + 1) // accumulation
    batches = [trainer.data_collator(part) for part in (rows[:middle], rows[middle:]) if part]
    batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    losses = [
        trainer.compute_loss(model.train(), batch, num_items_in_batch=num_items)
        for batch in batches
    ]
    sum(losses).backward()
    assert sum(losses).item() == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradients(gradients(model), expected_gradients)


def test_the_weights_of_all_processes_make_the_denominator(model, tokenizer, sft, monkeypatch):
    args = ChatArguments(weighted_loss=True)
    found = tokenize_conversations(WEIGHTED, ChatEncoder(tokenizer), 192, args)
    trainer = sft(ChatSFTTrainer, [row for each in found for row in each.rows], packing=False)
    batch = trainer.data_collator(list(trainer.train_dataset))
    weights, tokens = batch["loss_weights"].sum(), (batch["labels"] != IGNORED).sum()
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    others = iter([11.0, 5.0])  # tokens and weights of the other process
    trainer.accelerator = SimpleNamespace(
        gather=lambda value: torch.stack([value, torch.tensor(next(others))])
    )
    (scaled,), num_items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert num_items == tokens + 11
    assert (scaled["loss_weights"].sum() / num_items).item() == pytest.approx(
        (weights / (weights + 5)).item()
    )


def packed(rows):
    """Rows one after the other in one row, as TRL's packing makes them."""
    lengths = [len(row["input_ids"]) for row in rows]
    joined = {name: [i for row in rows for i in row[name]] for name in ("input_ids", "labels")}
    return {**joined, "seq_lengths": lengths}


def test_the_packed_collator_restarts_positions_and_pads_without_training_the_padding():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]},
        {"input_ids": [4, 3], "labels": [-100, 3], "seq_lengths": [2]},
    ]
    batch = PackedCollator(PAD)(rows)
    assert batch.pop("max_targets") == 8  # 4, rounded up, but for 8 positions
    expected = {
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]],
        "labels": [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}
    weighted = PackedCollator(PAD)(
        [{**rows[0], "loss_weights": [0, 0.5, 2, 0, 1]}, {**rows[1], "loss_weights": [0, 3]}]
    )
    assert weighted["loss_weights"].tolist() == [[0, 0.5, 2, 0, 1], [0, 3, 0, 0, 0]]
    assert PackedCollator(PAD, multiple=4)(rows)["labels"].shape == (2, 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[0], [1]], [[0, 1, 0], [2], [3, 4]]])
def test_packed_loss_and_gradients_are_those_of_the_conversations_one_by_one(
    model, tokenizer, groups, attention
):
    model.set_attn_implementation(attention)
    rows = tokenized(CONVERSATIONS, tokenizer, 200)
    chosen = [rows[index] for group in groups for index in group]
    num_items = torch.tensor(sum(label != IGNORED for row in chosen for label in row["labels"]))
    expected_loss = 0.0
    for row in chosen:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        loss = model(ids, labels=labels, use_cache=False, num_items_in_batch=num_items).loss
        loss.backward()
        expected_loss += loss.item()
    expected = gradients(model)
    batch = PackedCollator(PAD)([packed([rows[index] for index in group]) for group in groups])
    loss = model(**batch, use_cache=False, num_items_in_batch=num_items).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, abs=1e-5)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("num_items", [None, 7])
@pytest.mark.parametrize("packing", [False, True])
def test_the_chat_trainer_gives_the_loss_and_gradients_of_trls_own(
    model, tokenizer, sft, packing, num_items
):
    num_items = None if num_items is None else torch.tensor(num_items)
    results = []
    for trainer_class in (ChatSFTTrainer, SFTTrainer):
        built = sft(trainer_class, tokenized(CONVERSATIONS, tokenizer, 192), packing)
        batch = built.data_collator(list(built.train_dataset))
        loss = built.compute_loss(model.train(), batch, num_items_in_batch=num_items)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (loss, actual), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("num_items", [None, 7])
@pytest.mark.parametrize("spare", [0, 3])
def test_the_head_sees_only_the_positions_with_a_target_and_the_loss_is_the_same(
    model, tokenizer, num_items, spare
):
    """`spare` positions more than there are targets change nothing."""
    rows, seen = tokenized(CONVERSATIONS, tokenizer, 192), []
    batch = PackedCollator(PAD)([packed(rows[:2]), rows[2]])
    assert batch.pop("max_targets") % 128 == 0
    targets = int((batch["labels"][:, 1:] != -100).sum())
    head = model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    results = []
    for options in ({}, {"max_targets": targets + spare}):
        output = model.train()(**batch, **options, use_cache=False, num_items_in_batch=num_items)
        output.loss.backward()
        results.append((output.loss.item(), gradients(model)))
    head.remove()
    (expected_loss, expected), (loss, actual) = results
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-8, rtol=1e-5)
    assert output.logits is None
    assert seen[1] == (targets + spare, model.config.vocab_size)
    assert targets == sum(label != IGNORED for row in rows[:3] for label in row["labels"])


def test_a_trainer_asked_for_outputs_has_the_logits_of_all_positions(model, tokenizer, sft):
    trainer = sft(ChatSFTTrainer, tokenized(CONVERSATIONS, tokenizer, 192), False)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(model, dict(batch))
    expected, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(loss, expected)


# peft asks for the old name of is_activation_checkpointing
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_checkpoint_of_an_adapter_holds_the_adapter_and_its_moments_alone(
    tokenizer, sft, tmp_path
):
    rows = tokenized(CONVERSATIONS, tokenizer, 192)
    adapter = LoraConfig(r=2, target_modules="all-linear")
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = sft(ChatSFTTrainer, rows, True, peft_config=adapter, **options)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert all("lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = sum(moment["exp_avg"].numel() for moment in state.values())
    assert moments == sum(map(torch.numel, trained))


def test_the_trainer_keeps_every_label_and_packing_cuts_no_conversation(sft, tokenizer):
    rows = tokenized(CONVERSATIONS, tokenizer, 192)
    assert list(sft(ChatSFTTrainer, rows, packing=False).train_dataset) == rows
    unpacked = []
    for row in sft(ChatSFTTrainer, rows, packing=True).train_dataset:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 192
        ids, labels = (
            torch.tensor(row[name]).split(row["seq_lengths"]) for name in ("input_ids", "labels")
        )
        unpacked += [
            {"input_ids": i.tolist(), "labels": j.tolist()}
            for i, j in zip(ids, labels, strict=True)
        ]
    assert sorted(unpacked, key=str) == sorted(rows, key=str)


def test_packing_wastes_at_most_3_percent_on_conversations_of_mixed_lengths(sft):
    generator = random.Random(4)
    lengths = [
        min(192, max(8, round(generator.lognormvariate(math.log(60), 0.8)))) for _ in range(3000)
    ]
    rows = Dataset.from_dict(
        {name: [[5] * length for length in lengths] for name in ("input_ids", "labels")}
    )
    packs = sft(ChatSFTTrainer, rows, packing=True).train_dataset
    assert sum(lengths) == sum(len(row["input_ids"]) for row in packs)
    assert 1 - sum(lengths) / (192 * len(packs)) <= 0.03
