from snd_nerfstudio.probing import progress
from snd_nerfstudio.probing.progress import reporting


def test_where_nobody_looks_a_line_is_written_each_minute_and_at_the_end(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with reporting() as report:
        for step in range(1, 11):
            now += 25.0
            report("Training", step, 10)
        report("Testing", 1, 1)
        report("Testing", 1, 1)
    captured = capsys.readouterr()
    # the first step sets the clock; a minute is over at the fourth, seventh and tenth
    assert captured.err.splitlines() == [
        "Training: 4 of 10",
        "Training: 7 of 10",
        "Training: 10 of 10",
        "Testing: 1 of 1",
        "Testing: 1 of 1",
    ]
    assert captured.out == ""


def test_a_terminal_shows_a_bar_that_leaves_nothing_behind(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")  # what the machine says of its own terminal does not matter
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with reporting() as report:
        report("Training", 1, 2)
        report("Training", 2, 2)
    captured = capsys.readouterr()
    assert "Training" in captured.err and "2/2" in captured.err and captured.out == ""
    assert "Training: 2 of 2" not in captured.err  # the line for those who do not look
