"""Work in processes: results in order, errors passed on, for any number of processes."""

import pytest

from megavideo.data.workers import map_processes


def halve(number: int) -> float:
    if number == 7:
        raise ValueError("seven")
    return number / 2


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_errors_arrive(workers: int) -> None:
    assert list(map_processes(halve, range(6), workers, chunk=2)) == [0, 0.5, 1, 1.5, 2, 2.5]
    with pytest.raises(ValueError, match="seven"):
        list(map_processes(halve, range(5, 9), workers))
