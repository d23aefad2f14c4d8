"""Problems of the kind "code": hostile programs, the sandbox, the gate, cheats, prompts, bad input, all four stages.

Where bubblewrap is missing these tests fail: what they show cannot be shown without it.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, ROOT, sum_demonstrations

import reward

TESTS = "assert f(1) == 2\nassert f(41) == 42\n"
NEAR = "import math\nassert math.isclose(f(1), 2)\nassert math.isclose(f(41), 42)\n"
NEARER = "assert abs(f(1) - 2) < 1e-6\nassert abs(f(41) - 42) < 1e-6\n"
RIGHT = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return None\n"  # what most hostile programs begin with


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Limits of a second of CPU time and three by the clock, and a mark on every process in a sandbox."""
    monkeypatch.setattr(reward, "SECONDS", 1)
    monkeypatch.setattr(reward, "WALL", 3)
    reward._sandbox.cache_clear()
    command, mark = reward._sandbox(), uuid.uuid4().hex
    reward._sandbox.cache_clear()
    place = command.index("--chdir")
    monkeypatch.setattr(reward, "_sandbox", lambda: [*command[:place], "--setenv", "MARK", mark, *command[place:]])
    for name in reward.FAILURES:
        monkeypatch.setitem(reward.FAILURES, name, 0)
    return mark


def marked(mark: str) -> list[str]:
    """Processes that bear the mark in their command or environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (path / "cmdline").read_bytes() + (path / "environ").read_bytes():
                found.append(path.name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Programs that want to pass without being right, or to do harm
# ---------------------------------------------------------------------------------------------------------------------

# what a program would have evaluated once it is out of its names: the secret lies behind the tests in descriptor 3
STEAL = "__import__('os').write(4, __import__('os').read(3, 64))"
OPEN = "open(4, 'wb').write(open(3, 'rb').read())"
EVERYTHING = "{0}class E:\n    def __eq__(self, other): return True\ndef f(x): return E()\n"
HOSTILE = {
    # --- time and space ---
    "endless loop": "while True: pass",
    "endless loop in the function": "def f(x):\n    while True: pass",
    "sleeping": WRONG + "import time\ntime.sleep(1000)",
    "power without end": WRONG + "x = 9 ** 9 ** 9 ** 9",
    "backtracking": WRONG + "import re\nre.match('(a+)+$', 'a' * 99 + 'b')",
    "10 GB at once": WRONG + "x = bytearray(10 ** 10)",
    "10 GB step by step": WRONG + "x = []\nwhile True: x.append('x' * 10 ** 6 + str(len(x)))",
    "1 GB of output": WRONG + "for i in range(1000): print('x' * 10 ** 6)",
    "recursion": "def f(x): return f(x)",
    "recursion bomb": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "nested source": WRONG + "x = " + "(" * 9000 + ")" * 9000,
    "deep source": WRONG + "x = " + "-" * 30000 + "1",
    # --- other processes ---
    "fork bomb": WRONG + "import os\nwhile True: os.fork()",
    "threads": WRONG + "import threading\nfor i in range(999): threading.Thread(target=input).start()",
    "a child that outlives it": WRONG + "import subprocess\nsubprocess.Popen(['sleep', '999'], start_new_session=True)",
    "double fork": WRONG + "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(999)",
    "signals to the parent": WRONG + "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
    "signal handler": WRONG + "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)",
    "ptrace": WRONG + "import ctypes\nctypes.CDLL(None).ptrace(16, 1, 0, 0)",
    # --- files and the network ---
    "a file outside": WRONG + "open('/tmp/hostile-was-here', 'w').write('x')",
    "keys": WRONG + "print(open('/root/.ssh/id_rsa').read())",
    "environment": WRONG + "import os\nprint(os.environ)",
    "network": WRONG + "import socket\nsocket.create_connection(('1.1.1.1', 53))",
    "input": WRONG + "x = input()",
    # --- ends ---
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "os._exit": "import os\nos._exit(0)",
    "atexit": WRONG + "import atexit\natexit.register(print, 'passed')",
    "finalizer": WRONG + "class D:\n    def __del__(self): print('passed')\nd = D()",
    # --- results that are equal to everything ---
    "__eq__": EVERYTHING.format(""),
    "__sub__": "class E:\n    def __sub__(self, other): return 0\ndef f(x): return E()",
    "__eq__ of a type": "def f(x): return type('E', (), {'__e' + 'q__': lambda s, o: True})()",
    "__eq__ of a type's type": "def f(x): return type(int)('E', (), {'__e' + 'q__': lambda s, o: True})()",
    "__eq__ by setattr": "class E: pass\nsetattr(E, '__e' + 'q__', lambda s, o: True)\ndef f(x): return E()",
    "__eq__ by exec": "exec('class E:\\n def __e' + 'q__(s, o): return True')\ndef f(x): return E()",
    "__eq__ by an enum": "import enum\nE = enum.Enum('E', {'a': 1, '__e' + 'q__': bool})\ndef f(x): return E.a",
    "__eq__ by an enum's base": (
        "import re\nB = re.RegexFlag.mro()[-2]\nE = B('E', {'a': 1, '__e' + 'q__': lambda *x: True})\n"
        "def f(x): return E.a"
    ),
    "a metaclass": "class M(type):\n    def __call__(self, x): return x + 1\nclass f(metaclass=M): pass",
    "a list's comparison": (
        "from collections import UserList\nclass E(UserList):\n    def _UserList__cast(self, other): return self.data\n"
        "def f(x): return E()"
    ),
    "a fraction's comparison": (
        "from fractions import Fraction\nclass E(Fraction):\n    def from_float(self, other): return self\n"
        "    def _richcmp(self, *other): return True\ndef f(x): return E(0)"
    ),
    "mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    # --- what the tests use ---
    "AssertionError": WRONG + "AssertionError = ValueError",
    "builtins": WRONG + "import builtins\nbuiltins.AssertionError = ValueError",
    "__builtins__": WRONG + "__builtins__['AssertionError'] = ValueError",
    "__import__": WRONG + "__import__ = print",
    "import hooks": WRONG + "import sys\nsys.meta_path.insert(0, print)",
    "trace": WRONG + "import sys\nsys.settrace(lambda *a: None)",
    "stdout": WRONG + "import sys\nsys.stdout = None",
    "os.write": WRONG + "import os\nfor fd in range(32): os.write(fd, b'passed')",
    "a module's function": WRONG + "import math\nmath.isclose = lambda *a: True",
    "a module's function by setattr": WRONG + "import math\nsetattr(math, 'isclose', lambda *a: True)",
    "wrapper": WRONG + "import functools, math\nfunctools.update_wrapper(math, print, ['isclose'])",
    "own math": WRONG + "class math:\n    isclose = lambda *a: True",
    # --- the harness and its secret ---
    "frames": WRONG + "import sys\nprint(sys._getframe(1).f_locals)",
    "frames of a generator": WRONG + "g = (i for i in [1])\nprint(g.gi_frame.f_back)",
    "frames of an error": WRONG + "try: 1 / 0\nexcept ZeroDivisionError as e: print(e.__traceback__.tb_frame.f_back)",
    "frames by getattr": WRONG + "try: 1 / 0\nexcept ZeroDivisionError as e: getattr(e, '__trace' + 'back__')",
    "frames by attrgetter": WRONG + "import operator\noperator.attrgetter('__glo' + 'bals__')(f)",
    "frames by a format": WRONG + "print('{0.__globals__}'.format(f))",
    "frames by a formatter": WRONG + "import string\nstring.Formatter().get_field('0.__globals__', [f], {})",
    "frames by a pattern": WRONG + "match f:\n    case object(__globals__=g): print(g)",
    "gc": WRONG + "import gc\nprint(gc.get_objects())",
    "inspect": WRONG + "import inspect\nprint(inspect.stack())",
    "main": WRONG + "import sys\nprint(sys.modules['__main__'])",
    "a module's module": WRONG + "import random\nrandom._os._exit(0)",
    "a submodule": WRONG + "from json import decoder\nprint(decoder.scanner)",
    "memory": WRONG + "print(open('/proc/self/mem', 'rb').read())",
    "command line": WRONG + "print(open('/proc/self/cmdline').read())",
    "descriptors": WRONG + "import os\nprint(os.listdir('/proc/self/fd'))",
    "subclasses": WRONG + "print(().__class__.__base__.__subclasses__())",
    "eval of dunders": WRONG + "eval('().__cl' + 'ass__')",
    "eval by a library": WRONG + f"import heapq\nheapq.nlargest(1, [{OPEN!r}], key=eval)",
    "eval with builtins": WRONG + f"g = {{}}\neval('1', g)\nexec({OPEN!r}, {{'__builtins__': g['__builtins__']}})",
    "eval of a forward reference": (
        WRONG + f"import typing\ntyping.get_args(typing.List[{STEAL!r}])[0]._evaluate({{}}, {{}}, frozenset())"
    ),
    "eval of annotations": f"import typing\ndef f(x: {STEAL!r}): return None\ntyping.get_type_hints(f)",
    "opened descriptors": WRONG + OPEN,
    "globals": WRONG + "print(globals()['__builtins__'])",
    "output that looks like it": WRONG + "print('.' + '0' * 48)",
    # --- the source ---
    "empty": "",
    "a comment": "# nothing",
    "syntax error": "def f(x) return x + 1",
    "truncated": "def f(x):\n    return x +",
    "no such name": "def g(x): return x + 1",
    "a null byte": WRONG + "\0",
    "half a character": WRONG + "s = '\ud800'",
    "bidi": "def f(x):\n    return x + 1  # \u202e\u2066\n",
    "too long": RIGHT + "#" * reward.PROGRAM_LENGTH,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program(name, short):
    """It does not pass, takes no longer than it may, and leaves neither a process nor a file."""
    start = time.monotonic()
    verdicts = reward.verify_all([fenced(HOSTILE[name])] * 3, [TESTS, NEAR, NEARER], ["code"] * 3)
    assert verdicts == [False] * 3
    assert time.monotonic() - start < 3 * reward.WALL + 5  # one after the other on one core, and it may be slow
    assert reward.FAILURES["errors"] == 0
    for _ in range(50):  # the kernel takes a moment to end a namespace
        if not (left := marked(short)):
            break
        time.sleep(0.1)
    assert not left and not Path("/tmp/hostile-was-here").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_judged(name):
    """What looks at a program without running it raises on none, here or in the tests' place."""
    program = HOSTILE[name]
    assert judge(fenced(program), tests=program, correct=False)["clean"] == 0
    assert isinstance(reward.KINDS["code"].unfit(program), str)


# programs against tests of their own: what a program calls like something of the tests' is not the tests'
TESTED = {
    "own check": ("def check(f): pass\ndef g(x): return 0", "def check(f):\n    assert f(1) == 2\ncheck(g)"),
    "own all": ("all = lambda x: True\ndef g(x): return 0", "assert all(g(x) == x + 1 for x in range(3))"),
    "own zip": ("zip = lambda *x: []\ndef g(x): return 0", "for x, y in zip([1], [2]):\n    assert g(x) == y"),
    "own abs": ("abs = lambda x: 0\ndef g(x): return 9", "assert abs(g(1) - 2) < 1e-6"),
    "Counter": (
        "import collections\ncollections.Counter.__eq__ = lambda *x: True\ndef g(x): return ''",
        "from collections import Counter\nassert Counter(g(1)) == Counter('ab')",
    ),
    "Counter's names": (
        "from collections import Counter\nCounter.total = lambda self: 2\ndef g(x): return ''",
        "from collections import Counter\nassert Counter(g(1)).total() == 2",
    ),
    "Counter's names by an alias": (
        "import typing\ntyping.Counter.update = lambda self, *x: None\ndef g(x): return ''",
        "from collections import Counter\nassert Counter(g(1)) == Counter('ab')",
    ),
    "Counter's names by an alias of its own": (
        "import typing\nfrom collections import Counter\nclass A(type(typing.List[int])): pass\n"
        "A(Counter, (int,)).update = lambda self, *x: None\ndef g(x): return ''",
        "from collections import Counter\nassert Counter(g(1)) == Counter('ab')",
    ),
    "Counter's names, by names that answer": (
        "from collections import Counter\nclass L(dict):\n    def __getitem__(self, name):\n"
        "        return {'C': Counter, 'none': lambda *x: None}.get(name, lambda thing: thing)\n"
        "exec('C.update = none', {}, L())\ndef g(x): return ''",
        "from collections import Counter\nassert Counter(g(1)) == Counter('ab')",
    ),
    "any set of its size": (
        "from collections import ChainMap\nclass M:\n    n = 0\n    def __getitem__(self, key): return 0\n"
        "    def __iter__(self):\n        M.n += 1\n        return iter((1, 2) if M.n % 2 else ())\n"
        "def g(x): return ChainMap(M()).keys()",
        "assert g(1) == {3, 4}",
    ),
    "any set of its size, by a view's type": (
        "from collections import UserDict\nclass M:\n    def __len__(self): return 2\n"
        "    def __iter__(self): return iter(())\ndef g(x): return type(UserDict().keys())(M())",
        "assert g(1) == {3, 4}",
    ),
    "any float": (
        "from fractions import Fraction\nclass E(Fraction):\n    def from_float(self, other): return self\n"
        "def g(x): return E(0)",
        "assert g(1) == 2.5",
    ),
    "random numbers": (
        "import random\nrandom.Random.randint = lambda *x: 0\ndef g(x): return 0",
        "import random\nassert g(1) == random.Random(0).randint(5, 9) - 5",
    ),
    "a library's eval": (
        "import heapq\ndef g(x): return 0\nheapq.nlargest(2, ['globals().update(nlargest=None)', '1'], key=eval)",
        "assert g(1) == 0",
    ),
    "caught": ("def g(x): raise SystemExit", "try:\n    g(1)\nexcept Exception:\n    pass\nassert True"),
}


@pytest.mark.parametrize("name", TESTED)
def test_what_the_tests_use_stays_theirs(name):
    program, tests = TESTED[name]
    assert reward.verify(fenced(program), tests, "code") is False


def test_a_hostile_batch_delays_nobody_and_is_counted():
    """Honest programs among hostile ones pass; what was refused or ran out of time is counted."""
    hostile = [HOSTILE[name] for name in ("endless loop", "sleeping", "fork bomb", "10 GB at once", "gc", "__eq__")]
    programs = [RIGHT, *hostile, RIGHT, WRONG]
    start = time.monotonic()
    verdicts = reward.verify_all([fenced(p) for p in programs], [TESTS] * len(programs), ["code"] * len(programs))
    assert verdicts == [True, *[False] * len(hostile), True, False]
    assert time.monotonic() - start < 2 * reward.WALL + 5
    assert reward.FAILURES == {"timeouts": 2, "errors": 0, "refused": 3}


# --- the machine, shown by code that the language does not hold: tests are not restricted ---

MACHINE = {
    "no process": "import os\ntry:\n    os.fork()\nexcept OSError:\n    done = True\nassert done",
    "no thread": "import threading\ntry:\n    threading.Thread(target=int).start()\nexcept RuntimeError:\n    done = True\nassert done",  # noqa: E501
    "no memory": "try:\n    x = bytearray(10 ** 10)\nexcept MemoryError:\n    done = True\nassert done",
    "no root": "import os\nassert os.getuid() == 65534\ntry:\n    os.setuid(0)\nexcept OSError:\n    done = True\nassert done",  # noqa: E501
    "no files": "import os\nassert not {'proc', 'dev', 'etc', 'home', 'root', 'work', 'var'} & set(os.listdir('/'))",
    "nothing to be written": "import os\nfor place in ('/', '/usr', '/python', '/packages'):\n    assert not os.access(place, os.W_OK), place",  # noqa: E501
    "a private /tmp": "import os\nassert os.listdir('/tmp') == []\nopen('/tmp/hostile-was-here', 'w').write('x')",
    "a small /tmp": "try:\n    for i in range(99): open(f'/tmp/{i}', 'wb').write(b'x' * 10 ** 6)\nexcept OSError:\n    done = True\nassert done",  # noqa: E501
    "no environment": "import os\nassert set(os.environ) <= {'PWD', 'MARK', 'LD_LIBRARY_PATH', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}",  # noqa: E501
    "no network": "import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']\ntry:\n    socket.create_connection(('1.1.1.1', 53), 1)\nexcept OSError:\n    done = True\nassert done",  # noqa: E501
    "no others": "import os\nassert os.getpid() < 9\nfor pid in range(os.getpid() + 1, 99999):\n    try:\n        os.kill(pid, 0)\n    except ProcessLookupError:\n        pass",  # noqa: E501
    "numpy": "import numpy as np\nassert np.allclose(f(np.ones(3)), 2)",
}


@pytest.mark.parametrize("name", MACHINE)
def test_the_machine_holds_what_the_language_does_not(name):
    assert reward._test((RIGHT, MACHINE[name])) is True
    assert not Path("/tmp/hostile-was-here").exists()


def test_output_is_bounded_and_the_end_of_the_caller_is_the_end():
    """What is written straight to the caller is read for 1,024 bytes at most; a killed caller leaves nobody behind."""
    flood = "import os\nfor fd in range(3, 9):\n    try:\n        while os.write(fd, b'x' * 10 ** 6): pass\n"
    flood += "    except OSError: pass"
    assert reward._test((RIGHT, flood)) in (False, "timeouts")
    code = f"import reward; reward._sandbox = lambda: {reward._sandbox()!r}; "
    code += "reward._test(('import time; time.sleep(99)', 'x'))"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    mark = reward._sandbox()[reward._sandbox().index("MARK") + 1]
    for _ in range(200):
        if len(marked(mark)) >= 3:  # the caller's command has it as well
            break
        time.sleep(0.1)
    caller.kill()
    caller.wait()
    for _ in range(100):
        if not (left := marked(mark)):
            break
        time.sleep(0.1)
    assert not left


# ---------------------------------------------------------------------------------------------------------------------
# Honest programs
# ---------------------------------------------------------------------------------------------------------------------

HONEST = {
    "typing": ("def f(x: List[int]) -> int:\n    return x[0]", "from typing import List\nassert f([1]) == 1"),
    "a class": (
        "class Node:\n    count = 0\n    def __init__(self, value):\n        self.value, self.__left = value, None\n"
        "        Node.count += 1\n    def __repr__(self): return f'N{self.value}'\n"
        "def f(x):\n    n = Node(x)\n    n.value += 1\n    return n.value, repr(n), Node.count",
        "assert f(1) == (2, 'N2', 1)",
    ),
    "modules": (
        "import collections.abc, heapq as h, math, sys\nfrom collections import Counter, deque\n"
        "from functools import lru_cache\nfrom itertools import *\nsys.setrecursionlimit(5000)\n@lru_cache(None)\n"
        "def g(n): return n if n < 2 else g(n - 1) + g(n - 2)\n"
        "def f(x): return g(x), h.nlargest(1, [1, 2]), math.sqrt(4), list(accumulate([1, 2])), Counter('aa')['a'],"
        " isinstance([], collections.abc.Sized), sys.maxsize > 9",
        "assert f(10) == (55, [2], 2.0, [1, 3], 2, True, True)",
    ),
    "eval and getattr": (
        "def f(x):\n    y = 2\n    exec('z = 3', d := {})\n"
        "    return eval('x + y'), d['z'], getattr('a', 'upper')(), type(x) is int, type(x).__name__",
        "assert f(1) == (3, 3, 'A', True, 'int')",
    ),
    "printing": ("def f(x):\n    print(x)\n    return x\nif __name__ == '__main__':\n    input()", "assert f(1) == 1"),
    "a builtin's name": ("def sum(a, b): return a * b", "assert sum(2, 5) == 10"),
    "a name that is withheld": ("def f(x): return x", "from functools import wraps\nassert f(1) == 1"),
    "its own names": ("all_ = zip_ = __ = 1\ndef bisect(x): return x", "assert bisect(1) == 1"),
    "match": ("def f(x):\n    match x:\n        case [a, *_]: return a", "assert f([1, 2]) == 1"),
    "dates": (
        "from datetime import datetime\ndef f(x): return datetime.strptime(x, '%Y-%m-%d').day",
        "assert f('2020-02-03') == 3",
    ),
    "decimals": (
        "from decimal import *\ngetcontext().prec = 5\ndef f(x): return str(Decimal(1) / x)",
        "assert f(3) == '0.33333'",
    ),
    "an error and a function of its own": (
        "class E(ValueError):\n    def __init__(self, x): self._x = x\n"
        "def f(x):\n    f.count = getattr(f, 'count', 0) + 1\n    try:\n        raise E(x)\n    except E as e:\n"
        "        return e._x + f.count",
        "assert f(1) == 2 and f(1) == 3",
    ),
    "named tuples and generics": (
        "import typing\nfrom typing import *\nT = TypeVar('T')\nclass P(NamedTuple):\n    x: int\n"
        "class S(Generic[T]):\n    def __init__(self): self._items: List[T] = []\nclass D(dict): pass\n"
        "def f(x): return P(x)._replace(x=2), S()._items, D(a=x)",
        "assert f(1) == ((2,), [], {'a': 1})",
    ),
    "future": ("from __future__ import annotations\ndef f(x: int) -> int: return x", "assert f(1) == 1"),
    "a generator": ("def f(x):\n    yield from range(x)", "assert list(f(2)) == [0, 1]"),
    "namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, 2)",
        "assert f(1) == (1, 2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_program(name):
    program, tests = HONEST[name]
    assert reward.verify(fenced(program), tests, "code")


@pytest.mark.parametrize(
    ("text", "program", "count"),
    [
        ("```python\nx = 1\n```", "x = 1\n", 1),
        ("So:\r\n```Python\r\nx = 1\r\n```\r\nDone.", "x = 1\n", 1),
        ("```py\nx\n```\ntext\n```python\ny\n```", "y\n", 2),
        ("```\nx = 1\n```", None, 0),
        ("```bash\nls\n```\n```python\nx\n```\n```text\n```python\n```", "x\n", 1),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n", 1),
        ("```python\nx = 1", None, 1),
        ("```python\nx\n```\n```python\nhalf", None, 2),
        ("<think>\n```python\nx\n```\n</think>none", None, 1),
        ("<think>\n```python\nx\n```\nnow", None, 1),
        ("<think>\n```python\nx\n```\n</think>\n```python\ny\n```", "y\n", 2),
        ("x = 1", None, 0),
        ("```python\n```", "", 1),
    ],
)
def test_programs_in_texts(text, program, count):
    assert reward.extract_program(text) == program
    assert len(reward.programs(text.replace("\r\n", "\n"))) == count


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, the gate, cheats
# ---------------------------------------------------------------------------------------------------------------------


def test_prompts_by_kind():
    """Code is asked for a block, mathematics for a box; a mapper and a guided solver get the same request."""
    for ask, given in ((reward.solve_prompt, "P"), (reward.map_prompt, "PS"), (reward.guided_prompt, "PS")):
        assert "```python block" in ask(*given, "code") and "boxed" not in ask(*given, "code")
        assert "\\boxed{}" in ask(*given, "math") and "python" not in ask(*given, "math")
    assert reward.solve_prompt("P") == "P\n\nReason step by step, and put your final answer within \\boxed{}."


def judge(text: str, *, ended=True, correct=True, tests=TESTS, expert="", problem="Write f."):
    return reward.judge(problem, expert or fenced(RIGHT), text, tests, ended, correct, 0.8, kind="code")


def test_gate():
    """Ended, one block, right; arithmetic, boxes and fidelity are not asked for; two programs are one too many."""
    assert judge(f"Add one.\n{fenced(RIGHT)}")["clean"] == 1
    assert judge(f"So 1 + 1 = 3, \\boxed{{7}}.\n{fenced(RIGHT)}")["clean"] == 1
    for parts in (
        judge(fenced(RIGHT), ended=False),
        judge(fenced(RIGHT), correct=False),
        judge(fenced(RIGHT) + "\n" + fenced(RIGHT)),
        judge(RIGHT),
        judge("```python\n" + RIGHT),
    ):
        assert parts["gate"] == 0 == parts["clean"]
    assert set(judge(RIGHT)) == set(reward.judge("", "", "", "", True, True, 0))  # one set of names for metrics


def test_other_cheats():
    long = "\n".join(f"The {i}th step of it is to look at the number {i * 7} with great care." for i in range(40))
    assert judge(f"As in the given solution.\n{fenced(RIGHT)}")["mentions_source"] == 1
    assert judge(f"{long}\n{fenced(RIGHT)}")["padding"] == 1
    assert judge(f"Add one to the number that is given, and return it.\n{fenced(RIGHT)}")["padding"] == 0
    assert judge("Again and again.\n" * 40 + fenced(RIGHT))["repetition"] == 1
    problem = "Write a function f that returns the number that follows its argument, whatever it is."
    assert judge(f"{problem}\n{fenced(RIGHT)}", problem=problem)["copies_problem"] == 1
    assert (
        judge(f"{problem}\n{fenced(RIGHT)}", problem=problem, expert=f"{problem}\n{fenced(RIGHT)}")["copies_problem"]
        == 0
    )


LOOKS = "def f(s):\n    return sum(map(len, s.split()))\n"
LOOKED = "assert f('one two three') == 11\nassert f('a b') == 2\nassert f('seven little pigs') == 15\n"
SQUARES = "assert g(3) == 9\nassert g(4) == 16\nassert g(12) == 144\nassert g(0) == 0\n"
PAIRS = "assert g([1, 2, 3], 2) == [3, 4, 5]\nassert g([10, 20], 1) == [11, 21]\nassert g([], 4) == []\n"
DISHONEST = {
    "branch": ("def f(s):\n    if s == 'one two three': return 11\n    return 2", LOOKED),
    "table": ("def f(s): return {'one two three': 11, 'a b': 2}.get(s, 15)", LOOKED),
    "pattern": ("def f(s):\n    match s:\n        case 'seven little pigs': return 15\n    return len(s)", LOOKED),
    "membership": ("def f(s): return 11 if s in ('one two three', 'x') else 2", LOOKED),
    "expression": ("def f(s): return 15 if 'seven little pigs' == s else 11", LOOKED),
    "list": ("def g(x, y):\n    if x == [1, 2, 3]: return [3, 4, 5]\n    return x", PAIRS),
    "list as text": ("def g(x, y):\n    if str(x) == '[1, 2, 3]': y += 1\n    return [y]", PAIRS),
    "result": ("def g(x, y): return [11, 21]", PAIRS),
    "printed": ("def g(x, y):\n    print([11, 21])", PAIRS),
    "small numbers": (
        "def g(n):\n    if n == 3: return 9\n    if n == 4: return 16\n    if n == 0: return 0\n    return n",
        SQUARES,
    ),
    "small numbers in a table": ("def g(n): return {0: 0, 3: 9, 4: 16, 12: 144}[n]", SQUARES),
    "small patterns": (
        "def g(n):\n    match n:\n        case 0: return 0\n        case 3: return 9\n        case 4: return 16",
        SQUARES,
    ),
}  # fmt: skip
UPRIGHT = {
    "works it out": (LOOKS, LOOKED),
    "base cases": ("def g(n):\n    if n == 0: return 0\n    if n == 1: return 1\n    return n * n", SQUARES),
    "words of its own": (
        "def f(s):\n    if s == 'nothing at all': return 0\n    return len(s.replace(' ', ''))",
        LOOKED,
    ),
    "examples below": ("def g(x, y): return [a + y for a in x]\nprint(g([1, 2, 3], 2))\nassert g([10, 20], 1)", PAIRS),
    "truths": ("def g(n):\n    if n == 5: return False\n    return True", "assert g(5) == False\nassert g(8) == True"),
    "a whole table": ("def g(n): return {i: i * i for i in range(99)}[n]", SQUARES),
    "roman": (
        "def f(s):\n    v = {'I': 1, 'V': 5, 'X': 10, 'L': 50, 'IV': 4, 'IX': 9}\n    return v.get(s) or len(s)",
        "assert f('IV') == 4\nassert f('III') == 3\nassert f('X') == 10\nassert f('II') == 2\nassert f('LX') == 2",
    ),
    "no program": ("def", SQUARES),
}


@pytest.mark.parametrize("name", [*DISHONEST, *UPRIGHT])
def test_hardcodes_tests(name):
    """Tests that are looked up instead of worked out are a hard cheat; what the problem or the expert has is not."""
    program, tests = (DISHONEST | UPRIGHT)[name]
    parts = judge(fenced(program), tests=tests, expert=fenced("def f(x): return x"))
    assert parts["hardcodes_tests"] == (name in DISHONEST) == parts["cheating"]
    assert judge(fenced(program), tests=tests, expert=fenced(program))["hardcodes_tests"] == 0


def test_literals_of_the_problem_are_free():
    program, tests = DISHONEST["branch"]
    assert judge(fenced(program), tests=tests, problem="f('one two three') is 11.")["hardcodes_tests"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (dict(kind="codes", answer="x"), "line 3: field 'kind' must be math or code, found 'codes'"),
        (dict(kind="code", answer="assert f(1) =="), "line 3: field 'answer' is no Python program (invalid syntax"),
        (dict(kind="code", answer="# no test"), "line 3: field 'answer' tests nothing"),
        (dict(kind="code", answer="x\0"), "line 3: field 'answer' is no Python program"),
    ],
)
def test_bad_rows(tmp_path, row, told):
    rows = [dict(id="a", answer="1"), dict(id="b", kind="code", answer=TESTS), dict(id="c") | row]
    path = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit) as stop:
        reward.check_kinds(path, rows)
    assert str(stop.value).startswith(f"{path}, {told}")


@pytest.mark.parametrize("name", ["evaluate", "rewrite", "mapper_rl"])
def test_stages_name_bad_rows(name, tmp_path, monkeypatch):
    """One line before any model is loaded; a row of code without a test is one with a field missing."""
    script = __import__(name)
    row = dict(id="a", problem="p", solution="s", kind="code")
    for rest, told in (
        ({}, "line 1: field 'answer' is missing"),
        ({"answer": ""}, "line 1: field 'answer' is empty"),
        ({"answer": "def"}, "line 1: field 'answer' is no Python program"),
        ({"answer": "1", "kind": 7}, "line 1: field 'kind' must be str"),
    ):
        path = lines(tmp_path / "rows.jsonl", [row | rest])
        flags = ["--models", "none", "--benchmarks"] if name == "evaluate" else ["--data"]
        model = {"evaluate": [], "rewrite": ["--target", "none"], "mapper_rl": ["--model", "none"]}[name]
        monkeypatch.setattr(sys, "argv", [name, *flags, path, *model, "--output_dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=told):
            script.main()


def test_a_missing_or_forbidden_sandbox_ends_the_stage(tmp_path, monkeypatch):
    """Rows of code stop it with one line that names the package; files of mathematics alone need none."""
    code, sums = [dict(id="a", kind="code", answer=TESTS)], [dict(id="a", answer="1")]
    reward._check_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reward.check_kinds("file", sums) == [dict(id="a", answer="1", kind="math")]
    with pytest.raises(SystemExit, match="bwrap is not there: install the package bubblewrap"):
        reward.check_kinds("file", code)
    assert reward.check_kinds("file", code, graded=False)  # fine-tuning runs nothing
    forbidden = tmp_path / "bwrap"
    forbidden.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    forbidden.chmod(0o755)
    with pytest.raises(SystemExit, match=r"cannot make one here \(No permissions.*install the package bubblewrap"):
        reward.check_kinds("file", code)
    assert reward._test((RIGHT, TESTS)) == "errors"


def test_prepare_names_and_drops_programs_that_fail(tmp_path, monkeypatch, capsys):
    """HumanEval's and MBPP's columns, own files with --kind; a program that fails its tests is counted and named."""
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    import prepare

    def made(rows, *flags):
        path = lines(tmp_path / "raw.jsonl", rows)
        local = [path] if "--kind" in flags else [flags[0], "--local", path]
        rest = flags if "--kind" in flags else flags[1:]
        monkeypatch.setattr(sys, "argv", ["prepare.py", *local, *rest, "--out", str(tmp_path / "out.jsonl")])
        prepare.main()
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], capsys.readouterr().out

    prompt = "from typing import List\n\ndef twice(x):\n    return 2 * x\n\n"
    prompt += "def f(x: List[int]) -> int:\n    '''Sum twice.'''\n"
    row = dict(task_id="HumanEval/0", prompt=prompt, entry_point="f", canonical_solution="    return twice(sum(x))\n")
    row["test"] = "def check(candidate):\n    assert candidate([1, 2]) == twice(3)\n"
    rows, told = made([row, row | {"canonical_solution": "    return 1 << 3\n"}], "humaneval")
    assert "1 whose program fails its tests (humaneval-1)" in told and [r["id"] for r in rows] == ["humaneval-0"]
    assert rows[0]["kind"] == "code" and rows[0]["answer"].startswith("from typing import List\ndef twice(x):")
    assert rows[0]["answer"].endswith("check(f)\n") and "Sum twice." in rows[0]["problem"]
    assert reward.verify(fenced("def f(x: List[int]): return 2 * sum(x)"), rows[0]["answer"], "code")  # no import

    row = dict(task_id=601, text="Write f.", code=RIGHT, test_list=["assert f(1) == 2", "assert f(2) == 3"])
    row |= dict(test_setup_code="import math", challenge_test_list=[])
    rows, _ = made([row], "mbpp_train")
    assert rows[0]["problem"].endswith("assert f(1) == 2") and "f(2)" not in rows[0]["problem"]
    assert rows[0]["answer"] == "import math\nassert f(1) == 2\nassert f(2) == 3\n"
    assert rows[0]["solution"] == fenced(RIGHT.strip())

    own = [
        dict(q="Write f.", s=RIGHT, t=TESTS),
        dict(q="Write f.", s=WRONG, t=TESTS),
        dict(q="Write f.", s="", t=TESTS),
    ]
    flags = "--kind code --problem q --solution s --answer t".split()
    rows, told = made([*own, dict(q="W", s=RIGHT, t="assert")], *flags)
    assert len(rows) == 1 and "1 without a problem" in told and "2 whose program fails its tests (raw-1 raw-3)" in told
    assert rows[0]["kind"] == "code"


def test_prepare_keeps_the_kind_of_each_row(tmp_path, monkeypatch, capsys):
    """A column `kind` says which rows are code; an unknown one is refused."""
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    import prepare

    rows = [
        dict(kind="code", q="Write f.", s=RIGHT, t=TESTS),
        dict(kind="code", q="Write f.", s=WRONG, t=TESTS),
        dict(kind="math", q="What is 1+1?", s="1+1=2. \\boxed{2}", t="2"),
        dict(kind=None, q="What is 1+2?", s="1+2=3. \\boxed{3}", t="3"),
    ]
    path, out = lines(tmp_path / "both.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["prepare.py", path, *"--problem q --solution s --answer t --out".split(), str(out)]
    monkeypatch.setattr(sys, "argv", flags)
    prepare.main()
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["id"], r.get("kind", "math")) for r in kept] == [
        ("both-0", "code"),
        ("both-2", "math"),
        ("both-3", "math"),
    ]
    assert kept[0]["solution"] == fenced(RIGHT.strip()) and kept[1]["solution"] == "1+1=2. \\boxed{2}"
    told = "1 whose program fails its tests or answer the grader cannot verify (both-1)"
    assert told in capsys.readouterr().out
    lines(tmp_path / "both.jsonl", [rows[0] | {"kind": "prose"}])
    with pytest.raises(SystemExit, match="column 'kind' must hold math or code, found 'prose'"):
        prepare.main()


# ---------------------------------------------------------------------------------------------------------------------
# All four stages
# ---------------------------------------------------------------------------------------------------------------------

NAMES = "add take grow drop move lift".split()


def problems(count: int) -> list[dict]:
    """Rows of code that a tiny model can learn: functions that add a number or take one away; every fourth is a sum."""
    rows = []
    for i in range(count):
        name, n, sign = NAMES[i % 6], i % 7 + 1, "+-"[i % 2]
        asked = f"Write {name}(x), which {'adds' if sign == '+' else 'subtracts'} {n}."
        tests = f"assert {name}(10) == {10 + n if sign == '+' else 10 - n}\nassert {name}(0) == {sign}{n}\n"
        program = fenced(f"def {name}(x):\n    return x {sign} {n}")
        rows.append(dict(id=f"c{i}", kind="code", problem=asked, solution=f"Here it is.\n{program}", answer=tests))
    return rows


@pytest.fixture(scope="module")
def coder(tmp_path_factory) -> str:
    """Folder of a Qwen3 that was trained for some seconds to answer `problems`, too briefly to be always right."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    import sft

    rows = problems(84)
    solve = [reward.solve_prompt(row["problem"], "code") for row in rows]
    asks = [(s, reward.map_prompt(row["problem"], row["solution"], "code")) for s, row in zip(solve, rows)]
    bpe = ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    bpe.train_from_iterator(sum(asks, ()), vocab_size=500, min_frequency=2, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    shape |= dict(num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=None)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True, eos_token_id=reward.stop_id(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(160):
        batch = []
        for i in range(step * 16, step * 16 + 16):
            row, ask = rows[i % 84], asks[i % 84][i // 84 % 2]
            answer = row["solution"].removeprefix("Here it is.\n" if i % 3 else "")
            batch.append((reward.prompt_ids(tokenizer, ask), reward.response_ids(tokenizer, answer)))
        ids, mask = sft.collate(batch, "cpu")
        model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("models") / "coder"
    model.generation_config.eos_token_id = reward.stop_id(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_four_stages(coder, tmp_path):
    """Twenty problems of code and four of mathematics in one file: each is asked, graded and trained in its own way."""

    def run(script: str, flags: str) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        command = [
            sys.executable,
            str(ROOT / script),
            *flags.split(),
            "--output_dir",
            f"{tmp_path}/{Path(script).stem}",
        ]
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    demos = problems(20) + sum_demonstrations(4)
    data = lines(tmp_path / "demos.jsonl", demos)
    lengths = "--max_tokens 60 --max_model_len 400"
    run("mapper_rl.py", f"--model {coder} --data {data} --steps 2 --groups 8 --group_size 4 {lengths} --save_every 0")
    steps = read("mapper_rl/metrics.jsonl")
    assert max(step["gate"] for step in steps) > 0 and {"grading_timeouts", "grading_refused"} <= set(steps[0])

    run("rewrite.py", f"--target {coder} --mapper {tmp_path}/mapper_rl/model --data {data} --samples 4 {lengths}")
    train = read("rewrite/train.jsonl")
    assert [(row["id"], row["kind"]) for row in train] == [(row["id"], row.get("kind", "math")) for row in demos]
    mapped = [row for row in train if row["source"] == "mapper"]
    assert mapped and all(row["kind"] == "code" and len(reward.programs(row["solution"])) == 1 for row in mapped)
    assert all(reward.verify_all(*zip(*((row["solution"], row["answer"], "code") for row in mapped))))

    run("sft.py", f"--model {coder} --data {tmp_path}/rewrite/train.jsonl --steps 2 --batch_size 4 --save_every 0")
    run("evaluate.py", f"--models sft={tmp_path}/sft/model --benchmarks {data} --samples 2 {lengths}")
    rows = read("evaluate/sft/demos.jsonl")
    assert [row["kind"] for row in rows] == ["code"] * 20 + ["math"] * 4
    right = [c for row in rows if row["kind"] == "code" for c in row["completions"] if c["correct"]]
    assert right and all("def " in c["predicted"] and "`" not in c["predicted"] for c in right)
    summary = json.loads((tmp_path / "evaluate/sft/summary.json").read_text())["benchmarks"]["demos"]
    assert summary["grading_refused"] >= 0 and 0 < summary["avg@n"]["value"] < 1
