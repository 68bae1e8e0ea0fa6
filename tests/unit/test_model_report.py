"""A report's numbers against a plan worked out by hand, and the page that shows them."""

import base64
import hashlib
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from model_prune.core.plan import LayerPlan
from model_prune.core.target import MATRICES, Dims, matching
from model_prune.evaluate import Perplexity, Protocol
from model_prune.report import Report
from prune_core.errors import InputError

# q, o: 8 x 8; k, v: 4 x 8; gate, up: 6 x 8; down: 8 x 6. 192 of attention, 144 of FFN, 336 in all.
DIMS = Dims(hidden=8, heads=4, kv_groups=2, head_dim=2, neurons=6)


def mask(matrix, *zeros):
    """All stays but what the indices take."""
    kept = torch.ones(DIMS.shape(matrix), dtype=torch.bool)
    for zero in zeros:
        kept[zero] = False
    return kept


PLANS = (
    LayerPlan(  # keeps 192 + 3 * 3 * 8 = 264
        masks={
            "self_attn.q_proj": mask("self_attn.q_proj", slice(0, 2)),  # 16
            "mlp.down_proj": mask("mlp.down_proj", np.s_[:, 1:3]),  # 8: neuron 1 is cut anyway
        },
        units={"neuron": torch.tensor([0, 2, 5])},
    ),
    LayerPlan(  # keeps 32 + 16 + 16 + 32 + 144 = 240
        masks={
            "self_attn.o_proj": mask("self_attn.o_proj", np.s_[:, 3:5]),  # 8: columns 4 to 7 stay
            "self_attn.k_proj": mask("self_attn.k_proj", 0, 3),  # 8: rows 2 and 3 stay
            "self_attn.q_proj": mask("self_attn.q_proj", slice(0, 6)),  # 16: rows 4 to 7 stay
        },
        units={"kv_group": torch.tensor([1])},
    ),
    LayerPlan(removed=True, biases={"mlp.down_proj": torch.ones(8)}),
)
PROTOCOL = Protocol(8, "\n\n", False, "float32", "text", "ids", None)


def measured(*nll):
    return Perplexity(np.array(nll, dtype=float), 100, 2.0, PROTOCOL)


def report(plans=PLANS, dims=DIMS, **options):
    given = {"vocabulary": 10, "tied": True, "bytes_per_weight": 2} | options
    return Report.of("A plan", [dims] * len(plans), plans, **given)


@pytest.fixture
def whole():
    return report(
        target=["layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"],
        perplexity={"news": (measured(1, 2, 3), measured(1.1, 2.2, 3.3))},
        seconds={"calibrate": 12.34, "plan": 0.5},
    )


# ------------------------------------------------------------------ numbers
def test_each_layer_is_counted(whole):
    first, second, third = whole.layers
    assert [layer.stored() for layer in whole.layers] == [264, 240, 0]
    assert first.zeros == {"self_attn.q_proj": 16, "mlp.down_proj": 8}
    assert second.zeros == {
        "self_attn.o_proj": 8,
        "self_attn.k_proj": 8,
        "self_attn.q_proj": 16,
    }
    assert [layer.gone() for layer in whole.layers] == [72 + 24, 96 + 32, 336]
    assert first.share(["mlp.down_proj"]) == (24 + 8) / 48
    assert second.share(["self_attn.q_proj"]) == (32 + 16) / 64
    assert third.after is None
    assert third.share(["self_attn.v_proj"]) == 1


def test_the_totals(whole):
    assert whole.weights == (3 * 336 + 80, 264 + 240 + 80)
    assert whole.size == (2 * 1088, 2 * 584)
    assert whole.flops == (2 * 1088, 2 * 584)
    assert whole.cache == (2 * 3 * 2 * 2 * 2, 2 * (2 * 2 * 2 + 2 * 1 * 2))
    assert whole.zeros == 56


def test_three_sparsities_are_told_together(whole):
    """AMP's, CFSP's, LLM-Pruner's and PruneNet's ratios each mean another one of them."""
    assert whole.sparsity == {
        "target": (16 + 48) / (64 + 48),
        "layers": 560 / 1008,
        "model": 560 / 1088,
    }
    assert "57.1 % of the target, 55.6 % of the decoder layers, 51.5 % of the" in str(whole)


def test_tied_embeddings_are_stored_once_but_work_all_the_same():
    tied, free = (report(tied=tied) for tied in (True, False))
    assert free.weights[0] - tied.weights[0] == 80
    assert free.flops == tied.flops
    assert free.sparsity["model"] == 560 / 1168


def test_a_dense_model_is_as_it_was():
    same = report([LayerPlan()] * 2)
    assert same.sparsity == {"target": 0, "layers": 0, "model": 0}
    assert all(change == "no change" for *_, change in same.totals)


def test_added_biases_are_stored():
    biased = report([LayerPlan(biases={"mlp.down_proj": torch.ones(8)})])
    assert biased.weights == (336 + 80, 336 + 80 + 8)
    assert biased.answers["Smaller?"].startswith("No: the file")
    assert "+1.9 %" in biased.answers["Smaller?"]


def test_targets_are_named_as_matching_names_them():
    names = matching(["down_proj"], 3)
    assert report(target=names).sparsity["target"] == (24 + 8 + 0 + 48) / (3 * 48)


def test_perplexities_come_with_their_interval(whole):
    text = whole.perplexity["news"]
    assert (text.before, text.after) == pytest.approx((math.exp(2), math.exp(2.2)))
    assert text.ratio == pytest.approx(math.exp(0.2))
    assert 1 < text.low < text.ratio < text.high
    other = replace(measured(1, 2, 3), protocol=replace(PROTOCOL, tokens=9))
    with pytest.raises(InputError, match="do not compare"):
        report(perplexity={"news": (measured(1, 2, 3), other)})


# ------------------------------------------------------------------ three answers
def test_zeros_save_nothing():
    masks = {name: torch.rand(DIMS.shape(name)) > 0.5 for name in MATRICES}
    answers = report([LayerPlan(masks=masks)] * 2).answers
    assert answers["Smaller?"].startswith("No: the file, and the weights in memory, stay at 1.5 kB")
    assert "save nothing in a dense file" in answers["Smaller?"]
    assert answers["Faster?"].startswith("No:")
    assert "Zeros bring no speed" in answers["Faster?"]
    assert answers["Where does it load?"].startswith("Wherever the dense model does")


def test_what_is_cut_is_smaller_and_faster():
    answers = report([LayerPlan(units={"neuron": torch.arange(3)})] * 2).answers
    assert answers["Smaller?"] == (  # 752 weights to 608
        "Yes: the file, and the weights in memory, go from 1.5 kB to 1.2 kB (−19.1 %)."
    )
    assert answers["Faster?"].startswith("Yes, 1.24 times at best")
    assert answers["Where does it load?"] == (
        "In stock transformers and vLLM, as all layers are alike."
    )


@pytest.mark.parametrize(
    ("plans", "dims", "answer"),
    [
        ([LayerPlan(), LayerPlan(removed=True)], DIMS, "In stock transformers and vLLM"),
        (
            [LayerPlan(units={"kv_group": torch.tensor([0])})] * 2,
            DIMS,
            "a Qwen2 that lost heads needs prunekit's class",
        ),
        ([LayerPlan(), LayerPlan(units={"neuron": torch.arange(3)})], DIMS, "layers differ"),
        ([LayerPlan(biases={"mlp.down_proj": torch.ones(8)})], DIMS, "biases were added"),
        (
            [LayerPlan(units={"kv_group": torch.arange(7)})] * 2,
            Dims(576, 9, 9, 64, 64),
            "refuses 7 heads at a hidden size of 576",
        ),
        ([LayerPlan(removed=True)], DIMS, "Nowhere"),
    ],
)
def test_where_it_loads(plans, dims, answer):
    assert answer in report(plans, dims).answers["Where does it load?"]


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (
            {"units": {"neuron": torch.tensor([0, 6])}},
            {},
            r"in ascending order, each once, in \[0, 5\]",
        ),
        ({"units": {"kv_group": torch.tensor([1, 0])}}, {}, "in ascending order"),
        ({"units": {"neuron": torch.arange(0)}}, {}, "keeps no 'neuron'"),
        ({"masks": {"mlp.up_proj": torch.ones(8, 6) > 0}}, {}, r"'mlp.up_proj' has the shape"),
        ({}, {"target": ["mlp.up_proj"]}, "got 'mlp.up_proj'"),
        ({}, {"target": []}, "got 'none'"),
    ],
)
def test_what_does_not_fit_is_refused(plan, options, message):
    with pytest.raises(InputError, match=message):
        report([LayerPlan(**plan)], **options)


def test_plans_and_layers_must_pair_up():
    with pytest.raises(InputError, match="got 1 plans for 2 layers"):
        Report.of("x", [DIMS] * 2, PLANS[:1], vocabulary=10, tied=True, bytes_per_weight=2)


# ------------------------------------------------------------------ to keep and to show
def test_it_is_saved_and_read_back(whole, tmp_path):
    whole.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == whole
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["follows"]["sparsity"] == whole.sparsity
    assert stored["follows"]["weights"] == [1088, 584]
    for content in ("{", "{}", "[]"):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InputError, match="report"):
            Report.load(tmp_path / "report.json")


def test_the_terminal_has_one_narrow_line_a_layer(whole):
    lines = str(whole).splitlines()
    assert lines[3:6] == [
        "    0     2/2         3/6     9.1   28.6",
        "    1     1/2         6/6    13.3   38.1",
        "    2                            removed",
    ]
    assert "weights stored: 1,088 -> 584 (−46.3 %)" in lines
    assert "time: calibrate 12.3 s, plan 0.5 s" in lines
    large = Dims(64, 128, 128, 1, 28672)
    cut = LayerPlan(units={"neuron": torch.arange(28671), "kv_group": torch.arange(127)})
    assert max(map(len, str(report([cut] * 100, large)).splitlines()[2:103])) <= 40


class Page(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags, self.cells, self.attributes, self.open = [], [], {}, []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)
        if tag not in ("meta", "link"):
            self.open.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, names = self.open[-1] if self.open else ("", "")
        if tag == "td" and "heat" in names:
            self.cells.append((data, names.split()[-1]))


def test_the_map_shows_each_matrix_in_number_and_colour(whole, tmp_path):
    whole.to_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    first = [("25", "n2"), *[("0", "n0")] * 3, *[("50", "n5")] * 2, ("67", "n7")]
    second = [("75", "n8"), ("75", "n8"), ("50", "n5"), ("62", "n6"), *[("0", "n0")] * 3]
    assert page.cells == [*first, *second, ("removed", "n10")]


def test_units_alone_need_two_columns(tmp_path):
    dims = Dims(8, 4, 2, 2, 1000)
    plans = [LayerPlan(units={"neuron": torch.arange(n)}) for n in (1, 999)]
    report(plans, dims).to_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    # Nothing and all are told from nearly so.
    assert page.cells[1::2] == [(">99", "n9"), ("<1", "n1")]


def test_the_page_escapes_and_loads_nothing(whole, tmp_path):
    hostile = "</style><script>alert(1)</script>"
    texts = {hostile: (measured(1, 2), measured(1, 3))}
    pages = []
    for title in ("A plan", hostile):
        named = report(perplexity=texts, seconds={title: 1.0})
        replace(named, title=title).to_html(tmp_path / "page.html")
        pages.append(Page((tmp_path / "page.html").read_text(encoding="utf-8")))
    assert pages[0].tags == pages[1].tags
    assert "script" not in pages[1].tags
    assert not {"src", "style", "onload"} & set(pages[1].attributes)
    assert pages[1].attributes["href"] == ["data:,"]
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    style = source.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in source
