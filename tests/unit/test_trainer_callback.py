"""Hugging Face's Trainer writes the log, for a classifier and for a causal language model."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from data_prune.trainer_callback import LogRows
from data_prune.training_log import TrainingLog
from prune_core.errors import InputError

N = 7


def tiny(kind):
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "classifier":
        return BertForSequenceClassification(BertConfig(**shape, intermediate_size=8, num_labels=3))
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=8))


def dataset(kind):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, (N, 6))
    labels = rng.integers(0, 3, N) if kind == "classifier" else np.where(ids > 5, ids, -100)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": labels.tolist(), "row": list(range(N))}
    )


def trainer(folder, model, data, log, epochs, **settings):
    settings = {"remove_unused_columns": False, "save_strategy": "no", **settings}
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=3,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[LogRows(log)]
    )


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_the_log_is_what_the_model_says_of_the_rows(tmp_path, kind):
    model, data = tiny(kind), dataset(kind)
    log = TrainingLog(N, tmp_path / "log")
    # No step changes the weights, no dropout the logits: each epoch says what `model` says now.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer(tmp_path, model, data, log, 2, learning_rate=0.0, eval_strategy="epoch").train()
    expected = TrainingLog(N)
    ids, labels = torch.tensor(data["input_ids"]), torch.tensor(data["labels"])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    if kind == "classifier":
        expected.record(range(N), logits, labels)
    else:
        expected.record(range(N), logits[:, :-1], labels[:, 1:])
    expected.end_epoch()
    found = log.arrays
    for name, values in expected.arrays.items():
        np.testing.assert_allclose(found[name], np.repeat(values, 2, axis=0), rtol=1e-4, atol=1e-6)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_training_that_goes_on_from_a_checkpoint_takes_the_log_back_to_it(tmp_path):
    data, log = dataset("classifier"), TrainingLog(N, tmp_path / "log")
    run = trainer(tmp_path, tiny("classifier"), data, log, 2, save_strategy="epoch")
    run.train()
    first = log.arrays["el2n"]
    model, log = tiny("classifier"), TrainingLog.load(tmp_path / "log")
    trainer(tmp_path, model, data, log, 3).train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert len(log) == 3
    assert not np.isnan(log.arrays["el2n"]).any()
    np.testing.assert_array_equal(log.arrays["el2n"][0], first[0])


def test_what_is_missing_is_named(tmp_path):
    data, log = dataset("classifier"), TrainingLog(N)
    run = trainer(tmp_path, tiny("classifier"), data, log, 1, remove_unused_columns=True)
    with pytest.raises(InputError, match="needs remove_unused_columns=False"):
        run.train()
    run = trainer(tmp_path, tiny("classifier"), data.remove_columns("row"), log, 1)
    with pytest.raises(InputError, match="needs 'row' and 'labels' in each batch"):
        run.train()
    run = trainer(tmp_path, tiny("classifier"), data, log, 1, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="needs 'row' and 'labels' in each batch"):
        run.train()
