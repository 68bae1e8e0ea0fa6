"""Rows in: every kind of data set, and what is wrong with them said in a sentence."""

import json

import numpy as np
import pytest

from data_prune import select
from data_prune.rows import Columns, draws, read, rows_of
from prune_core.errors import InputError

PAIRS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(6)]


def rows(data, **columns):
    source = read(data)
    return rows_of(source, Columns(**columns).found(source.names))


def test_the_order_is_that_of_the_content():
    straight, turned = rows(PAIRS), rows(PAIRS[::-1])
    assert straight.texts == turned.texts
    assert (straight.ids == turned.ids).all()
    assert (straight.positions == 5 - turned.positions).all()
    assert straight.texts[0] == "\n".join(PAIRS[straight.positions[0]].values())


def test_exact_copies_are_numbered():
    ids = rows([PAIRS[0], PAIRS[1], PAIRS[0]]).ids
    assert len(set(ids.tolist())) == 3


def test_a_pair_is_not_the_pair_cut_elsewhere():
    one, other = {"prompt": "a\nb", "completion": "c"}, {"prompt": "a", "completion": "b\nc"}
    assert rows([one]).ids[0] != rows([other]).ids[0]


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"question": "p", "answer": "r"}, "p", "r"),
        ({"instruction": "p", "output": "r", "input": ""}, "p", "r"),
        ({"instruction": "p", "output": "r", "input": "of x"}, "p\nof x", "r"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "r"},
                ]
            },
            "system: s\nuser: p",
            "r",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_common_names_are_found(row, prompt, response):
    found = rows([row])
    assert (found.prompts[0], found.responses[0]) == (prompt, response)


def test_every_container_gives_the_same_rows_and_its_own_kind_back(tmp_path):
    import datasets
    import pandas as pd

    jsonl, csv, parquet = (tmp_path / f"r.{kind}" for kind in ("jsonl", "csv", "parquet"))
    jsonl.write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    frame = pd.DataFrame(PAIRS)
    frame.to_csv(csv, index=False, encoding="utf-8-sig")  # with Excel's byte-order mark
    frame.to_parquet(parquet)
    table = datasets.Dataset.from_list(PAIRS)
    kept = select(PAIRS, metric="random", budget=3)
    folder = tmp_path / "folder"
    folder.mkdir()
    frame.iloc[:4].to_parquet(folder / "0.parquet")
    frame.iloc[4:].to_parquet(folder / "1.parquet")
    for given in (jsonl, str(jsonl), csv, parquet, folder, frame, table):
        other = select(given, metric="random", budget=3)
        assert other.indices.tolist() == kept.indices.tolist()
        taken = other.dataset()
        if isinstance(given, pd.DataFrame | datasets.Dataset):
            assert type(taken) is type(given)
        got = taken.to_dict("records") if isinstance(taken, pd.DataFrame) else list(taken)
        assert got == kept.dataset()


def test_strings_are_rows_of_text():
    kept = select(["one", "two", "three"], metric="random", budget=2)
    assert kept.dataset() == [["one", "two", "three"][i] for i in kept.indices]


def test_unicode_line_separators_inside_a_row(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"a\u2028b\x85c{i}"}, ensure_ascii=False) for i in range(3)),
        encoding="utf-8",
    )
    assert len(rows(path)) == 3


def test_rows_that_cannot_be_scored_are_dropped_with_the_reason():
    bad = [
        {"prompt": "p", "completion": None},
        {"prompt": "p", "completion": "  "},
        {"prompt": 3, "completion": "r"},
        {"completion": "r"},
    ]
    with pytest.warns(
        UserWarning, match="4 of the rows cannot be scored and are dropped; the first is"
    ):
        selection = select([*bad, *PAIRS], metric="random", budget="50%")
    assert len(selection.indices) == 5
    assert [selection.reasons[i] for i in range(4)] == [
        "dropped: its response is missing",
        "dropped: its response is empty",
        "dropped: its prompt is no text but 3",
        "dropped: its prompt is missing",
    ]
    assert np.isnan(selection.scores[:4]).all()


@pytest.mark.parametrize(
    ("data", "columns", "message"),
    [
        ([], {}, "The data set is empty"),
        ([{"a": "x"}], {}, "None of the columns is called.*There are: a"),
        (PAIRS, {"prompt": "promt", "response": "completion"}, "no column 'promt'.*'prompt'"),
        (PAIRS, {"text": "prompt", "response": "completion"}, "either text= or prompt="),
        ([{"text": ""}], {}, "None of the 1 rows can be scored; the first: its text is empty"),
        ([{"text": "x"}, "y"], {}, "must all be dicts, or all strings, got str"),
        (3, {}, "A data set must be a Hugging Face Dataset.*got int"),
        ("rows.txt", {}, "'rows.txt' must be a .jsonl"),
        ("none.jsonl", {}, "Cannot read 'none.jsonl'"),
        ("none.csv", {}, "Cannot read 'none.csv' as CSV"),
        ("none.parquet", {}, "Cannot read 'none.parquet' as Parquet"),
        (
            [{"text": "a", "n": 1}, {"text": "b", "n": 1}],
            {"id": "n"},
            "must differ, but '1' is there 2 times",
        ),
        ([{"messages": "hello"}], {}, "'messages' is no list of {role, content}"),
    ],
)
def test_bad_data_is_said_in_a_sentence(data, columns, message):
    with pytest.raises(InputError, match=message):
        rows(data, **columns)


def test_hugging_face_containers_that_are_no_data_set():
    import datasets

    split = datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)})
    with pytest.raises(InputError, match="has the splits train: pass one"):
        read(split)
    with pytest.raises(InputError, match="IterableDataset can be read only once"):
        read(datasets.IterableDataset.from_generator(lambda: iter(PAIRS)))


def test_lots_are_uniform_and_belong_to_row_seed_and_purpose():
    ids = rows([f"row {i}" for i in range(20_000)]).ids
    first = draws(ids, 0, "a")
    assert ((first >= 0) & (first < 1)).all()
    counts, _ = np.histogram(first, 20, (0, 1))
    assert abs(counts - 1000).max() < 5 * 31  # five standard deviations
    np.testing.assert_array_equal(first[5:9], draws(ids[5:9], 0, "a"))
    for other in (draws(ids, 1, "a"), draws(ids, 0, "b")):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.03
