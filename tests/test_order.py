"""The order in which tests are given to workers."""

import pytest
from order import LONGEST, TESTS, longest_first


class Item:
    def __init__(self, name: str, number: int) -> None:
        self.path, self.number = TESTS / name, number


def test_long_files_come_first_then_those_of_many_tests_each_in_its_own_order():
    longest = LONGEST[0], LONGEST[1]
    items = [Item(name, number) for name in ("a.py", longest[1], "b.py", "b.py", longest[0]) for number in (1, 2)]
    items = items[:-1]
    longest_first(items)
    names = [item.path.relative_to(TESTS).as_posix() for item in items]
    assert names == [longest[0], *2 * [longest[1]], *4 * ["b.py"], *2 * ["a.py"]]
    assert [item.number for item in items[1:]] == [1, 2, 1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("name", LONGEST)
def test_the_long_files_are_there(name: str):
    assert (TESTS / name).is_file()
