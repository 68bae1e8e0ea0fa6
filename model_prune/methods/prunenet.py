"""PruneNet: a policy, learned from the weights alone, of which neurons to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy.stats import ks_2samp
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from model_prune.core.allocate import check_least, everywhere_alike, uniform
from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.linear import gram
from model_prune.core.plan import LayerPlan
from model_prune.core.structured import FromWeights, Structured
from model_prune.core.target import Dims, Family
from model_prune.core.work import Tensors, Work
from model_prune.method import Units
from prune_core.errors import InputError
from prune_core.storage import StrPath, atomic_write

GATE = "mlp.gate_proj.weight"


@dataclass(frozen=True)
class Policy:
    """How willingly a neuron is kept, by its row of gate.

    The paper's network, sigmoid((W Pᵀ + c) r), is linear in W before the sigmoid; this is what is
    left of it when that is multiplied out, so it reads layers of any number of neurons.

    direction: float32 [hidden], Pᵀ r.   offset: cᵀ r.
    """

    direction: Tensor
    offset: Tensor

    def logits(self, gate: Tensor) -> Tensor:
        """Of rows [neurons, hidden]: float32 [neurons]; higher ones are kept.

        Raises InputError for a policy of another hidden size.
        """
        if gate.shape[1] != len(self.direction):
            raise InputError(
                f"The policy was trained on a hidden size of {len(self.direction)}, and the model "
                f"has {gate.shape[1]}: train one for it, by leaving policy out."
            )
        return gate.float() @ self.direction.to(gate.device) + self.offset.to(gate.device)

    def save(self, path: StrPath) -> None:
        """Write it as safetensors."""
        with atomic_write(Path(path), "wb") as file:
            file.write(save({"direction": self.direction, "offset": self.offset}))

    @classmethod
    def load(cls, path: StrPath) -> Policy:
        """What `save` wrote; raises InputError for a file that is none."""
        try:
            stored = load_file(path)
            return cls(stored["direction"], stored["offset"])
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"Cannot read the policy '{path}' ({error}): give a file that PruneNet wrote."
            ) from error


@dataclass(frozen=True, kw_only=True)
class PruneNet(Units):
    """Cut the neurons that a policy thinks least of, as many from every layer; attention stays.

    The policy is trained to keep the distribution of the singular values of each layer's gate
    matrix, by policy gradient: rows are drawn without replacement, and the reward is the inverse of
    the Kolmogorov–Smirnov distance between the spectra with all rows and with those drawn.
    Source: Sengupta et al., "You only prune once: designing calibration-free model compression
    with policy learning" (PruneNet, 2025, arXiv:2501.15296), section 3, and its code.
    Defaults: 20 episodes, a learning rate of 1e-3, from the code.
    Differs: the probability is that of the rows that were drawn, under the noise they were drawn
    with (the code draws noise anew), in the order they were drawn; each reward is compared with
    those of other draws of the same layer; layers are not discounted, as what one draws does not
    change what another gets; a spectrum has as many values as hidden dimensions, zeros included;
    and the policy that is used is the best one, without noise.
    Cost: episodes × draws × layers decompositions of a [hidden, hidden] matrix.

    policy: a file: one that is there is used as it is, whatever share it was trained for; else the
    policy is kept there.
    draws: of rows of each layer in an episode.
    """

    name = "prunenet"
    policy: str | None = None
    episodes: int = 20
    draws: int = 4
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("episodes", self.episodes, 1)
        check_least("draws", self.draws, 2)

    def recipe(self, decoder: Decoder) -> _ByPolicy:
        """See Method."""
        return _ByPolicy(self)


@dataclass(frozen=True)
class _ByPolicy:
    """A recipe: train or read the policy, then cut what it ranks lowest."""

    method: PruneNet

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        policy = self._policy(decoder, work.part("policy"), progress)

        def scores(family: Family, i: int, state: Mapping[str, Tensor], dims: Dims) -> Tensor:
            return policy.logits(state[GATE])

        cut = Structured(self.method.remove, FromWeights(("neuron",), scores), everywhere_alike())
        return cut.layers(decoder, None, work, progress)

    def _policy(self, decoder: Decoder, work: Work, progress: bool) -> Policy:
        file = self.method.policy
        if file and Path(file).exists():
            return Policy.load(file)
        policy = _train(decoder, self.method, work, progress)
        if file:
            policy.save(file)
        return policy


def _train(decoder: Decoder, method: PruneNet, work: Work, progress: bool) -> Policy:
    """The policy that kept the spectra best; an episode that is done is not done again."""
    gone = uniform(decoder.dims, method.remove, ("neuron",))
    kept = [d.neurons - g["neuron"] for d, g in zip(decoder.dims, gone, strict=True)]

    def gate(i: int) -> Tensor:
        return decoder.state(i)[GATE].float().cpu()

    spectra = [spectrum(gate(i)) for i in range(len(kept))]
    state = _State(decoder.dims[0], method)
    if 0 in work:
        state.restore(work[0])
    bar = tqdm(
        range(state.episode, method.episodes),
        desc="training the policy",
        unit="episode",
        disable=None if progress else True,
    )
    for _ in bar:
        for i, count in enumerate(kept):
            rows = gate(i)
            logits = state.logits(rows)
            draws = [draw(logits, count, state.generator) for _ in range(method.draws)]
            rewards = torch.tensor([reward(rows[chosen], spectra[i]) for chosen, _ in draws])
            others = (rewards.sum() - rewards) / (method.draws - 1)
            log_probs = torch.stack([log_prob for _, log_prob in draws])
            state.step(-((rewards - others) * log_probs).sum())
        policy = state.policy()
        found = [
            reward(rows[policy.logits(rows).topk(count).indices], dense)
            for rows, count, dense in zip(map(gate, range(len(kept))), kept, spectra, strict=True)
        ]
        state.judge(policy, sum(found) / len(found))
        bar.set_postfix(reward=f"{state.best:.1f}")
        work[0] = state.tensors()
    return state.best_policy


def spectrum(rows: Tensor) -> Tensor:
    """Singular values of float32 [rows, hidden], ascending: [hidden], zeros for missing rows."""
    values: Tensor = torch.linalg.eigvalsh(gram(rows))
    return values.clamp(min=0).sqrt()


def reward(rows: Tensor, dense: Tensor) -> float:
    """One over the Kolmogorov–Smirnov distance of the spectrum of `rows` to the dense one.

    Spectra that cannot be told apart count as one value apart.
    """
    distance = float(ks_2samp(spectrum(rows), dense, method="asymp").statistic)
    return 1 / max(distance, 1 / len(dense))


def draw(logits: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` rows without replacement, and the log-probability of drawing them in their order.

    A row's weight is its logit's relaxed Bernoulli sample (Maddison et al., 2017,
    arXiv:1611.00712), and the noise of that counts as given.
    """
    noise = torch.rand(len(logits), generator=generator).logit(eps=1e-6)
    weights = logsigmoid(logits + noise)
    gumbel = -torch.empty_like(noise).exponential_(generator=generator).log()
    order = (weights.detach() + gumbel).argsort(descending=True)
    ordered = weights[order]
    left = ordered.flip(0).logcumsumexp(0).flip(0)  # of the rows that are not drawn yet
    return order[:count], (ordered - left)[:count].sum()


class _State:
    """The paper's network, its optimiser and what came of it."""

    def __init__(self, dims: Dims, method: PruneNet) -> None:
        self.generator = torch.Generator().manual_seed(method.seed)
        bound = dims.hidden**-0.5

        def drawn(*shape: int, low: float, high: float) -> Tensor:
            values = torch.rand(*shape, generator=self.generator) * (high - low) + low
            return values.requires_grad_()

        self.parameters = {
            "projection": drawn(dims.neurons, dims.hidden, low=-bound, high=bound),
            "offset": drawn(dims.neurons, low=-bound, high=bound),
            "row": drawn(dims.neurons, low=0, high=1),
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=method.learning_rate)
        self.episode = 0
        self.best, self.best_policy = -math.inf, self.policy()

    def logits(self, gate: Tensor) -> Tensor:
        """As Policy.logits, with gradients."""
        p = self.parameters
        return gate @ (p["row"] @ p["projection"]) + p["offset"] @ p["row"]

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def policy(self) -> Policy:
        p = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return Policy(p["row"] @ p["projection"], p["offset"] @ p["row"])

    def judge(self, policy: Policy, reward: float) -> None:
        """At the end of an episode."""
        self.episode += 1
        if reward > self.best:
            self.best, self.best_policy = reward, policy

    def tensors(self) -> Tensors:
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {
            **{name: parameter.detach() for name, parameter in self.parameters.items()},
            **moments,
            "episode": torch.tensor(self.episode),
            "best": torch.tensor(self.best, dtype=torch.float64),
            "best.direction": self.best_policy.direction,
            "best.offset": self.best_policy.offset,
            "random": self.generator.get_state(),
        }

    @torch.no_grad()
    def restore(self, tensors: Tensors) -> None:
        """What `tensors` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            self.optimizer.state[parameter] = {
                key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.episode, self.best = int(tensors["episode"]), float(tensors["best"])
        self.best_policy = Policy(tensors["best.direction"], tensors["best.offset"])
        self.generator.set_state(tensors["random"])
