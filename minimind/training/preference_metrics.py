"""What TRL's DPOTrainer does not log of a batch of pairs: KL to the reference, log-odds, lengths,
and the accuracy by which reply is longer."""

import torch
from accelerate.utils import gather

Metrics = dict[str, list[float]]


class PreferenceMetrics:
    """Mixed into TRL's DPOTrainer, before it, on batches that have the reference's
    log-probabilities: adds to each log, of training and of evaluation:

    kl/reply, kl/token: mean of log policy - log reference, per reply and per token of a reply, in
        nats. Over the replies of the data, chosen and rejected alike, not over the policy's own, so
        it may be negative, where a KL divergence is not.
    log_odds_chosen: mean of log odds(chosen) - log odds(rejected) in the policy, where the
        probability of a reply is the geometric mean of its tokens' (Hong et al., 2024, ORPO).
    lengths/chosen, lengths/rejected: mean tokens of a reply.
    lengths/chosen_longer, lengths/chosen_shorter: share of the pairs whose chosen reply has more,
        and fewer, tokens.
    rewards/accuracies_longer, rewards/accuracies_shorter: TRL's rewards/accuracies of these pairs
        alone; missing where there are none.
    """

    has_reference = True  # False: rewards are of mean log-probabilities, see PreferenceTrainer

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's; the log-probabilities of its forward pass are noted."""
        outputs = []

        def noted(*args, **kwargs):
            outputs.append(model(*args, **kwargs))
            return outputs[-1]

        loss = super()._compute_loss(noted, inputs, return_outputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in self._pair_metrics(inputs, outputs[0].log_probs.detach()).items():
            metrics[name].append(value)
        return loss

    def _pair_metrics(self, inputs: dict, log_probs: torch.Tensor) -> dict[str, float]:
        """The means over the pairs of all processes; the accuracies of a kind of pairs as their
        share in all of them, see `log`."""
        mask = inputs["completion_mask"][:, 1:]
        lengths = mask.sum(dim=1)
        log_probs = log_probs[:, -mask.shape[1] :] * mask
        mean = log_probs.sum(dim=1) / lengths.clamp(min=1)  # of a token
        if self.has_reference:
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            ratios = sums(log_probs, mask, self.ld_alpha) - reference
        else:
            ratios = mean
        is_right = torch.gt(*ratios.chunk(2))

        mean = mean.clamp(max=-1e-6)  # so that the odds are finite
        odds = mean - torch.log1p(-mean.exp())

        chosen, rejected = lengths.chunk(2)
        longer, shorter = chosen > rejected, chosen < rejected
        values = {"kl/reply": ratios.mean()} if self.has_reference else {}
        values |= {
            "log_odds_chosen": torch.sub(*odds.chunk(2)).mean(),
            "lengths/chosen": chosen.float().mean(),
            "lengths/rejected": rejected.float().mean(),
            "lengths/chosen_longer": longer.float().mean(),
            "lengths/chosen_shorter": shorter.float().mean(),
            "rewards/accuracies_longer": (longer & is_right).float().mean(),
            "rewards/accuracies_shorter": (shorter & is_right).float().mean(),
        }
        means = gather(torch.stack([value.float() for value in values.values()])[None]).mean(dim=0)
        return dict(zip(values, means.tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, which takes the means over the batches; of what is a ratio it is that of the
        means."""
        metrics: Metrics = self._metrics["train" if self.model.training else "eval"]

        def mean(name: str) -> float:
            return sum(metrics[name]) / len(metrics[name])

        if "kl/reply" in metrics:
            tokens = (mean("lengths/chosen") + mean("lengths/rejected")) / 2
            metrics["kl/token"] = [mean("kl/reply") / max(tokens, 1)]
        if "lengths/chosen" in metrics:
            for kind in ("longer", "shorter"):
                share, name = mean(f"lengths/chosen_{kind}"), f"rewards/accuracies_{kind}"
                right = mean(name)
                del metrics[name]
                if share:
                    metrics[name] = [right / share]
        super().log(logs, start_time)


def sums(log_probs: torch.Tensor, mask: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """Log-probabilities of tokens (2 N, S), the chosen replies' first -> of the replies (2 N,).

    With `ld_alpha` the tokens beyond the length of the pair's shorter reply have this weight (Liu
    et al., 2024, LD-DPO), as in TRL.
    """
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    shared = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    weights = torch.where(mask.cumsum(dim=1) <= shared[:, None], 1.0, ld_alpha)
    return (log_probs * weights).sum(dim=1)
