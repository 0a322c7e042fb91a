"""Progress bars."""

from hf_selfjudge.utils.progress import progress_bar, tracked


def test_in_a_file(capsys):
    with progress_bar(3, "Read") as bar:
        for _ in range(6):
            bar.update(0.5)
    written = capsys.readouterr().err
    assert "Read: 100%" in written
    assert "3/3" in written
    assert written.count("Read") == 2  # the beginning and the end


def test_not_shown(capsys):
    with progress_bar(3, "Read", shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_tracked_items(capsys):
    assert list(tracked("abc", "Measure")) == ["a", "b", "c"]
    assert "Measure: 100%" in capsys.readouterr().err
