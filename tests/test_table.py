"""The table of scores: its intervals, its verdicts, and the sentence below it."""

import re

import numpy as np
import pytest
from conftest import ROOT

from support.scores.table import MEASURES, Items, Score, compare, in_a_sentence, markdown, table, texts


def test_a_difference_is_marked_where_its_interval_excludes_zero():
    items = Items.of([{}] * 20, range(20))
    numbers = np.arange(20.0)
    base = {name: Score(items, numbers) for name in ("rouge_l", "copies", "stops", "loss")}
    new = {"rouge_l": 5, "copies": 5, "stops": 10 * (-1.0) ** np.arange(20), "loss": -5}
    tuned = {name: Score(items, numbers + shift) for name, shift in new.items()}
    rows = compare({"base": base, "tuned": tuned}, 100, 1)
    assert {row.measure: row.verdicts() for row in rows} == {"rouge_l": [1], "loss": [1], "stops": [0], "copies": [-1]}
    lines = table(rows, ["base", "tuned"], texts("en"))
    marked = {line.split("|")[1].strip(): line.rstrip(" |").split()[-1] for line in lines[2:]}
    assert list(marked.values()) == ["better", "better", marked["ends by itself, %"], "worse"]
    assert marked["ends by itself, %"].endswith("]")
    assert in_a_sentence(rows, ["base", "tuned"], texts("en")) == [
        "tuned against base: better in recorded answers, persona's worth; worse in originality; "
        "no clear difference in ending by itself."
    ]
    assert in_a_sentence(rows, ["base", "tuned"], texts("zh"))[0].startswith(
        "tuned 与 base 相比：变好的有与原文重合、人设的作用；"
    )
    assert in_a_sentence(compare({"base": base}, 5, 1), ["base"], texts("en"))[0].startswith("Add --baseline_path")


def test_the_sentence_agrees_with_the_rows_of_a_family():
    items = Items.of([{}] * 20, range(20))

    def sentence(**shifts):
        models = {
            name: {measure: Score(items, np.full(20, shift * on)) for measure, shift in shifts.items()}
            for on, name in enumerate(("base", "tuned"))
        }
        return in_a_sentence(compare(models, 20, 1), ["base", "tuned"], texts("en"))[0].split(": ")[1]

    assert sentence(breaks_said=0, breaks_likely=-5, attack_margin=5) == "better in staying in role."
    assert sentence(breaks_said=-5, breaks_likely=5) == "better in staying in role."  # they differ: the first one
    assert sentence(breaks_said=0, breaks_likely=5, attack_margin=5) == "no clear difference in staying in role."


def test_a_difference_of_few_is_not_called_sure():
    items = Items.of([{}] * 8, np.arange(8) // 2)
    models = {name: {"rouge_l": Score(items, np.full(8, value))} for name, value in (("base", 1.0), ("tuned", 9.0))}
    (row,) = compare(models, 20, 1)
    assert row.clusters == 4 and row.differences == [(8, 8, 8)] and row.verdicts() == [0]
    assert row._replace(clusters=5).verdicts() == [1]
    large = compare({"base": {"perplexity": Score(items, np.full(8, np.log(1234.56)))}}, 5, 1)
    assert "| 1,235 [1,235, 1,235] |" in table(large, ["base"], texts("en"))[2]


def test_table_lines_up_under_chinese_names():
    lines = markdown([["role", "x"], ["孙悟空", "1"], ["a", "22"]])
    assert lines == ["| role   | x  |", "|--------|----|", "| 孙悟空 | 1  |", "| a      | 22 |"]


def test_intervals_draw_questions_and_pair_the_models():
    """Against a bootstrap written out: answers to one question are drawn together, for both models alike."""
    generator = np.random.default_rng(0)
    items = Items.of([{}] * 36, np.repeat(np.arange(12), 3))
    base = np.repeat(generator.normal(0, 1, 12), 3) + generator.normal(0, 0.1, 36)
    models = {"base": {"loss": Score(items, base)}, "tuned": {"loss": Score(items, base + 0.5)}}
    (row,) = compare(models, 200, 7)
    drawn = np.random.default_rng(7)
    found = [base.reshape(12, 3)[drawn.choice(12, 12)].mean() for _ in range(200)]
    low, high = np.percentile(found, (2.5, 97.5))
    assert row.models[0] == pytest.approx((base.mean(), low, high))
    assert row.differences == [pytest.approx((0.5, 0.5, 0.5))] and row.verdicts() == [-1]
    assert compare({"a": models["base"], "b": models["base"]}, 50, 1)[0].differences == [(0, 0, 0)]
    assert high - low > 2 * 1.96 * base.std() / 6  # answers drawn one by one would look far more certain


def test_the_arrows_of_the_documentation_are_those_of_the_measures():
    page = (ROOT / "docs/scores.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) *(?:\(.*\))? +\| ([↑↓]) ", page, re.M)
    titles = {text: MEASURES[name].better for name, text in texts("en").items() if name in MEASURES}
    assert {title for title, _ in rows} == set(titles)
    assert all({"↑": 1, "↓": -1}[arrow] == titles[title] for title, arrow in rows)
