"""A training log from Hugging Face's Trainer, without a change to model or Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from data_prune.training_log import TrainingLog
from prune_core.errors import InputError


class LogRows(TrainerCallback):
    """Record each training batch in a TrainingLog; for one process with one device.

        dataset = dataset.add_column("row", range(len(dataset)))
        Trainer(model, TrainingArguments(..., remove_unused_columns=False), train_dataset=dataset,
                callbacks=[LogRows(TrainingLog(len(dataset), "log"))]).train()

    The column `row` has to reach the batch: the collator must pass it on, as the Trainer's own one
    does, and other columns that the model does not take must be removed by hand. Hooks take `row`
    from the model's arguments and read its logits and `labels`. Logits of three dimensions are a
    causal language model's, whose labels are those of the next token. Training that goes on from a
    checkpoint first forgets the epochs of the log after it.

    Raises InputError, when training begins, where the Trainer would drop the column, and for a
    batch without `row` or `labels`.
    """

    def __init__(self, log: TrainingLog) -> None:
        self.log = log
        self._rows: Any = None
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the hooks on the model."""
        devices = args.world_size * max(1, args.n_gpu)
        if args.remove_unused_columns or devices > 1:
            raise InputError(
                f"LogRows needs remove_unused_columns=False, so that the column 'row' stays, and "
                f"one device, got remove_unused_columns={args.remove_unused_columns} and "
                f"{devices} devices."
            )
        done = int(state.epoch or 0)
        if 0 < done < len(self.log):
            self.log.rewind(done)
        self._remove()  # those of training that broke off
        model = kwargs["model"]
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the epoch."""
        self.log.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._rows = kwargs.pop("row", None)
        return args, kwargs

    def _after(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training:
            return
        labels = kwargs.get("labels")
        if self._rows is None or labels is None:
            raise InputError(
                "LogRows needs 'row' and 'labels' in each batch: add the column, and a collator "
                "that passes it on. (With label smoothing or a loss of its own the Trainer keeps "
                "the labels from the model: call TrainingLog.record there.)"
            )
        logits = output["logits"]
        if logits.ndim == 3:
            logits, labels = logits[:, :-1], labels[:, 1:]
        self.log.record(self._rows, logits, labels)
