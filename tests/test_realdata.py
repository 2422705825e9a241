"""The table of real data."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
from anywidth.realdata import DATA, Score, _problem, markdown, models, scores


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
