"""Channels, beside the groups that Torch-Pruning (DepGraph) finds by another way."""

import warnings

import pytest
import torch
from torch import nn

from model_prune.graph.network import Network
from tiny_networks import NETS, settled

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    oracle = pytest.importorskip("torch_pruning")


def places(dep, positions, names):
    """Rows or columns of a weight that a step of its group is about; nothing of what has none."""
    module = dep.target.module
    if module not in names or not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
        return None
    written = oracle.function.prune_conv_out_channels, oracle.function.prune_linear_out_channels
    depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    rows = isinstance(module, nn.BatchNorm2d) or depthwise or dep.handler in written
    return (f"{names[module]}.weight", 0 if rows else 1), frozenset(positions)


# Of flattened halves it says rows that are not there, so networks with them are left out.
@pytest.mark.parametrize("name", ["residual", "dense blocks", "resnet"])
def test_channels_are_the_groups_that_torch_pruning_finds(name):
    torch.manual_seed(0)
    model, example, _ = NETS[name]()
    model = settled(model)
    network = Network(model, example)
    names = {module: own for own, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = oracle.DependencyGraph().build_dependency(model, example_inputs=example)
    compared = 0
    for family in network.families:
        (first, dim), rows = next(iter(family.members.items()))
        assert dim == 0
        module = model.get_submodule(first.removesuffix(".weight"))
        prune = graph.get_pruner_of_module(module).prune_out_channels
        for channel in (0, family.channels - 1):
            group = graph.get_pruning_group(module, prune, idxs=rows[channel].tolist())
            theirs = {}
            for dep, positions in group:
                found = places(dep, positions, names)
                if found is not None:
                    theirs.setdefault(found[0], set()).update(found[1])
            ours = {
                member: set(positions[channel].tolist())
                for member, positions in family.members.items()
                if member[0].endswith("weight")
            }
            assert ours == theirs
            compared += 1
    assert compared == 2 * len(network.families)
