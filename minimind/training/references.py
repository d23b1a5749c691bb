"""Reference log-probabilities that are computed once and kept in the cache."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
import xxhash
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm

from minimind.common.cache import cache_directory, find, find_or_build, shown
from minimind.common.errors import is_local_main_process
from minimind.common.language import say, translated
from minimind.common.launch import is_main_process

FORMAT_VERSION = 1  # part of the key: raise it when the same input results in other numbers


class CachedReferences:
    """Mixed into TRL's trainers; identical to them except: with `precompute_ref_log_probs` the
    reference's log-probabilities are kept in the cache, for all runs on these rows from these
    weights. TRL's are found again only where the rows come from a file, and by one process.

    reference_inputs: the columns of token ids and masks that decide them.
    reference_options: the arguments that do.
    reference_columns: what the columns are called in which they are added to the rows.
    """

    reference_inputs: tuple[str, ...]
    reference_options: tuple[str, ...]
    reference_columns: tuple[str, ...]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The rows with the reference log-probabilities of their replies, found or computed by all
        processes together."""
        key = {"version": FORMAT_VERSION, "rows": rows_hash(dataset, self.reference_inputs)}
        key["weights"] = self._precompute_model_hash
        key |= {option: getattr(self.args, option) for option in self.reference_options}
        # ZeRO-3 divides the weights, so each process has another hash
        key = broadcast_object_list([key])[0]
        found = find("references", key)
        if all(gather_object([found is not None])):
            logps = np.load(found[0] / "log_probabilities.npy")
        else:
            logps = self._reference_log_probs(dataset, name, batch_size)

            def write(directory: Path) -> dict:
                np.save(directory / "log_probabilities.npy", logps)
                return {"rows": len(logps)}

            if is_local_main_process():
                find_or_build("references", key, write)
        columns = dict(zip(self.reference_columns, logps.T, strict=True))
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _reference_log_probs(self, dataset: Dataset, name: str, batch_size: int) -> np.ndarray:
        """The reference log-probabilities of all rows, (rows, columns), each process computing its
        share."""
        began, world, rank = time.time(), self.args.world_size, self.args.process_index
        if is_main_process():
            say(
                f"computing reference log-probabilities: {len(dataset):,} rows of {name} (once;"
                f" kept in {shown(cache_directory('references'))})"
            )
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            from trl.models import prepare_deepspeed  # loads DeepSpeed

            self._precompute_engine = self._precompute_engine or prepare_deepspeed(
                self.model, self.accelerator
            )
            model = self._precompute_engine
        mine = range(rank, len(dataset), world)
        # As many batches as the other processes: ZeRO-3 gathers the weights in each of them
        mine = list(mine) + [0] * (-len(dataset) % world > 0 and rank >= len(dataset) % world)

        training, results = self.model.training, []
        self.model.eval()
        title = translated("reference log-probabilities")
        with tqdm(
            total=len(mine), desc=title, unit="row", disable=None if not rank else True
        ) as bar:
            for start in range(0, len(mine), batch_size):
                rows = [dataset[index] for index in mine[start : start + batch_size]]
                batch = self._prepare_inputs(self.data_collator(rows))
                columns = self.compute_ref_log_probs(model, batch)[: len(self.reference_columns)]
                results.append(torch.stack(columns, dim=1).float().cpu().numpy())
                bar.update(len(rows))
        self.model.train(training)

        logps = np.empty((len(dataset), len(self.reference_columns)), dtype=np.float32)
        for index, share in enumerate(gather_object([np.concatenate(results)])):
            rows = len(range(index, len(dataset), world))
            logps[index::world] = share[:rows]
        if is_main_process():
            say(f"reference log-probabilities computed in {time.time() - began:.0f} s")
        return logps


def rows_hash(dataset: Dataset, columns: Sequence[str]) -> str:
    """A hash of the lists in some columns of all rows."""
    digest = xxhash.xxh3_128()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for column in map(table.column, columns):
            digest.update(pc.list_value_length(column).to_numpy().tobytes())
            digest.update(pc.list_flatten(column).to_numpy().tobytes())
    return digest.hexdigest()
