"""PruneNet: rows drawn with the probability that is learned from, and a policy that is kept."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from model_prune import load_method
from model_prune.core.decoder import Decoder
from model_prune.core.work import Work
from model_prune.methods import prunenet
from model_prune.methods.prunenet import Policy, _State, draw, reward, spectrum
from prune_core.errors import InputError
from tiny_decoders import HIDDEN, roomy_decoder


@pytest.fixture(scope="module")
def llama():
    return roomy_decoder("llama")


def gates(model):
    return [layer.mlp.gate_proj.weight.detach() for layer in model.model.layers]


# ------------------------------------------------------------------ drawing
def test_probabilities_of_all_orders_add_up_to_one(monkeypatch):
    """Under noise that is held still, by asking for every order of three of five rows."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7])
    weights = logsigmoid(logits)
    total = 0.0
    for order in itertools.permutations(range(5), 3):
        rest = [i for i in range(5) if i not in order]
        wanted = torch.tensor([*order, *rest])
        monkeypatch.setattr(torch.Tensor, "argsort", lambda *_, wanted=wanted, **__: wanted)
        monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 0.5))
        drawn, log_prob = draw(logits, 3, torch.Generator())
        monkeypatch.undo()
        assert drawn.tolist() == list(order)
        left, expected = weights.exp().double().clone(), 0.0
        for row in order:
            expected += math.log(left[row] / left.sum())
            left[row] = 0
        assert float(log_prob) == pytest.approx(expected, rel=1e-5)
        total += math.exp(expected)
    assert total == pytest.approx(1)


def test_rows_are_drawn_as_often_as_their_probability():
    logits, generator = torch.tensor([2.0, 0.0, -2.0]), torch.Generator().manual_seed(0)
    first, expected = np.zeros(3), np.zeros(3)
    for _ in range(4000):
        noise = copy.deepcopy(generator.get_state())
        order, _ = draw(logits, 2, generator)
        first[order[0]] += 1
        again = torch.Generator()
        again.set_state(noise)
        weights = logsigmoid(logits + torch.rand(3, generator=again).logit(eps=1e-6)).exp()
        expected += (weights / weights.sum()).numpy()
    np.testing.assert_allclose(first / 4000, expected / 4000, atol=0.025)


def test_the_gradient_of_the_probability_is_that_of_its_formula():
    logits = torch.zeros(4, requires_grad=True)
    _, log_prob = draw(logits, 4, torch.Generator().manual_seed(0))
    log_prob.backward()
    assert logits.grad.abs().sum() > 0


# ------------------------------------------------------------------ the reward
def test_the_spectrum_is_that_of_the_rows(llama):
    rows = gates(llama)[0]
    expected = torch.linalg.svdvals(rows).sort().values
    torch.testing.assert_close(spectrum(rows), expected, rtol=1e-3, atol=1e-4)
    few = spectrum(rows[:20])
    assert len(few) == HIDDEN
    assert (few[: HIDDEN - 20] < 1e-2).all()
    torch.testing.assert_close(
        few[-20:], torch.linalg.svdvals(rows[:20]).sort().values, rtol=1e-3, atol=1e-4
    )


def test_the_reward_is_one_over_the_distance(llama):
    rows = gates(llama)[0]
    dense = spectrum(rows)
    assert reward(rows, dense) == HIDDEN  # nothing apart counts as one value apart
    below = spectrum(rows[:60])
    places = torch.cat([below, dense])
    distance = max(
        abs(float((below <= x).float().mean() - (dense <= x).float().mean())) for x in places
    )
    assert reward(rows[:60], dense) == pytest.approx(1 / distance)
    assert reward(rows[:60], dense) > reward(rows[:30], dense)


# ------------------------------------------------------------------ the policy
def test_the_policy_is_the_network_multiplied_out(llama):
    rows = gates(llama)[1]
    decoder = Decoder.of(llama)
    state = _State(decoder.dims[0], load_method("prunenet"))
    p = state.parameters
    expected = (rows @ p["projection"].T + p["offset"]) @ p["row"]
    torch.testing.assert_close(state.policy().logits(rows), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.logits(rows), expected, rtol=1e-4, atol=1e-4)


def test_the_rows_that_the_policy_ranks_highest_stay(llama, tmp_path):
    plan = load_method("prunenet", remove=0.2, policy=str(tmp_path / "p")).plan(
        llama, progress=False
    )
    policy = Policy.load(tmp_path / "p")
    for layer, rows in zip(plan.layers, gates(llama), strict=True):
        kept = layer.units["neuron"]
        expected = policy.logits(rows).topk(len(kept)).indices.sort().values
        assert torch.equal(kept, expected)
        assert "kv_group" not in layer.units


def test_a_policy_that_is_there_is_used_at_other_shares_and_models(llama, tmp_path, monkeypatch):
    file = str(tmp_path / "policy.safetensors")
    load_method("prunenet", remove=0.2, policy=file).plan(llama, progress=False)
    monkeypatch.setattr(prunenet, "_train", lambda *_: pytest.fail("trained again"))
    policy = Policy.load(file)
    sibling = roomy_decoder("llama", intermediate_size=80)
    for model in (llama, sibling):
        plan = load_method("prunenet", remove=0.3, policy=file).plan(model, progress=False)
        for layer, rows in zip(plan.layers, gates(model), strict=True):
            kept = layer.units["neuron"]
            assert torch.equal(kept, policy.logits(rows).topk(len(kept)).indices.sort().values)
    other = roomy_decoder("llama", hidden_size=36)
    with pytest.raises(InputError, match="trained on a hidden size of 48, and the model has 36"):
        load_method("prunenet", policy=file).plan(other, progress=False)


def test_what_is_no_policy_is_refused(llama, tmp_path):
    (tmp_path / "p").write_text("no")
    with pytest.raises(InputError, match=r"Cannot read the policy .*: give a file that PruneNet"):
        load_method("prunenet", policy=str(tmp_path / "p")).plan(llama, progress=False)


def test_training_finds_rows_that_keep_the_spectrum_better_than_chance():
    """Half of the rows are large: a policy that keeps them keeps the spectrum."""
    model = roomy_decoder("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for rows in gates(model):
            rows[1::2] *= 0.01
            rows[::2, 0] += 3  # which a linear policy can see
    decoder = Decoder.of(model)
    method = load_method("prunenet", remove=0.2, episodes=10)
    policy = prunenet._train(decoder, method, Work(), progress=False)

    def mean(chosen):
        return np.mean([reward(r[chosen(r)], spectrum(r)) for r in gates(model)])

    learned = mean(lambda rows: policy.logits(rows).topk(58).indices)
    chance = np.mean(
        [mean(lambda _: torch.randperm(96, generator=generator)[:58]) for _ in range(5)]
    )
    assert learned > 1.5 * chance


def test_the_best_episode_counts_not_the_last(llama, monkeypatch):
    decoder = Decoder.of(llama)
    rewards = iter([0.0] * 4 * 2 + [9.0] * 4 + [0.0] * 4 * 2 + [5.0] * 4)
    monkeypatch.setattr(prunenet, "reward", lambda rows, dense: next(rewards))
    method = load_method("prunenet", episodes=2, draws=2)
    work = Work()
    policies = []
    judge = _State.judge
    monkeypatch.setattr(_State, "judge", lambda self, p, r: (policies.append(p), judge(self, p, r)))
    assert prunenet._train(decoder, method, work, progress=False) is policies[0]
    assert float(work[0]["best"]) == 9


def test_stopped_training_goes_on_with_the_same_policy(llama, tmp_path, monkeypatch):
    decoder = Decoder.of(llama)
    method = load_method("prunenet", episodes=4)
    expected = prunenet._train(decoder, method, Work(), progress=False)
    judge = _State.judge

    def breaks(self, *given):
        if self.episode == 2:
            raise KeyboardInterrupt
        judge(self, *given)

    monkeypatch.setattr(_State, "judge", breaks)
    with pytest.raises(KeyboardInterrupt):
        prunenet._train(decoder, method, Work(tmp_path), progress=False)
    monkeypatch.setattr(_State, "judge", judge)
    found = prunenet._train(decoder, method, Work(tmp_path), progress=False)
    assert torch.equal(found.direction, expected.direction)
    assert torch.equal(found.offset, expected.offset)


@pytest.mark.parametrize(("bad", "least"), [({"episodes": 0}, 1), ({"draws": 1}, 2)])
def test_settings_that_cannot_learn_are_refused(bad, least):
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be at least {least}"):
        load_method("prunenet", **bad)
