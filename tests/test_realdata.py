"""The table of real data."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
from anywidth.realdata import DATA, Score, _problem, append, heading, markdown, models, read, row, scores


def test_the_table_marks_the_best_of_each_column():
    found = [
        Score("wine", "network", 0, 0.90, -0.3),
        Score("wine", "network", 1, 0.94, -0.1),
        Score("wine", "SVM, RBF", 0, 0.95, float("nan")),
        Score("wine", "SVM, RBF", 1, 0.95, float("nan")),
        Score("diabetes", "network", 0, 0.5, -5.4),
    ]
    text = markdown(found)
    assert "| network | 0.920 ± 0.020 | **-0.200** |" in text
    assert "| SVM, RBF | **0.950** ± 0.000 |  |" in text
    assert text.index("**wine**") < text.index("**diabetes**")
    assert "| model | R2" in text[text.index("**diabetes**") :]


def test_a_row_is_the_line_of_the_table():
    mine = [Score("diabetes", "network", 0, 0.5, -5.4), Score("diabetes", "network", 1, 0.3, -5.2)]
    assert markdown(mine) == heading("diabetes") + row(mine, ("0.400", "-5.300"))
    assert row(mine) == "| network | 0.400 ± 0.100 | -5.300 |\n"


def test_kept_scores_come_in_their_turn_and_nothing_is_fitted_for_them(tmp_path):
    path = tmp_path / "scores.csv"
    assert read(path) == []
    names = list(models(_problem("wine")))
    for name in reversed(names):
        for split in range(2):
            append(path, Score("wine", name, split, 0.9, -0.1))
    with path.open("a") as file:
        file.write("wine,half a li")  # killed while it was written
    known = read(path)
    assert len(known) == 2 * len(names)
    append(path, Score("digits", "other", 0, 0.5, float("nan")))
    assert read(path)[-1].model == "other"

    def started(*_):
        pytest.fail("a model was fitted")

    found = list(scores(["wine"], 2, started, known))
    assert [(s.model, s.split) for s in found] == [(name, split) for name in names for split in range(2)]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="does not hold scores"):
        read(path)


def test_the_data_sets():
    for name in DATA:
        problem = _problem(name)
        assert 0 < problem.train < len(problem.y) == len(problem.X)
        assert problem.classes == (len(np.unique(problem.y)) <= 10)
        names = list(models(problem))
        assert names[-2:] == ["SVM, RBF", "GP, RBF"]
        assert any("transformer" in n for n in names) == (name == "digits")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("data", ["wine", "diabetes"])
def test_every_model_learns(data):
    for score in scores([data], 1):
        assert score.quality > (0.9 if data == "wine" else 0.3), score
        assert np.isnan(score.log_likelihood) == (data == "diabetes" and "SVM" in score.model)
