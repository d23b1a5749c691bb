"""The trainer of rated replies: TRL's KTO on rows of `load_rated`."""

from datasets import Dataset
from trl import KTOTrainer

from minimind.data.rated import split_reply
from minimind.training.references import CachedReferences
from minimind.training.trainers import ScheduledTrainer


class KTOStageTrainer(ScheduledTrainer, CachedReferences, KTOTrainer):
    """For rows of `load_rated`. Identical to TRL's except:

    It takes token ids, where TRL would tokenise texts and take control tokens in somebody's words
    for real ones. Only the rated reply has a loss, with its end token and nothing after it.

    Training rows are shuffled once. TRL takes them in the order of the file, often all good ones
    first.
    """

    # TRL gathers the rewards of a micro-batch, of which every process needs as many
    shares_last_rows = False

    reference_options = ("max_length", "per_device_train_batch_size", "bf16", "fp16")

    def __init__(self, *, args, **kwargs):
        has_kl = args.loss_type == "kto"
        self.reference_inputs = ("prompt_ids", "completion_ids") + ("KL_completion_ids",) * has_kl
        self.reference_columns = ("ref_logps",) + ("ref_KL_logps",) * has_kl
        super().__init__(args=args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, processing_class, args, name: str) -> Dataset:
        if "completion_ids" in dataset.column_names:
            return dataset
        dataset = dataset.map(split_reply)
        if name == "train":
            dataset = dataset.shuffle(seed=args.seed).flatten_indices()
        if not self.calculate_KL:
            return dataset

        # As in TRL: the KL divergence is estimated from each prompt with its neighbour's reply
        replies, size = dataset["completion_ids"][:], args.per_device_train_batch_size
        batches = [replies[start : start + size] for start in range(0, len(replies), size)]
        rotated = [reply for batch in batches for reply in (batch[-1], *batch[:-1])]
        return dataset.add_column("KL_completion_ids", rotated)
