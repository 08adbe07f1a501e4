"""Files: what is understood reads alike whatever its form; what is no table is named as what it is."""

import json

import numpy as np
import pytest
from known_laws import sweep

from llm_jax.config import UserError
from llm_jax.scaling.reading import read_points
from llm_jax.scaling.tables import check_points


def test_every_kind_of_file_gives_the_same_table(tmp_path):
    frame = sweep().head(4).reset_index(drop=True)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "semicolons.csv", index=False, sep=";", encoding="utf-8-sig")
    frame.to_csv(tmp_path / "tabs.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.json", orient="records", double_precision=15)
    frame.to_json(tmp_path / "columns.json", double_precision=15)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True, double_precision=15)
    for path in tmp_path.iterdir():
        read = read_points(path)
        assert list(read) == list(frame), path.name
        assert np.allclose(read.to_numpy(float), frame.to_numpy(), rtol=1e-9), path.name
    assert read_points(tmp_path / "tabs.tsv").attrs["notes"] == ("columns are separated by tabs",)


def test_cells_are_numbers_truths_or_texts_and_missing_ones_are_missing(tmp_path):
    (tmp_path / "a.csv").write_text("N, good,name,loss\n1e6,True,a,3.5\n\n2e6,false,3,NaN\n")
    frame = read_points(tmp_path / "a.csv")
    assert frame["good"].tolist() == [True, False] and frame["name"].tolist() == ["a", "3"]
    assert frame["N"].tolist() == [1e6, 2e6] and np.isnan(frame["loss"].iloc[1])
    assert frame.index.tolist() == [2, 4]  # the file's lines, the empty one counted


NO_TABLES = {
    "image.csv": (b"\x89PNG\r\n\x1a\n\0\0", "is a PNG image, no table; tables are .csv"),
    "paper.pdf": (b"%PDF-1.7 ...", "is a PDF document"),
    "sheet.xlsx": (b"PK\x03\x04...", "save the sheet as CSV"),
    "binary.csv": (bytes(range(256)), "is a binary file"),
    "latin.csv": ("N,D,loss\n1,2,ä".encode("latin-1"), "is no UTF-8 text"),
    "torn.json": (b'{"N": [1, 2', "not JSON"),
    "other.json": (b'{"law": {}, "schema": 1}', "holds an object of 'law', 'schema', not a list of runs"),
    "number.json": (b"3", "holds something else, not a list of runs"),
    "torn.jsonl": (b'{"N": 1}\n{"N": ', "line 2: not JSON"),
    "torn.parquet": (b"PAR1....", "damaged or cut off"),
    "empty.csv": (b"", "no rows"),
    "header.csv": (b"N,D,loss\n", "no rows"),
    "ragged.csv": (b"N,D,loss\n1,2,3\n1,2,3,4\n", "line 3 has 4 cells, the header 3"),
    "quote.csv": (b'n,N,D,loss\na,1,2,3\n"b,1,2,3\nc,1,2,3\n', "line 3 opens a quote"),
    "deep.json": (b"[" * 100_000, "not JSON"),
    "twice.csv": (b"N,D,loss,loss\n1,2,3,4\n", "has the column 'loss' twice"),
    "mixed.csv": (b"N;D,loss\n1,2,3\n", "both commas and semicolons"),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_a_file_that_is_no_table_is_named_as_what_it_is(tmp_path, name):
    content, said = NO_TABLES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_points(tmp_path / name)
    assert said in str(error.value) and "\n" not in str(error.value)
    for jargon in ("pandas", "tokeniz", "Errno", "codec", "DataFrame"):
        assert jargon not in str(error.value)


def test_a_missing_file_is_answered_with_the_nearest_table(tmp_path):
    (tmp_path / "points.csv").write_text("N,D,loss\n")
    (tmp_path / "point.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"did you mean '.*points\.csv'"):
        read_points(tmp_path / "point.csv")
    with pytest.raises(UserError, match=r"a folder, not a table; .*points\.csv"):
        read_points(tmp_path)


def test_a_bad_cell_of_a_file_is_named_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("N,D,loss\n1e6,1e8,3.5\n\n1e7,1e8,-3.1\n")
    with pytest.raises(UserError, match=r"line 4: loss is -3\.1"):
        check_points(read_points(tmp_path / "a.csv"), ("N", "D", "loss"))
    (tmp_path / "b.csv").write_text("N;D;loss\n1e6;1e8;3,5\n")
    with pytest.raises(
        UserError, match="line 2: loss is '3,5', not a number; decimals are written with a point"
    ):
        check_points(read_points(tmp_path / "b.csv"), ("N", "D", "loss"))


def test_an_object_of_columns_of_uneven_length_is_no_table(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"N": [1, 2], "loss": [3]}))
    with pytest.raises(UserError, match="not a list of runs"):
        read_points(tmp_path / "a.json")
