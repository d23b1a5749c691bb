"""How one training step is run: all that its costs depend on beside the model."""

from dataclasses import dataclass

from minimind.model.kernels_minimind import BLOCK, MAX_BLOCKED_LENGTH


def reference_kind(options, adapter: bool, device: str) -> str | None:
    """What `options` of a stage compute of a reference model in each step; see Step."""
    if getattr(options, "precompute_ref_log_probs", True):
        return None
    if adapter:
        return "adapter"
    on_host = getattr(options, "ref_model_on_cpu", False) and device != "cpu"
    return "host" if on_host else "copy"


@dataclass(frozen=True)
class Step:
    """How a training step is run on each device.

    `length` is that of the longest row. `pairs`: each row is a preference pair, so two sequences;
    with `shared_prompts` one, in which the prompt is once, and the head projects only the share
    `predicting` of the positions, those that predict a token of a reply. `counted`: the tokens that
    a trainer counts for each position; a shared prompt counts in both sequences.
    `reference`: "copy" is DPO's frozen second model, "host" the same in the memory of the CPU,
    "adapter" the model without its adapter.
    `unpaired`: rows are KTO's; model and reference also compute each prompt with another's reply.
    `masked`: rows come with an attention mask of their own, because they are padded or hold several
    documents. `weighted`: tokens count with different weights. `zero_stage` None is a run without
    DeepSpeed.
    """

    batch_size: int
    length: int
    precision: str = "fp32"
    device: str = "cpu"
    accumulation: int = 1
    processes: int = 1
    optimizer: str = "adamw"
    checkpointing: bool = False
    attention: str = "sdpa"
    masked: bool = False
    pairs: bool = False
    shared_prompts: bool = False
    predicting: float = 1.0
    counted: float = 1.0
    reference: str | None = None
    unpaired: bool = False
    weighted: bool = False
    zero_stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def sequences(self) -> int:
        """Sequences in one micro-batch."""
        return self.batch_size * (2 if self.pairs and not self.shared_prompts else 1)

    @property
    def tiled_head(self) -> bool:
        """Whether the head is TRL's, which never holds the logits of all positions."""
        return self.unpaired or (self.pairs and not self.shared_prompts)

    @property
    def tokens(self) -> int:
        """Positions in one micro-batch, padding included."""
        return self.sequences * self.length

    @property
    def width(self) -> int:
        """Bytes of one number in a matrix product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def pure_half(self) -> bool:
        """Whether the weights and the residual stream are in half precision too.

        DeepSpeed casts the entire model; autocast leaves both in fp32.
        """
        return self.zero_stage is not None and self.precision != "fp32"

    @property
    def autocast(self) -> bool:
        """Whether the weights stay in fp32 and are cast for each matrix product."""
        return self.precision != "fp32" and not self.pure_half

    @property
    def blocked(self) -> bool:
        """Whether the model attends in blocks, see `blocked_attention_forward`."""
        fits = 1 < self.length <= MAX_BLOCKED_LENGTH
        return self.attention == "sdpa" and self.device == "cpu" and fits

    @property
    def attended(self) -> int:
        """Pairs of query and key that a head computes for one sequence.

        All pairs, or those of the complete blocks up to the diagonal.
        """
        n = self.length
        if not self.blocked:
            return n**2
        return sum(min(BLOCK, n - start) * min(start + BLOCK, n) for start in range(0, n, BLOCK))
