"""Write long_tests.txt: the tests that conftest marks as slow, because they take long on a machine with two cores.

    python -m pytest -n 2 -m "not slow" --junitxml=durations.xml && python tests/list_long_tests.py durations.xml

Cases above 1.5 s go to the list, but the shortest case of a test stays in the fast set unless it takes 3 s. Tests that are
on the list already stay there; remove a line to measure it again.
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LONG, TOO_LONG = 1.5, 3.0
LIST = Path(__file__).with_name("long_tests.txt")


def durations(path):
    """Return the seconds of each test of a JUnit report, by ``file.py::Class::test[case]``."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        _, file, *classes = case.attrib["classname"].split(".")
        found["::".join([f"{file}.py", *classes, case.attrib["name"]])] = float(case.attrib["time"])
    return found


def long_tests(seconds):
    """Return the tests that take too long for the fast set."""
    cases = defaultdict(list)
    for name in sorted(seconds, key=lambda name: seconds[name]):
        cases[name.partition("[")[0]].append(name)
    others = {name for names in cases.values() for name in names[1:] if seconds[name] > LONG}
    return others | {names[0] for names in cases.values() if seconds[names[0]] > TOO_LONG}


if __name__ == "__main__":
    known = set(LIST.read_text().splitlines()) if LIST.exists() else set()
    LIST.write_text("\n".join(sorted(known | long_tests(durations(sys.argv[1])))) + "\n")
