"""What an edit of a user's function changes, and what it does not."""

import functools
import subprocess
import sys
import textwrap
import types

import pytest

from dmmlib import attribution, unlearn
from dmmlib.fingerprint import of_own
from dmmlib.unlearn import Unlearned

BEFORE = """
import functools
import numpy as np
import torch
import helpers

RATE = 0.1
SETTINGS = {"steps": [1, 2]}
WEIGHTS = np.arange(3.0)
MEAN = torch.ones(2, requires_grad=True)
TEACHER = torch.nn.BatchNorm1d(2)
LOW = torch.ones(2, dtype=torch.bfloat16)
KINDS = {"a", "b", "c"}

class Config:
    share = 0.5
    def __init__(self): self.size = 3
    def scaled(self, x): return self.share * x
    @staticmethod
    def plus(x): return x + 1
    @property
    def twice(self): return 2 * self.size

config = Config()

@functools.lru_cache
def cached(x): return x + 1

def factor(power):
    def raised(x): return x ** power
    return raised

squared = factor(2)
halved = functools.partial(np.multiply, 0.5)

def helper(x, again=1):
    return method(x, again=0) if again else x * 4

def method(x, *, again=1):
    if type(x).__name__ in {"int", "float", "list"}:
        return [(lambda v: v + 5)(v) for v in KINDS]
    found = RATE * x + SETTINGS["steps"][0] + WEIGHTS.sum() + MEAN.sum() + TEACHER(LOW).sum() + config.scaled(x)
    found += cached(x) + squared(x)
    return found + halved(x) + helper(x) + helpers.third(x) + Config.plus(config.twice)
"""
HELPERS = "LIMIT = 7\ndef third(x): return x / LIMIT\ndef unused(x): return x\n"


def hash_of(text, helpers=HELPERS, name="users_own"):
    module, other = types.ModuleType(name), types.ModuleType("helpers")
    sys.modules[name], sys.modules["helpers"] = module, other
    try:
        exec(compile(textwrap.dedent(helpers), "helpers.py", "exec"), vars(other))
        exec(compile(textwrap.dedent(text), "own.py", "exec"), vars(module))
        return of_own(module.method)
    finally:
        del sys.modules[name], sys.modules["helpers"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("found = RATE * x", "found = RATE + x"),  # an operation
        ("x * 4", "x * 8"),  # a constant of a function that it calls
        ("RATE = 0.1", "RATE = 0.2"),
        ('"steps": [1, 2]', '"steps": [1, 3]'),
        ("np.arange(3.0)", "np.arange(3.0)[::-1]"),
        ("torch.ones(2", "torch.full((2,), 2.0"),
        ("BatchNorm1d(2)", "BatchNorm1d(3)"),  # an object of others, its weights
        ("torch.ones(2, dtype", "torch.zeros(2, dtype"),
        ('{"a", "b", "c"}', '{"a", "b", "d"}'),
        ("share = 0.5", "share = 0.6"),
        ("self.size = 3", "self.size = 4"),
        ("self.share * x", "self.share + x"),
        ("plus(x): return x + 1", "plus(x): return x + 2"),
        ("return 2 * self.size", "return 3 * self.size"),
        ("cached(x): return x + 1", "cached(x): return x + 2"),
        ("factor(2)", "factor(3)"),  # a closure
        ("x ** power", "x * power"),
        ("np.multiply, 0.5", "np.multiply, 0.6"),
        ("np.multiply, 0.5", "np.add, 0.5"),
        ("helper(x, again=1)", "helper(x, again=2)"),  # defaults
        ("method(x, *, again=1)", "method(x, *, again=2)"),
        ("v + 5", "v + 6"),  # nested
        ('"int", "float", "list"', '"int", "float", "dict"'),
        ("WEIGHTS.sum()", "WEIGHTS.max()"),
    ],
)
def test_an_edit_of_what_a_function_computes_with_is_seen(old, new):
    assert old in BEFORE
    assert hash_of(BEFORE) == hash_of(BEFORE)
    assert hash_of(BEFORE) != hash_of(BEFORE.replace(old, new))


def test_an_edit_of_another_module_of_theirs_is_seen_where_it_is_used():
    assert hash_of(BEFORE) != hash_of(BEFORE, HELPERS.replace("x / LIMIT", "x - LIMIT"))
    assert hash_of(BEFORE) != hash_of(BEFORE, HELPERS.replace("LIMIT = 7", "LIMIT = 8"))
    assert hash_of(BEFORE) == hash_of(BEFORE, HELPERS.replace("unused(x): return x", "unused(x): return -x"))


def test_comments_and_what_is_not_reached_change_nothing():
    moved = "# a comment\n\n" + BEFORE.replace("def helper", "UNUSED = 3\n\ndef helper")
    assert hash_of(BEFORE) == hash_of(moved)
    assert of_own(unlearn.get("dmm")) == {}, "the library's have versions"
    assert of_own(attribution.get("kernel")) == {}


SLOTTED = """
import dataclasses
class Base:
    __slots__ = ("_rate", "__hidden", "unset")
    def __init__(self, rate, hidden): self._rate, self.__hidden = rate, hidden
class Callable(Base):
    __slots__ = "steps"
    def __call__(self, x): return self._rate * x
@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    lr: float = 0.1
def closed(config, call):
    def method(x): return config.lr * call(x)
    return method
call = Callable(0.2, 0.3)
call.steps = [1, 2]
method = closed(Config(0.4), call)
"""


@pytest.mark.parametrize("new", ["Callable(0.5, 0.3)", "Callable(0.2, 0.5)", "[1, 3]", "Config(0.5)", "unset"])
def test_an_edit_of_what_stands_in_slots_is_seen(new):
    olds = {"Callable(0.5, 0.3)": "Callable(0.2, 0.3)", "Callable(0.2, 0.5)": "Callable(0.2, 0.3)", "[1, 3]": "[1, 2]"}
    old = olds.get(new, "Config(0.4)")
    edited = (
        SLOTTED.replace("call.steps", "call.unset = 1; call.steps") if new == "unset" else SLOTTED.replace(old, new)
    )
    for end in ("", "method = call\n"):  # in a closure, and of a callable itself
        assert hash_of(SLOTTED + end) == hash_of(SLOTTED + end)
        if not (end and "Config" in new):
            assert hash_of(SLOTTED + end) != hash_of(edited + end)


def test_what_takes_the_place_of_the_librarys_is_seen():
    dmm = unlearn.get("dmm")

    def of(scale):
        @functools.wraps(dmm)
        def wrapped(problem, **options):
            return scale * dmm(problem, **options)

        return of_own(wrapped), of_own(functools.partial(dmm, cost=scale))

    assert of(1) == of(1)
    assert all(one != two and one for one, two in zip(of(1), of(2), strict=True))


@pytest.mark.parametrize("odd", ["ITSELF", "(v for v in [])", "object()", "np.array([None, 'a'])", "print"])
def test_whatever_stands_among_globals_can_be_looked_at(odd):
    text = f"import numpy as np\nITSELF = []\nITSELF.append(ITSELF)\nODD = {odd}\ndef method(x): return ODD, x\n"
    assert hash_of(text) == hash_of(text)


def test_it_is_the_same_in_every_process(tmp_path):
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "own.py").write_text(BEFORE)
    code = "import own; from dmmlib.fingerprint import of_own; print(of_own(own.method)['code'])"

    def said(seed):
        path = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"}
        return subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True).stdout

    assert said("1") == said("2") == said("2"), "compiled, and from the cache of what is compiled"


def test_an_edited_method_or_attributor_gets_no_old_result(tiny):
    forget_set = tiny.forget_sets()["random_6"]

    def edited(shift, scale):
        @attribution.register("edited attributor")
        def fit(context):
            return attribution.fit("kernel", context, lam=scale)

        @unlearn.register("edited method", attributed=True)
        def method(problem):
            change = problem.attributor.effects([problem.forget])[0]
            return Unlearned.from_logits(problem.original_logits + change + shift(problem.labels), problem.labels, 0.0)

        return tiny.unlearned("edited method@edited attributor", forget_set).margins

    try:
        first = edited(lambda labels: 1.0 * (labels[:, None] == range(10)), 0.1)
        assert (edited(lambda labels: 1.0 * (labels[:, None] == range(10)), 0.1) == first).all()
        assert (edited(lambda labels: 2.0 * (labels[:, None] == range(10)), 0.1) - first).mean() == pytest.approx(1)
        assert abs(edited(lambda labels: 1.0 * (labels[:, None] == range(10)), 10.0) - first).max() > 1e-3
    finally:
        unlearn.METHODS.remove("edited method")
        attribution.ATTRIBUTORS.remove("edited attributor")
