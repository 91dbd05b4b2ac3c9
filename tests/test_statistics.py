"""Student's t distribution against published tables."""

import pytest

from peft_onelayer.statistics import Z_95, student_point

# Two-sided 95 % points, as tables have them.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    7: 2.365,
    8: 2.306,
    10: 2.228,
    29: 2.045,
    30: 2.042,
    120: 1.980,
}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_points_are_those_of_the_tables(freedom):
    assert round(student_point(Z_95, freedom), 3) == TABLE[freedom]


def test_other_points_are_those_of_the_tables():
    # one-sided 99.5 % and 99.95 %: z = 2.575829 and 3.290527
    assert [round(student_point(2.575829, freedom), 3) for freedom in (2, 7, 60)] == [9.925, 3.499, 2.660]
    assert [round(student_point(3.290527, freedom), 3) for freedom in (7, 8)] == [5.408, 5.041]
    assert student_point(Z_95, 20_000) == pytest.approx(Z_95, abs=2e-4)  # the normal distribution
