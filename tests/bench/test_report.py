"""Reports: one object, whole or not at all, gone on with only where the facts are the same."""

import json

import pytest

from megaflux_kernels.bench.report import Report, Row, one_of, table

FACTS = {"device": "d", "versions": {"torch": "1"}, "attention_backend": "flash", "commit": None}


def test_rows_survive_and_are_replaced_by_name(tmp_path):
    file = tmp_path / "r.json"
    first = Report(file, FACTS)
    first.add(
        Row("step", "ours-none", "s", "step_ms", 2.0, "ms", 3), Row("step", "ours-mlp", "s", "step_ms", 3.0, "ms")
    )
    again = Report(file, FACTS, resume=True)
    assert again.has("step", "ours-none", "s", "step_ms") and not again.has("step", "ours-none", "s", "mfu")
    again.add(Row("step", "ours-none", "s", "step_ms", 1.0, "ms", 9))
    content = json.loads(file.read_text())
    assert {k: content[k] for k in FACTS} == FACTS
    assert [(row["arm"], row["value"], row["samples"]) for row in content["rows"]] == [
        ("ours-mlp", 3.0, 1),
        ("ours-none", 1.0, 9),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("changed", FACTS)
def test_other_facts_begin_anew(tmp_path, capsys, changed):
    file = tmp_path / "r.json"
    Report(file, FACTS).add(Row("step", "a", "s", "step_ms", 2.0, "ms"))
    assert Report(file, FACTS | {changed: "other"}, resume=True).rows == []
    assert f"another {changed}" in capsys.readouterr().out
    assert Report(file, FACTS).rows == []  # not asked to resume


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"bench": 1}]}', '{"rows": []}'])
def test_what_is_no_report_is_left_alone(tmp_path, content):
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="no report of a bench"):
        Report(file, FACTS, resume=True)
    assert file.read_text() == content


def test_a_table_has_a_line_per_arm_and_a_column_per_metric():
    rows = [
        Row("step", "a", "s", "step_ms", 12.345, "ms"),
        Row("step", "a", "s", "peak_bytes", 3e9, "bytes"),
        Row("step", "b", "s", "step_ms", 0.01234, "ms"),
    ]
    head, first, second = table(rows).splitlines()
    assert head.split() == ["bench", "shape", "arm", "step_ms", "peak_bytes"]
    assert first.split() == ["step", "s", "a", "12.35", "3.000", "GB"] and second.split()[3:] == ["0.0123"]


def test_names_are_checked():
    assert one_of("b, a,b", ["a", "b"], "arm") == ["b", "a"]
    for text in ("", "a,c"):
        with pytest.raises(Exception, match="unknown arm"):
            one_of(text, ["a", "b"], "arm")
