"""Bad inputs for all five commands, some of those that `fuzz.py` draws."""

from .fuzz import COMMANDS, Fuzz, explain


SEED = 0
TRIES = 25


def test_bad_inputs_give_one_line_and_exit_code_two(tmp_path):
    fuzz = Fuzz(tmp_path)
    results = [fuzz.attempt(number, SEED) for number in range(TRIES)]
    assert {result["command"] for result in results} == {f"dino-{name}" for name in COMMANDS}
    bad = [explain(result, SEED) for result in results if result["wrong"]]
    assert not bad, "\n".join(bad)
    assert sum(result["code"] == 2 for result in results) > TRIES / 2
