"""500 malformed configs, checkpoints and data: each is refused in one line, or found sound; nothing runs, hangs or
writes elsewhere. More with ``python -m tests.fuzz --cases 5000 --seed 7``."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.place import Case, Place, case_of, catalog
from tests.fuzz.pool import _faults, run_cases
from tests.fuzz.worker import Watch

CASES, SEED = 500, 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_malformed_input_is_refused_in_one_line_and_does_nothing_else():
    results = list(run_cases(range(CASES), SEED))
    failed = [
        f"{item.number} {item.what}: {'; '.join(item.faults)}\n{item.report[-800:]}" for item in results if item.faults
    ]
    assert not failed, "\n".join(failed)
    kinds = Counter(item.kind for item in results)
    assert kinds == {"config": CASES * 4 // 10, "checkpoint": CASES * 3 // 10, "data": CASES * 3 // 10}
    refused = Counter(item.kind for item in results if item.code == 2)
    assert all(refused[kind] > kinds[kind] / 2 for kind in kinds), refused  # most of it is really malformed


@pytest.fixture
def place(tmp_path):
    parts = {name: tmp_path / name for name in ("inputs", "output", "canary", "secret.png", "made")}
    return Place(*parts.values())


def test_every_maker_has_its_turn_and_a_case_is_a_function_of_seed_and_number(monkeypatch, place):
    met = Counter()

    def counted(kind, number):
        def make(rng: random.Random, place: Place) -> Case:
            met[kind, number] += 1
            return Case(f"{kind} {number} {rng.random()}", [])

        return make

    makers = {kind: [counted(kind, number) for number in range(len(found))] for kind, found in catalog().items()}
    monkeypatch.setattr("tests.fuzz.place.catalog", lambda: makers)
    cases = [case_of(number, 3, place) for number in range(500)]
    assert set(met) == {(kind, number) for kind, found in makers.items() for number in range(len(found))}
    assert cases == [case_of(number, 3, place) for number in range(500)]
    assert cases != [case_of(number, 4, place) for number in range(500)]


# ------------------------------------------------------------------------ what the guards would see


@pytest.mark.parametrize(
    ("event", "arguments", "deed"),
    [
        ("os.system", (b"true",), "os.system"),
        ("subprocess.Popen", ("gs", ["gs"], None, None), "subprocess.Popen"),
        ("pickle.find_class", ("os", "system"), "pickle.find_class"),
        ("import", ("leakfree_canary", None, None, None, None), "import of leakfree_canary"),
        ("open", ("/elsewhere/file", "w", 0), "/elsewhere/file"),
        ("open", ("/elsewhere/file", None, 0o101), "/elsewhere/file"),
        ("open", ("/inside/../elsewhere/file", "wb", 0), "/elsewhere/file"),
        ("open", ("/secret", "r", 0), "read /secret"),
        ("os.mkdir", ("/elsewhere", 0o777, -1), "/elsewhere"),
        ("os.rename", ("/inside/a", "/elsewhere/a", -1, -1), "/elsewhere/a"),
        ("open", ("/insider/file", "w", 0), "/insider/file"),
    ],
)
def test_a_forbidden_deed_is_noted(event, arguments, deed):
    watch = Watch()
    watch.writes, watch.secret = ["/inside"], "/secret"
    watch(event, arguments)
    assert watch.deeds == []  # not armed
    watch.armed = True
    watch(event, arguments)
    assert len(watch.deeds) == 1
    assert deed in watch.deeds[0]


def test_what_is_allowed_is_not_noted():
    watch = Watch()
    watch.armed, watch.writes, watch.secret = True, ["/inside"], "/secret"
    for event, arguments in (
        ("open", ("/inside/file", "w", 0)),
        ("open", ("/elsewhere/file", "r", 0)),
        ("open", (3, "w", 0)),
        ("os.mkdir", ("/inside/more", 0o777, -1)),
        ("import", ("torch", None, None, None, None)),
    ):
        watch(event, arguments)
    assert watch.deeds == []


SOUND = {"code": 2, "stderr": "leakfree: error: a.yaml: no such file\n", "stdout": "", "problem": "", "deeds": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code": 1}, "exit code 1"),
        ({"code": 0}, "exit code 0"),
        ({"code": None, "problem": "Traceback\nKeyError: 'a'"}, "raised KeyError"),
        ({"stderr": ""}, "0 error lines"),
        ({"stderr": "leakfree: error: a: b is wrong\nleakfree: error: c\n"}, "2 error lines"),
        ({"stderr": "leakfree: error: a: b is wrong\nmore\n"}, "the last line"),
        ({"stderr": "UserWarning: x\nleakfree: error: a: b is wrong\n"}, "1 other lines"),
        ({"stderr": "leakfree: error: a: \x1b[31m is wrong\n"}, "control characters"),
        ({"stderr": f"leakfree: error: {'x' * 3000}\n"}, "3017 characters"),
        ({"stderr": "leakfree: error: 3\n"}, "says nothing"),
        ({"stdout": "Traceback (most recent call last)"}, "a traceback"),
        ({"deeds": ["os.system: x"]}, "did os.system"),
    ],
)
def test_a_broken_promise_is_told(place, change, words):
    case = Case("", [])
    assert _faults(case, place, SOUND, []) == []
    assert words in "; ".join(_faults(case, place, {**SOUND, **change}, []))


def test_what_is_left_behind_is_told(place):
    place.inputs.mkdir()
    case = Case("", [], writes=("/named",))
    assert _faults(case, place, SOUND, [place.output / "a", Path("/named/b")]) == []
    assert "wrote outside" in _faults(case, place, SOUND, [place.inputs / "a"])[0]
    place.canary.touch()
    assert _faults(case, place, SOUND, []) == ["code in the input ran"]
    assert "hangs" in _faults(case, place, "hangs: no end after 30 s", [])[1]
