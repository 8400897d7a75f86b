from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from autocompress.cli import main
from autocompress.policy import Policy
from autocompress.records import Outcome, Score
from autocompress.system.run_folder import locked, remember_own
from autocompress.task import Task

FRONT = Path(__file__).parent / "fixtures" / "front.json"
SOURCE = """
import torch
from torch import nn
def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
def ten(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def colour(): return nn.Conv2d(3, 10, 3)
def no_module(): return 3
def raising(): return lambda trial: {}["lost"]
def no_policy(): return lambda trial: 3
"""


class Payload:
    """Touches a file when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the bad inputs in it."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(SOURCE)
    Path("key.toml").write_text("modle = 'own.py:ten'\ndata = 'digits'")
    Path("broken.toml").write_text("model = ")
    Path("space.toml").write_text("name = 'x'\n[widht]\nlow = 1")
    weights = {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}
    torch.save(weights, "good.pt")
    Path("truncated.pt").write_bytes(Path("good.pt").read_bytes()[:-200])
    Path("truncated.safetensors").write_bytes(b"\x10")
    torch.save(weights | {"1.weight": torch.zeros(10, 65)}, "wrong_shape.pt")
    torch.save(Payload(), "pickled.pt")
    Path("truncated.onnx").write_bytes(b"\x08\x0a\x12")
    for name, content in (("empty", None), ("cut", FRONT.read_bytes()[:1000]), ("text", b"no json"), ("partial", b'{"schema": 1}')):
        Path(name).mkdir()
        if content is not None:
            Path(name, "front.json").write_bytes(content)
    Path("fine").mkdir()
    Path("fine/front.json").write_bytes(FRONT.read_bytes())
    return tmp_path


def test_what_the_users_own_code_prints_is_no_data(place, capsys):
    Path("loud.py").write_text(f"print('importing')\n{SOURCE}\ndef loud():\n    print('building')\n    return ten()\n")
    assert main(["search", "--model", "loud.py:loud", "--data", "digits", "--dry-run", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["ok"]
    assert "importing" in told.err and "building" in told.err


OWN = "search --data digits --model own.py:ten --dry-run"
USAGE = [
    ("search --model torchvision:resnet19 --data digits --dry-run", "unknown model torchvision:resnet19", "did you mean"),
    ("search --model resnet18 --data digits --dry-run", "unknown model 'resnet18'", "torchvision:NAME"),
    ("search --model own.py:absent --data digits --dry-run", "no function 'absent'", "seven"),
    ("search --model absent.py:f --data digits --dry-run", "does not exist", "file.py:function"),
    ("search --model :f --data digits --dry-run", "does not import", "file.py"),
    ("search --model own.py:no_module --data digits --dry-run", "must return a torch.nn.Module", "return the model"),
    ("search --model own.py:ten --budget 10ms", "needs data", "--data"),
    ("search --data imagefolder:. --dry-run", "--data needs --model", "--model file.py:function"),
    ("search --weights fine.pt --dry-run", "--weights needs --model", "--model file.py:function"),
    (f"{OWN} --space own.py:raising", "own.py:raising raised KeyError: 'lost'", "--debug"),
    (f"{OWN} --space own.py:no_policy", "own.py:no_policy must draw a Policy, but drew int", "Policy"),
    ("search --model own.py:ten --data digit --dry-run", "unknown data 'digit'", "digits"),
    ("search --model own.py:ten --data imagefolder:absent --dry-run", "does not exist", "imagefolder:DIR"),
    ("search --model own.py:ten --data torchvision:CIFAR10?root=absent --dry-run", "CIFAR10 cannot be read from", "root=DIR"),
    ("search --device tpu --dry-run", "unknown device 'tpu'", "onnxruntime:cpu"),
    ("search --device onnxruntime:cpu?threads=0 --dry-run", "threads must lie in", "processors"),
    ("search --device onnxruntime:cpu?thread=1 --dry-run", "unknown option 'thread'", "threads"),
    (f"{OWN} --space defualt", "unknown search space", "did you mean default"),
    (f"{OWN} --space space.toml", "widht", "did you mean width"),
    ("search --budget 10", "needs a unit", "10ms"),
    ("search --budget 0", "needs a unit", "10ms"),
    ("search --budget 0ms", "greater than zero", "10ms"),
    ("search --budget -1ms", "greater than zero", "10ms"),
    ("search --budget abc", "number with a unit", "10ms"),
    ("search --budget 10parsec", "unknown unit 'parsec'", "10ms"),
    ("search --budget 10ms --budget 5ms", "twice", "once"),
    ("search --search-time 4", "needs a unit", "30m"),
    ("search --target-accuracy 95 --dry-run", "target_accuracy must lie in (0, 1], but got 95.0", "0.95"),
    ("search --trials 0", "--trials", "--help"),
    ("search --batch many", "--batch", "--help"),
    ("search --batch-size 0", "--batch-size", "--help"),
    ("search --learning-rate -1", "learning_rate", "--help"),
    ("search key.toml", "unknown key 'modle'", "did you mean model"),
    ("search broken.toml", "not TOML", "quotes"),
    ("search absent.toml", "cannot be read", "--model"),
    (f"{OWN} --weights absent.pt", "does not exist", "safetensors"),
    (f"{OWN} --weights truncated.pt", "cannot be read", "state dict"),
    (f"{OWN} --weights truncated.safetensors", "cannot be read", "state dict"),
    (f"{OWN} --weights pickled.pt", "cannot be read", "file.py:function"),
    (f"{OWN} --weights wrong_shape.pt", "must have shape (10, 64), but got (10, 65)", "another number of classes"),
    ("search --data digits --model own.py:seven --dry-run", "7 outputs and the data 10 classes", ""),
    ("search --data digits --model own.py:seven --out run", "7 outputs and the data 10 classes", ""),
    ("search --data digits --model own.py:colour --dry-run", "must take inputs of shape (1, 1, 8, 8)", "belong together"),
    ("search --resume", "--resume needs the folder", "--out RUN"),
    ("search --resume --out empty", "no search to resume", "--resume"),
    ("search --resume --out fine", "no search to resume", "--resume"),
    ("search --data digits --model own.py:ten --out .", "holds other files", "--out"),
    ("search --data digits --model own.py:ten --out fine", "holds other files, such as 'front.json'", "--out"),
    ("serach", "serach", "--help"),
    ("search --bugdet 10ms", "--bugdet", "--help"),
    ("show", "RUN", "--help"),
    ("show absent", "no front.json", "--out"),
    ("show empty", "no front.json", "--out"),
    ("report empty", "no front.json", "--out"),
    ("explain fine nobody", "no measured policy has the id 'nobody'", "known"),
    ("export fine --format foo --out x", "must be some of onnx, openvino, torch, but got 'foo'", "known"),
    ("export fine --format onnx --format foo --out x", "must be some of onnx, openvino, torch, but got 'foo'", "known"),
    ("export fine --format , --out x", "must be some of onnx, openvino, torch", "known"),
    ("measure absent.onnx", "does not exist", "ONNX file"),
    ("calibrate --time 0s", "greater than zero", "30m"),
    (f"{OWN} --student torchvision:resnet19", "unknown model torchvision:resnet19", "did you mean"),
    (f"{OWN} --student own.py:seven", "7 outputs", ""),
    (f"{OWN} --space absent.toml", "cannot be read", "default"),
    ("apply own.py:ten --policy absent.json --out x", "cannot be read", ""),
    ("apply own.py:ten --policy random:x --out x", "whole number", ""),
    ("inspect own.py:absent", "no function 'absent'", "seven"),
    ("measure own.py:absent", "no function 'absent'", "seven"),
    ("measure truncated.onnx", "is not a valid ONNX model", "export it again"),
    ("measure truncated.onnx --batch 8", "(--batch) is for models", "leave batch out"),
    ("measure truncated.onnx --input 3x8x8", "(--input) is for models", "leave input out"),
    ("inspect torchvision:resnet18 --html absent/page.html", "the folder of 'absent/page.html' does not exist", "--html"),
    ("inspect torchvision:resnet18 --input 3,8,8", "an input is written as its sizes", "write 3x8x8"),
    (f"show {300 * 'x'}", "cannot be used: File name too long", "check the path"),
    (f"search --model {300 * 'x'}.py:net --data digits --dry-run", "cannot be used: File name too long", "check the path"),
]
STORAGE = [("show cut", "is damaged", "resume"), ("show text", "is damaged", "resume"), ("show partial", "baseline", "resume")]
STORAGE += [("report cut", "is damaged", "resume"), ("explain partial best", "baseline", "resume")]
CASES = [(*case, 2) for case in USAGE] + [(*case, 6) for case in STORAGE]


def require_explained(captured, message, hint):
    lines = [line for line in captured.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert lines[0].startswith("error: ") and message in lines[0]
    assert hint in "\n".join(lines)
    assert len(lines) == 2 and len(lines[1]) > len("hint: "), "every error names its cure"
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("command", "message", "hint", "code"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_one_sentence_and_a_hint(place, capsys, command, message, hint, code):
    before = sorted(place.rglob("*"))
    assert main(command.split()) == code
    require_explained(capsys.readouterr(), message, hint)
    after = [path for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts]
    assert after == before, "nothing is written, nothing is executed"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("search --budget 10 --json", 2),
        ("show empty --json", 2),
        ("show --json cut", 6),
        ("search --json --bugdet 1ms", 2),
        ("--json nonsense", 2),
    ],
)
def test_errors_as_json(place, capsys, command, code):
    assert main(command.split()) == code
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert (content["schema"], content["ok"], content["error"]["code"]) == (1, False, code)
    assert content["error"]["message"] and content["error"]["hint"]
    assert captured.err == ""


def test_a_run_folder_in_use(place, capsys):
    with locked(Path("run")):
        assert main(["search", "--data", "digits", "--model", "own.py:ten", "--out", "run", "--quiet"]) == 6
    require_explained(capsys.readouterr(), "in use by process", "--out")


@pytest.fixture
def run(place):
    """A folder that holds a search of another task."""
    from autocompress.study.database import open_journal

    Path("run").mkdir()
    journal = open_journal(Path("run"), Task(model="own.py:ten", data="digits", seed=1), resume=False)
    journal.record(Outcome(id="int8", policy=Policy(), rung="unchanged", val_score=Score(value=0.5)))
    return Path("run")


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("--resume --seed 2", "another task: seed was 1, now 2", "--from /"),
        ("--resume --seed 1 --batch 8", "another task: batch was 1, now 8", "--out"),
        ("--seed 1", "already holds a search", "--resume"),
    ],
)
def test_a_run_folder_of_another_search(run, capsys, options, message, hint):
    before = (run / "study.db").read_bytes()
    assert main(f"search --quiet --data digits --model own.py:ten --out run {options}".split()) == 2
    require_explained(capsys.readouterr(), message, hint)
    assert (run / "study.db").read_bytes() == before


def test_a_search_is_resumed_without_saying_its_task_again(run, capsys):
    (run / "task.toml").write_text(Task(model="own.py:ten", data="digits", seed=1).to_toml())
    remember_own(run / "task.toml")
    assert main(["search", "--resume", "--out", "run", "--search-time", "9m", "--dry-run", "--json"]) == 0
    task = json.loads(capsys.readouterr().out)["task"]
    assert (task["model"], task["seed"], task["search_time"]) == ("own.py:ten", 1, "9m")
    assert main(["search", "--quiet", "--resume", "--out", "run", "--seed", "2"]) == 2
    require_explained(capsys.readouterr(), "another task: seed was 1, now 2", "--out")


@pytest.mark.parametrize("option", ["--resume --out", "--from"])
def test_the_code_of_a_folder_that_somebody_sent_is_not_run(place, capsys, option):
    Path("sent").mkdir()
    Path("sent/payload.py").write_text("from pathlib import Path\nPath('executed').touch()\ndef f(): return 3")
    Path("sent/task.toml").write_text('model = "${HERE}/payload.py:f"\ndata = "digits"')
    assert main(f"search --quiet {option} sent".split()) == 2
    require_explained(capsys.readouterr(), "which no search of yours on this machine has written", "name it yourself: --model")
    assert not Path("executed").exists()


def test_a_search_of_objects_is_resumed_where_the_objects_are(place, capsys):
    from autocompress.study.database import open_journal

    Path("objects").mkdir()
    task = Task(model="python:Net", data="python:Data")
    open_journal(Path("objects"), task, resume=False)
    Path("objects/task.toml").write_text(task.to_toml())
    assert main(["search", "--quiet", "--resume", "--out", "objects"]) == 2
    require_explained(capsys.readouterr(), "started from Python, with the object Net", "resume=True")


def test_a_damaged_database(run, capsys):
    (run / "study.db").write_bytes(b"\x00" * 64 + (run / "study.db").read_bytes()[64:])
    before = (run / "study.db").read_bytes()
    assert main(["search", "--quiet", "--data", "digits", "--model", "own.py:ten", "--out", "run", "--resume", "--seed", "1"]) == 6
    require_explained(capsys.readouterr(), "is damaged", "--out")
    assert (run / "study.db").read_bytes() == before


def test_a_bug_asks_for_a_report_and_debug_shows_where(place, capsys, monkeypatch):
    def fail(run):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("autocompress.results.read_front", fail)
    assert main(["show", "fine"]) == 1
    require_explained(capsys.readouterr(), "unexpected ZeroDivisionError: inside", "--debug")
    assert main(["--debug", "show", "fine"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("place_told", ["run/models", None])
def test_a_full_disk_is_told_as_one_wherever_it_shows(place, capsys, monkeypatch, place_told):
    def fail(run):
        raise OSError(errno.ENOSPC, "No space left on device", place_told)

    monkeypatch.setattr("autocompress.results.read_front", fail)
    assert main(["show", "fine"]) == 6
    require_explained(capsys.readouterr(), "cannot be written: No space left", "--resume")


@pytest.mark.parametrize(("path", "named"), [("data/train.npy", "'data/train.npy'"), (None, "a file")])
def test_a_disk_that_is_gone_is_no_bug(place, capsys, monkeypatch, path, named):
    def fail(run):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr("autocompress.results.read_front", fail)
    assert main(["show", "fine"]) == 6
    require_explained(capsys.readouterr(), f"{named} can no longer be read: Stale file handle", "--resume")


def test_ctrl_c_is_130(place, capsys, monkeypatch):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("autocompress.results.read_front", interrupt)
    assert main(["show", "fine"]) == 130
    assert capsys.readouterr() == ("", "error: interrupted by Ctrl-C\n")
    assert main(["show", "fine", "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["error"]["code"], told["error"]["kind"]) == (False, 130, "Interrupted")
