"""An ONNX file in, a smaller ONNX file out, run by ONNX Runtime."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model_prune.graph import readers
from model_prune.graph.network import Network
from model_prune.graph.onnx import OnnxNetwork
from model_prune.prune_onnx import prune_onnx
from prune_core.errors import CheckpointError, InputError, MissingExtra, UnknownName
from tiny_networks import NETS, Net, half, images, settled

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


class Logits(nn.Module):
    """The one tensor of what a model of transformers gives."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        found = self.model(x)
        return found if isinstance(found, torch.Tensor) else found.logits


def inverted(self, x):
    """Two blocks as MobileNet's."""
    x = F.hardswish(self.b0(self.c0(x)))
    y = F.relu6(self.b2(self.depth(F.relu6(self.b1(self.wide(x))))))
    return self.head((self.b3(self.narrow(y)) + x).mean((2, 3)))


def mobile():
    return Net(
        inverted,
        c0=nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        b0=nn.BatchNorm2d(8),
        wide=nn.Conv2d(8, 24, 1, bias=False),
        b1=nn.BatchNorm2d(24),
        depth=nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
        b2=nn.BatchNorm2d(24),
        narrow=nn.Conv2d(24, 8, 1, bias=False),
        b3=nn.BatchNorm2d(8),
        head=nn.Linear(8, 5),
    )


def u_net(self, x):
    a = F.silu(self.n1(self.d1(x)))
    b = F.leaky_relu(self.d2(F.max_pool2d(a, 2)), 0.1)
    return self.last(torch.cat([a, F.interpolate(self.up(b), scale_factor=2)], 1))


def shaped():
    return Net(
        u_net,
        d1=nn.Conv2d(3, 8, 3, padding=1),
        n1=nn.InstanceNorm2d(8, affine=True),
        d2=nn.Conv2d(8, 12, 3, padding=1),
        up=nn.Conv2d(12, 6, 1),
        last=nn.Conv2d(14, 2, 1),
    )


CASES = {name: lambda name=name: NETS[name]()[:2] for name in NETS} | {
    "mobile": lambda: (mobile(), images()),
    "u-net": lambda: (shaped(), images()),
}
# By which exporter, and whether the file leaves the batch open.
FILES = [
    ("residual", "old", True),
    ("residual", "new", True),
    ("concat, gate and flatten", "old", True),
    ("concat, gate and flatten", "new", False),
    ("grouped and transposed", "old", True),
    ("packed attention", "old", False),
    ("packed attention", "new", True),
    ("u-net", "old", True),
    ("mobile", "new", True),
    ("resnet", "old", True),
    ("vit", "new", True),
    ("vit", "old", True),
    ("bert", "old", True),
]


def export(model, example, path, exporter="old", dynamic=True):
    model = Logits(model).eval()
    given = {"input_names": ["x"], "output_names": ["y"]}
    if exporter == "new":
        given |= {"dynamo": True, "verbose": False}
        given |= {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamic else {}
    else:
        given |= {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}} if dynamic else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), str(path), **given)
    return path


def made(name, path, exporter="old", dynamic=True):
    torch.manual_seed(0)
    model, example = CASES[name]()
    model = settled(model)
    for parameter in model.parameters():  # equal ones would be written once, and be tied
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.2)
    return export(model, example, path, exporter, dynamic), example, model


def run(path, **inputs):
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in inputs.items()})[0])


def assert_near(found, expected):
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(("name", "exporter", "dynamic"), FILES)
def test_masked_is_cut_in_onnx_runtime(name, exporter, dynamic, tmp_path):
    path, x, model = made(name, tmp_path / "net.onnx", exporter, dynamic)
    dense = OnnxNetwork.read(path)
    with torch.no_grad():
        assert_near(dense(x)[0], Logits(model)(x))
    network = Network(dense, *dense.example())
    assert network.unknown == []
    assert network.stuck == {}
    of_torch = Network(model, x)
    assert sorted(f.channels for f in network.families) == sorted(
        f.channels for f in of_torch.families
    )
    for seed in range(2):
        kept = half(network, seed)
        network.cut(kept).write(tmp_path / "cut.onnx")
        onnx.checker.check_model(str(tmp_path / "cut.onnx"), full_check=True)
        with torch.no_grad():
            expected = network.masked(kept)(x)[0]
        assert_near(run(tmp_path / "cut.onnx", x=x), expected)
        if dynamic:  # another batch than the one it was exported with
            more = torch.cat([x, x.flip(0), x])
            assert_near(run(tmp_path / "cut.onnx", x=more)[: len(x)], expected)
        assert not torch.allclose(expected, run(path, x=x), rtol=1e-3)
    assert size(tmp_path / "cut.onnx") < 0.9 * size(path)


def test_all_else_in_the_file_stays(tmp_path):
    path, _, _ = made("residual", tmp_path / "net.onnx", "new")
    proto = onnx.load(str(path))
    entry = proto.metadata_props.add()
    entry.key, entry.value = "made by", "a test"
    onnx.save(proto, str(path))
    prune_onnx(path, tmp_path / "cut.onnx", remove=0.4)
    cut = onnx.load(str(tmp_path / "cut.onnx"))
    for part in ("ir_version", "producer_name", "opset_import"):
        assert getattr(cut, part) == getattr(proto, part)
    told = {each.key: each.value for each in cut.metadata_props}
    assert told["made by"] == "a test"
    assert json.loads(told["prunekit"])["settings"]["remove"] == 0.4
    assert [node.name for node in cut.graph.node] == [node.name for node in proto.graph.node]
    assert list(cut.graph.input) == list(proto.graph.input)
    assert list(cut.graph.output) == list(proto.graph.output)
    names = [tensor.name for tensor in proto.graph.initializer]
    assert {tensor.name for tensor in cut.graph.initializer} == set(names)
    # A cut file is a file like others.
    assert prune_onnx(tmp_path / "cut.onnx", remove=0.2).parameters[1] < 0.6 * size(path)


def size(path):
    return sum(int(np.prod(t.dims)) for t in onnx.load(str(path)).graph.initializer)


def test_nothing_removed_is_the_same_file(tmp_path):
    path, x, _ = made("residual", tmp_path / "net.onnx", "new")
    dense = OnnxNetwork.read(path)
    found, expected = dense.smaller(), onnx.load(str(path))
    del expected.graph.value_info[:]
    for tensor in (*found.graph.initializer, *expected.graph.initializer):
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    assert found == expected
    assert torch.equal(dense(x)[0], OnnxNetwork(found)(x)[0])


# ------------------------------------------------------------------ one call
@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made("residual", tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture
def data(tmp_path):
    x = torch.randn(70, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    np.savez(tmp_path / "data.npz", x=x.numpy(), labels=np.arange(70) % 5)
    np.save(tmp_path / "x.npy", x.numpy())
    return tmp_path / "data.npz"


@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "magnitude"},
        {"criterion": "random"},
        {"criterion": "snip"},
        {"criterion": "grasp"},
        {"method": "obspa"},
        {"method": "obspa", "data": None},
    ],
)
def test_a_file_is_pruned_by_every_criterion(settings, of, file, data, tmp_path):
    path, x, _ = file
    given = {"data": data} | settings
    report = prune_onnx(path, tmp_path / "cut.onnx", remove=0.4, of=of, **given)
    before, after = getattr(report, of)
    assert 0.4 * before < after <= 0.6 * before
    assert size(tmp_path / "cut.onnx") < size(path)
    assert run(tmp_path / "cut.onnx", x=x).isfinite().all()
    said = json.loads((tmp_path / "cut.json").read_text())
    assert said["parameters"] == list(report.parameters)
    assert said["settings"]["remove"] == 0.4
    report.to_html(tmp_path / "cut.html")
    assert "c1" in (tmp_path / "cut.html").read_text() or "Conv" in str(report)


def test_obspa_is_nearer_to_the_dense_network_than_magnitude(file, data, tmp_path):
    path, _, _ = file
    x = torch.from_numpy(np.load(data)["x"])
    dense, errors = run(path, x=x), {}
    for method in ("spa", "obspa"):
        prune_onnx(path, tmp_path / f"{method}.onnx", method=method, remove=0.3, data=data)
        errors[method] = (run(tmp_path / f"{method}.onnx", x=x) - dense).square().mean()
    assert errors["obspa"] < 0.5 * errors["spa"]


def test_obspa_goes_on_where_it_was_stopped(file, data, tmp_path, monkeypatch):
    """After the pass over the data and the first of the layers that read."""
    given = {"method": "obspa", "remove": 0.3, "data": data}
    expected = prune_onnx(file[0], tmp_path / "whole.onnx", **given)
    done, rise = [], readers.rise

    def counted(*arguments):
        done.append(None)
        if len(done) == 2:
            raise KeyboardInterrupt
        return rise(*arguments)

    out = tmp_path / "cut.onnx"
    monkeypatch.setattr(readers, "rise", counted)
    with pytest.raises(KeyboardInterrupt):
        prune_onnx(file[0], out, **given)
    assert not out.exists()
    with pytest.raises(InputError, match="made by other work"):
        prune_onnx(file[0], out, **given | {"remove": 0.4})
    reads = []
    monkeypatch.setattr(readers, "_moments", lambda *_: reads.append(None))
    found = prune_onnx(file[0], out, **given)
    assert not reads
    assert found.families == expected.families
    assert out.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not list(tmp_path.glob("*.work"))


def test_looking_writes_nothing(file, tmp_path):
    report = prune_onnx(file[0], remove=0.4)
    assert "parameters: " in str(report)
    assert list(tmp_path.iterdir()) == []


def test_one_array_will_do_for_one_input(file, data, tmp_path):
    found = prune_onnx(file[0], method="obspa", data=data.with_name("x.npy"), remove=0.3)
    assert found.families == prune_onnx(file[0], method="obspa", data=data, remove=0.3).families


def test_a_file_of_one_batch_size_reads_whole_batches(data, tmp_path):
    path, _, _ = made("residual", tmp_path / "net.onnx", "old", dynamic=False)
    assert prune_onnx(path, method="obspa", data=data, remove=0.3).parameters[1]
    assert prune_onnx(path, data=data, criterion="snip", remove=0.3).parameters[1]


# ------------------------------------------------------------------ refusals
def test_an_operator_that_is_not_known_is_named(tmp_path):
    model = Net(lambda self, x: self.last(x.sort(-1).values), last=nn.Linear(6, 4))
    export(model, torch.randn(2, 6), tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"not known here, at node '.*' \(TopK\)"):
        OnnxNetwork.read(tmp_path / "net.onnx")


def test_old_opsets_are_refused(file, tmp_path):
    proto = onnx.load(str(file[0]))
    proto.opset_import[0].version = 11
    onnx.save(proto, str(tmp_path / "old.onnx"))
    with pytest.raises(InputError, match="is of opset 11, and 13 or newer is read here"):
        OnnxNetwork.read(tmp_path / "old.onnx")


def test_more_than_one_file_holds_is_refused(file, monkeypatch):
    monkeypatch.setattr("model_prune.graph.onnx.LARGEST", 1000)
    with pytest.raises(InputError, match="GiB of weights, and what is written here is one file"):
        OnnxNetwork.read(file[0])


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"hello")
    for name in ("net.onnx", "absent.onnx"):
        with pytest.raises(CheckpointError, match="as ONNX"):
            OnnxNetwork.read(tmp_path / name)


def test_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises((MissingExtra, ImportError), match="onnx"):
        OnnxNetwork.read(file[0])


def test_what_does_not_fit_is_refused(file, data, tmp_path):
    path, other = file[0], tmp_path / "other.npz"

    def refused(words, **given):
        with pytest.raises(InputError, match=words):
            prune_onnx(path, tmp_path / "cut.onnx", **given)
        assert not (tmp_path / "cut.onnx").exists()

    refused("snip goes by the gradient of a loss", criterion="snip")
    refused("snip goes by", criterion="snip", data=data.with_name("x.npy"))
    np.savez(other, y=np.zeros((4, 3, 16, 16)))
    refused(r"has the arrays \['y'\], and net.onnx the inputs \['x'\]", data=other)
    np.savez(other, x=np.zeros((4, 2, 16, 16)))
    refused(r"takes rows of \[3, 16, 16\]", data=other)
    np.savez(other, x=np.zeros((4, 3, 16, 16)), labels=np.zeros(3))
    refused("has 4 rows and 3 labels", data=other)
    refused("still be more than 1 - 0.999 of the parameters", remove=0.999)
    refused(r"remove is a share in \[0, 1\)", remove=30.0)
    refused("Unknown key 'share'", share=0.3)
    with pytest.raises(UnknownName, match="Unknown method of ONNX files 'wanda'"):
        prune_onnx(path, method="wanda")
    (tmp_path / "there.onnx").write_text("")
    with pytest.raises(InputError, match="exists: choose another name"):
        prune_onnx(path, tmp_path / "there.onnx")
    with pytest.raises(InputError, match=r"must end in \.onnx"):
        prune_onnx(path, tmp_path / "there.bin")
    assert not list(tmp_path.glob(".*tmp"))


def test_noise_is_none_for_tokens(tmp_path):
    path, _, _ = made("bert", tmp_path / "net.onnx")
    with pytest.raises(InputError, match="these have whole numbers, such as tokens"):
        prune_onnx(path, method="obspa")
