"""Two processes that split a model by its own plan compute what one does."""

import pytest
import torch
from ranks import run_ranks

from minimind import MiniMindConfig, MiniMindForCausalLM

pytestmark = pytest.mark.launcher

SIZE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "dense": {"tie_word_embeddings": False},
    "no qk_norm, biases": {"qk_norm": False, "attention_bias": True},
    "shared experts": {"num_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1},
}

RANK = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import minimind

ids = torch.arange(3, 69).view(2, 33)
for path in sys.argv[1:]:
    config = DistributedConfig(tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config).train()
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    split = [name for name, gradient in gradients.items() if isinstance(gradient, DTensor)]
    for name in split:
        gradients[name] = gradients[name].full_tensor()
    results = {"logits": output.logits, "loss": output.loss, "gradients": gradients, "split": split}
    if dist.get_rank() == 0:
        torch.save(results, f"{path}/results.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_compute_the_logits_the_loss_and_the_gradients_of_one(tmp_path):
    models = {}
    for name, fields in SHAPES.items():
        torch.manual_seed(0)
        models[name] = MiniMindForCausalLM(MiniMindConfig(**SIZE, **HEADS, **fields))
        with torch.no_grad():
            # Biases are not 0, norms not 1: every weight matters
            for parameter in models[name].parameters():
                parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
        models[name].save_pretrained(tmp_path / name)
    (tmp_path / "rank.py").write_text(RANK)
    run_ranks(tmp_path / "rank.py", *(tmp_path / name for name in SHAPES), log=tmp_path / "log")

    ids = torch.arange(3, 69).view(2, 33)
    for name, model in models.items():
        output = model.train()(ids, labels=ids)
        output.loss.backward()
        found = torch.load(tmp_path / name / "results.pt")
        torch.testing.assert_close(found["logits"], output.logits.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(found["loss"], output.loss.detach(), atol=1e-5, rtol=0)
        for parameter, gradient in found["gradients"].items():
            if "gate_up_proj" in parameter:
                # Each process has a part of the gates beside one of the ups: joined, they are out
                # of order
                continue
            torch.testing.assert_close(
                gradient, model.get_parameter(parameter).grad, atol=1e-5, rtol=0
            )
        # Everything large is split; what is left whole in each process are the norms and the
        # router.
        whole = {parameter for parameter, _ in model.named_parameters()} - set(found["split"])
        assert all("norm" in parameter or "mlp.gate.weight" in parameter for parameter in whole), (
            whole
        )
