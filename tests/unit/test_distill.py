"""The loss by hand and against torch's own; the trainer on tiny models, in parts and whole."""

import copy
import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from data_prune import distill
from data_prune.distill import (
    Distillation,
    DistillTrainer,
    DistillTrainerMixin,
    distillation_loss,
    distillation_weight,
    next_token_labels,
)
from prune_core.errors import InputError
from tiny import toy_tokenizer
from tiny_decoders import VOCABULARY, random_windows, tiny_decoder

SHAPES = pytest.mark.parametrize("shape", [(6,), (3, 5)], ids=["classifier", "language model"])


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


def labelled(*shape, classes, seed=2):
    """Random labels, of which some are masked."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=draws)
    return labels.masked_fill(torch.rand(shape, generator=draws) < 0.3, -100)


def torchs(student, teacher, labels, weight, temperature):
    """The same from torch's two losses, on the rows that count."""
    counts = labels.flatten() != -100
    s, t = (logits.flatten(0, -2)[counts].float() for logits in (student, teacher))
    log_q, log_p = (logits.div(temperature).log_softmax(-1) for logits in (s, t))
    kd = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    ce = cross_entropy(s, labels.flatten()[counts])
    return (1 - weight) * ce + weight * temperature**2 * kd


def slope(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


# ------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_by_hand(temperature):
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[temperature * math.log(3), 0.0]])  # softened: 3/4 and 1/4
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    expected = 0.6 * math.log(2) + 0.4 * temperature**2 * kl
    found = distillation_loss(
        student, teacher, torch.tensor([1]), weight=0.4, temperature=temperature
    )
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@SHAPES
def test_loss_and_gradient_are_those_of_torchs_losses(shape, weight, monkeypatch):
    student, teacher = drawn(*shape, 11).requires_grad_(), drawn(*shape, 11, seed=1)
    labels = labelled(*shape, classes=11)
    assert 0 < (labels == -100).sum() < labels.numel()
    expected = torchs(student, teacher, labels, weight, 2.5)
    gradient = slope(expected, student)
    assert not gradient[labels == -100].any()
    for logits_at_once in (2**22, 22, 1):  # all places, two, one
        monkeypatch.setattr(distill, "CHUNK", logits_at_once)
        found = distillation_loss(student, teacher, labels, weight=weight, temperature=2.5)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(slope(found, student), gradient)


def test_the_gradient_is_that_of_finite_differences():
    student = drawn(2, 4, 5, dtype=torch.float64).requires_grad_()
    teacher, labels = drawn(2, 4, 5, seed=1, dtype=torch.float64), labelled(2, 4, classes=5)

    def loss(logits):
        return distillation_loss(logits, teacher, labels, weight=0.7, temperature=3.0)

    assert loss(student).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, student)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.floats(0, 1),
    st.floats(0.25, 16),
)
def test_what_holds_for_any_logits(seed, rows, classes, weight, temperature):
    student, teacher = drawn(rows, classes, seed=seed), drawn(rows, classes, seed=seed + 1)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))

    def loss(weight, student=student, teacher=teacher):
        found = distillation_loss(student, teacher, labels, weight=weight, temperature=temperature)
        return found.item()

    tolerance = 1e-5 * (1 + temperature**2)
    assert loss(1) >= -tolerance
    assert loss(1, teacher=student) == pytest.approx(0, abs=tolerance)
    assert loss(weight) == pytest.approx((1 - weight) * loss(0) + weight * loss(1), abs=tolerance)
    # A constant for all classes of a row says nothing.
    assert loss(weight, student + 1.5, teacher - 2) == pytest.approx(loss(weight), abs=tolerance)


def test_a_teacher_that_agrees_leaves_the_student_alone():
    student = drawn(4, 7).requires_grad_()
    loss = distillation_loss(
        student, student.detach().clone(), labelled(4, classes=7), weight=1, temperature=4
    )
    assert loss == 0
    assert not slope(loss, student).any()


def test_a_term_without_weight_is_not_computed():
    logits, labels = drawn(3, 4), torch.tensor([0, 1, 3])
    unknown = torch.full_like(logits, torch.nan)
    alone = distillation_loss(logits, unknown, labels, weight=0, temperature=4)
    torch.testing.assert_close(alone, cross_entropy(logits, labels))
    impossible = logits.clone()
    impossible[:, 3] = -torch.inf  # of which the last row's label says that it is right
    for weight, finite in ((1, True), (0.5, False)):
        loss = distillation_loss(impossible, impossible, labels, weight=weight, temperature=4)
        assert loss.isfinite() == finite
        assert not loss.isnan()


def test_classes_that_both_models_rule_out_count_for_nothing():
    student, teacher, labels = drawn(3, 6), drawn(3, 6, seed=1), torch.tensor([0, 1, 2])
    padded = [
        torch.cat([logits, torch.full((3, 2), -torch.inf)], 1) for logits in (student, teacher)
    ]
    padded[0].requires_grad_()
    found = distillation_loss(*padded, labels, weight=0.5, temperature=2)
    torch.testing.assert_close(found, torchs(student, teacher, labels, 0.5, 2))
    gradient = slope(found, padded[0])
    assert gradient.isfinite().all()
    assert not gradient[:, 6:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = drawn(2, 8, 50).to(dtype).requires_grad_(), drawn(2, 8, 50, seed=1).to(dtype)
    labels = labelled(2, 8, classes=50)
    found = distillation_loss(student, teacher, labels, weight=0.6, temperature=4)
    expected = torchs(student, teacher, labels, 0.6, 4)  # which calls .float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    gradient = slope(found, student)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, slope(expected, student), rtol=0.02, atol=1e-4)


def test_where_nothing_counts_the_loss_is_zero():
    student = drawn(2, 3, 5).requires_grad_()
    nothing = torch.full((2, 3), -100)
    loss = distillation_loss(student, student.detach() + 1, nothing, weight=0.5, temperature=4)
    assert loss == 0
    assert not slope(loss, student).any()


def test_losses_of_parts_add_up_to_that_of_the_batch():
    student, teacher = drawn(4, 6, 9), drawn(4, 6, 9, seed=1)
    labels = labelled(4, 6, classes=9)
    counted = int((labels != -100).sum())

    def loss(part, divisor):
        about = {"weight": 0.5, "temperature": 4, "num_items_in_batch": divisor}
        return distillation_loss(student[part], teacher[part], labels[part], **about)

    whole = loss(slice(None), None)
    assert (labels[:1] != -100).sum() != (labels[1:] != -100).sum()
    for divisor in (counted, torch.tensor(counted)):
        torch.testing.assert_close(loss(slice(1), divisor) + loss(slice(1, 4), divisor), whole)


def test_no_gradient_reaches_the_teacher():
    student, teacher = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1).requires_grad_()
    distillation_loss(
        student, teacher, torch.tensor([0, 1, 2]), weight=0.5, temperature=4
    ).backward()
    assert student.grad is not None
    assert teacher.grad is None


class Sizes(TorchDispatchMode):
    """Notes how many numbers there are in every new tensor of floating point."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            own = not any(
                isinstance(a, torch.Tensor) and a.data_ptr() == made.data_ptr() for a in args
            )
            self.seen += [made.numel()] * own
        return made


def test_no_tensor_of_the_logits_size_but_their_gradient(monkeypatch):
    student, teacher = drawn(4, 16, 100).requires_grad_(), drawn(4, 16, 100, seed=1)
    labels = torch.zeros(4, 16, dtype=torch.long)
    monkeypatch.setattr(distill, "CHUNK", 800)
    with Sizes() as forward:
        loss = distillation_loss(student, teacher, labels, weight=0.5, temperature=4)
    assert sorted(forward.seen)[-1] == student.numel()
    assert sorted(forward.seen)[-2] == 800
    with Sizes() as forward, torch.no_grad():
        distillation_loss(student, teacher, labels, weight=0.5, temperature=4)
    assert max(forward.seen) == 800
    with Sizes() as backward:
        loss.backward()
    assert sum(size == student.numel() for size in backward.seen) == 1


def test_next_token_labels_are_transformers_shift():
    labels = labelled(3, 7, classes=9)
    shifted = next_token_labels(labels)
    assert shifted[:, :-1].equal(labels[:, 1:])
    assert (shifted[:, -1] == -100).all()
    logits = drawn(3, 7, 9)
    torch.testing.assert_close(
        distillation_loss(logits, logits, shifted, weight=0, temperature=1),
        ForCausalLMLoss(logits, labels, vocab_size=9),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 1.1}, r"weight of distillation must be in \[0, 1\], .* got 1.1"),
        ({"weight": math.nan}, r"must be in \[0, 1\], .* got nan"),
        ({"temperature": 0.0}, r"temperature must be a finite number above 0, got 0.0"),
        ({"temperature": math.inf}, r"finite number above 0, got inf"),
        ({"teacher_logits": torch.zeros(2, 4)}, r"student's shape, \(2, 3\), got \(2, 4\)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"integers of shape \(2,\).*got .*\(3,\)"),
        ({"labels": torch.zeros(2)}, r"integers of shape \(2,\).*got torch.float32"),
        ({"labels": torch.tensor([0, 3])}, r"in \[0, 2\], or -100 .* got 0 to 3"),
        ({"labels": torch.tensor([-1, 0])}, r"in \[0, 2\], or -100 .* got -1 to 0"),
    ],
)
def test_bad_arguments_of_the_loss(change, message):
    given = {
        "student_logits": torch.zeros(2, 3),
        "teacher_logits": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "weight": 0.5,
        "temperature": 4.0,
        **change,
    }
    with pytest.raises(InputError, match=message):
        distillation_loss(
            given.pop("student_logits"), given.pop("teacher_logits"), given.pop("labels"), **given
        )


# ------------------------------------------------------------------------------ the method
def test_the_method_gives_its_weight_and_temperature_to_the_loss():
    student, teacher, labels = drawn(3, 4), drawn(3, 4, seed=1), torch.tensor([0, 1, -100])
    for method, weight in (
        (Distillation(weight=0.25, temperature=2), 0.25),
        (Distillation(keep_ratio=0.8, temperature=2), distillation_weight(0.8)),
    ):
        assert method.alpha == weight
        torch.testing.assert_close(
            method.loss(student, teacher, labels), torchs(student, teacher, labels, weight, 2)
        )
        assert method.loss(student, teacher, labels, num_items_in_batch=8) * 4 == pytest.approx(
            float(method.loss(student, teacher, labels))
        )
    with pytest.raises(FrozenInstanceError):
        method.weight = 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"weight of 'auto' .* keep_ratio is None: give keep_ratio"),
        ({"weight": -0.1}, r"must be in \[0, 1\], or 'auto' in Distillation, got -0.1"),
        ({"weight": "best"}, r"must be in \[0, 1\], or 'auto' in Distillation, got 'best'"),
        ({"weight": 0.5, "temperature": -1}, r"above 0, got -1"),
        ({"keep_ratio": 0}, r"in \(0, 1\], got 0"),
        ({"weight": 0.5, "keep_ratio": 20}, r"in \(0, 1\], got 20: of 20 % it is 0.2"),
    ],
)
def test_bad_settings_of_the_method(given, message):
    with pytest.raises(InputError, match=message):
        Distillation(**given)


def test_the_weight_falls_from_one_as_more_is_kept():
    assert distillation_weight(0.05) == distillation_weight(0.4) == 1
    assert distillation_weight(0.7) == pytest.approx(0.625)
    assert distillation_weight(1.0) == pytest.approx(0.25)
    falling = [distillation_weight(keep / 100) for keep in range(1, 101)]
    assert falling == sorted(falling, reverse=True)
    with pytest.raises(InputError, match=r"in \(0, 1\], got 1.5"):
        distillation_weight(1.5)


# ------------------------------------------------------------------------------ the trainers
@pytest.fixture
def arguments(tmp_path):
    def build(**changes):
        return TrainingArguments(
            **{
                "output_dir": str(tmp_path),
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
                "save_strategy": "no",
                "dataloader_pin_memory": False,
                "max_steps": 1,
                "per_device_train_batch_size": 8,
                "learning_rate": 0.05,
                "optim": "sgd",
                "max_grad_norm": 0.0,
                "lr_scheduler_type": "constant",
                **changes,
            }
        )

    return build


def llama(**settings):
    return tiny_decoder("llama", num_hidden_layers=2, **settings)


def changed(model, seed=1):
    """A model of the same kind that says something else."""
    model = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return model


def texts(count=8):
    """Windows of which ever more of the labels count, as where prompts are masked."""
    rows = [{"input_ids": window, "labels": window.clone()} for window in random_windows(count)]
    for i, row in enumerate(rows):
        row["labels"][: 10 - i] = -100
    return rows


def batch_of(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def divergence(student, teacher, rows):
    """KL of the teacher to the student on what counts, at temperature 2."""
    batch = batch_of(rows)
    with torch.no_grad():
        logits = [model.eval()(batch["input_ids"]).logits for model in (student, teacher)]
    return distillation_loss(
        *logits, next_token_labels(batch["labels"]), weight=1, temperature=2
    ).item()


def test_a_student_learns_from_its_teacher_who_stays_as_it_was(arguments):
    student, rows = llama(), texts()
    teacher = changed(student).train()
    before, apart = copy.deepcopy(teacher.state_dict()), divergence(student, teacher, rows)
    trainer = DistillTrainer(
        student,
        arguments(max_steps=15, optim="adamw_torch", learning_rate=3e-3),
        train_dataset=rows,
        teacher=teacher.train(),
        distillation=Distillation(weight=1, temperature=2),
    )
    assert not teacher.training
    trainer.train()
    assert divergence(student, teacher, rows) < 0.5 * apart
    after = teacher.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_step_is_that_of_the_loss_written_out(arguments):
    student, rows = llama(), texts()
    teacher, expected = changed(student), copy.deepcopy(student)
    batch = batch_of(rows)
    labels, counts = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    s, t = (
        model(batch["input_ids"]).logits[:, :-1][counts] for model in (expected.train(), teacher)
    )
    kd = kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1).detach(), reduction="batchmean")
    (0.3 * cross_entropy(s, labels[counts]) + 0.7 * 4 * kd).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.05 * parameter.grad
    DistillTrainer(
        student,
        arguments(),
        train_dataset=rows,
        teacher=teacher,
        distillation=Distillation(weight=0.7, temperature=2),
    ).train()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), msg=name)


def bert(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=VOCABULARY,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{"num_labels": 3, **sizes, **settings},
    )
    return BertForSequenceClassification(config)


def questions():
    return [
        {"input_ids": window, "labels": torch.tensor(i % 3)}
        for i, window in enumerate(random_windows())
    ]


@pytest.mark.parametrize(
    ("student", "rows"), [(llama, texts), (bert, questions)], ids=["language model", "classifier"]
)
def test_two_parts_of_four_are_a_batch_of_eight(student, rows, arguments):
    trained = []
    for size, parts in ((8, 1), (4, 2)):
        model = student()
        trainer = DistillTrainer(
            model,
            arguments(per_device_train_batch_size=size, gradient_accumulation_steps=parts),
            train_dataset=rows(),
            teacher=changed(student()),
            distillation=Distillation(weight=0.7, temperature=2),
        )
        loss = trainer.train().training_loss
        trained.append((loss, model.state_dict()))
    (loss, whole), (loss_of_parts, in_parts) = trained
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    start = student().state_dict()
    assert any(not whole[name].equal(tensor) for name, tensor in start.items())
    for name, tensor in whole.items():
        torch.testing.assert_close(in_parts[name], tensor, msg=name)


def test_losses_of_processes_are_scaled_as_the_trainers_own(arguments):
    """Gradients of processes are averaged, and each divides by what all of them count."""
    rows = texts()
    trainer = DistillTrainer(
        llama(),
        arguments(),
        train_dataset=rows,
        teacher=llama(),
        distillation=Distillation(weight=0),
    )
    theirs = Trainer(llama(), arguments(), train_dataset=rows)
    losses = []
    for each in (trainer, theirs):
        each.model.train()
        for processes in (1, 2):
            each.accelerator = Processes(each.accelerator, processes)
            loss = each.compute_loss(each.model, batch_of(rows), num_items_in_batch=100)
            losses.append(loss.item())
    assert losses == pytest.approx([losses[0], 2 * losses[0]] * 2, rel=1e-5)


class Processes:
    """An accelerator that says it is one of several."""

    def __init__(self, accelerator, count):
        self.accelerator, self.num_processes = accelerator, count

    def __getattr__(self, name):
        return getattr(self.accelerator, name)


def test_evaluation_is_the_trainers_own(arguments):
    student, rows = llama(), texts()
    method = {"teacher": changed(student), "distillation": Distillation(weight=1)}
    ours = DistillTrainer(student, arguments(), eval_dataset=rows, **method).evaluate()
    plain = Trainer(student, arguments(), eval_dataset=rows).evaluate()
    assert ours["eval_loss"] == plain["eval_loss"]


def test_checkpoints_hold_the_student_alone(arguments, tmp_path):
    student = llama()
    trainer = DistillTrainer(
        student,
        arguments(save_strategy="steps", save_steps=1),
        train_dataset=texts(),
        teacher=changed(llama(intermediate_size=60)),
        distillation=Distillation(keep_ratio=0.1),
    )
    trainer.train()
    (saved,) = tmp_path.glob("checkpoint-1/model*.safetensors")
    with safe_open(saved, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes.items() <= {n: tuple(t.shape) for n, t in student.state_dict().items()}.items()


def test_with_trls_trainer_a_step_is_the_same(arguments):
    """Where trl is installed: its loss is its own, and so is its evaluation."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class DistillSFTTrainer(DistillTrainerMixin, trl.SFTTrainer):
        pass

    student, rows = llama(), texts()
    method = {"teacher": changed(student), "distillation": Distillation(weight=0.7, temperature=2)}
    expected = copy.deepcopy(student)
    DistillTrainer(expected, arguments(), train_dataset=rows, **method).train()

    given = arguments(per_device_train_batch_size=4, gradient_accumulation_steps=2).to_dict()
    given |= {"bf16": False, "gradient_checkpointing": False}
    known = {field.name for field in fields(trl.SFTConfig) if field.init}
    data = Dataset.from_list([{name: row[name].tolist() for name in row} for row in rows])
    about = {
        "args": trl.SFTConfig(**{name: given[name] for name in known & set(given)}),
        "train_dataset": data,
        "eval_dataset": data,
        "processing_class": toy_tokenizer(),
    }
    trainer = DistillSFTTrainer(student, **about, **method)
    trainer.train()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), msg=name)
    plain = trl.SFTTrainer(copy.deepcopy(expected), **about).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: llama(vocab_size=VOCABULARY + 32), "theirs have 96 and 128 tokens"),
        (bert, r"same classes in the same order, got \['LABEL_0', 'LABEL_1'\] and"),
    ],
)
def test_a_teacher_that_answers_something_else_is_refused(teacher, message, arguments):
    with pytest.raises(InputError, match=message):
        DistillTrainer(llama(), arguments(), teacher=teacher(), distillation=Distillation(weight=1))


def test_the_order_of_classes_must_be_the_same_and_names_may_differ(arguments):
    named = {"id2label": dict(enumerate(["no", "maybe", "yes"]))}
    turned = {"id2label": dict(enumerate(["yes", "maybe", "no"]))}
    method = {"distillation": Distillation(weight=1)}
    DistillTrainer(bert(), arguments(), teacher=bert(**named), **method)
    with pytest.raises(InputError, match=r"same order, got \['no', 'maybe', 'yes'\] and \['yes'"):
        DistillTrainer(bert(**named), arguments(), teacher=bert(**turned), **method)


def test_what_the_trainer_refuses(arguments):
    student, method = llama(), {"distillation": Distillation(weight=1)}
    with pytest.raises(InputError, match="The teacher is the student itself"):
        DistillTrainer(student, arguments(), teacher=student, **method)
    method["teacher"] = llama()
    with pytest.raises(InputError, match="compute_loss_func and label_smoothing_factor"):
        DistillTrainer(student, arguments(), compute_loss_func=lambda *_: None, **method)
    with pytest.raises(InputError, match="compute_loss_func and label_smoothing_factor"):
        DistillTrainer(student, arguments(label_smoothing_factor=0.1), **method)
    several = arguments()
    several._n_gpu = 2
    with pytest.raises(InputError, match="2 devices, and a teacher is on one: start a process"):
        DistillTrainer(student, several, **method)
    trainer = DistillTrainer(student, arguments(), **method)
    with pytest.raises(InputError, match=r"must have labels, got \['input_ids'\]"):
        trainer.compute_loss(student.train(), {"input_ids": random_windows(2)})


def test_models_without_a_config_are_compared_by_their_logits(arguments):
    class Net(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.layer = torch.nn.Linear(4, classes)

        def forward(self, x, labels=None):
            return {"logits": self.layer(x)}

    rows = [{"x": drawn(4, seed=i), "labels": torch.tensor(i % 2)} for i in range(8)]
    method = {"train_dataset": rows, "distillation": Distillation(weight=0.5)}
    student = Net(2)
    start = student.layer.weight.detach().clone()
    DistillTrainer(student, arguments(), teacher=Net(2), **method).train()
    assert not student.layer.weight.equal(start)
    with pytest.raises(InputError, match=r"student's shape, \(8, 2\), got \(8, 3\)"):
        DistillTrainer(Net(2), arguments(), teacher=Net(3), **method).train()


def test_the_mixin_is_all_there_is_to_the_trainer():
    assert issubclass(DistillTrainer, Trainer)
    assert DistillTrainer.compute_loss is DistillTrainerMixin.compute_loss
