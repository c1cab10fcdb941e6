import random
import re

import pytest

from minids.data.tokenizer import load_tokenizer
from minids.reasoning.tasks import TASKS, CorpusStyle, ProgramTask, TraceTask
from minids.reasoning.tasks.chain import LARGEST, Chain
from minids.reasoning.tasks.steps import write_steps

PERFECT = CorpusStyle(slip=0, wrong_step=0, broken_format=0, cheating=0)


def passes(program, tests):
    """These are our own programs, from the grammar: no sandbox needed."""
    space = {}
    exec(program, space)
    try:
        exec(tests, space)
    except AssertionError:
        return False
    return True


@pytest.fixture(params=["trace", "program"])  # the families of chains of instructions
def task(request):
    return TASKS[request.param]()


def test_the_tokenizer_is_lossless_and_knows_no_other_text(task):
    tokenizer = task.tokenizer
    rng = random.Random(0)
    for _ in range(200):
        text = task.document(rng)
        ids = tokenizer.encode(text, allow_special=True)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert max(ids) < tokenizer.vocab_size
    assert tokenizer.token_bytes().tolist()[tokenizer.encode(" then")[0]] == 5
    with pytest.raises(ValueError, match="' ' is not a symbol"):
        tokenizer.encode("a7 z?")
    with pytest.raises(ValueError, match="'<' is not a symbol"):  # without allow_special a tag is text
        tokenizer.encode("<think>")


def test_the_tokenizer_is_read_from_its_file(tmp_path, task):
    task.tokenizer.save(tmp_path)
    text = task.document(random.Random(0))
    assert load_tokenizer(tmp_path).encode(text, allow_special=True) == task.tokenizer.encode(text, allow_special=True)
    (tmp_path / "tokenizer.json").write_text('{"type": "symbols", "symbols": [1, 2]}')
    with pytest.raises(ValueError, match="of an unknown kind"):
        load_tokenizer(tmp_path)


def test_training_and_held_out_share_no_problem(task):
    """By key, which for programs is the function itself: other examples of it do not make it another problem."""
    rng = random.Random(1)
    key = {"trace": lambda problem: problem.prompt, "program": lambda problem: problem.answer}[task.name]
    held_out = {key(problem) for problem in task.held_out(100)}
    training = {key(problem) for problem in task.draw(rng, 600)}
    assert len(training) > 150 and not training & held_out
    prompts = [task.document(rng).split("?")[0] + "?" for _ in range(200)]
    assert not {problem.prompt for problem in task.held_out(100)} & set(prompts)


def test_held_out_problems_are_different_balanced_and_always_the_same(task):
    problems = task.held_out(60)
    assert problems == type(task)().held_out(60)
    assert len({problem.prompt for problem in problems}) == 60
    counts = [sum(problem.difficulty == n for problem in problems) for n in task.difficulties]
    assert len(set(counts)) == 1


def test_a_seed_decides_the_training_problems(task):
    draw = lambda seed: task.draw(random.Random(seed), 20)  # noqa: E731
    assert draw(3) == draw(3) and draw(3) != draw(4)


def test_trace_answers_are_what_python_computes():
    rng = random.Random(0)
    for problem in TraceTask().draw(rng, 300):
        start, *steps = problem.prompt.rstrip("?").split(" ")
        value = int(start[1:])
        for step in steps:
            value = eval(f"{value}{step[1:]}")
            assert 0 <= value <= LARGEST
        assert problem.answer == str(value) and len(steps) == problem.difficulty


def test_program_answers_pass_their_tests_and_their_examples():
    for problem in ProgramTask().draw(random.Random(0), 200):
        assert passes(problem.answer, problem.tests), problem
        examples = re.findall(r"f\((\d+)\)=(\d+)", problem.prompt)
        assert len(examples) == 2 and examples[0][1] != examples[1][1]
        assert passes(problem.answer, "\n".join(f"assert f({x}) == {y}" for x, y in examples))
        assert not any(f"f({x})" in problem.tests for x, _ in examples)  # what is shown is not what judges
        assert not passes(f"def f(a): return {examples[0][1]}", problem.tests)


def test_the_missing_number_follows_from_the_first_example():
    """No other number of the grammar explains the first example, so a program that fails the tests is wrong."""
    rng = random.Random(0)
    task = ProgramTask()
    for _ in range(200):
        chain = task.chain(rng, rng.choice((1, 2, 3)), held_out=False)
        *known, (sign, operand) = chain.instructions
        assert sign in "+-"  # a subtraction finds it
        others = (Chain(chain.start, (*known, (sign, n))) for n in range(1, 10) if n != operand)
        assert all(other.values[-1] != chain.values[-1] for other in others)


def test_a_careful_author_is_right(task):
    """Whatever the style: documents without slips hold the template and the right answer."""
    rng = random.Random(0)
    for _ in range(100):
        chain = task.chain(rng, rng.choice(task.document_difficulties), held_out=False)
        problem = task.problem(rng, chain)
        answer = re.fullmatch("<think>.*</think><answer>(.*)</answer>", task.response(rng, chain, PERFECT))[1]
        assert answer == problem.answer


def test_written_steps_are_true_and_lead_to_the_end():
    rng = random.Random(0)
    for _ in range(100):
        chain = Chain.draw(rng, 5)
        thought, value = write_steps(rng, chain.start, chain.instructions, PERFECT, 1, ("en",))
        steps = thought.split(" then")
        assert len(steps) == 5 and value == chain.values[-1]
        for label, step in zip("bcdef", steps, strict=True):
            left, right = step.strip().removeprefix(label).split("=")
            assert eval(left) == int(right)


def test_the_web_has_the_faults_it_should_have(task):
    rng = random.Random(0)
    texts = [task.document(rng).split("?")[1] for _ in range(500)]
    share = lambda found: sum(map(found, texts)) / len(texts)  # noqa: E731
    template = re.compile("<think>.*</think><answer>.*</answer>")
    assert share(lambda t: template.fullmatch(t) is None) == pytest.approx(0.25, abs=0.06)
    assert share(lambda t: re.search(r"[+*-]\d+=\d", t) is None) == pytest.approx(0.60, abs=0.06)
    mixed = [t for t in texts if t.count("then") + t.count("然后") >= 2]
    assert 0.15 < sum("then" in t and "然后" in t for t in mixed) / len(mixed) < 0.40
