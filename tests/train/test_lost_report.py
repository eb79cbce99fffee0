"""Of all processes that find another one gone, one reports it."""

from concurrent.futures import ThreadPoolExecutor

from blockwise_lr.train.lost_process import forget_report, is_first_to_report


def test_one_of_many_processes_reports(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(is_first_to_report, [tmp_path] * 32))
    assert sum(answers) == 1


def test_the_next_attempt_reports_again(tmp_path):
    forget_report(tmp_path)
    assert is_first_to_report(tmp_path)
    assert not is_first_to_report(tmp_path)
    forget_report(tmp_path)
    assert is_first_to_report(tmp_path)


def test_without_room_for_the_file_all_report(tmp_path):
    assert is_first_to_report(tmp_path / "missing")
    assert is_first_to_report(tmp_path / "missing")
